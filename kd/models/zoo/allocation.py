"""Refuse networks that would not fit into memory, before the memory is taken.

A name or a description from a file may ask for any width and depth. The size of each tensor is
known when it is created, and its memory is taken only when it is filled: so every operation that
creates a tensor is checked before it runs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsdistill.harness import memory
from dsdistill.harness.errors import UserError

MAX_TENSORS = 30_000  # of a network; the largest known ones have a few thousand


@contextmanager
def limited(name: str) -> Iterator[None]:
    """Refuse to build a network that needs more memory than is available.

    Args:
        name: Name of the network in the message.

    Raises:
        UserError: If the tensors created inside need more than the free memory.
    """
    with _Limit(name, memory.available()):
        yield


class _Limit(TorchDispatchMode):
    """Adds up the bytes of newly created tensors, and checks the size of every result."""

    def __init__(self, name: str, free: int) -> None:
        super().__init__()
        self.name, self.free = name, free
        self.bytes = self.tensors = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        operation, kwargs = func.overloadpacket, kwargs or {}
        if not _is_meta(kwargs):
            self._check_operation(operation, args, kwargs)
        result = func(*args, **kwargs)
        # An expanded view takes no memory, but the next operation on it does.
        if isinstance(result, Tensor) and result.device.type != "meta":
            self._require(result.numel() * result.itemsize)
        return result

    def _check_operation(
        self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Refuse an operation whose result would be too large, before it takes the memory."""
        width = (kwargs.get("dtype") or torch.get_default_dtype()).itemsize
        if operation in _SIZED and args and isinstance(args[0], list | tuple):
            self.tensors, self.bytes = self.tensors + 1, self.bytes + width * math.prod(args[0])
            self._require(self.bytes)
        elif operation is _ATEN.linspace:  # a list of one rate per layer
            self.tensors += int(args[2])
        elif operation is _ATEN.convolution:
            images, weight, stride = args[0], args[1], args[3]
            positions = math.prod(images.shape[2:]) // math.prod(stride)
            self._require(images.itemsize * images.shape[0] * weight.shape[0] * positions)
        if self.tensors > MAX_TENSORS:
            raise UserError(
                f"{self.name} has more than {MAX_TENSORS:,} layers and weights: "
                "use a smaller network"
            )

    def _require(self, size: int) -> None:
        if size > self.free:
            raise UserError(
                f"{self.name} needs {memory.format_bytes(size)} of memory or more, "
                f"{memory.format_bytes(self.free)} is free: use a smaller network"
            )


_ATEN: Any = torch.ops.aten
_NAMES = ("empty", "empty_strided", "zeros", "ones", "full", "rand", "randn")
_SIZED = {getattr(_ATEN, name) for name in _NAMES}  # their first argument is a size


def _is_meta(kwargs: Mapping[str, Any]) -> bool:
    """Whether the tensor is created on the meta device: with a shape, without memory."""
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"
