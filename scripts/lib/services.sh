# Shell functions shared by the installers: units, settings, secrets, and what systemd is told.
# Sourced by install.sh, whose variables they use.

is_changed=no    # the environment or a unit is another one than before: services start anew
made_settings=() # names whose settings were made from the template and are to be filled in
failed=()        # services that did not start

# --- Names -------------------------------------------------------------------------------------

service_of() { if [[ $component == agent ]]; then echo "edge-agent@$1.service"; else echo coordinator.service; fi; }

unit_of_component() { if [[ $component == agent ]]; then echo edge-agent@.service; else echo coordinator.service; fi; }

settings_of() { if [[ $component == agent ]]; then echo "$settings/agents/$1.yaml"; else echo "$settings/coordinator.yaml"; fi; }

# The same below the settings, the state and the cache: agents/NAME, or coordinator.
_place_of() { if [[ $component == agent ]]; then echo "agents/$1"; else echo coordinator; fi; }

credentials_of() { echo "$settings/credentials/$(_place_of "$1")"; }

# Devices that have settings here; the coordinator.
known_names() {
    local file
    if [[ $component == coordinator ]]; then
        echo coordinator
        return
    fi
    for file in "$settings"/agents/*.yaml; do
        if [[ -e "$file" ]]; then basename "$file" .yaml; fi
    done
}

# A path as the installed system sees it.
shown() { echo "${1#"$image"}"; }

# --- systemd -----------------------------------------------------------------------------------

# In an image, or in a container without systemd, units are only put in place.
has_systemd() { [[ -z "$image" && -d /run/systemd/system ]]; }

_wants() { echo "$unit_folder/multi-user.target.wants/$1"; }

is_enabled() { [[ -L "$(_wants "$1")" ]]; }

enable_service() {
    if has_systemd; then
        systemctl enable --quiet "$1"
    else
        mkdir -p "$unit_folder/multi-user.target.wants"
        ln -sfn "/etc/systemd/system/$(unit_of_component)" "$(_wants "$1")"
    fi
}

disable_service() {
    if has_systemd; then
        systemctl disable --now --quiet "$1"
    else
        rm -f "$(_wants "$1")"
    fi
}

# A service that does not start must not keep the others from it.
start_service() {
    systemctl restart "$1" || failed+=("$1")
}

# Whether it ought to run: neither stopped by somebody nor waiting for its first start.
is_wanted() { systemctl is-active --quiet "$1" || systemctl is-failed --quiet "$1"; }

# --- Files -------------------------------------------------------------------------------------

# put MODE SOURCE TARGET: install a file if it differs. Sets was_put.
put() {
    was_put=no
    if cmp -s "$2" "$3"; then return; fi
    act "write $(shown "$3")" install -D -m "$1" "$2" "$3"
    was_put=yes
}

_put_unit() {
    put 0644 "$1" "$2"
    if [[ $was_put == yes ]]; then is_changed=yes; fi
}

# Units come from the environment in use, so that going back brings back its units too.
install_units() {
    local from="$link/share/splitfleet/systemd" unit drop_in
    if [[ ! -d "$from" || $dry_run == yes ]]; then from="$root/systemd"; fi
    unit="$(unit_of_component)"
    drop_in="$unit_folder/$unit.d/torch.conf"
    _put_unit "$from/$unit" "$unit_folder/$unit"
    if [[ $extra == agent-torch ]]; then
        _put_unit "$from/$unit.d/torch.conf" "$drop_in"
    elif [[ -e "$drop_in" ]]; then
        act "remove $(shown "$drop_in")" rm -f "$drop_in"
        is_changed=yes
    fi
}

install_command() {
    local place="$bin_folder/$program" target="/opt/splitfleet/$component/bin/$program"
    if [[ "$(readlink "$place" 2>/dev/null)" == "$target" ]]; then return; fi
    if [[ -e "$place" || -L "$place" ]]; then
        say "$(shown "$place") is not ours and stays; the command is $target"
        return
    fi
    mkdir_for_command() { mkdir -p "$bin_folder" && ln -s "$target" "$place"; }
    act "link $(shown "$place") to $target" mkdir_for_command
}

# --- Settings and secrets ----------------------------------------------------------------------

template() { if [[ $component == agent ]]; then echo "$root/configs/agent-pi.yaml"; else echo "$root/configs/lab.yaml"; fi; }

install_settings() {
    local name="$1" file
    file="$(settings_of "$name")"
    if [[ -n "$config_option" ]]; then
        if [[ -e "$file" ]] && ! cmp -s "$config_option" "$file"; then
            act "keep the earlier settings as $(shown "$file").previous" cp -p "$file" "$file.previous"
        fi
        put 0644 "$config_option" "$file"
        if [[ $was_put == yes ]]; then is_changed=yes; fi
    elif [[ ! -e "$file" ]]; then
        act "write $(shown "$file"), a template to fill in" _make_settings "$name" "$file"
        made_settings+=("$name")
    fi
}

_make_settings() {
    mkdir -p "$(dirname "$2")"
    sed "s/gw-01/$1/g" "$(template)" >"$2.new"
    chmod 0644 "$2.new"
    mv "$2.new" "$2"
}

# Only root enters the folders; systemd hands the files to the service.
install_credentials() {
    local folder one
    folder="$(credentials_of "$1")"
    if [[ ! -d "$folder" ]]; then
        act "make $(shown "$folder") for passwords and keys (0700)" _make_private "$folder"
    fi
    for one in ${credentials[@]+"${credentials[@]}"}; do
        put 0600 "${one#*=}" "$folder/${one%%=*}"
        if [[ $was_put == yes ]]; then is_changed=yes; fi
    done
    if [[ $dry_run == no ]]; then _make_private "$folder"; fi
}

_make_private() {
    mkdir -p "$1"
    chmod 0700 "$settings/credentials" "$1"
    find "$1" -type f -exec chmod 0600 {} +
}

# check_settings SLOT: settings that a new version would refuse stop the installation before it
# changes anything.
check_settings() {
    local name file
    local check=("$1/bin/python" -I -m "$module" "$([[ $component == agent ]] && echo run || echo train)")
    for name in $(known_names) ${config_option:+--given}; do
        file="$(settings_of "$name")"
        if [[ "$name" == --given ]]; then
            file="$config_option"
        elif [[ -n "$config_option" && "$name" == "${names[0]}" ]]; then
            continue
        fi
        if [[ -e "$file" ]]; then
            "${check[@]}" -c "$file" --print-config >/dev/null ||
                die "$(shown "$file") does not fit that version; the one in use stays"
        fi
    done
}

# --- Install -----------------------------------------------------------------------------------

# shellcheck disable=SC2154  # names is install.sh's
install_services() {
    local name
    install_units
    install_command
    for name in ${names[@]+"${names[@]}"}; do
        install_settings "$name"
        install_credentials "$name"
    done
    if has_systemd && [[ $is_changed == yes ]]; then
        act "tell systemd about the units" systemctl daemon-reload
    fi
    for name in ${names[@]+"${names[@]}"}; do
        if ! is_enabled "$(service_of "$name")"; then
            act "enable $(service_of "$name")" enable_service "$(service_of "$name")"
        fi
    done
    start_services
    say_what_is_next
}

# Those that run or have failed start anew with what is new; those asked for start.
start_services() {
    local name service
    if ! has_systemd || [[ $start == no ]]; then return; fi
    for name in $(known_names); do
        service="$(service_of "$name")"
        if _is_template "$name"; then continue; fi
        if is_wanted "$service"; then
            if [[ $is_changed == yes ]]; then act "restart $service" start_service "$service"; fi
        elif _is_asked_for "$name"; then
            act "start $service" start_service "$service"
        fi
    done
    [[ ${#failed[@]} == 0 ]] || die "did not start: ${failed[*]}; see journalctl -u ${failed[0]}"
}

_is_asked_for() { [[ " ${names[*]-} " == *" $1 "* ]]; }

# Settings that nobody has touched since they were made from the template.
_is_template() { sed "s/gw-01/$1/g" "$(template)" | cmp -s - "$(settings_of "$1")"; }

say_what_is_next() {
    local name
    if [[ $component == agent && -z "$(known_names)" && ${#names[@]} == 0 ]]; then
        echo "no device yet: ${0##*/} NAME makes its settings and its service"
    fi
    for name in ${names[@]+"${names[@]}"}; do
        if [[ $dry_run == yes ]] || ! _is_template "$name"; then continue; fi
        echo "next, for $name:"
        echo "  fill in $(shown "$(settings_of "$name")")"
        echo "  put mqtt-password, ca.crt, tls.crt, tls.key as needed into $(shown "$(credentials_of "$name")")"
        if [[ -z "$image" ]]; then echo "  systemctl start $(service_of "$name")"; fi
    done
}

# --- Uninstall ---------------------------------------------------------------------------------

_remove() {
    local path
    for path in "$@"; do
        if [[ -e "$path" || -L "$path" ]]; then act "remove $(shown "$path")" rm -rf "$path"; fi
    done
}

# systemd keeps what a transient user owns in /var/lib/private, with a link in /var/lib.
_purge() {
    local place
    place="$(_place_of "$1")"
    _remove "$(settings_of "$1")" "$(settings_of "$1").previous" "$(credentials_of "$1")" \
        "$image/var/lib/splitfleet/$place" "$image/var/lib/private/splitfleet/$place" \
        "$image/var/cache/splitfleet/$place" "$image/var/cache/private/splitfleet/$place"
}

# All services, the environments and units; or only the services that are named.
uninstall_all() {
    local name chosen=(${names[@]+"${names[@]}"}) service
    if [[ ${#chosen[@]} == 0 ]]; then mapfile -t chosen < <(known_names); fi
    for name in ${chosen[@]+"${chosen[@]}"}; do
        service="$(service_of "$name")"
        if is_enabled "$service" || { has_systemd && is_wanted "$service"; }; then
            act "stop and disable $service" disable_service "$service"
        fi
        if [[ $purge == yes ]]; then _purge "$name"; fi
    done
    if [[ $component == coordinator || ${#names[@]} == 0 ]]; then _uninstall_software; fi
    if [[ $dry_run == no ]]; then _remove_empty_folders; fi
    if [[ $purge == no ]]; then
        echo "settings in /etc/splitfleet and data in /var/lib/splitfleet stay (--purge removes them)"
    fi
}

_uninstall_software() {
    local unit place="$bin_folder/$program"
    unit="$(unit_of_component)"
    _remove "$unit_folder/$unit" "$unit_folder/$unit.d/torch.conf" "$unit_folder/$unit.d/serve.conf" \
        "$link" "$opt/$component-a" "$opt/$component-b"
    if [[ "$(readlink "$place" 2>/dev/null)" == "/opt/splitfleet/$component/bin/$program" ]]; then
        _remove "$place"
    fi
    if has_systemd; then act "tell systemd about the units" systemctl daemon-reload; fi
}

_remove_empty_folders() {
    local unit
    unit="$(unit_of_component)"
    rmdir --ignore-fail-on-non-empty "$unit_folder/$unit.d" "$settings/agents" \
        "$settings/credentials/agents" "$settings/credentials" "$settings" "$opt" \
        "$image/var/lib/splitfleet/agents" "$image/var/lib/splitfleet" \
        "$image/var/lib/private/splitfleet/agents" "$image/var/lib/private/splitfleet" \
        "$image/var/cache/splitfleet/agents" "$image/var/cache/splitfleet" \
        "$image/var/cache/private/splitfleet/agents" "$image/var/cache/private/splitfleet" \
        2>/dev/null || true
}
