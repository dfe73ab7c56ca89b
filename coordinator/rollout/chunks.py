"""Which chunks of a bundle go out next, and to whom. Pure: time is an argument.

Devices ask for the first chunk that they miss. Where several want a bundle at once, all of it
goes out once on the shared topic, in order and paced. Who joins while it is under way gets the
beginning in a second, shorter stream. Who still misses a chunk afterwards, or is alone, is served
by itself, chunk by chunk as it asks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

QUIET_S = 0.25  # a stream begins when nobody new has asked for this long,
GATHER_S = 3.0  # or when the first has waited for this long
IN_FLIGHT_S = 2.0  # a chunk that went out a moment ago is not lost yet
STREAM_BYTES_S = 4 << 20
SINGLE_BYTES_S = 32 << 20
BURST_S = 0.25


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk to send: to one device, or to all that listen."""

    offset: int
    device: str | None = None


class Pace:
    """Bytes a second, with a short burst."""

    def __init__(self, bytes_s: float) -> None:
        self._bytes_s = bytes_s
        self._free_s = 0.0

    def is_free(self, now_s: float) -> bool:
        return self._free_s <= now_s

    def spend(self, size_bytes: int, now_s: float) -> None:
        """Count what was sent."""
        self._free_s = max(self._free_s, now_s - BURST_S) + size_bytes / self._bytes_s


class ChunkSchedule:
    """The chunks of one bundle."""

    def __init__(self, size_bytes: int, chunk_bytes: int, *, shared: bool = True) -> None:
        self.size_bytes = size_bytes
        self.chunk_bytes = chunk_bytes
        self._shared = shared
        self._single: dict[str, int] = {}  # device → offset that it gets for itself
        self._waiting: dict[str, int] = {}  # device → first chunk that it misses
        self._joined: dict[str, int] = {}  # device → where the stream was when it joined
        self._stream: deque[int] = deque()
        self._sent_s: dict[int, float] = {}
        self._first_s = 0.0
        self._last_s = 0.0
        self._stream_pace = Pace(STREAM_BYTES_S)
        self._single_pace = Pace(SINGLE_BYTES_S)

    @property
    def is_idle(self) -> bool:
        """Nothing to send, and nobody waits."""
        return not (self._single or self._waiting or self._stream)

    def want(self, device: str, offset: int, now_s: float) -> None:
        """A device misses the chunk at ``offset``."""
        if not self._shared:
            self._single[device] = offset
        elif device not in self._joined:
            self._join(device, offset, now_s)
        elif offset in self._stream or device in self._waiting:
            return  # it will come
        elif now_s - self._sent_s.get(offset, -IN_FLIGHT_S) >= IN_FLIGHT_S:
            self._single[device] = offset

    def forget(self, device: str) -> None:
        """The device downloads no longer."""
        for held in (self._single, self._waiting, self._joined):
            held.pop(device, None)

    def due(self, now_s: float) -> list[Chunk]:
        """What to send now."""
        chunks = []
        while self._single and self._single_pace.is_free(now_s):
            device, offset = next(iter(self._single.items()))
            del self._single[device]
            self._single_pace.spend(self.chunk_bytes, now_s)
            chunks.append(Chunk(offset, device))
        if self._waiting and not self._stream and self._is_gathered(now_s):
            self._begin_stream()
        while self._stream and self._stream_pace.is_free(now_s):
            offset = self._stream.popleft()
            self._sent_s[offset] = now_s
            self._stream_pace.spend(self.chunk_bytes, now_s)
            chunks.append(Chunk(offset))
        return chunks

    def _join(self, device: str, offset: int, now_s: float) -> None:
        """The stream's next chunk on is what the device gets; what lies before waits."""
        position = self._stream[0] if self._stream else self.size_bytes
        self._joined[device] = position
        if offset < position:
            if not self._waiting:
                self._first_s = now_s
            self._last_s = now_s
            self._waiting[device] = offset

    def _is_gathered(self, now_s: float) -> bool:
        return now_s - self._last_s >= QUIET_S or now_s - self._first_s >= GATHER_S

    def _begin_stream(self) -> None:
        """One device is served by itself; several get what any of them misses, once."""
        waiting, self._waiting = self._waiting, {}
        if len(waiting) == 1:
            self._single.update(waiting)
            return
        start = min(waiting.values())
        end = max(self._joined[device] for device in waiting)
        self._stream.extend(range(start, end, self.chunk_bytes))
