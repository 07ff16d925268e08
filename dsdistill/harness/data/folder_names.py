"""Folder names for classes: safe on every file system, inside their parent, and none twice."""

import re
import unicodedata
from collections.abc import Sequence

# Beside the class folders of an export: class folder -> class.
CLASSES_FILE = "classes.json"
# File systems allow 255.
MAX_FOLDER_NAME_BYTES = 100
# Names that Windows keeps for itself, with any suffix.
WINDOWS_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def from_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """A name of a folder for each class: safe on every file system, and none twice.

    A name that is safe by itself is kept; of two that differ in case alone, the first.
    """
    safe = [_safe_name(name) for name in classes]
    # Names that need no change have the first choice, whatever the order of the classes.
    order = sorted(range(len(classes)), key=lambda k: safe[k] != classes[k])
    taken, names = {CLASSES_FILE}, list(safe)
    for k in order:
        count = 1
        while unicodedata.normalize("NFC", names[k]).casefold() in taken:
            count += 1
            names[k] = f"{safe[k]}-{count}"
        taken.add(unicodedata.normalize("NFC", names[k]).casefold())
    return tuple(names)


def _safe_name(name: str) -> str:
    """The name in letters that are safe in a path, and not hidden."""
    text = unicodedata.normalize("NFC", name)
    text = re.sub(r"[/\\]", "-", text)
    text = "".join(c if c.isprintable() and c not in '<>:"|?*' else "_" for c in text)
    while len(text.encode()) > MAX_FOLDER_NAME_BYTES:
        text = text[:-1]
    text = text.strip(" ").rstrip(". ")
    if not text or text.startswith((".", "-")) or WINDOWS_RESERVED.fullmatch(text):
        text = f"_{text}"
    return text
