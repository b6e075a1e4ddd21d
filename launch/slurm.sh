#!/usr/bin/env bash
# Trains on one Slurm node, one process for all of its GPUs. From the root of the repository:
#
#   sbatch --gres=gpu:8 --time=24:00:00 launch/slurm.sh --config=configs/gsm8k.py [--config.SECTION.KEY=VALUE ...]
#
# Partition, account, GPUs and time are sbatch's options and stand before the script. Activate the virtual
# environment before sbatch, or name its interpreter: PYTHON=/path/to/bin/python sbatch ...
#
# Shortly before the time limit Slurm sends SIGTERM: the run finishes its step, saves, and ends with exit
# code 130. Submit the same line again to go on.
#SBATCH --job-name=grpo_jax
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --signal=TERM@300
#SBATCH --output=slurm-%j.log
set -euo pipefail
# Slurm runs a copy of this script: the repository is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch, from the root of the repository}"
# srun gives the signal to the process; a step gets the job's CPUs only when it is told so.
exec srun --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" "${PYTHON:-python}" -m grpo_jax.train "$@"
