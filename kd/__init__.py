"""Knowledge distillation: a small student learns from a large teacher.

`distill` trains any `torch.nn.Module` from others; `StudentClassifier` is the same as a classifier
of scikit-learn; `losses` has every loss by its short name; `perturb` attacks a network;
`synthesize` makes images from a network's weights. They are imported at their first use, with
PyTorch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsdistill.harness.errors import UserError
    from kd import losses
    from kd.api import DistillResult, distill
    from kd.api_synthesis import SynthesisResult, synthesize
    from kd.estimator import StudentClassifier
    from kd.objectives.adversary import Bounds, perturb
    from kd.recipe import Recipe
    from kd.training.rounds import Round

_MODULES = {
    "Bounds": "kd.objectives.adversary",
    "DistillResult": "kd.api",
    "Recipe": "kd.recipe",
    "Round": "kd.training.rounds",
    "StudentClassifier": "kd.estimator",
    "SynthesisResult": "kd.api_synthesis",
    "UserError": "dsdistill.harness.errors",
    "distill": "kd.api",
    "perturb": "kd.objectives.adversary",
    "synthesize": "kd.api_synthesis",
}
__all__ = [
    "Bounds",
    "DistillResult",
    "Recipe",
    "Round",
    "StudentClassifier",
    "SynthesisResult",
    "UserError",
    "distill",
    "losses",
    "perturb",
    "synthesize",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(_MODULES.get(name, f"{__name__}.{name}"))
    value = globals()[name] = getattr(module, name) if name in _MODULES else module
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
