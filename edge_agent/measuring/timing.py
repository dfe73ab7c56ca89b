"""How long a loaded backend takes for a device's part of a step.

Legend: B samples in the batch, X one sample's shape, A one activation's shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import msgspec
import numpy as np

from edge_agent.compute import ComputeBackend
from wire.bundle import Manifest


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """One entry per step, in seconds by the clock and of processor time.

    The backward lists are empty where the segment is not trained.
    """

    forward_s: tuple[float, ...] = ()
    forward_cpu_s: tuple[float, ...] = ()
    backward_s: tuple[float, ...] = ()
    backward_cpu_s: tuple[float, ...] = ()

    def __add__(self, other: Times) -> Times:
        return Times(
            **{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__}
        )

    @property
    def forward_median_s(self) -> float:
        """Median of the forward pass, by the clock."""
        return median(self.forward_s)

    @property
    def backward_median_s(self) -> float | None:
        """Median of the backward pass, by the clock."""
        return median(self.backward_s) if self.backward_s else None

    @property
    def step_median_s(self) -> float:
        """Median of forward and backward together, by the clock."""
        return median(_sums(self.forward_s, self.backward_s))

    @property
    def step_cpu_median_s(self) -> float:
        """Median of forward and backward together, in processor time."""
        return median(_sums(self.forward_cpu_s, self.backward_cpu_s))


def time_steps(
    backend: ComputeBackend, manifest: Manifest, batch: int, *, at_least_s: float, warm_up: int = 1
) -> Times:
    """Time steps on random samples until ``at_least_s`` have passed, one step at least.

    ``warm_up`` steps go before, which pay for memory, caches and libraries' first calls.
    ``backend`` has the bundle of ``manifest`` loaded. A forward pass is followed by the backward
    pass of the same batch, as in training.
    """
    rng = np.random.default_rng(0)
    x_BX = rng.standard_normal((batch, *manifest.input.shape), np.float32)
    grad_BA = rng.standard_normal((batch, *manifest.activation.shape), np.float32)
    trains = backend.can_backward and not manifest.frozen

    def step(token: int) -> Times:
        _, forward_s, forward_cpu_s = _timed(lambda: backend.forward(x_BX, token=token))
        if not trains:
            return Times(forward_s=(forward_s,), forward_cpu_s=(forward_cpu_s,))
        _, backward_s, cpu_s = _timed(lambda: backend.backward(x_BX, grad_BA, token=token))
        return Times(
            forward_s=(forward_s,),
            forward_cpu_s=(forward_cpu_s,),
            backward_s=(backward_s,),
            backward_cpu_s=(cpu_s,),
        )

    return _repeat(step, at_least_s, warm_up)


def _repeat(step: Callable[[int], Times], at_least_s: float, warm_up: int) -> Times:
    for token in range(warm_up):
        step(token)
    began_s = time.perf_counter()
    times = step(warm_up)
    while time.perf_counter() - began_s < at_least_s:
        times += step(warm_up + len(times.forward_s))
    return times


def _timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What ``call`` gives, its seconds by the clock and its processor seconds."""
    cpu_s, clock_s = time.process_time(), time.perf_counter()
    result = call()
    return result, time.perf_counter() - clock_s, time.process_time() - cpu_s


def _sums(forward: tuple[float, ...], backward: tuple[float, ...]) -> list[float]:
    if not backward:
        return list(forward)
    return [f + b for f, b in zip(forward, backward, strict=True)]
