"""Train and eval mode of a network's layers, as its user has chosen them."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager

from torch import nn


def train_except(module: nn.Module, eval_layers: Set[str]) -> None:
    """Train mode for all layers but those of these names, which are put into eval mode."""
    for name, layer in module.named_modules():
        layer.training = name not in eval_layers


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode for a while; each layer then has the mode again that it had before."""
    in_training = [layer for module in modules for layer in module.modules() if layer.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for layer in in_training:
            layer.training = True
