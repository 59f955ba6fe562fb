"""What routers are worth: granularities and budgets trained on one model, beside static removal and
the published recipe, on text of several kinds."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

from megatron_mod.benchmark.quality_figure import draw
from megatron_mod.benchmark.quality_models import Measurements, Model, Setup
from megatron_mod.calibration.thresholds_file import write_thresholds
from megatron_mod.checkpoint.folders import write_durably
from megatron_mod.config.quality_budget import Budget, trainings
from megatron_mod.config.recipes import NO_STAND_INS, PUBLISHED
from megatron_mod.evaluation.static import METHOD, Greedy, thresholds_without
from megatron_mod.parallel import topology
from megatron_mod.routing.scheme import Scheme

WITH_LORA = "ours+lora"  # routers and adapters, trained together
UNTRAINED = {"train.steps": 0, "router.init": "zeros", "router.capacity": 1.0}


def compare(
    setup: Setup, *, budgets: Sequence[Budget], seeds: Sequence[int], published: bool
) -> dict:
    """Train and measure everything, print a table, write ``quality.json`` and ``quality.png``.

    Args:
        budgets: a granularity is trained for the least of its capacities and calibrated for each;
            and for each budget of work, or range of them.
        seeds: of which every training is repeated.
        published: whether Router-Tuning's recipe, which knows no work, is trained too, with the
            first seed.
    """
    setup.out.mkdir(parents=True, exist_ok=True)
    measured = Measurements(setup.out / "measured.json")
    routed = [
        point
        for budget in trainings(budgets)
        for recipe, own in (
            ("ours", seeds),
            (WITH_LORA, seeds if setup.lora else ()),
            ("published", seeds[:1] if published and budget.of == "capacity" else ()),
        )
        for seed in own
        for point in _train(setup, measured, recipe, budget, seed=seed)
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
    if setup.lora:
        routed += _adapt(setup, measured, routed, static, seeds=seeds)
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
    budget: Budget,
    *,
    seed: int,
) -> Iterator[dict]:
    """A point for each share of a budget, of one training."""
    granularity, of, shares = budget
    keys = {at: f"{recipe} {granularity} {budget.label} {seed} at {at}" for at in shares}
    if not measured.found.keys() >= set(keys.values()):
        own: dict[str, object] = {"published": PUBLISHED, WITH_LORA: setup.adapters}.get(recipe, {})
        run = setup.run(
            f"{recipe}_{granularity}_{budget.label}_{seed}",
            **{"router.granularity": granularity, f"router.{of}": budget.trained_for},
            **{"train.seed": seed, **own},
        )
        with topology.single_process():
            model = Model(setup, run)
            for share, key in keys.items():
                measured.once(key, partial(model.at, of, share))
    for share, key in keys.items():
        point = {"recipe": recipe, "granularity": granularity, of: share, "seed": seed}
        yield {**point, "range": budget.range, "texts": measured.found[key]}


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
    run = _unrouted(setup, targets, stand_ins=stand_ins)
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


def _unrouted(setup: Setup, targets: tuple[str, ...], *, stand_ins: bool) -> Path:
    """A run with routers to remove things by, and stand-ins for what is removed."""
    name = f"static_{'+'.join(targets)}_{'with' if stand_ins else 'without'}_stand_ins"
    changes = {
        **UNTRAINED,
        "router.granularity": str(Scheme(targets, "token")),
        **({"router.stand_in": "linear"} if stand_ins else NO_STAND_INS),
    }
    return setup.run(name, **changes)


def _adapt(
    setup: Setup,
    measured: Measurements,
    routed: Sequence[dict],
    static: Sequence[dict],
    *,
    seeds: Sequence[int],
) -> list[dict]:
    """Adapters trained on the dense model, and on removal with stand-ins at the work nearest to
    that of each budget's routers that have adapters too."""
    found: dict[tuple, dict] = {}
    budgets = {}
    for point in routed:
        if point["recipe"] == WITH_LORA:
            budget = (point["granularity"], point.get("capacity"), point.get("work"))
            budgets.setdefault(budget, _mean_work(point))
    for (granularity, capacity, share), work in budgets.items():
        targets = Scheme.parse(granularity).targets
        removals = [
            one for one in static if one["stand_ins"] and one["target"] == "+".join(targets)
        ]
        nearest = min(removals, key=lambda one: abs(_mean_work(one) - work))
        for recipe, removal in (("dense+lora", removals[0]), ("removed+lora", nearest)):
            for seed in seeds:
                texts = _adapted(setup, measured, targets, removal["removed"], seed=seed)
                point = {"granularity": granularity, "capacity": capacity, "work": share}
                key = recipe, granularity, capacity, share, seed
                found[key] = {"recipe": recipe, "seed": seed, **point, "texts": texts}
    return list(found.values())


def _mean_work(point: dict) -> float:
    return fmean(text["work"] for text in point["texts"].values())


def _adapted(
    setup: Setup,
    measured: Measurements,
    targets: tuple[str, ...],
    labels: Sequence[object],
    *,
    seed: int,
) -> dict:
    """The texts under adapters trained around a removal."""
    scheme = Scheme(targets, "token")
    removed = "_".join(map(str, labels)) or "nothing"
    name = f"removed_{'+'.join(targets)}_{removed}"

    def measure() -> dict:
        routers, unrouted = setup.out / name, _unrouted(setup, targets, stand_ins=True)
        with topology.single_process():
            model = Model(setup, unrouted)
            places = [p for p in model.routed.backend.places if scheme.label(p) in labels]
            if not routers.exists():
                thresholds = thresholds_without(model.routed.backend.places, places)
                write_thresholds(model.routed, thresholds, save=routers, add=lambda folder: None)
        run = setup.run(
            f"{name}_lora_{seed}",
            **{"router.granularity": str(scheme), "model.routers": routers, "train.seed": seed},
            **{**setup.adapters, "train.trainable": "lora"},
        )
        with topology.single_process():
            return Model(setup, run).without(places)

    return measured.once(f"{name} lora {seed}", measure)


def summarise(
    routed: Sequence[dict], static: Sequence[dict], dense: dict[str, float]
) -> Iterator[dict]:
    """A row for each recipe, budget and text: means and standard errors over the seeds, beside
    removal at equal work."""
    groups: dict[tuple, list[dict]] = {}
    for point in routed:
        budget = (point.get("capacity"), point.get("work"), point.get("range"))
        groups.setdefault((point["recipe"], point["granularity"], *budget), []).append(point)
    for (recipe, granularity, capacity, share, of_range), points in groups.items():
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
                "trained_range": of_range,
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
        served = row["trained_range"]
        recipe = row["recipe"] + (f", for {served[0]:g} to {served[1]:g}" if served else "")
        print(
            f"| {recipe} | {row['granularity']} | {row['text']} | {row['capacity']:.3f} |"
            f" {row['counted_speedup']:.3f} | {row['perplexity']:.2f}{spread} |"
            f" {row['over_dense']:.3f} | {shown} |",
            flush=True,
        )
