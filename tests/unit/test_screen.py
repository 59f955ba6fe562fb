"""What a training shows: lines by level, and on a terminal a display that tears nothing."""

from __future__ import annotations

import io
import logging
import os
import pty
import select
import sys
import warnings

import pytest
from rich.console import Console

from megatron_mod import verbosity
from megatron_mod.config import cli
from megatron_mod.monitoring import display
from megatron_mod.monitoring.scalars import scalars
from megatron_mod.monitoring.screen import Screen
from megatron_mod.parallel.peak import peak
from megatron_mod.report.figures import capacities
from megatron_mod.routing.config import RoutingConfig

ARGUMENTS = ["--model.checkpoint=b", "--data.train=t", "--train.steps=9", "--checkpoint.save=r"]


def record(step: int, layers: int = 2) -> dict:
    return {
        "step": step, "loss": 2.5, "capacity": [n / layers for n in range(layers)],
        "capacity_mean": 0.5, "capacity_target": 0.6, "tokens_per_second": 100.0,
        "learning_rate": 1e-3, "grad_norm": 0.25, "share_of_peak": [0.5, 0.25],
    }  # fmt: skip


def routing(layers: int = 2, **more: object) -> RoutingConfig:
    routed = tuple(range(10, 10 + layers))
    return RoutingConfig("attn_sequence", routed, (0.6,) * layers, pooling="all", **more)


VALIDATION = {"step": 3, "validation_loss": 2.0, "validation_capacity_mean": 0.25}
SKIPPED = {"step": 4, "skipped": "not finite", "samples": []}


@pytest.mark.parametrize(
    ("level", "lines"),
    [
        (
            "info",
            "step  1/10  loss 2.5000  capacity 0.500  100 tokens/s  lr 1.00e-03  grad norm 0.250\n"
            "step  3/10  validation loss 2.0000  capacity 0.250  (pooling: all)\n"
            "step  4/10  skipped: not finite\n",
        ),
        ("warning", "step  4/10  skipped: not finite\n"),
        ("error", ""),
    ],
)
def test_in_a_file_there_are_lines_of_a_level(level, lines, capsys):
    screen = Screen(routing(), steps=10)
    with verbosity.at(level):
        screen.open(after=0, ending=bool)
        for each in (record(1), VALIDATION, SKIPPED):
            screen.write(each)
        screen.close(failed=False)
    assert capsys.readouterr().out == lines


def test_a_budget_of_work_is_shown_beside_the_capacity():
    held = routing(work=0.7)
    made = {**record(1), "capacity_target": None, "work": 0.712, "work_target": 0.7}
    validated = {**VALIDATION, "validation_work": 0.69}
    screen = Screen(held, steps=10)
    assert "  capacity 0.500  work 0.712  100 tokens/s" in screen.line(made)
    assert screen.line(validated).endswith("  capacity 0.250  work 0.690  (pooling: all)")
    shown = display.Display(held, steps=10, after=0, ending=bool)
    shown.console = Console(file=io.StringIO(), width=120, height=30)
    shown.record = made
    shown.console.print(shown)
    text = shown.console.file.getvalue()
    assert "capacity 0.500" in text
    assert "work 0.712" in text
    assert "target 0.700" in text
    assert "┿" not in text, "no router has a capacity to reach"
    found = scalars({**made, **validated}, held.places)
    assert found["work/share_of_dense"] == 0.712
    assert found["work/target"] == 0.7
    assert found["work/validation"] == 0.69
    assert "capacity/target" not in found
    lines = capacities([made, {**made, "step": 2}], held.labels, target=None).axes[0].lines
    assert [line.get_label() for line in lines] == ["mean", "work", "target of work"]


def test_the_level_has_a_short_name():
    assert cli.parse([*ARGUMENTS, "--log-level", "debug"]).logging.level == "debug"
    assert cli.parse([*ARGUMENTS, "--log_level=error"]).logging.level == "error"
    with pytest.raises(ValueError, match=r"logging.level = loud: must be"):
        cli.parse([*ARGUMENTS, "--log-level", "loud"])
    assert cli.parse([*ARGUMENTS, "--logging.wandb", "true"]).logging.wandb is True
    assert cli.parse([*ARGUMENTS, "--logging.wandb", "offline"]).logging.wandb == "offline"
    with pytest.raises(ValueError, match=r"logging.wandb_project = p: would be ignored"):
        cli.parse([*ARGUMENTS, "--logging.wandb_project", "p"])


def logged(level: str, *, rank: int, monkeypatch, capsys) -> str:
    """What is said of a library's messages and a warning."""
    monkeypatch.setenv("RANK", str(rank))
    before = logging.getLogger("megatron.core").level
    monkeypatch.setattr(
        warnings, "showwarning", lambda message, *_: print(message, file=sys.stderr)
    )
    with verbosity.at(level):
        library = logging.getLogger("megatron.core.some")
        library.debug("the library's detail")
        library.error("the library's error")
        warnings.warn("a warning", stacklevel=1)
    assert logging.getLogger("megatron.core").level == before
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("level", "rank", "detail", "warned"),
    [
        ("debug", 1, True, True),
        ("info", 0, False, True),
        ("info", 1, False, False),
        ("error", 0, False, False),
    ],
)
def test_libraries_follow_the_level(level, rank, detail, warned, monkeypatch, capsys):
    monkeypatch.setattr(logging, "lastResort", logging._StderrHandler(logging.WARNING))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    said = logged(level, rank=rank, monkeypatch=monkeypatch, capsys=capsys)
    assert ("the library's detail" in said) is detail
    assert ("a warning" in said) is warned
    assert "the library's error" in said


@pytest.fixture
def terminal(monkeypatch):
    """Puts standard output and error on a terminal; gives what it gets, each time it is called."""
    master, slave = pty.openpty()
    stream = os.fdopen(slave, "w")
    for name, value in {"TERM": "xterm", "COLUMNS": "60", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)

    def got() -> str:
        stream.flush()
        text = b""
        while select.select([master], [], [], 0.1)[0]:
            text += os.read(master, 2**20)
        return text.decode()

    def begin():
        monkeypatch.setattr(sys, "stdout", stream)  # which pytest sets anew before each test
        monkeypatch.setattr(sys, "stderr", stream)
        return got

    yield begin
    monkeypatch.undo()
    stream.close()
    os.close(master)


def test_on_a_terminal_it_is_redrawn_below_what_is_printed(terminal, monkeypatch):
    got = terminal()
    monkeypatch.setattr(display, "SECONDS_BETWEEN_DRAWINGS", 0)
    handler = logging.StreamHandler()  # as libraries make theirs, before there is a display
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    screen, streams = Screen(routing(), steps=10), (sys.stdout, sys.stderr)
    screen.open(after=0, ending=bool)
    got()
    screen.write(record(1))
    screen.advance(1)
    shown = got()
    assert "step 1/10" in shown
    assert "0:00:0" in shown
    up = "\x1b[1A"
    for say in (
        lambda: print("a line longer than the screen is wide" * 3),
        lambda: print("an error", file=sys.stderr),
        lambda: handler.emit(logging.LogRecord("x", 30, "", 1, "a library's", (), None)),
        lambda: screen.write(VALIDATION),
    ):
        say()
        shown = got()
        above, _, below = shown.partition("\r\n")
        assert above.startswith("\r\x1b[2K" + up), "what was drawn is taken away first"
        assert "step 1/10" in below, "and drawn again below"
    screen.close(failed=False)
    assert got().endswith("\r\n")
    assert (sys.stdout, sys.stderr) == streams
    assert handler.stream is sys.stderr


@pytest.mark.parametrize("how", ["failed", "ending"])
def test_at_an_end_nothing_is_taken_away(terminal, how):
    """Other processes have had their say by then."""
    got, ending = terminal(), []
    screen = Screen(routing(), steps=10)
    screen.open(after=0, ending=lambda: bool(ending))
    first = got()
    ending += [1] * (how == "ending")
    screen.doing("checkpoint")
    if how == "failed":
        got()
    screen.close(failed=how == "failed")
    print("Stopped.")
    assert got() == "\r\nStopped.\r\n"
    assert "\x1b[?25l" not in first, "the cursor is hidden"


@pytest.mark.parametrize(
    ("level", "variables"), [("warning", {}), ("debug", {}), ("info", {"TERM": "dumb"})]
)
def test_a_display_is_not_for_everybody(level, variables, terminal, monkeypatch):
    terminal()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    screen = Screen(routing(), steps=10)
    with verbosity.at(level):
        screen.open(after=0, ending=bool)
    assert screen.display is None


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("layers", [1, 15, 32, 80])
@pytest.mark.parametrize(("width", "height"), [(10, 10), (40, 24), (80, 24), (200, 50)])
def test_it_fits_any_terminal(width, height, layers, encoding):
    shown = display.Display(routing(layers), steps=10, after=0, ending=bool)
    shown.record = record(1, layers)
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, height=height, force_terminal=True, soft_wrap=True)
    lines = console.render_lines(shown, pad=False)
    console.print(shown)  # in letters that the terminal has
    assert all(sum(segment.cell_length for segment in line) <= width for line in lines)
    if width >= 40:
        assert len(lines) < height
        text = "".join(segment.text for line in lines for segment in line)
        assert "38%" in text
        if layers <= 32:
            assert f"{9 + layers} " in text, "the last layer's bar"


@pytest.mark.parametrize(
    ("device", "found"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121e12),
        ("cpu (AMD EPYC, 2 cores)", None),
    ],
)
def test_peaks_are_those_of_data_sheets(device, found):
    assert peak(device, "bfloat16") == found


def test_a_block_within_another_says_nothing_twice(capsys):
    with verbosity.at("debug"), verbosity.at("debug"):
        logging.getLogger("megatron.core.some").debug("the library's detail")
    assert capsys.readouterr().err.count("the library's detail") == 1
