"""One backend in a process of its own, for measuring: its memory is then its own too.

Requests and answers are lines of JSON on stdin and stdout. The first request loads the bundle.
"""

from __future__ import annotations

import sys

import msgspec

from edge_agent.compute import BackwardName, ForwardName, build_backend
from edge_agent.measuring.memory import peak_rss_bytes
from edge_agent.measuring.timing import Times, time_steps
from wire.bundle import Bundle
from wire.errors import SplitfleetError


class LoadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Which bundle to load into which backend."""

    bundle: str
    forward: ForwardName
    backward: BackwardName
    threads: int
    max_batch_bytes: int


class StepsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Time steps of ``batch`` samples for ``at_least_s`` seconds."""

    batch: int
    at_least_s: float


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """``error`` is set instead of all else where a request could not be met."""

    peak_rss_bytes: int = 0
    times: Times = Times()
    error: str = ""


def main() -> None:
    """Serve one parent until it closes our stdin."""
    requests = sys.stdin.buffer
    load = msgspec.json.decode(requests.readline(), type=LoadRequest)
    try:
        with open(load.bundle, "rb") as file:
            bundle = Bundle.from_bytes(file.read(), max_bytes=sys.maxsize)
        backend = build_backend(
            load.forward, load.backward, load.threads, max_batch_bytes=load.max_batch_bytes
        )
        backend.load(bundle)
        _answer(Answer(peak_rss_bytes=peak_rss_bytes()))
        for line in requests:
            request = msgspec.json.decode(line, type=StepsRequest)
            times = time_steps(
                backend, bundle.manifest, request.batch, at_least_s=request.at_least_s
            )
            _answer(Answer(peak_rss_bytes=peak_rss_bytes(), times=times))
    except (SplitfleetError, OSError, MemoryError) as exc:
        _answer(Answer(error=str(exc) or type(exc).__name__))


def _answer(answer: Answer) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
