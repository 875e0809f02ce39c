#!/usr/bin/env bash
# Makes .venv with exactly the locked packages: `server` what the stack and the agent need, `dev` also what the tests
# and checks need. On Debian, as root, installs the system packages for that which are missing.
set -euo pipefail
cd "$(dirname "$0")/.."
lock=requirements/${1:?usage: deploy/bootstrap.sh server|dev}.lock

say() { printf 'bootstrap: %s\n' "$*" >&2; }

install() {  # why PACKAGE…
  local why=$1; shift
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { say "$why: apt-get install $*"; exit 1; }
  say "$why: installing $*"
  apt-get update -qq >/dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# The distribution's own before one that is in PATH: it is built with profile-guided optimization, and takes a quarter
# less time for everything than one that was just compiled.
python=
for candidate in ${PYTHON:-/usr/bin/python3.11 /usr/bin/python3 python3.11 python3}; do
  "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { python=$(command -v "$candidate"); break; }
done
[ -n "$python" ] || { say "Python 3.11 or newer is needed: apt-get install python3, or name one: PYTHON=/path/to/it"; exit 1; }
"$python" -c 'import ensurepip' 2>/dev/null || install "the module ensurepip is missing" python3-venv

if [ "$lock" = requirements/dev.lock ]; then
  # The AMQP 1.0 client of the security tests comes as source.
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  { command -v cc && command -v pkg-config && pkg-config --exists openssl && [ -e "$header" ]; } >/dev/null ||
    install "a C compiler and headers are needed to build a test package" \
      gcc libc6-dev libssl-dev pkg-config "$(basename "$(readlink -f "$python")")-dev"
fi

[ -x .venv/bin/python ] || { say "making .venv"; "$python" -m venv .venv; }
say "installing the packages of $lock (up to a minute the first time)"
.venv/bin/python -m pip install -qq --disable-pip-version-check --require-hashes -r "$lock"
.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
