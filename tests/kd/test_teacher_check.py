"""What is known of teachers before they teach: classes, accuracy, calibration; several as one."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch
from PIL import Image
from torch import Tensor, nn

from dsdistill.harness.data import preprocess
from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.errors import UserError
from kd.data import batching
from kd.evaluation import class_order, teacher_check
from kd.losses import ensemble
from kd.models import saved_models
from kd.models.networks import Classifier
from kd.models.teachers import Teacher
from kd.models.zoo import class_names

CPU = torch.device("cpu")
NAMES = ("cat", "dog", "owl")
K, SHAPE = 3, (8, 8, 1)


class _Brightest(nn.Module):
    """Knows the class, which row is bright, from plain images in [0, 1] alone."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = sharpness

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (1, 8, 8)
        # Rows of ordinary brightness: of images in another range nothing is near 0.9.
        return -self.sharpness * (images[:, 0, :K].mean(-1) - 0.9).abs()


def _batches(
    n: int = 60, noise: float = 0.0, kind: str = "standardise"
) -> batching.ResidentBatches:
    rng = np.random.default_rng(0)
    classes = np.arange(n) % K
    images = np.full((n, *SHAPE), 0.3, np.float32)
    images[np.arange(n), classes] = 0.9
    shown = np.where(rng.random(n) < noise, rng.integers(0, K, n), classes)
    fitted = preprocess.fit(kind, lambda size: iter([images]), SHAPE)
    return batching.prepare_resident(Examples(LabeledImages(images, shown, NAMES), fitted), 16, CPU)


def _teacher(
    batches: batching.ResidentBatches, classes: tuple[str, ...] = NAMES, *, own: str = "none", **of
):
    made = Classifier(_Brightest(of.pop("sharpness", 30.0)))
    fitted = preprocess.identity(1) if own == "none" else batches.examples.preprocess
    model = saved_models.Model(made, "brightest", classes, SHAPE, fitted, **of)
    return Teacher(model, batches.examples.preprocess, SHAPE[:2]).eval()


def test_a_good_teacher_is_described_and_measured() -> None:
    said: list[str] = []
    batches = _batches()
    facts = teacher_check.check("t", _teacher(batches), batches, minimum=0.99, say=said.append)
    assert (facts.accuracy, facts.images, facts.at_chance) == (1.0, 60, False)
    assert facts.chance == pytest.approx(1 / 3)
    assert said[0] == (
        "teacher t: 8x8 bilinear, none, mean 0.000 std 1.000, classes matched by name"
    )
    assert said[1].startswith("teacher t: accuracy 100.0% on 60 validation images")
    assert len(said) == 2


def test_accuracy_and_temperature_are_those_of_the_path_used_in_training() -> None:
    batches = _batches(n=3000, noise=0.3)
    teacher = _teacher(batches, sharpness=30.0)
    facts = teacher_check.check("t", teacher, batches, say=lambda line: None)
    x = torch.cat([batch.images for batch in batches.in_order()])
    right = (teacher(x).argmax(1).numpy() == batches.examples.data.labels).mean()
    assert facts.accuracy == right
    # The logit of the bright row exceeds the others by 18, so a calibrated softmax has
    # exp(18 / T) = p / ((1 - p) / 2) with p the share of right answers; the others are alike.
    expected = 18 / np.log(2 * right / (1 - right))
    assert facts.temperature == pytest.approx(expected, rel=1e-3)


def test_a_weak_teacher_is_refused_with_what_to_check() -> None:
    batches = _batches()
    wrong = _teacher(batches, own="data")  # sees standardised images where it wants plain ones
    with pytest.raises(UserError) as caught:
        teacher_check.check("t", wrong, batches, minimum=0.5, say=lambda line: None)
    line = str(caught.value)
    assert line.startswith("teacher t has validation accuracy ")
    assert "below --min-teacher-accuracy 0.5: check its classes and their order" in line
    assert "normalisation" in line
    assert "\n" not in line


def test_a_teacher_at_chance_is_warned_of_even_without_a_minimum(capsys) -> None:
    batches = _batches(noise=1.0)  # labels that say nothing
    facts = teacher_check.check("t", _teacher(batches), batches)
    assert facts.at_chance
    assert "warning: teacher t cannot be told from chance (3" in capsys.readouterr().err
    assert not teacher_check.check("t", _teacher(_batches()), _batches()).at_chance
    assert "warning" not in capsys.readouterr().err


def test_the_chance_of_unbalanced_answers_is_cohens() -> None:
    rng = np.random.default_rng(3)
    predicted, true = rng.choice(3, 400, p=[0.9, 0.1, 0]), rng.choice(3, 400, p=[0.8, 0.1, 0.1])
    shuffled = [(rng.permutation(predicted) == true).mean() for _ in range(2000)]
    # The mean of 2000 draws whose deviation is about 0.01.
    assert teacher_check.chance_accuracy(predicted, true) == pytest.approx(
        np.mean(shuffled), abs=1e-3
    )
    always = np.zeros(400, int)
    assert teacher_check.chance_accuracy(always, true) == (true == 0).mean()


# --- another order of the classes


def _answers(
    n: int, k: int, accuracy: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions that know the class of a share of the images and guess that of others."""
    true = rng.integers(0, k, n)
    return np.where(rng.random(n) < accuracy, true, rng.integers(0, k, n)), true


@pytest.mark.parametrize(
    ("n", "k", "accuracy"), [(20, 4, 1.0), (60, 12, 0.9), (400, 10, 0.4), (1000, 100, 0.8)]
)
def test_an_order_that_explains_the_answers_is_found(n: int, k: int, accuracy: float) -> None:
    rng = np.random.default_rng(1)
    predicted, true = _answers(n, k, accuracy, rng)
    shuffle = np.roll(np.arange(k), 1)
    found = class_order.find_better(shuffle[predicted], true, k)
    assert found is not None
    right = (predicted == true).mean()
    assert found.accuracy >= right  # the order with the most right answers, by its definition
    assert np.mean(np.array(found.classes)[shuffle] == np.arange(k)) > 0.9
    named = class_order.find_better(
        shuffle[predicted], true, k, {"mine": np.argsort(shuffle).tolist()}
    )
    assert named is not None
    assert (named.name, named.accuracy) == ("mine", right)
    assert (
        class_order.find_better(predicted, true, k, {"mine": np.argsort(shuffle).tolist()}) is None
    )


def test_two_exchanged_classes_of_many_are_found() -> None:
    predicted, true = _answers(3000, 100, 0.8, np.random.default_rng(2))
    exchange = np.arange(100)
    exchange[[3, 8]] = 8, 3
    found = class_order.find_better(exchange[predicted], true, 100)
    assert found is not None
    assert found.classes == tuple(exchange.tolist())


@pytest.mark.parametrize(
    ("n", "k", "accuracy"), [(10, 2, 0.0), (60, 3, 0.1), (30, 10, 0.2), (200, 100, 0.1)]
)
def test_weak_teachers_on_few_images_raise_no_false_alarm(n: int, k: int, accuracy: float) -> None:
    rng = np.random.default_rng(3)
    draws = [_answers(n, k, accuracy, rng) for _ in range(300)]
    likely = {"reversed": range(k)[::-1], "rolled": np.roll(np.arange(k), 1).tolist()}
    alarms = sum(class_order.find_better(*draw, k, likely) is not None for draw in draws)
    # At most 1 %: of 300 draws 3; more than 9 has a probability of 0.1 %.
    assert alarms <= 9
    # The order with the most right answers looks better on the very images it was found on.
    gains = []
    for predicted, true in draws:
        order = class_order._assignment(predicted, true, k)
        gains.append((order[predicted] == true).mean() - (predicted == true).mean())
    assert np.mean(gains) > 0.02


def test_one_answer_for_everything_is_no_order() -> None:
    rng = np.random.default_rng(4)
    true = np.where(rng.random(500) < 0.9, 3, rng.integers(0, 10, 500))
    assert class_order.find_better(np.zeros(500, int), true, 10) is None


@pytest.mark.parametrize("minimum", [None, 0.9])
def test_a_teacher_in_another_order_is_warned_of_with_its_class_map(
    minimum: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve folders of numbers: assumed in natural order, trained in torchvision's."""
    true = np.arange(36) % 12
    trained = [AS_WORDS.index(name) for name in TWELVE]  # its output of each class
    matched = class_names.match("t", 12, TWELVE)
    batches = _batches()
    model = saved_models.Model(
        Classifier(nn.Identity()), "t", TWELVE, SHAPE, preprocess.identity(1)
    )
    teacher = Teacher(model, batches.examples.preprocess, SHAPE[:2], matched, TWELVE)
    logits = np.eye(12)[np.array(trained)[true]]
    monkeypatch.setattr(teacher_check.scoring, "outputs_and_labels", lambda *_: (logits, true))
    said: list[str] = []
    if minimum is None:
        teacher_check.check("t", teacher, batches, say=said.append)
        line = said[-1]
        assert line.startswith("warning: teacher t seems to have its classes in another order")
    else:
        with pytest.raises(UserError, match="below --min-teacher-accuracy") as caught:
            teacher_check.check("t", teacher, batches, minimum=minimum, say=said.append)
        line = str(caught.value)
    assert any("libraries sort these class folders differently" in x for x in said)
    assert "but 100.0% with its classes in the order of code points, as torchvision sorts" in line
    mapping = json.loads(line[line.index("{") :])
    assert class_names.match("t", 12, TWELVE, mapping).outputs == tuple(trained)
    assert "\n" not in line


# --- classes


TENCH, GOLDFISH = "tench, Tinca tinca", "goldfish, Carassius auratus"
TWELVE = tuple(map(str, range(12)))
AS_WORDS = tuple(sorted(TWELVE))  # 0, 1, 10, 11, 2, ...


@pytest.mark.parametrize(
    ("its", "classes", "outputs"),
    [
        (NAMES, NAMES, None),
        (("Cat", "dog", "OWL"), NAMES, None),
        (("owl", "cat", "dog"), NAMES, (1, 2, 0)),
        (("hot_dog", "Great  Owl"), ("great-owl", "hot dog"), (1, 0)),
        (("Cat", "cat"), ("cat", "Cat"), (1, 0)),  # the closest of several that are alike
        (TWELVE, AS_WORDS, tuple(map(int, AS_WORDS))),
        (tuple(f"{i:05}" for i in range(12)), AS_WORDS, tuple(map(int, AS_WORDS))),
        (AS_WORDS, TWELVE, tuple(AS_WORDS.index(name) for name in TWELVE)),
        (("2", "02", "1"), ("02", "1", "2"), (1, 2, 0)),
        (("caf\u00e9", "x"), ("X", "Cafe\u0301"), (1, 0)),  # as Linux and as macOS write it
        ((TENCH, GOLDFISH), ("goldfish", "n01440764"), (1, 0)),
        ((f"n01440764, {TENCH}", "cat"), ("Cat", "Tinca_tinca"), (1, 0)),
        (
            ("Pepper,_bell___a", "Pepper,_bell___b"),
            ("Pepper,_bell___b", "Pepper,_bell___a"),
            (1, 0),
        ),
        # ImageNet has two cranes: at the same places they are the same.
        (("n1", "crane", "crane"), ("n1", "crane", "crane"), None),
    ],
)
def test_classes_are_matched_by_name_in_any_order(its, classes, outputs) -> None:
    found = class_names.match("m", its, classes)
    assert found.outputs == outputs
    assert found.how == ("by name" if outputs is None else "by name, in another order")
    assert not found.assumed


def test_an_order_that_is_assumed_is_said() -> None:
    found = class_names.match("m", 3, NAMES)
    assert (found.how, found.outputs, found.note) == (
        "by position alone: outputs 0..2 taken as classes cat, dog, owl, the data's order",
        None,
        None,
    )
    assert found.assumed
    assert class_names.match("m", ("LABEL_0", "LABEL_1", "LABEL_2"), NAMES) == found
    assert class_names.match("m", ("0", "1", "2"), NAMES) == found
    assert class_names.match("m", NAMES, ("0", "1", "2")).assumed
    # Numbers stand in their natural order, whatever the order of the data.
    found = class_names.match("m", 12, AS_WORDS)
    assert found.outputs == tuple(map(int, AS_WORDS))
    assert found.how.endswith("outputs 0..11 taken as classes 0, 1, 2, ..., natural order")
    assert found.note is not None
    assert "output 2 is '2' for timm" in found.note
    assert "'10' for torchvision" in found.note


@pytest.mark.parametrize(
    "names", [TWELVE, ("b", "A", "c"), ("img12", "img2"), ("a1b2", "A1b10", "a1"), ("x_1", "x.1")]
)
def test_likely_orders_are_those_of_the_libraries(tmp_path: Path, names: tuple[str, ...]) -> None:
    from timm.data.readers.reader_image_folder import find_images_and_targets
    from torchvision.datasets import ImageFolder

    for name in names:
        (tmp_path / name).mkdir()
        Image.new("L", (2, 2)).save(tmp_path / name / "0.png")
    natural, plain = class_names.likely_orders(names).values()
    for order, known in (
        (natural, find_images_and_targets(str(tmp_path))[1]),
        (plain, ImageFolder(str(tmp_path)).class_to_idx),
    ):
        assert [names[i] for i in order] == sorted(known, key=lambda name: known[name])


def test_class_maps_choose_by_name_synonym_and_number() -> None:
    its = ("x", GOLDFISH, "dog", "cat")
    found = class_names.match("m", its, NAMES, {"dog": "Dog", "cat": 3, "owl": "carassius_auratus"})
    assert found == class_names.Match("by the class map", (3, 2, 1))


@pytest.mark.parametrize(
    ("its", "classes", "message"),
    [
        (4, NAMES, "has 4 classes, the data have 3"),
        (("cat", "dog", "emu"), NAMES, "no class 'owl' of the data.* its 'emu': --class-map FILE"),
        (("10", "0", "1"), NAMES, "no class 'cat' of the data"),  # numbers of something else
        (("1", "2"), ("0", "1"), "no class '0' of the data"),
        (("Pepper,_bell___a", "y"), ("Pepper,_bell___b", "y"), "no class 'Pepper,_bell___b'"),
        (("cat, pet", "dog", "owl"), NAMES, "no class 'cat'"),
        (("CAT", "Cat", "owl"), ("cat", "dog", "owl"), "has 2 classes that could be 'cat'"),
        (("cat", "dog"), ("Cat", "CAT"), "one class that could be several"),
    ],
)
def test_other_classes_are_refused(its, classes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        class_names.match("teacher t", its, classes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ({"cat": 0, "dog": 1}, "leaves out 1 of the data's classes: 'owl'"),
        ({"cat": 0, "dog": 1, "owl": 2, "elk": 3}, "unknown class .* 'elk'"),
        ({"cat": 0, "dog": "wolf", "owl": 2}, "class 'wolf', which teacher t does not have"),
        ({"cat": 0, "dog": "dogs", "owl": 2}, "did you mean 'dog'"),
        ({"cat": 0, "dog": 0, "owl": 2}, "gives 'cat' and 'dog' the same class of teacher t"),
        ({"cat": "cat", "dog": 0, "owl": 2}, "gives 'cat' and 'dog' the same class of teacher t"),
        ({"cat": 0, "dog": 5, "owl": 2}, "asks for class 5 of teacher t, which has 5"),
        ({"cat": 0, "dog": -1, "owl": 2}, "asks for class -1"),
        ({"cat": 0, "dog": 1, "owl": "Crane"}, "of which teacher t has 2, numbers 3, 4"),
    ],
)
def test_class_maps_that_do_not_fit_are_one_line(
    class_map: dict[str, str | int], message: str
) -> None:
    its = ("cat", "dog", "owl", "n02012849, crane", "n03126707, crane")
    with pytest.raises(UserError, match=message) as caught:
        class_names.match("teacher t", its, NAMES, class_map)
    assert "\n" not in str(caught.value)


def test_names_in_a_map_need_names_in_the_teacher() -> None:
    with pytest.raises(UserError, match="are not known: give numbers from 0 to 8"):
        class_names.match("teacher t", 9, NAMES, {"cat": "cat", "dog": 1, "owl": 2})


def test_a_class_map_is_read_from_json(tmp_path: Path) -> None:
    path, wanted = tmp_path / "map.json", {"cat": "tabby", "dog": 207, "owl": "owl"}
    path.write_text(json.dumps(wanted))
    assert class_names.read_class_map(path) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the class map"),
        ("[1, 2]", "must be one JSON object"),
        ('{"cat": 1.5}', "must be one JSON object"),
        ('{"cat": true}', "must be one JSON object"),
        ('{"cat": {"a": 1}}', "must be one JSON object"),
        ('{"cat": 1, "cat": 2}', "has class 'cat' twice"),
        (None, "cannot read the class map"),
    ],
)
def test_damaged_class_maps_are_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "map.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        class_names.read_class_map(path)
    assert "\n" not in str(caught.value)


# --- several teachers


def _logits(m: int = 3, n: int = 5, k: int = 4, scale: float = 3.0) -> list[Tensor]:
    rng = np.random.default_rng(2)
    return [torch.from_numpy(scale * rng.standard_normal((n, k))).float() for _ in range(m)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_combined_logits_give_the_mean_of_tempered_probabilities(temperature: float) -> None:
    logits = _logits()
    combined = ensemble.combined_logits(logits, temperature=temperature)
    expected = np.mean(
        [scipy.special.softmax(x.double().numpy() / temperature, 1) for x in logits], 0
    )
    found = scipy.special.softmax(combined.double().numpy() / temperature, 1)
    # float32: logits of about 10 have an error of 1e-6
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def _weights(logits: list[Tensor], true: np.ndarray) -> np.ndarray:
    """CA-MKD's equation 2 in float64, from its definition."""
    p = np.stack([scipy.special.softmax(x.double().numpy(), 1) for x in logits])
    errors = -(true * np.log(p)).sum(-1)  # (m, n)
    return (1 - np.exp(errors) / np.exp(errors).sum(0)) / (len(logits) - 1)


def test_weights_by_label_are_the_papers() -> None:
    logits, true = _logits(), torch.tensor([0, 3, 1, 1, 2])
    one_hot = np.eye(4)[true.numpy()]
    found = ensemble.label_weights(logits, true)
    np.testing.assert_allclose(found, _weights(logits, one_hot), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(0), torch.ones(5))
    soft = torch.full((5, 4), 0.1) + 0.6 * torch.from_numpy(one_hot).float()
    found = ensemble.label_weights(logits, soft)
    np.testing.assert_allclose(found, _weights(logits, soft.double().numpy()), rtol=1e-4)
    combined = ensemble.combined_logits(
        logits, temperature=2.0, weights=ensemble.label_weights(logits, true)
    )
    p = np.stack([scipy.special.softmax(x.double().numpy() / 2, 1) for x in logits])
    expected = (_weights(logits, one_hot)[..., None] * p).sum(0)
    found = scipy.special.softmax(combined.double().numpy() / 2, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_teacher_that_knows_the_label_outweighs_one_that_does_not() -> None:
    right = torch.tensor([[9.0, 0.0, 0.0]])
    wrong = torch.tensor([[0.0, 200.0, 0.0]])
    weights = ensemble.label_weights([right, wrong], torch.tensor([0]))
    combined = ensemble.combined_logits([right, wrong], temperature=1.0, weights=weights)
    assert torch.isfinite(combined).all()
    torch.testing.assert_close(combined.softmax(1), right.softmax(1))


def test_one_teacher_is_itself_and_alike_teachers_are_one() -> None:
    (only,) = _logits(m=1)
    for true in (None, torch.tensor([0, 1, 2, 3, 0])):
        for several in ([only], [only, only, only]):
            weights = None if true is None else ensemble.label_weights(several, true)
            combined = ensemble.combined_logits(several, temperature=3.0, weights=weights)
            expected = only - only.div(3).logsumexp(1, keepdim=True) * 3
            torch.testing.assert_close(combined, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_extreme_logits_and_gradients() -> None:
    logits = [torch.tensor([[6e4, -6e4]]).half(), torch.tensor([[6e4, -6e4]]).half()]
    weights = ensemble.label_weights(logits, torch.tensor([1]))
    combined = ensemble.combined_logits(logits, temperature=1.0, weights=weights)
    assert combined.dtype == torch.float32
    assert torch.isfinite(combined).all()
    grown = [x.requires_grad_() for x in _logits()]
    assert not ensemble.combined_logits(grown, temperature=1.0).requires_grad
    assert not ensemble.label_weights(grown, torch.zeros(5, dtype=torch.long)).requires_grad


def test_combinations_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        ensemble.combined_logits(_logits(), temperature=0)
    with pytest.raises(ValueError, match="must be of one shape, got none"):
        ensemble.combined_logits([], temperature=1)
    with pytest.raises(ValueError, match=r"must be of one shape, got \[\(5, 4\), \(5, 5\)\]"):
        ensemble.combined_logits([*_logits(), torch.zeros(5, 5)], temperature=1)
