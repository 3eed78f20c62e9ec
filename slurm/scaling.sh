#!/usr/bin/env bash
#SBATCH --job-name=scaling
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=01:30:00
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
# One method on 4, 8 and 12 GPUs, one after the other on the same nodes.
[ -r "${SLURM_SUBMIT_DIR:-}/slurm/common.sh" ] || { echo "must be submitted by sbatch in the folder that holds slurm/, not in $PWD" >&2; exit 2; }; STEPS=$(seq -s " " "$SLURM_JOB_NUM_NODES") source "$SLURM_SUBMIT_DIR/slurm/common.sh" cifar10_resnet20 "$@"
