"""Metrics for TensorBoard, written with its record format only.

TensorBoard's own writer and torch's both import TensorFlow if it is installed.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE_PREFIX = "events.out.tfevents"  # of every event file's name, before its time and process


class EventFile:
    """An event file of a run.

    Args:
        folder: The run's folder.
        resume_from: Step after which a resumed run continues; events of later steps are outdated.
    """

    def __init__(self, folder: Path, resume_from: int | None) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        # Generated at import: a type checker cannot see what these modules contain.
        self._proto: Any = event_pb2
        self._summary: Any = summary_pb2
        name = f"{FILE_PREFIX}.{time.time():.6f}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        if resume_from is not None:
            session = self._proto.SessionLog
            self._add(step=resume_from + 1, session_log=session(status=session.START))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        summary = self._summary.Summary
        values = [summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        self._add(step=step, summary=summary(value=values))

    def _add(self, **fields: Any) -> None:
        event = self._proto.Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        self._file.flush()

    def close(self) -> None:
        self._file.close()
