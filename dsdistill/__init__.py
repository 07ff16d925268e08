"""Dataset distillation with neural tangent kernels: many images in, a few out.

`kip` and `label_solve` distil arrays, `select` chooses among them, `evaluate` measures what
learners reach on the result, `load` reads a set that was saved, `load_data` a folder of images.
They are imported at their first use, with JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsdistill.api import (
        Distilled,
        ImageData,
        UserError,
        evaluate,
        kip,
        label_solve,
        load,
        load_data,
        load_neural_tangents,
        select,
        use_all_cores,
    )

__all__ = [
    "Distilled",
    "ImageData",
    "UserError",
    "evaluate",
    "kip",
    "label_solve",
    "load",
    "load_data",
    "load_neural_tangents",
    "select",
    "use_all_cores",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dsdistill import api

    value = globals()[name] = getattr(api, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
