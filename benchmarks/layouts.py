"""Folders as people have them, read by timm, torchvision, Hugging Face `datasets` and dsdistill.

    python benchmarks/layouts.py                the two tables of docs/folders.md, in a minute

Every layout and every kind of file is made in a temporary folder, a few files each, and given to
the four readers as their documentation says: timm by `create_dataset("", DATA, split=...)`,
torchvision by `ImageFolder(DATA)`, which knows no parts, Hugging Face by
`load_dataset("imagefolder", data_dir=DATA)`. A cell of the first table has the classes and the
number of images of each part, one of the second the first pixel of the file as it is handed out.
"""

import argparse
import contextlib
import io
import os
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RED, BLUE = (200, 30, 30), (30, 30, 200)
NAMES = ("cat", "dog", "owl")


def picture(file: Path, colour: tuple[int, ...] = RED, kind: str = "PNG") -> None:
    """Write a small picture of one colour."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(file, kind)


def fill(folder: Path, count: int, names: tuple[str, ...] = NAMES) -> None:
    """Write `count` pictures of each class."""
    for name in names:
        for number in range(count):
            picture(folder / name / f"{number}.png")


def _parts(**counts: int) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        for name, count in counts.items():
            fill(root / name, count)

    return make


def _tiny_imagenet(root: Path) -> None:
    for name in NAMES:
        for number in range(10):
            picture(root / "train" / name / "images" / f"{name}_{number}.JPEG", kind="JPEG")
    lines = [f"val_{n}.JPEG\t{NAMES[n % 3]}\t0\t0\t7\t7\n" for n in range(6)]
    for number in range(6):
        picture(root / "val" / "images" / f"val_{number}.JPEG", kind="JPEG")
        picture(root / "test" / "images" / f"test_{number}.JPEG", kind="JPEG")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))


def _unlabelled_test(root: Path) -> None:
    fill(root / "train", 10)
    for number in range(6):
        picture(root / "test" / f"{number}.png")


def _two_of_one_part(root: Path) -> None:
    _parts(train=10, val=2, validation=2)(root)


def _nested_links(root: Path) -> None:
    fill(root, 10, ("cat", "dog"))
    fill(root.parent / "pool", 5, ("more",))
    (root / "cat" / "more").symlink_to(root.parent / "pool" / "more")


def _loop(root: Path) -> None:
    fill(root, 10, ("cat", "dog"))
    (root / "cat" / "up").symlink_to("..")


def _broken_link(root: Path) -> None:
    fill(root, 10, ("cat", "dog"))
    (root / "cat" / "gone.png").symlink_to("nowhere.png")


def _normal_forms(root: Path) -> None:
    fill(root / "train", 10, (unicodedata.normalize("NFC", "café"), "dog"))
    fill(root / "val", 2, (unicodedata.normalize("NFD", "café"), "dog"))


def _latin1(root: Path) -> None:
    fill(root, 10, ("dog", "x"))
    os.rename(os.fsencode(root) + b"/x", os.fsencode(root) + b"/caf\xe9")


def _table(root: Path, folder: str, parts: dict[str, int], column: str = "label") -> None:
    """Pictures by turns of each class below `folder`, and the table that says so."""
    lines = [f"file_name,{column}"]
    for part, count in parts.items():
        for number in range(count * len(NAMES)):
            picture(root / folder / part / f"{number}.png")
            lines.append(f"{Path(part) / str(number)}.png,{NAMES[number % len(NAMES)]}")
    (root / folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def _table_in_each_part(root: Path) -> None:
    _table(root, "train", {"": 10})
    _table(root, "test", {"": 2})


def _captions(root: Path) -> None:
    fill(root, 10)
    names = [f"{name}/{number}.png" for name in NAMES for number in range(10)]
    lines = ["file_name,text", *(f"{name},a picture" for name in names)]
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")


def _pets(root: Path) -> None:
    for name in ("Abyssinian", "beagle"):
        for number in range(10):
            picture(root / "images" / f"{name}_{number}.png")
            picture(root / "annotations" / "trimaps" / f"{name}_{number}.png")
    (root / "annotations" / "trainval.txt").write_text("Abyssinian_0 1 1 1\n")


def _leftovers(root: Path) -> None:
    fill(root, 10, ("cat", "dog"))
    fill(root / "__MACOSX", 1, ("cat",))
    fill(root / ".ipynb_checkpoints", 1, ("cat",))
    picture(root / "cat" / "@eaDir" / "0.png" / "thumb.png")
    picture(root / "cat" / "._0.png")


def _heic(root: Path) -> None:
    fill(root, 10, ("cat", "dog"))
    for number in range(3):
        (root / "cat" / f"{number}.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 50)


def _no_extension(root: Path) -> None:
    fill(root, 10, ("cat", "dog"))
    for file in (root / "cat").iterdir():
        file.rename(file.with_suffix(""))


def _empty_class(root: Path) -> None:
    fill(root, 10, ("cat", "dog"))
    (root / "owl").mkdir()


def _flat(root: Path) -> None:
    for number in range(10):
        picture(root / f"{number}.png")


def _damaged(root: Path) -> None:
    fill(root, 20, ("cat", "dog"))
    (root / "cat" / "3.png").write_bytes(b"")


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "cat/ dog/ owl/": lambda root: fill(root, 10),
    "train/ val/": _parts(train=10, val=2),
    "train/ test/": _parts(train=10, test=2),
    "train/ val/ test/": _parts(train=10, val=2, test=4),
    "Train/ Test/": _parts(Train=10, Test=2),
    "training/ testing/": _parts(training=10, testing=2),
    "training_set/ test_set/": _parts(training_set=10, test_set=2),
    "seg_train/ seg_test/": _parts(seg_train=10, seg_test=2),
    "train2017/ val2017/": _parts(train2017=10, val2017=2),
    "val/ test/": _parts(val=2, test=4),
    "train/ val/ validation/": _two_of_one_part,
    "train/ with classes, test/ without": _unlabelled_test,
    "Tiny-ImageNet": _tiny_imagenet,
    "zipped/zipped/cat/ ...": lambda root: fill(root / "zipped" / "zipped", 10),
    "bus/ car/ train/ (vehicles)": lambda root: fill(root, 10, ("bus", "car", "train")),
    "link to a folder in a class": _nested_links,
    "link to the folder above": _loop,
    "link to nothing": _broken_link,
    "café/ as NFC in train/, NFD in val/": _normal_forms,
    "a name in Latin-1": _latin1,
    "\\_\\_MACOSX, .ipynb_checkpoints, @eaDir": _leftovers,
    "3 HEIC among PNG": _heic,
    "files without extension": _no_extension,
    "a class folder without images": _empty_class,
    "images and no folders": _flat,
    "train/metadata.csv, test/metadata.csv": _table_in_each_part,
    "metadata.csv above train/ test/": lambda root: _table(root, "", {"train": 10, "test": 2}),
    "metadata.csv beside images/": lambda root: _table(root, "", {"images": 10}),
    "metadata.csv with classes, batch1/ batch2/": lambda root: _table(
        root, "", {"batch1": 5, "batch2": 5}
    ),
    "metadata.csv of captions, class folders": _captions,
    "Oxford-IIIT Pet": _pets,
    "an empty file among 40": _damaged,
    "0/ 1/ ... 11/ (order)": lambda root: fill(root, 10, tuple(map(str, range(12)))),
    "Zoo/ ant/ b10/ b2/ (order)": lambda root: fill(root, 10, ("Zoo", "ant", "b10", "b2")),
}


def _save(image: Image.Image, kind: str, **options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        image.save(folder / f"odd.{kind}", **options)

    return make


def _float() -> Image.Image:
    return Image.fromarray(np.full((8, 8), 0.8, np.float32))


def _turned(folder: Path) -> None:
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(folder / "odd.png", exif=exif)


def _misnamed(folder: Path) -> None:
    picture(folder / "odd.jpg", kind="PNG")


def _frames(kind: str) -> Callable[[Path], None]:
    later = [Image.new("RGB", (8, 8), BLUE)]
    return _save(Image.new("RGB", (8, 8), RED), kind, save_all=True, append_images=later)


IMAGES: dict[str, Callable[[Path], None]] = {
    "RGB PNG (200, 30, 30)": _save(Image.new("RGB", (8, 8), RED), "png"),
    "grayscale JPEG, 77": _save(Image.new("L", (8, 8), 77), "jpg"),
    "CMYK JPEG of that red": _save(Image.new("RGB", (8, 8), RED).convert("CMYK"), "jpg"),
    "RGBA PNG, red, transparent": _save(Image.new("RGBA", (8, 8), (*RED, 0)), "png"),
    "RGBA PNG, red, half": _save(Image.new("RGBA", (8, 8), (*RED, 128)), "png"),
    "palette PNG, red": _save(Image.new("RGB", (8, 8), RED).quantize(2), "png"),
    "16-bit PNG, 51400 (200 of 255)": _save(
        Image.fromarray(np.full((8, 8), 51400, np.uint16)), "png"
    ),
    "float TIFF, 0.8": _save(_float(), "tif"),
    "bilevel PNG, 1": _save(Image.new("1", (8, 8), 1), "png"),
    "LAB TIFF of a red": _save(Image.new("LAB", (8, 8), (138, 209, 198)), "tif"),
    "GIF, red then blue": _frames("gif"),
    "TIFF, red then blue": _frames("tif"),
    "WebP, red": _save(Image.new("RGB", (8, 8), RED), "webp", lossless=True),
    "PNG named .jpg, red": _misnamed,
    "PNG turned by EXIF, red comes up": _turned,
}


def ours(root: Path, cache: Path) -> str:
    """Classes and images per part as `dsdistill.harness.data.datasets.load` reads them."""
    from dsdistill.harness.data import datasets
    from dsdistill.harness.errors import UserError

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            splits = datasets.load(str(root), root=root, cache=cache)
    except UserError as error:
        return _refusal(str(error), root)
    counts = (len(splits.train), len(splits.validation), len(splits.test))
    return _cell(splits.train.classes, dict(zip(("train", "val", "test"), counts, strict=True)))


def our_pixel(root: Path, cache: Path) -> str:
    """The first pixel of the odd image as `dsdistill.harness.data.datasets.load` reads it."""
    from dsdistill.harness.data import datasets
    from dsdistill.harness.errors import UserError

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            train = datasets.load(
                str(root), root=root, image_size=8, validation_fraction=0, cache=cache, channels=3
            ).train
    except UserError as error:
        return _refusal(str(error), root)
    return _pixel(train.images()[0])


def _timm(root: Path) -> str:
    from timm.data.dataset_factory import create_dataset

    def listed(split: str) -> tuple[tuple[str, ...], int]:
        part: Any = create_dataset("", str(root), split=split)
        by_name = part.reader.class_to_idx
        return tuple(sorted(by_name, key=by_name.__getitem__)), len(part)

    def read() -> str:
        classes, train = listed("train")
        _, val = listed("validation")
        return _cell(classes, {"train": train, "validation": val})

    return _tried(read, root)


def _torchvision(root: Path) -> str:
    from torchvision.datasets import ImageFolder

    def read() -> str:
        part = ImageFolder(str(root))
        return _cell(tuple(part.classes), {"all": len(part)})

    return _tried(read, root)


def _hugging_face(root: Path) -> str:
    import datasets

    def read() -> str:
        with tempfile.TemporaryDirectory() as cache:
            parts = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=cache)
            assert isinstance(parts, datasets.DatasetDict)
            first = next(iter(parts.values()))
            label, names = first.features.get("label"), ()
            if label is not None:  # numbers with names, or text as a table has it
                names = tuple(getattr(label, "names", None) or sorted(set(first["label"])))
            return _cell(names, {str(name): len(part) for name, part in parts.items()})

    return _tried(read, root)


def _timm_pixel(root: Path) -> str:
    from timm.data.dataset_factory import create_dataset

    def read() -> str:
        part: Any = create_dataset("", str(root / "train"))
        return _pixel(part[0][0]) if "odd" in part.reader.class_to_idx else "not read"

    return _tried(read, root)


def _torchvision_pixel(root: Path) -> str:
    from torchvision.datasets import ImageFolder

    return _tried(lambda: _pixel(ImageFolder(str(root / "train"))[0][0]), root)


def _hugging_face_pixel(root: Path) -> str:
    import datasets

    def read() -> str:
        with tempfile.TemporaryDirectory() as cache:
            part: Any = datasets.load_dataset(
                "imagefolder", data_dir=str(root), cache_dir=cache, split="train"
            )
            return _pixel(part[0]["image"])

    return _tried(read, root)


def _pixel(image: object) -> str:
    """The first pixel, and the mode where an image is handed out as it is."""
    if isinstance(image, Image.Image) and image.mode != "RGB":
        return f"{image.getpixel((0, 0))}, as {image.mode}"
    return str(tuple(np.asarray(image)[0, 0].tolist()))


def _cell(classes: tuple[str, ...], counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in counts.items())
    names = " ".join(ascii(name)[1:-1] if not name.isprintable() else name for name in classes)
    names = unicodedata.normalize("NFC", names)
    return f"{len(classes)} ({names}); {shown}"


def _refusal(message: str, root: Path) -> str:
    return "refused: " + _short(message, root, 160)


def _tried(read: Callable[[], str], root: Path) -> str:
    try:
        return read()
    except Exception as error:  # of three libraries
        return f"{type(error).__name__}: {_short(str(error), root, 60)}"


def _short(message: str, root: Path, most: int) -> str:
    words = " ".join(message.split()).replace(str(root), "DATA").replace("|", "/")
    return words if len(words) <= most else words[:most] + "..."


def layout_rows(work: Path, *, others: bool = True) -> list[list[str]]:
    """One row a layout: its name, and a cell a reader; ours is the last."""
    rows = []
    for number, (name, make) in enumerate(LAYOUTS.items()):
        root = work / f"layout-{number}" / "data"
        root.mkdir(parents=True)
        make(root)
        readers = (_timm, _torchvision, _hugging_face) if others else ()
        rows.append([name, *(read(root) for read in readers), ours(root, work / "cache")])
    return rows


def image_rows(work: Path, *, others: bool = True) -> list[list[str]]:
    """One row a kind of file, likewise."""
    rows = []
    for number, (name, make) in enumerate(IMAGES.items()):
        root = work / f"image-{number}" / "data"
        for part in ("train", "test"):
            picture(root / part / "plain" / "0.png", BLUE)
            (root / part / "odd").mkdir()
            make(root / part / "odd")
        readers = (_timm_pixel, _torchvision_pixel, _hugging_face_pixel) if others else ()
        rows.append([name, *(read(root) for read in readers), our_pixel(root, work / "cache")])
    return rows


def table(first: str, rows: list[list[str]]) -> str:
    """The rows in Markdown."""
    head = [first, "timm", "torchvision", "Hugging Face", "dsdistill and kd"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print both tables."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as work:
        with contextlib.redirect_stderr(io.StringIO()):
            tables = layout_rows(Path(work)), image_rows(Path(work))
        print(table("layout", tables[0]) + "\n\n" + table("file", tables[1]))


if __name__ == "__main__":
    main()
