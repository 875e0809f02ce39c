#!/usr/bin/env bash
# Makes .venv with exactly the locked packages. On Debian, as root, installs python3-venv if it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'bootstrap: %s\n' "$*" >&2; }

python=$(command -v python3.11 || command -v python3 || true)
[ -n "$python" ] || { say "Python 3.11 or newer is needed: apt-get install python3"; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  say "Python 3.11 or newer is needed; $python is $("$python" -V 2>&1)"; exit 1; }

if ! "$python" -c 'import ensurepip' 2>/dev/null; then
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || {
    say "the module ensurepip is missing: apt-get install python3-venv"; exit 1; }
  say "installing python3-venv"
  apt-get update -qq >/dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
fi

[ -x .venv/bin/python ] || { say "making .venv"; "$python" -m venv .venv; }
say "installing locked packages (about a minute the first time)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.lock
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
