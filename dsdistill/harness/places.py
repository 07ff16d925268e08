"""Where data sets lie, and what is kept, unless the user says otherwise."""

import os
from pathlib import Path


def data_root() -> Path:
    """The environment variable DSDISTILL_DATA, else ~/.cache/dsdistill."""
    return Path(os.environ.get("DSDISTILL_DATA") or "~/.cache/dsdistill").expanduser()


def cache() -> Path:
    """$XDG_CACHE_HOME/dsdistill, else ~/.cache/dsdistill."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dsdistill"
