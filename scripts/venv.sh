# Sourced by demo.sh and test.sh: the checkout's own virtual environment, .venv.
#
#   ensure_venv REQUIREMENT    e.g. "." or ".[test]"; afterwards "$venv/bin/python" has it installed
#
# The first python3 of version 3.10 to 3.13 is taken; PYTHON=/path/to/python chooses another.  A later call
# installs again only when pyproject.toml, the checkout's place or the requirement has changed.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv

supported() {  # python -> 0 when it runs and is 3.10 .. 3.13
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

find_python() {  # prints a supported Python that can make virtual environments
    local candidate without_venv=
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
        supported "$candidate" || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
        without_venv=$candidate
    done
    if [ -n "$without_venv" ]; then
        echo "error: $without_venv has no venv module. On Debian or Ubuntu: sudo apt install python3-venv" >&2
    else
        echo "error: no Python 3.10 to 3.13 found. Install one (macOS: brew install python@3.12)," \
             "or name it: PYTHON=/path/to/python3 bash $0" >&2
    fi
    return 1
}

ensure_venv() {
    local requirement=$1 python extra wanted
    if ! supported "$venv/bin/python" || ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
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
