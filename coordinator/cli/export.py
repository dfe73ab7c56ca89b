"""``coordinator export``: a client segment as the bundle that devices get."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from wire.errors import ConfigError
from wire.settings import load_settings

if TYPE_CHECKING:
    from coordinator.config import RunSettings
    from models.release import Release
    from wire.bundle import Bundle, Manifest, TensorSpec

# Of intermediate values while the bundle is checked; a run's start takes less.
_CHECK_BYTES = 2 * 1024**3
_MEASURES = {"largest": "off by", "norm": "off by the norm"}

BackwardOption = Annotated[
    str | None,
    typer.Option(
        metavar="onnx|torch",
        help="onnx: devices without PyTorch can train it too; torch: all need PyTorch.",
    ),
]
SequenceOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Place in the order of releases under this name: devices refuse a lower one than "
        "they have had. (the Unix time)",
    ),
]
ExpiresOption = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Devices refuse it from then on: 2027-01-31, or 90d."),
]
MinimumAgentOption = Annotated[
    str, typer.Option(metavar="VERSION", help="Oldest agent that may use it.")
]
KeyOption = Annotated[
    str | None, typer.Option(metavar="FILE", help="Private key to sign with (keys new).")
]
OutOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write the bundle.")]
UnpackOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write the bundle's files here as well.")
]
ListCutsOption = Annotated[
    bool, typer.Option("--list-cuts", help="List the possible cut layers and end.")
]


def export(
    config: Annotated[
        str | None, typer.Option("-c", "--config", help="A run's YAML file: names the network.")
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="mlp, cnn2d, cnn1d, resnet18 or module:function.")
    ] = None,
    cut: Annotated[str | None, typer.Option(help="Cut layer. (the network's own)")] = None,
    input_shape: Annotated[
        str | None, typer.Option(metavar="SHAPE", help="One sample's shape, such as 1,28,28.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes.")] = None,
    frozen: Annotated[
        bool | None, typer.Option("--frozen/--trained", help="Whether devices train the segment.")
    ] = None,
    backward: BackwardOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the initial weights.")] = None,
    name: Annotated[str | None, typer.Option(help="The bundle's name.")] = None,
    version: Annotated[str, typer.Option(help="The bundle's version.")] = "1",
    sequence: SequenceOption = None,
    expires: ExpiresOption = None,
    minimum_agent: MinimumAgentOption = "",
    key: KeyOption = None,
    out: OutOption = None,
    unpack: UnpackOption = None,
    list_cuts: ListCutsOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write the client segment of a network as ONNX with initial weights and a manifest.

    A bundle is a zip file; every part of it is checked against the network before it is written.

    Example: coordinator export --network cnn2d --input-shape 1,28,28 --classes 10 --out c.bundle
    """
    settings, source = _settings(config, network, cut, input_shape, classes, frozen, backward, seed)
    shape, number = _shape_and_classes(settings, source)
    if list_cuts:
        _list_cuts(settings, shape, number, as_json=as_json)
        return
    if out is None and unpack is None:
        raise typer.BadParameter("expected --out FILE, --unpack DIR or --list-cuts")
    release = _release(settings, source, sequence, expires, minimum_agent, key)
    data = _build(
        settings, shape, number, source=source, name=name, version=version, release=release
    )
    if out is not None:
        _write(out, data, "--out")
    if unpack is not None:
        _unpack(unpack, data)
    _show(data, as_json=as_json)


def _settings(
    config: str | None,
    network: str | None,
    cut: str | None,
    input_shape: str | None,
    classes: int | None,
    frozen: bool | None,
    backward: str | None,
    seed: int | None,
) -> tuple[RunSettings, str]:
    """The file's settings, or the defaults, with the flags in place; and what to blame."""
    if config is None and network is None:
        raise typer.BadParameter("expected -c FILE or --network NAME")
    from coordinator.config import RunSettings, override

    settings = RunSettings() if config is None else load_settings(config, RunSettings)
    source = config or "command line"
    flags: dict[str, object] = {
        "network.name": network,
        "network.cut": cut,
        "network.input_shape": None if input_shape is None else _parse_shape(input_shape),
        "network.classes": classes,
        "network.frozen": frozen,
        "network.backward": backward,
        "seed": seed,
    }
    return override(settings, flags, source=source), source


def _parse_shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise typer.BadParameter(f"--input-shape: expected sizes such as 1,28,28, got {text!r}")
    return shape


def _shape_and_classes(settings: RunSettings, source: str) -> tuple[tuple[int, ...], int]:
    """From the settings, or from the test data where they do not say."""
    shape, classes = settings.network.input_shape, settings.network.classes
    if (shape is None or classes is None) and settings.test_data is not None:
        from edge_agent.datasets import load_data

        data = load_data(settings.test_data, source=source, field="$.test_data")
        shape, classes = shape or data.sample_shape, classes or data.classes
    if shape is None or classes is None:
        missing = "input_shape" if shape is None else "classes"
        raise ConfigError(
            f"expected a value (or test_data, or --{missing.replace('_', '-')})",
            source=source,
            field=f"$.network.{missing}",
        )
    return shape, classes


def _list_cuts(
    settings: RunSettings, shape: tuple[int, ...], classes: int, *, as_json: bool
) -> None:
    from coordinator.tables import build_console, format_bytes, new_table
    from models.registry import build_network
    from models.split import available_cuts

    module = build_network(
        settings.network.name,
        input_shape=shape,
        classes=classes,
        arguments=settings.network.arguments,
        seed=settings.seed,
    )
    cuts = available_cuts(module, shape)
    proposed = getattr(module, "default_cut", None)
    if as_json:
        document = [
            {"layer": layer, "activation_shape": list(size), "default": layer == proposed}
            for layer, size in cuts.items()
        ]
        typer.echo(json.dumps(document))
        return
    table = new_table(["cut layer", "activation"], ["values", "fp32 a sample"], [""])
    for layer, size in cuts.items():
        values = math.prod(size)
        note = "default" if layer == proposed else ""
        table.add_row(layer, _shape_text(size), f"{values:,}", format_bytes(4 * values), note)
    build_console(sys.stdout).print(table)


def _build(
    settings: RunSettings,
    shape: tuple[int, ...],
    classes: int,
    *,
    source: str,
    name: str | None,
    version: str,
    release: Release,
) -> bytes:
    from coordinator.model import build_split, export_split
    from edge_agent.datasets import load_data

    split = build_split(settings, input_shape=shape, classes=classes, source=source)
    samples = None
    if settings.test_data is not None:
        samples = load_data(settings.test_data, source=source, field="$.test_data").x
    return export_split(
        settings,
        split,
        classes=classes,
        samples=samples,
        name=name,
        version=version,
        check_bytes=_CHECK_BYTES,
        release=release,
    )


def _release(
    settings: RunSettings,
    source: str,
    sequence: int | None,
    expires: str | None,
    minimum_agent: str,
    key: str | None,
) -> Release:
    """Flags that concern the release; the file's ``bundle_key`` signs where no flag does."""
    from coordinator.model import build_signer
    from models.release import Release

    if minimum_agent and not re.fullmatch(r"\d+(\.\d+)*", minimum_agent):
        raise typer.BadParameter(
            f"--minimum-agent: expected a version such as 0.2.0, got {minimum_agent!r}"
        )
    if key is not None:
        sign = build_signer(key, source=None, field="--key")
    else:
        sign = build_signer(settings.bundle_key, source=source)
    return Release(
        sequence=sequence,
        expires="" if expires is None else _parse_expiry(expires),
        minimum_agent=minimum_agent,
        sign=sign,
    )


def _parse_expiry(text: str) -> str:
    """A date or time, in UTC where it does not say, or a number of days from now."""
    now = datetime.now(UTC)
    days = re.fullmatch(r"([1-9]\d{0,4})d", text)
    try:
        time = now + timedelta(days=int(days[1])) if days else datetime.fromisoformat(text)
    except ValueError as exc:
        expected = "expected a time such as 2027-01-31, or days such as 90d"
        raise typer.BadParameter(f"--expires: {expected}, got {text!r}") from exc
    time = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
    if time <= now:
        raise typer.BadParameter(f"--expires: expected a time to come, got {text!r}")
    return time.isoformat("T", "seconds")


def _write(path: Path, data: bytes, flag: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as exc:
        raise ConfigError(
            f"expected a writable file ({exc.strerror})", source=path, field=flag
        ) from exc


def _unpack(directory: Path, data: bytes) -> None:
    """Every file as it lies in the bundle, the manifest too."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.namelist():
            _write(directory / entry, archive.read(entry), "--unpack")


def _show(data: bytes, *, as_json: bool) -> None:
    from coordinator.tables import build_console, facts_table
    from wire.bundle import Bundle

    bundle = Bundle.from_bytes(data)
    if as_json:
        typer.echo(json.dumps(_document(bundle, len(data))))
    else:
        build_console(sys.stdout).print(facts_table(_facts(bundle, len(data))))


def _document(bundle: Bundle, size_bytes: int) -> dict[str, Any]:
    manifest: dict[str, Any] = msgspec.to_builtins(bundle.manifest)
    return {"digest": bundle.digest, "size_bytes": size_bytes, "manifest": manifest}


def _facts(bundle: Bundle, size_bytes: int) -> list[tuple[str, str]]:
    from coordinator.tables import format_bytes

    manifest = bundle.manifest
    trained = "frozen: devices run it" if manifest.frozen else "trained on the devices"
    memory = (manifest.forward_bytes_per_sample, manifest.backward_bytes_per_sample)
    forward, backward = (format_bytes(size) for size in memory)
    if manifest.onnx_backward_bytes_per_sample:
        on_onnx = format_bytes(manifest.onnx_backward_bytes_per_sample)
        trained += ", with or without PyTorch"
        backward += f" on PyTorch, {on_onnx} on ONNX Runtime"
    elif not manifest.frozen:
        trained += ", which all need PyTorch"
    facts = [
        ("bundle", f"{manifest.name} version {manifest.version}, {format_bytes(size_bytes)}"),
        ("digest", f"sha256 {bundle.digest}"),
        ("release", _release_text(bundle)),
        ("network", f"{manifest.network}, {manifest.classes} classes, {trained}"),
        ("cut layer", manifest.cut_layer),
        ("sample", f"{_shape_text(manifest.input.shape)} {manifest.input.dtype}"),
        ("activation", f"{_shape_text(manifest.activation.shape)} {manifest.activation.dtype}"),
        ("parameters", _count_text(manifest.parameters)),
        ("buffers", _count_text(manifest.buffers)),
        ("memory a sample", f"{forward} forward, with backward {backward} (estimate)"),
        ("ONNX opset", str(manifest.opset)),
    ]
    return facts + _parts(manifest)


def _release_text(bundle: Bundle) -> str:
    from wire.signing import parse_signatures

    manifest = bundle.manifest
    expires = f"expires {manifest.expires}" if manifest.expires else "never expires"
    if bundle.signature_file is None:
        signed = "not signed"
    else:
        keys = (entry.key for entry in parse_signatures(bundle.signature_file))
        signed = f"signed by {', '.join(keys)}"
    return f"sequence {manifest.sequence}, {expires}, {signed}"


def _parts(manifest: Manifest) -> list[tuple[str, str]]:
    """Files, checks and notes, each on a line of its own."""
    from coordinator.tables import format_bytes

    files = [
        f"{name}  {format_bytes(entry.size_bytes)}  sha256 {entry.sha256[:16]}"
        for name, entry in manifest.files.items()
    ]
    checks = [
        f"{check.what}, batch {check.batch}, {check.data} samples: {_MEASURES[check.measure]} "
        f"{check.difference:.2g}, allowed {check.tolerance:.2g}"
        for check in manifest.checks
    ]
    named = (("files", files), ("checks", checks), ("notes", list(manifest.notes)))
    return [
        (label if number == 0 else "", line)
        for label, lines in named
        for number, line in enumerate(lines)
    ]


def _shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _count_text(specs: tuple[TensorSpec, ...]) -> str:
    values = sum(math.prod(spec.shape) for spec in specs)
    return f"{values:,} values in {len(specs)} tensors"
