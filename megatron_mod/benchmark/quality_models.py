"""The models of the quality benchmark: trained once, measured once, on held-out texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_mod.calibration.routed import Routed, load_routed
from megatron_mod.calibration.search import Calibration, Point
from megatron_mod.checkpoint.folders import write_durably
from megatron_mod.config import cli
from megatron_mod.config.model_folder import is_megatron
from megatron_mod.config.recipes import as_options
from megatron_mod.evaluation.megatron_backend import MegatronBackend
from megatron_mod.evaluation.perplexity import read_rows
from megatron_mod.evaluation.rows import Row, evenly
from megatron_mod.evaluation.static import Greedy, thresholds_without
from megatron_mod.parallel import topology
from megatron_mod.routing.scheme import Place
from megatron_mod.training.borders import serve
from megatron_mod.training.loop import train
from megatron_mod.training.plan import prepare

NEAR = 0.01  # what a calibrated capacity may differ from the one asked for


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
        settings: further ones, as on a training's command line; what is compared wins, and those of
            adapters go to the trainings that have some.
        lora: rank of the adapters in the routed layers, where some are compared.
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
    lora: int | None = None

    @property
    def adapters(self) -> dict[str, object]:
        """Settings that train adapters with routers."""
        return {
            "train.trainable": "routers+lora",
            "lora.rank": self.lora,
            "lora.layers.deepest": self.layers,
        }

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
            of_adapters, others = cli.split_section(self.settings, "lora")
            settings = [*others, *of_adapters] if "lora.rank" in changes else others
            config = cli.parse([*as_options(options), *settings, *as_options(changes)])
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
        self.routed: Routed = load_routed(
            run, ranks, dtype="float32", max_length=None, batch_size=4, pooling=None
        )
        self.rows = {path.stem: self._rows(setup, path) for path in setup.texts}

    def _rows(self, setup: Setup, path: Path) -> list[Row]:
        rows = read_rows(path, self.routed.backend.tokenizer, max_length=setup.max_length)
        return evenly(rows, setup.samples)

    @cached_property
    def calibrations(self) -> dict[str, list[Calibration]]:
        return self._calibrations()

    def _calibrations(self) -> dict[str, list[Calibration]]:
        """Of each text's halves."""
        return {
            name: [self._calibration(half) for half in (rows[::2], rows[1::2])]
            for name, rows in self.rows.items()
        }

    def _calibration(self, rows: Sequence[Row]) -> Calibration:
        work = self.routed.work
        assert work.routing is not None
        return Calibration(self.routed.backend, rows, work, scope=work.routing.scope)

    def at(self, of: str, share: float) -> dict[str, dict]:
        """Each text's measured half, with thresholds set on its other half for a share ``of``
        ``capacity`` or ``work``; routers that serve a range are told the share of work."""
        routing, found = self.routed.work.routing, {}
        assert routing is not None
        if routing.budgets:
            assert isinstance(self.routed.backend, MegatronBackend)
            serve(self.routed.backend.model, routing, share)
            calibrations = self._calibrations()  # the same thresholds decide otherwise now
        else:
            calibrations = self.calibrations
        for name, (setting, measured) in calibrations.items():
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
