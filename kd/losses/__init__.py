"""Losses as pure functions: float32 inside, batch mean, no gradient into a teacher.

Each is here by the short name that it has in `--loss`, such as `kd.losses.dkd`, and by its full
name in its module, such as `kd.losses.response.dkd`. torch is imported at the first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd.losses.short_names import *  # noqa: F403
else:  # a type checker would take every name for one of these

    def __getattr__(name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("kd.losses.short_names"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
