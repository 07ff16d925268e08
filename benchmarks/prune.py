"""Half of the multiplications of a student: with labels alone, and taught by the unpruned network.

    python benchmarks/prune.py --root runs/prune                three seeds
    python benchmarks/prune.py --root runs/prune --seeds 1      the first

A network is trained for two epochs, pruned until half of its multiply-accumulates are gone, and
trained for two more, once with labels alone, once with the unpruned network as its teacher, and
once, as a control, with that teacher's answers to other images of the batch. The unpruned network
is trained for two more epochs as well, on labels alone: what pruning costs is the difference to
that. Every run is a `kd train` line, printed as it starts, in this process; what is finished is
only read. Each pruned student is loaded again, and must have the size that it had. The last lines
are a table for docs/results.md.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from quantised import finished

from kd.models import pruning, saved_models

DATA = "fashion-mnist"
EPOCHS = 2
UNPRUNED = "unpruned, trained as long"
ROWS = {  # name -> options behind the unpruned run
    "half, taught": "--prune 0.5",
    "half, labels alone": "--prune 0.5 --loss ce:1",
    UNPRUNED: "--loss ce:1 --lr 0.005 --warmup 0",
    "half, control": "--prune 0.5",
}
HEAD = (
    "| student | accuracy, % | minus the unpruned start | minus the unpruned trained as long | "
    "multiply-accumulates | parameters | ms | before, ms |\n|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("runs/prune"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--student", default="convnet:32")
    options = parser.parse_args()
    root = options.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    starts: list[dict[str, Any]] = []
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in ROWS}
    for seed in range(options.seeds):
        start = root / f"start-{seed}"
        line = f"--student {options.student} --epochs {EPOCHS} --seed {seed}"
        starts.append(finished(["train", DATA, *shlex.split(line)], start))
        for name, words in ROWS.items():
            folder = root / f"{name.replace(',', '').replace(' ', '-')}-{seed}"
            line = f"--student {start} --epochs {EPOCHS} --seed {seed} {words}"
            arguments = ["train", DATA, *shlex.split(line)]
            report = finished(arguments, folder, permuted="control" in name)
            reports[name].append(report)
            check(folder, report)
    print("\n".join([HEAD, *rows(starts, reports)]), flush=True)


def check(folder: Path, report: dict[str, Any]) -> None:
    """Load a student again: its network must be as large as it was."""
    if "pruning" in report:
        model = saved_models.load_run(folder)
        macs = pruning.count_macs(model.classifier, model.shape)
        assert macs == report["pruning"]["after"]["macs"], (folder, macs)


def rows(starts: list[dict[str, Any]], reports: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of the table: means and sample deviations over the seeds, differences paired."""
    first, longer = _accuracies(starts), _accuracies(reports[UNPRUNED])
    lines = [f"| unpruned start | {_spread(first)} | | | | {starts[0]['parameters']:,} | | |"]
    for name, members in reports.items():
        values = _accuracies(members)
        cells = [name, _spread(values), _spread(values - first), _spread(values - longer)]
        pruned = [report["pruning"] for report in members if "pruning" in report]
        if pruned:
            before, after = pruned[0]["before"], pruned[0]["after"]
            cells.append(f"{after['macs']:,} of {before['macs']:,}")
            cells.append(f"{after['parameters']:,}")
            for key in ("after", "before"):
                times = [each[key]["latency_ms_batch_1"] for each in pruned]
                cells.append(f"{np.median(times):.3f}")
        else:
            cells += ["", f"{members[0]['parameters']:,}", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _accuracies(reports: list[dict[str, Any]]) -> np.ndarray:
    return 100 * np.array([report["test_accuracy"] for report in reports])


def _spread(values: np.ndarray) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


if __name__ == "__main__":
    main()
