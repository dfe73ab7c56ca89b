"""How a study deals the pooled samples out to the devices."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from edge_agent.datasets import PartitionSettings
from wire.errors import ConfigError
from wire.settings import Settings


class Scheme(Settings, frozen=True, kw_only=True):
    """IID where ``classes_per_device`` is None, else the extended Dirichlet deal."""

    name: str
    classes_per_device: Annotated[int, Meta(ge=1)] | None = None
    alpha: Annotated[float, Meta(ge=1e-3, le=1e6)] = 3.0

    @property
    def description(self) -> str:
        """For people."""
        if self.classes_per_device is None:
            return "IID"
        return f"{self.name} non-IID (C={self.classes_per_device}, alpha={self.alpha:g})"

    def partition(self, devices: int, seed: int) -> PartitionSettings:
        """The deal as agents would be told it; ``index`` is the first device's."""
        return PartitionSettings(
            devices=devices,
            index=0,
            scheme="iid" if self.classes_per_device is None else "dirichlet",
            classes_per_device=self.classes_per_device,
            alpha=self.alpha,
            seed=seed,
        )


# C and alpha as in Kohankhaki et al., arXiv:2407.15738.
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="iid"),
        Scheme(name="mild", classes_per_device=5, alpha=3.0),
        Scheme(name="severe", classes_per_device=2, alpha=3.0),
    )
}


def parse_scheme(text: str, *, source: str = "--schemes") -> Scheme:
    """Read ``iid``, ``mild``, ``severe`` or ``C/ALPHA``, such as ``3/0.5``."""
    if text in SCHEMES:
        return SCHEMES[text]
    classes, _, alpha = text.partition("/")
    try:
        scheme = Scheme(name=text, classes_per_device=int(classes), alpha=float(alpha))
    except ValueError:
        scheme = None
    if scheme is None or scheme.classes_per_device is None or not _is_usable(scheme):
        raise ConfigError(
            f"expected some of {', '.join(SCHEMES)} or C/ALPHA (classes per device from 1, alpha "
            f"from 0.001 to 1e6), found {text!r}",
            source=source,
        )
    return scheme


def _is_usable(scheme: Scheme) -> bool:
    return (scheme.classes_per_device or 0) >= 1 and 1e-3 <= scheme.alpha <= 1e6
