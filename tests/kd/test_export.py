"""`kd export`: what is written answers as the student does, or is not written."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import in_process
import kd_support as support
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import nn

from dsdistill.harness import files
from dsdistill.harness.data import preprocess
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.evaluation.metrics import softmax
from kd import cli
from kd.commands import export
from kd.data import data_source
from kd.data.files import file_source
from kd.data.files.image_files import ImageFiles
from kd.exports import export_formats
from kd.exports.export_check import ReferenceOutputs
from kd.models import networks, saved_models, seals, teachers
from kd.models.zoo import exported
from kd.options import ExportOptions
from kd.recipe import Recipe

# Rounding of float32 sums of up to a few thousand terms, of outputs of about 1.
ROUNDING = 1e-5
RUNS = {
    "convnet": ("convnet:8", "standardise"),
    "mlp": ("mlp:8", "standardise"),
    "zca": ("mlp:8", "zca"),
    "resnet": ("test_resnet", "standardise"),
    "vit": ("test_vit", "none"),
}


def _save(folder: Path, name: str, kind: str, **changed: Any) -> saved_models.Model:
    """A finished run on digits, whose weights and buffers are all unlike their initial values."""
    images = support.digits().train
    classifier = networks.build(name, images.shape, 10, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in classifier.state_dict().values():
            if value.is_floating_point():
                value += 0.1 * torch.rand(value.shape, generator=generator)
    fitted = preprocess.fit(kind, images.chunks, images.shape)
    model = saved_models.Model(classifier, name, images.classes, images.shape, fitted)
    model = dataclasses.replace(model, **changed)
    folder.mkdir()
    saved_models.save_run(folder, model)
    files.write_json(folder / "config.json", {"data": "digits"})
    return model


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of several kinds, and some that are not whole."""
    folder = tmp_path_factory.mktemp("export")
    for run, (name, kind) in RUNS.items():
        centred = {"outputs": "centred labels", "output_temperature": 0.25}
        _save(folder / run, name, kind, **(centred if run == "zca" else {}))
    (folder / "unfinished").mkdir()
    files.write_json(folder / "unfinished" / "config.json", {"data": "digits"})
    for run in ("cut", "broken"):
        shutil.copytree(folder / "mlp", folder / run)
    weights = folder / "cut" / saved_models.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:500])
    weights = folder / "broken" / saved_models.WEIGHTS
    broken = safetensors.torch.load_file(weights)
    next(iter(broken.values()))[0] = float("nan")
    weights.write_bytes(safetensors.torch.save(broken))
    for run in ("cut", "broken"):  # as a version without checksums has left them
        card = json.loads((folder / run / saved_models.CARD).read_text())
        del card[seals.CHECKSUMS_KEY]
        files.write_json(folder / run / saved_models.CARD, card)
    (folder / "taken.pt2").write_text("mine")
    (folder / "dangling").symlink_to("gone")
    (folder / "half.onnx.json").write_text("{}")
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    return monkeypatch


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["kd", "export", *map(str, arguments)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)


def _refused(monkeypatch: pytest.MonkeyPatch, work: Path, *arguments: object) -> str:
    """The one line of a refusal, which leaves every folder as it was."""
    before = sorted(work.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        _main(monkeypatch, *arguments)
    assert sorted(work.rglob("*")) == before
    line = str(stopped.value.code)
    assert line.startswith("kd: ")
    assert "\n" not in line
    return line


def _images(n: int = 7) -> np.ndarray:
    """Real and random images (n, h, w, c), none of which the command compares on."""
    real = support.digits().train.images(slice(n // 2))
    random = np.random.default_rng(99).random((n - n // 2, 8, 8, 1), dtype=np.float32)
    return np.concatenate([real, random])


def _nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def _outputs(run: Path, images: np.ndarray) -> np.ndarray:
    """What the student says, preprocessed by NumPy."""
    model = saved_models.load_run(run)
    with torch.no_grad():
        return model.classifier.eval()(_nchw(model.preprocess.apply(images))).numpy()


def _onnx_outputs(session: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    (got,) = session.run(["outputs"], {"images": _nchw(images).numpy()})
    assert isinstance(got, np.ndarray)
    return got


def _card_of(session: onnxruntime.InferenceSession) -> dict[str, Any]:
    """The card out of the file's metadata, where what is no string is JSON."""
    plain = {"format", "student", "use"}
    found = session.get_modelmeta().custom_metadata_map
    return {k: v if k in plain else json.loads(v) for k, v in found.items()}


def test_the_real_command_writes_an_onnx_file_for_any_number_of_images(work: Path) -> None:
    done = support.kd("export", "convnet", "--format", "onnx", "--out", "new/net.onnx", cwd=work)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert str(work / "new" / "net.onnx") in done.stdout
    assert {p.name for p in (work / "new").iterdir()} == {"net.onnx", "net.onnx.json"}
    assert not list(work.glob(".*"))
    onnx.checker.check_model(work / "new" / "net.onnx", full_check=True)
    session = onnxruntime.InferenceSession(str(work / "new" / "net.onnx"))
    for n in (1, 2, 7):
        images = _images(n)
        got = _onnx_outputs(session, images)
        np.testing.assert_allclose(got, _outputs(work / "convnet", images), atol=ROUNDING)
    card = _card_of(session)
    assert card == json.loads((work / "new" / "net.onnx.json").read_text())
    assert card["classes"] == [str(i) for i in range(10)]
    assert card["input"]["shape"] == ["batch", 1, 8, 8]
    assert card["preprocess"]["included"] is True
    check = card["check"]
    assert check["largest_difference"] <= check["tolerance"] < 1e-3
    assert check["argmax_agreement"] == 1
    assert (check["random_images"], check["real_images"], check["data"]) == (16, 48, "digits")
    assert check["batch_sizes"] == [1, 16, 48]


def test_onnx_whitens_and_says_how_centred_labels_become_probabilities(
    inside: pytest.MonkeyPatch, work: Path, capfd: pytest.CaptureFixture
) -> None:
    _main(inside, "zca", "--format", "onnx")
    captured = capfd.readouterr()
    assert captured.err == ""
    assert "argmax agreement" in captured.out
    session = onnxruntime.InferenceSession("zca/export/mlp-8.onnx")
    images = _images()
    got = _onnx_outputs(session, images)
    card, expected = _card_of(session), _outputs(work / "zca", images)
    assert card["outputs"]["kind"] == "centred labels"
    assert card["output_temperature"] == 0.25
    assert "softmax(outputs / 0.25)" in card["use"]
    assert "mean" in card["preprocess"]
    assert "matrix" not in card["preprocess"]  # the graph has it
    # The outputs are divided by nothing: whoever wants probabilities divides by the temperature.
    np.testing.assert_allclose(got, expected, atol=ROUNDING)
    probabilities = softmax(got, card["output_temperature"])
    np.testing.assert_allclose(probabilities, softmax(expected, 0.25), atol=ROUNDING)


@pytest.mark.parametrize("run", ["vit", "zca"])
def test_pt2_holds_preprocessing_resize_and_card(
    inside: pytest.MonkeyPatch, work: Path, run: str
) -> None:
    _main(inside, run, "--format", "pt2", "--out", f"{run}.pt2")
    extra = {export_formats.CARD_FILE: ""}
    program: Callable = torch.export.load(f"{run}.pt2", extra_files=extra).module()
    card = json.loads(extra[export_formats.CARD_FILE])
    assert card["format"] == "pt2"
    assert card["check"]["argmax_agreement"] == 1
    assert card["resize"]["size"] == ([160, 160] if run == "vit" else None)
    for n in (1, 3):
        images = _images(n)
        with torch.no_grad():
            got = program(_nchw(images)).numpy()
        np.testing.assert_allclose(got, _outputs(work / run, images), atol=ROUNDING)


def test_a_pt2_file_is_a_teacher_that_answers_as_its_run_does(
    inside: pytest.MonkeyPatch, work: Path
) -> None:
    _main(inside, "zca", "--format", "pt2", "--out", "teacher.pt2")
    images, shape = support.digits().train, (8, 8, 1)
    fitted = preprocess.fit("standardise", images.chunks, images.shape)
    prepared = _nchw(fitted.apply(_images()))
    with torch.no_grad():
        answers = [
            teachers.load(name, fitted, shape, images.classes)(prepared).numpy()
            for name in ("teacher.pt2", "zca")
        ]
    np.testing.assert_allclose(answers[0], answers[1], atol=4 * ROUNDING)  # divided by 0.25
    assert np.ptp(answers[1]) > 0.1


def test_safetensors_load_into_the_bare_network_and_make_a_run(
    inside: pytest.MonkeyPatch, work: Path
) -> None:
    _main(inside, "resnet", "--format", "safetensors")
    folder = work / "resnet" / "export" / "test_resnet-safetensors"
    names = {saved_models.WEIGHTS, saved_models.CARD, "recipe.json"}
    assert {p.name for p in folder.iterdir()} == names
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["student"] is recipe["teacher"] is None
    bare = timm.create_model("test_resnet", in_chans=1, num_classes=10).eval()
    bare.load_state_dict(safetensors.torch.load_file(folder / saved_models.WEIGHTS))
    prepared = saved_models.load_run(work / "resnet").preprocess.apply(_images())
    with torch.no_grad():
        got = bare(_nchw(prepared)).numpy()
    np.testing.assert_array_equal(got, _outputs(work / "resnet", _images()))
    np.testing.assert_array_equal(got, _outputs(folder, _images()))
    cards = [json.loads((run / saved_models.CARD).read_text()) for run in (folder, work / "resnet")]
    for card in cards:
        del card[seals.CHECKSUMS_KEY]  # the exported weights have another header
    assert cards[0] == cards[1]
    with safetensors.safe_open(folder / saved_models.WEIGHTS, "pt") as file:
        header = file.metadata()
    assert json.loads(header["classes"]) == [str(i) for i in range(10)]
    assert json.loads(header["preprocess"])["included"] is False
    assert json.loads(header["check"])["largest_difference"] == 0


def test_safetensors_of_a_whitening_student_hold_its_matrices(
    inside: pytest.MonkeyPatch, work: Path
) -> None:
    _main(inside, "zca", "--format", "safetensors", "--out", "whole")
    np.testing.assert_array_equal(
        _outputs(work / "whole", _images()), _outputs(work / "zca", _images())
    )


@pytest.mark.parametrize("run", ["resnet", "vit"])
def test_timm_makes_the_student_and_knows_its_input(
    inside: pytest.MonkeyPatch, work: Path, run: str
) -> None:
    _main(inside, run, "--format", "timm", "--out", f"{run}-timm")
    made = timm.create_model(f"local-dir:{work / f'{run}-timm'}", pretrained=True)
    network: Any = made.eval()
    student = saved_models.load_run(work / run)
    config = resolve_model_data_config(network)
    size = (160, 160) if run == "vit" else (8, 8)
    assert tuple(config["input_size"]) == (1, *size)
    assert config["crop_pct"] == 1
    assert tuple(network.pretrained_cfg["label_names"]) == student.classes
    mean, std = (np.array(config[name], np.float32) for name in ("mean", "std"))
    plain = networks.resize(_nchw((_images() - mean) / std), size, config["interpolation"])
    with torch.no_grad():
        got = network(plain).numpy()
    np.testing.assert_allclose(got, _outputs(work / run, _images()), atol=ROUNDING)
    card = json.loads((work / f"{run}-timm" / "card.json").read_text())
    assert card["check"]["real_images"] == 48


def test_timms_own_transform_prepares_an_image_as_the_student_does(
    inside: pytest.MonkeyPatch, work: Path
) -> None:
    _main(inside, "resnet", "--format", "timm", "--out", "transformed")
    network = timm.create_model(f"local-dir:{work / 'transformed'}", pretrained=True).eval()
    transform: Any = create_transform(**resolve_model_data_config(network))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    with torch.no_grad():
        got = network(transform(Image.fromarray(pixels))[None]).numpy()
    expected = _outputs(work / "resnet", pixels[None, :, :, None])
    np.testing.assert_allclose(got, expected, atol=ROUNDING)


def test_a_streamed_runs_files_are_compared_on_and_cut_by_timm_as_in_evaluation(
    inside: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    for name in (f"{kind}/{n}" for kind in ("cat", "dog") for n in range(10)):
        file = tmp_path / "pictures" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(file)
    mean, std = np.array([[0.4, 0.5, 0.6], [0.2, 0.3, 0.4]], np.float32)
    fitted = Preprocess("standardise", mean, std)
    classifier = networks.build("test_resnet", (16, 16, 3), 2, seed=3).eval()
    model = saved_models.Model(classifier, "test_resnet", ("cat", "dog"), (16, 16, 3), fitted)
    (tmp_path / "run").mkdir()
    saved_models.save_run(tmp_path / "run", model)
    files.write_json(tmp_path / "run" / "config.json", {"data": str(tmp_path / "pictures")})
    recipe = {"augment": "imagenet", "crop_share": 0.8, "interpolation": "random"}
    files.write_json(tmp_path / "run" / "recipe.json", recipe)
    _main(inside, tmp_path / "run", "--format", "timm", "--out", tmp_path / "net")
    (line,) = capsys.readouterr().err.splitlines()
    assert "pictures: 14 training images of 2 classes" in line
    check = json.loads((tmp_path / "net" / "card.json").read_text())["check"]
    assert (check["real_images"], check["data"]) == (4, "pictures")  # a fifth is for testing

    network: Any = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    config = resolve_model_data_config(network)
    assert (config["crop_pct"], config["interpolation"]) == (0.8, "bicubic")
    transform: Any = create_transform(**config)
    size = {"image_size": 16, "validation_fraction": 0.1}
    source = file_source.resolve(str(tmp_path / "pictures"), root=tmp_path, **size)
    stream = source.test(Recipe(**recipe), fitted, torch.device("cpu"))
    _, _, tested = source.parts
    assert isinstance(tested, ImageFiles)
    assert stream is not None
    pictures = [tested.read(row, 3)[0] for row in range(len(tested))]
    with torch.no_grad():
        got = network(torch.stack([transform(picture) for picture in pictures])).numpy()
        expected = classifier(next(iter(stream.in_order())).images).numpy()
    np.testing.assert_allclose(got, expected, atol=ROUNDING)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "does not say what it was trained on"),
        ({"data": "gone/away"}, "no such file or folder: gone/away"),
        ({"data": "three.npz"}, "the student has 10 classes, the data have 3"),
    ],
)
def test_without_its_data_a_student_is_compared_on_random_images_and_says_so(
    inside: pytest.MonkeyPatch,
    tmp_path: Path,
    config: dict[str, str],
    why: str,
    capsys: pytest.CaptureFixture,
) -> None:
    _save(tmp_path / "run", "mlp:8", "standardise")
    support.write_npz(tmp_path / "three.npz", classes=3)
    files.write_json(tmp_path / "run" / "config.json", config)
    inside.chdir(tmp_path)
    _main(inside, "run", "--format", "safetensors")
    captured = capsys.readouterr()
    assert "kd: compared on random images only: " in captured.err
    assert why in captured.err
    weights = tmp_path / "run" / "export" / "mlp-8-safetensors" / saved_models.WEIGHTS
    with safetensors.safe_open(weights, "pt") as file:
        check = json.loads(file.metadata()["check"])
    assert (check["random_images"], check["real_images"], check["data"]) == (16, 0, None)
    assert why in check["note"]


def test_the_data_are_looked_for_where_they_lay(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _save(tmp_path / "run", "mlp:8", "none")
    files.write_json(tmp_path / "run" / "config.json", {"data": "cifar10", "data_root": "there"})
    asked: list[Path] = []

    def resolve(name: str, *, root: Path, **_: object) -> None:
        asked.append(root)
        raise OSError("none")

    inside.setattr(data_source, "resolve", resolve)
    for number, given in enumerate(((), ("--data-root", "here"))):
        out = tmp_path / f"{number}.pt2"
        _main(inside, tmp_path / "run", "--format", "pt2", "--out", out, *given)
    assert asked == [Path("there"), Path("here")]


def test_a_comparison_counts_every_output_of_every_batch() -> None:
    expected = np.array([[0.0, 1, 5], [4, 1, 0], [0, 3, 1]], np.float32)
    got = expected + np.array([[0, 0, 0], [0, 0, 0.25], [0, -2.5, 0]], np.float32)
    images = np.zeros((3, 8, 8, 1), np.float32)
    answers = iter([got[:1], got])
    read = dataclasses.replace(
        export_formats.FORMATS["pt2"], read=lambda path: lambda x: torch.from_numpy(next(answers))
    )
    trials = ReferenceOutputs((images[:1], images), (expected[:1], expected), "some", None)
    found = export.compare(Path("unused"), read, trials)
    assert found.largest_difference == 2.5
    assert found.tolerance == pytest.approx(1e-4 * 5)
    assert found.argmax_agreement == 3 / 4  # the last image's, of four answers
    assert found.batch_sizes == (1, 3)


def _forgets_preprocessing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(export_formats, "PreprocessLayer", lambda fitted: nn.Identity())


def _reads(patch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What the file answers is changed when it is run."""
    chosen = export_formats.FORMATS["pt2"]

    def read(path: Path) -> export_formats.Runner:
        run = chosen.read(path)
        return lambda images: change(run(images))

    changed = {**export_formats.FORMATS, "pt2": dataclasses.replace(chosen, read=read)}
    patch.setattr(export, "FORMATS", changed)


@pytest.mark.parametrize(
    "spoil",
    [
        _forgets_preprocessing,
        lambda patch: _reads(patch, lambda outputs: outputs * 1.001),
        lambda patch: _reads(patch, lambda outputs: outputs * float("nan")),
    ],
    ids=["without preprocessing", "0.1 % more", "NaN"],
)
def test_an_export_that_differs_is_refused(
    inside: pytest.MonkeyPatch, work: Path, spoil: Callable[[pytest.MonkeyPatch], None]
) -> None:
    spoil(inside)
    line = _refused(inside, work, "convnet", "--format", "pt2", "--out", "no/where.pt2")
    assert "as pt2 the student of convnet would answer differently" in line
    assert "nothing was written" in line


def test_an_export_that_differs_by_rounding_is_accepted(
    inside: pytest.MonkeyPatch, work: Path, tmp_path: Path
) -> None:
    _reads(inside, lambda outputs: outputs * 1.00001)
    _main(inside, "convnet", "--format", "pt2", "--out", tmp_path / "rounded.pt2")
    assert (tmp_path / "rounded.pt2").is_file()


def test_an_export_that_cannot_be_run_is_refused(inside: pytest.MonkeyPatch, work: Path) -> None:
    def fail(outputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this node\nand more")

    _reads(inside, fail)
    line = _refused(inside, work, "convnet", "--format", "pt2")
    assert "cannot be run (no kernel for this node): nothing was written" in line


def test_a_network_that_cannot_be_traced_is_refused(inside: pytest.MonkeyPatch, work: Path) -> None:
    class Branches(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images if float(images.sum()) > 0 else -images

    inside.setattr(export_formats, "PreprocessLayer", lambda fitted: Branches())
    line = _refused(inside, work, "convnet", "--format", "pt2")
    assert "convnet:8 cannot be traced as a graph" in line
    assert "use --format safetensors" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--format", "pt2"), "nowhere holds no finished student"),
        (("unfinished", "--format", "pt2"), "unfinished holds no finished student"),
        (("cut", "--format", "pt2"), "does not hold the weights of this network"),
        (("broken", "--format", "pt2"), "has outputs that are not finite"),
        (("mlp", "--format", "timm"), "mlp:8 is not one of timm's architectures: use --format"),
        (("zca", "--format", "timm"), "timm cannot whiten images"),
        (("mlp", "--format", "pt2", "--out", "taken.pt2"), "taken.pt2 exists already"),
        (("mlp", "--format", "onnx", "--out", "half.onnx"), "half.onnx.json exists already"),
        (("vit", "--format", "timm", "--out", "mlp"), "mlp exists already: choose another --out"),
        (("mlp", "--format", "pt2", "--out", "dangling"), "dangling exists already"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    inside: pytest.MonkeyPatch, work: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert message in _refused(inside, work, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mlp", "--format", "tflite"), "invalid choice 'tflite'"),
        (("mlp",), "--format"),
        (("mlp", "--format", "pt2", "--fp16"), "--fp16"),
    ],
)
def test_an_unreadable_command_line_is_one_line(
    work: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = in_process.run(cli.main, "kd", ("export", *arguments), work)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line


def test_an_unknown_format_lists_the_known_ones(work: Path) -> None:
    options: Any = ExportOptions(work / "mlp", "tflite")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"unknown format 'tflite'.*known: onnx, pt2, safe"):
        export.export(options)


@pytest.mark.parametrize("package", export_formats.ONNX_PACKAGES)
def test_a_missing_package_is_named_with_its_remedy(
    inside: pytest.MonkeyPatch, work: Path, package: str
) -> None:
    find = importlib.util.find_spec
    inside.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    line = _refused(inside, work, "mlp", "--format", "onnx")
    assert "pip install 'dsdistill[onnx]'" in line
    assert package in line


def test_a_network_too_large_for_an_onnx_file_is_refused(
    inside: pytest.MonkeyPatch, work: Path
) -> None:
    inside.setattr(export_formats, "MAX_ONNX_BYTES", 1000)
    line = _refused(inside, work, "mlp", "--format", "onnx")
    assert "must be smaller than 1000 bytes, and the weights of mlp:8 have 2728" in line


@pytest.mark.parametrize("at", [1, 2])
def test_a_full_disk_leaves_nothing(inside: pytest.MonkeyPatch, work: Path, at: int) -> None:
    write, calls = files.write_bytes, []

    def full(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == at:
            raise OSError(28, "No space left on device")
        write(path, content)

    inside.setattr(files, "write_bytes", full)
    assert "No space left on device" in _refused(inside, work, "mlp", "--format", "safetensors")


def test_an_interruption_leaves_nothing(inside: pytest.MonkeyPatch, work: Path) -> None:
    def stop(outputs: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    _reads(inside, stop)
    assert _refused(inside, work, "mlp", "--format", "pt2") == "kd: interrupted"


HOSTILE = (
    *("..", "nul\0here", "half \ud800", "$a$b$", "[/x]", "\u202egpj", "line\nbreak", "x" * 300),
    *("';rm -r x;'", "名前"),
)


@pytest.mark.parametrize("form", ["onnx", "pt2", "safetensors", "timm"])
def test_class_names_are_text_and_nothing_else(
    inside: pytest.MonkeyPatch, tmp_path: Path, form: str
) -> None:
    name = "test_resnet" if form == "timm" else "mlp:8"
    _save(tmp_path / "run", name, "standardise", classes=HOSTILE)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / f"net.{form}"
    _main(inside, tmp_path / "run", "--format", form, "--out", out)
    beside = [f"net.{form}.json"] if form == "onnx" else []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"net.{form}", *beside]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]
    if form == "onnx":
        assert tuple(_card_of(onnxruntime.InferenceSession(str(out)))["classes"]) == HOSTILE
    elif form == "pt2":
        extra = {export_formats.CARD_FILE: ""}
        torch.export.load(out, extra_files=extra)
        assert tuple(json.loads(extra[export_formats.CARD_FILE])["classes"]) == HOSTILE
        assert tuple(exported.load(out, (8, 8, 1)).card["classes"]) == HOSTILE
    elif form == "safetensors":
        assert saved_models.load_run(out).classes == HOSTILE
    else:
        made: Any = timm.create_model(f"local-dir:{out}", pretrained=True)
        assert tuple(made.pretrained_cfg["label_names"]) == HOSTILE


def test_headers_take_what_is_no_text() -> None:
    """A path of bytes that are no UTF-8 is a part of a student's name."""
    texts = export_formats.header_strings({"student": "local-dir:/a\udcff", "classes": ["\ud800"]})
    assert texts == {"student": "local-dir:/a\\udcff", "classes": '["\\ud800"]'}
    onnx.helper.set_model_props(onnx.ModelProto(), texts)


def test_a_pt2_file_does_not_say_where_its_code_lay(inside: pytest.MonkeyPatch, work: Path) -> None:
    _main(inside, "resnet", "--format", "pt2", "--out", "plain.pt2")
    content = (work / "plain.pt2").read_bytes()
    assert str(Path(timm.__file__).parent).encode() not in content
    assert b"stack_trace" not in content


@pytest.mark.parametrize("student", ["convnet", "mlp", "zca", "resnet", "vit"])
def test_every_student_can_be_a_program(
    inside: pytest.MonkeyPatch, work: Path, tmp_path: Path, student: str
) -> None:
    _main(inside, student, "--format", "pt2", "--out", tmp_path / "a.pt2")
    program = exported.load(tmp_path / "a.pt2", (8, 8, 1))
    with torch.no_grad():
        got = program.network(_nchw(_images())).numpy()
    np.testing.assert_allclose(got, _outputs(work / student, _images()), atol=ROUNDING)


def test_what_cannot_be_placed_leaves_nothing(inside: pytest.MonkeyPatch, work: Path) -> None:
    rename, calls = os.rename, []

    def fail(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(13, "Permission denied")
        rename(source, target)

    inside.setattr(os, "rename", fail)
    assert "Permission denied" in _refused(inside, work, "mlp", "--format", "onnx")
    assert [path.name for path in calls] == ["mlp-8.onnx.json", "mlp-8.onnx"]


def test_a_second_export_does_not_replace_the_first(
    inside: pytest.MonkeyPatch, work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "down" / "mlp.pt2"
    _main(inside, "mlp", "--format", "pt2", "--out", out)
    before = out.read_bytes()
    line = _refused(inside, work, "mlp", "--format", "pt2", "--out", out)
    assert f"{out} exists already: choose another --out" in line
    assert out.read_bytes() == before
    assert out.stat().st_mode & 0o044 == 0o044  # others may read it
