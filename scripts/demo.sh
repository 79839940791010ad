#!/usr/bin/env bash
# The embedded model goes on with a story, after some others, with a compressed cache.  Further arguments go to
# `mlx-turbo generate`:
#
#   bash scripts/demo.sh --kv turbo3 --max-tokens 100
#   bash scripts/demo.sh --prompt "One day, a cat"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
ensure_venv "."
# 2,900 bytes end in the middle of a story; by then the cache has something to pack
context=$(head -c 2900 mlx_turbo/demo_model/stories.txt)
echo "...${context: -160}"
exec "$venv/bin/mlx-turbo" generate --prompt "$context" --max-tokens 400 --temp 0.7 "$@"
