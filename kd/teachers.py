"""A teacher from an earlier run or from timm, checked against the data and adapted to them."""

from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from dsdistill.harness.preprocess import Preprocess
from kd import models, networks
from kd.adapters import adapter
from kd.networks import Shape


class Teacher(nn.Module):
    """Maps images in the data's preprocessed space to logits of the data's classes.

    A network trained by MSE on centred labels answers with its outputs divided by their fitted
    temperature, so that a softmax of them are calibrated probabilities.
    """

    def __init__(self, model: models.Model, data: Preprocess, size: tuple[int, int]) -> None:
        super().__init__()
        self.adapter = adapter(data, model.preprocess, size, model.shape[:2])
        self.classifier = model.classifier
        self.temperature = model.output_temperature

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.classifier(self.adapter(images)) / self.temperature


def load(name: str, preprocess: Preprocess, shape: Shape, classes: tuple[str, ...]) -> Teacher:
    """A frozen teacher in evaluation mode.

    Args:
        name: Folder of an earlier run of `kd train`, or a timm name, whose published weights are
            loaded. A built-in network has none and is refused.
        preprocess: What was applied to the images that it will be given.
        shape: Of those images.
        classes: Of the data, in order. Of a timm model only their number can be compared.

    Raises:
        UserError: If there is no such teacher, or it does not fit the data.
    """
    who = f"teacher {name}"
    model = models.load_run(Path(name)) if Path(name).is_dir() else _timm(name, shape, classes)
    models.check_classes(who, model.classes, classes)
    if model.shape[-1] != shape[-1]:
        raise UserError(
            f"{who} takes images of {model.shape[-1]} channels, the data have {shape[-1]}"
        )
    return Teacher(model, preprocess, shape[:2]).eval().requires_grad_(False)


def _timm(name: str, shape: Shape, classes: tuple[str, ...]) -> models.Model:
    own, count = networks.published(name, shape[-1])
    models.check_count(f"teacher {name}", count, classes)  # before a long download
    classifier = networks.build(name, shape, len(classes), pretrained=True)
    return models.Model(classifier, name, classes, shape, own)
