# Sourced by demo.sh and test.sh: the checkout's own virtual environment, .venv.
#
#   ensure_venv REQUIREMENT    e.g. "." or ".[test]"; afterwards "$venv/bin/python" has it installed
#
# The first python3 of version 3.10 to 3.15 is taken; PYTHON=/path/to/python chooses another.  A later call
# installs again only when pyproject.toml, the checkout's place or the requirement has changed.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv

refuse() {  # says why MLX cannot be installed here: pip would only say that there is no matching distribution
    echo "error: $*" >&2
    return 1
}

check_machine() {  # MLX has wheels for Apple silicon from macOS 14 on, and for Linux from glibc 2.35 on
    local version
    if [ "$(uname -s)" = Darwin ]; then
        # also where a terminal under Rosetta makes uname say x86_64
        [ "$(sysctl -n hw.optional.arm64 2>/dev/null)" = 1 ] ||
            refuse "MLX needs a Mac with Apple silicon (M1 or newer); this one has an Intel processor" || return 1
        version=$(sw_vers -productVersion)
        [ "${version%%.*}" -ge 14 ] || refuse "MLX needs macOS 14 or newer; this is macOS $version"
    elif version=$(getconf GNU_LIBC_VERSION 2>/dev/null); then  # "glibc 2.36"
        version=${version#glibc }
        [ "${version%%.*}" -gt 2 ] || [ "${version#*.}" -ge 35 ] ||
            refuse "MLX needs glibc 2.35 or newer (Debian 12, Ubuntu 22.04); this is glibc $version"
    else
        refuse "MLX needs macOS, or Linux with glibc 2.35 or newer"
    fi
}

supported() {  # python -> 0 when it runs and is 3.10 .. 3.15
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 16))' 2>/dev/null
}

for_intel() {  # python -> 0 when it runs under Rosetta, where there is no MLX
    [ "$(uname -s)" = Darwin ] && [ "$("$1" -c 'import platform; print(platform.machine())')" = x86_64 ]
}

find_python() {  # prints a supported Python that can make virtual environments
    local candidate without_venv= intel=
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.{15,14,13,12,11,10} python; do
        supported "$candidate" || continue
        if for_intel "$candidate"; then
            intel=$candidate
        elif "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        else
            without_venv=$candidate
        fi
    done
    if [ -n "$without_venv" ]; then
        refuse "$without_venv has no venv module. On Debian or Ubuntu: sudo apt install python3-venv"
    elif [ -n "$intel" ]; then
        refuse "$intel is a Python for Intel processors, or this terminal runs under Rosetta. MLX needs one for Apple" \
               "silicon (arm64), or name it: PYTHON=/path/to/python3 bash $0"
    else
        refuse "no Python 3.10 to 3.15 found, for which MLX has wheels. Install one (macOS: brew install python@3.13)," \
               "or name it: PYTHON=/path/to/python3 bash $0"
    fi
}

ensure_venv() {
    local requirement=$1 python extra wanted
    if ! supported "$venv/bin/python" || ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        check_machine
        python=$(find_python)
        "$python" -m venv --clear "$venv"
    fi
    extra=$(echo "$requirement" | tr -cd 'a-z')
    wanted="$root $(cksum < "$root/pyproject.toml")"
    # an install with an extra serves a call without one
    if ! cat "$venv"/.installed-*"$extra" 2>/dev/null | grep -qxF "$wanted"; then
        echo "Setting up $venv (once; a few minutes on a slow connection) ..." >&2
        # 21.3 is the first pip that installs a pyproject.toml project in editable mode
        "$venv/bin/python" -m pip install -qq --disable-pip-version-check "pip>=21.3"
        (cd "$root" && "$venv/bin/python" -m pip install -qq --disable-pip-version-check -e "$requirement")
        echo "$wanted" > "$venv/.installed-$extra"
    fi
}
