#!/usr/bin/env bash
# The public images that compose.yaml builds on, and whether each is pinned: named by its digest, so that a registry
# can't give another one under the same name.
#
#   deploy/images.sh        says of each what is used; the exit status is 1 unless all are pinned
#   deploy/images.sh pin    pulls what the tags stand for today and prints lines for `.env` that pin it
set -euo pipefail
cd "$(dirname "$0")/.."

used() {  # VARIABLE DEFAULT: as compose reads it, from the environment, else from .env, else from compose.yaml
  local said=${!1:-}
  [ -n "$said" ] || said=$(sed -n "s/^$1=//p" .env 2>/dev/null | tail -1 | tr -d "\"'")
  printf '%s' "${said:-$2}"
}

each() {  # FUNCTION: called with each variable and the image that it stands for
  local variable default
  while read -r variable default; do
    "$1" "$variable" "$(used "$variable" "$default")"
  done < <(grep -oE '\$\{FABRIC_IMAGE_[A-Z]+:-[^}]+\}' compose.yaml | sed -E 's/^\$\{([A-Z_]+):-(.*)\}$/\1 \2/' | sort -u)
}

all_pinned=0
tell() {
  if [[ $2 =~ @sha256:[0-9a-f]{64}$ ]]; then
    echo "pinned      $2"
  else
    echo "not pinned  $2 ($1)"
    all_pinned=1
  fi
}

pin() {
  local tag=${2%@*} digest
  docker pull --quiet "$tag" >/dev/null
  digest=$(docker image inspect -f '{{range .RepoDigests}}{{println .}}{{end}}' "$tag" | grep -m1 "^${tag%:*}@")
  echo "$1=$tag@${digest#*@}"
}

case "${1:-check}" in
  check) each tell; exit "$all_pinned" ;;
  pin) each pin ;;
  *) sed -n '2,6p' "$0" >&2; exit 2 ;;
esac
