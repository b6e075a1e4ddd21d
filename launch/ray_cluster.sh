#!/usr/bin/env bash
# Trains on all GPUs of this host and samples with vLLM on those of other hosts, joined by Ray:
#
#   ray start --address=THIS_HOST:6379                                      # before, on each other host
#   launch/ray_cluster.sh --config=configs/gsm8k.py --config.rollout.num_replicas=8 [--config.SECTION.KEY=VALUE ...]
#
# It starts Ray's head here, waits for as many hosts as HOSTS says (this one included; default 1), and ends with
# `ray stop`, which stops every Ray of yours on this host. PORT names another port than 6379, PYTHON another interpreter than `python`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
ray() { "$python" -m ray.scripts.scripts "$@"; }
# Ray is to place no engine on the trainer's own GPUs.
ray start --head --port="${PORT:-6379}" --num-gpus=0 --include-dashboard=false --disable-usage-stats
trap 'ray stop' EXIT
"$python" - "${HOSTS:-1}" <<'WAIT'
import sys, time
import ray

ray.init("auto", log_to_driver=False)
while (found := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[1]):
    print(f"{found} of {sys.argv[1]} hosts have joined", flush=True)
    time.sleep(5)
WAIT
"$python" -m grpo_jax.train --config.rollout.ray_address=auto --config.rollout.placement=separate "$@"
