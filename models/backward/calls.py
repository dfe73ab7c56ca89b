"""One operator call of a traced segment, as the rules see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from models.backward.graph import GraphBuilder, Shape
from wire.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A float32 value of the forward pass.

    ``key`` is its name in the traced program, ``value`` the one in the ONNX graph, and ``trains``
    whether it depends on a parameter that trains.
    """

    key: str
    value: str
    shape: Shape
    trains: bool


Pullback = Callable[[str], Iterable[tuple[Term, str]]]
"""Writes the gradients of a call's arguments, given the one of its result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """``arguments`` by the operator's own names for them, tensors as terms; what is computed from
    the size of the batch is None. ``shape`` is the result's; ``index`` which result, of several.
    ``what`` and ``layer`` are for errors."""

    what: str
    layer: str
    arguments: Mapping[str, Any]
    shape: Shape
    index: int = 0

    def term(self, name: str) -> Term:
        """A tensor argument."""
        value = self.arguments[name]
        if not isinstance(value, Term):
            self.refuse(f"its argument {name} is no tensor")
        return value

    def optional(self, name: str) -> Term | None:
        """A tensor argument that may be left out."""
        return None if self.arguments[name] is None else self.term(name)

    def sizes(self, name: str, count: int) -> tuple[int, ...]:
        """A list of ``count`` whole numbers; one alone, or one of a list, stands for all."""
        value = self.arguments[name]
        numbers = list(value) if isinstance(value, (list, tuple)) else [value]
        if not all(type(number) is int for number in numbers):
            self.refuse(f"its {name} follows the batch")
        return tuple(numbers * count if len(numbers) == 1 else numbers)

    def refuse(self, reason: str, instead: str = "") -> NoReturn:
        """Raise ModelError naming the layer."""
        raise refusal(self.layer, self.what, reason, instead)


Rule = Callable[[GraphBuilder, Call], tuple[str, Pullback]]
"""Writes a call's forward pass; gives its result and how to differentiate it."""


def refusal(layer: str, what: str, reason: str, instead: str = "") -> ModelError:
    """The error for a layer without a backward pass on ONNX Runtime."""
    where = f"layer {layer}" if layer else "the client segment"
    advice = f"use {instead}, " if instead else ""
    return ModelError(
        f"{where}: {what} has no backward pass without PyTorch: {reason}; {advice}freeze the "
        "client segment, or choose backward torch if every device that trains has PyTorch"
    )
