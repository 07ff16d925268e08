"""Teachers of texts: classes, tokenizers and lengths compared with the student's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from text_support import TEXTS, bert_folder, pieces

from dsdistill.harness.errors import UserError
from kd.models.language import saved_text_models, text_students, text_teachers, trained_models
from kd.models.language.text_teachers import TextTeacher
from kd.models.token_inputs import TokenInputs

CLASSES = ("neg", "pos", "mixed")
IDS = torch.tensor([[2, 5, 6, 3, 7, 3], [2, 8, 3, 9, 3, 0]])
INPUTS = TokenInputs(IDS, IDS > 0, torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]))


def named(*names: str) -> dict[str, dict]:
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with and without a head, and a run."""
    path = tmp_path_factory.mktemp("teachers")
    heads = {
        "mlm": ("ForMaskedLM", {}),
        "other order": ("ForSequenceClassification", named("Mixed", "neg", "pos")),
        "unnamed": ("ForSequenceClassification", {"num_labels": 3}),
        "other names": ("ForSequenceClassification", named("good", "bad", "mixed")),
    }
    folders = {k: "hf:" + bert_folder(path / k, *head[:1], **head[1]) for k, head in heads.items()}
    run = path / "run"
    run.mkdir()
    saved_text_models.save_run(run, student(folders["other order"], folders["other order"]))
    return folders | {"run": str(run)}


def student(teacher: str, name: str = "bilstm:6", task="classify", **options):
    classes = options.pop("classes", CLASSES if task == "classify" else ())
    options = {"max_length": 16, "teacher": teacher} | options
    return text_students.build(name, task, classes, **options)


def load(folders, name: str, like=None, classes=CLASSES, **options) -> TextTeacher:
    teacher = folders[name]
    return text_teachers.load(teacher, like or student(teacher), classes, TEXTS, **options)


@torch.no_grad()
def test_outputs_are_in_the_order_of_the_students_classes(folders):
    teacher = load(folders, "other order")
    theirs = trained_models.load(folders["other order"], "classify", CLASSES)
    assert theirs.classes == ("Mixed", "neg", "pos")
    expected = theirs.network.eval()(INPUTS)[:, [1, 2, 0]]
    assert torch.equal(teacher(INPUTS), expected)
    assert teacher.resolved.notes == ("classes matched by name, in another order",)
    torch.testing.assert_close(load(folders, "run")(INPUTS), teacher(INPUTS))


def test_a_teacher_is_frozen_and_never_in_training_mode(folders):
    teacher = load(folders, "run").train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_names_without_evidence_are_said_and_other_names_refused(folders):
    teacher = load(folders, "unnamed")
    assert "by position alone" in teacher.resolved.notes[0]
    with pytest.raises(UserError, match=r"has no class 'neg' of the data.*--class-map FILE"):
        load(folders, "other names")
    mapped = load(folders, "other names", class_map={"neg": "bad", "pos": "good", "mixed": 2})
    assert mapped.outputs is not None
    assert mapped.outputs.tolist() == [1, 0, 2]


def test_a_teacher_without_a_trained_head_is_refused_unless_layers_alone_teach(folders):
    with pytest.raises(UserError, match="has no trained head for classify") as refusal:
        load(folders, "mlm")
    assert "\n" not in str(refusal.value)
    assert "layers alone" in load(folders, "mlm", head=False).resolved.notes[0]


def test_logits_of_tokens_are_cut_to_the_tokenizer(folders):
    like = student(folders["mlm"], folders["mlm"], "mlm")
    teacher = load(folders, "mlm", like, ())
    assert teacher(INPUTS).shape == (2, 6, 15)


def test_the_same_tokenizer_shares_ids_and_another_one_does_not(folders):
    assert load(folders, "run").own_tokenizer is None
    words = student(folders["run"], tokenizer_source="words", texts=TEXTS * 2)
    teacher = load(folders, "run", words)
    assert teacher.own_tokenizer is not None
    assert teacher.own_tokenizer("a b")["input_ids"] == [2, 5, 6, 3]
    assert "tokenised twice" in teacher.resolved.notes[0]
    text_teachers.require_same_tokens("t", teacher, "classify")
    for task, terms, way in (
        ("causal", (), "--task causal .* use --recipe sequence, or a student with its tokenizer"),
        ("classify", ("hidden",), "hidden compares token by token: use a student with"),
    ):
        with pytest.raises(UserError, match=way):
            text_teachers.require_same_tokens("t", teacher, task, terms)
        text_teachers.require_same_tokens("t", load(folders, "run"), task, terms)


def test_a_teacher_of_pairs_gets_the_types_that_it_knows(folders, tmp_path):
    pieces(model_input_names=["input_ids", "attention_mask"]).save_pretrained(tmp_path)
    plain = student(folders["run"], "bert:1x8", tokenizer_source=f"hf:{tmp_path}", pairs=True)
    teacher = load(folders, "run", plain)
    assert teacher.own_tokenizer is not None
    assert "second text of a pair" in teacher.resolved.notes[0]


def test_a_bilstm_of_pairs_does_not_teach_single_texts_nor_the_reverse(folders, tmp_path):
    for pairs, message in (
        (True, "is a bilstm:6 for pairs of texts, and the data are single texts"),
        (False, "for single texts, and the data are pairs"),
    ):
        run = tmp_path / str(pairs)
        run.mkdir()
        saved_text_models.save_run(run, student(folders["run"], pairs=pairs))
        like = student(folders["run"], pairs=not pairs)
        with pytest.raises(UserError, match=message):
            text_teachers.load(str(run), like, CLASSES, TEXTS)
        same = student(folders["run"], pairs=pairs)
        assert text_teachers.load(str(run), same, CLASSES, TEXTS).own_tokenizer is None


def test_a_configuration_without_a_class_keeps_the_order_of_its_labels(folders, tmp_path):
    path = Path(shutil.copytree(folders["other order"].removeprefix("hf:"), tmp_path / "bare"))
    config = json.loads((path / "config.json").read_text())
    del config["architectures"]
    (path / "config.json").write_text(json.dumps(config))
    teacher = load(folders | {"bare": f"hf:{path}"}, "bare")
    torch.testing.assert_close(teacher(INPUTS), load(folders, "other order")(INPUTS))


def test_a_teacher_of_fewer_tokens_is_refused(folders):
    longer = student(folders["unnamed"], max_length=20)
    with pytest.raises(UserError, match="takes 16 tokens and the student 20: --max-length 16"):
        load(folders, "unnamed", longer)
    words = student("", max_length=20, tokenizer_source="words", texts=TEXTS * 2)
    assert load(folders, "unnamed", words).resolved.max_length == 16
