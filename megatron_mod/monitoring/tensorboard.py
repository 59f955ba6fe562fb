"""``tensorboard/`` in a run's folder: what TensorBoard draws."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mod.checkpoint.folders import append, writing
from megatron_mod.monitoring.scalars import CAPACITY, VALIDATION, place_tag, scalars
from megatron_mod.routing.scheme import Place

FOLDER = "tensorboard"


class TensorBoard:
    """Adds each record as one event, whole or not at all, to a file of this start of the run.

    The file begins with the order to forget what earlier starts wrote of steps that are taken again
    (``SessionLog``, the ``purge_step`` of torch's ``SummaryWriter``, which would write an event for
    each scalar, from a thread that fails by itself). It is made with its first record.
    """

    def __init__(self, folder: Path, places: Sequence[Place], *, after: int) -> None:
        """``places``: of the routers; ``after``: the step that the run goes on from, or 0."""
        self.folder, self.places, self.after = folder, places, after
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self._head: bytes | None = None

    def write(self, record: dict) -> None:
        """Add a record.

        Raises:
            ValueError: it cannot be written.
        """
        # Imported with the first record: it takes some tenths of a second.
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars(record, self.places).items()
        ]
        event = _record(step=record["step"], summary=Summary(value=values))
        if self._head is None:
            with writing(self.folder):
                self.folder.mkdir(exist_ok=True)
            self._head = self._begin()
        append(self.path, self._head + event)
        self._head = b""

    def close(self, *, failed: bool) -> None:
        """Nothing is left to write."""

    def _begin(self) -> bytes:
        """What a file begins with."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from torch.utils.tensorboard.summary import custom_scalars

        charts = {
            title: ["Multiline", [place_tag(group, place, self.places) for place in self.places]]
            for title, group in (("training", CAPACITY), ("validation", VALIDATION))
        }
        head = _record(file_version="brain.Event:2")
        head += _record(step=self.after + 1, session_log=SessionLog(status=SessionLog.START))
        if self.places:
            head += _record(summary=custom_scalars({"capacity of the layers": charts}))
        return head


def _record(**event: Any) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(Event(wall_time=time.time(), **event).SerializeToString())
    return buffer.getvalue()
