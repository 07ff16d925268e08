"""`kd` on recordings: trained, killed and resumed, evaluated, exported, and used as a teacher."""

import json
from pathlib import Path

import kd_support as support
import numpy as np
import pytest
import recordings
import safetensors.numpy
import torch
from kd_support import main, refused, stop_in
from PIL import Image

from dsdistill.harness.data import mel_images
from dsdistill.harness.data.mel_images import MelFormat
from kd.models import saved_models
from kd.models.adapters import PreprocessLayer

QUICK = ("--student", "mlp:32", "--epochs", 12, "--batch-size", 16, "--augment", "specaugment")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones in class folders, and a student that was trained on them."""
    root = tmp_path_factory.mktemp("sound")
    recordings.folder(root / "tones" / "train", 20)
    recordings.folder(root / "tones" / "test", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("kd.runs.curves.draw", lambda folder: None)
        main(patch, "train", "tones", *QUICK, "--out", "run")
    return root


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    return monkeypatch


def test_a_killed_training_ends_as_the_same_student(
    inside: pytest.MonkeyPatch, folder: Path
) -> None:
    assert support.read_report(folder / "run")["test_accuracy"] == 1.0  # the tones lie far apart
    stop_in(inside, 6, "train", "tones", *QUICK, "--out", "stopped")
    main(inside, "train", "--out", "stopped", "--resume")
    whole, resumed = (
        safetensors.numpy.load_file(folder / name / "student.safetensors")
        for name in ("run", "stopped")
    )
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_the_run_says_how_its_images_are_made(folder: Path) -> None:
    model = saved_models.load_run(folder / "run")
    mel = MelFormat(8000, 0.2, 40)
    assert model.mel == mel
    image = mel_images.read(folder / "tones" / "test" / "900" / "0.wav", mel)
    pixels = torch.from_numpy(image / np.float32(255))[None, None]
    network = torch.nn.Sequential(PreprocessLayer(model.preprocess), model.classifier).eval()
    assert model.classes[int(network(pixels).argmax())] == "900"


def test_it_is_evaluated_exported_and_reported(
    inside: pytest.MonkeyPatch, folder: Path, capsys
) -> None:
    main(inside, "evaluate", "run", "tones/test", "--json")
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0
    main(inside, "export", "run", "--format", "pt2", "--out", "tones.pt2")
    main(inside, "report", "run", "--out", "page.html")
    assert (folder / "page.html").is_file()
    # The file is a teacher that knows what recordings it takes.
    line = ("train", "tones", "--student", "mlp:8", "--teacher", "tones.pt2", "--epochs", 1)
    said = refused(inside, *line, "--seconds", 0.3, "--out", "other")
    assert said == (
        "kd: teacher tones.pt2 takes 40 mel bands of 0.2 s at 8,000 Hz, and the data are 40 mel "
        "bands of 0.3 s at 8,000 Hz: give --seconds 0.2 --mel-bands 40 --sample-rate 8000"
    )


def test_a_square_image_is_evaluated_too(inside: pytest.MonkeyPatch, capsys) -> None:
    square = ("--mel-bands", 20, "--epochs", 1, "--student", "mlp:4")
    main(inside, "train", "tones", *square, "--out", "square")
    capsys.readouterr()
    main(inside, "evaluate", "square", "--json")
    assert json.loads(capsys.readouterr().out)["images"] == 12


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("tones", "--augment", "crop-flip"), "crop-flip plays half of the recordings backwards"),
        (("digits", "--augment", "specaugment"), "--augment specaugment is for recordings, and d"),
        (("tones", "--time-shift", 0.1), "--time-shift has no effect without --augment specaug"),
        (("digits", "--mel-bands", 20), "--sample-rate are for a folder of recordings, and digits"),
        (("tones", "--mel-bands", 2), "--mel-bands must be from 8 to 256, got 2"),
        (("tones", "--augment", "imagenet", "--image-size", 32), "of which no crops are cut"),
        (("tones", "--hide-time", 2, "--augment", "specaugment"), r"--hide-time must be in \[0, 1"),
    ],
)
def test_what_does_not_fit_is_refused(inside, line, said: str, folder: Path) -> None:
    with pytest.raises(SystemExit, match=said):
        main(inside, "train", *line, "--student", "mlp:4", "--out", "refused")
    assert not (folder / "refused").exists()


def test_a_student_of_recordings_takes_no_other_images(
    inside: pytest.MonkeyPatch, folder: Path
) -> None:
    for name in ("300", "900", "2500"):
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (20, 40), 50 * i).save(folder / "pictures" / name / f"{i}.png")
    line = ("train", "pictures", "--student", "mlp:4", "--teacher", "run", "--out", "refused")
    assert "takes recordings, and the data are images" in refused(inside, *line)
