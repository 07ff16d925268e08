"""Students of texts by name, saved and loaded."""

import json

import pytest
import torch
import transformers
from language_support import causal_model, characters
from text_support import LETTERS, TEXTS, bert_folder, pieces
from torch import Tensor

from dsdistill.harness.errors import UserError
from kd.models import saved_models
from kd.models.language import saved_text_models, text_students, tokenizer, transformer
from kd.models.language.text_model import TextModel
from kd.models.token_inputs import TokenInputs

CLASSES = ("neg", "pos", "mixed")
IDS = torch.tensor([[2, 5, 6, 3, 7, 3], [2, 8, 3, 9, 3, 0]])
INPUTS = TokenInputs(IDS, IDS > 0, torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of hidden tokens, and a classifier whose classes stand in another order."""
    path = tmp_path_factory.mktemp("models")
    names = {0: "Mixed", 1: "neg", 2: "pos"}
    return {
        "mlm": "hf:" + bert_folder(path / "mlm", "ForMaskedLM"),
        "classifier": "hf:"
        + bert_folder(
            path / "classifier",
            "ForSequenceClassification",
            id2label=names,
            label2id={name: i for i, name in names.items()},
        ),
        "unnamed": "hf:" + bert_folder(path / "unnamed", "ForSequenceClassification", num_labels=3),
    }


def student(name, task="classify", classes=CLASSES, **options) -> TextModel:
    return text_students.build(name, task, classes, **options)


@torch.no_grad()
def outputs(model: TextModel) -> Tensor:
    return model.network.eval()(INPUTS)


def saved(path, model: TextModel):
    path.mkdir(exist_ok=True)
    saved_text_models.save_run(path, model)
    return path


@pytest.mark.parametrize(
    ("name", "task", "classes"),
    [
        ("mlm", "classify", CLASSES),
        ("mlm", "mlm", ()),
        ("mlm", "tag", ("B", "O")),
        ("bilstm:6", "classify", CLASSES),
        ("bilstm:6", "regress", ()),
        ("bert:1x8", "causal", ()),
    ],
)
def test_a_saved_student_answers_the_same(folders, tmp_path, name, task, classes):
    options = {"teacher": folders["mlm"], "pairs": True} if ":" in name else {}
    model = student(folders.get(name, name), task, classes, max_length=9, **options)
    again = saved_text_models.load_run(saved(tmp_path, model))
    assert torch.equal(outputs(again), outputs(model))
    assert (again.name, again.task, again.classes) == (model.name, task, classes)
    assert (again.max_length, again.pairs) == (9, model.pairs)
    assert tokenizer.same_ids(again.tokenizer, model.tokenizer, TEXTS)
    assert saved_models.is_text_run(tmp_path)


def test_tied_weights_are_stored_once_and_stay_tied(folders, tmp_path):
    again = saved_text_models.load_run(saved(tmp_path, student(folders["mlm"], "mlm", ())))
    network = again.network.network
    assert network.cls.predictions.decoder.weight is network.bert.embeddings.word_embeddings.weight


def test_half_precision_becomes_single_and_is_saved_as_that(folders, tmp_path):
    import transformers

    path = folders["classifier"].removeprefix("hf:")
    network = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    network.half().save_pretrained(tmp_path / "half")
    pieces().save_pretrained(tmp_path / "half")
    model = student(f"hf:{tmp_path / 'half'}")
    with torch.no_grad():  # a change that half precision does not hold
        model.network.network.classifier.bias += 1e-6
    assert torch.equal(
        outputs(saved_text_models.load_run(saved(tmp_path / "run", model))), outputs(model)
    )


@pytest.mark.parametrize(
    "name", ["student.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
)
def test_a_damaged_or_missing_file_is_one_line(folders, tmp_path, name):
    saved(tmp_path, student("bilstm:6", teacher=folders["mlm"]))
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-2] + b"  ")
    with pytest.raises(UserError, match="damaged or of another run"):
        saved_text_models.load_run(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="damaged or of another run"):
        saved_text_models.load_run(tmp_path)


def test_a_further_file_of_a_tokenizer_is_refused(folders, tmp_path):
    saved(tmp_path, student("bilstm:6", teacher=folders["mlm"]))
    (tmp_path / "tokenizer" / "added_tokens.json").write_text('{"x": 4}')
    with pytest.raises(UserError, match=r"added_tokens\.json is no file of this run"):
        saved_text_models.load_run(tmp_path)


def test_runs_on_images_and_texts_are_told_apart(folders, tmp_path):
    saved(tmp_path, student("bilstm:6", teacher=folders["mlm"]))
    with pytest.raises(UserError, match="holds a student of texts, and one of images is needed"):
        saved_models.load_run(tmp_path)
    card = json.loads((tmp_path / "model.json").read_text())
    assert card["kind"] == "text"
    (tmp_path / "model.json").write_text(json.dumps({"classes": ["a", "b"]}))
    assert not saved_models.is_text_run(tmp_path)
    with pytest.raises(UserError, match="holds a student of images, and one of texts is needed"):
        saved_text_models.load_run(tmp_path)


def test_classes_in_another_order_are_matched_by_name(folders):
    model = student(folders["classifier"])
    assert model.network.notes == ("classes matched by name, in another order",)
    assert model.network.network.config.id2label == dict(enumerate(CLASSES))
    theirs = student(folders["classifier"], classes=("Mixed", "neg", "pos"))
    assert theirs.network.notes == ()
    torch.testing.assert_close(outputs(model), outputs(theirs)[:, [1, 2, 0]])


def test_other_classes_get_a_new_head_and_unnamed_ones_keep_theirs(folders):
    other = student(folders["classifier"], classes=("x", "y", "z"), seed=1)
    assert "a new head, since" in other.network.notes[-1]
    theirs = student(folders["classifier"], classes=("Mixed", "neg", "pos"))
    ours, old = (m.network.network.state_dict() for m in (other, theirs))
    changed = {key for key in old if not torch.equal(old[key], ours[key])}
    assert changed == {"classifier.weight", "classifier.bias"}
    unnamed = student(folders["unnamed"])
    assert "by position alone" in unnamed.network.notes[-1]
    assert unnamed.network.untrained == ()


def test_a_head_for_texts_is_none_for_tokens(folders):
    model = student(folders["classifier"], "tag", ("Mixed", "neg", "pos"))
    assert model.network.untrained == ("classifier.bias", "classifier.weight")


def test_a_new_head_is_a_function_of_the_seed(folders):
    one, same, other = (outputs(student(folders["mlm"], seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_student_of_hidden_tokens_is_fine_tuned_with_its_body(folders, tmp_path):
    first = student("bert:2x16", "mlm", (), teacher=folders["mlm"], max_length=12)
    second = student(str(saved(tmp_path, first)))
    assert "new tensors" in second.network.notes[0]
    assert second.max_length == 12
    ours, old = (m.network.network.state_dict() for m in (second, first))
    assert all(torch.equal(ours[key], old[key]) for key in old if key.startswith("bert."))
    assert outputs(second).shape == (2, 3)


@pytest.mark.parametrize("name", ["teacher", "classifier"])
def test_a_copy_with_some_blocks(folders, name):
    options = {"teacher": folders["classifier"], "classes": ("Mixed", "neg", "pos")}
    model = student(folders.get(name, name), keep_layers=(1,), **options)
    whole = student(folders["classifier"], classes=("Mixed", "neg", "pos")).network.network
    ours = model.network.network
    assert len(ours.bert.encoder.layer) == 1
    for part in ("bert.embeddings", "bert.pooler", "classifier"):
        mine, theirs = (x.get_submodule(part).state_dict() for x in (ours, whole))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    state = whole.bert.encoder.layer[1].state_dict()
    assert all(torch.equal(v, state[k]) for k, v in ours.bert.encoder.layer[0].state_dict().items())
    assert model.name.endswith("[1]")
    assert "with its blocks 1" in model.network.notes[-1]


def test_a_tokenizer_of_the_training_words_also_for_pairs():
    model = student("bilstm:6", tokenizer_source="words", texts=TEXTS * 2, pairs=True)
    assert set(model.tokenizer.get_vocab()) == {"[PAD]", "[UNK]", "[MASK]", *LETTERS}
    assert model.tokenizer("a", "b c")["token_type_ids"] == [0, 1, 1]


@pytest.mark.parametrize("origin", ["fresh", "of hidden tokens"])
def test_a_causal_model_sees_no_later_token(folders, tmp_path, origin):
    name = "bert:1x8"
    if origin != "fresh":
        name = str(saved(tmp_path, student(name, "mlm", (), teacher=folders["mlm"])))
    model = student(name, "causal", (), teacher=folders["mlm"])
    changed = TokenInputs(IDS.clone(), INPUTS.mask, INPUTS.types)
    changed.ids[:, 4] = 10
    with torch.no_grad():
        one, other = (model.network.eval()(x) for x in (INPUTS, changed))
    torch.testing.assert_close(one[:, :4], other[:, :4])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hf", {}, "unknown student of texts 'hf'"),
        ("bilstm:0", {}, "unknown student of texts"),
        ("bert:4", {"tokenizer_source": "words"}, "as bert:4x312"),
        ("bilstm", {}, "has no tokenizer: it takes that of --teacher"),
        ("teacher", {}, "name it with --teacher"),
        ("bilstm", {"keep_layers": (0,)}, "--keep-layers needs blocks with weights"),
        ("bilstm", {"task": "tag", "teacher": "mlm"}, "needs a transformer"),
        (
            "bilstm",
            {"task": "embed", "tokenizer_source": "words"},
            "as many outputs as its teacher",
        ),
        ("mlm", {"max_length": 17}, "--max-length 17 is more than the 16 tokens that"),
        ("mlm", {"keep_layers": (0, 2)}, "the blocks 0 to 1"),
        ("mlm", {"keep_layers": (1, 0)}, "ascending"),
        ("mlm", {"tokenizer_source": "words"}, "brings its tokenizer"),
        ("mlm", {"task": "causal", "classes": ()}, "it is no causal model"),
        ("bert:900000x1200000", {"teacher": "mlm"}, "memory"),
    ],
)
def test_bad_input_is_one_line(folders, name, options, message):
    options = {key: folders.get(x, x) if key == "teacher" else x for key, x in options.items()}
    with pytest.raises(UserError, match=message) as refusal:
        student(folders.get(name, name), **options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["DistilBert", "GPT2", "Bert"])
def test_a_fresh_student_has_as_many_heads_as_its_teacher(tmp_path, kind):
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 24}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    own = pieces()
    task, classes = "classify", ("a", "b")
    network = transformer.with_new_head(
        transformer.rebuild(config.to_dict(), task, own), task, classes, own, seed=0
    )
    run = saved(tmp_path, TextModel(network, "hf:x", task, classes, own, 16, False))
    fresh = student("bert:1x24", classes=classes, teacher=str(run))
    assert fresh.network.network.config.num_attention_heads == 4


def test_a_head_that_the_library_does_not_have_is_one_line(tmp_path):
    own = characters("ab")
    network = transformer.rebuild(causal_model(own, "gpt2").network.config.to_dict(), "causal", own)
    run = saved(tmp_path, TextModel(network, "hf:x", "causal", (), own, 32, False))
    with pytest.raises(UserError, match="no gpt2 can be built for --task mlm") as refusal:
        student(str(run), "mlm", ())
    assert "\n" not in str(refusal.value)


def test_lists_of_blocks():
    assert text_students.parse_layers("1, 3,5") == (1, 3, 5)
    for text in ("", "1,,2", "a", "-1", "1-3"):
        with pytest.raises(UserError, match="numbers of blocks from 0"):
            text_students.parse_layers(text)


def test_the_default_length(folders):
    assert student(folders["mlm"]).max_length == 16
    assert student("bilstm", teacher=folders["mlm"]).max_length == 16
    assert student("bilstm", tokenizer_source="words", texts=TEXTS).max_length == 128
