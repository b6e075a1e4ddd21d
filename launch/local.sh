#!/usr/bin/env bash
# Trains on all devices of this machine, whatever directory it is called from:
#
#   launch/local.sh --config=configs/gsm8k.py [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]
#
# Relative paths are those of the repository. PYTHON names another interpreter than `python`.
# The same call goes on where a run stopped; Ctrl-C saves first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" -m grpo_jax.train "$@"
