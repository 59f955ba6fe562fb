"""What an evaluation found, as JSON and as a table."""

from __future__ import annotations

from megatron_mod.evaluation.backend import Backend
from megatron_mod.evaluation.perplexity import Quality

OF_LM_EVAL = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")


def build_report(
    backend: Backend, settings: dict, quality: Quality | None, tasks: dict | None
) -> dict:
    """``settings``, then what lm-eval says under its own names, the perplexity, and the pooling
    and capacity of all that was run."""
    report = {**settings, "pooling": backend.pooling}
    if quality is not None:
        report.update(perplexity=quality.perplexity, perplexity_tokens=quality.tokens)
    if tasks is not None:
        report.update({name: tasks[name] for name in OF_LM_EVAL if name in tasks})
    capacity = backend.capacity()
    if capacity:
        report["capacity"] = {
            "mean": sum(capacity.values()) / len(capacity),
            "per_layer": {str(layer): value for layer, value in capacity.items()},
        }
    return report


def table(report: dict, tasks: dict | None) -> str:
    """The report in a few lines a person understands."""
    rows = [("model", report["model"])]
    if "perplexity" in report:
        rows.append(
            ("perplexity", f"{report['perplexity']:.3f} ({report['perplexity_tokens']} tokens)")
        )
    if "capacity" in report:
        capacity = report["capacity"]
        layers = " ".join(f"{k}:{v:.2f}" for k, v in capacity["per_layer"].items())
        rows.append(("capacity", f"{capacity['mean']:.3f} (per layer {layers})"))
        pooling = report["pooling"]
        rows.append(("pooling", DECIDED_ON[pooling]))
    lines = [f"{name:<10}  {value}" for name, value in rows]
    if tasks is not None:
        from lm_eval.utils import make_table

        lines += ["", make_table(tasks).rstrip()]
        if "groups" in tasks:
            lines += ["", make_table(tasks, "groups").rstrip()]
    return "\n".join(lines)


DECIDED_ON = {
    None: "none: each token decides for itself",
    "prompt": "prompt: a sequence's decision sees the context only, as in generation",
    "all": "all: a sequence's decision sees the scored text too, as generation cannot",
}
