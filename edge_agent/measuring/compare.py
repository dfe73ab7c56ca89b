"""Backends beside each other on one bundle: each a fresh process, measured in turns."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.compute import BackwardName, ForwardName
from edge_agent.config import ComputeSettings
from edge_agent.measuring.child import Answer, LoadRequest, StepsRequest
from edge_agent.measuring.timing import Times
from wire.bundle import CLIENT_BACKWARD, Bundle
from wire.errors import ModelError

DEFAULT_BATCHES = (1, 8, 32, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A backend that is measured, or why it is not."""

    name: str
    forward: ForwardName
    backward: BackwardName
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One backend at one batch size; ``peak_rss_bytes`` is its process's peak so far, with batches
    measured from the smallest to the largest."""

    backend: str
    batch: int
    times: Times
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Medians in seconds, sizes in bytes."""
        return {
            "backend": self.backend,
            "batch": self.batch,
            "forward_s": self.times.forward_median_s,
            "backward_s": self.times.backward_median_s,
            "step_s": self.times.step_median_s,
            "step_cpu_s": self.times.step_cpu_median_s,
            "steps": len(self.times.forward_s),
            "peak_rss_bytes": self.peak_rss_bytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All that was measured; ``start_s``: from a process's start until the bundle is loaded."""

    contenders: tuple[Contender, ...]
    start_s: dict[str, float]
    results: tuple[Result, ...]

    def find(self, backend: str, batch: int) -> Result | None:
        """The result of a backend at a batch size, if it was measured."""
        found = (r for r in self.results if (r.backend, r.batch) == (backend, batch))
        return next(found, None)


def list_contenders(bundle: Bundle) -> tuple[Contender, ...]:
    """What could run this bundle here: ONNX Runtime and PyTorch, each alone."""
    trains = not bundle.manifest.frozen
    contenders = []
    names: tuple[tuple[ForwardName, BackwardName], ...] = (
        ("onnxruntime", "onnxruntime"),
        ("torch", "torch"),
    )
    for forward, backward in names:
        problem = "" if find_spec(forward) is not None else "not installed"
        if forward == "onnxruntime" and trains and CLIENT_BACKWARD not in bundle.files:
            problem = problem or f"the bundle has no {CLIENT_BACKWARD}"
        contenders.append(
            Contender(
                name=forward,
                forward=forward,
                backward=backward if trains else "none",
                problem=problem,
            )
        )
    return tuple(contenders)


def compare_backends(
    path: Path,
    contenders: Sequence[Contender],
    compute: ComputeSettings,
    *,
    batches: Sequence[int] = DEFAULT_BATCHES,
    rounds: int = 5,
    round_s: float = 0.3,
) -> Comparison:
    """Measure the bundle at ``path`` on every contender without a problem.

    At each batch size they take turns, ``rounds`` times for ``round_s`` seconds each, so that what
    else the machine does falls on all of them. Raises ModelError with a process's own words.
    """
    results: list[Result] = []
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(_running(contender, path, compute))
            for contender in contenders
            if not contender.problem
        ]
        for batch in sorted(set(batches)):
            for process in processes:
                process.warm_up(batch)
            for _ in range(rounds):
                for process in processes:
                    process.measure(batch, round_s)
            results += [process.take_result(batch) for process in processes]
        start_s = {process.name: process.start_s for process in processes}
    return Comparison(contenders=tuple(contenders), start_s=start_s, results=tuple(results))


class _Process:
    """The parent's end of one measuring process."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], load: LoadRequest) -> None:
        began_s = time.perf_counter()
        self.name = name
        self._popen = popen
        self._times = Times()
        self._peak_rss_bytes = 0
        self._ask(load)
        self.start_s = time.perf_counter() - began_s

    def warm_up(self, batch: int) -> None:
        self._ask(StepsRequest(batch=batch, at_least_s=0.0))  # memory and caches

    def measure(self, batch: int, round_s: float) -> None:
        answer = self._ask(StepsRequest(batch=batch, at_least_s=round_s))
        self._times += answer.times
        self._peak_rss_bytes = answer.peak_rss_bytes

    def take_result(self, batch: int) -> Result:
        times, self._times = self._times, Times()
        return Result(
            backend=self.name, batch=batch, times=times, peak_rss_bytes=self._peak_rss_bytes
        )

    def _ask(self, request: LoadRequest | StepsRequest) -> Answer:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.write(msgspec.json.encode(request) + b"\n")
            self._popen.stdin.flush()
            line = self._popen.stdout.readline()
        if not line:
            code = self._popen.wait()
            raise ModelError(f"{self.name}: the measuring process ended with code {code}")
        answer = msgspec.json.decode(line, type=Answer)
        if answer.error:
            raise ModelError(f"{self.name}: {answer.error}")
        return answer


@contextlib.contextmanager
def _running(contender: Contender, path: Path, compute: ComputeSettings) -> Iterator[_Process]:
    command = [sys.executable, "-m", "edge_agent.measuring.child"]
    popen = subprocess.Popen(  # noqa: S603 - our own interpreter and module
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    load = LoadRequest(
        bundle=str(path),
        forward=contender.forward,
        backward=contender.backward,
        threads=compute.threads,
        max_batch_bytes=compute.max_batch_bytes,
    )
    try:
        yield _Process(contender.name, popen, load)
    finally:
        popen.kill()
        popen.communicate()
