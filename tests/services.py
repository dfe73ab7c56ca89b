"""A service manager for tests: runs a unit's ExecStart line and listens to what it says.

What systemd does to a service here: the environment of the unit, a notification socket, a watchdog,
credentials, a state folder to work in, and no writable code where the unit denies it.
"""

from __future__ import annotations

import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fleet import Process

ROOT = Path(__file__).parent.parent
UNITS = {"agent": "edge-agent@.service", "coordinator": "coordinator.service"}
MODULES = {"edge-agent": "edge_agent", "coordinator": "coordinator"}
WAIT_S = 60.0

# prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN), kept over exec: what MemoryDenyWriteExecute= means
# on Linux 6.3 and later. Ends with 99 where the kernel cannot.
DENY_WRITE_EXECUTE = (
    "import ctypes, os, sys; "
    "ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) and sys.exit(99); os.execvp(sys.argv[1], sys.argv[1:])"
)


class Service:
    """One start of a unit; its files lie below ``root`` as they would below /."""

    def __init__(
        self, component: str, root: Path, *, instance: str = "", drop_in: str = ""
    ) -> None:
        unit = ROOT / "systemd" / UNITS[component]
        self._unit = unit.read_text()
        if drop_in:
            self._unit += (unit.parent / f"{unit.name}.d" / drop_in).read_text()
        self._instance = instance
        self.root = root
        self.messages: list[str] = []
        name = instance or component
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = str(root / f"{name}.notify")
        Path(address).unlink(missing_ok=True)
        self._socket.bind(address)
        self.state = Path(self._place("%S/" + self._value("StateDirectory")))
        self.credentials = Path(self._place(self._value("LoadCredential").partition(":")[2]))
        for folder in (self.state, self.credentials, self.settings.parent):
            folder.mkdir(parents=True, exist_ok=True)
        self._address = address
        self._said: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._listen, name="notify", daemon=True)
        self.process = Process(name, [], root / f"{name}.log")

    @property
    def settings(self) -> Path:
        words = shlex.split(self._value("ExecStart"))
        return Path(self._place(words[words.index("-c") + 1]))

    def start(
        self, *options: str, watchdog_s: float = 1.0, deny_write_execute: bool = False
    ) -> None:
        """Run the ExecStart line; ``options`` are what a careless drop-in adds to it."""
        path, *arguments = shlex.split(self._value("ExecStart"))
        environment = dict(
            line.removeprefix("Environment=").split("=", 1)
            for line in self._unit.splitlines()
            if line.startswith("Environment=")
        )
        environment |= {
            "NOTIFY_SOCKET": self._address,
            "WATCHDOG_USEC": str(round(watchdog_s * 1e6)),
            "CREDENTIALS_DIRECTORY": str(self.credentials),
            "PYTHONPATH": str(ROOT),
        }
        prefix = [sys.executable, "-c", DENY_WRITE_EXECUTE] if deny_write_execute else []
        self.process.command = [
            "env",
            f"--chdir={self.state}",
            *(f"{name}={self._place(value)}" for name, value in environment.items()),
            *prefix,
            *(sys.executable, "-m", MODULES[Path(path).name]),
            *map(self._place, arguments),
            *options,
        ]
        if not self._reader.is_alive():
            self._reader = threading.Thread(target=self._listen, name="notify", daemon=True)
            self._reader.start()
        self.process.start()

    def stop(self) -> int:
        self.process.signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """The exit code, once it has ended by itself."""
        return self.process.wait()

    def wait_for(self, text: str) -> str:
        """The next message that has ``text`` in it; those before it are kept in ``messages``."""
        return self._read(lambda message: text in message, f"no {text}")

    def wait_for_silence(self, seconds: float) -> None:
        """Wait until nothing has been said for that long; fail if it talks on."""
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            try:
                self.messages.append(self._said.get(timeout=seconds))
            except queue.Empty:
                return
        raise AssertionError(f"it talks on: {self.messages[-3:]}")

    def rest(self) -> list[str]:
        """All that was said; to be asked for once it has ended."""
        self._end_of_reading()
        while not self._said.empty():
            self.messages.append(self._said.get())
        return self.messages

    def close(self) -> None:
        self.process.stop()
        self._end_of_reading()
        self._socket.close()

    def _listen(self) -> None:
        """What systemd does, too: a socket that nobody reads holds its service up."""
        while message := self._socket.recv(4096):
            self._said.put(message.decode())

    def _end_of_reading(self) -> None:
        """An empty datagram, behind all that was sent, ends the reader."""
        if self._reader.is_alive():
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"", self._address)
            self._reader.join(WAIT_S)

    def _read(self, condition: Callable[[str], bool], failure: str) -> str:
        deadline_s = time.monotonic() + WAIT_S
        while (rest_s := deadline_s - time.monotonic()) > 0:
            try:
                message = self._said.get(timeout=min(rest_s, 0.5))
            except queue.Empty:
                if not self.process.is_running:
                    break
                continue
            self.messages.append(message)
            if condition(message):
                return message
        raise AssertionError(f"{failure} in {self.messages}:\n{self.process.output()[-2000:]}")

    def _value(self, key: str) -> str:
        """The last assignment: a drop-in comes behind its unit."""
        lines = [line for line in self._unit.splitlines() if line.startswith(f"{key}=")]
        return lines[-1].partition("=")[2]

    def _place(self, text: str) -> str:
        """Specifiers filled in, and system folders moved below ``root``."""
        text = text.replace("%i", self._instance)
        for specifier, folder in (("%S", "/var/lib"), ("%C", "/var/cache")):
            text = text.replace(specifier, folder)
        system = ("/etc/", "/var/")
        return f"{self.root}{text}" if text.startswith(system) else text


@contextmanager
def service(
    component: str, root: Path, *, instance: str = "", drop_in: str = ""
) -> Iterator[Service]:
    """A unit to start, which is stopped at the end however the test ends."""
    one = Service(component, root, instance=instance, drop_in=drop_in)
    try:
        yield one
    finally:
        one.close()


def can_deny_write_execute() -> bool:
    """Whether this kernel can do what MemoryDenyWriteExecute= does."""
    command = [sys.executable, "-c", DENY_WRITE_EXECUTE, "true"]
    return subprocess.run(command, check=False).returncode == 0
