"""Cache of results: one small file each, named by a hash of all that the result depends on.

A killed evaluation continues with the results in its folder. Arms that do not depend on the
distilled set, above all the full data, are shared by all evaluations. A file that is damaged, or
of another version, does not count: its result is measured again.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsdistill.harness import checksums
from dsdistill.harness.evaluation.results import Result
from dsdistill.harness.files import write_bytes
from dsdistill.harness.runs import progress

VERSION = 1  # raise it when the same key would give another result


@dataclass(frozen=True)
class ResultCache:
    """A folder of results, and a second one for those that other evaluations can use.

    Attributes:
        folder: Folder of this evaluation, created with the first result.
        shared: Folder of the arms in `shared_arms`, for all evaluations; None to share nothing.
        shared_arms: Names of the arms that any evaluation can use.
        say: Called with one line for each damaged file.
    """

    folder: Path
    shared: Path | None = None
    shared_arms: tuple[str, ...] = ()
    say: Callable[[str], None] = progress.say

    def get(
        self, key: Mapping[str, Any], problem: Callable[[Result], str | None] = lambda _: None
    ) -> Result | None:
        """The stored result of a key, or None.

        Args:
            key: All that the result depends on.
            problem: Function that returns why a result is impossible, or None; an impossible
                result does not count.
        """
        for folder in self._folders(key):
            if result := self._read(folder / _file_name(key), key, problem):
                return result
        return None

    def put(self, key: Mapping[str, Any], result: Result) -> None:
        """Store a result; a failure for this evaluation only: the machine may be the cause."""
        folders = self._folders(key)
        for folder in folders[:1] if result.failure else folders:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"key": key, "result": asdict(result)}, sort_keys=True)
            line = json.dumps({"sha256": checksums.digest(text, {}), "content": text})
            write_bytes(folder / _file_name(key), line.encode())

    def _folders(self, key: Mapping[str, Any]) -> list[Path]:
        shared = self.shared if key["arm"][0] in self.shared_arms else None
        return [self.folder, *([shared] if shared else [])]

    def _read(
        self, path: Path, key: Mapping[str, Any], problem: Callable[[Result], str | None]
    ) -> Result | None:
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text())
            text = stored["content"]
            if checksums.digest(text, {}) != stored["sha256"]:
                raise ValueError("its content does not match its checksum")
            content = json.loads(text)
            if content["key"] != json.loads(json.dumps(key)):
                raise ValueError("it belongs to another key")
            result = Result(**content["result"])
            if why := problem(result):
                raise ValueError(why)
            return result
        except Exception as error:  # damage takes many forms; measuring again mends each
            self.say(f"{path} is damaged ({error}): its result is measured again")
            return None


def _file_name(key: Mapping[str, Any]) -> str:
    return checksums.json_digest({"version": VERSION, **key})[:32] + ".json"
