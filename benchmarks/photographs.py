"""Photographs of ten classes, distilled through a backbone that was trained on other classes.

    python benchmarks/photographs.py DATA BACKBONE OTHER --root runs/photographs
    python benchmarks/photographs.py DATA BACKBONE OTHER --counts 1 --seeds 3 --sets-only

DATA is a folder of class folders, BACKBONE and OTHER are runs of `kd train` on classes that DATA
does not have. For one and ten images per class it makes a set for each seed with
`dsdistill kip --features BACKBONE`, hard labels, and judges all of them at once, beside random
images, k-means in pixels and all training images, by a linear probe on both backbones. With
`--also` further sets are judged beside them, such as those of `dsdistill select`.

Every step is one `dsdistill` command, printed as it starts. Stopped at any moment, the same line
goes on where it was.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from kip import dsdistill, finish

from dsdistill.harness.reports import report

# Views of each distilled image in a step, and steps: what two cores can do in a few minutes.
BUDGETS = {1: "", 10: " --views 1 --steps 200"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data")
    parser.add_argument("backbone", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--root", type=Path, default=Path("runs/photographs"))
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--also", type=Path, nargs="*", default=[])
    parser.add_argument("--sets-only", action="store_true")
    parser.add_argument("--options", type=lambda text: f" {text}", default="")
    options = parser.parse_args()
    options.root.mkdir(parents=True, exist_ok=True)
    for count in options.counts:
        sets = [options.root / f"kip-{count}-{seed}" for seed in range(options.seeds)]
        for seed, folder in enumerate(sets):
            finish(
                f"kip {options.data} --features {options.backbone} --kernel linear "
                f"--images-per-class {count} --seed {seed}{BUDGETS[count]}{options.options}",
                folder,
            )
        if not options.sets_only:
            also = [path for path in options.also if f"-{count}" in path.name]
            print(judged(sets, also, options, options.root / f"judged-{count}"), flush=True)


def judged(sets: list[Path], also: list[Path], options: argparse.Namespace, out: Path) -> str:
    """A line for each kind of images and backbone; the sets of all seeds are one kind."""
    if not (out / report.FILE_NAME).exists():
        probes = ",".join(f"linear-probe@{path}" for path in (options.backbone, options.other))
        first, *others = map(str, sets)
        given = ["--learners", probes, "--controls", "random,k-means,full", "--seeds", "5"]
        resume = ["--resume"] if out.exists() else []
        further = ["--also", *others, *map(str, also)] if others or also else []
        dsdistill(["evaluate", first, *given, "--out", str(out), *further, *resume])
    found: dict[tuple[str, str], list[float]] = {}
    names = {path.name for path in sets}
    for row in report.load(out).rows:
        arm = "kip" if row.arm == "distilled" or row.arm in names else row.arm
        if not arm.endswith("-hard"):
            accuracies = [r.accuracy for r in row.results if r.accuracy is not None]
            # A probe is deterministic: all seeds on one set are one result.
            found.setdefault((arm, row.learner), []).extend(
                accuracies if arm == "random" else accuracies[:1]
            )
    lines = []
    for (arm, learner), values in found.items():
        spread = f" +- {np.std(values, ddof=1):.1%}" if len(values) > 1 else ""
        lines.append(f"{arm:20} {learner:40} {np.mean(values):.1%}{spread} ({len(values)})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
