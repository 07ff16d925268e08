"""neural-tangents, importable on current JAX.

neural-tangents 0.6.5, its last release (December 2023), uses names that JAX has since moved, and
imports TensorFlow in one experimental module. `load` adds the names where they are missing, puts an
empty module in place of the experimental one, and replaces nothing else.

Source: Novak et al. (2020), arXiv:1912.02803.
"""

import functools
import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass
from typing import Any

from dsdistill.harness.errors import UserError

TESTED_JAX = "0.10.2"  # the JAX release on which every name below was found

# Module in which neural-tangents looks -> module in which current JAX has the names.
_MOVED_NAMES = {
    "jax.core": {
        "jax.extend.core": ("ClosedJaxpr", "Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var"),
        "jax._src.core": ("AbstractValue", "ShapedArray", "Value", "eval_context"),
    },
    "jax.util": {"jax._src.util": ("safe_map", "safe_zip")},
    "jax.interpreters.ad": {
        "jax._src.interpreters.ad": (
            "backward_pass",
            "config",
            "reducing_transposes",
            "source_info_util",
        )
    },
}


@dataclass(frozen=True)
class NeuralTangents:
    """The two modules of neural-tangents that are used here."""

    stax: Any
    nt: Any


@functools.cache
def load() -> NeuralTangents:
    """Import neural-tangents; the first call takes about a second.

    Raises:
        UserError: If it is not installed; the message names the extra that brings it.
        ImportError: If a name cannot be found; the message states the JAX release that works.
    """
    if importlib.util.find_spec("neural_tangents") is None:
        raise UserError(
            "--kernel module:attribute needs neural-tangents: pip install 'dsdistill[tangents]' "
            "(in a clone: pip install -c constraints.txt -e '.[tangents]')"
        )
    import jax

    try:
        _restore_moved_names()
        return NeuralTangents(
            importlib.import_module("neural_tangents.stax"),
            importlib.import_module("neural_tangents"),
        )
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"neural-tangents does not import on JAX {jax.__version__} ({error}); "
            f"it was tried on JAX {TESTED_JAX}: pip install jax=={TESTED_JAX} jaxlib=={TESTED_JAX}"
        ) from error


def _restore_moved_names() -> None:
    for target, sources in _MOVED_NAMES.items():
        module = _import_or_create(target)
        for source, names in sources.items():
            origin = importlib.import_module(source)
            for name in names:
                _add_if_missing(module, name, getattr(origin, name))
    import jax
    import jax.core
    import jax.extend.core

    _add_if_missing(jax.random, "KeyArray", jax.Array)
    # Removed for good. Both are only compared with, so values that equal nothing serve.
    _add_if_missing(jax.core, "DShapedArray", type("DShapedArray", (), {}))
    ad = _import_or_create("jax.interpreters.ad")
    _add_if_missing(ad, "zeros_like_p", jax.extend.core.Primitive("zeros_like"))
    # The only part that needs TensorFlow; nothing here uses it.
    name = "neural_tangents.experimental"
    sys.modules.setdefault(name, types.ModuleType(name))


def _import_or_create(name: str) -> types.ModuleType:
    """Import a module, or create an empty one of that name where JAX no longer has it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, child = name.rpartition(".")
        module = sys.modules[name] = types.ModuleType(name)
        setattr(importlib.import_module(parent), child, module)
        return module


def _add_if_missing(module: types.ModuleType, name: str, value: Any) -> None:
    # Through vars: hasattr would run JAX's module __getattr__, which raises for removed names.
    if name not in vars(module):
        setattr(module, name, value)
