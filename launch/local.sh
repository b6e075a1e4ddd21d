#!/usr/bin/env bash
# Trains on all devices of this machine, whatever directory it is called from:
#
#   launch/local.sh --config=configs/gsm8k.py [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]
#
# Relative paths are those of the repository. PYTHON names another interpreter than `python`.
# The same call goes on where a run stopped; Ctrl-C saves first. --dry_run as the first argument prints what would be
# started.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
[ "${1:-}" != --dry_run ] || { shift; show "${PYTHON:-python}" -m grpo_jax.train "$@"; exit; }
exec "${PYTHON:-python}" -m grpo_jax.train "$@"
