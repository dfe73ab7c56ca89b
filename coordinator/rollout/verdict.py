"""Whether a campaign has to stop by itself. Pure."""

from __future__ import annotations

from coordinator.rollout.ledger import Ledger
from coordinator.rollout.records import CampaignRecord


def find_fault(record: CampaignRecord, ledger: Ledger, *, lost: int) -> str:
    """Why the campaign has to abort; empty if it may go on.

    ``lost`` devices use the bundle and have been offline for too long. Failures are judged wave by
    wave against the devices that could be reached, so that a fault shows in the small first waves;
    an earlier wave counts on, since devices may go back from a bundle long after. Waves of devices
    that are tried again do not count: they have failed before.
    """
    settings = record.settings
    for wave in range(min(record.wave + 1, record.planned_waves)):
        failed, reached = ledger.failed(wave), ledger.reached(wave)
        if failed > settings.max_failed * reached:
            return (
                f"wave {wave + 1}: {failed} of {reached} devices failed, "
                f"more than {settings.max_failed:.0%}"
            )
    updated = ledger.updated()
    if lost > settings.max_lost * updated:
        return (
            f"{lost} of {updated} updated devices are offline for more than "
            f"{settings.lost_after_s:g} s, more than {settings.max_lost:.0%}"
        )
    return ""
