#!/usr/bin/env bash
# The gates that .ci/run, the workflow and pre-commit share.  Arguments name some of them:
#
#   bash scripts/check.sh                 all: lint, format, types, metal
#   bash scripts/check.sh lint types      ruff check; mypy
#   bash scripts/check.sh --fix           put right what the tools can: lint, format, metal
#
# Goes on after a gate that fails, and exits non-zero if any did.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
ensure_venv ".[test]"
cd "$root"
bin=$venv/bin

lint() { "$bin/ruff" check .; }
format() { "$bin/ruff" format --check .; }
types() { "$bin/mypy"; }

metal() {  # clang-format has no Metal: the files are read as C++, from standard input
    local file status=0
    for file in metal/*.metal cuda/*.cuh; do
        if ! "$bin/clang-format" --style=file --assume-filename=x.cpp --dry-run --Werror < "$file"; then
            echo "$file: not formatted. bash scripts/check.sh --fix" >&2
            status=1
        fi
    done
    return $status
}

fix() {
    local file status=0 formatted
    formatted=$(mktemp)
    for file in metal/*.metal cuda/*.cuh; do
        "$bin/clang-format" --style=file --assume-filename=x.cpp < "$file" > "$formatted" || return 1
        cmp -s "$file" "$formatted" || cat "$formatted" > "$file"
    done
    rm "$formatted"
    "$bin/ruff" check --fix . || status=1
    "$bin/ruff" format . || status=1
    return $status
}

gates=("${@:-all}")
[ "${gates[0]}" != all ] || gates=(lint format types metal)
failed=
for gate in "${gates[@]}"; do
    case $gate in
        --fix) fix || failed="$failed fix" ;;
        lint|format|types|metal) "$gate" || failed="$failed $gate" ;;
        *) echo "check.sh: got '$gate', allowed are lint, format, types, metal and --fix" >&2; exit 2 ;;
    esac
done
if [ -n "$failed" ]; then
    echo "failed:$failed" >&2
    exit 1
fi
