"""Memory: what would not fit is one line before it is taken, and images are there once."""

import json
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from kd_support import main, refused, write_npz

from dsdistill.harness import memory
from dsdistill.harness.data import labeled_images, preprocess
from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.errors import UserError
from kd.data import batching
from kd.models import networks, seals
from kd.models.zoo import builtin, huggingface

FREE = 64 << 20
SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and one whose valid description asks for a million channels."""
    folder = tmp_path_factory.mktemp("allocation")
    write_npz(folder / "three.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("kd.runs.curves.draw", lambda folder: None)
        options = ("--student", "convnet:4", "--epochs", 1, "--device", "cpu")
        main(patch, "train", "three.npz", *options, "--out", "run")
    shutil.copytree(folder / "run", folder / "huge")
    (folder / "huge" / "report.json").unlink()
    card = seals.read(folder / "run", seals.CARD)
    seals.write(folder / "huge", seals.CARD, card | {"name": "convnet:1000000"}, [seals.WEIGHTS])
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "huge", "three.npz"),
        ("evaluate", "run", "three.npz", "--teacher", "huge"),
        ("train", "three.npz", "--student", "mlp:4", "--teacher", "huge", "--out", "new"),
        ("train", "three.npz", "--student", "huge", "--out", "new"),
        ("train", "three.npz", "--student", "mlp:4", "--peers", "mlp:10000000", "--out", "new"),
        ("export", "huge", "--format", "safetensors"),
    ],
)
def test_a_huge_network_is_refused_before_its_memory_is_taken(
    work: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...]
) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setattr(memory, "available", lambda: FREE)
    before = psutil.Process().memory_info().rss
    line = refused(monkeypatch, *arguments)
    assert psutil.Process().memory_info().rss - before < 4 * FREE
    assert "of memory or more, 64.0 MiB is free: use a smaller network" in line
    if "huge" in arguments:
        assert (
            "huge/model.json describes a network that cannot be built here: convnet:1000000" in line
        )
    assert not list(work.glob("new*"))


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        ("convnet:1024", SHAPE, "of memory or more"),  # 9 MiB and twice 36 MiB
        ("vit_tiny_patch16_224(embed_dim=1536)", (224, 224, 3), "of memory or more"),
        ("vit_tiny_patch16_224(depth=1000000000)", (224, 224, 3), "layers and weights"),
        ("resnet18", (1600, 1600, 3), "of memory or more"),  # its first map has 156 MiB
        ("torchvision:vgg11", (224, 224, 3), "of memory or more"),
    ],
)
def test_names_are_held_to_the_memory_too(
    monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, int, int], what: str
) -> None:
    monkeypatch.setattr(memory, "available", lambda: FREE)
    with pytest.raises(UserError, match=what) as caught:
        networks.build(name, shape, 3)
    assert "\n" not in str(caught.value)
    assert name.partition("(")[0] in str(caught.value)


def test_what_fits_is_made_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: FREE)
    torch.manual_seed(5)
    plain = builtin.network("convnet:16", SHAPE, 3).state_dict()
    made = networks.build("convnet:16", SHAPE, 3, seed=5).network.state_dict()
    assert all(torch.equal(made[name], value) for name, value in plain.items())
    assert networks.build("test_vit", (160, 160, 3), 3).network is not None


def test_a_configuration_with_a_billion_labels_is_refused(tmp_path: Path) -> None:
    """The library would make a name for each before it makes any layer."""
    pytest.importorskip("transformers")
    config = {"model_type": "vit", "num_labels": 1_000_000_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has num_labels 1000000000: at most 1,000,000 are read"):
        huggingface.network(str(tmp_path), 3, 3)
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8}
    tiny |= {"intermediate_size": 8, "patch_size": 4}
    names = {str(i): str(i) for i in range(3)}
    stored = config | tiny | {"id2label": names}
    network = huggingface.network("any", 3, 3, config=stored)
    assert network(torch.zeros(1, 3, 8, 8)).logits.shape == (1, 3)


@pytest.mark.parametrize("kind", ["standardise", "centre", "none", "zca"])
def test_images_are_preprocessed_in_parts_to_the_same_bits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, n = np.random.default_rng(0), 2 * labeled_images.IMAGES_PER_BATCH + 1
    data = LabeledImages(rng.integers(0, 256, (n, 4, 4, 3), np.uint8), np.arange(n) % 2, ("a", "b"))
    fitted = preprocess.fit(kind, data.chunks, data.shape)
    expected = fitted.apply(data.store).transpose(0, 3, 1, 2)
    most, images = 0, Examples.images

    def counted(self: Examples, indices: slice = slice(None)) -> np.ndarray:
        nonlocal most
        part = images(self, indices)
        most = max(most, len(part))
        return part

    monkeypatch.setattr(Examples, "images", counted)
    batches = batching.prepare_resident(Examples(data, fitted), 16, torch.device("cpu"))
    assert batches.images is not None
    assert batches.images.is_contiguous()
    np.testing.assert_array_equal(batches.images, expected)
    assert most == (n if kind == "zca" else labeled_images.IMAGES_PER_BATCH)
