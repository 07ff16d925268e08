"""Networks as learners of the evaluation protocol: the same number of steps on every data set."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from dsdistill.harness.evaluate import Learner, Predict
from dsdistill.harness.labeled import Examples
from kd import data, networks, recipes, terms
from kd.composition import Spec
from kd.objectives import Distillation
from kd.recipe import Recipe
from kd.train import train

PREDICT_BATCH = 500  # images at once


@dataclass(frozen=True)
class Network:
    """Trains a network by MSE on centred labels and keeps its last weights.

    There is no model selection: the learning rate ends at 0, and every data set gets the same
    number of optimizer steps, so that arms differ in their images alone.

    Attributes:
        name: `convnet`, `mlp`, with or without a width; or a timm name.
        recipe: Its steps are the budget.
        limit: None: it trains on any number of images.
    """

    name: str
    recipe: Recipe = recipes.SMALL
    limit: int | None = None

    def __call__(self, train_set: Examples, validation: Examples, seed: int, /) -> Predict:
        classes = len(train_set.data.classes)
        network = networks.build(self.name, train_set.data.shape, classes, seed=seed)
        batches = data.batches(train_set, self.recipe.batch_size, torch.device("cpu"))
        objective = Distillation(network, terms.build([Spec("mse")], network))
        train(objective, batches, self.recipe, seed)
        network.eval()

        def predict(images: Float[np.ndarray, "n h w c"], /) -> Float[np.ndarray, "n k"]:
            with torch.inference_mode():
                parts = [
                    network(data.to_nchw(images[i : i + PREDICT_BATCH])).numpy()
                    for i in range(0, len(images), PREDICT_BATCH)
                ]
            return np.concatenate(parts)

        return predict


def learner(name: str) -> Learner:
    """The learner of that name.

    Raises:
        UserError: If there is no such network.
    """
    networks.check_name(name)
    return Network(name)
