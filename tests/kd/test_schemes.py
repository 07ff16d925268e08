"""Whole trainings through the command: chains, caches, several teachers, folders of files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from kd_support import main, read_report
from PIL import Image

from dsdistill.harness import memory
from kd.evaluation import teacher_check
from kd.models import saved_models, teachers
from kd.training import dry_run

FAST = ("--student", "mlp:16", "--epochs", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two teachers of digits and a folder of coloured JPEGs."""
    folder = tmp_path_factory.mktemp("schemes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in (0, 1):
            options = ("--epochs", 4, "--seed", seed, "--out", f"teacher-{seed}")
            main(patch, "train", "digits", *FAST, *options)
    rng = np.random.default_rng(0)
    for label, colour in enumerate(["red", "green", "blue"]):
        (folder / "photos" / colour).mkdir(parents=True)
        for i in range(30):
            size = tuple(rng.integers(24, 48, 2))
            pixels = rng.integers(0, 120, (*size, 3), dtype=np.uint8)
            pixels[..., label] += 120
            Image.fromarray(pixels).save(folder / "photos" / colour / f"{i}.jpg")
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    return monkeypatch


def _weights(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "student.safetensors")


def _same(a: Path, b: Path) -> bool:
    first, second = _weights(a), _weights(b)
    return all(np.array_equal(first[name], second[name]) for name in first)


class _Asked:
    """Counts the images that a teacher is asked about while students are trained."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.images = 0
        answer = teachers.Teacher.forward

        def counted(teacher, images):
            self.images += len(images)
            return answer(teacher, images)

        patch.setattr(teachers.Teacher, "forward", counted)


@pytest.mark.parametrize(
    "changes", [(), ("--augment", "crop-flip", "--mixup", "0.4"), ("--augment", "crop-flip")]
)
def test_answers_from_the_cache_give_the_same_student_without_the_teacher(
    inside, work: Path, changes: tuple[str, ...]
) -> None:
    name = "-".join(["cached", *changes]).replace("--", "")
    common = ("train", "digits", *FAST, "--teacher", "teacher-0", *changes)
    main(inside, *common, "--out", f"{name}-0")
    asked = _Asked(inside)
    main(inside, *common, "--cache", f"{name}-answers", "--out", f"{name}-1")
    first, asked.images = asked.images, 0
    main(inside, *common, "--cache", f"{name}-answers", "--out", f"{name}-2")
    assert _same(work / f"{name}-0", work / f"{name}-1")
    assert _same(work / f"{name}-0", work / f"{name}-2")
    trained = 1295 * (2 if changes else 1)
    assert first - asked.images == trained
    report = read_report(work / f"{name}-2")
    # The preflight with training images beside the few held out, the test images, a trial of the
    # shape and one step on made-up images.
    assert asked.images <= teacher_check.FOR_ORDER + 359 + 1 + dry_run.MAX_IMAGES
    assert report["teacher_accuracy"] > 0.5


def test_the_cache_belongs_to_teacher_seed_and_augmentation(inside, work: Path) -> None:
    common = ("train", "digits", *FAST, "--augment", "crop-flip", "--cache", "answers")
    for i, other in enumerate(
        [
            ("--teacher", "teacher-0"),
            ("--teacher", "teacher-1"),
            ("--teacher", "teacher-0", "--seed", 1),
            ("--teacher", "teacher-0", "--crop-padding", 1),
        ]
    ):
        main(inside, *common, *other, "--out", f"keyed-{i}")
    assert len(list((work / "answers").iterdir())) == 4


def test_the_cache_of_crops_of_files_belongs_to_the_seed(inside, work: Path) -> None:
    common = ("train", "photos", "--student", "mlp:4", "--image-size", 16, "--device", "cpu")
    common = (*common, "--workers", 0, "--augment", "imagenet", "--steps", 1)
    main(inside, *common, "--out", "photos-teacher")
    for seed in (0, 1):
        cached = ("--teacher", "photos-teacher", "--cache", "crops", "--seed", seed)
        main(inside, *common, *cached, "--out", f"photos-{seed}")
    assert len(list((work / "crops").iterdir())) == 2


def test_a_damaged_entry_is_computed_anew(inside, work: Path, capsys) -> None:
    common = ("train", "digits", *FAST, "--teacher", "teacher-0", "--cache", "damaged")
    main(inside, *common, "--out", "whole")
    for path in (work / "damaged").rglob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    capsys.readouterr()
    main(inside, *common, "--out", "mended")
    assert "does not match its checksum" in capsys.readouterr().err
    assert _same(work / "whole", work / "mended")


@pytest.mark.parametrize("changes", [(), ("--augment", "crop-flip")])
def test_vectors_of_layers_are_cached(inside, work: Path, changes: tuple[str, ...]) -> None:
    """Without augmentation a table was computed in other batches, so that sums are rounded anew."""
    name = "-".join(["vectors", *changes]).replace("--", "")
    loss = ("--loss", "ce:1,sp:3,srd@embedding=embedding,crd", "--teacher", "teacher-0")
    common = ("train", "digits", *FAST, *loss, *changes)
    main(inside, *common, "--out", f"{name}-0")
    asked = _Asked(inside)
    for i in (1, 2):
        main(inside, *common, "--cache", f"{name}-answers", "--out", f"{name}-{i}")
    assert asked.images - 1295 * (2 if changes else 1) < 2 * (teacher_check.FOR_ORDER + 359 + 20)
    assert _same(work / f"{name}-1", work / f"{name}-2")
    plain, cached = (_weights(work / f"{name}-{i}") for i in (0, 1))
    for key, value in plain.items():
        np.testing.assert_allclose(cached[key], value, rtol=0, atol=0 if changes else 1e-3)


def test_the_largest_probabilities_teach_the_same_when_they_are_read(inside, work: Path) -> None:
    for i, changes in enumerate([(), ("--augment", "crop-flip")]):
        common = ("train", "digits", *FAST, "--teacher", "teacher-0", "--cache-top", 3, *changes)
        for j in (0, 1):
            main(inside, *common, "--cache", "largest", "--out", f"largest-{i}{j}")
        assert _same(work / f"largest-{i}0", work / f"largest-{i}1")


def test_maps_of_layers_are_not_cached(inside) -> None:
    options = ("--student", "convnet:8", "--teacher", "maps", "--loss", "ce:1,at@0")
    main(inside, "train", "digits", *options[:2], "--steps", 2, "--out", "maps")
    # 8 channels of 8x8 values for each image.
    size = memory.format_bytes(4 * 1295 * 8 * 64)
    with pytest.raises(SystemExit, match=f"--loss at takes whole layers, {size} for 1,295 images"):
        main(inside, "train", "digits", *options, "--cache", "features", "--out", "none")


def test_born_again_networks_are_a_chain_that_can_be_continued(inside, work: Path) -> None:
    common = ("train", "digits", *FAST, "--generations", 3, "--out", "again")
    main(inside, *common)
    reports = [read_report(work / name) for name in ("again-1", "again-2", "again")]
    taught_by = [report["teacher"] for report in reports]
    assert taught_by == [None, str(Path("again-1")), str(Path("again-2"))]
    assert len({report["seed"] for report in reports}) == 3
    before = (work / "again-2" / "student.safetensors").stat().st_mtime_ns
    first = _weights(work / "again")
    shutil.rmtree(work / "again")
    main(inside, *common, "--resume")  # as if it had been stopped before the last training
    assert (work / "again-2" / "student.safetensors").stat().st_mtime_ns == before
    second = _weights(work / "again")
    assert all(np.array_equal(first[name], second[name]) for name in first)
    shutil.rmtree(work / "again")
    with pytest.raises(SystemExit, match="again-1 holds a training with --lr None"):
        main(inside, *common, "--lr", 0.01)


def test_an_assistant_stands_between_teacher_and_student(inside, work: Path) -> None:
    options = ("--teacher", "teacher-0", "--assistants", "mlp:24", "--out", "helped")
    main(inside, "train", "digits", *FAST, *options)
    assert read_report(work / "helped-1")["student"] == "mlp:24"
    assert read_report(work / "helped-1")["teacher"].endswith("teacher-0")
    assert read_report(work / "helped")["teacher"] == "helped-1"


def test_a_file_of_weights_is_told_its_normalisation_and_a_chain_forgets_it(
    inside, work: Path
) -> None:
    """Told what it was trained with, it is the teacher that it was; told otherwise, it is not."""
    fitted = saved_models.load_run(work / "teacher-0").preprocess
    mean, std = float(fitted.mean[0]), float(fitted.std[0])
    common = ("--teacher", f"mlp:16@{work / 'teacher-0' / 'student.safetensors'}")
    accuracies = []
    for name, shift in (("told", 0.0), ("mistold", 1.0)):
        told = ("--teacher-mean", mean + shift, "--teacher-std", std, "--teacher-image-size", 8)
        chain = ("--assistants", "mlp:24", "--out", name)
        main(inside, "train", "digits", *FAST, *common, *told, *chain)
        assert read_report(work / name)["teacher"] == f"{name}-1"
        accuracies.append(read_report(work / f"{name}-1")["teacher_accuracy"])
    known = read_report(work / "teacher-0")["test_accuracy"]
    assert accuracies[0] == pytest.approx(known)
    assert accuracies[1] < known - 0.1
    options = ("--teacher", "teacher-0", "--teacher-mean", 0)
    with pytest.raises(SystemExit, match="is an earlier run and brings its preprocessing"):
        main(inside, "train", "digits", *FAST, *options, "--out", "none")


def test_each_of_several_teachers_is_told_its_own_normalisation(inside, work: Path) -> None:
    files = [f"mlp:16@{work / name / 'student.safetensors'}" for name in ("teacher-0", "teacher-1")]
    fitted = saved_models.load_run(work / "teacher-0").preprocess
    mean, std = float(fitted.mean[0]), float(fitted.std[0])
    known = [read_report(work / name)["test_accuracy"] for name in ("teacher-0", "teacher-1")]

    def accuracies(out: str, names: str, *options: object) -> list[float]:
        main(inside, "train", "digits", *FAST, "--teacher", names, *options, "--out", out)
        return [each["accuracy"] for each in read_report(work / out)["teachers"].values()]

    both = ("--teacher-mean", mean, "--teacher-std", std, "--teacher-image-size", 8)
    assert accuracies("for-all", ",".join(files), *both) == pytest.approx(known)
    each = ("--teacher-mean", f"{mean}", ",", f"{mean + 1}", "--teacher-std", f"{std},{std}")
    first, second = accuracies("for-each", ",".join(files), *each, "--teacher-image-size", "8,8")
    assert first == pytest.approx(known[0])
    assert second < known[1] - 0.1
    # An earlier run needs none, and refuses any.
    own = ("--teacher-mean", f",{mean}", "--teacher-std", f",{std}", "--teacher-image-size", ",8")
    assert accuracies("for-one", f"teacher-1,{files[0]}", *own) == pytest.approx(known[::-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--teacher-mean", "0,0,0"), "--teacher-mean is given for 3 teachers, and there are 2"),
        (("--teacher-std", "0.1,x"), "--teacher-std must be numbers, with commas between teachers"),
        (("--teacher-image-size", "8,0"), "must be one number of at least 1 for a teacher"),
        (("--teacher-image-size", "8.5"), "--teacher-image-size must be a whole number, got 8.5"),
        (("--teacher-mean", ",0"), "teacher-1 is an earlier run and brings its preprocessing"),
    ],
)
def test_numbers_of_several_teachers_that_do_not_fit_are_one_line(
    inside, work: Path, options: tuple, message: str
) -> None:
    with pytest.raises(SystemExit, match=message) as error:
        main(inside, "train", "digits", *FAST, "--teacher", "teacher-0,teacher-1", *options,
              "--out", "unfit")  # fmt: skip
    assert "\n" not in str(error.value)
    assert not list(work.glob("unfit*"))


@pytest.mark.parametrize("weights", ["alike", "by-label"])
def test_two_teachers(inside, work: Path, weights: str) -> None:
    options = ("--teacher", "teacher-0,teacher-1", "--teacher-weights", weights)
    main(inside, "train", "digits", *FAST, *options, "--out", f"two-{weights}")
    assert read_report(work / f"two-{weights}")["teacher"] == "teacher-0,teacher-1"


def test_a_mean_teacher_and_peers(inside, work: Path) -> None:
    main(inside, "train", "digits", *FAST, "--mean-teacher", 0.9, "--out", "mean")
    main(inside, "train", "digits", *FAST, "--peers", "mlp:8,mlp:8", "--out", "peers")
    lines = (work / "peers" / "metrics.jsonl").read_text().splitlines()
    assert {"ce", "kd", "ce_2", "kd_3"} <= json.loads(lines[0]).keys()
    assert (work / "peers" / "curves.png").stat().st_size > 1000


def test_a_folder_of_photographs_is_streamed(inside, work: Path) -> None:
    """Random crops, RandAugment, erasing, repeats, mixing and the cache of a timm teacher's run."""
    common = ("train", "photos", "--augment", "imagenet", "--image-size", 16, "--device", "cpu")
    common += ("--batch-size", 16, "--workers", 0, "--student", "convnet:8")
    main(inside, *common, "--epochs", 3, "--lr", 0.02, "--out", "colours")
    report = read_report(work / "colours")
    assert report["train_images"] == 66
    assert report["test_accuracy"] > 0.6
    recipe = json.loads((work / "colours" / "recipe.json").read_text())
    assert recipe["augment"] == "imagenet"
    more = ("--auto-augment", "rand-m7-mstd0.5", "--random-erase", 0.3, "--mixup", 0.2)
    more += ("--repeats", 2, "--teacher", "colours", "--cache", "seen", "--epochs", 1)
    main(inside, *common, *more, "--out", "first")
    main(inside, *common, *more, "--out", "second")
    assert _same(work / "first", work / "second")
    main(inside, "evaluate", "first", "--json", "--device", "cpu")


def test_an_unreadable_photograph_is_named(inside, work: Path) -> None:
    broken = work / "broken"
    for colour in ("red", "blue"):
        (broken / colour).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (20, 20), colour).save(broken / colour / f"{i}.png")
    for path in (broken / "red").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    options = ("--augment", "imagenet", "--image-size", 16, "--workers", 0, "--epochs", 1)
    with pytest.raises(SystemExit, match=r"image .*red/\d.png cannot be read"):
        main(inside, "train", "broken", *options, "--student", "mlp:8", "--out", "unread")
