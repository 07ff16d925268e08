"""Images per second of `kd features` beside a bare timm loop over the same JPEGs, in one run.

    python benchmarks/features.py FOLDER [--network resnet18] [--image-size 32] [--repeats 2]

FOLDER has class folders, or train/ and test/ with them. Both sides decode in as many processes,
with the same transform, batch size, network and weights, and take turns; the memory of the process
is read after each part. The bare loop keeps all features in memory and writes nothing.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import psutil
import timm
import torch
from timm.data.dataset import ImageDataset
from timm.data.loader import create_loader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def bare(folder: Path, network: torch.nn.Module, size: int, workers: int, batch: int) -> float:
    """Seconds of timm's loader and a plain loop."""
    began = time.perf_counter()
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
    return time.perf_counter() - began


def ours(folder: Path, weights: Path, options: argparse.Namespace, out: Path) -> dict[str, float]:
    """Seconds of `kd features` in this process, from the listing of files to the finished file."""
    from kd.commands import features
    from kd.options import FeaturesOptions

    began = time.perf_counter()
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
        "seconds": time.perf_counter() - began,
        "features": figures["features"],
        "resident_mib": psutil.Process().memory_info().rss / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
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
            row = {
                "turn": turn,
                "images": count,
                "bare_per_second": round(count / seconds, 1),
                "features_per_second": round(count / measured["seconds"], 1),
                "ratio": round(seconds / measured["seconds"], 3),
                "resident_mib": round(measured["resident_mib"]),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
