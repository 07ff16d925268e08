"""Default locations of data sets and caches, and absolute paths."""

import os
from pathlib import Path


def data_root() -> Path:
    """Folder of data sets: $DSDISTILL_DATA, else ~/.cache/dsdistill."""
    return Path(os.environ.get("DSDISTILL_DATA") or "~/.cache/dsdistill").expanduser()


def cache() -> Path:
    """Cache folder: $DSDISTILL_CACHE, else dsdistill in $XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("DSDISTILL_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dsdistill"


def decoded_images() -> Path:
    """Cache of the decoded images of folders."""
    return cache() / "decoded"


def evaluations() -> Path:
    """Cache of evaluation results that later evaluations can reuse."""
    return cache() / "evaluations"


def transfer_sets() -> Path:
    """Cache of the copies of training texts, for teachers to answer."""
    return cache() / "transfer-sets"


def absolute(text: str) -> str:
    """The absolute path of a file or folder that exists; any other text as it is."""
    path = Path(text).expanduser()
    return str(path.resolve()) if text and path.exists() else text
