"""The backward pass of a client segment as an ONNX graph, for devices without torch.

Reverse-mode differentiation over the traced segment: each layer has a rule that writes its forward
pass as ONNX nodes and gives a function that writes its backward pass. The formulas are ours, since
ONNX has no gradient operators that ONNX Runtime's wheels run; each is compared with autograd, in
tests and again at every export.
"""

from models.backward.derive import BackwardGraphs, derive_backward

__all__ = ["BackwardGraphs", "derive_backward"]
