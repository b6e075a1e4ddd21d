#!/usr/bin/env bash
# Trains on all GPUs of this host, or of several, and samples with vLLM on those of other hosts, joined by Ray:
#
#   ADDRESS=10.0.0.1 HOSTS=3 launch/ray_cluster.sh --config=configs/gsm8k.py --config.rollout.num_replicas=8 [...]
#
# ADDRESS is this host's on the network that the hosts share; without it Ray listens on loopback only, and no other
# host can join. TOKEN is a file with the secret that Ray asks everyone for (default ~/.grpo_jax/ray_token; made, for
# you alone to read, if there is none). Copy it to each other host, and there, once this script says so:
#
#   RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=TOKEN ray start --address=10.0.0.1:6379 --block
#
# It waits for as many hosts as HOSTS says (this one included; default TRAINERS), trains, and ends its own Ray and no
# other. Ray has START_TIMEOUT_S (300) to start, the hosts have JOIN_TIMEOUT_S (1800) to join.
#
# TRAINERS=2 trains on several hosts, one process each (ray_trainers.py says on which, and with which GPUs); engines
# get the GPUs that are left. The repository and the workdir must lie at the same place on all of them:
#
#   ADDRESS=10.0.0.1 HOSTS=3 TRAINERS=2 launch/ray_cluster.sh --config=configs/gsm8k.py --workdir=/shared/run [...]
#
# SIGTERM and Ctrl-C go to the trainers, which save first. The exit code is the first one's. PORT names another port
# than 6379, PYTHON another interpreter than `python`. --dry_run as the first argument prints what would be started;
# COMMAND=doctor, and --hosts as the first of its flags, checks the hosts in place of training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
dry_run=''
[ "${1:-}" != --dry_run ] || { dry_run=1; shift; }
python=${PYTHON:-python} port=${PORT:-6379} trainers=${TRAINERS:-1} hosts=${HOSTS:-${TRAINERS:-1}}
module=grpo_jax.${COMMAND:-train}
need_port PORT "$port"
need_number TRAINERS "$trainers"
need_number HOSTS "$hosts"
[ "$trainers" -le "$hosts" ] || fail 2 "TRAINERS=$trainers: there are only HOSTS=$hosts, and each has one trainer at most"
gpus=(--num-gpus=0)  # engines go to no GPU of the trainer's
[ "$trainers" = 1 ] || gpus=()  # Ray's accounts say which are the trainers'
if [ -n "${ADDRESS:-}" ]; then
  here=(--node-ip-address="$ADDRESS")
else
  [ "$hosts" = 1 ] || fail 2 "HOSTS=$hosts needs ADDRESS, this host's on the network that they share"
  here=() ADDRESS=127.0.0.1
  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0  # on loopback, as on those systems
fi
if [ "$trainers" = 1 ]; then
  trainer=("$python" -m "$module" --config.rollout.ray_address="$ADDRESS:$port" --config.rollout.placement=separate "$@")
else
  flags=$("$python" launch/ray_trainers.py flags "$ADDRESS:$port" "$module" "$@")
  mapfile -t cluster < <(printf '%s' "$flags")
  trainer=("$python" launch/ray_trainers.py run "$ADDRESS:$port" "$trainers" "$module" "${cluster[@]}" "$@")
fi
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=${TOKEN:-$HOME/.grpo_jax/ray_token}
if [ -n "$dry_run" ]; then
  show ray start --head --port="$port" "${here[@]}" "${gpus[@]}"
  [ "$hosts" = 1 ] || { echo "# on $((hosts - 1)) other host(s):"
    show RAY_AUTH_MODE=token "RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH" ray start --address="$ADDRESS:$port" --block; }
  show "${trainer[@]}"
  exit
fi
if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
  mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
  (umask 077; "$python" -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")
fi
folder=$(mktemp -d /tmp/grpo_jax-ray-XXXXXX)
process='' head=''
# shellcheck disable=SC2329  # the trap does
finish() {
  if [ -n "$head" ]; then
    kill "$head" 2> /dev/null || true
    for _ in {1..100}; do kill -0 "$head" 2> /dev/null || break; sleep 0.2; done
    kill -KILL -- "-$head" 2> /dev/null || true  # what of its session has not ended by then
  fi
  rm -rf "$folder"
}
trap finish EXIT
trap 'signalled=1; [ -n "$process" ] || exit 130; kill -TERM "$process" 2> /dev/null' TERM INT
# A session of its own: what is sent to this one's group is for the trainer.
setsid "$python" -m ray.scripts.scripts start --head --block --port="$port" "${here[@]}" --temp-dir="$folder/ray" \
  "${gpus[@]}" --include-dashboard=false --disable-usage-stats > "$folder/head.log" 2>&1 < /dev/null &
head=$!
begin=$SECONDS
until [ -s "$folder/ray/ray_current_cluster" ]; do
  [ $((SECONDS - begin)) -le "${START_TIMEOUT_S:-300}" ] ||
    fail 1 "Ray was not there within ${START_TIMEOUT_S:-300} s (START_TIMEOUT_S)"
  kill -0 "$head" 2> /dev/null || { echo "error: Ray does not start: $(tail -n 3 "$folder/head.log")" >&2; head=; exit 1; }
  sleep 0.2
done
echo "Ray listens on $ADDRESS:$port; its token is in $RAY_AUTH_TOKEN_PATH"
# `timeout` is for a Ray that answers nothing.
timeout -k 10 "$((${JOIN_TIMEOUT_S:-1800} + 120))" "$python" - "$ADDRESS:$port" "$hosts" "${JOIN_TIMEOUT_S:-1800}" <<'WAIT'
import sys, time
import ray

ray.init(sys.argv[1], log_to_driver=False)
end = time.monotonic() + float(sys.argv[3])
while (found := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[2]):
    print(f"{found} of {sys.argv[2]} hosts have joined", flush=True)
    if time.monotonic() > end:
        sys.exit(f"error: only {found} of {sys.argv[2]} hosts have joined within {sys.argv[3]} s (JOIN_TIMEOUT_S)")
    time.sleep(5)
WAIT
"${trainer[@]}" &
process=$!
wait_for "$process"
