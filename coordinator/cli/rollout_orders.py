"""What ``coordinator rollout`` can do with a campaign that is there: each command is one order."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from coordinator.cli import rollout_options as options
from coordinator.cli.grouped import grouped

if TYPE_CHECKING:
    from coordinator.config import RunSettings
    from coordinator.rollout.client import OperatorClient
    from coordinator.rollout.requests import CampaignView


@grouped
def pause(
    where: options.FleetOptions,
    campaign: options.OnlyArgument = "",
    reason: options.ReasonOption = "",
    as_json: options.JsonOption = False,
) -> None:
    """Offer nothing more; devices finish what they have begun.

    Example: coordinator rollout pause -c configs/lab.yaml
    """
    _order(where, campaign, "pause", reason=reason, as_json=as_json)


@grouped
def resume(
    where: options.FleetOptions,
    campaign: options.OnlyArgument = "",
    as_json: options.JsonOption = False,
) -> None:
    """Go on with a paused campaign. A wave in which nobody committed is let pass.

    Example: coordinator rollout resume -c configs/lab.yaml
    """
    _order(where, campaign, "resume", as_json=as_json)


@grouped
def abort(
    where: options.FleetOptions,
    campaign: options.OnlyArgument = "",
    revert: Annotated[
        bool,
        typer.Option("--revert/--keep", help="Devices that use the bundle go back, or keep it."),
    ] = False,
    reason: options.ReasonOption = "",
    as_json: options.JsonOption = False,
) -> None:
    """Stop a campaign for good. Downloads end; what is in use stays (--keep) or goes (--revert).

    Example: coordinator rollout abort --revert -c configs/lab.yaml
    """
    _order(where, campaign, "abort", revert=revert, reason=reason, as_json=as_json)


@grouped
def rollback(
    where: options.FleetOptions,
    campaign: options.OnlyArgument = "",
    reason: options.ReasonOption = "",
    yes: options.YesOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Call the bundle of a campaign that is over back from every device.

    Each device goes back to the bundle that it had before.

    Example: coordinator rollout rollback gait-7-1eb62544 -c configs/lab.yaml
    """
    if not yes:
        campaign = campaign or _name_for(where, "rollback")
        question = f"Call the bundle of {campaign} back from all its devices?"
        typer.confirm(question, abort=True, err=as_json)
    _order(where, campaign, "rollback", reason=reason, as_json=as_json)


@grouped
def retry(
    where: options.FleetOptions,
    campaign: options.OnlyArgument = "",
    failed: Annotated[
        bool, typer.Option("--failed", help="All that failed or were out of reach.")
    ] = False,
    device: Annotated[
        list[str] | None, typer.Option("--device", metavar="ID", help="This one of them.")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Offer the bundle again to devices that failed, as one more wave.

    Example: coordinator rollout retry --failed -c configs/lab.yaml
    """
    if failed == bool(device):
        raise typer.BadParameter("expected --failed or --device ID, and not both")
    _order(where, campaign, "retry", devices=tuple(device or ()), as_json=as_json)


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
    where: options.FleetOptions,
    campaign: str,
    order: str,
    *,
    revert: bool = False,
    reason: str = "",
    devices: tuple[str, ...] = (),
    as_json: bool,
) -> None:
    from coordinator.rollout.requests import Order, OrderRequest, StatusReply

    request = OrderRequest(
        order=Order(order), campaign=campaign, revert=revert, reason=reason, devices=devices
    )
    with connect(where.load()) as client:
        view = client.ask(request, StatusReply).campaign
    if as_json:
        typer.echo(json.dumps(campaign_document(view)))
        return
    from coordinator.rollout.views import campaign_facts
    from coordinator.tables import build_console, facts_table

    build_console(sys.stdout).print(facts_table(campaign_facts(view)))


def _name_for(where: options.FleetOptions, order: str) -> str:
    """The campaign that an order without a name is for; ConfigError if that is not clear."""
    from coordinator.rollout.requests import Order, StatusReply, StatusRequest

    with connect(where.load()) as client:
        view = client.ask(StatusRequest(order=Order(order)), StatusReply).campaign
    return view.record.campaign
