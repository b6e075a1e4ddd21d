#!/usr/bin/env bash
# Trains on one Slurm node, or on several: one process a node, for all of its GPUs. From the root of the repository:
#
#   sbatch --gres=gpu:8 --time=24:00:00 launch/slurm.sh --config=configs/gsm8k.py [--config.SECTION.KEY=VALUE ...]
#   sbatch --nodes=4 --gres=gpu:8 --time=24:00:00 launch/slurm.sh --config=... --workdir=FOLDER_THAT_ALL_NODES_SHARE [...]
#
# Partition, account, GPUs and time are sbatch's options and stand before the script. Activate the virtual
# environment before sbatch, or name its interpreter: PYTHON=/path/to/bin/python sbatch ...
# On several nodes the processes meet at the first one (or ADDRESS), at a port that the job's number gives (or PORT).
#
# --dry_run as the first argument prints what would be started, and needs no Slurm. COMMAND=doctor, and --hosts as
# the first of its flags, checks the nodes in place of training.
#
# Shortly before the time limit Slurm sends SIGTERM: the run finishes its step, saves, and ends with exit
# code 130. Submit the same line again to go on.
#SBATCH --job-name=grpo_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@300
#SBATCH --output=slurm-%j.log
set -euo pipefail
dry_run=
[ "${1:-}" != --dry_run ] || { dry_run=1; shift; }
if [ -n "$dry_run" ] && [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "(not in a job: as on ${NODES:=1} node(s); NODES says otherwise)"
  SLURM_JOB_ID=0 SLURM_JOB_NUM_NODES=$NODES SLURM_JOB_NODELIST=FIRST_NODE SLURM_SUBMIT_DIR=$PWD
fi
# Slurm runs a copy of this script: the repository is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch, from the root of the repository}"
# shellcheck source=launch/common.sh
source launch/common.sh
nodes=${SLURM_JOB_NUM_NODES:-1}
need_number NODES "$nodes"
trainer=("${PYTHON:-python}" -m "grpo_jax.${COMMAND:-train}" "$@")
# srun gives the signal to each process; a step gets the job's CPUs only when it is told so.
step=(srun "--cpus-per-task=${SLURM_CPUS_ON_NODE:-1}")
if [ "$nodes" -gt 1 ]; then
  first=${ADDRESS:-}
  [ -n "$first" ] || [ "$SLURM_JOB_NODELIST" != FIRST_NODE ] || first=FIRST_NODE
  [ -n "$first" ] || first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) || true
  [ -n "$first" ] || fail 1 "scontrol names no node of SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST"
  port=${PORT:-$((10000 + SLURM_JOB_ID % 20000))}
  need_port PORT "$port"
  export JAX_COORDINATOR_ADDRESS="$first:$port" JAX_NUM_PROCESSES="$nodes"
  # Where one fails, the others say why and end by themselves: srun is not to kill them before.
  step+=("--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0)
  # shellcheck disable=SC2016  # of each task
  trainer=(bash -c 'JAX_PROCESS_ID=$SLURM_PROCID exec "$@"' trainer "${trainer[@]}")
fi
if [ -n "$dry_run" ]; then
  for name in JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES; do
    [ "$nodes" = 1 ] || echo "export $name=${!name}"
  done
  show "${step[@]}" "${trainer[@]}"
  exit
fi
exec "${step[@]}" "${trainer[@]}"
