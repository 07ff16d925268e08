"""Where data sets lie, and what is kept, unless the user says otherwise."""

import os
from pathlib import Path


def data_root() -> Path:
    """The environment variable DSDISTILL_DATA, else ~/.cache/dsdistill."""
    return Path(os.environ.get("DSDISTILL_DATA") or "~/.cache/dsdistill").expanduser()


def cache() -> Path:
    """The environment variable DSDISTILL_CACHE, else dsdistill in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("DSDISTILL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dsdistill"


def decoded_images() -> Path:
    """Where the decoded images of folders are kept."""
    return cache() / "decoded"


def evaluations() -> Path:
    """Where the results of evaluations are kept that others can use."""
    return cache() / "evaluations"
