"""Exit codes of both commands, in one table; the systemd units refer to it.

0 to 2 are the shell's own conventions; 64 to 78 follow sysexits.h; 130 and 143 are 128 + signal.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Why a command ended."""

    OK = 0
    FAILED = 1  # a run that ended without reaching its end; see the last line on stderr
    USAGE = 2  # wrong command line
    DATA = 65  # EX_DATAERR: a model, bundle or checkpoint that cannot be used, diverged weights
    UNAVAILABLE = 69  # EX_UNAVAILABLE: the broker or the state store cannot be reached
    SOFTWARE = 70  # EX_SOFTWARE: a fault of ours
    TAKEN_OVER = 76  # EX_PROTOCOL: another coordinator of the fleet has taken its place
    CONFIG = 78  # EX_CONFIG: bad configuration or data; a restart will not help
    INTERRUPTED = 130  # SIGINT, the second time
