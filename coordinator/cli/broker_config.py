"""``coordinator broker-config``: Mosquitto's configuration and access rules for a lab."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from coordinator.broker_config import (
    COORDINATOR_USER,
    MAX_PACKET_BYTES,
    LabBroker,
    TlsPaths,
    lab_acl,
    lab_mosquitto_config,
)
from wire.errors import ConfigError
from wire.settings import load_settings

CONF_FILE = "splitfleet.conf"
ACL_FILE = "splitfleet.acl"


class Part(StrEnum):
    """What to print."""

    ALL = "all"
    CONF = "conf"
    ACL = "acl"


def broker_config(
    config: Annotated[
        str | None, typer.Option("-c", "--config", help="A run's YAML file: names the fleet.")
    ] = None,
    fleet: Annotated[str | None, typer.Option(help="Fleet, instead of the file's. (lab)")] = None,
    port: Annotated[int, typer.Option(help="Port for devices.")] = 1883,
    bind: Annotated[str | None, typer.Option(help="Address for devices. (all addresses)")] = None,
    operator_port: Annotated[
        int, typer.Option(help="Loopback port for the coordinator; 0 for none.")
    ] = 1884,
    user: Annotated[str, typer.Option(help="User name of the coordinator.")] = COORDINATOR_USER,
    password_path: Annotated[
        str, typer.Option(help="Password file, on the broker's host.")
    ] = "/etc/mosquitto/splitfleet.passwd",  # noqa: S107 - a path
    acl_path: Annotated[
        str, typer.Option(help="Access rules, on the broker's host.")
    ] = "/etc/mosquitto/splitfleet.acl",
    persistence_dir: Annotated[
        str | None,
        typer.Option(
            help="Where sessions are kept, if no other file of the broker says so. (as"
            " Debian's mosquitto.conf has it, which includes this one)"
        ),
    ] = None,
    tls_ca: Annotated[
        str | None, typer.Option(help="CA certificate on the broker's host; turns TLS on.")
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(help="The broker's certificate.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="The broker's key.")] = None,
    client_certificates: Annotated[
        bool, typer.Option(help="Devices prove who they are with a certificate.")
    ] = True,
    max_packet_bytes: Annotated[
        int, typer.Option(help="Largest MQTT packet that the broker takes.")
    ] = MAX_PACKET_BYTES,
    part: Annotated[Part, typer.Option(help="What to print.")] = Part.ALL,
    out: Annotated[
        Path | None, typer.Option(help=f"Write {CONF_FILE} and {ACL_FILE} here, print nothing.")
    ] = None,
) -> None:
    """Print the configuration and access rules of a Mosquitto for a lab.

    Every setting stands with its reason.

    Example: coordinator broker-config --fleet lab --out mosquitto/
    """
    lab = LabBroker(
        fleet=fleet or _fleet_of(config),
        port=port,
        bind=bind,
        operator_port=operator_port or None,
        password_path=password_path,
        acl_path=acl_path,
        persistence_directory=persistence_dir,
        tls=_tls(tls_ca, tls_cert, tls_key, client_certificates),
        coordinator_user=user,
        max_packet_bytes=max_packet_bytes,
        max_queued_bytes=4 * max_packet_bytes,
    )
    if out is not None:
        _write(out, lab)
    else:
        typer.echo(_text(lab, part), nl=False)


def _fleet_of(config: str | None) -> str:
    if config is None:
        return "lab"
    from coordinator.config import RunSettings

    return load_settings(config, RunSettings).fleet


def _tls(
    ca: str | None, certificate: str | None, key: str | None, client_certificates: bool
) -> TlsPaths | None:
    given = (ca, certificate, key)
    if not any(given):
        return None
    if ca is None or certificate is None or key is None:
        raise typer.BadParameter("expected --tls-ca, --tls-cert and --tls-key together")
    return TlsPaths(
        ca=ca,
        certificate=certificate,
        key=key,
        require_client_certificates=client_certificates,
    )


def _text(lab: LabBroker, part: Part) -> str:
    match part:
        case Part.CONF:
            return lab_mosquitto_config(lab)
        case Part.ACL:
            return lab_acl(lab)
        case Part.ALL:
            conf = f"# ==== /etc/mosquitto/conf.d/{CONF_FILE} ====\n\n{lab_mosquitto_config(lab)}"
            return f"{conf}\n# ==== {lab.acl_path} ====\n\n{lab_acl(lab)}"


def _write(directory: Path, lab: LabBroker) -> None:
    """Write both files and say what is to be done with them."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONF_FILE).write_text(lab_mosquitto_config(lab), encoding="utf-8")
        (directory / ACL_FILE).write_text(lab_acl(lab), encoding="utf-8")
    except OSError as exc:
        raise ConfigError(
            f"expected a writable directory ({exc.strerror})", source=directory, field="--out"
        ) from exc
    typer.echo(f"{directory / CONF_FILE}  goes to /etc/mosquitto/conf.d/")
    typer.echo(f"{directory / ACL_FILE}  goes to {lab.acl_path}")
    typer.echo(f"users: mosquitto_passwd -c {lab.password_path} {lab.coordinator_user}")
    if lab.tls is None or not lab.tls.require_client_certificates:
        typer.echo(f"       mosquitto_passwd {lab.password_path} DEVICE, for each device")
