"""The command ``edge-agent``: run · check · bench · bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from edge_agent.config import (
    MAX_BUNDLE_BYTES,
    SELF_TEST_BYTES,
    AgentSettings,
    ComputeSettings,
    load_agent_settings,
)
from wire.command import build_app, configure_logging, run_command, stop_on_signals

app = build_app("edge-agent", "Train the client segment of a network on this device's own samples.")

ConfigOption = Annotated[str, typer.Option("-c", "--config", help="The agent's YAML file.")]
DeviceOption = Annotated[str | None, typer.Option(help="Device id, instead of the file's.")]
HostOption = Annotated[str | None, typer.Option(help="Broker host, instead of the file's.")]
IndexOption = Annotated[
    int | None,
    typer.Option(help="Part of a shared file (data.partition.index), instead of the file's."),
]
PortOption = Annotated[int | None, typer.Option(help="Broker port, instead of the file's.")]
BundleOption = Annotated[
    Path | None,
    typer.Option(help="A bundle (client.bundle of a run, or of coordinator export)."),
]

FileArgument = Annotated[Path, typer.Argument(help="A bundle file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

bundle_app = typer.Typer(help="Look at a bundle file, or check it.", no_args_is_help=True)
app.add_typer(bundle_app, name="bundle")


@app.command()
def run(
    config: ConfigOption,
    device: DeviceOption = None,
    host: HostOption = None,
    port: PortOption = None,
    index: IndexOption = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log every message.")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings in force and end.")
    ] = False,
) -> None:
    """Serve one device until stopped.

    Example: edge-agent run -c configs/agent.yaml
    """
    settings = _load(config, device, host, port, index)
    if print_config:
        typer.echo(msgspec.yaml.encode(settings).decode(), nl=False)
        return
    configure_logging(verbose=verbose)
    from edge_agent.start import build_daemon  # onnxruntime is not needed for --help

    daemon = build_daemon(settings, source=config)
    stop_on_signals(daemon.stop)
    raise typer.Exit(daemon.run())


@app.command()
def check(
    config: ConfigOption,
    device: DeviceOption = None,
    host: HostOption = None,
    port: PortOption = None,
    index: IndexOption = None,
    bundle: BundleOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check settings, data, backends and the broker, without training.

    Says what runs the backward pass and why, and what the bundle that was used last, or the one of
    --bundle, costs here. Ends with 65 if that bundle cannot be used, 69 if the broker does not
    answer.

    Example: edge-agent check -c configs/agent.yaml
    """
    settings = _load(config, device, host, port, index)
    from edge_agent.checking import check_device, check_lines, exit_code_of

    report = check_device(settings, source=config, bundle_path=bundle)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        for name, found in check_lines(report):
            typer.echo(f"{name:<20} {found}")
    raise typer.Exit(exit_code_of(report))


@app.command()
def bench(
    config: Annotated[
        str | None,
        typer.Option(
            "-c", "--config", help="The agent's YAML file: threads, memory, its last bundle."
        ),
    ] = None,
    bundle: BundleOption = None,
    batch: Annotated[
        list[int], typer.Option(min=1, help="Samples in a step; may be given several times.")
    ] = [1, 8, 32, 128],  # noqa: B006 - typer's way to say a default list
    rounds: Annotated[
        int, typer.Option(min=1, help="Turns of each backend at each batch size.")
    ] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a bundle's step on every backend that is installed: time and memory.

    Each backend is a process of its own; they take turns. Needs no broker and no samples.

    Example: edge-agent bench --bundle runs/lab/client.bundle --batch 8 --batch 32
    """
    from edge_agent.benching import run_bench

    settings = None if config is None else load_agent_settings(config)
    run_bench(settings, bundle, batch, rounds=rounds, as_json=as_json)


@bundle_app.command()
def show(file: FileArgument, as_json: JsonOption = False) -> None:
    """Print what a bundle says of itself. Signatures are named and not checked.

    Example: edge-agent bundle show client.bundle
    """
    from edge_agent.bundle_command import show_bundle

    _print_bundle(show_bundle(file, max_bytes=MAX_BUNDLE_BYTES), as_json=as_json)


@bundle_app.command()
def verify(
    file: FileArgument,
    config: Annotated[
        str | None,
        typer.Option("-c", "--config", help="The agent's YAML file: keys, backends, limits."),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(help="A public key to accept, by file or in base64; repeatable."),
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Run the golden samples too.")
    ] = True,
    limit_s: Annotated[float, typer.Option(min=1, help="Longest time for the self-test.")] = 120.0,
    as_json: JsonOption = False,
) -> None:
    """Check a bundle as an agent does before it uses it; exit code 65 if it would be refused.

    Hashes, signature, expiry, agent version, and the self-test on this machine.

    Example: edge-agent bundle verify client.bundle --key fleet.pub
    """
    from edge_agent.bundle_command import verify_bundle_file
    from wire.signing import load_trusted_keys

    settings = None if config is None else load_agent_settings(config)
    keys = key or ([] if settings is None else settings.bundle_keys)
    trust = load_trusted_keys(
        keys, source=None if key else config, field="--key" if key else "$.bundle_keys"
    )
    compute = ComputeSettings() if settings is None else settings.compute
    report = verify_bundle_file(
        file,
        max_bytes=MAX_BUNDLE_BYTES if settings is None else settings.max_bundle_bytes,
        trust=trust,
        compute=compute if self_test else None,
        memory_bytes=SELF_TEST_BYTES if settings is None else settings.self_test_max_bytes,
        limit_s=limit_s,
    )
    _print_bundle(report, as_json=as_json)


def _print_bundle(report: dict[str, Any], *, as_json: bool) -> None:
    from edge_agent.bundle_command import bundle_lines

    if as_json:
        typer.echo(json.dumps(report))
        return
    for label, value in bundle_lines(report):
        typer.echo(f"{label:<12} {value}")


def main() -> None:
    """Run the command; errors end in one line on stderr and a code of wire.exit_codes."""
    run_command(app)


def _load(
    config: str, device: str | None, host: str | None, port: int | None, index: int | None
) -> AgentSettings:
    overrides: dict[str, object] = {
        "device": device,
        "mqtt.host": host,
        "mqtt.port": port,
        "data.partition.index": index,
    }
    return load_agent_settings(config, overrides)
