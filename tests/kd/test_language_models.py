"""Language models from folders, fresh ones, and what they give for a batch."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from dsdistill.harness.errors import UserError
from kd.models.language import blocks, transformer
from kd.models.language.language_model import LanguageModel
from kd.models.token_inputs import TokenInputs

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
IDS = torch.tensor([[2, 5, 6, 3, 7, 3], [2, 8, 3, 9, 3, 0]])
INPUTS = TokenInputs(IDS, IDS > 0, torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]))


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A BERT that predicts hidden tokens, with a vocabulary padded to 24, saved to a folder."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("bert")
    transformers.BertForMaskedLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@torch.no_grad()
@pytest.mark.parametrize(
    ("task", "classes", "shape"),
    [
        ("classify", ("neg", "pos"), (2, 2)),
        ("regress", (), (2, 1)),
        ("tag", ("B", "I", "O"), (2, 6, 3)),
        ("mlm", (), (2, 6, 15)),
    ],
)
def test_a_folder_gives_a_model_of_each_task(folder, tokenizer, task, classes, shape):
    model = transformer.load(folder, task, classes, tokenizer).eval()
    assert model(INPUTS).shape == shape
    assert bool(model.notes) == (task != "mlm")  # a new head
    again = transformer.rebuild(model.config, task, tokenizer).eval()
    again.network.load_state_dict(model.network.state_dict())
    torch.testing.assert_close(again(INPUTS), model(INPUTS))


@torch.no_grad()
def test_types_and_padding_reach_the_network(folder, tokenizer):
    model = transformer.load(folder, "classify", ("a", "b"), tokenizer).eval()
    without = TokenInputs(INPUTS.ids, INPUTS.mask, None)
    assert not torch.equal(model(INPUTS), model(without))
    alone = TokenInputs(IDS[1:, :5], IDS[1:, :5] > 0, INPUTS.types[1:, :5])
    torch.testing.assert_close(model(INPUTS)[1:], model(alone))


def test_the_names_of_the_classes_are_in_the_configuration(folder, tokenizer):
    model = transformer.load(folder, "classify", ("neg", "pos"), tokenizer)
    assert model.network.config.id2label == {0: "neg", 1: "pos"}
    assert model.config["label2id"] == {"neg": 0, "pos": 1}


def test_a_fresh_bert_has_the_named_size_and_a_function_of_the_seed(tokenizer):
    options = {"task": "classify", "classes": ("a", "b"), "tokenizer": tokenizer, "positions": 16}
    model = transformer.fresh("bert:3x24", seed=1, **options)
    config = model.network.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 24, 12)
    same = transformer.fresh("bert:3x24", seed=1, **options)
    other = transformer.fresh("bert:3x24", seed=2, **options)
    pairs = [list(m.network.state_dict().values()) for m in (model, same, other)]
    assert all(torch.equal(a, b) for a, b in zip(pairs[0], pairs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(pairs[0], pairs[2], strict=True))
    assert (
        transformer.fresh("bert:1x20", seed=0, **options).network.config.num_attention_heads == 10
    )


def test_some_blocks_of_a_model(folder, tokenizer):
    model = transformer.load(folder, "classify", ("a", "b"), tokenizer)
    smaller = transformer.keep_blocks(model, [1], "classify", tokenizer)
    assert smaller.config["num_hidden_layers"] == 1
    assert smaller(INPUTS).shape == (2, 2)


@pytest.mark.parametrize("name", ["bert:4", "bert:0x8", "bert:4x", "bert:fourx8"])
def test_other_names_of_a_fresh_bert_are_refused(tokenizer, name):
    with pytest.raises(UserError, match="as bert:4x312"):
        transformer.fresh(name, "classify", ("a", "b"), tokenizer, seed=0, positions=8)


def test_a_folder_without_the_weights_of_its_blocks_is_refused(folder, tokenizer, tmp_path):
    model = transformers.BertForMaskedLM.from_pretrained(folder)
    model.config.num_hidden_layers = 3
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no weights for 16 tensors, such as bert\.encoder"):
        transformer.load(str(tmp_path), "classify", ("a", "b"), tokenizer)
    with pytest.raises(UserError, match="there is no folder"):
        transformer.load(str(tmp_path / "none"), "classify", ("a", "b"), tokenizer)


def test_types_reach_only_networks_with_an_embedding_for_each():
    sizes = {"vocab_size": 15, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    for kinds in (1, 2):
        config = transformers.RobertaConfig(**sizes, pad_token_id=0, type_vocab_size=kinds)
        network = LanguageModel(transformers.RobertaForMaskedLM(config))
        assert network.takes_types == (kinds == 2)
        assert network(INPUTS).shape == (2, 6, 15)


def test_blocks_that_could_not_be_loaded_again_are_refused() -> None:
    """ModernBERT's first block has no norm in front of its attention."""
    config = transformers.ModernBertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    network = transformers.ModernBertForSequenceClassification(config)
    settings = json.loads(config.to_json_string(use_diff=False))
    model = LanguageModel(network, config=settings)
    tokenizer = SimpleNamespace(pad_token_id=0)
    kept = transformer.keep_blocks(model, [0, 2], "classify", tokenizer)
    assert len(blocks.find(kept.network)[1]) == 2
    with pytest.raises(UserError, match=r"norm\.weight is not in each"):
        transformer.keep_blocks(model, [1, 2], "classify", tokenizer)
