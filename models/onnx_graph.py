"""A traced client segment as ONNX models with its weights as inputs: forward, and backward."""

from __future__ import annotations

from typing import Any

import onnx
import torch

from models.backward import derive_backward
from models.program import INPUT, OUTPUT, SegmentProgram, quiet
from wire.bundle import CLIENT_BACKWARD, CLIENT_BACKWARD_KEPT, CLIENT_FORWARD_KEPT
from wire.errors import ModelError

OPSET = 18
PRODUCER = "splitfleet"


def program_to_onnx(program: SegmentProgram, what: str) -> bytes:
    """Serialised ONNX model: inputs under their own names and ``x``, output ``activations``.

    Plain operators of opset 18 only. Raises ModelError, with ``what`` in front, for a segment that
    ONNX cannot express.
    """
    try:
        with quiet():
            exported = torch.onnx.export(
                program.exported,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[*program.names, INPUT],
                output_names=[OUTPUT],
            )
    except Exception as exc:  # the exporter raises many types of its own
        cause = exc.__cause__ or exc
        raise ModelError(f"{what}: not exportable to ONNX ({_one_line(cause)})") from exc
    assert exported is not None, "torch.onnx.export with dynamo gives a program"
    return _serialise(exported.model_proto, "client_forward", what)


def program_to_onnx_backward(program: SegmentProgram, what: str) -> dict[str, bytes]:
    """Serialised ONNX models of the backward pass by file name: whole, and in two halves; see
    ``models.backward``. Raises ModelError naming the layer that has no backward pass."""
    graphs = derive_backward(program, opset=OPSET)
    models = {
        CLIENT_BACKWARD: graphs.whole,
        CLIENT_FORWARD_KEPT: graphs.forward,
        CLIENT_BACKWARD_KEPT: graphs.backward,
    }
    return {
        file: _serialise(model, file.removesuffix(".onnx"), what) for file, model in models.items()
    }


def _serialise(model: Any, name: str, what: str) -> bytes:
    _clean(model, name)
    _check_plain(model, what)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _clean(model: Any, name: str) -> None:
    """Take out what names the machine that exported: stack traces, paths, tool versions."""
    model.producer_name = PRODUCER
    model.producer_version = ""
    model.doc_string = ""
    model.ClearField("metadata_props")
    graph = model.graph
    graph.doc_string = ""
    graph.name = name
    parts = (graph.node, graph.input, graph.output, graph.initializer, graph.value_info)
    for part in (graph, *(item for group in parts for item in group)):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    del graph.value_info[:]  # shapes of intermediate values: the runtime works them out
    for value in (*graph.input, *graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.HasField("dim_param"):
                size.dim_param = "batch"


def _check_plain(model: Any, what: str) -> None:
    foreign = sorted({f"{n.domain}.{n.op_type}" for n in model.graph.node if n.domain})
    foreign += [function.name for function in model.functions]
    if foreign:
        raise ModelError(f"{what}: needs ONNX operators beyond the standard: {', '.join(foreign)}")


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:400]
