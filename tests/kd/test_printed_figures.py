"""What `kd train` and `kd evaluate` print: the figures of the task, in few lines."""

from typing import Any

from kd.runs.printed_figures import chosen_figures, print_figures

SIZE = {"parameters": 7, "seconds": 1.0}
REPORT = {
    "task": "classify",
    "metric": "macro_f1",
    "judged_on": "test texts",
    "test_accuracy": 0.5,
    "test_macro_f1": 0.25,
    "validation_accuracy": 0.75,
    "validation_macro_f1": 0.125,
    "test_texts": 8,
    "nll": 1.5,
    "train_images": 30,
    **SIZE,
}


def printed(figures: dict[str, Any], capsys) -> list[str]:
    print_figures(figures)
    return capsys.readouterr().out.splitlines()


def test_a_training_on_texts_prints_the_figures_of_its_task(capsys):
    assert printed(chosen_figures(REPORT), capsys) == [
        "judged on                             test texts",
        "test accuracy                         0.5000",
        "test macro F1                         0.2500",
        "test texts                            8",
        "validation macro F1                   0.1250",
        "nll (nats)                            1.5000",
        "parameters                            7",
        "seconds                               1.0000",
    ]


def test_without_test_texts_all_validation_figures_are_printed(capsys):
    figures = {"validation_perplexity": 9.5, "validation_bits_per_byte": 2.25, "test_texts": 0}
    report = {"task": "causal", "metric": "nll", "judged_on": "validation texts", **figures, **SIZE}
    assert printed(chosen_figures(report), capsys)[:3] == [
        "judged on                             validation texts",
        "validation perplexity                 9.5000",
        "validation bits per byte              2.2500",
    ]
    assert not any("test" in line for line in printed(chosen_figures(report), capsys))


def test_a_teacher_is_one_line_and_languages_are_a_table(capsys):
    teacher = {"teacher_agreement": 0.5, "teacher_accuracy": 0.75}
    each = {"a": {"accuracy": 0.5}, "b": {"accuracy": 1.0}}
    languages = {
        "de": {"texts": 100, "accuracy": 0.5, "macro_f1": 0.25},
        "a long name": {"texts": 3, "accuracy": 0.125, "macro_f1": 0.5},
    }
    report = REPORT | teacher | {"teachers": each, "languages": languages}
    lines = printed(chosen_figures(report), capsys)
    assert lines[6:9] == [
        "teacher's figures                     agreement 0.5000, accuracy 0.7500",
        "teacher a                             accuracy 0.5000",
        "teacher b                             accuracy 1.0000",
    ]
    assert lines[-3:] == [
        "language       texts  accuracy  macro F1",
        "de               100    0.5000    0.2500",
        "a long name        3    0.1250    0.5000",
    ]


def test_figures_of_images_are_printed_as_before(capsys):
    report = {"test_accuracy": 0.5, "test_images": 8, "teacher_accuracy": 0.75, **SIZE}
    several = {"teachers": {"a": {"agreement": 0.5, "accuracy": 0.25}}, "latency_ms_batch_1": 3.0}
    assert printed(chosen_figures(report | several), capsys) == [
        "test accuracy                         0.5000",
        "test images                           8",
        "teacher accuracy                      0.7500",
        "parameters                            7",
        "seconds                               1.0000",
        "agreement of teacher a                0.5000",
        "accuracy of teacher a                 0.2500",
    ]
    (line,) = printed({"latency_ms_batch_1": 3.0}, capsys)
    assert line == "latency of 1 image on the CPU (ms)    3.0000"
    assert printed({"latency_ms_batch_1": 3.0, "latency_tokens": 23}, capsys) == [
        "latency of 1 text on the CPU (ms)     3.0000",
        "length of a text for latency (tokens) 23",
    ]
