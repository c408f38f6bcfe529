#!/bin/bash
# Train on several machines that share a folder, without a scheduler. Set `trainer: FSDPTrainer` in the config. On each
# machine, run this with its number, in the same folder:
#
#     bash example/cluster/torchrun.sh HOST_OF_MACHINE_0 N_MACHINES MACHINE config.yml
#
# Ctrl-C on one machine ends all of them after a checkpoint. The same commands resume.

set -e
head=$1 machines=$2 machine=$3
shift 3

exec torchrun --nnodes="$machines" --node-rank="$machine" --nproc-per-node="${GPUS:-8}" \
  --master-addr="$head" --master-port="${PORT:-29500}" \
  -m minitrain train "$@"
