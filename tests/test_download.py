"""Bundles on their way to a device: any order, twice, torn off, and never more than offered."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from edge_agent.download import (
    CHUNK_TIMEOUT_S,
    SHARED_TIMEOUT_S,
    BrokenDownloadError,
    ChunkMap,
    Download,
    PartFile,
)
from wire.errors import PeerProtocolError, Refusal
from wire.messages import ChunkHeader, RolloutOffer, RolloutPhase

DATA = bytes(range(256)) * 10
DIGEST = hashlib.sha256(DATA).hexdigest()
CHUNK = 1000
OFFSETS = [0, 1000, 2000]


def _offer(digest: str = DIGEST, *, shared: bool = False, size: int = len(DATA)) -> RolloutOffer:
    return RolloutOffer(digest=digest, size_bytes=size, chunk_bytes=CHUNK, shared=shared)


def _header(offset: int, digest: str = DIGEST) -> ChunkHeader:
    return ChunkHeader(digest=digest, offset_bytes=offset, size_bytes=len(DATA))


def _add(part: PartFile, chunks: ChunkMap, offset: int) -> None:
    data = DATA[offset : offset + CHUNK]
    chunks.check(_header(offset), len(data))
    part.add(offset, data)
    chunks.held.add(offset)


def test_chunks_in_any_order_make_the_bundle(tmp_path: Path) -> None:
    part = PartFile(tmp_path)
    chunks = part.open(_offer())
    for offset in random.Random(1).sample(OFFSETS, 3):
        assert not chunks.is_complete
        _add(part, chunks, offset)
    assert chunks.is_complete
    assert chunks.first_missing == len(DATA)
    assert part.read(_offer()) == DATA


def test_download_goes_on_after_a_restart_where_it_was(tmp_path: Path) -> None:
    part = PartFile(tmp_path)
    _add(part, part.open(_offer()), 1000)
    again = PartFile(tmp_path)
    chunks = again.open(_offer())
    assert (chunks.held, chunks.first_missing) == ({1000}, 0)
    _add(again, chunks, 0)
    _add(again, chunks, 2000)
    assert again.read(_offer()) == DATA


def test_part_of_another_bundle_is_thrown_away(tmp_path: Path) -> None:
    part = PartFile(tmp_path)
    _add(part, part.open(_offer()), 0)
    assert part.open(_offer("0" * 64)).held == set()
    assert part.path.read_bytes() == b""


@pytest.mark.parametrize("torn", [b"20", b"2000\n\xff\x00", b"999999\n", b"-1000\n", b"7\n"])
def test_torn_list_costs_at_most_a_download(tmp_path: Path, torn: bytes) -> None:
    part = PartFile(tmp_path)
    _add(part, part.open(_offer()), 0)
    with (tmp_path / "incoming.list").open("ab") as file:
        file.write(torn)
    chunks = PartFile(tmp_path).open(_offer())
    assert chunks.held <= set(OFFSETS)
    for offset in set(OFFSETS) - chunks.held:
        _add(part, chunks, offset)
    try:
        assert part.read(_offer()) == DATA
    except BrokenDownloadError:
        assert torn == b"2000\n\xff\x00", "only a list that lies may break a download"


@pytest.mark.parametrize(
    ("header", "length", "reason"),
    [
        (_header(0, "0" * 64), CHUNK, Refusal.FOREIGN_BUNDLE),
        (_header(500), CHUNK, Refusal.MALFORMED),
        (_header(3000), CHUNK, Refusal.MALFORMED),
        (_header(2**52 * 2 - 1000), CHUNK, Refusal.MALFORMED),
        (_header(0), 0, Refusal.MALFORMED),
        (_header(0), CHUNK - 1, Refusal.MALFORMED),
        (_header(0), CHUNK + 1, Refusal.OVERSIZED),
        (_header(2000), CHUNK, Refusal.OVERSIZED),
        (_header(1000), CHUNK, Refusal.DUPLICATE),
    ],
)
def test_chunk_that_is_not_missing_is_refused(
    header: ChunkHeader, length: int, reason: Refusal
) -> None:
    chunks = ChunkMap(DIGEST, len(DATA), CHUNK, {1000})
    with pytest.raises(PeerProtocolError) as caught:
        chunks.check(header, length)
    assert caught.value.reason is reason


def test_endless_stream_never_grows_beyond_the_offer(tmp_path: Path) -> None:
    part = PartFile(tmp_path)
    chunks = part.open(_offer())
    taken = 0
    for offset in range(0, 100 * CHUNK, CHUNK):
        try:
            chunks.check(_header(offset), CHUNK if offset < 2000 else len(DATA) - 2000)
        except PeerProtocolError:
            continue
        _add(part, chunks, offset)
        taken += 1
    assert taken == 3
    assert part.path.stat().st_size == len(DATA)


def test_damaged_or_truncated_download_is_not_used(tmp_path: Path) -> None:
    part = PartFile(tmp_path)
    chunks = part.open(_offer())
    for offset in OFFSETS:
        _add(part, chunks, offset)
    part.path.write_bytes(DATA[:-1])
    with pytest.raises(BrokenDownloadError, match=f"expected a bundle with digest {DIGEST[:12]}"):
        part.read(_offer())


def test_own_chunks_are_asked_for_at_once_and_again_after_a_while() -> None:
    download = Download(_offer(), ChunkMap(DIGEST, len(DATA), CHUNK), deadline_s=1e9)
    status = download.request(now_s=5.0)
    assert (status.phase, status.offset_bytes) == (RolloutPhase.WANTED, 0)
    assert download.ask_s == 5.0 + CHUNK_TIMEOUT_S
    download.took(0, shared=False, now_s=6.0)
    assert download.ask_s == 6.0
    assert download.request(6.0).offset_bytes == 1000


def test_shared_chunks_are_waited_for_and_asked_for_ever_more_rarely() -> None:
    download = Download(_offer(shared=True), ChunkMap(DIGEST, len(DATA), CHUNK), deadline_s=1e9)
    download.request(0.0)
    assert download.ask_s == SHARED_TIMEOUT_S
    download.took(1000, shared=True, now_s=1.0)
    assert download.ask_s == 1.0 + SHARED_TIMEOUT_S
    waits = []
    for _ in range(5):
        now_s = download.ask_s
        assert download.request(now_s).offset_bytes == 0
        waits.append(download.ask_s - now_s)
    assert waits == [2.0, 4.0, 8.0, 10.0, 10.0]
