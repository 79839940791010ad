#!/usr/bin/env bash
# The test suite.  Arguments go to pytest:
#
#   bash scripts/test.sh                       everything but the slow tests
#   bash scripts/test.sh -m slow               the slow ones
#   bash scripts/test.sh -m slow --part 1/3    a third of them, for machines that share the work
#   bash scripts/test.sh -k codebook -x
#   bash scripts/test.sh -n 0 --pdb           in one process; otherwise one for each core, at most four
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
ensure_venv ".[test]"
cd "$root"
exec "$venv/bin/python" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
