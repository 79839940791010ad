#!/usr/bin/env bash
# The package as a user gets it: an sdist, the wheel built from it, installed alone and run from outside the checkout.
#
#   bash scripts/package.sh [FOLDER]    puts both into FOLDER, once they have passed
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
ensure_venv "."
folder=
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    folder=$(cd "$1" && pwd -P)
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip="-m pip --disable-pip-version-check -qq"

"$venv/bin/python" -m venv "$work/build"
"$work/build/bin/python" $pip install build
"$work/build/bin/python" -m build --outdir "$work/dist" "$root" > "$work/build.log" 2>&1 ||
    { cat "$work/build.log"; exit 1; }

"$venv/bin/python" - "$root" "$work"/dist/*.whl <<'PY'
import sys
import zipfile
from pathlib import Path

root, wheel = map(Path, sys.argv[1:])
packed = set(zipfile.ZipFile(wheel).namelist())
wanted = {f"mlx_turbo/metal/{p.name}" for p in root.glob("metal/*.metal")}
wanted |= {f"mlx_turbo/cuda/{p.name}" for p in root.glob("cuda/*.cuh")}
wanted |= {f"mlx_turbo/demo_model/{p.name}" for p in root.glob("mlx_turbo/demo_model/*")}
wanted |= {p.relative_to(root).as_posix() for p in root.glob("mlx_turbo/**/*.py")} | {"mlx_turbo/py.typed"}
if missing := sorted(wanted - packed):
    sys.exit(f"{wheel.name} lacks {missing}")
if not any(name.endswith(".metal") for name in wanted):
    sys.exit("no kernel in metal/")
if not any(name.endswith(".cuh") for name in wanted):
    sys.exit("no prelude in cuda/")
if stray := sorted(n for n in packed if not n.startswith("mlx_turbo") or "__pycache__" in n):
    sys.exit(f"{wheel.name} holds what it should not: {stray}")
print(f"{wheel.name}: {len(packed)} files, {wheel.stat().st_size / 1e6:.1f} MB")
PY

"$venv/bin/python" -m venv "$work/install"
"$work/install/bin/python" $pip install "$work"/dist/*.whl
cd "$work"
"$work/install/bin/mlx-turbo" doctor
"$work/install/bin/mlx-turbo" generate --prompt "Once upon a time" --max-tokens 40
if [ -n "$folder" ]; then cp "$work"/dist/* "$folder"; fi
