"""OpenVINO, which has a LoRA operation for CPUs: it fuses product, shrink and expansion when a model is compiled.

The fusion looks for adapters that are variables of the model, as OpenVINO GenAI makes them; constants are not fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.lora import SCALE, Call, Case, Outputs, Pair
from benchmarks.common.optional import optional

FUSED = "LoRA"  # the type of the fused operation in a compiled model
# Of float16 it makes bfloat16 on CPUs without arithmetic for it: another, less exact product.
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def with_openvino(case: Case, pairs: Sequence[Pair]) -> Call | None:
    """A call of the compiled model, on torch's number of threads; None without OpenVINO or for another dtype.

    Its outputs are written over by the next call. Raises AssertionError where OpenVINO did not fuse the adapters.
    """
    openvino = optional("openvino", "OpenVINO")
    if openvino is None or case.x.dtype not in TYPES or not case.x.is_cpu:
        return None
    kind = getattr(openvino.Type, TYPES[case.x.dtype])
    options = {"INFERENCE_PRECISION_HINT": kind, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(_model(openvino, kind, case, pairs), "CPU", options)
    operations = [node.get_rt_info()["layerType"] for node in compiled.get_runtime_model().get_ordered_ops()]
    if operations.count(FUSED) != len(pairs):
        raise AssertionError(f"OpenVINO fused {operations.count(FUSED)} of {len(pairs)} adapters: {operations}")
    request = compiled.create_infer_request()
    outputs = [torch.empty(len(case.x), len(weight), dtype=case.x.dtype) for weight in case.weights]
    request.set_input_tensor(_tensor(openvino, case.x))
    for i, y in enumerate(outputs):
        request.set_output_tensor(i, _tensor(openvino, y))

    def call() -> Outputs:
        request.infer()
        return outputs

    return call


def _model(openvino: Any, kind: Any, case: Case, pairs: Sequence[Pair]) -> Any:
    ops, results, sinks = openvino.opset13, [], []

    def constant(value: Tensor) -> Any:
        return openvino.op.Constant(_tensor(openvino, value), False)

    def variable(name: str, value: Tensor) -> Any:
        read = ops.read_value(constant(value), name, kind, list(value.shape))
        sinks.append(openvino.op.assign(read, name))
        return read

    x = ops.parameter(list(case.x.shape), kind)
    for i, (weight, (down, up)) in enumerate(zip(case.weights, pairs, strict=True)):
        scale = torch.full((1, len(down)), SCALE).to(down)
        t = ops.multiply(ops.matmul(x, variable(f"down {i}", down), False, True), variable(f"scale {i}", scale))
        expanded = ops.matmul(t, variable(f"up {i}", up), False, True)
        results.append(ops.result(ops.add(ops.matmul(x, constant(weight), False, True), expanded)))
    return openvino.Model(results, sinks, [x])


def _tensor(openvino: Any, value: Tensor) -> Any:
    """The same memory. NumPy has no bfloat16, so its bits are handed over."""
    if value.dtype == torch.bfloat16:
        return openvino.Tensor(value.view(torch.int16).numpy(), openvino.Shape(value.shape), openvino.Type.bf16)
    return openvino.Tensor(value.numpy(), shared_memory=True)
