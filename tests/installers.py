"""The installers on images of a test's own, and stand-ins for what is slow or not there.

Never on this machine: every call names an image, and what systemd would be told is written down.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIB = ROOT / "scripts" / "lib"

# Bytecode of all packages takes pip longer than all the rest. The variable holds what the option
# sets, not whether it is given: 1 would compile.
NO_BYTECODE = {"PIP_NO_COMPILE": "0"}

# An environment that runs this checkout, in place of one that takes pip a quarter of a minute.
STAND_IN = f"""
build_slot() {{
    mkdir -p "$1/bin" "$1/share/splitfleet"
    cp -r "$root/systemd" "$1/share/splitfleet/"
    printf '#!/bin/bash\\nshift\\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\\n' >"$1/bin/python"
    chmod +x "$1/bin/python"
    echo "$extra" >"$1/.extra"
}}
stamp_of() {{ echo "${{STAMP:-1}}"; }}
choose_python() {{ echo {sys.executable}; }}
"""

# systemctl on an image: what it was told, and which services run.
SYSTEMCTL = """
has_systemd() { true; }
systemctl() {
    echo "$*" >>"$image/told"
    case "$1" in
    is-active) grep -qx "$3" "$image/active" 2>/dev/null ;;
    is-failed) grep -qx "$3" "$image/failed" 2>/dev/null ;;
    restart) ! grep -qx "$2" "$image/broken" 2>/dev/null ;;
    enable) mkdir -p "$(dirname "$(_wants "$3")")" && ln -sfn unit "$(_wants "$3")" ;;
    disable) rm -f "$(_wants "$4")" ;;
    esac
}
"""


def script(
    component: str, image: Path, *options: object, **environ: str
) -> subprocess.CompletedProcess[str]:
    """``scripts/install-COMPONENT --root IMAGE OPTION...``"""
    return subprocess.run(
        [ROOT / "scripts" / f"install-{component}", "--root", image, *map(str, options)],
        env={**os.environ, **NO_BYTECODE, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def stand_in(
    component: str, image: Path, *options: str, systemd: bool = False, **environ: str
) -> subprocess.CompletedProcess[str]:
    """The same with a quick environment and, if asked for, a stand-in for systemctl."""
    text = (ROOT / "scripts" / f"install-{component}").read_text()
    # Its functions, then ours over them, then its last line: main.
    head = text.replace('$(dirname "${BASH_SOURCE[0]}")/lib', str(LIB)).replace('main "$@"', "")
    program = "\n".join([head, STAND_IN, SYSTEMCTL if systemd else "", 'main "$@"'])
    return subprocess.run(
        ["bash", "-c", program, f"install-{component}", "--root", image, *options],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def copy_of(image: Path, target: Path) -> Path:
    """A copy that shares its files; the installers replace files and never write into them."""
    subprocess.run(["cp", "-al", image, target], check=True)
    return target


def snapshot(image: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, time of change and link target of all that an image holds."""
    return {
        str(path.relative_to(image)): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            str(path.readlink()) if path.is_symlink() else "",
        )
        for path in image.rglob("*")
        if "__pycache__" not in path.parts
    }


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
