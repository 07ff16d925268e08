"""Checksums of a finished run's files, verified whenever one of them is read.

`report.json` is written last, and holds the SHA-256 of every other file of the run and one of its
own content; `model.json` holds those of the weights, which may be copied elsewhere without the
rest. So a file that was damaged, edited, or taken from another run gives an error of one line, and
never another result. Runs finished by an earlier version have no checksums and are read as they
are.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsdistill.harness import files
from dsdistill.harness.checksums import file_digest, json_digest
from dsdistill.harness.errors import UserError

REPORT, CARD = "report.json", "model.json"
WEIGHTS, WHITENING = "student.safetensors", "preprocess.safetensors"
INITIAL_WEIGHTS = "initial.safetensors"  # of a centred student
QUANTISERS = "quantisers.safetensors"  # of a quantised student
ARRAY_FILES = (WEIGHTS, WHITENING, INITIAL_WEIGHTS, QUANTISERS)  # sealed by the card
SEALED_FILES = ("config.json", "recipe.json", "metrics.jsonl", CARD, *ARRAY_FILES)
CHECKSUMS_KEY = "sha256"  # in both files: file -> SHA-256


def write(folder: Path, name: str, content: Mapping[str, Any], sealed: Iterable[str]) -> None:
    """Write a JSON file with the checksums of itself and of other files.

    Args:
        folder: The run's folder.
        name: Name of the file.
        content: JSON-compatible values; NaN becomes null.
        sealed: Names of the other files; missing ones are left out.
    """
    present = [other for other in sealed if (folder / other).is_file()]
    body = {**content, CHECKSUMS_KEY: {other: file_digest(folder / other) for other in present}}
    plain = json.loads(json.dumps(body), parse_constant=lambda _: None)  # as it will be read
    plain[CHECKSUMS_KEY][name] = json_digest(plain)
    files.write_json(folder / name, plain)


def read(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a run, verified where the run has checksums.

    Args:
        folder: The run's folder.
        name: `config.json`, `recipe.json`, `model.json` or `report.json`.

    Raises:
        UserError: If the file is missing, is not a JSON object, or does not match its checksum.
    """
    verify(folder, name)
    return _read_unverified(folder / name)


def verify(folder: Path, *names: str) -> None:
    """Compare files of a run with the checksums in its `report.json` and `model.json`.

    Raises:
        UserError: If a file is missing or differs.
    """
    for holder in (REPORT, CARD):
        if not (folder / holder).is_file():
            continue
        sums = _read_checksums(folder, holder)
        for name in names:
            if name != holder and name in sums and _differs(folder / name, sums[name]):
                raise UserError(
                    f"{folder / name} is damaged or of another run: it does not match the "
                    f"checksum in {holder}; put back the file of this run, or train anew"
                )


def _read_checksums(folder: Path, holder: str) -> Mapping[str, str]:
    """The checksums in `report.json` or `model.json`; empty for a run of an earlier version."""
    path = folder / holder
    content = _read_unverified(path)
    if CHECKSUMS_KEY not in content:
        if (
            holder == REPORT
            and (folder / CARD).is_file()
            and CHECKSUMS_KEY in _read_unverified(folder / CARD)
        ):
            raise UserError(f"{path} is damaged or of another run: it has lost its checksums")
        return {}
    sums = content[CHECKSUMS_KEY]
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise UserError(f"{path} is damaged: its checksums are not readable")
    checksum_of_holder = sums.pop(holder, None)
    if checksum_of_holder != json_digest(content):
        raise UserError(
            f"{path} is damaged: its content does not match its checksum; put back the file of "
            "this run, or train anew"
        )
    return sums


def _differs(path: Path, sha256: str) -> bool:
    return not path.is_file() or file_digest(path) != sha256


def _read_unverified(path: Path) -> dict[str, Any]:
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: expected a JSON object")
    return content
