"""The self-test in a process of its own, so that a bundle that crashes or hangs harms nobody.

A forked child finds the libraries imported and is done in the time of the passes. A fork of a
process with threads can hang for no fault of the bundle's, so a child that crashed or ran out of
time is followed by one in a fresh interpreter, whose word is final.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import msgspec

from edge_agent.compute import ComputeBackend, build_backend
from edge_agent.config import ComputeSettings
from edge_agent.golden import run_self_test
from wire.bundle import Bundle
from wire.errors import SplitfleetError
from wire.messages import SelfTestReport

_PR_SET_PDEATHSIG: Final = 1
FORK: Final = "fork"
SPAWN: Final = "spawn"
FORK_SHARE: Final = 0.5  # of the time limit; the rest is for the fresh interpreter


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a self-test ended: a report, or the reason why there is none."""

    report: SelfTestReport | None = None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """What the child needs; ``memory_bytes`` may be allocated beyond what the idle child has."""

    bundle: Bundle
    compute: ComputeSettings
    memory_bytes: int


class SelfTest:
    """One self-test under way; poll it. ``wake`` is called, in another thread, when it ends."""

    def __init__(self, job: Job, *, limit_s: float, now_s: float, wake: Callable[[], None]) -> None:
        self._job = job
        self._wake = wake
        self._deadline_s = now_s + limit_s
        self._is_final = sys.platform != "linux"  # elsewhere a fork harms more than it helps
        share = 1.0 if self._is_final else FORK_SHARE
        self._child = _Child(job, SPAWN if self._is_final else FORK, wake)
        self._child_deadline_s = now_s + limit_s * share

    def poll(self, now_s: float) -> Outcome | None:
        """The outcome, once there is one."""
        outcome = self._child.outcome()
        if outcome is None and now_s < self._child_deadline_s:
            return None
        if outcome is not None and not self._child.crashed:
            return outcome
        self._child.kill()
        if not self._is_final and now_s < self._deadline_s:
            self._is_final = True
            self._child = _Child(self._job, SPAWN, self._wake)
            self._child_deadline_s = self._deadline_s
            return None
        return outcome or Outcome(failure="self-test: not done within its time limit")

    def kill(self) -> None:
        """End it without an outcome."""
        self._child.kill()


class _Child:
    """One process, and the thread that waits for it."""

    def __init__(self, job: Job, method: str, wake: Callable[[], None]) -> None:
        context: Any = multiprocessing.get_context(method)
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_run_child, args=(job, sender), name="self-test", daemon=True
        )
        with warnings.catch_warnings():
            # Python 3.12 warns of a fork beside threads; see the head of this file.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        sender.close()
        self._outcome: Outcome | None = None
        self.crashed = False
        self._thread = threading.Thread(
            target=self._wait, args=(wake,), name="self-test-wait", daemon=True
        )
        self._thread.start()

    def outcome(self) -> Outcome | None:
        return self._outcome

    def kill(self) -> None:
        self._process.kill()
        self._thread.join()

    def _wait(self, wake: Callable[[], None]) -> None:
        try:
            raw = self._receiver.recv_bytes()
        except (EOFError, OSError):
            raw = b""
        self._process.join()
        if raw:
            self._outcome = msgspec.json.decode(raw, type=Outcome)
        else:
            self.crashed = True
            self._outcome = Outcome(failure=_describe_exit(self._process.exitcode))
        self._receiver.close()
        wake()


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"self-test: the process ended by {signal.Signals(-code).name}"
    return f"self-test: the process ended with exit code {code}"


# In the child


def _run_child(job: Job, sender: Connection) -> None:
    _leave_parent()
    try:
        backend = _build_backend(job.compute)
        backend.prepare(job.bundle.manifest)
        idle_bytes = _reset_peak()
        _limit_memory(job.memory_bytes)
        report = run_self_test(job.bundle, backend)
        peak_bytes = max(0, _memory("VmHWM") - idle_bytes)
        outcome = Outcome(report=msgspec.structs.replace(report, peak_bytes=peak_bytes))
    except SplitfleetError as exc:
        outcome = Outcome(failure=str(exc))
    except MemoryError:
        outcome = Outcome(
            failure=f"self-test: more memory than the allowed {job.memory_bytes} bytes"
        )
    except Exception as exc:  # a bundle may raise anything from a library; the reason must get out
        outcome = Outcome(failure=f"self-test: {type(exc).__name__}: {exc}"[:500])
    sender.send_bytes(msgspec.json.encode(outcome))
    sender.close()


def _leave_parent() -> None:
    """End with the parent, take no signal for it and hold none of its connections."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # Not "is 1": in a container the agent itself may be process 1.
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:
            os._exit(1)  # it ended before we asked
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    for entry in _open_descriptors():
        # A copy of the connection would keep it open at the broker when the parent dies.
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(entry).st_mode):
                os.close(entry)


def _open_descriptors() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]
    except OSError:
        return []


def _build_backend(compute: ComputeSettings) -> ComputeBackend:
    """The device's own backend, on one thread: thread pools do not survive a fork."""
    return build_backend(
        forward=compute.forward,
        backward=compute.backward,
        threads=1,
        max_batch_bytes=compute.max_batch_bytes,
    )


def _limit_memory(allowed_bytes: int) -> None:
    """What may be allocated from now on; exceeding it raises or aborts, here alone."""
    limit = _memory("VmData") + allowed_bytes
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _reset_peak() -> int:
    """Resident bytes now; the peak counts from here where the kernel can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    """A figure of /proc/self/status in bytes; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
