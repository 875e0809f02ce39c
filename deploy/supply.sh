#!/usr/bin/env bash
# What the locks bring in.
#
#   deploy/supply.sh sbom    writes dist/restante.cdx.json: what requirements/server.lock installs, as CycloneDX
#   deploy/supply.sh audit   asks the package index which locked packages have known vulnerabilities. The exit status is
#                            0: none has; 1: some have; 3: it can't be told, since the service did not answer
set -euo pipefail
cd "$(dirname "$0")/.."
tools=.venv/audit/bin

sbom() {
  local file=dist/restante.cdx.json locked listed
  mkdir -p dist
  "$tools/python" -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --mc-type application \
    --output-reproducible --validate --output-format JSON --output-file "$file" requirements/server.lock
  locked=$(grep -cE '^[a-z0-9].*==' requirements/server.lock)
  listed=$(grep -c '"purl": "pkg:pypi/' "$file")
  [ "$locked" = "$listed" ] || { echo "sbom: $listed packages listed, and $locked locked"; exit 1; }
  echo "sbom: $listed packages in $file"
}

# What can't be looked up counts as failed (--strict), never as free of vulnerabilities.
ask() { "$tools/pip-audit" --progress-spinner off --strict --disable-pip "$@"; }

audit() {
  local said
  # A hole that the service has known for years: if it does not say so, its silence about other packages means nothing.
  said=$(ask --no-deps --format json -r <(echo 'urllib3==1.24.1') 2>&1 || true)
  if [[ $said != *CVE-2019-11324* ]]; then
    echo "audit: NOT RUN: the package index's vulnerability service does not answer here"
    exit 3
  fi
  for lock in server dev bench fuzz audit; do
    echo "audit: requirements/$lock.lock"
    ask --require-hashes -r "requirements/$lock.lock" || exit 1
  done
}

case "${1:-}" in
  sbom | audit) "$1" ;;
  *) sed -n '2,7p' "$0" >&2; exit 2 ;;
esac
