"""The page: one HTML file that holds its figures, which are PNG files beside it too."""

from __future__ import annotations

import base64
import io
import json
from datetime import datetime
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from jinja2 import Environment
from matplotlib.figure import Figure

from megatron_mod.calibration.figure import quality_against_work
from megatron_mod.checkpoint.folders import write_durably
from megatron_mod.report import figures
from megatron_mod.report.run import Run

if TYPE_CHECKING:
    from megatron_mod.report.measured import Measured

PAGE, FIGURES, NUMBERS = "report.html", "report", "report.json"


def write_page(run: Run, measured: Measured | None) -> Path:
    """Write ``report.html``, ``report/*.png`` and, with what was ``measured``, ``report.json`` into
    the run's folder; returns the page's path.

    ``measured``: ``None`` leaves out what needs the model.
    """
    images = {name: _png(figure) for name, figure in draw(run, measured).items()}
    folder = run.folder / FIGURES
    folder.mkdir(exist_ok=True)
    for name, content in images.items():
        (folder / f"{name}.png").write_bytes(content)
    encoded = {name: base64.b64encode(content).decode() for name, content in images.items()}
    if measured:
        numbers = json.dumps(measured.to_dict(), indent=2) + "\n"
        write_durably(run.folder / NUMBERS, numbers)
    path = run.folder / PAGE
    write_durably(path, render(run, measured, encoded))
    return path


def draw(run: Run, measured: Measured | None) -> dict[str, Figure]:
    """Every figure there is something to draw for, by its name."""
    found: dict[str, Figure] = {}
    routing = run.routing
    if run.steps:
        found["loss"] = figures.losses(run.steps, run.validations)
    if run.steps and routing:
        target = fmean(routing.capacity) if routing.work is None else None
        found["capacity"] = figures.capacities(run.steps, routing.labels, target=target)
    if measured:
        found["decisions"] = figures.decisions(measured.decisions)
        found["scores"] = figures.scores(measured.decisions)
        if measured.experts:
            found["experts"] = figures.experts(measured.experts)
        found["quality"] = quality_against_work(
            measured.curve,
            dense_perplexity=measured.dense_perplexity,
            chosen=measured.trained,
            name="as trained",
        )
    return found


def render(run: Run, measured: Measured | None, images: dict[str, str]) -> str:
    """The page's HTML; ``images``: base64 of each figure's PNG."""
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = _visible
    return environment.from_string(template).render(
        run=run,
        measured=measured,
        images=images,
        model=run.config.model.checkpoint or run.config.model.hf_path or "trained from scratch",
        when=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _visible(text: str) -> str:
    """A token's text whose spaces and line ends can be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    return buffer.getvalue()
