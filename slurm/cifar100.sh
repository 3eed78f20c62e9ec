#!/usr/bin/env bash
#SBATCH --job-name=cifar100
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
[ -r "${SLURM_SUBMIT_DIR:-}/slurm/common.sh" ] || { echo "must be submitted by sbatch in the folder that holds slurm/, not in $PWD" >&2; exit 2; }; source "$SLURM_SUBMIT_DIR/slurm/common.sh" cifar100_wrn28x10 "$@"
