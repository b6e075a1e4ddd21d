#!/usr/bin/env bash
# Trains on a TPU slice: the same command on each of its workers, by `gcloud`. From your own machine:
#
#   TPU=NAME ZONE=us-central2-b launch/tpu_pod.sh --config=configs/gsm8k.py --workdir=FOLDER_THAT_ALL_WORKERS_SHARE [...]
#
# PROJECT names another project than gcloud's own. Each worker needs the repository in FOLDER (default: grpo_jax in
# your home there) with its packages, for the interpreter PYTHON (default `python3`, on the workers). The processes meet
# at worker 0's internal address and PORT (8476): tpu_worker.sh, which is what runs there, finds out who is who.
#
# SIGTERM and Ctrl-C go to the workers, which save first. Run it where the connection lasts as long as the training.
# --dry_run as the first argument prints what would be started; COMMAND=doctor, and --hosts as the first of its flags,
# checks the workers in place of training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
dry_run=''
[ "${1:-}" != --dry_run ] || { dry_run=1; shift; }
[ -n "${TPU:-}" ] || fail 2 "TPU is not set: the slice's name"
[ -n "${ZONE:-}" ] || fail 2 "ZONE is not set: the slice's zone, as us-central2-b"
need_port PORT "${PORT:=8476}"
on_all=(gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all)
[ -z "${PROJECT:-}" ] || on_all+=(--project="$PROJECT")
folder=${FOLDER:-grpo_jax}
what=$(show "PORT=$PORT" "PYTHON=${PYTHON:-python3}" launch/tpu_worker.sh "grpo_jax.${COMMAND:-train}" "$@")
start=("${on_all[@]}" --command="cd $(show "$folder") && $what")
stop=("${on_all[@]}" --command="cd $(show "$folder") && launch/tpu_worker.sh --stop")
if [ -n "$dry_run" ]; then
  show "${start[@]}"
  echo "# and at SIGTERM or Ctrl-C"
  show "${stop[@]}"
  exit
fi
command -v gcloud > /dev/null || fail 2 "there is no gcloud here: https://cloud.google.com/sdk/docs/install"
trap 'signalled=1; "${stop[@]}" > /dev/null 2>&1 < /dev/null || true' TERM INT
# A session of its own: Ctrl-C here would cut the connection before the workers have saved.
setsid "${start[@]}" < /dev/null &
ssh=$!
wait_for "$ssh"
