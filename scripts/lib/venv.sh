# Shell functions shared by the scripts: the virtual environment and Debian packages. Sourced.
#
# pip is used as it is set up: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, proxies and
# pip.conf all apply. On a machine without a GPU, PIP_EXTRA_INDEX_URL with PyTorch's CPU index saves
# a download of some GB.
#
#   PYTHON    interpreter for a new environment (default: the newest python3 that is 3.11 or later)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="$root/.venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { echo "${0##*/}: $*" >&2; }

die() {
    say "$@"
    exit 1
}

# --- Python ------------------------------------------------------------------------------------

_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# python3 first: it is the one that the machine's owner set up.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if _is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or later is needed; found: $(python3 --version 2>&1 || true)." \
        "Install it or set PYTHON=/path/to/python3.11"
}

# Make an empty environment with pip. Debian keeps ensurepip in python3-venv, which may be missing.
create_venv() {
    local python
    python="$(find_python)"
    say "creating ${venv#"$root"/} with $("$python" --version)"
    rm -rf "$venv"
    if "$python" -m venv "$venv" >/dev/null 2>&1; then return; fi
    rm -rf "$venv"
    if "$python" -m venv --without-pip "$venv" 2>/dev/null &&
        "$python" -m pip --python "$venv/bin/python" install --quiet pip 2>/dev/null; then return; fi
    rm -rf "$venv"
    if can_install_packages; then
        install_packages python3-venv
        if "$python" -m venv "$venv"; then return; fi
        rm -rf "$venv"
    fi
    die "$python cannot make a virtual environment: install it with 'apt-get install python3-venv'"
}

# What an installation depends on; a change of it installs again.
_stamp_of() {
    {
        cat "$root/pyproject.toml" "$root/constraints.txt"
        "$venv/bin/python" -VV
        echo "$1 $root"
    } | sha256sum | cut -d' ' -f1
}

# pip's words only matter when it fails.
_pip_install() {
    local log="$venv/install.log"
    (cd "$root" && "$venv/bin/python" -m pip install -c constraints.txt "$@") >>"$log" 2>&1 || {
        tail -n 20 "$log" >&2
        die "pip could not install $*; all it said is in $log"
    }
}

_install() {
    local extra="$1"
    say "installing splitfleet[$extra] into .venv (the first time takes some minutes)"
    # torch on its own and first: later steps then find the release that is pinned instead of
    # looking for the newest.
    _pip_install torch
    _pip_install -e ".[$extra]"
}

_ensure_venv() {
    local extra="$1" stamp="$venv/.installed-$1"
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then create_venv; fi
    if [[ "$(cat "$stamp" 2>/dev/null)" == "$(_stamp_of "$extra")" ]]; then return; fi
    _install "$extra"
    _stamp_of "$extra" >"$stamp"
}

# Bring .venv up to date with an extra of pyproject.toml. Two scripts at once take turns.
ensure_venv() {
    (
        flock 9
        _ensure_venv "$1" 9<&-
    ) 9<"$root" </dev/null
}

# --- Debian packages ---------------------------------------------------------------------------

_as_root() {
    if [[ "$(id -u)" == 0 ]]; then "$@"; else sudo -n "$@"; fi
}

can_install_packages() {
    command -v apt-get >/dev/null && _as_root true 2>/dev/null
}

# RUNLEVEL=1 keeps sysvinit from starting the services: what needs a server starts its own.
install_packages() {
    say "installing Debian packages: $*"
    _as_root apt-get update -qq </dev/null >/dev/null
    _as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
        apt-get install -qq -y --no-install-recommends "$@" </dev/null >/dev/null
}

# ensure_packages PACKAGE=PATH... installs each package of which PATH, a file or a command, is
# missing, or says which to install.
ensure_packages() {
    local pair missing=()
    for pair in "$@"; do
        if ! _is_there "${pair#*=}"; then missing+=("${pair%%=*}"); fi
    done
    if [[ ${#missing[@]} == 0 ]]; then return; fi
    can_install_packages || die "missing: run 'apt-get install ${missing[*]}' as root, then again"
    install_packages "${missing[@]}" || die "apt-get install ${missing[*]} failed"
}

_is_there() {
    if [[ "$1" == /* ]]; then
        [[ -e "$1" ]]
    else
        PATH="$PATH:/usr/sbin:/usr/local/sbin" command -v "$1" >/dev/null
    fi
}
