"""Small real networks, with layers that feature terms can name, for the tests of terms."""

import kd_support as support
import torch

from dsdistill.harness.data import preprocess
from kd.data import batching
from kd.models import networks, saved_models, teachers
from kd.objectives import terms
from kd.objectives.schemes import Distillation

SHAPE, CLASSES = (16, 16, 1), 4


def student() -> networks.Classifier:
    """Three blocks of convolutions named as a user would find them."""
    return networks.build("convnet:8", SHAPE, CLASSES, seed=0)


def teacher(
    name: str = "test_resnet", classes: int = CLASSES, *, seed: int = 1
) -> teachers.Teacher:
    classifier = networks.build(name, SHAPE, classes, seed=seed)
    names = tuple(f"class {i}" for i in range(classes))
    model = saved_models.Model(classifier, name, names, SHAPE, preprocess.identity(1))
    return teachers.Teacher(model, preprocess.identity(1), SHAPE[:2]).eval().requires_grad_(False)


def batches(n: int = 32) -> batching.ResidentBatches:
    return batching.prepare_resident(support.easy(n=n, size=16), 16, torch.device("cpu"))


def objective(loss: str, taught_by: teachers.Teacher | None = None) -> Distillation:
    network, taught_by = student(), taught_by or teacher()
    made = terms.build(
        terms.parse(loss), network, (taught_by,),
        sample=SHAPE, classes=CLASSES, images=32,
    )  # fmt: skip
    return Distillation(network, made, (taught_by,))


LAYERED = ("fitnet", "at", "vid", "mgd", "review", "irg")
EMBEDDED = ("srd", "rkd-distance", "rkd-angle", "sp", "pkt", "cc", "crd")
PLAIN = ("kd", "fm", "dkd", "dist", "ls", "logits", "hard")


def layers(taught_by: teachers.Teacher) -> str:
    """The convnet's first two ReLUs, of 16x16 and of 8x8 maps, with the teacher's stages."""
    names = dict(taught_by.classifier.network.named_modules())
    theirs = ("blocks.0", "blocks.1") if "blocks.0" in names else ("stages.0", "stages.1")
    theirs = ("layer1", "layer2") if "layer1" in names else theirs
    return f"2={theirs[0]},6={theirs[1]}"
