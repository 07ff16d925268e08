"""The scorecard of Fashion-MNIST: KIP and Label Solve at 1, 10 and 50 a class, five seeds.

    python benchmarks/scorecard.py --root runs/scorecard    all sets, about five hours on two cores
    python benchmarks/scorecard.py kip-fc-10 ls-fc-10       the sets named

Every set is one `dsdistill` command and every evaluation another, printed as they start. Stopped
at any moment, the same line goes on where it was. A set whose run lies in ROOT already is taken as
it is: those of the kernel `convnet` may be copied from `benchmarks/kip.py`, whose runs are the
same (its kip-10-0 is kip-convnet-10 here), and ls-convnet-50 from a machine with a GPU, which makes
it in two minutes where two cores take as many hours. ROOT/report.html shows all evaluations on one
page; the last lines are a table for docs/results.md.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from dsdistill.harness.data import distilled_set
from dsdistill.harness.reports import report, wording

COUNTS = (1, 10, 50)
RIDGE = "--ridge 1e-6"  # of KIP, as the recorded table has it
SETS = {  # name: the command
    **{f"ls-fc-{k}": f"ls fashion-mnist --images-per-class {k}" for k in COUNTS},
    **{
        f"kip-fc-{k}": f"kip fashion-mnist --steps 300 {RIDGE} --images-per-class {k}"
        for k in COUNTS
    },
    **{
        f"ls-convnet-{k}": f"ls fashion-mnist --kernel convnet --images-per-class {k}"
        for k in COUNTS
    },
    **{
        f"kip-convnet-{k}": f"kip fashion-mnist --kernel convnet --images-per-class {k} "
        f"--learn-labels --optimizer gauss-newton {RIDGE}{steps}"
        for k, steps in ((1, ""), (10, " --steps 30"))
    },
    **{
        f"kip-fc-ce-{k}": f"kip fashion-mnist --steps 300 --outer ce --images-per-class {k}"
        for k in COUNTS[:2]
    },
    **{
        f"pool-{k}": f"kip fashion-mnist --kernel features:convnet:32 --images-per-class {k} "
        f"--target-batch 500 --learning-rate 0.03 --schedule cosine --steps {steps} "
        "--learn-labels --label-learning-rate 0.005"
        for k, steps in ((1, 1500), (10, 2500))
    },
}
LEARNERS = "ridge,convnet,mlp"
CONTROLS = "random,k-means,herding,full"
ARMS = ("distilled", "distilled-hard", *CONTROLS.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sets", nargs="*", metavar="set", help=", ".join(SETS))
    parser.add_argument("--root", type=Path, default=Path("runs/scorecard"))
    options = parser.parse_args()
    unknown = set(options.sets) - set(SETS)
    if unknown:
        parser.error(f"no set {', '.join(sorted(unknown))}: {', '.join(SETS)}")
    root = options.root
    root.mkdir(parents=True, exist_ok=True)
    found = [evaluated(name, root) for name in options.sets or SETS]
    dsdistill("report", *map(str, found), "--out", str(root / "report.html"))
    print("\n".join(table({folder.parent.name: report.load(folder) for folder in found})))


def evaluated(name: str, root: Path) -> Path:
    """The folder of a set's evaluation, both made unless they are there."""
    run = root / name
    if not (run / distilled_set.FILE_NAME).exists():
        again = ["--resume"] if run.exists() else []
        dsdistill(*shlex.split(SETS[name]), "--out", str(run), *again)
    out = run / "scorecard"
    if not (out / report.FILE_NAME).exists():
        again = ["--resume"] if out.exists() else []
        what = ("--learners", learners(name), "--controls", CONTROLS, "--seeds", "5")
        cache = ("--cache", str(root / "cache"))
        dsdistill("evaluate", str(run), *what, *cache, "--out", str(out), *again)
    return out


def learners(name: str) -> str:
    """Ridge regression with a convolutional kernel is for the small sets: full data take a day."""
    return LEARNERS if "-fc-" in name else LEARNERS.removeprefix("ridge,")


def table(reports: dict[str, report.Report]) -> list[str]:
    """A row a set and learner, a column an arm; no deviation where all seeds are one training."""
    lines = [
        "| set | learner | " + " | ".join(ARMS) + " | IOR | p |",
        "|---" * (len(ARMS) + 4) + "|",
    ]
    for name, found in reports.items():
        for score in found.scores:
            rows = [found.row(score.learner, arm) for arm in ARMS]
            cells = [wording.accuracy(row) if row else wording.NOTHING for row in rows]
            cells = [cell.removesuffix(f" ({wording.DETERMINISTIC})") for cell in cells]
            ior = wording.NOTHING if score.ior is None else f"{score.ior:+.3f}"
            cells += [ior, wording.p_value(score.versus_random)]
            lines.append(f"| `{name}` | {score.learner} | " + " | ".join(cells) + " |")
    return lines


def dsdistill(*arguments: str) -> None:
    print("+ dsdistill", shlex.join(arguments), flush=True)
    code = "from dsdistill.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


if __name__ == "__main__":
    main()
