"""Quantised students as ONNX and as programs of torch: what differs from those in float32."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsdistill.harness.errors import UserError
from kd.models.networks import Classifier
from kd.models.quantised import qdq_network
from kd.models.quantised.qdq_network import Dialect
from kd.models.saved_models import Model

OPSET = 21  # of ONNX, the first with weights of 4 bits
LARGEST_OF_FOUR_BITS = 7


def with_codes(model: Model, dialect: Dialect) -> Classifier:
    """The classifier of a quantised student with integer codes, see `qdq_network.build`."""
    h, w, c = model.shape
    return qdq_network.build(model.classifier, torch.zeros(2, c, h, w), dialect)


def store_codes(graph: Any) -> None:
    """Store weights with codes of 4 bits or fewer as 4-bit integers, two in a byte.

    A runtime then expands them to float32, and computes such layers in float32. Every weight gets
    zero points of its own: onnxruntime's `session.x64quantprecision` fails on shared ones, which
    the exporter makes of equal ones.

    Args:
        graph: Graph of ONNX, changed in place.
    """
    import ml_dtypes  # comes with onnx
    from onnx import TensorProto, numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        stored = tensors.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if stored is None or stored.data_type not in (TensorProto.INT8, TensorProto.INT4):
            continue
        node.input[2] = f"{stored.name}_zero_points"
        if node.input[2] in tensors:  # of a weight that another layer has too
            continue
        codes = numpy_helper.to_array(stored)
        few = np.abs(codes).max(initial=0) <= LARGEST_OF_FOUR_BITS
        new = {stored.name: codes, node.input[2]: np.zeros(len(codes), np.int8)}
        for name, values in new.items():
            narrow = values.astype(ml_dtypes.int4) if few else values
            tensors[name] = numpy_helper.from_array(narrow, name)  # as bytes, unlike make_tensor
    read = {name for node in graph.node for name in node.input}
    del graph.initializer[:]
    graph.initializer.extend(tensor for name, tensor in tensors.items() if name in read)
    del graph.value_info[:]  # shapes of intermediate results, which a runtime infers


def register_torch_operators() -> None:
    """Register the operators of `TorchDialect`, which torchao has.

    Raises:
        UserError: If it is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            "--format pt2 of a quantised student needs torchao: pip install 'dsdistill[int8]'"
        )
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its import warns of its own code
    try:
        import torchao  # noqa: F401
    finally:
        logger.setLevel(level)


def run_onnx(
    path: Path, input_name: str, *, optimised: bool = True, precise: bool = False
) -> Callable[[Tensor], Tensor]:
    """Load a file in onnxruntime, on the CPU.

    Args:
        path: The file.
        input_name: Name of its input.
        optimised: Whether layers between integers are computed with them; else in float32.
        precise: Whether integer kernels that saturate on CPUs without VNNI are avoided.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not optimised:
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_DISABLE_ALL
    if precise:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {input_name: images.numpy()})[0])
