"""A bundle on its way: which chunks are missing, and the file that they are put together in.

Chunks may come in any order and twice. What has come outlives a restart: a list of offsets lies
beside the part file. It is not flushed chunk by chunk, since the digest of the whole decides in
the end; after a power cut the worst is one download more.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from wire.errors import PeerProtocolError, Refusal, SplitfleetError
from wire.messages import ChunkHeader, RolloutOffer, RolloutPhase, RolloutStatus

MAX_CHUNKS = 1 << 16
CHUNK_TIMEOUT_S = 10.0  # ask again for a chunk that has not come
SHARED_TIMEOUT_S = 2.0  # shared chunks come by themselves; ask when they stop


class BrokenDownloadError(SplitfleetError):
    """What came is not what was offered; nothing of it was used."""


@dataclass(slots=True)
class ChunkMap:
    """Which chunks of a bundle have come; offsets and sizes in bytes."""

    digest: str
    size_bytes: int
    chunk_bytes: int
    held: set[int] = field(default_factory=set)

    @property
    def is_complete(self) -> bool:
        return len(self.held) == -(-self.size_bytes // self.chunk_bytes)

    @property
    def first_missing(self) -> int:
        """Offset of the first chunk that has not come; ``size_bytes`` when all have."""
        for offset in range(0, self.size_bytes, self.chunk_bytes):
            if offset not in self.held:
                return offset
        return self.size_bytes

    def check(self, header: ChunkHeader, length: int) -> None:
        """Raise PeerProtocolError unless this is a chunk that is missing, in its full length."""
        if header.digest != self.digest:
            raise PeerProtocolError(Refusal.FOREIGN_BUNDLE, "a chunk of another bundle")
        offset = header.offset_bytes
        if offset in self.held:
            raise PeerProtocolError(Refusal.DUPLICATE, f"the chunk at {offset} is here")
        if offset >= self.size_bytes or offset % self.chunk_bytes:
            raise PeerProtocolError(
                Refusal.MALFORMED, f"no chunk of {self.chunk_bytes} bytes begins at {offset}"
            )
        expected = min(self.chunk_bytes, self.size_bytes - offset)
        if length != expected:
            raise PeerProtocolError(
                Refusal.OVERSIZED if length > expected else Refusal.MALFORMED,
                f"the chunk at {offset}: expected {expected} bytes, received {length}",
            )


class _Kept(msgspec.Struct, frozen=True):
    """First line of the list beside the part file: what the offsets after it are of."""

    digest: str
    size_bytes: int
    chunk_bytes: int


class PartFile:
    """``incoming.part`` and ``incoming.list``: one download at a time."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "incoming.part"
        self._list = directory / "incoming.list"

    def open(self, offer: RolloutOffer) -> ChunkMap:
        """What is here of this bundle already; a part of any other one goes. OSError if full."""
        kept = _Kept(offer.digest, offer.size_bytes, offer.chunk_bytes)
        chunks = ChunkMap(offer.digest, offer.size_bytes, offer.chunk_bytes)
        line = msgspec.json.encode(kept)
        offsets = self._read_list(line)
        if offsets is None:
            self.discard()
            self._list.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self._list.write_bytes(line + b"\n")
        else:
            chunks.held |= {o for o in offsets if o < kept.size_bytes and not o % kept.chunk_bytes}
        return chunks

    def add(self, offset: int, data: bytes) -> None:
        """Put a checked chunk in its place."""
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            rest, position = memoryview(data), offset
            while rest:
                written = os.pwrite(descriptor, rest, position)
                rest, position = rest[written:], position + written
        finally:
            os.close(descriptor)
        with self._list.open("ab") as file:
            file.write(b"%d\n" % offset)

    def read(self, offer: RolloutOffer) -> bytes:
        """The whole, flushed; raises BrokenDownloadError if it is not what was offered."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            data = file.read(offer.size_bytes + 1)
        digest = hashlib.sha256(data).hexdigest()
        if digest != offer.digest:
            raise BrokenDownloadError(
                f"expected a bundle with digest {offer.digest[:12]}, received {digest[:12]}"
            )
        return data

    def discard(self) -> None:
        """Throw away what has come."""
        self._list.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def _read_list(self, first_line: bytes) -> list[int] | None:
        try:
            lines = self._list.read_bytes().split(b"\n")
        except OSError:
            return None
        if lines[0] != first_line or not self.path.exists():
            return None
        # The last line may be torn; "12" of "1234" then only costs a download more.
        return [int(line) for line in lines[1:] if line.isdigit() and len(line) < 16]


@dataclass(slots=True)
class Download:
    """A download under way; times are monotonic seconds.

    ``deadline_s`` bounds all of it, ``ask_s`` is when the first missing chunk is asked for
    (again). ``resumed``: some of it was here from an earlier process.
    """

    offer: RolloutOffer
    chunks: ChunkMap
    deadline_s: float
    resumed: bool = False
    ask_s: float = 0.0
    _stalls: int = 0

    def request(self, now_s: float) -> RolloutStatus:
        """Ask for the first missing chunk."""
        self.ask_s = now_s + self._patience_s()
        self._stalls += 1
        return RolloutStatus(
            digest=self.offer.digest,
            phase=RolloutPhase.WANTED,
            offset_bytes=self.chunks.first_missing,
            campaign=self.offer.campaign,
            attempt=self.offer.attempt,
        )

    def took(self, offset: int, *, shared: bool, now_s: float) -> None:
        """A chunk has come: ask for the next at once, unless it comes by itself."""
        self.chunks.held.add(offset)
        self._stalls = 0
        self.ask_s = now_s + self._patience_s() if shared else now_s

    def _patience_s(self) -> float:
        """Shared chunks: 2 s, 4 s, 8 s, then 10 s; else 10 s."""
        if not self.offer.shared:
            return CHUNK_TIMEOUT_S
        return min(CHUNK_TIMEOUT_S, SHARED_TIMEOUT_S * (1 << min(self._stalls, 4)))
