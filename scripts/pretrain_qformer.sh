#!/usr/bin/env bash
# Align a projector as configs/pretrain_qformer.yaml says, on all devices of this machine.
#
#   scripts/pretrain_qformer.sh SHARDS [KEY=VALUE | --resume | --dry-run ...]
#
# NUM_DEVICES (default 8) processes share each step; it must divide train.rows_per_step.
set -euo pipefail

shards=${1:?"usage: $0 SHARDS [KEY=VALUE | --resume | --dry-run ...]"}
shift
config="$(dirname "$0")/../configs/pretrain_qformer.yaml"
exec torchrun --standalone --nproc-per-node "${NUM_DEVICES:-8}" --no-python \
    llava-scale train "$config" "data.sources=[{path: '$shards'}]" "$@"
