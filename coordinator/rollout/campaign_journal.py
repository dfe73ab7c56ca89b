"""Campaigns in the state store, and the bundles that they take around, as files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from coordinator.rollout.records import CampaignRecord, DeviceEntry
from coordinator.store import StateStore, encode_records, get_record, get_records, open_store
from wire.bundle import BundleError
from wire.errors import ConfigError


class CampaignJournal:
    """The store's keys for one fleet, and its bundles.

    ``campaign/{fleet}/{id}`` and ``campaign-device/{fleet}/{id}/{device}``, so that a campaign of
    many devices is never written as a whole. Unless ``at_once``, opened when there is something to
    read or to write: a fleet without rollouts has no folder. ``directory`` holds bundles by digest.
    """

    def __init__(
        self,
        fleet: str,
        directory: Path,
        url: str,
        *,
        source: str | None = None,
        at_once: bool = False,
    ) -> None:
        self._fleet = fleet
        self._directory = directory
        self._url = url
        self._source = source
        self._store: StateStore | None = None
        if at_once or directory.exists():
            self._open()

    def _open(self) -> StateStore:
        if self._store is None:
            self._store = open_store(self._url, source=self._source)
        return self._store

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    # Campaigns

    def names(self) -> list[str]:
        """All campaigns of the fleet."""
        prefix = f"campaign/{self._fleet}/"
        store = self._store
        return [] if store is None else [key.removeprefix(prefix) for key in store.keys(prefix)]

    def record(self, campaign: str) -> CampaignRecord | None:
        store = self._store
        return None if store is None else get_record(store, self._key(campaign), CampaignRecord)

    def entries(self, campaign: str) -> list[DeviceEntry]:
        """The campaign's devices, in its order."""
        if self._store is None:
            return []
        prefix = f"campaign-device/{self._fleet}/{campaign}/"
        found = get_records(self._store, prefix, DeviceEntry).values()
        return sorted(found, key=lambda entry: entry.rank)

    def encode(
        self, campaign: str, record: CampaignRecord | None, entries: Iterable[DeviceEntry]
    ) -> dict[str, bytes | None]:
        """What changed in one campaign, to be written together with other things."""
        prefix = f"campaign-device/{self._fleet}/{campaign}/"
        items = encode_records({prefix + entry.device: entry for entry in entries})
        if record is not None:
            items |= encode_records({self._key(campaign): record})
        return items

    def write(self, items: Mapping[str, bytes | None]) -> None:
        """Write all or nothing; raises TransportError if the store cannot."""
        if items:
            self._open().put_many(items)

    def _key(self, campaign: str) -> str:
        return f"campaign/{self._fleet}/{campaign}"

    # Bundles

    def has_bundle(self, digest: str) -> bool:
        return self._bundle_path(digest).is_file()

    def bundle(self, digest: str) -> bytes:
        """A bundle's bytes; raises BundleError if its file is gone or damaged."""
        path = self._bundle_path(digest)
        try:
            data = path.read_bytes()
        except OSError as exc:
            raise BundleError(f"{path}: expected the campaign's bundle ({exc.strerror})") from exc
        if hashlib.sha256(data).hexdigest() != digest:
            raise BundleError(f"{path}: expected a bundle of digest {digest[:12]}, it is damaged")
        return data

    def put_bundle(self, digest: str, data: bytes) -> None:
        """Keep a bundle: the whole file or none. Raises ConfigError if the folder refuses."""
        path = self._bundle_path(digest)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as exc:
            raise ConfigError(
                f"expected a writable directory at {path.parent} ({exc.strerror})",
                source=self._source,
                field="$.fleet_out",
            ) from exc

    def _bundle_path(self, digest: str) -> Path:
        return self._directory / "bundles" / f"{digest}.bundle"
