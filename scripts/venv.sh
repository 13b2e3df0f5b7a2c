#!/usr/bin/env bash
# Makes .venv (or $VENV) and installs draftsmith into it; at once done when it is up to date.
# Usage: scripts/venv.sh [EXTRA]      scripts/quickstart.sh and scripts/test.sh call it
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
fail() { echo "draftsmith: $*" >&2; exit 2; }

stamp="$(cksum < "$root/pyproject.toml") $root"
[ "$(cat "$venv/.installed-${1:-}" 2>/dev/null)" != "$stamp" ] || exit 0

if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
  for python in python3 python3.13 python3.12 python3.11 python ""; do
    "${python:-true}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null && break
  done
  [ -n "$python" ] || fail "Python 3.11, 3.12 or 3.13 is needed and none is on the PATH" \
    "(python3 is $(python3 --version 2>&1 || true)); install one, for example: apt install python3.12 python3.12-venv"
  echo "draftsmith: making $venv with $("$python" --version)"
  if "$python" -c 'import venv, ensurepip' 2> /dev/null; then
    "$python" -m venv --clear "$venv" || fail "cannot make $venv; choose another place: VENV=FOLDER $0"
  else # Debian and Ubuntu ship Python without venv: virtualenv does the same, from a throw-away folder
    tools=$(mktemp -d) && trap 'rm -rf "$tools"' EXIT
    "$python" -m pip install --quiet --target "$tools" virtualenv &&
      PYTHONPATH=$tools "$python" -m virtualenv --quiet "$venv" ||
      fail "this Python has no venv module and virtualenv could not stand in; run: apt install python3-venv"
  fi
fi

echo "draftsmith: installing into $venv (a minute or two)"
# This pin lets pip take the CPU wheel where an index offers one; the package accepts torch >= 2.11.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" -e "$root${1:+[$1]}" ||
  fail "the install failed, see above; pip needs a package index (network, or PIP_INDEX_URL)"
echo "$stamp" > "$venv/.installed-${1:-}"
