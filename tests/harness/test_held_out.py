"""Which images of a folder are held out: the same ones whatever the order of its classes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsdistill.harness.data import datasets
from dsdistill.harness.data.labeled_images import LabeledImages
from kd.data.files.image_files import ImageFiles, open_folder

# Two of ten images of each of the classes 0, 1, ... 11, as they were held out when folders of
# numbers stood in the order of their text (0, 1, 10, 11, 2, ...).
FIFTH = "46 29 12 46 06 02 16 56 37 12 45 45"  # of all images: the test part of a folder without
# Of the eight others, a fifth again.
VALIDATION = "25 37 34 59 12 79 89 28 49 45 23 67"
ORDERS = (
    None,
    tuple(sorted(str(number) for number in range(12))),
    tuple(str(11 - number) for number in range(12)),
    tuple(f"{number:05}" for number in range(12)),
)


def _numbered(root: Path) -> None:
    for label in range(12):
        (root / str(label)).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (4, 4), (label, number, 9)).save(root / str(label) / f"{number}.png")


def _paths(numbers: str) -> set[str]:
    return {f"{label}/{n}" for label, pair in enumerate(numbers.split()) for n in pair}


def _decoded(part: LabeledImages) -> set[str]:
    return {f"{image[0, 0, 0]}/{image[0, 0, 1]}" for image in part.images()}


def _streamed(part: ImageFiles) -> set[str]:
    names = (part.reader.filename(int(row), absolute=True) for row in part.rows)
    return {f"{Path(name).parent.name}/{Path(name).stem}" for name in names}


@pytest.mark.parametrize("order", ORDERS)
def test_a_folder_without_parts_holds_out_what_earlier_runs_did(tmp_path, order):
    _numbered(tmp_path / "photos")
    kept = datasets.load(
        str(tmp_path / "photos"),
        root=tmp_path,
        cache=tmp_path / "cache",
        validation_fraction=0.2,
        classes=order,
    )
    assert _decoded(kept.test) == _paths(FIFTH)
    assert _decoded(kept.validation) == _paths(VALIDATION)
    parts = open_folder(tmp_path / "photos", 0.2, order)
    assert _streamed(parts.test) == _paths(FIFTH)
    assert _streamed(parts.validation) == _paths(VALIDATION)
    assert kept.train.classes == parts.train.classes


@pytest.mark.parametrize("order", ORDERS)
def test_so_do_the_training_images_beside_a_test_part(tmp_path, order):
    for part in ("train", "val"):
        _numbered(tmp_path / "photos" / part)
    kept = datasets.load(
        str(tmp_path / "photos"),
        root=tmp_path,
        cache=tmp_path / "cache",
        validation_fraction=0.2,
        classes=order,
    )
    assert _decoded(kept.validation) == _paths(FIFTH)
    assert _streamed(open_folder(tmp_path / "photos", 0.2, order).validation) == _paths(FIFTH)


def test_arrays_hold_out_the_same_images_in_any_order_of_their_classes(tmp_path):
    images = np.arange(120, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(12).repeat(10))
    held = []
    for order in ORDERS:
        splits = datasets.load(
            str(tmp_path / "set.npz"), root=tmp_path, validation_fraction=0.2, classes=order
        )
        held.append([sorted(p.images()[:, 0, 0, 0]) for p in (splits.validation, splits.test)])
    assert held[1:] == held[:-1]
    assert len(held[0][0]) == len(held[0][1]) == 24
