"""Processes that must not outlive this one."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

STOP_TIMEOUT_S = 10.0

_PR_SET_PDEATHSIG = 1
_TCP_LISTEN = "0A"


def start_bound_process(
    command: Sequence[str], *, log_fd: int, cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that ends when the calling thread's process does, with output to a file.

    In a session of its own: Ctrl-C in a terminal goes to us, and we decide when it stops.
    """
    return subprocess.Popen(  # noqa: S603 - commands are built here, not taken from input
        command,
        stdin=subprocess.DEVNULL,
        stdout=log_fd,
        stderr=log_fd,
        cwd=cwd,
        start_new_session=True,
        preexec_fn=_bind_to_parent(),  # noqa: PLW1509 - one system call, nothing that locks
    )


def end_processes(
    processes: Iterable[subprocess.Popen[bytes]], *, timeout_s: float = STOP_TIMEOUT_S
) -> None:
    """Ask all of them to end, then wait for each; one that has not in time is killed."""
    waiting = list(processes)
    for process in waiting:
        process.terminate()
    for process in waiting:
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _bind_to_parent() -> Callable[[], None] | None:
    """What a child runs before exec so that the kernel ends it with its parent (Linux)."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)  # loaded here: a forked child must not import
    parent_pid = os.getpid()

    def bind() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent_pid:  # it ended before we asked
            os._exit(1)

    return bind


def listens_on(pid: int, host: str, port: int) -> bool:
    """Whether that process itself listens on an IPv4 address, and not another that was quicker.

    Where the kernel does not tell (no /proc), it is taken to be so.
    """
    process = Path("/proc") / str(pid)
    if not Path("/proc/net/tcp").exists():
        return True
    try:
        rows = [line.split() for line in (process / "net/tcp").read_text().splitlines()[1:]]
        files = {os.readlink(entry) for entry in (process / "fd").iterdir()}
    except OSError:  # it has just ended, or closed one of them
        return False
    address = _kernel_address(host, port)
    return any(
        f"socket:[{row[9]}]" in files for row in rows if row[1] == address and row[3] == _TCP_LISTEN
    )


def _kernel_address(host: str, port: int) -> str:
    """An IPv4 address as /proc/net/tcp prints it: the raw word in the machine's byte order."""
    word = int.from_bytes(socket.inet_aton(host), sys.byteorder)
    return f"{word:08X}:{port:04X}"
