"""TensorBoard's event files: each point once, whatever was interrupted, and never a reason to stop.

A file is a sequence of TFRecords: length, its checksum, an `Event`, its checksum. They are written here, and not
by tensorboardX's `SummaryWriter`, whose thread dies of a full disk and whose `purge_step` leaves doubled points to
every reader that does not know it.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

HPARAMS_METRICS = ("reward/mean", "val/accuracy", "kl/mean", "response_length/mean", "timing_s/step")
"""What the HParams tab shows beside the settings."""
NUM_BINS = 30
"""Of a histogram."""
HEADER, FOOTER = 12, 4
"""Bytes of a record before and after its event."""


class TensorBoard:
    """One event file of a start of a run, made with its first points."""

    def __init__(self, folder: Path, *, last_step: int, settings: Mapping[str, bool | float | str] = {}):
        """Removes the points of later steps than `last_step`, which other starts left in `folder`.

        Args: settings: what the HParams tab says of this start.
        """
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path, self._settings = folder / name, settings
        self._file: int | None = None
        self._size = 0
        self._has_warned = False
        try:
            folder.mkdir(exist_ok=True)
            for path in folder.glob("*tfevents*"):
                cut_after(path, last_step)
        except OSError as error:
            self._warn(error)

    def write(self, values: Mapping[str, float | None], step: int) -> None:
        """Writes the points of a step; None is no point."""
        from tensorboardX.summary import scalar

        self._append([scalar(name, value) for name, value in values.items() if value is not None], step)

    def write_text(self, name: str, text: str, step: int) -> None:
        """Writes Markdown for a step."""
        from tensorboardX.summary import text as text_summary

        self._append([text_summary(name, text)], step)

    def write_histograms(self, values: Mapping[str, Any], step: int) -> None:
        """Writes how values of a step are distributed; arrays of any shape, of which finite values count."""
        from tensorboardX.summary import histogram

        arrays = {name: np.asarray(array, float) for name, array in values.items()}
        finite = {name: array[np.isfinite(array)] for name, array in arrays.items()}
        summaries = [histogram(n, array, NUM_BINS) for n, array in finite.items() if array.size]
        self._append(summaries, step)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, summaries: Sequence[Any], step: int) -> None:
        if self._file is None:
            summaries = [*_hparams(self._settings), *summaries]
        data = b"".join(_record(step=step, summary=summary) for summary in summaries)
        try:
            if self._file is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
                self._file = os.open(self._path, flags, 0o666)
                data = _record(file_version="brain.Event:2") + data
            _write_all(self._file, data)
            self._size += len(data)
        except OSError as error:
            self._warn(error)
            self._undo()

    def _undo(self) -> None:
        """Takes half a record back: readers would stop there."""
        if self._file is not None:
            os.ftruncate(self._file, self._size)
        if not self._size:
            self.close()  # for the next step to begin anew, with the version

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            logger.warning("WARNING: TensorBoard lacks points, training goes on: %s", error)
        self._has_warned = True


def _hparams(settings: Mapping[str, bool | float | str]) -> list[Any]:
    """What a row of the HParams tab is made of: names and types of its columns, and the values."""
    from tensorboardX.summary import hparams

    return list(hparams(dict(settings), dict.fromkeys(HPARAMS_METRICS))[:2]) if settings else []


def cut_after(path: Path, step: int) -> None:
    """Cuts an event file where points of later steps than `step` begin, or a record that is not whole.

    Steps only grow within a file.
    """
    data = path.read_bytes()
    end = 0
    for event, end_of_record in _records(data):
        if event.HasField("summary") and event.step > step:
            break
        end = end_of_record
    if end < len(data):
        os.truncate(path, end)


def _records(data: bytes) -> Iterator[tuple[Any, int]]:
    """Yields (event, where its record ends) of every whole record."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    at = 0
    while at + HEADER + FOOTER <= len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        end = at + HEADER + size + FOOTER
        if end > len(data):
            return
        try:
            event = Event.FromString(data[at + HEADER : at + HEADER + size])
        except DecodeError:
            return
        yield event, end
        at = end


def _record(**fields: Any) -> bytes:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    event = Event(wall_time=time.time(), **fields).SerializeToString()
    length = len(event).to_bytes(8, "little")
    checksums = [masked_crc32c(part).to_bytes(4, "little") for part in (length, event)]
    return length + checksums[0] + event + checksums[1]


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
