#!/usr/bin/env bash
#SBATCH --job-name=seeds
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=00:30:00
#SBATCH --array=0-17
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.out
# Six methods, three seeds: task i takes method i % 6 and seed i / 6.
methods=(LGRAWA MGRAWA EASGD LSGD LocalSGD DataParallel) seeds=(36 720 1042) i=$SLURM_ARRAY_TASK_ID
[ -r "${SLURM_SUBMIT_DIR:-}/slurm/common.sh" ] || { echo "must be submitted by sbatch in the folder that holds slurm/, not in $PWD" >&2; exit 2; }; source "$SLURM_SUBMIT_DIR/slurm/common.sh" cifar10_resnet20 --method "${methods[i % 6]}" --run.seed "${seeds[i / 6]}" "$@"
