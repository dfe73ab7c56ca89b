#!/usr/bin/env python3
"""Ask the package index whether a device can be installed from wheels alone, nothing compiled.

For each Python version pip resolves what an extra of pyproject.toml brings, with the releases of
constraints.txt, for another machine than this one. pip is used as it is set up (PIP_INDEX_URL and
the like). Ends with 1 if anything has no wheel, and names it.

    python scripts/check_wheels.py                          # aarch64, 3.11 to 3.13, extra agent
    python scripts/check_wheels.py --machine x86_64 --python 3.12

Needs pip 23 and packaging (extra test).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
PYTHONS = ("3.11", "3.12", "3.13")
MACHINE = "aarch64"
# Raspberry Pi OS and Debian 12 have glibc 2.36; wheels ask for that or less.
GLIBC = range(17, 37)


class MissingWheelError(Exception):
    """Something that is needed has no wheel; the text is pip's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found for each Python version; 1 if anything is missing."""
    options = _parse_options(arguments)
    requirements = own_requirements(tomllib.loads((ROOT / "pyproject.toml").read_text()), "agent")
    code = 0
    for python in options.python:
        try:
            found = find_wheels(requirements, python, options.machine, constraints=CONSTRAINTS)
        except MissingWheelError as exc:
            print(f"{options.machine}, Python {python}: {exc}", file=sys.stderr)
            code = 1
            continue
        print(f"{options.machine}, Python {python}: {len(found)} wheels")
        for name in found:
            print(f"  {name}")
    return code


def own_requirements(project: dict[str, Any], extra: str) -> list[str]:
    """What the distribution asks for with an extra that refers to no other extra."""
    table = project["project"]
    return [*table["dependencies"], *table["optional-dependencies"][extra]]


def find_wheels(
    requirements: Sequence[str], python: str, machine: str, *, constraints: Path | None = None
) -> list[str]:
    """File names of all wheels of an installation; raises MissingWheelError."""
    with tempfile.TemporaryDirectory(prefix="check-wheels-") as folder:
        report_path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--only-binary=:all:", "--implementation", "cp"]
        command += ["--python-version", python, "--target", str(Path(folder) / "none")]
        command += ["--report", str(report_path)]
        for minor in GLIBC:
            command += ["--platform", f"manylinux_2_{minor}_{machine}"]
        command += ["--platform", f"manylinux2014_{machine}"]
        if constraints is not None:
            command += ["-c", str(constraints)]
        done = subprocess.run(  # noqa: S603 - our own interpreter's pip
            [*command, *requirements], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise MissingWheelError(_errors(done.stderr))
        items = json.loads(report_path.read_text())["install"]
    if left := left_out(items, requirements, python, machine):
        raise MissingWheelError(f"pip left out {', '.join(left)}, which this machine does not need")
    return sorted(os.path.basename(item["download_info"]["url"]) for item in items)


def left_out(
    items: Iterable[dict[str, Any]], requirements: Sequence[str], python: str, machine: str
) -> list[str]:
    """Names that the other machine needs and that are not among the wheels.

    pip reads markers such as ``platform_machine == "aarch64"`` for the machine that it runs on.
    """
    target = {"python_version": python, "python_full_version": f"{python}.0"}
    target |= {"platform_machine": machine, "sys_platform": "linux", "platform_system": "Linux"}
    metadata = [item["metadata"] for item in items]
    found = {canonicalize_name(data["name"]) for data in metadata}
    texts = [*requirements, *(text for data in metadata for text in data.get("requires_dist", []))]
    needed = (Requirement(text) for text in texts)
    return sorted(
        {
            canonicalize_name(requirement.name)
            for requirement in needed
            if requirement.marker is None or requirement.marker.evaluate({**target, "extra": ""})
        }
        - found
    )


def _errors(stderr: str) -> str:
    lines = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if "ERROR" in line]
    return "; ".join(lines) or " ".join(stderr.split())[-300:]


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="VERSION")
    parser.add_argument("--machine", default=MACHINE, help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
