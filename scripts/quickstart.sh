#!/usr/bin/env bash
# From nothing to a report, on 2 cores in under 10 minutes: makes .venv, installs, runs
# `draftsmith pipeline experiment=quickstart`. Run again, it goes on where it stopped.
# The output goes to runs/quickstart, or $DRAFTSMITH_OUTPUT/quickstart; arguments are overrides.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=${DRAFTSMITH_OUTPUT:-$root/runs}/quickstart
"$root/scripts/venv.sh"

cache=${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}
if ! { mkdir -p "$cache" && [ -w "$cache" ]; } 2> /dev/null; then # a read-only home
  export XDG_CACHE_HOME=$output/.cache HF_HOME=$output/.cache/huggingface MPLCONFIGDIR=$output/.cache/matplotlib
fi
# Hydra reads the quotes: a path may hold spaces, commas or brackets.
exec "${VENV:-$root/.venv}/bin/draftsmith" pipeline experiment=quickstart "output='${output//\'/\\\'}'" "$@"
