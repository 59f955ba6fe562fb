"""A script as a process: how it ends, and what it says then."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn, Protocol, TextIO

MISTAKE = 2
LOST = 1  # another rank, or its machine, is gone: nothing that the user did
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SECONDS_TO_SPEAK = 5

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PARENT, _IMPORTED = os.getppid(), time.monotonic()


class Others(Protocol):
    """What a rank knows of the others of its job (``parallel.heartbeat``)."""

    def tell(self, message: str, *, status: int) -> bool:
        """Tell them why this rank ends, which ends them too; whether it is the one to speak."""

    def linger(self) -> None:
        """Let them hear of it before this rank is gone."""

    def explain(self, error: BaseException) -> str | None:
        """The message for an error that is another rank's fault; does not return where that one
        speaks itself."""

    def lost(self) -> bool:
        """Whether a rank of this machine has ended without leaving the job."""


class Stopped(Exception):
    """A signal, or a limit that was set, has ended the work early; it can be gone on with. All
    ranks raise it together."""


def is_first_rank() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """End a script with one message, from one rank, and an exit status that says what happened.

    A ``ValueError`` this package raised (the script that was started counts as the package): 2.
    ``Stopped``: 75, but 0 from all but the first rank of a machine, as ``torchrun`` reports every
    rank that leaves with something else. Ctrl-C: 130. What a library raised goes through with its
    traceback: it is not about the user's input. No rank outlives it, and those that fail because
    another one did say nothing, or a line where that one's message may be in another place.
    ``torchrun``'s report ends with the message too.
    """
    # Each broken connection would be told with a C++ stack; read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    end_with_torchrun()
    _end_as_before()
    if "RANK" in os.environ and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # The ranks wait for one another: an exception in one would come out as errors in others.
        signal.signal(signal.SIGINT, lambda *_: end("Interrupted.", status=128 + signal.SIGINT))
    try:
        yield
    except Stopped as stop:
        for number in SIGNALS:  # torchrun ends the ranks that are left as soon as one has left
            signal.signal(number, signal.SIG_IGN)
        _record(str(stop), final=STOPPED)
        if is_first_rank():
            print(stop, file=sys.stderr, flush=True)
        sys.stdout.flush()
        # At once: the interpreter's own end would take some of the time that batch systems grant.
        os._exit(0 if int(os.environ.get("LOCAL_RANK", 0)) else STOPPED)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except ValueError as error:
        if not _raised_here(error):
            _hold_back(error)
            raise
        message = f"error: {error}"
        _record(message, final=MISTAKE)
        _wait_to_be_ended()
        _speak_first(message, status=MISTAKE)
        sys.exit(MISTAKE)
    except Exception as error:
        _hold_back(error)
        raise


def _hold_back(error: Exception) -> None:
    """End this rank where an error that a library raised is another rank's fault, or not the first.

    It is recorded otherwise.
    """
    if another_failed():
        os._exit(0)
    if _others and (message := _others.explain(error)):
        end_alone(message, status=LOST)
    text = traceback.format_exc()
    _record(text)
    if _others is not None:
        if not _others.tell(text, status=1):
            sys.stdout.flush()
            os._exit(1)
        threading.Thread(target=_others.linger).start()  # ends after the traceback's printing


def follow(message: str, *, status: int) -> NoReturn:
    """End this rank because another one has, which has said why: once a machine, if at all."""
    if another_failed():
        os._exit(0)
    is_first = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0))) == 0
    if is_first:
        _record(message)
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status if is_first or not is_under_torchrun() else 0)


def _speak_first(message: str, *, status: int) -> None:
    """Say why this rank ends, and with what, unless another one did so before."""
    if _others is None or _others.tell(message, status=status):
        print(message, file=sys.stderr, flush=True)
        if _others is not None:
            _others.linger()


def end(message: str, *, status: int) -> NoReturn:
    """Say one line and end the process at once, whatever its threads are in the middle of.

    When all ranks are told to end, only the first one speaks.
    """
    if not is_first_rank():
        time.sleep(1)
    end_alone(message, status=status, final=status)


def end_alone(message: str, *, status: int, final: int | None = None) -> NoReturn:
    """The same for what one rank knows of, whichever it is.

    ``final``: as in ``_record``.
    """
    if another_failed():
        os._exit(0)
    _record(message, final=final)
    _speak_first(message, status=status)
    sys.stdout.flush()
    os._exit(status)


def another_failed() -> bool:
    """Whether another rank of this machine has left a message for torchrun, which then ends all."""
    mine = _error_file()
    if mine is None:
        return False
    return any(other != mine for other in mine.parents[1].glob(f"*/{mine.name}"))


def with_others(others: Others | None) -> None:
    """Choose who knows of the job's other ranks from now on."""
    global _others
    _others = others


def loses_another() -> bool:
    """Whether another rank of this machine is known to have failed, with a message or without."""
    return another_failed() or (_others is not None and _others.lost())


def is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def state_of(pid: int) -> str:
    """A process's state, a letter of proc_pid_stat(5); of one that is gone ``X``."""
    stat = _stat(pid)
    return stat[0] if stat else "X"


def _stat(pid: int) -> list[str]:
    """What proc_pid_stat(5) has of a process after its name, or nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    return state_of(pid) not in "ZX"  # dead, not yet reaped


def on_signal(act: Callable[[signal.Signals], None]) -> None:
    """Choose what is called, in a thread, for each signal that ``catch_signals`` catches."""
    global _act
    _act = act


def catch_signals() -> None:
    """Have a thread handle the signals that ask for an end, also while the main thread waits.

    Python's own handlers wait until the main thread comes back from torch, which in a collective
    whose other ranks are gone it does not. SIGINT and SIGHUP stay ignored where they were (jobs in
    the background, ``nohup``). Until ``on_signal`` says otherwise each ends the process.
    """
    for number in SIGNALS:
        convention = number in (signal.SIGINT, signal.SIGHUP)
        if not (convention and signal.getsignal(number) is signal.SIG_IGN):
            signal.signal(number, lambda *_: None)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    global _catches
    _catches = True
    threading.Thread(target=_hand_on, args=(reader,), name="signals", daemon=True).start()


class Unread:
    """A stream whose reader may be gone: Ctrl-C ends a ``| tee`` too, SIGHUP means no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def catches_signals() -> bool:
    """Whether ``catch_signals`` was called: not where a training is a function of a program."""
    return _catches


def _hand_on(reader: int) -> None:
    while True:
        for number in os.read(reader, 64):
            if number in SIGNALS:
                _act(signal.Signals(number))


def _leave(number: signal.Signals) -> None:
    end(
        f"Stopped by {number.name} before its first step; run the same command again.",
        status=STOPPED,
    )


_act: Callable[[signal.Signals], None] = _leave
_catches = False
_others: Others | None = None


def end_with_torchrun(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel end this rank when the torchrun that started it is gone, even by ``kill -9``.

    A rank that goes on would hold the output folder, and write to it. Elsewhere than on Linux, or
    without torchrun, nothing changes: a shell may well end before what it started.

    Args:
        number: the signal it gets; one that is caught lets it finish what it is doing.
    """
    if sys.platform == "linux" and is_under_torchrun():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def torchrun_is_gone() -> bool:
    """Whether the torchrun that started this rank has ended."""
    return is_under_torchrun() and os.getppid() != _PARENT


def seconds_of_job() -> float:
    """Since torchrun, or without it this process, was started; where the kernel does not say, since
    this module was imported."""
    stat = _stat(_PARENT if is_under_torchrun() else os.getpid())
    if not stat:
        return time.monotonic() - _IMPORTED
    ticks = int(stat[19])  # starttime, since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def run_command(command: list[str], environment: Mapping[str, str] | None = None) -> int:
    """Run a command to its end and return its status.

    A signal for this process is handed on, as one that torchrun knows, and the command ends first.

    Raises:
        KeyboardInterrupt: there was such a signal.
    """
    got: list[int] = []
    with subprocess.Popen(command, env=environment) as started:

        def hand_on(number: int, frame: object) -> None:
            got.append(number)
            if number != signal.SIGINT:  # Ctrl-C reaches both
                started.send_signal(signal.SIGTERM if number == signal.SIGUSR1 else number)

        before = {number: signal.signal(number, hand_on) for number in SIGNALS}
        status = started.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if got:
        raise KeyboardInterrupt
    return status


def _record(message: str, *, final: int | None = None) -> None:
    """Leave the message where torchrun looks for it to end its report with it.

    ``final``: the exit status, where starting the rank again is of no use (``_end_as_before``).

    The format is that of ``torch.distributed.elastic.multiprocessing.errors``, whose ``record``
    writes whole tracebacks and would import torch before the command line has been understood.
    """
    message = message.rstrip().removeprefix("error: ")
    if path := _error_file():
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        report = {"message": {"message": message, "extraInfo": details}}
        content = json.dumps(report if final is None else {**report, "final": final})
        with contextlib.suppress(OSError):
            path.write_text(content, encoding="utf-8")


def _end_as_before() -> None:
    """End a rank that ``torchrun --max-restarts`` starts again after a mistake, or after a run was
    told to stop: as the last time, without another word. torchrun itself restarts whatever fails.
    """
    path, attempt = _error_file(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if path is None or not attempt:
        return
    before = path.parents[2] / f"attempt_{attempt - 1}"  # .../attempt_N/LOCAL_RANK/error.json
    for record in before.glob(f"*/{path.name}"):
        with contextlib.suppress(OSError, ValueError):
            content = record.read_text(encoding="utf-8")
            if (final := json.loads(content).get("final")) is not None:
                path.write_text(content, encoding="utf-8")
                _wait_to_be_ended()
                os._exit(final)


def _error_file() -> Path | None:
    """Where this rank of torchrun's leaves its message, ``.../attempt_N/LOCAL_RANK/error.json``."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(path) if path else None


def _wait_to_be_ended() -> None:
    """Let the first rank speak alone: when it leaves, torchrun ends those that wait here.

    They leave with 0 then: torchrun would report them too. A rank that nobody ends is the only one
    on its machine to know, and speaks itself.
    """
    if is_first_rank():
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    time.sleep(SECONDS_TO_SPEAK * (2 if int(os.environ.get("LOCAL_RANK", 0)) else 1))


def _raised_here(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    last, script = Path(frames[-1].filename).resolve(), Path(sys.argv[0]).resolve()
    return last == script or last.is_relative_to(Path(__file__).resolve().parent)
