"""What a bundle is as a release: its place in the order of releases, its limits, its signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import msgspec

from wire.bundle import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """Fields of the manifest that concern its release.

    ``sequence`` is the Unix time of ``created`` unless it is given, so that it grows by itself.
    ``sign`` makes ``manifest.sig`` from the manifest's bytes.
    """

    sequence: int | None = None
    expires: str = ""
    minimum_agent: str = ""
    sign: Callable[[bytes], bytes] | None = None

    def stamp(self, manifest: Manifest) -> Manifest:
        """The manifest with these fields."""
        sequence = self.sequence
        if sequence is None:
            sequence = int(datetime.fromisoformat(manifest.created).timestamp())
        return msgspec.structs.replace(
            manifest,
            sequence=sequence,
            expires=self.expires,
            minimum_agent=self.minimum_agent,
        )
