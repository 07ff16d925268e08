"""Where data sets lie unless the user says otherwise."""

import os
from pathlib import Path


def data_root() -> Path:
    """The environment variable DSDISTILL_DATA, else ~/.cache/dsdistill."""
    return Path(os.environ.get("DSDISTILL_DATA") or "~/.cache/dsdistill").expanduser()
