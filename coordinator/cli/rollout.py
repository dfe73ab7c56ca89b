"""``coordinator rollout …``: take a bundle to a fleet, in waves. Asks the running coordinator."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordinator.cli import rollout_options as options
from coordinator.cli import rollout_orders as orders
from coordinator.cli.grouped import grouped
from coordinator.cli.rollout_orders import campaign_document, connect
from wire.errors import ConfigError
from wire.exit_codes import ExitCode

if TYPE_CHECKING:
    from coordinator.config import RunSettings
    from coordinator.rollout.client import OperatorClient
    from coordinator.rollout.records import BundleFacts, CampaignSettings
    from coordinator.rollout.requests import CampaignView
    from coordinator.rollout.selection import CampaignPlan

WATCH_S = 1.0

rollout = typer.Typer(
    name="rollout",
    help="Take a bundle to the devices of a fleet, in waves; watch, stop or undo it.",
    no_args_is_help=True,
)


@rollout.command()
@grouped
def plan(
    bundle: options.BundleArgument,
    where: options.FleetOptions,
    who: options.PlanOptions,
    as_json: options.JsonOption = False,
) -> None:
    """Show who would get a bundle, in which wave, and who is left out and why. Changes nothing.

    Example: coordinator rollout plan gait-7.bundle -c configs/lab.yaml --label site=north
    """
    facts, _ = _read_bundle(bundle)
    settings = options.build_campaign_settings(who.document())
    with connect(where.load()) as client:
        planned = _ask_plan(client, facts, settings, who.name)
    if as_json:
        from coordinator.rollout.selection import encode_plan

        typer.echo(json.dumps(encode_plan(planned)))
    else:
        _print_plan(planned)


@rollout.command()
@grouped
def start(
    bundle: options.BundleArgument,
    where: options.FleetOptions,
    who: options.PlanOptions,
    pace: options.PaceOptions,
    yes: options.YesOption = False,
    wait: Annotated[bool, typer.Option("--wait", help="Until the end; 1 if not all is well.")] = (
        False
    ),
    as_json: options.JsonOption = False,
) -> None:
    """Start a campaign: shows the plan and asks. A bundle goes to the coordinator first.

    Example: coordinator rollout start gait-7.bundle -c configs/lab.yaml --waves 1,10%,100%
    """
    facts, data = _read_bundle(bundle)
    settings = options.build_campaign_settings({**who.document(), **pace.document()})
    fleet = where.load()
    view = _carry_out(fleet, facts, data, settings, who.name, yes=yes, wait=wait, as_json=as_json)
    _show(view, as_json=as_json, every=False)
    if wait:
        raise typer.Exit(_code_of(view))


@rollout.command()
@grouped
def status(
    where: options.FleetOptions,
    campaign: options.NewestArgument = "",
    watch: Annotated[bool, typer.Option("--watch", help="Until the campaign is over.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Every device of a large fleet.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Show a campaign: its state, its waves, every device. The newest one if none is named.

    With --watch it ends with 1 if the campaign did not complete, or a device failed.

    Example: coordinator rollout status -c configs/lab.yaml --watch
    """
    with connect(where.load()) as client:
        view = _ask_status(client, campaign)
        if watch:
            view = _watch(client, view.record.campaign, as_json=as_json, every=every)
    _show(view, as_json=as_json, every=every)
    if watch:
        raise typer.Exit(_code_of(view))


@rollout.command("list")
@grouped
def list_campaigns(
    where: options.FleetOptions,
    as_json: options.JsonOption = False,
) -> None:
    """Show all campaigns of the fleet, the newest first.

    Example: coordinator rollout list -c configs/lab.yaml
    """
    from coordinator.rollout.requests import ListReply, ListRequest

    with connect(where.load()) as client:
        views = client.ask(ListRequest(), ListReply).campaigns
    if as_json:
        typer.echo(json.dumps([campaign_document(view) for view in views]))
        return
    from coordinator.rollout.views import campaigns_table
    from coordinator.tables import build_console

    console = build_console(sys.stdout)
    console.print(campaigns_table(views) if views else "no campaign yet")


rollout.command()(orders.pause)
rollout.command()(orders.resume)
rollout.command()(orders.abort)
rollout.command()(orders.rollback)
rollout.command()(orders.retry)


# What the commands share


def _read_bundle(path: str) -> tuple[BundleFacts, bytes]:
    """The bundle's facts and bytes; raises ConfigError or BundleError naming the file."""
    from pathlib import Path

    from coordinator.rollout.bundle_facts import describe_bundle
    from wire.bundle import BundleError

    try:
        data = Path(path).read_bytes()
    except OSError as exc:
        raise ConfigError(f"expected a readable bundle ({exc.strerror})", source=path) from exc
    try:
        return describe_bundle(data), data
    except BundleError as exc:
        raise BundleError(f"{path}: {exc}") from exc


def _ask_plan(
    client: OperatorClient, facts: BundleFacts, settings: CampaignSettings, name: str
) -> CampaignPlan:
    from coordinator.rollout.requests import PlanReply, PlanRequest

    request = PlanRequest(bundle=facts, settings=settings, campaign=name)
    return client.ask(request, PlanReply).plan


def _carry_out(
    where: RunSettings,
    facts: BundleFacts,
    data: bytes,
    settings: CampaignSettings,
    name: str,
    *,
    yes: bool,
    wait: bool,
    as_json: bool,
) -> CampaignView:
    """Show the plan, ask, begin, and watch to the end if that is wanted."""
    with connect(where) as client:
        planned = _ask_plan(client, facts, settings, name)
        if not as_json:
            _print_plan(planned)
        if not yes:
            typer.confirm("Start?", abort=True, err=as_json)
        view = _begin(client, facts, data, settings, planned.campaign)
        return _watch(client, view.record.campaign, as_json=as_json, every=False) if wait else view


def _begin(
    client: OperatorClient,
    facts: BundleFacts,
    data: bytes,
    settings: CampaignSettings,
    name: str,
) -> CampaignView:
    from coordinator.rollout.requests import StartRequest, StatusReply

    client.upload(facts, data)
    request = StartRequest(bundle=facts, settings=settings, campaign=name)
    return client.ask(request, StatusReply).campaign


def _ask_status(client: OperatorClient, campaign: str) -> CampaignView:
    from coordinator.rollout.requests import StatusReply, StatusRequest

    return client.ask(StatusRequest(campaign=campaign), StatusReply).campaign


def _watch(client: OperatorClient, campaign: str, *, as_json: bool, every: bool) -> CampaignView:
    """Look again and again until the campaign is over; Ctrl-C ends the watching alone."""
    from coordinator.rollout.records import ENDED_PHASES

    if as_json or not sys.stdout.isatty():
        view = _ask_status(client, campaign)
        while view.record.phase not in ENDED_PHASES:
            time.sleep(WATCH_S)
            view = _ask_status(client, campaign)
        return view
    from rich.live import Live

    from coordinator.tables import build_console

    with Live(console=build_console(sys.stdout), auto_refresh=False, transient=True) as live:
        while True:
            view = _ask_status(client, campaign)
            if view.record.phase in ENDED_PHASES:
                return view
            live.update(_render(view, every=every), refresh=True)
            time.sleep(WATCH_S)


def _show(view: CampaignView, *, as_json: bool, every: bool) -> None:
    if as_json:
        typer.echo(json.dumps(campaign_document(view)))
        return
    from coordinator.tables import build_console

    build_console(sys.stdout).print(_render(view, every=every))


def _render(view: CampaignView, *, every: bool) -> Any:
    from rich.console import Group

    from coordinator.rollout.views import campaign_facts, devices_table, waves_table
    from coordinator.tables import facts_table

    return Group(
        facts_table(campaign_facts(view)),
        "",
        waves_table(view),
        "",
        devices_table(view, every=every),
    )


def _print_plan(planned: CampaignPlan) -> None:
    from coordinator.rollout.views import plan_facts, plan_table
    from coordinator.tables import build_console, facts_table

    console = build_console(sys.stdout)
    console.print(facts_table(plan_facts(planned)))
    console.print()
    console.print(plan_table(planned))


def _code_of(view: CampaignView) -> ExitCode:
    """1 unless the campaign completed and every device has the bundle."""
    from coordinator.rollout.records import CampaignPhase, DevicePhase

    is_whole = set(view.counts) <= {DevicePhase.COMMITTED.value}
    is_done = view.record.phase is CampaignPhase.COMPLETED
    return ExitCode.OK if is_done and is_whole else ExitCode.FAILED
