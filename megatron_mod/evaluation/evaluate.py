"""One evaluation: what was asked for, measured on a backend, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from megatron_mod.config.evaluation import SELECTIONS, TEXT_LENGTH, Request
from megatron_mod.evaluation.backend import CAUSAL, TOP_K, Backend
from megatron_mod.evaluation.perplexity import holds_conversations, perplexity, read_rows
from megatron_mod.evaluation.rows import Row
from megatron_mod.routing.scheme import Place, Scheme

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

OF_LM_EVAL = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")
DECIDED_ON = {
    None: "none: each token decides for itself",
    "prompt": "prompt: a sequence's decision sees the context only, as in generation",
    "all": "all: a sequence's decision sees the scored text too, as generation cannot",
}
SELECTED_BY = {
    CAUSAL: "causal: by the text so far, as in generation",
    TOP_K: "top_k: the largest of the whole text, as in training and as generation cannot",
}
TEXT_DECIDED_ON = {
    None: DECIDED_ON[None],
    "prompt": "prompt: the decision on a window of the text sees one token, the one before it",
    "all": "all: a text has no prompt, so the decision on a window sees all of it",
}


def evaluate(
    request: Request, backend: Backend, manager: TaskManager | None, *, is_first_rank: bool
) -> dict:
    """The report: the request, lm-eval's results under its own names, the perplexity, and pooling
    (``text_pooling`` where windows of a running text are scored), selection and capacity of all
    that was run; of exact routers the perplexity by both rules, and in how much they agree. Called
    by all ranks; whole on the first.

    ``manager``: what ``find_tasks`` found, if the request has tasks.
    """
    report = {"request": request.to_dict()}
    if request.perplexity:
        length = min(request.max_length or TEXT_LENGTH, backend.max_length)
        rows = read_rows(request.perplexity, backend.tokenizer, max_length=length)
        if _is_text(request.perplexity):
            rows = backend.windows(rows)
        quality = perplexity(backend, rows)
        report.update(perplexity=quality.perplexity, perplexity_tokens=quality.tokens)
        if backend.selection:
            report.update(_by_both_rules(backend, rows, quality.perplexity))
    if request.tasks:
        from megatron_mod.evaluation.tasks import evaluate_tasks

        found = evaluate_tasks(backend, manager, request, is_first_rank=is_first_rank)
        report.update({name: found[name] for name in OF_LM_EVAL if name in found})
    only_text = not request.tasks and _is_text(request.perplexity)
    return {
        **report,
        "pooling": backend.text_pooling if only_text else backend.pooling,
        "text_pooling": backend.text_pooling,
        "selection": backend.selection,
        "capacity": summary(backend.capacity(), backend.scheme),
    }


def _by_both_rules(backend: Backend, rows: Sequence[Row], chosen: float) -> dict[str, float]:
    """The perplexities by either rule, of which the ``chosen`` one is known, and the share of
    decisions about tokens that they have in common."""
    rule, found = backend.selection, {}
    for other in SELECTIONS:
        backend.selection = other
        if other != rule:
            found[f"perplexity_{other}"] = perplexity(backend, rows).perplexity
        else:
            found[f"perplexity_{other}"] = chosen
    backend.selection = TOP_K
    found["agreement"] = backend.agreement()
    backend.selection = rule
    return found


def _is_text(path: str | None) -> bool:
    return path is not None and not holds_conversations(path)


def summary(capacity: Mapping[Place, float], scheme: Scheme | None) -> dict | None:
    """Each router's share, and their mean; nothing without routers."""
    if not capacity or scheme is None:
        return None
    return {
        "mean": fmean(capacity.values()),
        "per_layer": {str(scheme.label(place)): share for place, share in capacity.items()},
    }


def table(report: dict) -> str:
    """The report in a few lines a person understands."""
    rows = [("model", report["request"]["load"])]
    if "perplexity" in report:
        found = f"{report['perplexity']:.3f} ({report['perplexity_tokens']} tokens)"
        rows.append(("perplexity", found))
    if "agreement" in report:
        both = (
            f"{report['perplexity_top_k']:.3f} by top_k, {report['perplexity_causal']:.3f} causal"
        )
        rows += [("by rule", both), ("agreement", f"{report['agreement']:.4f} of the decisions")]
    if report["selection"]:
        rows.append(("selection", SELECTED_BY[report["selection"]]))
    if capacity := report["capacity"]:
        layers = " ".join(f"{layer}:{kept:.2f}" for layer, kept in capacity["per_layer"].items())
        rows.append(("capacity", f"{capacity['mean']:.3f} (per layer {layers})"))
        has_text, has_tasks = _is_text(report["request"]["perplexity"]), "results" in report
        if has_tasks or not has_text:
            rows.append(("pooling", DECIDED_ON[report["pooling"]]))
        if has_text or (has_tasks and report["text_pooling"] != report["pooling"]):
            name = "of texts" if has_tasks else "pooling"
            rows.append((name, TEXT_DECIDED_ON[report["text_pooling"]]))
    lines = [f"{name:<10}  {value}" for name, value in rows]
    if "results" in report:
        from lm_eval.utils import make_table

        lines += ["", make_table(report).rstrip()]
        if report.get("groups"):
            lines += ["", make_table(report, "groups").rstrip()]
    return "\n".join(lines)
