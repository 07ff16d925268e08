"""Layers of transformers of texts by their numbers, and the input of their classifiers."""

import pytest
import text_terms_support as support
import torch
import transformers

from dsdistill.harness.errors import UserError
from kd.models.language.language_model import LanguageModel
from kd.objectives.taps import Taps, as_vector, probe

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24,
         "num_hidden_layers": 3, "max_position_embeddings": 32, "pad_token_id": 0}  # fmt: skip
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=32, dim=16, n_heads=4, hidden_dim=24, n_layers=3
    ),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SIZES),
    "electra": lambda: transformers.ElectraConfig(**SIZES, embedding_size=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_head=4, n_layer=3, pad_token_id=0
    ),
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
}
INPUTS = support.batch().inputs


@pytest.fixture(params=CONFIGS)
def network(request):
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_config(CONFIGS[request.param]()).eval()


@torch.no_grad()
def test_blocks_and_embeddings_are_the_hidden_states_of_the_library(network):
    taps = Taps(network, ["embeddings", "0", "1", "-2"])
    options = {"attention_mask": INPUTS.mask.long(), "output_hidden_states": True}
    states = network(INPUTS.ids, **options).hidden_states
    features = taps.read()
    for name, number in (("embeddings", 0), ("0", 1), ("1", 2), ("-2", 2)):
        torch.testing.assert_close(features[name], states[number])


@torch.no_grad()
def test_the_embedding_is_the_input_of_the_classifier(network):
    model = LanguageModel(network)
    taps = Taps(network, ["embedding"])
    layout = probe(model, taps, INPUTS)["embedding"]
    assert layout.channels == 16
    logits = model(INPUTS)
    feature = taps.read()["embedding"]
    head = network.score if hasattr(network, "score") else network.classifier
    head = getattr(head, "out_proj", head)
    answers = head(feature)
    if answers.ndim == 3:  # a causal model answers after the last token
        answers = answers[torch.arange(len(INPUTS)), INPUTS.mask.sum(1) - 1]
    torch.testing.assert_close(answers, logits)
    vectors = as_vector(feature, layout, INPUTS.mask)
    if feature.ndim == 3:
        each = [x[mask].mean(0) for x, mask in zip(feature, INPUTS.mask, strict=True)]
        feature = torch.stack(each)
    torch.testing.assert_close(vectors, feature)


def test_a_block_that_is_not_there_is_refused(network):
    with pytest.raises(UserError, match="no block 3: its blocks are 0 to 2"):
        Taps(network, ["3"])


def test_a_layer_without_a_vector_for_each_token_is_refused():
    model = support.bert(2, 12, 3)
    name = "bert.embeddings.position_embeddings"
    with pytest.raises(UserError, match=r"neither tokens \(n, l, c\) nor a vector"):
        probe(model, Taps(model.network, [name]), INPUTS)
