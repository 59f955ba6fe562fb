"""A run's newest routers on documents: decisions, scores, and quality against work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from megatron_mod.calibration.curve import NEAR, Curve
from megatron_mod.calibration.routed import load_routed
from megatron_mod.calibration.search import Calibration
from megatron_mod.data.dataset import load_data
from megatron_mod.data.tokenizer import load_tokenizer
from megatron_mod.evaluation.backend import Backend
from megatron_mod.evaluation.perplexity import holds_conversations, read_rows
from megatron_mod.evaluation.rows import Row, evenly
from megatron_mod.parallel.topology import Topology
from megatron_mod.report.observed import Decisions, experts, skipped_tokens
from megatron_mod.report.run import Run

EXCERPT = 160  # characters of a document that are shown


@dataclass(frozen=True)
class Measured:
    """What the report shows of a model.

    ``source``: where its documents come from; ``documents``: text, tokens and kept share of each;
    ``curve`` and ``trained``: points as ``CurvePoint.to_dict`` gives them; ``experts``: of routers
    on experts, see ``observed.experts``; before is the dense model, which untrained routers are.
    """

    source: str
    pooling: str | None
    documents: list[dict]
    decisions: Decisions
    tokens: dict[str, list[dict]] | None
    dense_perplexity: float
    curve: list[dict]
    trained: dict
    experts: list[dict]

    def to_dict(self) -> dict:
        """What of it is numbers, as ``report.json`` has them."""
        names = ("source", "pooling", "dense_perplexity", "trained", "curve", "experts")
        return {name: getattr(self, name) for name in names}


def measure(
    run: Run,
    ranks: Topology,
    *,
    data: str | None,
    samples: int,
    capacities: Sequence[float],
    say: Callable[[str], None],
    **settings,
) -> Measured:
    """Observe the run's newest checkpoint; called by all ranks.

    Args:
        data: conversations (``.jsonl``) or a text; ``None``: the run's own validation data, or
            training data where it has none.
        samples: so many documents, evenly spaced (0: all).
        capacities: of the curve.
        settings: ``dtype`` and ``batch_size``, as ``load_backend`` takes them.

    Raises:
        ValueError: the run's base or data are not where they were.
    """
    routed = load_routed(
        run.folder, ranks, pooling=run.routing.pooling, max_length=None, **settings
    )
    backend = routed.backend
    if own := run.config.data.tokenizer:
        backend.tokenizer = load_tokenizer(own, vocab_size=routed.work.arch.vocab_size)
    rows, source = _rows(run, backend, data)
    pooling = backend.pooling
    if data and pooling and not holds_conversations(data):  # a window of a text has no prompt
        rows, pooling = [replace(row, context=len(row.ids)) for row in rows], "all"
    rows = evenly(rows, samples or len(rows))
    say(f"{len(rows)} documents, {sum(len(row.ids) for row in rows)} tokens of {source}")
    if run.routing.num_noop_experts:
        capacities = ()  # no threshold could set another
    with tqdm(desc="passes over the documents", unit="") as passes:
        calibration = Calibration(
            backend, rows, routed.work, scope=routed.trained_scope, after_pass=passes.update
        )
        trained = calibration.at(run.routing.thresholds)
        curve = Curve(calibration)
        points = [
            curve.at(calibration.at_capacity(capacity, tolerance=NEAR)) for capacity in capacities
        ]
        decided = Decisions.of(calibration, trained)
        documents = [
            {
                "text": backend.tokenizer.decode(row.ids)[:EXCERPT],
                "tokens": len(row.ids),
                "kept": float(kept),
            }
            for row, kept in zip(rows, decided.shares.mean(0), strict=True)
        ]
        return Measured(
            source=source,
            pooling=pooling,
            documents=documents,
            decisions=decided,
            tokens=skipped_tokens(calibration, trained),
            dense_perplexity=calibration.dense.perplexity,
            curve=[point.to_dict() for point in points],
            trained=curve.at(trained).to_dict(),
            experts=experts(calibration.dense, trained),
        )


def _rows(run: Run, backend: Backend, data: str | None) -> tuple[list[Row], str]:
    config = run.config.data
    if data:
        return read_rows(data, backend.tokenizer, max_length=config.max_length), data
    train, validation = load_data(config, backend.tokenizer, seed=run.config.train.seed)
    source = "the run's validation data" if validation else "the run's training data"
    return [Row.labelled(sample) for sample in validation or train], source
