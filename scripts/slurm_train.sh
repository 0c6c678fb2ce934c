#!/bin/bash
# Train on several machines under SLURM; a preempted or timed-out job saves, requeues itself and goes on.
#
#   sbatch --nodes 2 scripts/slurm_train.sh recipe.yaml train.rows_per_step=128
#
# One task a GPU, started by srun without torchrun, so that the exit code of the training reaches this script.
#SBATCH --job-name=llava-scale
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=USR1@180
set -u

if [ $# -lt 1 ]; then
    echo "usage: sbatch [OPTIONS] $0 CONFIG [KEY=VALUE]..." >&2
    exit 2
fi

STOPPED=75 # saved after SIGUSR1 or SIGTERM, wants to go on
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# --resume starts at step 0 where there is no checkpoint yet, so the first start and all others are the same.
srun --kill-on-bad-exit=1 --wait=120 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    exec llava-scale train "$@" --resume
' train "$@" train.stop_exit_code=$STOPPED
code=$?

if [ $code -eq $STOPPED ]; then
    echo "saved before the time was up; requeued"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
