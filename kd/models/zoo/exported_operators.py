"""The operators that an exported program may call, and the checks of their arguments.

They compute tensors from tensors and touch nothing else: no file, no process, no library. Some
operators of torch trust their arguments, and read or write beyond a tensor where these are wrong:
the checks that torch's Python layer makes before it calls them are made here.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dsdistill.harness.errors import UserError
from kd.models.zoo.exported_archive import NotAllowed, printable
from kd.models.zoo.exported_sizes import require_below_limit

# The operators of exported image networks of kd, timm, torchvision and transformers, and close
# relatives of these operators. Names that end in _ change their first argument, an intermediate
# result. Left out are operators that read or write files, print, draw random numbers, return
# uninitialised memory or trust indices without a check.
_OPERATOR_NAMES = """
_adaptive_avg_pool2d _log_softmax _native_batch_norm_legit_no_training _softmax _to_copy
_unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact2d abs abs_
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d add add_ addcdiv addcmul addcmul_
addmm alias all amax amin any arange argmax argmin argsort as_strided atan atan2 avg_pool1d
avg_pool2d baddbmm batch_norm bitwise_and bitwise_not bitwise_or bitwise_xor bmm
broadcast_tensors broadcast_to cat ceil celu channel_shuffle chunk clamp clamp_ clamp_max
clamp_min clone col2im concat constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose2d
convolution copy copy_ cos cosh cumprod cumsum detach detach_ diag diagonal diff div div_ dot
dropout dropout_ dsplit einsum elu elu_ embedding eq erf exp expand expand_as expm1 eye
feature_dropout fill_ flatten flip floor floor_divide fmod full full_like gather ge gelu gelu_
glu grid_sampler group_norm gt hardshrink hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh
hardtanh_ hsplit im2col index index_select instance_norm isfinite isinf isnan layer_norm le
leaky_relu leaky_relu_ lerp lift_fresh_copy linalg_vector_norm linear linspace log log10 log1p
log2 log_sigmoid log_softmax logical_and logical_not logical_or logical_xor logsumexp lt
masked_fill masked_fill_ matmul max max_pool1d max_pool2d max_pool2d_with_indices maximum mean
meshgrid min minimum mish mish_ mm movedim mul mul_ multiply mv narrow native_group_norm
native_layer_norm ne neg new_full new_ones new_zeros norm one_hot ones ones_like outer pad
permute pixel_shuffle pixel_unshuffle pow prelu prod reciprocal reflection_pad1d
reflection_pad2d relu relu6 relu6_ relu_ remainder repeat repeat_interleave replication_pad2d
reshape reshape_as rms_norm roll rot90 round rsqrt rsub scalar_tensor
scaled_dot_product_attention scatter select selu selu_ sigmoid sigmoid_ sign silu silu_ sin sinh
slice softmax softplus softshrink sort split split_with_sizes sqrt square squeeze stack std sub
sub_ sum swapaxes sym_numel sym_size sym_stride t tan tanh tanh_ tensor_split threshold
threshold_ tile to topk transpose tril triu true_divide type_as unbind unflatten unfold
unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_nearest2d var var_mean view view_as
vsplit where zero_ zeros zeros_like
"""
OPERATORS = frozenset(_OPERATOR_NAMES.split())
ASSERTIONS = frozenset({"_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"})
# A view as another dtype: a bool could be other than 0 and 1, which kernels rely on.
REFUSED_OVERLOADS = frozenset({("view", "dtype")})
SKIPPED_OPERATOR = "_assert_tensor_metadata"  # operators check dtype and device themselves

Scalar = int | float | bool
SYMBOLIC_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "_operator.add": operator.add,
    "_operator.sub": operator.sub,
    "_operator.mul": operator.mul,
    "_operator.floordiv": operator.floordiv,
    "_operator.truediv": operator.truediv,
    "_operator.mod": operator.mod,
    "_operator.neg": operator.neg,
    "_operator.pos": operator.pos,
    "_operator.eq": operator.eq,
    "_operator.ne": operator.ne,
    "_operator.lt": operator.lt,
    "_operator.le": operator.le,
    "_operator.gt": operator.gt,
    "_operator.ge": operator.ge,
    "_operator.and_": operator.and_,
    "_operator.or_": operator.or_,
    "math.trunc": math.trunc,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "torch.sym_int": int,
    "torch.sym_float": float,
    "torch.sym_not": operator.not_,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_ite": lambda condition, then, other: then if condition else other,
}


def resolve(target: str) -> Any:
    """The operator of that name, such as `torch.ops.aten.relu.default`.

    Raises:
        NotAllowed: If it is not on the list, or writes into other arguments than its first.
        UserError: If this version of torch does not have it.
    """
    name, overload = split_target(target)
    if name not in OPERATORS:
        raise NotAllowed(f"the operator {printable(target)} is not allowed")
    packet = getattr(torch.ops.aten, name)
    if overload not in packet.overloads():
        raise UserError(f"this torch has no operator {target}")
    function = getattr(packet, overload)
    if not returns_tensors(function._schema, name) or (name, overload) in REFUSED_OVERLOADS:
        raise NotAllowed(f"the operator {printable(target)} is not allowed")
    if function._schema.is_mutable and not name.endswith("_"):
        raise NotAllowed(f"the operator {printable(target)} writes into its arguments")
    return function


def split_target(target: str) -> tuple[str, str]:
    """Split a target into name and overload of an operator of `aten`.

    Raises:
        NotAllowed: If it is not such an operator.
    """
    match = re.fullmatch(r"torch\.ops\.aten\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)", target)
    if match is None:
        raise NotAllowed(f"the operator {printable(target)} is not allowed")
    return match[1], match[2]


def with_checks(function: Any) -> Callable[..., Any]:
    """Add checks of the arguments that an operator of torch trusts.

    Args:
        function: An operator from `resolve`.

    Returns:
        A function of the same arguments that raises a ValueError where they are wrong.
    """
    check = _CHECKS.get(function._schema.name.removeprefix("aten::"))
    if check is None:
        return function
    names = [argument.name for argument in function._schema.arguments]

    def call(*args: Any, **kwargs: Any) -> Any:
        check({**dict(zip(names, args, strict=False)), **kwargs})
        return function(*args, **kwargs)

    return call


def returns_tensors(schema: Any, name: str) -> bool:
    """Whether an overload returns tensors, or sizes of one; other overloads may join strings."""
    kinds = {str(result.type) for result in schema.returns}
    sizes = {"int", "SymInt"} if name.startswith("sym_") else set()
    return bool(kinds) and kinds <= {"Tensor", "List[Tensor]", *sizes}


def restrict_to_numbers(function: Callable[..., Any]) -> Callable[..., Scalar]:
    """Wrap a function so that it accepts only numbers, and returns only numbers below the limit."""

    def checked(*args: object) -> Scalar:
        if not all(isinstance(arg, int | float) for arg in args):
            raise TypeError("a size is computed from values that are not numbers")
        return require_below_limit(function(*args))

    return checked


def _check_channel_lengths(arguments: Mapping[str, Any]) -> None:
    """Require one number per channel: the kernel reads as many as there are channels."""
    channels = arguments["input"].shape[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = arguments.get(name)
        if value is not None and value.shape != (channels,):
            raise ValueError(f"{name} of batch norm is not {channels} numbers")


def _check_scales(arguments: Mapping[str, Any]) -> None:
    """Require that a scale of a resize, where present, agrees with the sizes."""
    for axis, name in ((-2, "scales_h"), (-1, "scales_w")):
        scale = arguments.get(name)
        if scale is None:
            continue
        size, new = arguments["self"].shape[axis], arguments["output_size"][axis]
        # As `interpolate` computes the size, up to rounding.
        if not new <= size * scale * (1 + 1e-6) < (new + 1) * (1 + 2e-6):
            raise ValueError(f"a resize from {size} to {new} has the scale {scale:g}")


def _check_statistics(arguments: Mapping[str, Any]) -> None:
    """Refuse to update running averages: outputs must not depend on earlier batches."""
    training = arguments.get("training", arguments.get("use_input_stats"))
    if training and arguments.get("running_mean") is not None:
        raise ValueError("it was exported in training mode: call eval() before the export")


_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "batch_norm": _check_statistics,
    "instance_norm": _check_statistics,
    "_native_batch_norm_legit_no_training": _check_channel_lengths,
    "upsample_bicubic2d": _check_scales,
    "upsample_bilinear2d": _check_scales,
    "upsample_nearest2d": _check_scales,
    "_upsample_bicubic2d_aa": _check_scales,
    "_upsample_bilinear2d_aa": _check_scales,
    "_upsample_nearest_exact2d": _check_scales,
}
