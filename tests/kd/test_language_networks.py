"""The BiLSTM, and transformers with fewer blocks."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import rnn

from dsdistill.harness.errors import UserError
from kd.models.language import blocks
from kd.models.language.bilstm import BiLstm, with_scans

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.randint(5, 30, (3, 7), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([7, 2, 4])
MASK = (torch.arange(7) < LENGTHS[:, None]).long()


def test_bilstm_is_the_bidirectional_one_on_packed_texts():
    torch.manual_seed(0)
    network = BiLstm(30, 4, 12, pairs=False)
    whole = nn.LSTM(300, 12, batch_first=True, bidirectional=True)
    for name, ours in (("", network.forwards), ("_reverse", network.backwards)):
        for key, value in ours.named_parameters():
            getattr(whole, key + name).data.copy_(value)
    packed = rnn.pack_padded_sequence(
        network.embedding(IDS), LENGTHS, batch_first=True, enforce_sorted=False
    )
    _, (last, _) = whole(packed)
    features = torch.cat([last[0], last[1]], dim=-1)
    expected = network.classifier(torch.relu(network.hidden(features)))
    torch.testing.assert_close(network(IDS, MASK), expected)


def test_a_bilstm_of_scans_is_the_same_network():
    network = BiLstm(30, 4, 12, pairs=False)
    with torch.no_grad():
        torch.testing.assert_close(with_scans(network)(IDS, MASK), network(IDS, MASK))


def test_padding_changes_no_answer_of_the_bilstm():
    network = BiLstm(30, 4, 12, pairs=False)
    for i, length in enumerate(LENGTHS):
        alone = network(IDS[i : i + 1, :length], MASK[i : i + 1, :length])
        torch.testing.assert_close(network(IDS, MASK)[i : i + 1], alone)


def test_pairs_of_texts_are_compared():
    network = BiLstm(30, 1, 12, pairs=True)
    same = torch.tensor([[5, 6, 7, 5, 6, 7, 0]])
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 0]])
    mask = (same > 0).long()
    a = network._represent(same, mask.bool() & ~types.bool())
    b = network._represent(same, mask.bool() & types.bool())
    torch.testing.assert_close(a, b)
    swapped = torch.tensor([[8, 6, 7, 5, 6, 7, 0]])
    assert not torch.equal(network(same, mask, types), network(swapped, mask, types))


@pytest.fixture(params=["bert", "distilbert", "gpt2", "llama"])
def transformer(request):
    """A small random transformer of four blocks, with a head for three classes."""
    torch.manual_seed(0)
    configs = {
        "bert": lambda: transformers.BertConfig(**SIZES, num_hidden_layers=4, num_labels=3),
        "distilbert": lambda: transformers.DistilBertConfig(
            vocab_size=30, dim=16, n_heads=2, hidden_dim=24, n_layers=4, num_labels=3
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=30, n_embd=16, n_head=2, n_layer=4, num_labels=3, pad_token_id=0
        ),
        "llama": lambda: transformers.LlamaConfig(
            **SIZES, num_key_value_heads=2, num_hidden_layers=4, num_labels=3, pad_token_id=0
        ),
    }
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_config(configs[request.param]()).eval()


def test_all_blocks_kept_is_the_same_network(transformer):
    whole = blocks.keep(transformer, range(4))
    with torch.no_grad():
        torch.testing.assert_close(
            whole(IDS, attention_mask=MASK).logits,
            transformer(IDS, attention_mask=MASK).logits,
            rtol=0,
            atol=0,
        )


def test_a_copy_with_fewer_blocks_is_built_again_from_its_configuration(transformer):
    smaller = blocks.keep(transformer, [1, 3])
    name, kept = blocks.find(smaller)
    assert len(kept) == 2
    assert len(blocks.find(transformer)[1]) == 4
    for new, old in ((0, 1), (1, 3)):
        own = kept[new].state_dict()
        theirs = transformer.get_submodule(f"{name}.{old}").state_dict()
        assert all(torch.equal(own[key], theirs[key]) for key in theirs)
    again = transformers.AutoModelForSequenceClassification.from_config(smaller.config).eval()
    again.load_state_dict(smaller.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            again(IDS, attention_mask=MASK).logits, smaller(IDS, attention_mask=MASK).logits
        )


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([0, 4], "there are the blocks 0 to 3"),
        ([1, 1], "ascending numbers"),
        ([2, 1], "ascending numbers"),
        ([], "ascending numbers"),
        ([-1, 2], "the blocks 0 to 3"),
    ],
)
def test_blocks_that_are_not_there_are_refused(transformer, numbers, message):
    with pytest.raises(UserError, match=message):
        blocks.keep(transformer, numbers)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(UserError, match="no list of blocks"):
        blocks.keep(nn.Linear(2, 2), [0])
