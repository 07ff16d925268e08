"""`kd train --pate`: what is learned from, what is stored, what is refused."""

import json
from pathlib import Path

import kd_support as support
import numpy as np
import pytest
import safetensors.numpy
from kd_support import main, read_report, refused

from dsdistill.harness.data import datasets, distilled_set, preprocess
from dsdistill.harness.data.labeled_images import Examples
from kd.assembly import private_answers
from kd.options import TrainOptions
from kd.parallel import engine
from kd.privacy import settings
from kd.runs import private_data

VOTES = "teachers=8,sigma=1,answers=60,steps=10,network=mlp:8"
QUICK = ("--student", "mlp:8", "--steps", 12, "--public", "test:100")


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    return monkeypatch


def _weights(folder: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(Path(folder) / "student.safetensors")


def _options(folder: Path, **more: object) -> TrainOptions:
    options = {"student": "mlp:8", "pate": VOTES, "public": "test:100", "out": folder} | more
    return TrainOptions("digits", **options)


def test_a_run_states_what_it_cost_and_goes_on_from_its_answers_to_the_same_bits(
    inside: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(inside, "train", "digits", "--pate", VOTES, *QUICK, "--out", "whole")
    report = read_report(tmp_path / "whole")
    expected = settings.parse(VOTES).epsilon(100)
    assert (report["epsilon"], report["delta"]) == (expected, 1e-5)
    assert (report["answers"], report["queries"], report["train_images"]) == (60, 60, 54)
    assert report["test_images"] == len(support.digits().test) - 100
    assert f"({expected:.4g}, 1e-05)-differentially private" in report["note"]
    assert "epsilon" in capsys.readouterr().out
    # Killed right after the answers: nothing but config.json is there.
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    config["inputs"] = {"options": config["inputs"]["options"]}
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "config.json").write_text(json.dumps(config))
    inside.setattr(private_answers, "count_votes", None)  # no teacher is asked again
    main(inside, "train", "--resume", "--out", "killed")
    for name, weight in _weights("whole").items():
        np.testing.assert_array_equal(weight, _weights("killed")[name])
    main(inside, "evaluate", "whole")
    assert str(report["test_images"]) in capsys.readouterr().out


def test_a_run_holds_nothing_of_the_private_images(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Other private images with the same answers give the same files, but for times."""
    answers = [i % 10 for i in range(60)]
    inside.setattr("kd.privacy.votes.noisy_answers", lambda counts, settings: answers)
    load, runs = datasets.load, []
    for changed in (False, True):

        def other(*args, changed=changed, **options):
            splits = load(*args, **options)
            if changed:
                splits.train.store[splits.train.rows[:50]] = 0.5
            return splits

        inside.setattr(datasets, "load", other)
        folder = f"run-{changed}"
        main(inside, "train", "digits", "--pate", VOTES, *QUICK, "--out", folder)
        runs.append(tmp_path / folder)
    first, second = runs
    assert (first / "config.json").read_text() == (second / "config.json").read_text()
    for name in ("student.safetensors", "recipe.json", "model.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    reports = [read_report(folder) for folder in runs]
    varied = {"seconds", "startup_seconds", "peak_memory", "latency_ms_batch_1", "sha256"}
    assert {k: v for k, v in reports[0].items() if k not in varied} == {
        k: v for k, v in reports[1].items() if k not in varied
    }


def _count(images, public, count: int) -> np.ndarray:
    fitted = preprocess.identity(1)
    chosen = settings.parse(f"teachers={count},sigma=1,steps=5,network=mlp:4,answers=40")
    return private_answers.count_votes(images, public, fitted, chosen, engine.make(), seed=0)


def test_one_image_moves_at_most_one_vote_of_each_query(tmp_path: Path) -> None:
    options = _options(tmp_path)
    private = private_data.private_images(options, None, None)
    public = private_data.public_of(options, private)
    before = _count(private, public, 6)
    assert (before.sum(1) == 6).all()
    flipped = private.labels.copy()
    flipped[17] = (flipped[17] + 1) % 10
    for changed in (
        private.select(np.delete(np.arange(len(private)), 17)),
        type(private)(private.store, flipped, private.classes, private.rows),
    ):
        moved = np.abs(_count(changed, public, 6) - before).sum(1)
        assert set(moved.tolist()) <= {0, 2}


def test_public_labels_are_not_used_and_test_images_are_others(tmp_path: Path) -> None:
    options = _options(tmp_path)
    private = private_data.private_images(options, None, None)
    public = private_data.public_of(options, private)
    assert (public.images.labels == 0).all()
    assert len(public.images) == 100
    seen = {image.tobytes() for image in public.images.images()}
    assert not any(image.tobytes() in seen for image in public.test.images())
    assert {image.tobytes() for image in private.images()}.isdisjoint(seen)


def test_a_teacher_without_images_votes_as_it_was_made(tmp_path: Path) -> None:
    private = private_data.private_images(_options(tmp_path), None, None)
    empty = Examples(private.select(np.empty(0, np.int64)), preprocess.identity(1))
    chosen = settings.parse("teachers=2,sigma=1,network=mlp:4")
    teachers = [private_answers.train_teacher(empty, chosen, engine.make(), seed=3) for _ in "ab"]
    states = [teacher.state_dict() for teacher in teachers]
    assert all(bool((states[0][name] == states[1][name]).all()) for name in states[0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--pate", VOTES), "--pate needs --public"),
        (("--public", "test:5"), "--public needs --pate"),
        (("--max-epsilon", 1), "--max-epsilon needs --pate"),
        (("--pate", VOTES, "--public", "test:9", "--teacher", "run"), "and --teacher names others"),
        (("--pate", VOTES, "--public", "test:9", "--generations", 2), "--generations names others"),
        (("--pate", VOTES, "--public", "test:9", "--transfer", "x"), "and --transfer on others"),
        (("--pate", VOTES, "--public", "test:0"), "test:N takes N of the 359 test images"),
        (("--pate", VOTES, "--public", "test:359"), "test:N takes N of the 359 test images"),
        (("--pate", VOTES, "--public", "nowhere"), "unknown data set"),
        (("--pate", VOTES, "--public", "test:100", "--max-epsilon", 0.5), "would spend epsilon"),
        (("--pate", "teachers=900,sigma=1", "--public", "test:9"), "fewer than two of 1438 images"),
        (
            ("--pate", "teachers=9,sigma=1,delta=0.01", "--public", "test:9"),
            "must be below 1 / 1438",
        ),
        (
            ("--pate", "teachers=9,sigma=1,network=own:Net", "--public", "test:9"),
            "network must be convnet, mlp",
        ),
        (("--pate", VOTES, "--public", "test:9", "--augment", "imagenet"), "loaded as a whole"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_teacher(
    inside: pytest.MonkeyPatch, tmp_path: Path, more: tuple, message: str
) -> None:
    inside.setattr(private_answers, "train_teacher", None)
    assert message in refused(inside, "train", "digits", "--student", "mlp:8", *more, "--out", "x")
    assert not (tmp_path / "x").exists()


def test_texts_and_distilled_sets_are_refused(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = [f"{word} of ours\t{word}" for word in ("good", "bad") * 5]
    (tmp_path / "texts.tsv").write_text("\n".join(["text\tlabel", *lines]))
    line = ("--pate", VOTES, "--public", "test:9", "--student", "bilstm:8", "--out", "x")
    assert "--pate is for images" in refused(inside, "train", "texts.tsv", *line)
    distilled_set.save(tmp_path / "set.safetensors", support.distilled(support.digits()))
    line = ("--pate", VOTES, "--public", "test:9", "--student", "mlp:8", "--out", "x")
    said = refused(inside, "train", "set.safetensors", *line)
    assert "asks teachers of private images, and set.safetensors is a distilled set" in said
