#!/bin/bash
# Check systemd units: systemd-analyze must have nothing to say about them, and their exposure
# must stay at or below a score. Each unit is checked as it stands, and with each drop-in of
# UNIT.d/*.conf. Works without systemd running.
#
#   scripts/lib/verify_units.sh [UNIT...]     default: all units in systemd/
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# In tenths: 15 is 1.5 ("OK" is below 5.0); what stays open is torch's and the network's.
threshold="${EXPOSURE_THRESHOLD:-15}"

command -v systemd-analyze >/dev/null || {
    echo "verify_units: systemd-analyze is missing: apt-get install systemd" >&2
    exit 1
}

copies="$(mktemp -d)"
trap 'rm -rf "$copies"' EXIT

# copy_unit UNIT [DROP-IN]: a copy whose ExecStart exists on this machine, with the drop-in's lines
# behind its own; a template is verified as one of its instances.
copy_unit() {
    local name copy
    name="$(basename "$1")"
    copy="$copies/${name/@./@check.}"
    sed -E 's,^ExecStart=/opt/splitfleet/[^ ]+,ExecStart=/bin/true,' "$@" >"$copy"
    echo "$copy"
}

check_unit() {
    local unit copy output
    unit="$(IFS=+ && echo "${*##*/}")"
    copy="$(copy_unit "$@")"
    # verify exits 0 on unknown keys: any output is a failure.
    if ! output="$(SYSTEMD_LOG_LEVEL=warning systemd-analyze verify --man=no "$copy" 2>&1)" ||
        [[ -n "$output" ]]; then
        printf 'verify_units: %s:\n%s\n' "$unit" "$output" >&2
        return 1
    fi
    if ! output="$(systemd-analyze security --offline=true --no-pager \
        --threshold="$threshold" "$copy" 2>&1)"; then
        printf 'verify_units: %s is exposed above %s tenths:\n%s\n' \
            "$unit" "$threshold" "$(grep -v '✓' <<<"$output")" >&2
        return 1
    fi
    echo "$unit: $(grep -o 'exposure level.*: [0-9.]*' <<<"$output")"
}

units=("$@")
[[ ${#units[@]} -gt 0 ]] || units=("$root"/systemd/*.service)
status=0
for unit in "${units[@]}"; do
    check_unit "$unit" || status=1
    for drop_in in "$unit".d/*.conf; do
        if [[ -e "$drop_in" ]]; then check_unit "$unit" "$drop_in" || status=1; fi
    done
done
exit "$status"
