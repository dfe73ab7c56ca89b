"""What ``coordinator rollout`` can do with a campaign that is there: each command is one order."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from coordinator.cli import rollout_options as options

if TYPE_CHECKING:
    from coordinator.config import RunSettings
    from coordinator.rollout.client import OperatorClient
    from coordinator.rollout.requests import CampaignView


def pause(
    campaign: options.CampaignArgument,
    config: options.ConfigOption = None,
    reason: options.ReasonOption = "",
    fleet: options.FleetOption = None,
    host: options.HostOption = None,
    port: options.PortOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Offer nothing more; devices finish what they have begun.

    Example: coordinator rollout pause gait-7-1eb62544 -c configs/lab.yaml
    """
    where = options.load_fleet(config, fleet, host, port)
    _order(where, campaign, "pause", reason=reason, as_json=as_json)


def resume(
    campaign: options.CampaignArgument,
    config: options.ConfigOption = None,
    fleet: options.FleetOption = None,
    host: options.HostOption = None,
    port: options.PortOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Go on with a paused campaign. A wave in which nobody committed is let pass.

    Example: coordinator rollout resume gait-7-1eb62544 -c configs/lab.yaml
    """
    where = options.load_fleet(config, fleet, host, port)
    _order(where, campaign, "resume", as_json=as_json)


def abort(
    campaign: options.CampaignArgument,
    config: options.ConfigOption = None,
    revert: Annotated[
        bool,
        typer.Option("--revert/--keep", help="Devices that use the bundle go back, or keep it."),
    ] = False,
    reason: options.ReasonOption = "",
    fleet: options.FleetOption = None,
    host: options.HostOption = None,
    port: options.PortOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Stop a campaign for good. Downloads end; what is in use stays (--keep) or goes (--revert).

    Example: coordinator rollout abort gait-7-1eb62544 --revert -c configs/lab.yaml
    """
    where = options.load_fleet(config, fleet, host, port)
    _order(where, campaign, "abort", revert=revert, reason=reason, as_json=as_json)


def rollback(
    campaign: options.CampaignArgument,
    config: options.ConfigOption = None,
    reason: options.ReasonOption = "",
    fleet: options.FleetOption = None,
    host: options.HostOption = None,
    port: options.PortOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Call the bundle of a campaign that is over back from every device.

    Each device goes back to the bundle that it had before.

    Example: coordinator rollout rollback gait-7-1eb62544 -c configs/lab.yaml
    """
    where = options.load_fleet(config, fleet, host, port)
    if not yes:
        question = f"Call the bundle of {campaign} back from all its devices?"
        typer.confirm(question, abort=True, err=as_json)
    _order(where, campaign, "rollback", reason=reason, as_json=as_json)


def retry(
    campaign: options.CampaignArgument,
    config: options.ConfigOption = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="Those that failed or were out of reach.")
    ] = False,
    fleet: options.FleetOption = None,
    host: options.HostOption = None,
    port: options.PortOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Offer the bundle again to devices that failed, as one more wave.

    Example: coordinator rollout retry gait-7-1eb62544 --failed -c configs/lab.yaml
    """
    if not failed:
        raise typer.BadParameter("expected --failed: nothing else can be tried again")
    where = options.load_fleet(config, fleet, host, port)
    _order(where, campaign, "retry", as_json=as_json)


def connect(settings: RunSettings) -> AbstractContextManager[OperatorClient]:
    """A connection to the fleet's coordinator, as an operator."""
    from coordinator.rollout.client import operator_client

    return operator_client(settings.mqtt, settings.fleet)


def campaign_document(view: CampaignView) -> dict[str, Any]:
    """The campaign for programs: the record, counts, and each device's entry on one level."""
    document: dict[str, Any] = msgspec.to_builtins(view)
    record = document.pop("record")
    devices = [device.pop("entry") | device for device in document.pop("devices")]
    return {**record, **document, "devices": devices}


def _order(
    settings: RunSettings,
    campaign: str,
    order: str,
    *,
    revert: bool = False,
    reason: str = "",
    as_json: bool,
) -> None:
    from coordinator.rollout.requests import Order, OrderRequest, StatusReply

    request = OrderRequest(campaign=campaign, order=Order(order), revert=revert, reason=reason)
    with connect(settings) as client:
        view = client.ask(request, StatusReply).campaign
    if as_json:
        typer.echo(json.dumps(campaign_document(view)))
        return
    from coordinator.rollout.views import campaign_facts
    from coordinator.tables import build_console, facts_table

    build_console(sys.stdout).print(facts_table(campaign_facts(view)))
