"""Networks as learners of the evaluation protocol: the same number of steps on every data set.

They are trained by MSE on centred labels, whether stored, hard or a teacher's, and keep their last
weights. There is no model selection: the learning rate ends at 0, and every data set gets the same
number of optimizer steps, so that arms differ only in their images and labels.

The networks of the KIP papers are trained centred, f(x; theta) - f(x; theta_0), without decay, at
a rate that each training set's own tangent kernel gives; `uncentred:NAME` trains them as they start
and `centred:NAME` any other network so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dsdistill.harness.data.labeled_images import Examples
from kd import recipes
from kd.data import augment, batching
from kd.evaluation import scoring
from kd.models import network_names, networks
from kd.models.networks import Classifier, Shape
from kd.models.zoo import builtin
from kd.objectives import terms
from kd.objectives.schemes import Distillation
from kd.parallel import engine
from kd.recipe import Recipe, override
from kd.training import stable_rate
from kd.training.loop import train

CURVE_POINTS = 60  # points of a loss curve
VERSIONED_PACKAGES = ("dsdistill", "torch", "timm", "torchvision")

# The literature's names of these networks, which it uses in their form for small images.
ALIASES: Mapping[str, str] = {
    "resnet18": "small-resnet18",
    "vgg11": "small-vgg11",
    "vit": "small-vit",
}

# Factors of the rate of `recipes.KIP`: two decades, as explained there.
KIP_RATE_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)

# Networks that are centred unless their name says otherwise, and prefixes that say so.
KIP_NETWORKS = ("kip-convnet", "kip-fc")
CENTRED, UNCENTRED = "centred", "uncentred"
# Shares of the largest stable rate, from which validation images choose.
STABLE_SHARES = (0.5, 1.0)
RATE_SAMPLE = 200  # images that the stable rate is estimated on, of a larger set


@dataclass(frozen=True)
class NetworkLearner:
    """A learner that trains a network for a fixed number of steps.

    Attributes:
        name: Name, as in `network_learner`.
        recipe: Recipe, whose steps are the budget. The shifts of its `crop-flip` are an eighth of
            an image, whatever its `crop_padding`.
        limit: None: a network trains on any number of images.
        factors: Factors of the recipe's learning rate, the grid from which one is chosen.
        flip: Whether augmentation flips images too; a flipped digit is another digit, or none.
        device: `cpu`, `cuda` or `cuda:N`.
        centred: Whether the function that the network starts as is subtracted.
        stable: Whether the recipe's rate is a share of the largest stable rate on the training set,
            see `kd.training.stable_rate`: one grid of shares for all data, and for each set rates
            of its own. The report then has the share.
    """

    name: str
    recipe: Recipe = recipes.SMALL
    limit: int | None = None
    factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    flip: bool = False
    device: str = "cpu"
    centred: bool = False
    stable: bool = False

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to choose from, the same for all data."""
        return tuple(self.recipe.lr * factor for factor in self.factors)

    def with_rate(self, rate: float) -> "NetworkLearner":
        """The same learner with one learning rate."""
        return replace(self, recipe=replace(self.recipe, lr=rate), factors=(1.0,))

    def with_augmentation(self) -> "NetworkLearner":
        """The same learner with random shifts, and with flips if `flip` is set."""
        hflip = 0.5 if self.flip else 0.0
        return replace(self, recipe=replace(self.recipe, augment="crop-flip", hflip=hflip))

    @property
    def identity(self) -> dict[str, Any] | None:
        """All that its results depend on besides data and seed, JSON-compatible.

        None for weights from a file and for the user's own code, whose content may change.
        """
        name = _full_name(self.name)
        if network_names.parse(name).file is not None or networks.is_user_module(name):
            return None
        kind = {"centred": True} if self.centred else {}
        kind |= {"stable": True} if self.stable else {}
        return kind | {
            "name": self.name,
            "network": name,
            "recipe": asdict(self.recipe),
            "rates": list(self.rates),
            "flip": self.flip,
            "device": self.device,
            "versions": {name: version(name) for name in VERSIONED_PACKAGES},
        }

    @property
    def accelerator(self) -> str | None:
        """Name of the GPU; None on the CPU."""
        device = torch.device(self.device)
        return None if device.type == "cpu" else torch.cuda.get_device_name(device)

    def __call__(self, train_set: Examples, validation: Examples, seed: int, /) -> "TrainedNetwork":
        shape, classes = train_set.data.shape, len(train_set.data.classes)
        recipe = replace(self.recipe, crop_padding=max(1, min(shape[:2]) // 8))
        losses: list[Tensor] = []
        with engine.temporary(self.device, recipe.precision) as on:
            device = on.device
            network = networks.build(_full_name(self.name), shape, classes, seed=seed)
            if self.stable:
                largest = _largest_rate(network.to(device), train_set, recipe.momentum)
                recipe = replace(recipe, lr=recipe.lr * largest)
            if self.centred:
                network.centre()
            resident = batching.prepare_resident(train_set, recipe.batch_size, device)
            objective = Distillation(network, terms.build(terms.parse("mse"), network))
            objective.register_forward_hook(lambda *passed: losses.append(_total_loss(passed[-1])))
            batches = augment.augment_batches(resident, recipe, classes)
            train(objective, batches, recipe, seed, on=on)
        curve = _curve(torch.stack(losses).tolist(), recipe.total_steps(len(resident)))
        name = _full_name(self.name)
        return TrainedNetwork(network.eval(), name, shape, classes, device, curve)


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A trained network as a function from images to scores, estimates of centred labels.

    Attributes:
        network: The network, on its device and in evaluation mode.
        name: Name, as in `kd.models.networks.build`.
        shape: Height, width and channels of the images.
        classes: Number of classes.
        device: Device of the network.
        curve: Pairs of a step and the mean training loss of the steps since the pair before it.
    """

    network: Classifier
    name: str
    shape: Shape
    classes: int
    device: torch.device
    curve: Sequence[tuple[int, float]]

    def __call__(self, images: Float[np.ndarray, "n h w c"], /) -> Float[np.ndarray, "n k"]:
        with torch.inference_mode(), engine.deterministic():
            parts = [
                self.network(batching.to_nchw(images[i : i + batching.SCORE_BATCH]).to(self.device))
                for i in range(0, len(images), batching.SCORE_BATCH)
            ]
            return torch.cat(parts).float().cpu().numpy()

    @property
    def facts(self) -> dict[str, Any]:
        """Parameters, FLOPs of an image, latency on the CPU and loss curve, JSON-compatible.

        FLOPs and latency depend on the network alone: they are measured once, on first use.
        """
        centred = self.network.initial is not None
        flops, single, batch = _network_costs(self.name, self.shape, self.classes, centred)
        return {
            "parameters": networks.parameter_count(self.network),
            "flops": flops,
            "latency_ms": {"1": single, str(scoring.LATENCY_BATCH): batch},
            "curve": [list(point) for point in self.curve],
        }


def network_learner(
    name: str,
    *,
    steps: int | None = None,
    device: str = "cpu",
    flip: bool = False,
    shape: Shape = (32, 32, 3),
    classes: int = 10,
) -> NetworkLearner:
    """Make the learner of a name.

    Args:
        name: Name, as in `kd.models.networks.build`, except that `resnet18`, `vgg11` and `vit`,
            with or without a width, are those for small images; `timm:resnet18` is timm's. After
            `centred:` the network is trained centred, as `kip-convnet` and `kip-fc` always are,
            except after `uncentred:`.
        steps: Number of steps instead of the recipe's; the warm-up keeps its share.
        device: `cpu`, `auto` (a GPU where there is one), `cuda` or `cuda:N`.
        flip: Whether augmentation flips images too.
        shape: Height, width and channels of the images, which a network of the user's own code is
            tried on.
        classes: Number of classes, for such a network.

    Raises:
        UserError: If there is no such network or device, or the number of steps is not positive.
    """
    full = _full_name(name)
    networks.check_name(full)
    base, prefix = full.partition(":")[0], name.partition(":")[0]
    centred = prefix == CENTRED or (base in KIP_NETWORKS and prefix != UNCENTRED)
    with engine.temporary(device) as on:
        network = NetworkLearner(name, flip=flip, device=str(on.device), centred=centred)
    if base in KIP_NETWORKS and centred:
        recipe = replace(recipes.KIP, lr=1.0, weight_decay=0.0, decay_all=False)
        network = replace(network, recipe=recipe, factors=STABLE_SHARES, stable=True)
    elif base == "kip-convnet":
        recipe = replace(recipes.KIP, lr=recipes.KIP.lr / builtin.width(full))
        network = replace(network, recipe=recipe, factors=KIP_RATE_FACTORS)
    elif base == "kip-fc":
        # A decay of the layer's weights, which are sqrt(2 / fan-in) times the trained ones.
        decay = recipes.KIP.weight_decay * 2 / builtin.width(full)
        recipe = replace(recipes.KIP, lr=1.0, weight_decay=decay)
        network = replace(network, recipe=recipe, factors=STABLE_SHARES, stable=True)
    elif _has_layer_norm(full, shape, classes):
        network = replace(network, recipe=recipes.SMALL_LAYER_NORM)
    changes = {} if steps is None else {"steps": steps}
    return replace(network, recipe=override(network.recipe, changes))


def names() -> tuple[str, ...]:
    """Names of learners besides the networks of timm, torchvision and Hugging Face."""
    hidden = ALIASES.values()
    return (*(name for name in builtin.NETWORKS if name not in hidden), *ALIASES)


def _full_name(name: str) -> str:
    """Name of the network in `kd.models.networks`."""
    base, colon, width = name.partition(":")
    if base in (CENTRED, UNCENTRED) and width:
        return _full_name(width)
    return ALIASES.get(base, base) + colon + width


def _has_layer_norm(name: str, shape: Shape, classes: int) -> bool:
    """Whether a network has layer norm, with which SGD and large rates train badly."""
    parsed = network_names.parse(name)
    if not networks.is_user_module(name):
        # The size and channels that most published networks are made for.
        shape, classes = (32, 32, 3) if parsed.zoo is None else (224, 224, 3), 2
    network = networks.build(parsed.text, shape, classes)
    return any(isinstance(module, nn.LayerNorm) for module in network.modules())


def _largest_rate(network: Classifier, train_set: Examples, momentum: float) -> float:
    """The largest stable rate of a network, on evenly spaced images of a large set."""
    data, n = train_set.data, len(train_set)
    rows = np.unique(np.linspace(0, n - 1, min(n, RATE_SAMPLE)).round().astype(int))
    sample = Examples(data.select(rows), train_set.preprocess, None, train_set.is_preprocessed)
    device = next(network.parameters()).device
    images = batching.to_nchw(sample.images()).to(device)
    return stable_rate.stable_rate(stable_rate.largest_curvature(network, images), momentum)


def _total_loss(loss_terms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([value.detach() for value in loss_terms.values()]).sum()


def _curve(losses: Sequence[float], steps: int) -> list[tuple[int, float]]:
    """Mean losses of up to `CURVE_POINTS` equal parts of a training, each with its last step.

    Args:
        losses: Loss of each batch; a step may take several batches.
        steps: Number of steps.
    """
    parts = np.array_split(np.asarray(losses, np.float64), min(CURVE_POINTS, len(losses)))
    ends = np.cumsum([len(part) for part in parts]) * steps / len(losses)
    return [(round(end), float(part.mean())) for end, part in zip(ends, parts, strict=True)]


@lru_cache(maxsize=64)
def _network_costs(
    name: str, shape: Shape, classes: int, centred: bool
) -> tuple[int, float, float]:
    """FLOPs of one image, and milliseconds of one image and of a batch on the CPU."""
    network = networks.build(name, shape, classes).eval()
    if centred:
        network.centre()
    latency = scoring.latency(network, shape)
    h, w, c = shape
    # The counter does not know the CPU's fused attention, only the products it consists of.
    unfused = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, unfused, torch.no_grad():
        network(torch.zeros(1, c, h, w))
    single, batch = (latency[f"latency_ms_batch_{n}"] for n in (1, scoring.LATENCY_BATCH))
    return counter.get_total_flops(), single, batch
