#!/usr/bin/env bash
# Format, lint and types, with the tools of .venv (or $VENV).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-$PWD/.venv}
export PATH=$venv/bin:$PATH RUFF_CACHE_DIR=$venv/.cache/ruff MYPY_CACHE_DIR=$venv/.cache/mypy
ruff format --check .
ruff check .
mypy
