"""Who a campaign is for: candidates in, plan out. Pure; changes nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import msgspec

from coordinator.rollout.records import BundleFacts, CampaignSettings, Record, Selection
from coordinator.rollout.waves import order_devices, wave_sizes


class Candidate(Record, frozen=True, kw_only=True):
    """A device as the coordinator knows it; ``seen`` is false for one known by name only.

    ``run_bundle`` is the bundle of the run that it takes part in; ``held_by`` another campaign
    that is not over with it.
    """

    device: str
    seen: bool = True
    online: bool = False
    bundle: str = ""
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    sample_shape: tuple[int, ...] = ()
    classes: int = 0
    can_train: bool = True
    run_bundle: str = ""
    held_by: str = ""


class PlannedDevice(Record, frozen=True, kw_only=True):
    """A device of the plan; ``wave`` counts from 0."""

    device: str
    wave: int
    online: bool = False
    seen: bool = True
    bundle: str = ""


class CampaignPlan(Record, frozen=True, kw_only=True):
    """Who comes in which wave, in order, and who is left out and why."""

    campaign: str
    bundle: BundleFacts
    waves: tuple[int, ...]
    devices: tuple[PlannedDevice, ...]
    left_out: dict[str, str] = msgspec.field(default_factory=dict)

    def reasons(self) -> dict[str, int]:
        """How many are left out, by reason, most frequent first."""
        return dict(Counter(self.left_out.values()).most_common())


def is_selected(candidate: Candidate, selection: Selection) -> bool:
    """Whether patterns and labels fit, or the device is asked for by name."""
    if candidate.device in selection.devices:
        return True
    if not selection.patterns and not selection.labels:
        return not selection.devices
    patterns = selection.patterns or ("*",)
    return any(fnmatchcase(candidate.device, pattern) for pattern in patterns) and all(
        fnmatchcase(candidate.labels.get(name, ""), pattern)
        for name, pattern in selection.labels.items()
    )


def obstacle(candidate: Candidate, bundle: BundleFacts, settings: CampaignSettings) -> str:
    """Why a selected device is left out; empty if it is not."""
    if candidate.held_by:
        return f"in campaign {candidate.held_by}"
    if not candidate.seen:  # it says what it is when it comes, and refuses what does not fit
        return ""
    if candidate.bundle == bundle.digest:
        return "has this bundle"
    if misfit := _misfit(candidate, bundle):
        return misfit
    if candidate.run_bundle and not settings.take_from_run:
        return "takes part in a run of another bundle"
    return ""


def _misfit(candidate: Candidate, bundle: BundleFacts) -> str:
    if bundle.input_shape and candidate.sample_shape != bundle.input_shape:
        return f"samples of shape {list(candidate.sample_shape)}, not {list(bundle.input_shape)}"
    if bundle.classes and candidate.classes > bundle.classes:
        return f"{candidate.classes} classes, not {bundle.classes}"
    if not bundle.frozen and not candidate.can_train:
        return "cannot train"
    return ""


def plan_campaign(
    campaign: str,
    bundle: BundleFacts,
    settings: CampaignSettings,
    candidates: Iterable[Candidate],
) -> CampaignPlan:
    """Who comes in which wave; raises ConfigError for waves that cannot be read."""
    by_name = {candidate.device: candidate for candidate in candidates}
    for name in (*settings.selection.devices, *settings.selection.first):
        by_name.setdefault(name, Candidate(device=name, seen=False))
    chosen, left_out = _choose(by_name, bundle, settings)
    order = order_devices(campaign, chosen, settings.selection.first)
    waves = wave_sizes(settings.waves, len(order))
    devices: list[PlannedDevice] = []
    names = iter(order)
    for wave, size in enumerate(waves):
        devices += [_planned(by_name[next(names)], wave) for _ in range(size)]
    left_out |= dict.fromkeys(names, "beyond the last wave")
    return CampaignPlan(
        campaign=campaign,
        bundle=bundle,
        waves=waves,
        devices=tuple(devices),
        left_out=dict(sorted(left_out.items())),
    )


def _choose(
    by_name: Mapping[str, Candidate], bundle: BundleFacts, settings: CampaignSettings
) -> tuple[list[str], dict[str, str]]:
    selection = settings.selection
    chosen, left_out = [], {}
    for name, candidate in by_name.items():
        if not is_selected(candidate, selection) and name not in selection.first:
            left_out[name] = "not selected"
        elif reason := obstacle(candidate, bundle, settings):
            left_out[name] = reason
        else:
            chosen.append(name)
    return chosen, left_out


def _planned(candidate: Candidate, wave: int) -> PlannedDevice:
    return PlannedDevice(
        device=candidate.device,
        wave=wave,
        online=candidate.online,
        seen=candidate.seen,
        bundle=candidate.bundle,
    )


def campaign_id(bundle: BundleFacts, taken: Iterable[str]) -> str:
    """An id for a campaign that was given none: the same for a plan and the start after it."""
    stem = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{bundle.name}-{bundle.version}")
    base = f"{stem.strip('-_.')[:40] or 'bundle'}-{bundle.digest[:8]}"
    used = set(taken)
    number = 1
    while (name := base if number == 1 else f"{base}-{number}") in used:
        number += 1
    return name


def encode_plan(plan: CampaignPlan) -> dict[str, object]:
    """The plan as plain values, with the reasons counted."""
    document: dict[str, object] = msgspec.to_builtins(plan)
    return document | {"left_out_by_reason": plan.reasons()}
