#!/usr/bin/env bash
# Runs a command of grpo_jax on one worker of a TPU slice, as one process of several; tpu_pod.sh starts it on each:
#
#   launch/tpu_worker.sh grpo_jax.train --config=... --workdir=...
#   launch/tpu_worker.sh --stop                                          SIGTERM to what runs here
#   launch/tpu_worker.sh --dry_run grpo_jax.train [...]                  prints what would be started
#
# Which worker this is, and where all are, the slice's metadata server says (GCE_METADATA_IP in place of its name), or
# on Kubernetes TPU_WORKER_ID and TPU_WORKER_HOSTNAMES. One slice; several joined by Megascale are not known here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
pid_file=$HOME/.grpo_jax/tpu_worker.pid
if [ "${1:-}" = --stop ]; then
  pid=$(cat "$pid_file" 2> /dev/null) || fail 1 "nothing of grpo_jax was started on $(hostname)"
  # The number may be another process's by now.
  tr '\0' ' ' < "/proc/$pid/cmdline" 2> /dev/null | grep -q ' -m grpo_jax\.' || fail 1 "nothing runs on $(hostname)"
  kill -TERM "$pid"
  exit
fi
dry_run=''
[ "${1:-}" != --dry_run ] || { dry_run=1; shift; }
[ $# -gt 0 ] || fail 2 "usage: launch/tpu_worker.sh grpo_jax.train --config=..."
need_port PORT "${PORT:=8476}"

metadata() {
  local server=${GCE_METADATA_IP:-metadata.google.internal}
  curl --silent --fail --retry 3 --max-time 20 --header 'Metadata-Flavor: Google' \
    "http://$server/computeMetadata/v1/instance/attributes/$1" ||
    fail 1 "the metadata server $server does not answer $1, and there is no TPU_WORKER_ID: is this a TPU VM?"
}

if [ -n "${TPU_WORKER_ID:-}" ] && [ -n "${TPU_WORKER_HOSTNAMES:-}" ]; then
  rank=$TPU_WORKER_ID workers=$TPU_WORKER_HOSTNAMES
else
  rank=$(metadata agent-worker-number)
  workers=$(metadata worker-network-endpoints)
fi
IFS=, read -ra workers <<< "$workers"
[[ $rank =~ ^[0-9]+$ ]] && [ "$rank" -lt "${#workers[@]}" ] || fail 1 "worker '$rank' of ${#workers[@]}: there is no such one"
first=${workers[0]##*:}  # NAME:ID:ADDRESS, or the address
export JAX_COORDINATOR_ADDRESS="$first:$PORT" JAX_NUM_PROCESSES="${#workers[@]}" JAX_PROCESS_ID="$rank"
if [ -n "$dry_run" ]; then
  for name in JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID; do echo "export $name=${!name}"; done
  show "${PYTHON:-python3}" -m "$@"
  exit
fi
mkdir -p "$(dirname "$pid_file")"
echo $$ > "$pid_file"
exec "${PYTHON:-python3}" -m "$@"
