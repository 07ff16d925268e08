"""TinyBERT's copies of texts: candidates by a language model and by embeddings, and their use."""

import numpy as np
import pytest
import torch
import transformers

from dsdistill.harness.errors import UserError
from kd.data.text import masked_candidates, words
from kd.data.text.corpus import TextPart

NAMES = ["film", "movie", "good", "bad", "nice", "poor", "plot", "actor", "story", "scene"]
PIECES = ["un", "##like", "##able", "##ing", "re", "##made"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, *NAMES, *PIECES, "the", "is", "not", "3", ",", "."]
TEXTS = [
    "The film is good, not unlikeable.",
    "remade movie: unlike the 3 unlikeing remadeing story",
]
PART = TextPart((TEXTS,))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)})


def config(kind: str):
    sizes = {"vocab_size": 32, "max_position_embeddings": 40, "pad_token_id": 0}
    if kind == "distilbert":
        return transformers.DistilBertConfig(dim=16, n_heads=2, hidden_dim=24, n_layers=2, **sizes)
    made = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[kind]
    return made(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        initializer_range=0.5, type_vocab_size=2, **sizes,
    )  # fmt: skip


def save(folder, tokenizer, auto, kind="bert"):
    torch.manual_seed(0)
    auto.from_config(config(kind)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="module", params=["bert", "distilbert", "roberta"])
def each(request, tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp(request.param)
    name = save(folder, tokenizer, transformers.AutoModelForMaskedLM, request.param)
    return masked_candidates.load(name, PART, CPU, copies=8)


@pytest.fixture(scope="module")
def method(tmp_path_factory, tokenizer):
    name = save(tmp_path_factory.mktemp("mlm"), tokenizer, transformers.AutoModelForMaskedLM)
    return masked_candidates.load(name, PART, CPU, copies=8)


@torch.no_grad()
def test_candidates_are_the_likeliest_words_where_the_mask_is(each, tokenizer):
    text = words.split(TEXTS[0])
    network = each.predictor.model.network
    ids = tokenizer("the film is good, not unlikeable.", add_special_tokens=False)["input_ids"]
    masked = [tokenizer.mask_token_id if i == ids[1] else i for i in ids]
    types = [0] * (len(ids) + 2) + [1] * (len(ids) + 1)
    batch = {"input_ids": torch.tensor([[2, *masked, 3, *ids, 3]])}
    if not isinstance(network, transformers.DistilBertForMaskedLM):
        batch["token_type_ids"] = torch.tensor([types])
    logits = network(**batch).logits[0, 2]
    order = [VOCABULARY[i] for i in logits[: len(VOCABULARY)].argsort(descending=True)]
    whole = {*NAMES, "un", "re", "the", "is", "not"} - {"film"}
    expected = tuple(word for word in order if word in whole)
    assert each.predictor.candidates(text, [1]) == [expected[:15]]
    assert each.predictor.candidates(text, [0, 1, 3])[1] == expected[:15]


def test_candidates_have_words_of_letters_that_are_no_stop_words(method):
    first, second = (method.candidates_of(words.split(text)) for text in TEXTS)
    assert sorted(first) == [1, 3, 6]  # film, good, unlikeable; not: the, is, not and marks
    places = {words.split(TEXTS[1]).words[i] for i in second}
    assert places == {"remade", "movie", "unlike", "unlikeing", "remadeing", "story"}
    assert all(len(names) in range(1, 16) for names in (first | second).values())


def test_words_of_several_pieces_have_the_nearest_ones(method, tokenizer):
    weights = method.predictor.model.network.get_input_embeddings().weight.numpy()
    known = ["film", "good", "unlikeable", "remade", "movie", "unlike", "unlikeing", "remadeing"]
    known.append("story")
    vectors = {}
    for word in known:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        mean = weights[ids].mean(axis=0)
        vectors[word] = mean / np.linalg.norm(mean)
    several = ["unlikeable", "remade", "unlike", "unlikeing", "remadeing"]
    assert sorted(method.nearest) == sorted(several)
    for word in several:
        others = sorted((w for w in known if w != word), key=lambda w: -vectors[w] @ vectors[word])
        assert list(method.nearest[word]) == others


def test_only_the_nearest_are_kept_and_spellings_count_once():
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [1.0, 0.2]])
    pieces = {"ab": (0, 1), "one": (0,), "Ab": (0, 1), "far": (2,), "two": (3,)}
    nearest = masked_candidates.nearest_words(pieces, embeddings, 2)
    assert nearest == {"ab": ("one", "two"), "Ab": ("one", "two")}


def test_words_are_exchanged_with_their_probability(method):
    text = "film, good. " * 4
    every = {"film", "good", "."}
    for probability, expected in ((0.0, 0.0), (0.4, 0.4), (1.0, 1.0)):
        other = masked_candidates.MaskedReplacement(
            method.predictor, method.nearest, method.pieces, 30, replace_probability=probability
        )
        drawn = [words.split(copy[0]).words for copy in other.copies_of(0, (text,))]
        changed = np.array(drawn) != np.array(words.split(text).words)
        assert not changed[:, 1::2].any()  # commas and full stops
        share = changed[:, ::2].mean()
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 240) ** 0.5)
        assert every <= {word for copy in drawn for word in copy} or probability == 1.0


def test_a_copy_is_a_function_of_seed_row_and_number(method):
    def copies(row, count=8, seed=0):
        made = masked_candidates.MaskedReplacement(
            method.predictor, method.nearest, method.pieces, count, seed
        )
        return made.copies_of(row, (TEXTS[row],))

    first = copies(0)
    copies(1)
    assert copies(0) == first
    assert copies(0, 3) == first[:3]
    assert copies(0, seed=1) != first
    assert len(set(first)) > 4


def test_of_pairs_the_texts_are_changed_in_turn(method):
    drawn = method.copies_of(0, ("good film", "bad plot"))
    assert all(second == "bad plot" for _, second in drawn[::3])
    assert all(first == "good film" for first, _ in drawn[1::3])


def test_a_word_beyond_the_positions_has_no_candidates(method):
    long = words.split("good " * 60 + "film")
    candidates = method.predictor.candidates(long, [0, 60])
    assert len(candidates[0]) > 5
    assert candidates[1] == ()


def test_the_record_names_the_weights(tmp_path, method, tokenizer):
    name = save(tmp_path / "same", tokenizer, transformers.AutoModelForMaskedLM)
    same = masked_candidates.load(name, PART, CPU, copies=8)
    assert same.record() == method.record()
    assert not same.predictor.model.training
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "same")
    model.get_input_embeddings().weight.data[7] += 1
    model.save_pretrained(tmp_path / "same")
    assert masked_candidates.load(name, PART, CPU, copies=8).record() != method.record()


@pytest.mark.parametrize(
    ("auto", "message"),
    [
        (transformers.AutoModel, "no head that predicts hidden words"),
        (transformers.AutoModelForSequenceClassification, "no head that predicts hidden words"),
        (None, "cannot get the tokenizer|holds no Hugging Face model|there is no folder"),
    ],
)
def test_a_model_that_predicts_no_words_is_refused(tmp_path, tokenizer, auto, message):
    if auto is not None:
        save(tmp_path, tokenizer, auto)
    with pytest.raises(UserError, match=message) as refused:
        masked_candidates.load(f"hf:{tmp_path}", PART, CPU, copies=8)
    assert "\n" not in str(refused.value)


def test_a_tokenizer_without_a_mask_is_refused(tmp_path, tokenizer):
    save(tmp_path, tokenizer, transformers.AutoModelForMaskedLM)
    bare = transformers.BertTokenizer(
        vocab={w: i for i, w in enumerate(VOCABULARY)}, mask_token=None
    )
    bare.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no mask among its tokens"):
        masked_candidates.load(f"hf:{tmp_path}", PART, CPU, copies=8)
