"""Encoders of texts: pooling, linear layers, length 1, and what of them is carried over."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from text_support import bert_folder
from torch import Tensor

from dsdistill.harness.errors import UserError
from kd.data import teacher_cache
from kd.models.language import (
    saved_text_models,
    sentence_encoder,
    text_students,
    text_teachers,
    trained_models,
)
from kd.models.language.sentence_encoder import EmbeddingHead, LinearLayer, SentenceEncoder
from kd.models.language.text_model import TextModel
from kd.models.token_inputs import TokenInputs

IDS = torch.tensor([[2, 5, 6, 3, 7, 3], [2, 8, 3, 0, 0, 0]])
INPUTS = TokenInputs(IDS, IDS > 0)
LONGER = torch.cat([IDS, torch.zeros(2, 4, dtype=torch.long)], dim=1)
HEADS = (
    EmbeddingHead("mean", (), True),
    EmbeddingHead("cls", (LinearLayer(16, 5, activation="tanh"),)),
    EmbeddingHead("max", (LinearLayer(16, 7, bias=False), LinearLayer(7, 3)), True),
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    """A plain encoder of 16 values."""
    return "hf:" + bert_folder(tmp_path_factory.mktemp("plain") / "bert", "Model")


def encoder(plain: str, head: EmbeddingHead | None = None) -> TextModel:
    model = trained_models.load(plain, "embed", ())
    if head is not None:
        assert isinstance(model.network.network, SentenceEncoder)
        torch.manual_seed(1)
        network = SentenceEncoder(model.network.network.encoder, head)
        inner = model.network.config["encoder"]
        config = sentence_encoder.describe(network, inner)
        wrapped = type(model.network)(network, config=config)
        model = replace(model, network=wrapped)
    return model


@torch.no_grad()
def embed(model: TextModel, inputs: TokenInputs = INPUTS) -> Tensor:
    return model.network.eval()(inputs)


@torch.no_grad()
def states(model: TextModel) -> np.ndarray:
    network = model.network.network.eval().encoder
    return network(IDS, attention_mask=(IDS > 0).long()).last_hidden_state.numpy()


@pytest.mark.parametrize("head", HEADS)
def test_embeddings_are_those_of_the_steps_by_hand(plain, head):
    model = encoder(plain, head)
    expected = []
    for row, length in zip(states(model), (6, 3), strict=True):
        tokens = row[:length]
        pooled = {"mean": tokens.mean(0), "cls": tokens[0], "max": tokens.max(0)}[head.pooling]
        for layer, step in zip(model.network.network.layers, head.layers, strict=True):
            pooled = layer.weight.detach().numpy() @ pooled
            pooled = pooled + layer.bias.detach().numpy() if step.bias else pooled
            pooled = np.tanh(pooled) if step.activation == "tanh" else pooled
        expected.append(pooled / np.linalg.norm(pooled) if head.normalise else pooled)
    np.testing.assert_allclose(embed(model), np.stack(expected), atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_padding_never_counts(plain, head):
    model = encoder(plain, head)
    longer = embed(model, TokenInputs(LONGER, LONGER > 0))
    torch.testing.assert_close(longer, embed(model), atol=1e-6, rtol=1e-5)
    alone = embed(model, TokenInputs(IDS[1:, :3], IDS[1:, :3] > 0))
    torch.testing.assert_close(alone, embed(model)[1:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_a_saved_run_gives_the_same_embeddings(plain, tmp_path, head):
    model = encoder(plain, head)
    saved_text_models.save_run(tmp_path, model)
    again = saved_text_models.load_run(tmp_path)
    assert again.network.network.head == head
    assert torch.equal(embed(again), embed(model))


def test_a_copy_of_all_blocks_embeds_as_its_teacher(plain):
    student = text_students.build("teacher", "embed", (), teacher=plain, keep_layers=(0, 1))
    torch.testing.assert_close(embed(student), embed(encoder(plain)))
    one = text_students.build("teacher", "embed", (), teacher=plain, keep_layers=(1,))
    assert not torch.allclose(embed(one), embed(encoder(plain)), atol=1e-2)


@pytest.mark.parametrize("name", ["bert:2x8", "bilstm:6"])
def test_a_student_of_another_width_has_the_teachers(plain, tmp_path, name):
    teacher = encoder(plain, HEADS[2])
    saved_text_models.save_run(tmp_path, teacher)
    student = text_students.build(name, "embed", (), teacher=str(tmp_path))
    embeddings = embed(student)
    assert embeddings.shape == (2, 3)
    assert student.embedding_width == teacher.embedding_width == 3
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))  # as the teacher's
    if name == "bert:2x8":
        assert student.network.network.head.layers == (LinearLayer(8, 3),)
        assert "8 values to the teacher's 3" in student.network.notes[-1]


def test_a_student_of_the_same_width_keeps_its_layers(plain, tmp_path):
    model = encoder(plain, HEADS[1])
    saved_text_models.save_run(tmp_path, model)
    student = text_students.build(str(tmp_path), "embed", (), teacher=str(tmp_path))
    assert torch.equal(embed(student), embed(model))


def test_the_pooler_is_kept_and_not_trained(plain):
    network = encoder(plain).network.network
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert {name for name, _ in network.named_parameters()} - trained == {
        "encoder.pooler.dense.weight",
        "encoder.pooler.dense.bias",
    }


def test_a_classifier_embeds_by_the_mean_of_its_tokens(plain, tmp_path):
    classifier = text_students.build(plain, "classify", ("neg", "pos"))
    saved_text_models.save_run(tmp_path, classifier)
    model = trained_models.load(str(tmp_path), "embed", ())
    assert model.network.untrained == ()
    torch.testing.assert_close(embed(model), embed(encoder(plain)))


def test_a_classifier_starts_from_an_encoder(plain, tmp_path):
    saved_text_models.save_run(tmp_path, encoder(plain, HEADS[1]))
    classifier = text_students.build(str(tmp_path), "classify", ("neg", "pos"))
    body = classifier.network.network.bert.state_dict()
    for name, weight in encoder(plain).network.network.encoder.state_dict().items():
        assert torch.equal(body[name], weight)
    assert classifier.network.untrained == ("classifier.bias", "classifier.weight")


def test_what_changes_embeddings_changes_the_fingerprint_of_a_teacher(plain, tmp_path):
    prints = set()
    for number, head in enumerate((EmbeddingHead(), EmbeddingHead("max"), HEADS[0])):
        (tmp_path / str(number)).mkdir()
        saved_text_models.save_run(tmp_path / str(number), encoder(plain, head))
        teacher = text_teachers.load(str(tmp_path / str(number)), encoder(plain), ())
        prints.add(teacher_cache.fingerprint(teacher))
    assert len(prints) == 3


def test_a_bilstm_of_another_width_is_refused(plain, tmp_path):
    student = text_students.build("bilstm:6", "embed", (), teacher=plain)
    saved_text_models.save_run(tmp_path, student)
    other = tmp_path / "other"
    other.mkdir()
    saved_text_models.save_run(other, encoder(plain, HEADS[2]))
    with pytest.raises(UserError, match="of 16 values, and the teacher's have 3"):
        text_students.build(str(tmp_path), "embed", (), teacher=str(other))
