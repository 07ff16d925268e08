"""Label Solve and the linear probe on synthetic features of many classes: seconds and memory.

    python benchmarks/linear_scale.py --images 100000 --classes 1000 --values 512

Writes features of the format of `kd features` to a temporary folder, maps them, and runs
`dsdistill ls FILE --kernel linear` of one image per class step by step, then passes of the linear
probe. Memory is the process's own: the peak above its size before the file is opened, without the
pages of the file, which the system keeps as long as it has room.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from dsdistill.harness.data import datasets
from dsdistill.harness.data.feature_file import PartialFeatures
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.parallel import devices


def write(path: Path, images: int, classes: int, values: int) -> None:
    """Write noisy features around a mean for each class; a fiftieth of them are for the test."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((classes, values), np.float32)
    test = images // 50
    labels = np.concatenate([np.arange(images) % classes, np.arange(test) % classes])
    partial = PartialFeatures(path, {"draw_order": None}, (len(labels), values), resume=False)
    for first in range(0, len(labels), 8192):
        own = labels[first : first + 8192]
        partial.append(means[own] + 4 * rng.standard_normal((len(own), values), np.float32))
    parts = np.where(np.arange(len(labels)) < images, 0, 2)
    names = tuple(f"class{i}" for i in range(classes))
    partial.finish(labels, names, parts, np.arange(len(labels)))


def anonymous_mib() -> float:
    """Memory of this process without pages of files."""
    info = psutil.Process().memory_info()
    return (info.rss - info.shared) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--values", type=int, default=512)
    parser.add_argument("--probe-passes", type=int, default=2)
    options = parser.parse_args()
    devices.use_all()
    from dsdistill.harness.data import preprocess
    from dsdistill.kernels import networks
    from dsdistill.methods import initial_support, label_solve, linear_probe, ridge

    rows: list[dict[str, float | str]] = []
    network, before = networks.parse("linear"), 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npz"
        write(path, options.images, options.classes, options.values)
        before = anonymous_mib()

        def report(step: str, began: float, **figures: float) -> None:
            seconds = round(time.perf_counter() - began, 2)
            mib = round(anonymous_mib() - before)
            rows.append({"step": step, "seconds": seconds, "mib": mib, **figures})
            print(json.dumps(rows[-1]), flush=True)

        began = time.perf_counter()
        splits = datasets.load(str(path), root=Path(folder), validation_fraction=0.0)
        report("check and map the file", began)
        began = time.perf_counter()
        fitted = preprocess.fit("centre", splits.train.chunks, splits.train.shape)
        report("fit the preprocessing", began)
        train = Examples(splits.train, fitted)
        support = initial_support.draw_support(train, 1, noise=False, corruption=0, seed=0)
        began = time.perf_counter()
        sums, peak = label_solve.Sums(0, np.zeros((0, 0)), np.zeros((0, 0))), before
        for latest in label_solve.accumulate(network, support.images, train):
            sums, peak = latest, max(peak, anonymous_mib())
        report("sums over all images", began, peak_mib=round(peak - before))
        began = time.perf_counter()
        labels = label_solve.solve(network, support.images, sums, 1e-6)
        report("solve for the labels", began)
        began = time.perf_counter()
        predict = ridge.fit(network, support.images, labels, 1e-6)
        right = (predict(fitted.apply(splits.test.images())).argmax(1) == splits.test.labels).mean()
        full = ridge.RidgeLearner(network, limit=None)(train, train, 0)
        every = (full(fitted.apply(splits.test.images())).argmax(1) == splits.test.labels).mean()
        report("predict", began, accuracy=float(right), accuracy_of_all_images=float(every))
        p, k = options.values + 1, options.classes
        passed = linear_probe._compile_pass(train, p, k)
        for _ in range(options.probe_passes):
            began = time.perf_counter()
            passed(np.zeros(p * k), 1e-3)
            report("one pass of the linear probe", began)


if __name__ == "__main__":
    main()
