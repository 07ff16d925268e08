"""Losses on texts are tried and checked before a training."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import text_terms_support as support
import torch
from torch import nn

from dsdistill.harness.errors import UserError
from kd.objectives import loss_checks, terms
from kd.parallel import engine
from kd.training import dry_run

ON = engine.make()
EMBEDDED = ("srd", "rkd-distance", "rkd-angle", "sp", "pkt", "cc", "crd:0.8:negatives=4")
LOGITS = ("kd", "fm", "dkd", "dist", "ls", "logits", "hard")
BLOCKS = ("hidden", "scores", "patient", "cosine", "relations")


def tried(loss: str, student, *teachers, task: str = "classify", **options) -> None:
    made = support.objective(loss, student, *teachers, task=task)
    sample = support.source(task).first(4)
    dry_run.check_batch(made, loss, sample, on=ON, **options)


def bert(task: str = "classify", blocks: int = 2):
    return support.bert(blocks, 12, 3, task, seed=blocks)


@pytest.mark.parametrize("name", [*EMBEDDED, *LOGITS, *BLOCKS])
def test_every_term_works_on_texts(name: str) -> None:
    tried(f"ce,{name}", bert(), bert(blocks=4))


@pytest.mark.parametrize("task", ["tag", "mlm"])
def test_every_term_works_on_tokens(task: str) -> None:
    own = ",tokens,mlm" if task == "mlm" else ""
    tried(f"ce,{','.join((*EMBEDDED, *LOGITS, *BLOCKS))}{own}",
          bert(task), bert(task, 4), task=task)  # fmt: skip


def test_causal_models_and_shallow_classifiers() -> None:
    student, teacher = (support.gpt2(n, 12, 3, "causal", seed=n) for n in (2, 4))
    tried("clm,tokens:1:beta=0.5:targets=1,kd,hidden,scores,relations,cosine",
          student, teacher, task="causal")  # fmt: skip
    tried("ce,heads@0,embeddings", bert())


@pytest.mark.parametrize("name", [*EMBEDDED, *LOGITS])
def test_a_bilstm_learns_from_answers_and_vectors(name: str) -> None:
    tried(f"ce,{name}", support.bilstm(), bert())


def test_scores_of_texts_are_fitted() -> None:
    student, teacher = (support.bert(n, 12, 3) for n in (2, 4))
    for model in (student, teacher):
        model.network.classifier = nn.Linear(12, 1)
    made = support.objective("mse,logits", student, teacher)
    whole = support.batch()
    scores = torch.linspace(0, 5, len(whole))
    found = made(replace(whole, labels=scores, targets=scores[:, None]))
    with torch.no_grad():
        ours, theirs = (model(whole.inputs)[:, 0] for model in (student, teacher))
    expected = ((ours - scores) ** 2).mean().item() / 2
    assert found["mse"].item() == pytest.approx(expected, rel=1e-5)
    assert found["logits"].item() == pytest.approx(((ours - theirs) ** 2).mean().item(), rel=1e-5)


def test_a_loss_of_blocks_alone_leaves_the_head_to_a_later_training() -> None:
    loss = "hidden,scores"
    with pytest.raises(UserError, match=r"sends no gradient to .* add a term on the outputs"):
        tried(loss, bert(), bert(blocks=4))
    tried(loss, bert(), bert(blocks=4), trains_outputs=False)


@pytest.mark.parametrize(
    ("loss", "task", "taught"),
    [
        ("hidden,scores,relations", "classify", False),
        ("hidden,kd", "classify", True),
        ("srd", "classify", False),
        ("srd", "embed", True),
        ("rkd-distance@0=1", "embed", False),
        ("hidden,relations", "embed", False),
    ],
)
def test_a_loss_teaches_outputs_or_layers_before_them(loss: str, task: str, taught: bool) -> None:
    assert loss_checks.teaches_outputs(terms.parse(loss), task=task) is taught


def test_processes_do_not_wait_for_a_head_that_is_left() -> None:
    made = support.objective("relations", bert(), bert(blocks=4))
    two = SimpleNamespace(device=ON.device, num_processes=2, autocast=ON.autocast)
    dry_run.check_batch(made, "relations", support.batch(), on=two, trains_outputs=False)
    head = made.student.network.classifier
    assert not head.weight.requires_grad
    assert made.student.network.bert.embeddings.word_embeddings.weight.requires_grad


def test_errors_speak_of_texts() -> None:
    class Broken(nn.Module):
        def forward(self, step):
            raise RuntimeError("no")

    made = support.objective("ce", bert())
    made.terms[0].measure = Broken()
    with pytest.raises(UserError, match=r"for a batch of 2 texts \(no"):
        dry_run.check_batch(made, "ce", support.source().first(2), on=ON)
    made = support.objective("ce", bert())
    made.terms[0].weight = float("nan")
    with pytest.raises(UserError, match="ce is nan on texts: check"):
        dry_run.check_batch(made, "ce", support.batch(), on=ON)


@pytest.mark.parametrize(
    ("loss", "task", "same_ids", "message"),
    [
        ("ce,at@0", "classify", True, "--loss at compares maps of images"),
        (
            "tokens",
            "classify",
            True,
            "takes answers for tokens, and with --task classify .* use kd",
        ),
        ("mlm", "regress", True, "takes answers for tokens, .* use ce"),
        ("mlm", "causal", True, "takes the targets of --task mlm, not those of --task causal: use"),
        ("clm", "tag", True, "takes the targets of --task causal, not those of --task tag: use ce"),
        ("ce", "regress", True, "--loss ce takes classes, and --task regress has scores: use mse"),
        ("kd", "regress", True, "--loss kd takes classes, .* use logits"),
        ("kd,hidden", "classify", False, "--loss hidden compares token by token, .* use kd, logi"),
        ("clm,tokens", "causal", False, "--loss tokens compares token .* use --recipe sequence"),
        ("ce,kd", "tag", False, "--loss kd compares token by token, .* a teacher with the same"),
    ],
)
def test_a_term_that_does_not_fit_the_task_is_one_line(loss, task, same_ids, message) -> None:
    with pytest.raises(UserError, match=message) as error:
        loss_checks.check_texts(terms.parse(loss), task=task, same_ids=same_ids)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("loss", "task", "same_ids"),
    [
        ("ce,kd,srd,patient", "classify", False),
        ("ce,kd,hidden,scores", "classify", True),
        ("mse,logits,hidden", "regress", True),
        ("ce,kd,relations", "tag", True),
        ("mlm,tokens,cosine", "mlm", True),
        ("clm,tokens", "causal", True),
        ("clm", "causal", False),
    ],
)
def test_a_term_that_fits_the_task_passes(loss: str, task: str, same_ids: bool) -> None:
    loss_checks.check_texts(terms.parse(loss), task=task, same_ids=same_ids)
