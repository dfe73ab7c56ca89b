"""A folder of wheels made of what is installed, so that installations need no network."""

from __future__ import annotations

import importlib.metadata
import tomllib
import zipfile
from pathlib import Path

from packaging.utils import canonicalize_name

from tests.test_install import closure, own_requirements

ROOT = Path(__file__).parent.parent
PACKAGES = ("wire", "edge_agent", "coordinator", "models")


def build_wheelhouse(directory: Path, extra: str) -> Path:
    """Wheels of all distributions that an extra of splitfleet brings, without splitfleet's own."""
    directory.mkdir()
    for name in sorted(closure(own_requirements(extra))):
        _pack(importlib.metadata.distribution(name), directory)
    return directory


def build_own_wheel(directory: Path, version: str) -> Path:
    """splitfleet's wheel of this checkout, under a version that the caller chooses."""
    info = f"splitfleet-{version}.dist-info"
    path = directory / f"splitfleet-{version}-py3-none-any.whl"
    entries = {f"{info}/METADATA": _metadata(version), f"{info}/WHEEL": _WHEEL}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    scripts = "".join(f"{name} = {target}\n" for name, target in project["scripts"].items())
    entries[f"{info}/entry_points.txt"] = f"[console_scripts]\n{scripts}"
    for package in PACKAGES:
        for source in sorted((ROOT / package).rglob("*.py")):
            entries[str(source.relative_to(ROOT))] = source.read_text()
    _write(path, {name: text.encode() for name, text in entries.items()}, info)
    return path


_WHEEL = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def _metadata(version: str) -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = ["Metadata-Version: 2.1", "Name: splitfleet", f"Version: {version}"]
    lines += [f"Requires-Dist: {text}" for text in project["dependencies"]]
    for extra, requirements in project["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}")
        lines += [f'Requires-Dist: {text}; extra == "{extra}"' for text in requirements]
    return "\n".join(lines) + "\n"


def _pack(distribution: importlib.metadata.Distribution, directory: Path) -> None:
    """The wheel that a distribution was installed from, less its commands."""
    wheel = distribution.read_text("WHEEL")
    files = distribution.files
    assert wheel is not None
    assert files is not None
    tags = [line.split()[1].split("-") for line in wheel.splitlines() if line.startswith("Tag:")]
    # "py2-none-any" and "py3-none-any" are "py2.py3-none-any" in a file name.
    tag = "-".join(".".join(dict.fromkeys(parts)) for parts in zip(*tags, strict=True))
    name = canonicalize_name(distribution.metadata["Name"]).replace("-", "_")
    contents = {
        str(file): Path(str(file.locate())).read_bytes()
        for file in files
        if not str(file).startswith("..")
        and file.suffix != ".pyc"
        and not (file.parent.suffix == ".dist-info" and file.name in _NOT_PACKED)
    }
    info = next(file.parts[0] for file in files if file.parent.suffix == ".dist-info")
    _write(directory / f"{name}-{distribution.version}-{tag}.whl", contents, info)


_NOT_PACKED = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}


def _write(path: Path, contents: dict[str, bytes], info: str) -> None:
    record = "".join(f"{name},,\n" for name in [*contents, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/RECORD", record)
