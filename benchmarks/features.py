"""Images per second of `kd features` beside a bare timm loop over the same JPEGs, in one run.

    python benchmarks/features.py FOLDER [--network resnet18] [--image-size 32] [--repeats 2]

FOLDER has class folders, or train/ and test/ with them. Both sides decode in as many processes,
with the same transform, batch size, network and weights, and take turns; the memory of the process
is read after each part. The bare loop keeps all features in memory and writes nothing. Beside other
work compare the processor's time, that of the decoding processes included, not the clock's.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
from timm.data.dataset import ImageDataset
from timm.data.loader import create_loader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Stopwatch:
    """Seconds since it was made: of the clock, and of processors in this process and ended ones."""

    def __init__(self) -> None:
        self._began = self._now()

    def read(self) -> tuple[float, float]:
        gc.collect()  # ends the decoding processes, whose time counts then
        clock, processor = self._now()
        return clock - self._began[0], processor - self._began[1]

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), sum(os.times()[:4])


def bare(folder: Path, network: Any, size: int, workers: int, batch: int) -> tuple[float, float]:
    """Seconds of timm's loader and a plain loop, by the clock and of processors."""
    watch = Stopwatch()
    images = ImageDataset(str(folder))
    loader = create_loader(
        images,
        (3, size, size),
        batch,
        mean=MEAN,
        std=STD,
        interpolation="bilinear",
        crop_pct=1.0,
        num_workers=workers,
        use_prefetcher=False,
        persistent_workers=False,
    )
    features = []
    with torch.inference_mode():
        for x, _ in loader:
            features.append(network.forward_head(network.forward_features(x), pre_logits=True))
    whole = torch.cat(features).half()
    assert len(whole) == len(images)
    del loader
    return watch.read()


def ours(folder: Path, weights: Path, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Seconds of `kd features` in this process, from the listing of files to the finished file."""
    from kd.commands import features
    from kd.options import FeaturesOptions

    watch = Stopwatch()
    figures = features.run(
        FeaturesOptions(
            data=str(folder),
            student=f"{options.network}@{weights}",
            image_size=options.image_size,
            workers=options.workers,
            batch_size=options.batch_size,
            device="cpu",
            out=out,
        )
    )
    return {
        "seconds": watch.read(),
        "features": figures["features"],
        "resident_mib": psutil.Process().memory_info().rss / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    network = timm.create_model(options.network, num_classes=10).eval()
    with tempfile.TemporaryDirectory() as name:
        weights = Path(name) / "weights.pth"
        torch.save(network.state_dict(), weights)
        for turn in range(options.repeats):
            arguments = (network, options.image_size, options.workers, options.batch_size)
            seconds = bare(options.folder, *arguments)
            measured = ours(options.folder, weights, options, Path(name) / f"{turn}.npz")
            count = measured["features"]
            own = measured["seconds"]
            row = {
                "turn": turn,
                "images": count,
                "bare_per_second": round(count / seconds[0], 1),
                "features_per_second": round(count / own[0], 1),
                "ratio": round(seconds[0] / own[0], 3),
                "bare_processor_ms": round(1e3 * seconds[1] / count, 3),
                "features_processor_ms": round(1e3 * own[1] / count, 3),
                "processor_ratio": round(seconds[1] / own[1], 3),
                "resident_mib": round(measured["resident_mib"]),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
