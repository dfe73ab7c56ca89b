"""Options that the commands of ``coordinator rollout`` share, and how their texts are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from wire.errors import ConfigError

if TYPE_CHECKING:
    from coordinator.config import RunSettings
    from coordinator.rollout.records import CampaignSettings

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ReasonOption = Annotated[str, typer.Option(help="Kept with the campaign.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
BundleArgument = Annotated[str, typer.Argument(metavar="BUNDLE", help="The bundle's file.")]
NewestArgument = Annotated[
    str, typer.Argument(metavar="CAMPAIGN", help="The newest one if it is left out.")
]
OnlyArgument = Annotated[
    str,
    typer.Argument(metavar="CAMPAIGN", help="Needed where more than one comes into question."),
]


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """Where the coordinator is."""

    config: Annotated[
        str | None, typer.Option("-c", "--config", help="A run's YAML file: broker and fleet.")
    ] = None
    fleet: Annotated[str | None, typer.Option(help="Fleet, instead of the file's.")] = None
    host: Annotated[str | None, typer.Option(help="Broker host, instead of the file's.")] = None
    port: Annotated[int | None, typer.Option(help="Broker port, instead of the file's.")] = None

    def load(self) -> RunSettings:
        """Broker and fleet from the file and the flags; ConfigError for what is wrong in them."""
        from coordinator.config import RunSettings, override
        from wire.settings import load_settings

        settings = RunSettings() if self.config is None else load_settings(self.config, RunSettings)
        values: dict[str, object] = {
            "fleet": self.fleet,
            "mqtt.host": self.host,
            "mqtt.port": self.port,
        }
        return override(settings, values, source=self.config or "flags")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Who gets the bundle, and in which wave."""

    name: Annotated[
        str, typer.Option(metavar="ID", help="Id of the campaign, instead of one from the bundle.")
    ] = ""
    waves: Annotated[
        str, typer.Option(metavar="LIST", help="How many devices are reached with each wave.")
    ] = "1,10%,50%,100%"
    match: Annotated[
        list[str] | None, typer.Option("--match", metavar="PATTERN", help="Ids such as 'pi-*'.")
    ] = None
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="NAME=PATTERN", help="A label of the agents' settings."),
    ] = None
    device: Annotated[
        list[str] | None,
        typer.Option("--device", metavar="ID", help="This device, even if it was never seen."),
    ] = None
    first: Annotated[
        list[str] | None, typer.Option("--first", metavar="ID", help="This device before others.")
    ] = None
    take_from_run: Annotated[
        bool,
        typer.Option(
            "--take-from-run", help="Devices that take part in a run leave it after a step."
        ),
    ] = False

    def document(self) -> dict[str, Any]:
        """As fields of CampaignSettings; raises ConfigError naming the option."""
        selection = {
            "patterns": self.match or [],
            "labels": parse_labels(self.label or ()),
            "devices": self.device or [],
            "first": self.first or [],
        }
        return {
            "waves": self.waves,
            "selection": selection,
            "take_from_run": self.take_from_run,
        }


@dataclass(frozen=True, kw_only=True)
class PaceOptions:
    """How a campaign goes on, and when it stops."""

    include_new: Annotated[
        bool, typer.Option("--include-new", help="Devices that appear later join the last wave.")
    ] = False
    soak: Annotated[
        str, typer.Option(metavar="TIME", help="Watch each wave for so long before the next.")
    ] = "60s"
    rate: Annotated[
        float, typer.Option(metavar="N", help="Offers a minute at the most; 0: no limit.", min=0)
    ] = 0.0
    max_failed: Annotated[
        str, typer.Option(metavar="SHARE", help="Abort if more of a wave's devices fail.")
    ] = "10%"
    max_lost: Annotated[
        str, typer.Option(metavar="SHARE", help="Abort if more of the updated devices go offline.")
    ] = "20%"
    lost_after: Annotated[
        str, typer.Option(metavar="TIME", help="A device is lost when it is offline for so long.")
    ] = "5m"
    revert_on_abort: Annotated[
        bool, typer.Option("--revert-on-abort", help="An automatic abort calls the bundle back.")
    ] = False
    good_steps: Annotated[
        int, typer.Option(metavar="N", help="Steps of a run after which a device commits.", min=0)
    ] = 0
    trial: Annotated[
        str, typer.Option(metavar="TIME", help="Or the time after which it commits.")
    ] = "30s"
    limit: Annotated[
        list[str] | None,
        typer.Option(
            "--limit", metavar="PHASE=TIME", help="Longest offered, download, self-test or commit."
        ),
    ] = None
    individual: Annotated[
        bool, typer.Option("--individual", help="No shared chunks: each device gets its own.")
    ] = False

    def document(self) -> dict[str, Any]:
        """As fields of CampaignSettings; raises ConfigError naming the option."""
        return {
            "include_new": self.include_new,
            "soak_s": parse_duration(self.soak, "--soak"),
            "rate_per_min": self.rate,
            "max_failed": parse_share(self.max_failed, "--max-failed"),
            "max_lost": parse_share(self.max_lost, "--max-lost"),
            "lost_after_s": parse_duration(self.lost_after, "--lost-after"),
            "revert_on_abort": self.revert_on_abort,
            "good_steps": self.good_steps,
            "trial_s": parse_duration(self.trial, "--trial"),
            "limits": parse_limits(self.limit or ()),
            "shared": not self.individual,
        }


_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|min|h|d)?")
_UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_SHARE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<percent>%?)")
_LIMITS = {
    "offered": "offered_s",
    "download": "download_s",
    "self-test": "self_test_s",
    "commit": "commit_s",
}


def parse_duration(text: str, option: str) -> float:
    """Seconds of ``90``, ``10m``, ``2h`` or ``1d``; raises ConfigError naming the option."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"expected a time such as 90s, 10m, 2h or 1d, received {text!r}", field=option
        )
    return float(match["number"]) * _UNITS_S[match["unit"] or "s"]


def parse_share(text: str, option: str) -> float:
    """A share of ``10%`` or ``0.1``; raises ConfigError naming the option."""
    match = _SHARE.fullmatch(text.strip())
    share = -1.0 if match is None else float(match["number"]) / (100 if match["percent"] else 1)
    if not 0 <= share <= 1:
        raise ConfigError(f"expected a share from 0% to 100%, received {text!r}", field=option)
    return share


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """``NAME=PATTERN`` texts; raises ConfigError for one without ``=``."""
    labels = {}
    for text in texts:
        name, separator, pattern = text.partition("=")
        if not separator or not name:
            raise ConfigError(f"expected NAME=PATTERN, received {text!r}", field="--label")
        labels[name] = pattern
    return labels


def parse_limits(texts: Sequence[str]) -> dict[str, float]:
    """``PHASE=TIME`` texts as fields of Limits; raises ConfigError for another phase."""
    limits = {}
    for text in texts:
        name, _, duration = text.partition("=")
        if name not in _LIMITS:
            raise ConfigError(
                f"expected one of {', '.join(_LIMITS)} and a time, received {text!r}",
                field="--limit",
            )
        limits[_LIMITS[name]] = parse_duration(duration, "--limit")
    return limits


def build_campaign_settings(document: dict[str, Any]) -> CampaignSettings:
    """Settings of a campaign from plain values; raises ConfigError for what makes no sense."""
    from coordinator.rollout.records import CampaignSettings
    from coordinator.rollout.waves import wave_sizes

    try:
        settings = msgspec.convert(document, CampaignSettings)
    except msgspec.ValidationError as exc:
        raise ConfigError(str(exc).partition(" - at ")[0], field="rollout") from exc
    try:
        wave_sizes(settings.waves, 1)
    except ConfigError as exc:
        raise ConfigError(exc.expected, field="--waves") from exc
    return settings
