"""`kd train --quantize`, `kd quantize`, and what the other commands make of quantised students."""

import json
import shutil
from pathlib import Path
from typing import Any

import kd_support as support
import onnx
import pytest
import safetensors.torch
import torch
from kd_support import main, refused, stop_in
from torch import Tensor

from dsdistill.harness.data import preprocess
from kd.data import data_source
from kd.exports import quantised_file, quantised_formats
from kd.models import networks, saved_models, seals
from kd.models.quantised import quantised_network
from kd.models.quantised.bit_widths import BitWidths
from kd.models.saved_models import Model
from kd.runs import run_data

FLOAT = ("digits", "--student", "convnet:8", "--epochs", 3, "--seed", 1)
QUICK = ("digits", "--student", "float", "--epochs", 1)
NO_FILE = "kd.exports.quantised_file.figures"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained student, and one of the same with codes."""
    folder = tmp_path_factory.mktemp("quantised")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("kd.runs.curves.draw", lambda folder: None)
        patch.setattr(NO_FILE, lambda *parts: {})
        main(patch, "train", *FLOAT, "--out", "float")
        main(patch, "train", *QUICK, "--quantize", "w4a4", "--ema", 0.9, "--out", "w4a4")
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    monkeypatch.setattr(NO_FILE, lambda *parts: {})
    return monkeypatch


def _weights(folder: str) -> dict[str, Tensor]:
    names = (seals.WEIGHTS, seals.QUANTISERS)
    loaded = (safetensors.torch.load_file(Path(folder, name)) for name in names)
    return {f"{i} {k}": v for i, state in enumerate(loaded) for k, v in state.items()}


def test_a_trained_student_learns_from_its_own_copy(work: Path) -> None:
    config = json.loads((work / "w4a4/config.json").read_text())
    report = support.read_report(work / "w4a4")
    assert config["teacher"] == config["student"] == str(work / "float")
    assert report["quantized"] == {
        "bits": "w4a4",
        "full_range": False,
        "method": "training",
        "layers": 4,
        "share": pytest.approx(1304 / 1386),
    }
    assert report["parameters"] == 1386  # learned steps are none
    assert report["recipe"]["lr"] == 0.005
    assert report["recipe"]["warmup"] == 0
    assert "latency_ms_batch_1" not in report  # of rounding in float32, which nobody deploys


def test_the_stored_student_has_plain_weights_and_the_codes_it_was_trained_with(work: Path) -> None:
    plain = safetensors.torch.load_file(work / "float" / seals.WEIGHTS)
    stored = safetensors.torch.load_file(work / "w4a4" / seals.WEIGHTS)
    assert stored.keys() == plain.keys()
    model = saved_models.load_run(work / "w4a4")
    assert model.bits == BitWidths(4, 4)
    layers = quantised_network.quantised_layers(model.classifier.network)
    codes = [[q.codes[1] for q in quantised_network.quantisers(m)] for m in layers.values()]
    assert [high for high, _ in codes] == [63, 7, 7, 63]
    weight = layers["4"].weight
    step = quantised_network.quantisers(layers["4"])[0].step.detach()
    codes_of_weight = weight / step.view(-1, 1, 1, 1)
    assert torch.allclose(codes_of_weight, codes_of_weight.round())


def test_evaluate_repeats_the_figures_of_the_training(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], work: Path
) -> None:
    main(inside, "evaluate", "w4a4", "--json")
    figures = json.loads(capsys.readouterr().out)
    report = support.read_report(work / "w4a4")
    assert figures["accuracy"] == report["test_accuracy"]
    assert figures["teacher_agreement"] == report["teacher_agreement"]
    assert "latency_ms_batch_1" not in figures


def test_a_training_that_was_stopped_goes_on_to_the_same_bits(inside: pytest.MonkeyPatch) -> None:
    options = ("--quantize", "w4a4", "--ema", 0.9, "--out", "stopped")
    inside.setattr("kd.training.saving.SECONDS_TO_FIRST_CHECKPOINT", 1e9)
    stop_in(inside, 9, "train", *QUICK, *options)
    main(inside, "train", "--resume", "--out", "stopped")
    whole, resumed = _weights("w4a4"), _weights("stopped")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_labels_alone_and_other_teachers(inside: pytest.MonkeyPatch) -> None:
    short = ("digits", "--steps", 2, "--quantize", "w2a2", "--full-range")
    main(inside, "train", *short, "--student", "float", "--loss", "ce:1", "--out", "labels")
    assert support.read_report(Path("labels"))["teacher"] is None
    main(inside, "train", *short, "--student", "mlp:8", "--teacher", "w4a4", "--out", "taught")
    assert support.read_report(Path("taught"))["teacher"] == "w4a4"
    main(inside, "train", *short, "--student", "labels", "--out", "again")
    assert support.read_report(Path("again"))["teacher"] is None  # `labels` has no float copy
    assert saved_models.load_run(Path("again")).bits == BitWidths(2, 2, full_range=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", *QUICK, "--full-range"), "--full-range needs --quantize"),
        (("train", *QUICK, "--quantize", "int8"), "--quantize must be wNaM"),
        (("train", *QUICK, "--quantize", "w4a4", "--peers", "mlp:8"), "leave --peers out"),
        (("train", *QUICK, "--quantize", "w4a4", "--generations", 2), "leave --generations out"),
        (("train", *QUICK, "--quantize", "w4a4", "--centred"), "does not go with --centred"),
        (("train", "digits", "--student", "w4a4"), "add --quantize w4a4 to train it further"),
        (("quantize", "w4a4"), "is quantised already, with w4a4"),
        (("quantize", "float", "--bits", "w4"), "--bits must be wNaM"),
        (("quantize", "float", "--images", 0), "--images must be at least 1, got 0"),
        (("quantize", "float", "--out", "w4a4"), "already holds a finished run"),
        (("quantize", "nothing"), "holds no finished student"),
        (("export", "w4a4", "--format", "timm"), "timm has no quantised networks"),
    ],
)
def test_what_does_not_go_is_refused_and_writes_nothing(
    inside: pytest.MonkeyPatch, work: Path, arguments: tuple[Any, ...], said: str
) -> None:
    before = sorted(work.rglob("*"))
    assert said in refused(inside, *arguments)
    assert sorted(work.rglob("*")) == before


def test_texts_are_refused(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "good\t1\nbad\t0\n" * 20)
    said = refused(inside, "train", tmp_path, "--student", "bilstm:4", "--quantize", "w8a8")
    assert "--quantize" in said


def test_damaged_quantisers_are_named(inside: pytest.MonkeyPatch, work: Path) -> None:
    shutil.copytree(work / "w4a4", "damaged")
    path = Path("damaged", seals.QUANTISERS)
    path.write_bytes(path.read_bytes()[:100])
    said = refused(inside, "export", "damaged", "--format", "safetensors")
    assert "quantisers.safetensors is damaged" in said
    shutil.rmtree("damaged")


def test_outputs_are_reordered_with_their_steps(work: Path) -> None:
    model = saved_models.load_run(work / "w4a4")
    model.classifier.eval()
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    order = tuple(reversed(range(10)))
    expected = model.classifier(images)[:, list(order)]
    saved_models.reorder_outputs("it", model.classifier, order, model.shape)
    assert torch.allclose(model.classifier(images), expected, atol=1e-6)


def test_calibration_alone_makes_a_run_for_the_other_commands(
    inside: pytest.MonkeyPatch, work: Path
) -> None:
    main(inside, "quantize", "float", "--bits", "w8a8", "--images", 100, "--out", "w8a8")
    report, plain = support.read_report(Path("w8a8")), support.read_report(Path("float"))
    assert report["quantized"]["method"] == "calibration"
    assert abs(report["test_accuracy"] - plain["test_accuracy"]) < 0.03
    config = json.loads(Path("w8a8/config.json").read_text())
    assert config["run"] == str(work / "float")
    assert config["seed"] == 1
    report |= {"file": {"test_accuracy": 0.43, "bytes": 20000, "latency_ms_batch_1": 0.5}}
    report |= {"float_file": {"test_accuracy": 0.44, "bytes": 70000, "latency_ms_batch_1": 0.6}}
    seals.write(Path("w8a8"), seals.REPORT, report, seals.SEALED_FILES)
    main(inside, "report", "float", "w8a8", "w4a4", "--out", "page.html")
    page = Path("page.html").read_text()
    assert "Quantised students" in page
    assert "after training" in page
    assert "70,000" in page
    assert f"kd quantize {work / 'float'} --images 100" in page
    said = refused(inside, "train", "--resume", "--out", "w8a8", "--epochs", 3)
    assert "holds a run of another command" in said


def _student(name: str, bits: BitWidths, shape: saved_models.Shape = (8, 8, 1)) -> Model:
    """A student with calibrated codes, and batch norms unlike their initial values."""
    classifier = networks.build(name, shape, 10, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, value in classifier.network.state_dict().items():
            if value.is_floating_point() and "weight" not in key:
                value += 0.3 * torch.rand(value.shape, generator=generator)
    images = torch.rand(100, shape[2], *shape[:2], generator=generator)
    quantised_network.quantise(classifier.eval().network, classifier, [images], bits)
    classes = tuple(map(str, range(10)))
    return Model(classifier, name, classes, shape, preprocess.identity(1), bits=bits)


def _export(inside: pytest.MonkeyPatch, student: Model, folder: Path, file_format: str) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    saved_models.save_run(folder, student)
    (folder / "config.json").write_text(json.dumps({"data": "digits"}))
    main(inside, "export", folder, "--format", file_format, "--out", folder / "file")
    return folder / "file"


@pytest.mark.parametrize("bits", [BitWidths(8, 8), BitWidths(2, 4)])
def test_the_onnx_file_has_codes_and_no_batch_norm(
    inside: pytest.MonkeyPatch, tmp_path: Path, bits: BitWidths
) -> None:
    student = _student("small-vgg11:8", bits)
    path = _export(inside, student, tmp_path / "run", "onnx")
    graph = onnx.load(path).graph
    operators = [node.op_type for node in graph.node]
    layers = len(quantised_network.quantised_layers(student.classifier.network))
    assert operators.count("QuantizeLinear") == layers
    assert operators.count("DequantizeLinear") == 2 * layers
    assert "BatchNormalization" not in operators
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    kinds = [
        tensors[node.input[0]].data_type
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors
    ]
    few = onnx.TensorProto.INT8 if bits.weights == 8 else onnx.TensorProto.INT4
    assert kinds == [onnx.TensorProto.INT8, *[few] * (layers - 2), onnx.TensorProto.INT8]
    card = json.loads(path.with_name("file.json").read_text())
    assert card["quantized"]["bits"] == bits.text
    agreement = card["check"]["quantised"]
    assert agreement["median_difference"] <= agreement["median_tolerance"]
    assert agreement["default_argmax_agreement"] >= 0.99


def test_the_pt2_program_has_codes(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    path = _export(inside, _student("mlp:8", BitWidths(4, 4)), tmp_path / "run", "pt2")
    program = torch.export.load(path)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {n for n in names if n.startswith("quantized_decomposed")} == {
        "quantized_decomposed.quantize_per_tensor.default",
        "quantized_decomposed.dequantize_per_tensor.default",
        "quantized_decomposed.dequantize_per_channel.default",
    }
    stored = [value for value in program.state_dict.values() if value.dtype == torch.int8]
    assert len(stored) >= 3


def test_saturated_sums_are_caught_and_named(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_onnx = quantised_formats.run_onnx

    def saturating(path: Path, name: str, *, optimised: bool = True, precise: bool = False) -> Any:
        run = run_onnx(path, name, optimised=optimised, precise=precise)
        if not optimised or precise:
            return run
        return lambda images: run(images) * 0.86  # 14 % of the range, and every class right

    inside.setattr(quantised_formats, "run_onnx", saturating)
    student = _student("mlp:8", BitWidths(8, 8, full_range=True))
    with pytest.raises(SystemExit) as stopped:
        _export(inside, student, tmp_path / "run", "onnx")
    said = str(stopped.value.code)
    assert "this CPU has no VNNI" in said
    assert "without --full-range" in said
    assert "100.0 % of the images keep their class" in said
    assert not (tmp_path / "run/file").exists()


def test_the_file_is_measured_beside_the_one_in_float32(work: Path) -> None:
    student = saved_models.load_run(work / "w4a4")
    original = saved_models.load_run(work / "float")
    source = data_source.resolve("digits", root=Path("unused"))
    recipe = run_data.read_recipe(work / "w4a4")
    measured = quantised_file.figures(student, original, source, recipe)
    for key, folder in (("file", "w4a4"), ("float_file", "float")):
        expected = support.read_report(work / folder)["test_accuracy"]
        assert measured[key]["test_accuracy"] == pytest.approx(expected, abs=1 / 359)
        assert measured[key]["latency_ms_batch_1"] > 0
        assert measured[key]["bytes"] > 0
