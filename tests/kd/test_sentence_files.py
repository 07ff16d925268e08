"""Folders of sentence-transformers: read, written, and refused."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from text_support import bert_folder

from dsdistill.harness.errors import UserError
from kd.models.language import sentence_files, trained_models
from kd.models.language.sentence_encoder import EmbeddingHead, LinearLayer
from kd.models.token_inputs import TokenInputs

OLD, NEW = "sentence_transformers.models.", "sentence_transformers.base.modules.dense."
IDS = torch.tensor([[2, 5, 6, 3]])


def write(path, *modules: tuple[str, dict | None]):
    """A folder with the configurations of modules after a transformer."""
    listed = [{"idx": 0, "name": "0", "path": "", "type": f"{OLD}Transformer"}]
    for i, (kind, config) in enumerate(modules, start=1):
        folder = f"{i}_{kind.rpartition('.')[2]}"
        listed.append({"idx": i, "name": str(i), "path": folder, "type": kind})
        (path / folder).mkdir(parents=True)
        if config is not None:
            (path / folder / "config.json").write_text(json.dumps(config))
    (path / "modules.json").write_text(json.dumps(listed))
    return path


def pooling(**modes: bool) -> tuple[str, dict]:
    config = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": False}
    return f"{OLD}Pooling", config | {f"pooling_mode_{k}": v for k, v in modes.items()}


def dense(activation: str = "linear.Identity", **more) -> tuple[str, dict]:
    config = {"in_features": 16, "out_features": 3, "bias": True}
    return f"{NEW}Dense", config | {"activation_function": f"torch.nn.modules.{activation}"} | more


def test_a_folder_of_any_version_of_the_library(tmp_path):
    old = write(tmp_path / "old", pooling(cls_token=True), (f"{OLD}Normalize", None))
    assert sentence_files.read_head(str(old)).head == EmbeddingHead("cls", (), True)
    new = {"embedding_dimension": 16, "pooling_mode": "max", "include_prompt": True}
    path = write(tmp_path / "new", ("a.b.c.Pooling", new), dense("activation.Tanh"))
    expected = EmbeddingHead("max", (LinearLayer(16, 3, activation="tanh"),))
    assert sentence_files.read_head(str(path)).head == expected


def test_a_plain_transformer_takes_the_mean(tmp_path):
    assert sentence_files.read_head(str(tmp_path)).head == EmbeddingHead("mean")


def test_a_teacher_of_the_library_with_its_weights(tmp_path):
    bert_folder(tmp_path, "Model")
    write(tmp_path, pooling(mean_tokens=True), dense(), (f"{OLD}Normalize", None))
    rng = np.random.default_rng(0)
    weight, bias = (rng.normal(size=size).astype(np.float32) for size in ((3, 16), (3,)))
    tensors = {"linear.weight": weight, "linear.bias": bias}
    safetensors.numpy.save_file(tensors, tmp_path / "2_Dense" / "model.safetensors")
    model = trained_models.load(f"hf:{tmp_path}", "embed", ())
    with torch.no_grad():
        given = model.network.eval()(TokenInputs(IDS, IDS > 0)).numpy()[0]
        states = model.network.network.encoder(IDS).last_hidden_state.numpy()[0]
    expected = weight @ states.mean(0) + bias
    np.testing.assert_allclose(given, expected / np.linalg.norm(expected), atol=1e-6)


def test_what_is_written_is_read(tmp_path):
    bert_folder(tmp_path / "first", "Model")
    write(tmp_path / "first", pooling(max_tokens=True), dense("activation.Tanh"), dense())
    for folder, width in (("2_Dense", 16), ("3_Dense", 16)):
        tensors = {"linear.weight": np.ones((3, width), np.float32)}
        tensors["linear.bias"] = np.arange(3, dtype=np.float32)
        safetensors.numpy.save_file(tensors, tmp_path / "first" / folder / "model.safetensors")
    config = json.loads((tmp_path / "first/3_Dense/config.json").read_text())
    (tmp_path / "first/3_Dense/config.json").write_text(json.dumps(config | {"in_features": 3}))
    tensors["linear.weight"] = np.eye(3, dtype=np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "first/3_Dense/model.safetensors")
    model = trained_models.load(f"hf:{tmp_path / 'first'}", "embed", ())
    second = tmp_path / "second"
    model.tokenizer.save_pretrained(second)
    model.network.network.encoder.save_pretrained(second)
    sentence_files.write(second, model.network.network, 12)
    again = trained_models.load(f"hf:{second}", "embed", ())
    assert again.network.network.head == model.network.network.head
    inputs = TokenInputs(IDS, IDS > 0)
    with torch.no_grad():
        assert torch.equal(again.network.eval()(inputs), model.network.eval()(inputs))
    types = [
        x["type"].rpartition(".")[2] for x in json.loads((second / "modules.json").read_text())
    ]
    assert types == ["Transformer", "Pooling", "Dense", "Dense"]
    assert json.loads((second / "sentence_bert_config.json").read_text())["max_seq_length"] == 12


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([pooling(weightedmean_tokens=True)], "pools by pooling_mode_weightedmean_tokens"),
        ([pooling(mean_tokens=True, max_tokens=True)], "pools by mean and max"),
        (
            [pooling(cls_token=True), (f"{OLD}LSTM", {})],
            "modules Transformer, Pooling, LSTM",
        ),
        ([pooling(cls_token=True), dense("activation.GELU")], "known are Identity and Tanh"),
        ([pooling(cls_token=True), dense(use_residual=True)], "a Dense layer with a residual"),
        ([(f"{OLD}Pooling", None)], "has no 1_Pooling/config.json"),
    ],
)
def test_what_is_not_known_is_one_line(tmp_path, modules, message):
    with pytest.raises(UserError, match=message) as refusal:
        sentence_files.read_head(str(write(tmp_path, *modules)))
    assert "\n" not in str(refusal.value)


def test_missing_weights_of_a_layer_are_one_line(tmp_path):
    bert_folder(tmp_path, "Model")
    write(tmp_path, pooling(cls_token=True), dense())
    with pytest.raises(UserError, match=r"has no 2_Dense/model\.safetensors"):
        trained_models.load(f"hf:{tmp_path}", "embed", ())
