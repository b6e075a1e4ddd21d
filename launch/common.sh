# shellcheck shell=bash
# What the scripts beside it share; sourced, after `set -euo pipefail`.

# fail CODE TEXT: one line on stderr, and the end.
fail() {
  echo "error: $2" >&2
  exit "$1"
}

# need_number NAME VALUE: a whole number above 0.
need_number() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail 2 "$1=$2: must be a whole number above 0"
}

# need_port NAME VALUE
need_port() {
  need_number "$1" "$2"
  [ "$2" -lt 65536 ] || fail 2 "$1=$2: must be a port, below 65536"
}

# show COMMAND...: as one would type it.
show() {
  printf '%q ' "$@" | sed 's/ $//'
  echo
}

# wait_for PID: ends with its exit code. A trap ends `wait` sooner, and sets `signalled`: what it has told still saves.
wait_for() {
  local code
  while :; do
    signalled='' code=0
    wait "$1" || code=$?
    [ -n "$signalled" ] || return "$code"
  done
}
