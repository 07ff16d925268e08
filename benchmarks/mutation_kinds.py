"""The files that `mutations.py` changes: how an original is made, and what reads it."""

import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mutation_edits
import numpy as np

SECONDS = 20.0  # of one file
RESUMED_SECONDS = 8.0  # of a run that is resumed whole
CONFIG, FIGURES, STATE = "config.json", "metrics.jsonl", "checkpoint.safetensors"
RUN = (CONFIG, FIGURES, STATE)
STUDENT = ("student.safetensors", "model.json", "preprocess.safetensors")
SET = ("distilled.safetensors",)

Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Attributes:
        share: Of the campaign's files.
        make: Writes the originals into a folder, which every trial copies.
        reader: Called once in a worker; gives what reads such a folder.
        files: Patterns of the files that are changed, in that folder.
        legal: Those of them that hold nothing but options, figures or data of other projects.
        change: Changes a file of a name; `mutation_edits.changed` for most.
        seconds: Of one file.
    """

    share: float
    make: Callable[[Path], None]
    reader: Callable[[], Read]
    files: tuple[str, ...]
    legal: tuple[str, ...] = ()
    change: mutation_edits.Change = mutation_edits.changed
    seconds: float = SECONDS


def _data(folder: Path) -> Path:
    """A small data set that lies beside all originals."""
    path = folder.parent / "data.npz"
    if not path.exists():
        rng = np.random.default_rng(0)
        labels = np.arange(90) % 3
        images = rng.integers(0, 100, (90, 8, 8, 1), dtype=np.uint8)
        images[np.arange(90), labels] = 255
        np.savez(path, images=images, labels=labels)
    return path.resolve()


def _make_set(folder: Path) -> None:
    from dsdistill.harness.data import distilled_set, preprocess

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)
    fitted = preprocess.fit("zca", lambda size: iter([pixels]), (4, 4, 1))
    labels = rng.normal(size=(6, 3)).astype(np.float32)
    provenance = {
        "method": "kip",
        "config": {"command": "kip", "data": "digits", "image_size": None, "seed": 3},
        "kernel": "fc",
        "data": {"name": "digits", "source": "digits", "sha256": "0" * 64, "train": 40},
        "metrics": {"test_accuracy": 0.75, "initial_test_accuracy": 0.5},
        "seconds": 1.5,
        "peak_memory": 12345,
        "stopped": None,
        "versions": {"numpy": "2.0"},
    }
    names = ("cat", "dog", "under_$5_$10")
    made = distilled_set.DistilledSet(fitted.apply(pixels[:6]), labels, fitted, names, provenance)
    distilled_set.save(folder / distilled_set.FILE_NAME, made)


def _set_reader() -> Read:
    from dsdistill.commands import inspect
    from dsdistill.harness.data import distilled_set

    def read(folder: Path) -> Any:
        made = distilled_set.load(folder / distilled_set.FILE_NAME)
        for as_json in (False, True):
            inspect.print_set(folder, as_json=as_json)
        return made

    return read


def _make_whole_set(folder: Path) -> None:
    from dsdistill.commands import distil
    from dsdistill.options import KipOptions

    distil.run_kip(KipOptions(str(_data(folder)), out=folder / "run", images_per_class=2, steps=2))
    shutil.move(folder / "run" / SET[0], folder / SET[0])
    shutil.rmtree(folder / "run")


def _use_reader() -> Read:
    """Up to the first training: what a set says of itself decides which data are loaded."""
    from dsdistill.commands import evaluation_parts, export
    from dsdistill.harness.errors import UserError
    from dsdistill.options import EvaluateOptions
    from kd.data import data_source

    def read(folder: Path) -> Any:
        path = folder / SET[0]
        uses = [
            lambda: evaluation_parts.assemble(
                EvaluateOptions(path, learners="ridge,mlp:8")
            ).train.images(),
            lambda: data_source.resolve(str(path), root=folder).shape,
            *(
                lambda kind=kind, end=end: export.write(path, kind, folder / f"{kind}{end}")
                for kind, end in export.SUFFIX.items()
            ),
        ]
        refusals, found = [], []
        for use in uses:
            try:
                found.append(use())
            except (UserError, OSError) as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]
        return found[0]

    return read


def _make_kip(folder: Path) -> None:
    from dsdistill.commands import distil
    from dsdistill.options import KipOptions

    distil.run_kip(KipOptions(str(_data(folder)), out=folder, images_per_class=2, steps=6))
    (folder / "distilled.safetensors").unlink()  # so that there is something to resume


def _make_label_solve(folder: Path) -> None:
    from dsdistill.commands import distil
    from dsdistill.options import LabelSolveOptions

    distil.run_label_solve(LabelSolveOptions(str(_data(folder)), out=folder, images_per_class=2))
    (folder / "distilled.safetensors").unlink()


def _make_training(folder: Path) -> None:
    from kd.commands import train
    from kd.options import Overrides, TrainOptions

    few: Any = Overrides(epochs=2, batch_size=16)
    train.run(
        train.resolve(
            TrainOptions(
                str(_data(folder)), student="mlp:8", out=folder, preprocess="zca", overrides=few
            )
        )
    )


def _make_stopped_training(folder: Path) -> None:
    _make_training(folder)
    (folder / "report.json").unlink()


def _state_reader() -> Read:
    from dsdistill.harness.runs import run_folder

    def read(folder: Path) -> Any:
        return run_folder.Run(folder, files.read_json(folder / "config.json"), True).load_state()

    return read


def _kip_reader() -> Read:
    from dsdistill.commands import distil
    from dsdistill.harness.data import distilled_set
    from dsdistill.options import KipOptions

    def read(folder: Path) -> Any:
        distil.run_kip(KipOptions(out=folder, resume=True))
        made = distilled_set.load(distilled_set.locate(folder))
        return made.images, made.labels

    return read


def _label_solve_reader() -> Read:
    from dsdistill.commands import distil
    from dsdistill.harness.data import distilled_set
    from dsdistill.options import LabelSolveOptions

    def read(folder: Path) -> Any:
        distil.run_label_solve(LabelSolveOptions(out=folder, resume=True))
        made = distilled_set.load(distilled_set.locate(folder))
        return made.images, made.labels

    return read


def _training_reader() -> Read:
    from kd.commands import train
    from kd.models import saved_models
    from kd.options import TrainOptions

    def read(folder: Path) -> Any:
        report = train.run(train.resolve(TrainOptions(out=folder, resume=True)))
        state = saved_models.load_run(folder).classifier.network.state_dict()
        return {k: v.numpy() for k, v in state.items()}, report["test_accuracy"]

    return read


def _student_reader() -> Read:
    from kd.models import saved_models

    def read(folder: Path) -> Any:
        model = saved_models.load_run(folder)
        state = model.classifier.network.state_dict()
        return {k: v.numpy() for k, v in state.items()}, saved_models.card(model), model.preprocess

    return read


def _kd_report_reader() -> Read:
    from kd.commands import report

    return lambda folder: re.sub(re.escape(str(folder)), "", report.render([folder]))


def _kd_evaluate_reader() -> Read:
    from kd.commands.evaluate import evaluate
    from kd.options import EvaluateOptions

    def read(folder: Path) -> Any:
        found = evaluate(EvaluateOptions(folder))
        return {k: v for k, v in found.items() if not k.startswith("latency") and k != "run"}

    return read


def _make_evaluation(folder: Path) -> None:
    from dsdistill.harness.evaluation.results import Result
    from dsdistill.harness.reports import report
    from dsdistill.harness.reports.write import write_report

    rng = np.random.default_rng(0)
    found = []
    for arm in ("distilled", "random", "full"):
        for seed in range(3):
            counts = rng.multinomial(20, (0.6, 0.2, 0.2), 3)
            counts = [np.roll(row, i).tolist() for i, row in enumerate(counts)]
            right = [counts[i][i] / 20 for i in range(3)]
            facts = {"parameters": 12, "curve": [[0, 2.0], [10, 1.0], [20, 0.5]]}
            figures = {"validation_accuracy": 0.6, "nll": 0.8, "calibration_error": 0.1}
            one = Result(arm, "convnet", False, seed, 30, 900, 0.01, float(np.mean(right)))
            found.append(replace(one, confusion=counts, per_class=right, facts=facts, **figures))
    made = report.Report(
        title="kip on digits, 30 images",
        notes=["a note"],
        commands=["dsdistill evaluate runs/kip-1"],
        classes=["a", "b", "c"],
        data={"name": "digits", "sha256": "0", "train": 90, "validation": 9, "test": 60},
        images_per_class=10,
        results=tuple(found),
        distilled={"method": "kip", "kernel": "fc", "seconds": 1.0, "images": 30, "bytes": 900},
        seconds=2.0,
        peak_memory=1000,
        machine="here",
        versions={"numpy": "2"},
    )
    write_report(folder, made)
    shutil.rmtree(folder / "plots")


def _evaluation_reader() -> Read:
    from dsdistill.harness.reports import markdown, page, report

    def read(folder: Path) -> Any:
        found = report.load(folder)
        markdown.render(found)
        if zlib.crc32((folder / "report.json").read_bytes()) % 5 == 0:  # takes half a second
            page.render([found], title=found.title)
        return asdict(found)

    return read


def _make_pictures(folder: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    forms = {"png": {}, "jpg": {}, "gif": {}, "tif": {"compression": "tiff_lzw"}, "webp": {}}
    for label in ("cat", "dog"):
        (folder / "data" / label).mkdir(parents=True)
        for suffix, options in forms.items():
            smooth = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
            image = Image.fromarray(smooth).resize((20, 16))
            image.save(folder / "data" / label / f"{suffix}.{suffix}", **options)


def _pictures_reader() -> Read:
    return lambda folder: _folder_splits(folder / "data", folder)


def _folder_splits(data: Path, cache: Path) -> Any:
    """A folder of pictures as a data set, decoded into a cache somewhere in another folder."""
    from dsdistill.harness.data import datasets

    os.environ["DSDISTILL_CACHE"] = str(cache / "cache")
    return _splits(datasets.load(str(data), root=cache, image_size=8))


def _splits(splits: Any) -> Any:
    parts = (splits.train, splits.validation, splits.test)
    return [(np.asarray(part.images()), part.labels, part.classes) for part in parts]


def _make_decoded(folder: Path) -> None:
    _make_pictures(folder)
    # The name of a cache holds the place and the times of the files: they lie beside it.
    shutil.move(folder / "data", folder.parent / "decoded-data")
    _folder_splits(folder.parent / "decoded-data", folder)


def _decoded_reader() -> Read:
    return lambda folder: _folder_splits(folder.parent / "originals" / "decoded-data", folder)


KEY = {"arm": ["full"], "learner": "convnet", "seed": 0}


def _make_kept(folder: Path) -> None:
    _kept(folder).put(KEY, _result())


def _kept(folder: Path) -> Any:
    from dsdistill.harness.evaluation.result_cache import ResultCache

    return ResultCache(folder / "results", say=lambda line: None)


def _result() -> Any:
    from dsdistill.harness.evaluation.results import Result

    facts = {"parameters": 12, "curve": [[0, 2.0], [10, 1.0]]}
    one = Result("full", "convnet", False, 0, 30, 900, 0.01, 0.75, 0.7, 0.5, 0.1)
    return replace(one, per_class=[0.5, 1.0], confusion=[[5, 5], [0, 10]], facts=facts)


def _kept_reader() -> Read:
    # A result that is not known is measured again, to the same.
    return lambda folder: asdict(_kept(folder).get(KEY) or _result())


def _answers() -> Any:
    import torch

    return torch.randn(50, 7, generator=torch.Generator().manual_seed(0))


def _teacher_cache(folder: Path) -> Any:
    from kd.data import teacher_cache

    return teacher_cache.open_cache(folder / "cache", {"teacher": "x", "views": 1}, top=None)


def _make_teacher_cache(folder: Path) -> None:
    opened = _teacher_cache(folder)
    opened.save("static", _answers())
    opened.save("epoch-00001", _answers() + 1)


def _teacher_cache_reader() -> Read:
    def read(folder: Path) -> Any:
        opened = _teacher_cache(folder)
        found = []
        for name, more in (("static", 0), ("epoch-00001", 1)):
            rows = opened.load(name, 50, 7)
            if rows is None:
                opened.save(name, _answers() + more)
                rows = opened.load(name, 50, 7)
            found.append(rows.numpy())
        return found

    return read


def _make_npz(folder: Path) -> None:
    shutil.copy(_data(folder), folder / "data.npz")
    with np.load(folder / "data.npz") as stored:
        names = np.array(["cat", "dog", "under_$5_$10"])
        np.savez(folder / "named.npz", **stored, classes=names)


def _npz_reader() -> Read:
    from dsdistill.harness.data import datasets

    def read(folder: Path) -> Any:
        found = [datasets.load(str(path), root=folder) for path in sorted(folder.glob("*.npz"))]
        return list(map(_splits, found))

    return read


def _make_foreign(folder: Path) -> None:
    import torch

    rng = np.random.default_rng(0)
    images = rng.normal(size=(6, 1, 8, 8)).astype(np.float32)
    labels = np.arange(6) % 3
    torch.save({"images": torch.tensor(images), "labels": torch.tensor(labels)}, folder / "a.pt")
    np.savez(folder / "b.npz", images=images, labels=labels)
    (folder / "real").mkdir()
    shutil.copy(_data(folder), folder / "real" / "data.npz")


def _foreign_reader() -> Read:
    from dsdistill.harness.data import npz, preprocess
    from dsdistill.published_sets import reader as foreign
    from dsdistill.published_sets.stated_format import StatedFormat

    stated = StatedFormat(pixels="standardised", mean=(0.5,), std=(0.25,))

    def read(folder: Path) -> Any:
        data = npz.read(folder / "real" / "data.npz")
        fitted = preprocess.fit("standardise", data.chunks, data.shape)
        found = []
        for path in (folder / "a.pt", folder / "b.npz"):
            made = foreign.load(path, data, stated, preprocess=fitted)
            found.append((made.images, made.labels))
        return found

    return read


def _make_program(folder: Path) -> None:
    from kd.commands.export import export
    from kd.options import ExportOptions

    _make_training(folder / "run")
    export(ExportOptions(folder / "run", format="pt2", out=folder / "program.pt2"))
    shutil.rmtree(folder / "run")


def _program_reader() -> Read:
    import torch

    from kd.models.zoo import exported

    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def read(folder: Path) -> Any:
        found = exported.load(folder / "program.pt2", (8, 8, 1))
        with torch.no_grad():
            return found.network(images).numpy(), found.shape, found.classes, found.card

    return read


KINDS = {
    "distilled set": Kind(16, _make_set, _set_reader, SET),
    "set signed anew": Kind(10, _make_set, _set_reader, SET, SET, mutation_edits.sign_anew),
    "set used": Kind(3, _make_whole_set, _use_reader, SET, SET, mutation_edits.sign_anew),
    "kip checkpoint": Kind(8, _make_kip, _state_reader, (STATE,)),
    "ls checkpoint": Kind(8, _make_label_solve, _state_reader, (STATE,)),
    "kd checkpoint": Kind(8, _make_stopped_training, _state_reader, (STATE,)),
    "student": Kind(12, _make_training, _student_reader, STUDENT),
    "decoded images": Kind(8, _make_decoded, _decoded_reader, ("**/*.npy", "**/index.json")),
    "evaluation results": Kind(6, _make_kept, _kept_reader, ("results/*.json",)),
    "teacher cache": Kind(
        8, _make_teacher_cache, _teacher_cache_reader, ("cache/*/*.json", "cache/*/*/*.safetensors")
    ),
    "evaluation report": Kind(
        6, _make_evaluation, _evaluation_reader, ("report.json",), ("report.json",)
    ),
    "kd report": Kind(
        3,
        _make_training,
        _kd_report_reader,
        (CONFIG, FIGURES, "report.json"),
        (CONFIG, FIGURES, "report.json"),
    ),
    "kd evaluate": Kind(
        2,
        _make_training,
        _kd_evaluate_reader,
        (CONFIG, "recipe.json", *STUDENT),
        (CONFIG, "recipe.json"),
    ),
    ".npz data set": Kind(8, _make_npz, _npz_reader, ("*.npz",), (".npz",)),
    "foreign set": Kind(8, _make_foreign, _foreign_reader, ("*.pt", "*.npz"), (".pt", ".npz")),
    "pictures": Kind(
        10,
        _make_pictures,
        _pictures_reader,
        ("data/*/*",),
        (".png", ".jpg", ".gif", ".tif", ".webp"),
    ),
    ".pt2 program": Kind(2, _make_program, _program_reader, ("*.pt2",), (".pt2",)),
    "kip resumed": Kind(
        0.7, _make_kip, _kip_reader, RUN, (CONFIG, FIGURES), seconds=RESUMED_SECONDS
    ),
    "ls resumed": Kind(
        0.7, _make_label_solve, _label_solve_reader, RUN, (CONFIG, FIGURES), seconds=RESUMED_SECONDS
    ),
    "kd resumed": Kind(
        1,
        _make_stopped_training,
        _training_reader,
        (*RUN, "recipe.json"),
        (CONFIG, FIGURES, "recipe.json"),
        seconds=RESUMED_SECONDS,
    ),
}
