"""Train routers on this machine with the knobs that Router-Tuning's scripts have."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import prologue  # noqa: F401
from ranks import gpu_count, torchrun

from megatron_mod.process import one_message, run_command

ROOT = Path(__file__).resolve().parents[1]
FORMER = ("mod_n", "MOD_N", "mindskip_n", "MINDSKIP_N")  # of ROUTER_LAYERS
# What the recommended configurations have beside what the knobs say.
RECOMMENDED = {"checkpoint.interval": "50", "optimizer.average_fraction": "0.25"}


@dataclass(frozen=True)
class Knob:
    """An environment variable.

    Args:
        default: what it is where it is unset or empty.
        fields: settings that it stands for, the first of which it becomes.
    """

    name: str
    what: str
    default: str | None = None
    fields: tuple[str, ...] = ()

    def __str__(self) -> str:
        default = f" [{self.default}]" if self.default is not None else ""
        return f"  {self.name:<19} {self.what}{default}"


MODEL = ("model.checkpoint", "model.hf_path", "model.config")  # settings, one of which names it
KNOBS = (
    Knob("MODEL_NAME_OR_PATH", "local Hugging Face folder; must be set"),
    Knob("DATA_TYPE", "what tools/reformat_datasets.py wrote to data/reformatted, or `mixed`,\n"
         f"{'':22}what tools/mix_datasets.py wrote to data/mixed", "alpaca", ("data.train",)),
    Knob("MAX_TRAIN_SAMPLES", "samples of it, drawn once; `null`: all", "1000",
         ("data.max_train_samples",)),
    Knob("GRANULARITY", "attn, mlp or block, each _sequence or _token; of a mixture\n"
         f"{'':22}also expert_token", "attn_token", ("router.granularity",)),
    Knob("ROUTER_LAYERS", "how many of the deepest layers but the last are routed, `all`, or a\n"
         f"{'':22}list of zero-based indices (formerly mod_n, mindskip_n)", "16",
         ("router.layers",)),
    Knob("TARGET_CAPACITY", "share of sequences or tokens that keep a layer", "0.5",
         ("router.capacity", "router.work")),
    Knob("LEARNING_RATE", "peak", "0.01", ("optimizer.lr",)),
    Knob("WEIGHT_DECAY", "decoupled", "0", ("optimizer.weight_decay",)),
    Knob("NUM_EPOCHS", "times the samples are gone through", "1", ("train.epochs", "train.steps")),
    Knob("NUM_PROCESSES", "ranks; unset: one a GPU, or one"),
    Knob("PORT", "where they meet; unset: a free one"),
    Knob("OUTPUT_DIR", "of the run; unset: runs/MODEL/DATA_SAMPLES_GRANULARITY_...",
         fields=("checkpoint.save",)),
    Knob("MEGATRON_PATH", "the converted model, made if it is missing; unset: runs/MODEL/megatron",
         fields=MODEL),
)  # fmt: skip
DESCRIPTION = """Train routers on this machine, with Router-Tuning's knobs as environment variables.

  NUM_PROCESSES=4 PORT=29501 MODEL_NAME_OR_PATH=runs/hf bash launch/pretrain_router.sh \\
      [--section.field value ...]

The same command again goes on with the run. Words after the script are settings of
launch/pretrain_router.py (its --help), in place of the knob that stands for them; --dry-run says
what would run. Variables and their defaults:

"""


def main(words: Sequence[str]) -> None:
    if {"-h", "--help"} & set(words):
        argparse.ArgumentParser(
            prog="bash launch/pretrain_router.sh",
            usage="[VARIABLE=value ...] bash launch/pretrain_router.sh [--section.field value ...]",
            description=DESCRIPTION + "\n".join(map(str, KNOBS)),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ).parse_args(["--help"])
    knobs = read_knobs(os.environ, words)
    is_dry = "--dry-run" in words
    nproc, port = ranks_of(knobs)
    hf_path = Path(knobs["MODEL_NAME_OR_PATH"] or "")
    options = settings_of(knobs, hf_path)
    check(options, words, nproc=nproc, hf_path=hf_path if knobs["MODEL_NAME_OR_PATH"] else None)
    base = Path(knobs["MEGATRON_PATH"]) if knobs["MEGATRON_PATH"] else None
    if base is not None and not base.exists() and is_dry:
        options += ["--model.checkpoint=null", f"--model.hf_path={hf_path}"]
    elif base is not None and not is_dry:
        convert_once(hf_path, base)
    command, environment = [sys.executable], dict(os.environ)
    if not is_dry:
        command, environment = torchrun(nproc, port=port)
    command += [str(ROOT / "launch" / "pretrain_router.py"), *options, *words]
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def read_knobs(environment: Mapping[str, str], words: Sequence[str]) -> dict[str, str | None]:
    """The variables' values, or defaults; nothing of those in whose place a setting is given.

    Raises:
        ValueError: a former name, a knob and its setting, or no model.
    """
    for former in FORMER:
        if environment.get(former):
            raise ValueError(
                f"{former} = {environment[former]}: is called ROUTER_LAYERS here; set that."
            )
    if any(word.partition("=")[0] == "--config" for word in words):
        raise ValueError(
            "--config: this script has knobs in its place; start launch/pretrain_router.py with it."
        )
    found: dict[str, str | None] = {}
    for knob in KNOBS:
        value = environment.get(knob.name) or None
        given = next((word for word in words if _sets(word, knob.fields)), None)
        if value is not None and given is not None:
            raise ValueError(
                f"{knob.name} = {value} and {given} say the same; leave one of them out."
            )
        found[knob.name] = None if given is not None else value or knob.default
    is_elsewhere = any(_sets(word, MODEL) for word in words)
    if found["MODEL_NAME_OR_PATH"] is None and not is_elsewhere:
        raise ValueError("MODEL_NAME_OR_PATH: must be set, to a local Hugging Face folder.")
    if is_elsewhere and environment.get("MODEL_NAME_OR_PATH"):
        raise ValueError(
            f"MODEL_NAME_OR_PATH = {environment['MODEL_NAME_OR_PATH']}: would be ignored beside "
            "--model.checkpoint, --model.hf_path or --model.config; leave one of them out."
        )
    if not is_elsewhere:
        _name_places(found, words)
    elif found["OUTPUT_DIR"] is None and not any(_sets(w, ("checkpoint.save",)) for w in words):
        raise ValueError(
            "OUTPUT_DIR: must be set beside --model.checkpoint, --model.hf_path or --model.config."
        )
    return found


def _sets(word: str, fields: Sequence[str]) -> bool:
    name = word.removeprefix("--").partition("=")[0]
    return word.startswith("--") and any(f"{name}.".startswith(f"{field}.") for field in fields)


def _name_places(found: dict[str, str | None], words: Sequence[str]) -> None:
    """Check the model's folder, and fill in where the converted model and the run go."""
    from megatron_mod.config.model_folder import HuggingFaceFolder

    model = str(found["MODEL_NAME_OR_PATH"])
    if problem := HuggingFaceFolder().problem(model):
        raise ValueError(
            f"MODEL_NAME_OR_PATH = {model}: {problem} (of a model on the Hub: hf download {model} "
            "--local-dir DIR)."
        )
    runs = Path("runs", Path(model).resolve().name)
    found["MEGATRON_PATH"] = found["MEGATRON_PATH"] or str(runs / "megatron")
    if found["OUTPUT_DIR"] is None and not any(_sets(word, ("checkpoint.save",)) for word in words):
        parts = {
            "": ("DATA_TYPE", "MAX_TRAIN_SAMPLES", "GRANULARITY"),
            "layers": ("ROUTER_LAYERS",), "capacity": ("TARGET_CAPACITY",),
            "lr": ("LEARNING_RATE",), "wd": ("WEIGHT_DECAY",), "epochs": ("NUM_EPOCHS",),
        }  # fmt: skip
        name = "_".join(
            prefix + found[knob]
            for prefix, names in parts.items()
            for knob in names
            if found[knob] is not None
        )
        found["OUTPUT_DIR"] = str(runs / re.sub(r"[^\w.-]+", "-", name))


def ranks_of(knobs: Mapping[str, str | None]) -> tuple[int, int | None]:
    """How many ranks, and the port where they meet.

    Raises:
        ValueError: naming the variable.
    """
    nproc = knobs["NUM_PROCESSES"]
    if nproc is not None and not (nproc.isdecimal() and int(nproc) > 0):
        raise ValueError(f"NUM_PROCESSES = {nproc}: must be a whole number of at least 1.")
    port = knobs["PORT"]
    if port is None:
        return int(nproc or gpu_count() or 1), None
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"PORT = {port}: must be a whole number from 1 to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            raise ValueError(
                f"PORT = {port}: {error.strerror}; give another, or none, which takes a free one."
            ) from error
    return int(nproc or gpu_count() or 1), int(port)


def settings_of(knobs: Mapping[str, str | None], hf_path: Path) -> list[str]:
    """The knobs as settings of a training."""
    options = [f"--{name}={value}" for name, value in RECOMMENDED.items()]
    for knob in KNOBS:
        value = knobs[knob.name]
        if value is None or not knob.fields:
            continue
        field = knob.fields[0]
        if knob.name == "DATA_TYPE":
            value = _data_of(value)
        elif knob.name == "ROUTER_LAYERS" and not value.lstrip().startswith(("[", "{", "all")):
            field = "router.layers.deepest"
        options.append(f"--{field}={value}")
    return options


def _data_of(data_type: str) -> str:
    folder = (
        Path("data", "mixed") if data_type == "mixed" else Path("data", "reformatted", data_type)
    )
    path = folder / "data.jsonl"
    if not path.is_file():
        tool = "mix_datasets" if data_type == "mixed" else "reformat_datasets"
        raise ValueError(
            f"DATA_TYPE = {data_type}: there is no {path} here; tools/{tool}.py writes it, and "
            "--data.train FILE takes any other."
        )
    return str(path)


def check(
    options: Sequence[str], words: Sequence[str], *, nproc: int, hf_path: Path | None
) -> None:
    """Refuse what the training would, before anything is converted or a rank started.

    ``hf_path``: the model, if it is to be converted.

    Raises:
        ValueError: naming the variable that set it, and the setting.
    """
    import dataclasses

    from megatron_mod.commands.train import DryRun
    from megatron_mod.config import cli
    from megatron_mod.config.options import option
    from megatron_mod.config.validate import check_outputs
    from megatron_mod.conversion.families import family_of
    from megatron_mod.conversion.hf_reader import read_config
    from megatron_mod.training.job import arrange

    names = [option(field.name) for field in dataclasses.fields(DryRun)]
    _, settings = cli.split_off(words, names)
    try:
        config = cli.parse([*options, *settings])
        check_outputs(config)
        if hf_path is not None:
            shape = read_config(hf_path)
            arrange(config, family_of(shape).architecture_of(shape), world_size=nproc)
    except ValueError as error:
        for knob in KNOBS:
            if knob.fields and re.match(rf"{re.escape(knob.fields[0])}\b", str(error)):
                raise ValueError(f"{knob.name}: {error}") from error
        raise


def convert_once(hf_path: Path, base: Path) -> None:
    """Write the Megatron checkpoint of a model, unless it was written before.

    Raises:
        ValueError: it was written from something else.
    """
    source = base.with_name(f"{base.name}.source.json")
    files = sorted(path for path in hf_path.resolve().iterdir() if path.is_file())
    now = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    if base.exists():
        if source.exists() and json.loads(source.read_text(encoding="utf-8")) != now:
            raise ValueError(
                f"MODEL_NAME_OR_PATH = {hf_path}: {base} was converted from another folder, or "
                "from what this one held then; remove it, or set MEGATRON_PATH to another place."
            )
        return
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(json.dumps(now) + "\n", encoding="utf-8")
    tool = ROOT / "tools" / "convert_hf_to_megatron.py"
    command = [sys.executable, tool, "--hf-path", hf_path, "--save", base]
    if status := run_command([str(part) for part in command]):
        sys.exit(status)


if __name__ == "__main__":
    with one_message():
        main(sys.argv[1:])
