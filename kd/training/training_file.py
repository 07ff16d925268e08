"""A training in one file: written as it goes on, and read to go on from it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsdistill.harness import checksums, files
from dsdistill.harness.errors import UserError, one_line
from dsdistill.harness.reports import schema
from kd.recipe import Recipe
from kd.training import checkpoint
from kd.training.checkpoint import META_TYPES, PackedState

KEY = "training"  # of the JSON part in the file's header
REMEDY = ": give another checkpoint, or delete it to start anew"


def write(path: Path, state: PackedState) -> None:
    """Replace the file atomically, in a folder that `read` has created."""
    arrays, meta = state
    files.write_bytes(path, checksums.pack(KEY, json.dumps(meta), arrays))


def read(path: Path, recipe: Recipe, inputs: Mapping[str, Any]) -> PackedState | None:
    """Read the state of a training, before its first step; None if there is none yet.

    Args:
        path: The file.
        recipe: Recipe of the training that goes on; of the stored one its length may differ.
        inputs: What must be as it was when the training began, by a readable name,
            JSON-compatible; stored under `inputs`.

    Raises:
        UserError: If the file is damaged, of another training, or cannot be written.
    """
    if path.is_dir():
        raise UserError(f"checkpoint must be a file, and {path} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be written: {one_line(error)}") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"checkpoint {path} cannot be written: its folder is not writable")
    if not path.exists():
        return None
    meta, arrays, _ = checksums.load(path, KEY, kind="a checkpoint of kd.distill", remedy=REMEDY)
    try:
        schema.check("the checkpoint", meta, META_TYPES)
    except ValueError as error:
        raise UserError(f"{path} is no checkpoint of kd.distill ({error}){REMEDY}") from error
    changed = checkpoint.first_change(meta.get("inputs", {}), inputs)
    if changed := changed or checkpoint.changed_field(meta.get("recipe") or {}, recipe):
        name, stored, now = changed
        raise UserError(
            f"{path} was made with {name} {_short(stored)}, and this call has {_short(now)}: put "
            "that back, or give another checkpoint"
        )
    return arrays, meta


def _short(value: Any) -> str:
    """The value, of a SHA-256 its first characters."""
    text = str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text
