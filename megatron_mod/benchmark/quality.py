"""What routers are worth: granularities and budgets trained on one model, beside static removal and
the published recipe, on text of several kinds."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

from megatron_mod.benchmark.quality_figure import draw
from megatron_mod.calibration.routed import Routed, load_routed
from megatron_mod.calibration.search import Calibration, Point
from megatron_mod.checkpoint.folders import write_durably
from megatron_mod.config import cli
from megatron_mod.config.model_folder import is_megatron
from megatron_mod.config.quality_budget import WORK, Budget
from megatron_mod.config.recipes import NO_STAND_INS, PUBLISHED, as_options
from megatron_mod.evaluation.perplexity import read_rows
from megatron_mod.evaluation.rows import Row, evenly
from megatron_mod.evaluation.static import METHOD, Greedy, thresholds_without
from megatron_mod.parallel import topology
from megatron_mod.routing.scheme import Place, Scheme
from megatron_mod.training.loop import train
from megatron_mod.training.plan import prepare

NEAR = 0.01  # what a calibrated capacity may differ from the one asked for
UNTRAINED = {"train.steps": 0, "router.init": "zeros", "router.capacity": 1.0}


@dataclass(frozen=True)
class Setup:
    """What all trainings have in common.

    Args:
        load: base checkpoint or Hugging Face folder.
        train: what is trained on (``data.train``).
        texts: held-out files; of each every second sample sets thresholds, the others are measured.
        out: folder of the trainings and of what is found.
        layers: how many of the deepest layers but the last are routed.
        samples: of each text, at most.
        max_length: tokens a sample is cut to.
        recipe: settings of every training.
        settings: further ones, as on a training's command line; what is compared wins.
    """

    load: Path
    train: Path
    texts: Sequence[Path]
    out: Path
    layers: int
    samples: int
    max_length: int
    recipe: Mapping[str, object]
    settings: Sequence[str]

    def run(self, name: str, **changes: object) -> Path:
        """A training's folder, which is made unless it is complete."""
        folder = self.out / name
        if not (folder / "summary.json").exists():
            base = "model.checkpoint" if is_megatron(self.load) else "model.hf_path"
            options = {
                base: self.load,
                "model.dtype": "float32",
                "router.layers.deepest": self.layers,
                "data.train": self.train,
                "data.max_length": self.max_length,
                "checkpoint.save": folder,
                **self.recipe,
            }
            config = cli.parse([*as_options(options), *self.settings, *as_options(changes)])
            plan = prepare(config)
            with topology.joined(plan.topology, seed=config.train.seed):
                train(config, plan)
        return folder


class Measurements:
    """What is found, kept in a file so that nothing is measured twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = json.loads(path.read_text()) if path.exists() else {}

    def once(self, key: str, measure) -> dict:
        if key not in self.found:
            self.found[key] = measure()
            write_durably(self.path, json.dumps(self.found, indent=1) + "\n")
        return self.found[key]


class Model:
    """A run's model on the held-out texts."""

    def __init__(self, setup: Setup, run: Path) -> None:
        ranks = topology.plan(tensor=1, pipeline=1, world_size=1)
        pooling = {"max_length": None, "batch_size": 4, "pooling": None}
        self.routed: Routed = load_routed(run, ranks, dtype="float32", **pooling)
        self.rows = {path.stem: self._rows(setup, path) for path in setup.texts}
        self.calibrations = {
            name: [self._calibration(half) for half in (rows[::2], rows[1::2])]
            for name, rows in self.rows.items()
        }

    def _rows(self, setup: Setup, path: Path) -> list[Row]:
        rows = read_rows(path, self.routed.backend.tokenizer, max_length=setup.max_length)
        return evenly(rows, setup.samples)

    def _calibration(self, rows: Sequence[Row]) -> Calibration:
        work = self.routed.work
        return Calibration(self.routed.backend, rows, work, scope=work.routing.scope)

    def at(self, of: str, share: float) -> dict[str, dict]:
        """Each text's measured half, with thresholds set on its other half for a share ``of``
        ``capacity`` or ``work``."""
        found = {}
        for name, (setting, measured) in self.calibrations.items():
            if of == "work":
                point = setting.at_work(share)
            else:
                point = setting.at_capacity(share, tolerance=NEAR)
            found[name] = self._describe(measured, measured.at(point.thresholds))
        return found

    def without(self, removed: Sequence[Place]) -> dict[str, dict]:
        """Each text's measured half, with what these routers decide about removed for good."""
        thresholds = thresholds_without(self.routed.backend.places, removed)
        return {
            name: self._describe(measured, measured.at(thresholds))
            for name, (_, measured) in self.calibrations.items()
        }

    def greedy(self) -> Greedy:
        """Chooses what to remove on the first text's calibration half."""
        rows = next(iter(self.rows.values()))[::2]
        return Greedy(self.routed.backend, rows, work=self.routed.work)

    @staticmethod
    def _describe(calibration: Calibration, point: Point) -> dict:
        return {
            "perplexity": point.perplexity,
            "capacity": point.mean_capacity,
            "work": point.flops / calibration.dense_flops,
        }


def compare(
    setup: Setup, *, budgets: Sequence[Budget], seeds: Sequence[int], published: bool
) -> dict:
    """Train and measure everything, print a table, write ``quality.json`` and ``quality.png``.

    Args:
        budgets: a granularity is trained for the least of its capacities, and of its shares of
            work, and calibrated for each.
        seeds: of which every training is repeated.
        published: whether Router-Tuning's recipe, which knows no work, is trained too, with the
            first seed.
    """
    setup.out.mkdir(parents=True, exist_ok=True)
    measured = Measurements(setup.out / "measured.json")
    shares: dict[tuple[str, str], list[float]] = {}
    for granularity, of, share in budgets:
        shares.setdefault((granularity, of), []).append(share)
    routed = [
        point
        for (granularity, of), wanted in shares.items()
        for recipe, own in (
            ("ours", seeds),
            ("published", seeds[:1] if published and of == "capacity" else ()),
        )
        for seed in own
        for point in _train(setup, measured, recipe, granularity, of, wanted, seed=seed)
    ]
    least: dict[tuple[str, ...], float] = {}
    for point in routed:
        targets = Scheme.parse(point["granularity"]).targets
        works = [text["work"] for text in point["texts"].values()]
        least[targets] = min(least.get(targets, 1.0), *works)
    static = [
        entry
        for targets, work in least.items()
        for stand_ins in (False, True)
        for entry in _remove(setup, measured, targets, stand_ins=stand_ins, work=work)
    ]
    dense = {name: text["perplexity"] for name, text in static[0]["texts"].items()}
    table = list(summarise(routed, static, dense))
    found = {
        "dense": dense,
        "static_method": METHOD,
        "table": table,
        "routed": routed,
        "static": static,
    }
    write_durably(setup.out / "quality.json", json.dumps(found, indent=1) + "\n")
    draw(found).savefig(setup.out / "quality.png", dpi=150)
    print_table(table, dense)
    return found


def _train(
    setup: Setup,
    measured: Measurements,
    recipe: str,
    granularity: str,
    of: str,
    shares: Sequence[float],
    *,
    seed: int,
) -> Iterator[dict]:
    """A point for each share ``of`` ``capacity`` or ``work``, of one training for the least."""
    least, prefix = min(shares), WORK if of == "work" else ""
    keys = {at: f"{recipe} {granularity} {prefix}{least} {seed} at {at}" for at in shares}
    if not measured.found.keys() >= set(keys.values()):
        run = setup.run(
            f"{recipe}_{granularity}_{prefix}{least:g}_{seed}",
            **{"router.granularity": granularity, f"router.{of}": least, "train.seed": seed},
            **(PUBLISHED if recipe == "published" else {}),
        )
        with topology.single_process():
            model = Model(setup, run)
            for share, key in keys.items():
                measured.once(key, partial(model.at, of, share))
    for share, key in keys.items():
        point = {"recipe": recipe, "granularity": granularity, of: share, "seed": seed}
        yield {**point, "texts": measured.found[key]}


def _remove(
    setup: Setup,
    measured: Measurements,
    targets: tuple[str, ...],
    *,
    stand_ins: bool,
    work: float,
) -> Iterator[dict]:
    """Removals from none on, until one takes no more than a share of ``work`` on every text."""
    scheme, target = Scheme(targets, "token"), "+".join(targets)
    changes = {
        **UNTRAINED,
        "router.granularity": str(scheme),
        **({"router.stand_in": "linear"} if stand_ins else NO_STAND_INS),
    }
    run = setup.run(f"static_{target}_{'with' if stand_ins else 'without'}_stand_ins", **changes)
    kind = f"static {target} {'with' if stand_ins else 'without'} stand-ins"
    opened: list[tuple[Model, Greedy]] = []

    def measure(count: int) -> dict:
        if not opened:
            model = Model(setup, run)
            opened.append((model, model.greedy()))
        model, greedy = opened[0]
        removed = greedy.first(min(count, len(greedy.backend.places)))
        return {"removed": list(map(scheme.label, removed)), "texts": model.without(removed)}

    with topology.single_process():
        for count in itertools.count():
            found = measured.once(f"{kind} {count}", lambda count=count: measure(count))
            yield {"target": target, "stand_ins": stand_ins, **found}
            done = all(text["work"] <= work for text in found["texts"].values())
            if done or len(found["removed"]) < count:
                return


def summarise(
    routed: Sequence[dict], static: Sequence[dict], dense: dict[str, float]
) -> Iterator[dict]:
    """A row for each recipe, budget and text: means and standard errors over the seeds, beside
    removal at equal work."""
    groups: dict[tuple, list[dict]] = {}
    for point in routed:
        budget = (point.get("capacity"), point.get("work"))
        groups.setdefault((point["recipe"], point["granularity"], *budget), []).append(point)
    for (recipe, granularity, capacity, share), points in groups.items():
        target = "+".join(Scheme.parse(granularity).targets)
        for text, without_routers in dense.items():
            found = [point["texts"][text] for point in points]
            losses = [math.log(one["perplexity"]) for one in found]
            work = fmean(one["work"] for one in found)
            error = stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
            perplexity = math.exp(fmean(losses))
            yield {
                "recipe": recipe,
                "granularity": granularity,
                "target_capacity": capacity,
                "target_work": share,
                "text": text,
                "seeds": len(points),
                "capacity": fmean(one["capacity"] for one in found),
                "work": work,
                "counted_speedup": 1 / work,
                "perplexity": perplexity,
                "perplexity_standard_error": error and perplexity * error,
                "over_dense": perplexity / without_routers,
                "static_perplexity": at_work(static, target, text, work, stand_ins=False),
                "static_with_stand_ins_perplexity": at_work(
                    static, target, text, work, stand_ins=True
                ),
            }


def at_work(
    static: Sequence[dict], target: str, text: str, work: float, *, stand_ins: bool
) -> float | None:
    """The perplexity of removal at a share of the dense model's work: between two removals on the
    line of their losses; ``None`` beyond them."""
    points = sorted(
        (one["texts"][text]["work"], math.log(one["texts"][text]["perplexity"]))
        for one in static
        if (one["target"], one["stand_ins"]) == (target, stand_ins)
    )
    for (low, worse), (high, better) in pairwise(points):
        if low <= work <= high:
            share = (work - low) / (high - low) if high > low else 0.0
            return math.exp(worse + share * (better - worse))
    return None


def print_table(table: Sequence[dict], dense: dict[str, float]) -> None:
    """The summary as Markdown."""
    print("dense: " + ", ".join(f"{name} {value:.2f}" for name, value in dense.items()) + "\n")
    print("| recipe | granularity | text | capacity | counted speed-up | perplexity | over dense |"
          " static at equal work | with stand-ins |")  # fmt: skip
    print("| --- " * 9 + "|")
    for row in table:
        error = row["perplexity_standard_error"]
        spread = "" if error is None else f" ± {error:.2f}"
        fixed = [row["static_perplexity"], row["static_with_stand_ins_perplexity"]]
        shown = " | ".join("-" if value is None else f"{value:.2f}" for value in fixed)
        print(
            f"| {row['recipe']} | {row['granularity']} | {row['text']} | {row['capacity']:.3f} |"
            f" {row['counted_speedup']:.3f} | {row['perplexity']:.2f}{spread} |"
            f" {row['over_dense']:.3f} | {shown} |",
            flush=True,
        )
