"""Columns that are recognised by their names, and labels that are scores."""

import pytest

from dsdistill.harness.errors import UserError
from kd.data.text import columns
from kd.data.text.columns import Columns


@pytest.mark.parametrize(
    ("names", "task", "expected"),
    [
        (["sentence", "label"], None, Columns(("sentence",), "label")),
        (["idx", "label", "sentence1", "sentence2"], None,
         Columns(("sentence1", "sentence2"), "label")),
        (["premise", "hypothesis", "label"], None, Columns(("premise", "hypothesis"), "label")),
        (["question", "sentence", "label"], None, Columns(("question", "sentence"), "label")),
        (["question", "label"], None, Columns(("question",), "label")),
        (["sentence1", "sentence2", "score"], "regress",
         Columns(("sentence1", "sentence2"), "score")),
        (["text", "language", "label"], None, Columns(("text",), "label", "language")),
        (["tokens", "ner_tags", "id"], None, Columns(("tokens",), "ner_tags")),
        (["text"], "mlm", Columns(("text",))),
        (["sentence", "label"], "mlm", Columns(("sentence",))),
        (["messages"], "causal", Columns(("messages",))),
        (["prompt", "completion"], "causal", Columns(("prompt", "completion"))),
        (["text"], "causal", Columns(("text",))),
        (["source", "target"], "embed", Columns(("source", "target"))),
    ],
)  # fmt: skip
def test_columns_of_known_names_are_recognised(names, task, expected):
    assert columns.recognise("a.tsv", names, task) == expected


def test_the_users_names_come_first():
    names = ["text", "label", "summary", "stars"]
    assert columns.recognise("a", names, None, text="summary", label="stars") == Columns(
        ("summary",), "stars"
    )
    assert columns.recognise("a", names, None, text="text, summary").texts == ("text", "summary")


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (["body", "label"], {}, "no column of texts .* body, label: name it with --text"),
        (["text", "stars"], {}, "no column of labels .* stars, text: name it with --label"),
        (["text", "label"], {"text": "body"}, "--text body is no column of a.tsv"),
        (["text", "label"], {"label": "stars"}, "--label stars is no column"),
        (["text", "label"], {"text": "text,text"}, "one column, or two"),
        (["text", "label"], {"text": "text,label,text"}, "one column, or two"),
        (["text", "label"], {"text": "label"}, "no column of labels"),
        (["text", "label"], {"text": "text", "label": "text"}, "name one column"),
    ],
)
def test_what_is_not_there_is_refused(names, given, message):
    with pytest.raises(UserError, match=message):
        columns.recognise("a.tsv", names, None, **given)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["5.000", "0.25"], True),
        (["1", "0", "-1"], False),
        (["1", "2.5"], True),
        (["positive", "1.0"], False),
        ([0, 1, 1], False),
        ([0.0, 1.0], True),
        (["1e-3", "2"], True),
        ([], False),
    ],
)
def test_real_numbers_are_scores_and_whole_ones_classes(values, expected):
    assert columns.labels_are_scores(values) is expected
