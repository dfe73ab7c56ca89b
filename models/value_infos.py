"""The values inside an ONNX graph, by ONNX's own inference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx


@dataclass(frozen=True, slots=True)
class ValueInfo:
    """The sizes of a value and the type of its elements, a ``TensorProto.DataType``."""

    sizes: tuple[int, ...]
    kind: int

    @property
    def size_bytes(self) -> int:
        width: int = onnx.helper.tensor_dtype_to_np_dtype(self.kind).itemsize
        return width * math.prod(self.sizes)


def infer_values(model: onnx.ModelProto, batch: int) -> dict[str, ValueInfo]:
    """All values that the nodes compute, for a batch of so many samples."""
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    for value in (*sized.graph.input, *sized.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.HasField("dim_param"):
                size.dim_value = batch
    inferred = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    types = {v.name: v.type.tensor_type for v in (*inferred.value_info, *inferred.output)}
    return {
        name: ValueInfo(tuple(size.dim_value for size in found.shape.dim), found.elem_type)
        for name, found in types.items()
    }
