"""Queries, keys and values of blocks, beside the attention that the library computes eagerly."""

import copy

import pytest
import torch
import transformers

from dsdistill.harness.errors import UserError
from kd.objectives.attention_taps import AttentionTaps

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
IDS = torch.randint(5, 30, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(7) < torch.tensor([7, 2, 4])[:, None]).long()
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES, num_hidden_layers=3),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=30, dim=16, n_heads=4, hidden_dim=24, n_layers=3
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=30, n_embd=16, n_head=4, n_layer=3),
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=3),
}


@pytest.fixture(params=CONFIGS)
def network(request):
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(CONFIGS[request.param]()).eval()


@torch.no_grad()
def test_outputs_are_the_same_to_the_bit(network):
    before = network(IDS, attention_mask=MASK).last_hidden_state
    taps = AttentionTaps(network, [0, -1])
    after = network(IDS, attention_mask=MASK).last_hidden_state
    assert torch.equal(before, after)
    assert sorted(taps.read()) == [0, 2]


@torch.no_grad()
def test_scores_give_the_probabilities_of_eager_attention(network):
    eager = copy.deepcopy(network)
    eager.set_attn_implementation("eager")
    expected = eager(IDS, attention_mask=MASK, output_attentions=True).attentions
    taps = AttentionTaps(network, range(3))
    network(IDS, attention_mask=MASK)
    causal = network.config.model_type in ("gpt2", "llama")
    allowed = MASK.bool()[:, None, None, :].expand(-1, 1, 7, -1)
    allowed = allowed & torch.ones(7, 7).tril().bool() if causal else allowed
    for number, attention in taps.read().items():
        scores = attention.scores.masked_fill(~allowed, float("-inf"))
        real = MASK.bool()[:, None, :, None]
        ours = scores.softmax(-1).nan_to_num() * real
        torch.testing.assert_close(ours, expected[number] * real, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_weights_through_the_scores(network):
    taps = AttentionTaps(network, [1])
    network(IDS, attention_mask=MASK)
    taps.read()[1].scores.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@torch.no_grad()
def test_a_copy_is_not_tapped_and_a_configuration_stays_plain(network):
    taps = AttentionTaps(network, [0])
    copy.deepcopy(network)(IDS, attention_mask=MASK)
    with pytest.raises(AssertionError, match="has not run"):
        taps.read()
    assert '"kd"' not in network.config.to_json_string(use_diff=False)
    del taps
    network(IDS, attention_mask=MASK)


@torch.no_grad()
def test_a_copy_of_network_and_taps_has_taps_of_its_own(network):
    pair = torch.nn.Module()
    pair.network, pair.taps = network, AttentionTaps(network, [1])
    twin = copy.deepcopy(pair)
    other = IDS.flip(0)
    twin.network(other, attention_mask=MASK.flip(0))
    network(IDS, attention_mask=MASK)
    scores, theirs = pair.taps.read()[1].scores, twin.taps.read()[1].scores
    torch.testing.assert_close(theirs, scores.flip(0))


@torch.no_grad()
def test_several_taps_read_one_block(network):
    first, second = AttentionTaps(network, [0]), AttentionTaps(network, [0, -3])
    network(IDS, attention_mask=MASK)
    assert torch.equal(first.read()[0].query, second.read()[0].query)


@torch.no_grad()
def test_an_attention_that_gives_nothing_is_one_line(network):
    taps = AttentionTaps(network, [0])
    network.set_attn_implementation("eager")
    network(IDS, attention_mask=MASK)
    with pytest.raises(UserError, match="block 0 has an attention that gives no queries"):
        taps.read()


def test_checkpointed_blocks_give_the_same_gradients_and_keep_nothing():
    torch.manual_seed(0)
    network = transformers.AutoModel.from_config(CONFIGS["bert"]()).train()
    taps, gradients = AttentionTaps(network, [1]), []
    for checkpointing in (False, True):
        if checkpointing:
            network.gradient_checkpointing_enable()
        network.zero_grad()
        torch.manual_seed(1)
        network(IDS, attention_mask=MASK)
        taps.read()[1].scores.square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        assert taps._pass.features is None
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_blocks_that_are_not_there_are_refused(network):
    with pytest.raises(UserError, match=r"no block 3: its blocks are 0 to 2"):
        AttentionTaps(network, [3])


def test_a_network_without_such_attention_is_refused():
    with pytest.raises(UserError, match="cannot be read"):
        AttentionTaps(torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2)])), [0])
