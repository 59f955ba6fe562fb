"""A diagnosis as one page of text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

TITLE, WIDTH = 18, 100  # columns
SHOWN = (
    "megatron_mod",
    "python",
    "torch",
    "megatron-core",
    "transformers",
    "transformer_engine",
    "apex",
)


def page(found: dict) -> str:
    """What ``diagnose`` found, as a person reads it."""
    return "\n".join(_lines(found))


def _lines(found: dict) -> Iterator[str]:
    yield "versions"
    torch = found["torch"] or {}
    for name in SHOWN:
        library = found["versions"].get(name, {"version": None, "supported": None})
        text = library["version"] or "not installed"
        if name == "torch" and torch:
            text += f", built for {'CUDA ' + torch['cuda'] if torch['cuda'] else 'the CPU'}"
            text += f", nccl {torch['nccl']}" if torch["nccl"] else ""
        supported = library["supported"]
        text += f" (supported: {supported})" if supported else ""
        yield _row(name, text + (f", of {found['folder']}" if name == "megatron_mod" else ""))
    others = {k: v["version"] for k, v in found["versions"].items() if k not in SHOWN}
    yield _row("others", ", ".join(f"{name} {version or '-'}" for name, version in others.items()))
    yield from _machine(found["machine"], torch.get("gpus", []))
    if found["uses"]:
        yield "\na training here uses"
        for part, used in found["uses"].items():
            why = f"; not {used['better']}: {used['why_not']}" if used["why_not"] else ""
            yield _row(part, used["what"] + why)
    if collective := found["collective"]:
        yield "\ncollective"
        how = f"works with {collective['backend']}" if collective["works"] else "fails"
        ranks, seconds = collective["ranks"], collective["seconds"]
        yield _row("all-reduce", f"of {ranks} rank(s): {how} ({seconds} s with starting them)")
    for kind in ("problems", "warnings"):
        if found[kind]:
            yield f"\n{kind}"
        for each in found[kind]:
            yield textwrap.fill(each["what"], WIDTH, initial_indent="  ", subsequent_indent="  ")
            yield textwrap.fill(
                each["remedy"], WIDTH, initial_indent="    -> ", subsequent_indent="       "
            )
    if found["can_train"]:
        on = f"{len(torch['gpus'])} GPU(s)" if torch.get("gpus") else "the CPU"
        yield f"\nA training can run here, on {on}."
    else:
        yield "\nA training cannot run here before the problems are mended."


def _machine(seen: dict, gpus: list[dict]) -> Iterator[str]:
    yield "\nmachine"
    size = f"{seen['memory_bytes'] / 2**30:.0f} GiB of memory"
    shared = seen["shared_memory_bytes"]
    size += f", {shared / 2**30:.1f} GiB of it shareable in /dev/shm" if shared else ""
    yield _row("system", f"{seen['system']}, {seen['cores']} cores, {size}")
    for number, gpu in enumerate(gpus):
        size = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        yield _row(
            f"GPU {number}", f"{gpu['name']}, {size}, compute capability {gpu['capability']}"
        )
    if not gpus:
        yield _row("GPUs", ", ".join(seen["gpus"]) + " (not used)" if seen["gpus"] else "none")
    if seen["driver"]:
        yield _row("driver", seen["driver"])
    settings = (f"{name}={value}" for name, value in seen["environment"].items())
    yield _row("environment", " ".join(settings) or "nothing that acts on the ranks")


def _row(title: str, text: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=f"  {title:<{TITLE}} ",
        subsequent_indent=" " * (TITLE + 3),
        break_on_hyphens=False,
        break_long_words=False,
    )
