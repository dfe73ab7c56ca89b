"""scripts/check_wheels.py: what has a wheel for another machine, and what has none."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "check_wheels.py"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("check_wheels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_wheels = load_script()


def put_wheel(directory: Path, name: str, tag: str, *requires: str) -> None:
    """A wheel with metadata and nothing else."""
    info = f"{name}-1.0.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
    metadata = "\n".join([*lines, *(f"Requires-Dist: {text}" for text in requires)]) + "\n"
    with zipfile.ZipFile(directory / f"{name}-1.0-{tag}.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels in the place of any index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return tmp_path


def test_wheels_of_the_other_machine_are_found_with_what_they_need(index: Path) -> None:
    put_wheel(index, "fast", "cp312-cp312-manylinux_2_28_aarch64", "plain>=1")
    put_wheel(index, "plain", "py3-none-any")
    assert check_wheels.find_wheels(["fast"], "3.12", "aarch64") == [
        "fast-1.0-cp312-cp312-manylinux_2_28_aarch64.whl",
        "plain-1.0-py3-none-any.whl",
    ]


@pytest.mark.parametrize(
    "tag",
    [
        "cp312-cp312-manylinux_2_28_x86_64",
        "cp311-cp311-manylinux_2_28_aarch64",
        "cp312-cp312-manylinux_2_39_aarch64",
    ],
)
def test_wheel_of_another_machine_python_or_system_does_not_count(index: Path, tag: str) -> None:
    put_wheel(index, "fast", tag)
    with pytest.raises(check_wheels.MissingWheelError, match="fast"):
        check_wheels.find_wheels(["fast"], "3.12", "aarch64")


def test_what_only_the_other_machine_needs_is_not_forgotten(index: Path) -> None:
    """pip reads markers for the machine that it runs on."""
    put_wheel(index, "plain", "py3-none-any", 'extra-lib; platform_machine == "riscv64"')
    with pytest.raises(check_wheels.MissingWheelError, match="left out extra-lib"):
        check_wheels.find_wheels(["plain"], "3.12", "riscv64")


def test_exit_code_says_whether_all_are_there(
    index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_wheels, "own_requirements", lambda project, extra: ["plain"])
    monkeypatch.setattr(check_wheels, "CONSTRAINTS", None)
    assert check_wheels.main(["--python", "3.12"]) == 1
    assert "aarch64, Python 3.12: " in capsys.readouterr().err
    put_wheel(index, "plain", "py3-none-any")
    assert check_wheels.main(["--python", "3.12"]) == 0
    assert "aarch64, Python 3.12: 1 wheels" in capsys.readouterr().out


def test_requirements_are_those_of_the_agent_extra() -> None:
    project = {"project": {"dependencies": ["a"], "optional-dependencies": {"agent": ["b>=1"]}}}
    assert check_wheels.own_requirements(project, "agent") == ["a", "b>=1"]
