"""Images with any number of labels: losses, figures, and the commands from training to export."""

import json
from pathlib import Path

import kd_support as support
import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score

from dsdistill.harness.data import preprocess
from dsdistill.harness.errors import UserError
from kd.commands import export
from kd.data import class_weights
from kd.evaluation import multi_label_scoring
from kd.exports import export_formats
from kd.losses import ensemble, multi_label
from kd.models import saved_models, teachers
from kd.models.zoo import exported
from kd.objectives import loss_checks, terms

NAMES = ("left", "right", "stripe", "rare")
QUICK = ("--epochs", 20, "--lr", 0.3, "--device", "cpu")


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)


def _labels(n: int, rng: np.random.Generator) -> np.ndarray:
    """Labels that occur by themselves and together; some images have none."""
    return (rng.random((n, 4)) < [0.4, 0.4, 0.5, 0.1]).astype(np.int64)


def _images(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images whose halves are bright, which have a stripe, or a rare dark corner."""
    images = 100 + 25 * rng.standard_normal((len(labels), 8, 8))
    images[:, :, :4] += 50 * labels[:, 0, None, None]
    images[:, :, 4:] += 50 * labels[:, 1, None, None]
    images[:, 4] -= 50 * labels[:, 2, None]
    images[:, :3, 3:5] -= 60 * labels[:, 3, None, None]
    return images.clip(0, 255).astype(np.uint8)


def _write(folder: Path, n: int, seed: int, names: tuple[str, ...] = NAMES) -> Path:
    rng = np.random.default_rng(seed)
    labels = _labels(n, rng)
    folder.mkdir(parents=True)
    rows = []
    for i, (image, own) in enumerate(zip(_images(labels, rng), labels, strict=True)):
        Image.fromarray(image).save(folder / f"{i}.png")
        known = [name for name, has in zip(names, own, strict=True) if has]
        rows.append(json.dumps({"file_name": f"{i}.png", "labels": known}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a teacher of them, and a run of one class an image."""
    folder = tmp_path_factory.mktemp("multi-label")
    for number, (part, n) in enumerate((("train", 240), ("val", 60), ("test", 80))):
        _write(folder / "data" / part, n, number)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("kd.runs.curves.draw", lambda folder: None)
        support.main(patch, "train", "data", "--student", "mlp:32", *QUICK, "--out", "teacher")
        one = ("--student", "mlp:4", "--steps", 2, "--device", "cpu", "--out", "one")
        support.main(patch, "train", "digits", *one)
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    return monkeypatch


def _random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_cross_entropy_is_the_mean_over_classes_and_images_by_hand() -> None:
    logits, labels = _random((5, 3), 0), torch.randint(0, 2, (5, 3)).float()
    z, y = logits.double().numpy(), labels.numpy()
    each = y * np.log(expit(z)) + (1 - y) * np.log(expit(-z))
    got = multi_label.binary_cross_entropy(logits, labels)
    assert got.item() == pytest.approx(-each.mean(), rel=1e-6)
    weights = torch.tensor([1.0, 2.0, 5.0])
    weighted = y * [1, 2, 5] * np.log(expit(z)) + (1 - y) * np.log(expit(-z))
    got = multi_label.binary_cross_entropy(logits, labels, weights)
    assert got.item() == pytest.approx(-weighted.mean(), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_is_that_of_each_class_by_hand(temperature: float) -> None:
    student, teacher = _random((4, 6), 1), 3 * _random((4, 6), 2)
    p, q = (expit(x.double().numpy() / temperature) for x in (teacher, student))
    each = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    got = multi_label.binary_kl(student, teacher, temperature=temperature)
    assert got.item() == pytest.approx(temperature**2 * each.mean(), rel=1e-5)
    assert multi_label.binary_kl(teacher, teacher, temperature=temperature).item() == 0


def test_a_sure_teacher_gives_a_finite_divergence_and_no_gradient_to_itself() -> None:
    teacher = torch.tensor([[200.0, -200.0]], requires_grad=True)
    student = torch.tensor([[-1.0, 1.0]], requires_grad=True)
    multi_label.binary_kl(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    # q - p over the two classes: σ(-1) - 1 and σ(1) - 0.
    expected = [[(expit(-1) - 1) / 2, expit(1) / 2]]
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-5)


def test_several_teachers_are_the_mean_of_their_probabilities() -> None:
    logits = [3 * _random((4, 5), seed) for seed in range(3)]
    mean = ensemble.combined_binary_logits(logits, temperature=2.0)
    expected = np.mean([expit(each.double().numpy() / 2) for each in logits], axis=0)
    np.testing.assert_allclose(expit(mean.double().numpy() / 2), expected, atol=1e-6)


def test_figures_are_scikit_learns_and_leave_out_what_no_image_has() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 4)) < [0.5, 0.2, 0.3, 0.0]).astype(np.float32)
    scores = (rng.standard_normal((60, 4)) + labels).astype(np.float32)
    got = multi_label_scoring.figures(scores, labels)
    known, answers = labels[:, :3], scores[:, :3] > 0
    each = [average_precision_score(known[:, k], scores[:, k]) for k in range(3)]
    assert got["mean_average_precision"] == pytest.approx(np.mean(each), abs=1e-12)
    for kind in ("micro", "macro"):
        expected = f1_score(known, answers, average=kind)
        assert got[f"{kind}_f1"] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(multi_label_scoring.average_precisions(scores, labels)).tolist() == [
        *[False] * 3,
        True,
    ]


def test_balanced_weights_are_those_of_positives(tmp_path: Path) -> None:
    labels = np.array([[1, 0], [1, 0], [1, 1], [0, 0]])
    made = class_weights.make("balanced", ("a", "b"), labels)
    np.testing.assert_allclose(made.values, [1 / 3, 3])
    (tmp_path / "w.json").write_text('{"b": 4, "a": 1}')
    np.testing.assert_allclose(
        class_weights.make(str(tmp_path / "w.json"), ("a", "b"), labels).values, [1, 4]
    )
    with pytest.raises(UserError, match="every training image has 'a'"):
        class_weights.make("balanced", ("a", "b"), labels[:3])


@pytest.mark.parametrize("name", terms.TERMS)
def test_a_loss_says_whether_it_takes_several_labels(name: str) -> None:
    allowed = {"bce", "mld", "logits", "fitnet", "at", "review", "vid", "mgd", "srd", "sp", "pkt"}
    allowed |= {"cc", "irg", "adv", "rkd-distance", "rkd-angle", "hidden", "scores", "patient"}
    allowed |= {"cosine", "relations"}
    parsed = terms.parse(name)
    if name in allowed:
        loss_checks.check_labels(parsed, several=True)
        return
    with pytest.raises(UserError, match=f"--loss {name} is of one class an image"):
        loss_checks.check_labels(parsed, several=True)


def test_a_teacher_learns_and_the_report_has_the_figures(work: Path) -> None:
    report = support.read_report(work / "teacher")
    card = json.loads((work / "teacher" / "model.json").read_text())
    assert card["outputs"] == "independent logits"
    assert card["classes"] == sorted(NAMES)
    assert report["metric"] == "mean_average_precision"
    assert report["recipe"]["loss"] == "bce:1"
    prevalence = 0.35
    assert report["test_mean_average_precision"] > prevalence + 0.3
    each = report["test_average_precision"]
    assert np.mean(list(each.values())) == pytest.approx(report["test_mean_average_precision"])
    assert 0.5 < report["test_micro_f1"] <= 1
    rows = [json.loads(line) for line in (work / "teacher" / "metrics.jsonl").open()]
    best = max(row.get("validation_mean_average_precision", 0) for row in rows)
    assert report["validation_mean_average_precision"] == best


def test_evaluation_gives_the_figures_of_the_training_and_of_other_data(
    work: Path, inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = support.read_report(work / "teacher")
    support.main(inside, "evaluate", "teacher", "--json")
    own = json.loads(capsys.readouterr().out)
    assert own["mean_average_precision"] == report["test_mean_average_precision"]
    assert own["images"] == report["test_images"] == 80
    # The same images without a label that they have in training, in a folder without parts.
    other = _write(tmp_path / "other", 80, 2)
    rows = [json.loads(line) for line in (other / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["labels"] = [name for name in row["labels"] if name != "rare"]
    (other / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    support.main(inside, "evaluate", "teacher", other, "--json")
    figures = json.loads(capsys.readouterr().out)
    precisions = report["test_average_precision"]
    assert figures["average_precision"] == precisions | {"rare": None}
    assert "rare" in " ".join(figures["notes"]) or figures["images"] == 80


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--loss", "bce:1,mld:1:temperature=2,srd:1", "--class-weights", "balanced"),
        (
            "--loss",
            "bce:1,logits:0.02",
            "--augment",
            "crop-flip",
            "--hflip",
            0,
            "--crop-padding",
            1,
        ),
        ("--loss", "bce:0.5,mld:0.5", "--peers", "mlp:4", "--accumulate", 2),
    ],
)
def test_a_student_learns_from_a_teacher(
    inside: pytest.MonkeyPatch, tmp_path: Path, more: tuple[object, ...]
) -> None:
    out = tmp_path / "run"
    teacher = () if "--peers" in more else ("--teacher", "teacher")
    taught = ("--student", "mlp:8", *teacher, *QUICK, *more, "--out", out)
    support.main(inside, "train", "data", *taught)
    report = support.read_report(out)
    assert report["test_mean_average_precision"] > 0.6
    if teacher:
        own = support.read_report(Path("teacher"))["test_mean_average_precision"]
        assert report["teacher_mean_average_precision"] == own
        assert report["teacher_agreement"] > 0.7


def test_an_interrupted_training_ends_with_the_same_bits(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taught = ("data", "--student", "mlp:8", "--teacher", "teacher", *QUICK)
    support.main(inside, "train", *taught, "--out", tmp_path / "whole")
    support.stop_in(inside, 6, "train", *taught, "--out", tmp_path / "cut")
    support.main(inside, "train", "--resume", "--out", tmp_path / "cut")
    whole, cut = (
        safetensors.numpy.load_file(tmp_path / name / "student.safetensors")
        for name in ("whole", "cut")
    )
    assert all(np.array_equal(whole[name], cut[name]) for name in whole)
    first, second = (support.read_report(tmp_path / name) for name in ("whole", "cut"))
    assert first["test_average_precision"] == second["test_average_precision"]


def test_the_exported_program_says_that_each_class_is_by_itself(
    inside: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "student.pt2"
    support.main(inside, "export", "teacher", "--format", "pt2", "--out", out)
    card = exported.load(out, (8, 8, 1)).card
    assert card is not None
    assert card["outputs"] == "independent logits"
    model = saved_models.load_run(Path("teacher"))
    assert "sigmoid(outputs) are the prob" in export.usage(model, export_formats.FORMATS["pt2"])
    capsys.readouterr()
    # As a teacher it answers as its run does.
    support.main(inside, "evaluate", "teacher", "--teacher", out, "--json")
    assert json.loads(capsys.readouterr().out)["teacher_agreement"] == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data", "--loss", "ce:1"), "--loss ce is of one class an image"),
        (("data", "--teacher", "teacher", "--loss", "bce,kd:1"), "--loss kd is of one class an"),
        (("digits", "--loss", "bce:1"), "--loss bce is of images with any number of labels"),
        (("data", "--metric", "accuracy"), "--metric accuracy is no figure of images with any"),
        (("digits", "--metric", "micro_f1"), "--metric micro_f1 is no figure of images of one"),
        (("data", "--mixup", 0.2), "--mixup needs images of one class each"),
        (("data", "--robust", "pgd"), "--robust needs images of one class each"),
        (("data", "--augment", "imagenet", "--image-size", 8), "several labels (lists in"),
        (("data", "--class-groups", "g.json"), "joins classes of which an image has one"),
        (
            ("data", "--teacher", "teacher", "--min-teacher-accuracy", 0.999),
            "below --min-teacher-accuracy 0.999",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    work: Path,
    inside: pytest.MonkeyPatch,
    tmp_path: Path,
    words: tuple[object, ...],
    message: str,
) -> None:
    groups = {name: name[:1] for name in NAMES}
    (work / "g.json").write_text(json.dumps(groups))
    data, *options = words
    out = tmp_path / "refused"
    arguments = (data, "--student", "mlp:4", *options, "--out", out)
    assert message in support.refused(inside, "train", *arguments)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evaluate", "teacher", "digits"), "learned any number of labels an image, and the data"),
        (("evaluate", "one", "data"), "student one learned one class an image, and the data have"),
        (("evaluate", "teacher", "--robust", "pgd"), "--robust attacks the answer of one class"),
        (("quantize", "teacher"), "kd quantize measures the accuracy of one class each"),
        (("synthesize", "teacher", "--method", "generator"), "images are made for one class each"),
        (("features", "data", "--student", "teacher"), "gives an image several labels"),
    ],
)
def test_other_commands_refuse_in_one_line(
    inside: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    assert message in support.refused(inside, *words)


def test_a_teacher_of_the_other_kind_teaches_by_its_features_alone(
    work: Path, tmp_path: Path
) -> None:
    data = preprocess.identity(1)
    shape, classes = (8, 8, 1), tuple(sorted(NAMES))
    who = str(work / "teacher")
    with pytest.raises(UserError, match="learned any number of labels an image, and the data have"):
        teachers.load(who, data, shape, classes)
    assert not teachers.load(who, data, shape, classes, several_labels=True).by_features
    assert teachers.load(who, data, shape, classes, use="layers").by_features
    digits = tuple(map(str, range(10)))
    with pytest.raises(UserError, match="learned one class an image, and the data have any"):
        teachers.load(str(work / "one"), data, shape, digits, several_labels=True)
