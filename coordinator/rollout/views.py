"""Campaigns and plans as tables and lines that people read."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from coordinator.rollout.records import (
    FAILED_PHASES,
    CampaignPhase,
    DevicePhase,
)
from coordinator.rollout.requests import CampaignView, DeviceView
from coordinator.rollout.selection import CampaignPlan
from coordinator.tables import (
    NONE,
    describe_names,
    format_bytes,
    format_seconds,
    format_share,
    new_table,
    printable,
    select_rows,
)

_STYLES = {
    DevicePhase.COMMITTED: "green",
    DevicePhase.TRIAL: "cyan",
    **dict.fromkeys(FAILED_PHASES, "red"),
    DevicePhase.UNREACHABLE: "yellow",
    DevicePhase.CANCELLED: "yellow",
}


def plan_facts(plan: CampaignPlan) -> list[tuple[str, str]]:
    """What the campaign would be."""
    bundle = plan.bundle
    facts = [
        ("campaign", plan.campaign),
        ("bundle", f"{printable(bundle.name)} {printable(bundle.version)}, {bundle.digest[:16]}"),
        ("size", format_bytes(bundle.size_bytes)),
        ("signed by", bundle.signed_by or "nobody: only devices without keys take it"),
        ("devices", f"{len(plan.devices)} in {len(plan.waves)} waves"),
    ]
    for reason, count in plan.reasons().items():
        names = [name for name, why in plan.left_out.items() if why == reason]
        facts.append(("left out", f"{count} {printable(reason)}: {describe_names(names)}"))
    return facts


def plan_table(plan: CampaignPlan) -> Table:
    """One row per wave, with the devices in their order."""
    table = new_table(["wave"], ["devices", "online"], ["in order"])
    for wave, size in enumerate(plan.waves):
        devices = [device for device in plan.devices if device.wave == wave]
        names = [device.device + ("" if device.seen else " (never seen)") for device in devices]
        online = sum(device.online for device in devices)
        table.add_row(f"{wave + 1}", f"{size:,}", f"{online:,}", describe_names(names, most=10))
    return table


def campaign_facts(view: CampaignView) -> list[tuple[str, str]]:
    """Where a campaign is."""
    record = view.record
    bundle = record.bundle
    return [
        ("campaign", f"{record.campaign} (fleet {record.fleet})"),
        ("bundle", f"{printable(bundle.name)} {printable(bundle.version)}, {bundle.digest[:16]}"),
        ("state", describe_phase(view)),
        ("wave", f"{record.wave + 1} of {record.waves}"),
        ("devices", describe_counts(view.counts)),
    ]


def describe_phase(view: CampaignView) -> str:
    """The phase, since when and why, and what comes next."""
    record = view.record
    text = f"{record.phase} for {format_seconds(max(0.0, view.now_s - record.since_s))}"
    if record.reason:
        text += f": {printable(record.reason)}"
    if record.phase is CampaignPhase.SOAKING:
        rest_s = max(0.0, record.since_s + record.settings.soak_s - view.now_s)
        text += f", {format_seconds(rest_s)} to go"
    return text


def describe_counts(counts: dict[str, int]) -> str:
    """``30 devices: 12 committed, 18 planned``, in the order of a device's life."""
    total = sum(counts.values())
    shown = [f"{counts[phase]:,} {phase}" for phase in DevicePhase if counts.get(phase)]
    return f"{total:,}: {', '.join(shown)}" if shown else "none"


def waves_table(view: CampaignView) -> Table:
    """One row per wave."""
    table = new_table(["wave"], ["devices"], ["states"])
    for wave, (size, counts) in enumerate(zip(view.wave_sizes, view.wave_counts, strict=True)):
        mark = " <" if wave == view.record.wave and view.record.phase.value != "completed" else ""
        table.add_row(f"{wave + 1}{mark}", f"{size:,}", describe_counts(counts).partition(": ")[2])
    return table


def devices_table(view: CampaignView, *, every: bool) -> Table:
    """One row per device; many are cut down to the first ones and those that failed."""
    rows: Sequence[DeviceView] = view.devices
    hidden = 0
    if not every:
        rows, hidden, _ = select_rows(rows, lambda row: row.entry.phase in FAILED_PHASES)
    table = new_table(
        ["device", "state"], ["wave", "for", "self-test", "memory"], ["online", "detail"]
    )
    for row in rows:
        table.add_row(*_device_row(row, view))
    if hidden:
        table.caption = f"{hidden:,} devices are not shown; --all shows them"
    return table


def _device_row(row: DeviceView, view: CampaignView) -> list[Text | str]:
    entry = row.entry
    state = entry.phase.value
    if entry.phase is DevicePhase.DOWNLOADING:
        state += f" {format_share(row.offset_bytes / view.record.bundle.size_bytes)}"
    test = entry.self_test
    detail = printable(entry.detail) + (f" (attempt {entry.attempt + 1})" if entry.attempt else "")
    return [
        Text(entry.device),
        Text(state, style=_STYLES.get(entry.phase, "")),
        f"{entry.wave + 1}",
        format_seconds(max(0.0, view.now_s - entry.since_s)),
        NONE if test is None else format_seconds(test.seconds),
        NONE if test is None else format_bytes(test.peak_bytes),
        "yes" if row.online else "no",
        Text(detail or NONE),
    ]


def campaigns_table(views: Sequence[CampaignView]) -> Table:
    """One row per campaign, the newest first."""
    table = new_table(["campaign", "state"], ["wave", "devices", "committed", "failed"], ["bundle"])
    for view in views:
        record = view.record
        failed = sum(view.counts.get(phase, 0) for phase in FAILED_PHASES)
        table.add_row(
            record.campaign,
            record.phase.value,
            f"{record.wave + 1}/{record.waves}",
            f"{sum(view.counts.values()):,}",
            f"{view.counts.get(DevicePhase.COMMITTED, 0):,}",
            f"{failed:,}",
            Text(f"{printable(record.bundle.name)} {printable(record.bundle.version)}"),
        )
    return table
