# Shell functions shared by scripts/install-agent and scripts/install-coordinator: options, the
# environments under /opt/splitfleet, and the order of things. Sourced after venv.sh.
#
# The sourcing script sets: component (agent, coordinator), module, program, extra, and usage().
#
# An environment lies in one of two slots, /opt/splitfleet/agent-a and agent-b; the link
# /opt/splitfleet/agent names the one in use. A new one is made in the other slot, tried, and only
# then linked, in one rename: whatever goes wrong before leaves the old one as it was.

source "$(dirname "${BASH_SOURCE[0]}")/services.sh"

image=""         # folder of an image; empty: this machine
dry_run=no
action=install   # install, uninstall, rollback
purge=no
start=yes
wheel=""         # splitfleet's own wheel; empty: this checkout
python_option=""
torch=keep       # agent only: yes, no, or as it is
config_option=""
credentials=()   # NAME=FILE
names=()         # devices; for the coordinator its one service

staging=""

# act TEXT COMMAND...: say what is done, and do it unless only asked.
act() {
    local text="$1"
    shift
    if [[ $dry_run == yes ]]; then
        echo "would $text"
    else
        echo "$text"
        "$@"
    fi
}

bad_usage() {
    say "$@"
    say "see ${0##*/} --help"
    exit 2
}

# --- Options -----------------------------------------------------------------------------------

# An option's value, or a word about its absence.
_value() {
    [[ $# -ge 2 && -n "$2" ]] || bad_usage "$1: expected a value"
    printf '%s' "$2"
}

_file() {
    local value
    value="$(_value "$@")" || exit
    [[ -r "$value" && -f "$value" ]] || bad_usage "$1: expected a readable file, found none at $value"
    realpath "$value"
}

_folder() {
    local value
    value="$(_value "$@")" || exit
    [[ -d "$value" ]] || bad_usage "$1: expected a folder, found none at $value"
    realpath "$value"
}

# shellcheck disable=SC2034  # several are read in services.sh
parse_options() {
    while [[ $# -gt 0 ]]; do
        case "$1" in
        -h | --help) usage && exit ;;
        --dry-run) dry_run=yes ;;
        --uninstall) action=uninstall ;;
        --rollback) action=rollback ;;
        --purge) purge=yes ;;
        --no-start) start=no ;;
        --with-torch | --without-torch) _set_torch "$1" ;;
        --root | --wheels | --index-url | --wheel | --python | --config | --credential)
            _set_option "$@"
            shift
            ;;
        --root=* | --wheels=* | --index-url=* | --wheel=* | --python=* | --config=* | --credential=*)
            _set_option "${1%%=*}" "${1#*=}"
            ;;
        -*) bad_usage "unknown option $1" ;;
        *) names+=("$1") ;;
        esac
        shift
    done
    check_options
}

_set_torch() {
    [[ $component == agent ]] || bad_usage "unknown option $1"
    if [[ "$1" == --with-torch ]]; then torch=yes; else torch=no; fi
}

# A die inside $(...) ends only the subshell: each assignment carries it out.
_set_option() {
    local value
    case "$1" in
    --root)
        image="$(_folder "$@")" || exit
        if [[ "$image" == / ]]; then image=""; fi
        ;;
    --wheels)
        value="$(_folder "$@")" || exit
        export PIP_NO_INDEX=1 PIP_FIND_LINKS="$value"
        ;;
    --index-url)
        PIP_INDEX_URL="$(_value "$@")" || exit
        export PIP_INDEX_URL
        ;;
    --wheel) wheel="$(_file "$@")" || exit ;;
    --python) python_option="$(_value "$@")" || exit ;;
    --config) config_option="$(_file "$@")" || exit ;;
    --credential)
        value="$(_value "$@")" || exit
        credentials+=("$value")
        ;;
    esac
}

check_options() {
    local name one
    if [[ $purge == yes && $action != uninstall ]]; then bad_usage "--purge goes with --uninstall"; fi
    for name in ${names[@]+"${names[@]}"}; do
        # Of a device id (wire/topics.py), less what cannot be in the name of a unit.
        [[ "$name" =~ ^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$ ]] ||
            bad_usage "$name: expected 1 to 64 letters, digits, '_', '.' or '-' for a device"
    done
    if [[ $component == coordinator ]]; then
        [[ ${#names[@]} == 0 ]] || bad_usage "unexpected argument ${names[0]}"
        names=(coordinator)
    fi
    if [[ -n "$config_option" || ${#credentials[@]} -gt 0 ]] && [[ ${#names[@]} != 1 ]]; then
        bad_usage "--config and --credential go with one device"
    fi
    for one in ${credentials[@]+"${credentials[@]}"}; do
        [[ "$one" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*=. && -r "${one#*=}" && -f "${one#*=}" ]] ||
            bad_usage "--credential $one: expected NAME=FILE with a readable file"
    done
}

# --- Where things lie --------------------------------------------------------------------------

set_places() {
    opt="$image/opt/splitfleet"
    link="$opt/$component"
    settings="$image/etc/splitfleet"
    unit_folder="$image/etc/systemd/system"
    bin_folder="$image/usr/local/bin"
}

current_slot() { readlink "$link" 2>/dev/null || true; }

other_slot() {
    if [[ "$(current_slot)" == "$component-a" ]]; then echo "$component-b"; else echo "$component-a"; fi
}

check_rights() {
    if [[ $dry_run == yes || $(id -u) == 0 ]]; then return; fi
    [[ -n "$image" ]] || die "root is needed: sudo scripts/${0##*/} …  (or --dry-run, --root DIR)"
    say "not root: files in the image belong to $(id -un); the services expect root's"
}

# --- Python ------------------------------------------------------------------------------------

# The interpreter that the services can use: the system's first, since /home and /root are hidden
# from them.
choose_python() {
    local python base candidates="/usr/bin/python3 /usr/local/bin/python3"
    candidates+=" python3 python3.13 python3.12 python3.11"
    if [[ -n "$python_option" ]]; then
        _is_new_enough "$python_option" || die "--python $python_option: expected Python 3.11 or later"
    fi
    python="$(PYTHON="${python_option:-${PYTHON:-$candidates}}" find_python)" || exit
    base="$("$python" -I -c 'import os, sys; print(os.path.realpath(sys._base_executable))')"
    if [[ -n "$image" ]]; then
        _check_image_python "$base"
    elif [[ "$base" =~ ^/(home|root|run/user|tmp)/ ]]; then
        die "$base is hidden from services: install Python 3.11 or later below /usr, or set PYTHON"
    fi
    echo "$python"
}

# The environment refers to this interpreter; the image must have it, for the same processor.
_check_image_python() {
    local own="$1" theirs="$image$1"
    if [[ ! -e "$theirs" ]]; then
        say "the image has no $own yet: install the same Python there"
    elif [[ "$(_machine_of "$own")" != "$(_machine_of "$theirs")" ]]; then
        die "the image is for another processor: run this script inside it (systemd-nspawn, chroot)"
    fi
}

# e_machine of an ELF file.
_machine_of() { od -An -tx1 -j18 -N2 "$1"; }

# --- Environments ------------------------------------------------------------------------------

# What decides whether an environment is up to date.
stamp_of() {
    {
        echo "$extra"
        "$1" -VV
        cat "$root/constraints.txt"
        if [[ -n "$wheel" ]]; then
            sha256sum <"$wheel"
        else
            cd "$root" && find "${sources[@]}" -type f ! -path '*/__pycache__/*' -print0 |
                LC_ALL=C sort -z | xargs -0 sha256sum
        fi
        cd "$root" && find configs systemd -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    } | sha256sum | cut -d' ' -f1
}

sources=(pyproject.toml README.md LICENSE wire edge_agent coordinator models)

is_up_to_date() {
    [[ "$(cat "$link/.installed" 2>/dev/null)" == "$1" ]] && "$link/bin/python" -I -m "$module" \
        --version >/dev/null 2>&1
}

# Build beside the checkout, which keeps its owner and gets no build folder.
_copy_sources() {
    staging="$(mktemp -d)"
    (cd "$root" && cp -r "${sources[@]}" "$staging")
    find "$staging" -name __pycache__ -prune -exec rm -rf {} +
}

build_slot() {
    local slot="$1" python="$2" requirement="$wheel"
    rm -rf "$slot"
    mkdir -p "$opt"
    venv="$slot"
    PYTHON="$python" create_venv
    if [[ -z "$wheel" ]]; then
        _copy_sources
        requirement="$staging"
    fi
    # torch first: later steps then find the release that is pinned instead of looking for the newest.
    if [[ $extra != agent ]]; then _pip_install torch; fi
    _pip_install "${requirement}[$extra]"
    mkdir -p "$slot/share/splitfleet"
    cp -r "$root/systemd" "$root/configs" "$slot/share/splitfleet/"
    "$slot/bin/python" -I -m "$module" --version >/dev/null || die "the new environment does not run"
    if [[ -n "$image" ]]; then _relocate "$slot"; fi
    chmod -R go+rX,go-w "$slot"
    echo "$extra" >"$slot/.extra"
}

# An environment names its own place in its commands; in an image that place begins at the image.
_relocate() {
    local file
    grep -rlIF "$image/opt/splitfleet" "$1/bin" "$1/pyvenv.cfg" | while read -r file; do
        python_replace "$file" "$image/opt/splitfleet" /opt/splitfleet
    done
}

python_replace() {
    "$venv/bin/python" -I -c 'import pathlib, sys
path = pathlib.Path(sys.argv[1])
path.write_text(path.read_text().replace(*sys.argv[2:]))' "$@"
}

version_of() {
    "$1/bin/python" -I -c 'import importlib.metadata as m; print(m.version("splitfleet"))' \
        2>/dev/null || echo "of another Python"
}

# switch_to SLOT [STAMP]: one rename, so that there is no moment without an environment. The stamp
# marks it as tried, and worth going back to.
switch_to() {
    if [[ $# == 2 ]]; then echo "$2" >"$opt/$1/.installed"; fi
    ln -sfn "$1" "$link.new"
    mv -T "$link.new" "$link"
}

# --- What is asked for -------------------------------------------------------------------------

choose_extra() {
    if [[ $component != agent ]]; then return; fi
    if [[ $torch == keep ]]; then
        extra="$(cat "$link/.extra" 2>/dev/null || echo agent)"
    elif [[ $torch == yes ]]; then
        extra=agent-torch
    fi
}

install_all() {
    local python stamp slot
    choose_extra
    python="$(choose_python)" || exit
    stamp="$(stamp_of "$python")"
    if is_up_to_date "$stamp"; then
        echo "splitfleet[$extra] $(version_of "$link") in /opt/splitfleet/$component is up to date"
        if [[ -n "$config_option" && $dry_run == no ]]; then check_settings "$link"; fi
    else
        slot="$(other_slot)"
        act "build splitfleet[$extra] from ${wheel:-$root} in /opt/splitfleet/$slot" \
            build_slot "$opt/$slot" "$python"
        if [[ $dry_run == no ]]; then check_settings "$opt/$slot"; fi
        act "link /opt/splitfleet/$component to $slot" switch_to "$slot" "$stamp"
        is_changed=yes
    fi
    install_services
}

roll_back() {
    local slot
    slot="$(other_slot)"
    [[ -n "$(current_slot)" && -e "$opt/$slot/.installed" ]] ||
        die "there is no earlier environment in $opt to go back to"
    if [[ $dry_run == no ]]; then check_settings "$opt/$slot"; fi
    act "link /opt/splitfleet/$component back to $slot ($(version_of "$opt/$slot"))" switch_to "$slot"
    is_changed=yes
    extra="$(cat "$link/.extra")"
    install_services
}

main() {
    trap 'if [[ -n "$staging" ]]; then rm -rf "$staging"; fi' EXIT
    umask 022
    parse_options "$@"
    set_places
    check_rights
    if [[ $dry_run == no && $action == install ]]; then mkdir -p "$opt"; fi
    if [[ $dry_run == no && -d "$opt" ]]; then
        # One installation at a time.
        exec 9<"$opt"
        flock -n 9 || die "another installation is at work in $opt"
    fi
    case "$action" in
    install) install_all ;;
    rollback) roll_back ;;
    uninstall) uninstall_all ;;
    esac
}
