#!/usr/bin/env bash
# Installs what tests need into .venv (or $VENV), then format, lint, types and tests.
# Arguments go to pytest: scripts/test.sh -m slow, scripts/test.sh tests/decode -k greedy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VENV=${VENV:-$PWD/.venv}
scripts/venv.sh test
scripts/check.sh
# Caches lie in the venv: the repository may be read-only.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
exec "$VENV/bin/python" -m pytest -n 2 -o cache_dir="$VENV/.cache/pytest" "$@"
