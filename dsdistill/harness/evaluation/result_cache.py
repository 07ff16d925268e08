"""Results that are kept: one small file each, named by all that the result depends on.

A killed evaluation goes on with those of its folder; arms that do not depend on the distilled set,
the full data above all, are shared by all evaluations. A file that is damaged, or of another
version, is no result: it is computed anew.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsdistill.harness.evaluation.results import Result
from dsdistill.harness.runs import progress
from dsdistill.harness.runs.run_folder import write_bytes

VERSION = 1  # raise it when a result would be another for the same key


@dataclass(frozen=True)
class ResultCache:
    """A folder of results, and where those that others can use lie too.

    Attributes:
        folder: Of this evaluation; made when the first result comes.
        shared: Of the arms in `sharing`; None for none.
        sharing: Names of arms that any evaluation can use.
        say: Called with a line where a file is damaged.
    """

    folder: Path
    shared: Path | None = None
    sharing: tuple[str, ...] = ()
    say: Callable[[str], None] = progress.say

    def get(
        self, key: Mapping[str, Any], problem: Callable[[Result], str | None] = lambda _: None
    ) -> Result | None:
        """The result of that key, or None.

        Args:
            key: All that it depends on.
            problem: What is impossible about a result; one that has a problem does not count.
        """
        for folder in self._folders(key):
            if found := self._read(folder / _file_name(key), key, problem):
                return found
        return None

    def put(self, key: Mapping[str, Any], result: Result) -> None:
        """Keep a result; one that failed in this evaluation alone, since it may be the machine."""
        folders = self._folders(key)
        for folder in folders[:1] if result.failure else folders:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"key": key, "result": asdict(result)}, sort_keys=True)
            line = json.dumps({"sha256": _digest(text), "content": text})
            write_bytes(folder / _file_name(key), line.encode())

    def _folders(self, key: Mapping[str, Any]) -> list[Path]:
        shared = self.shared if key["arm"][0] in self.sharing else None
        return [self.folder, *([shared] if shared else [])]

    def _read(
        self, path: Path, key: Mapping[str, Any], problem: Callable[[Result], str | None]
    ) -> Result | None:
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text())
            text = stored["content"]
            if _digest(text) != stored["sha256"]:
                raise ValueError("its content does not match its checksum")
            content = json.loads(text)
            if content["key"] != json.loads(json.dumps(key)):
                raise ValueError("it belongs to another key")
            result = Result(**content["result"])
            if why := problem(result):
                raise ValueError(why)
            return result
        except Exception as error:  # damage shows in many ways, each mended by measuring anew
            self.say(f"{path} is damaged ({error}) and is measured anew")
            return None


def _file_name(key: Mapping[str, Any]) -> str:
    return _digest(json.dumps({"version": VERSION, **key}, sort_keys=True))[:32] + ".json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
