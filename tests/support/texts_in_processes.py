"""`kd train` with several command lines one after the other, in one process or several.

The lines are read from a file, as JSON: importing torch and transformers takes longer than they do.
"""

import json
import sys
from pathlib import Path

from kd import cli
from kd.runs import curves


def main(lines: Path, *common: str) -> None:
    curves.draw = lambda folder: None
    for line in json.loads(lines.read_text()):
        sys.argv = ["kd", "train", *line, *common]
        cli.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
