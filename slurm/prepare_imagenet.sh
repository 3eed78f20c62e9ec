#!/usr/bin/env bash
#SBATCH --job-name=prepare_imagenet
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
# sbatch slurm/prepare_imagenet.sh --train TAR --val TAR --devkit TAR --out data/imagenet (see data_prep/README.md)
[ -r "${SLURM_SUBMIT_DIR:-}/slurm/common.sh" ] || { echo "must be submitted by sbatch in the folder that holds slurm/, not in $PWD" >&2; exit 2; }; source "$SLURM_SUBMIT_DIR/slurm/common.sh" -- python data_prep/imagenet.py --workers "$SLURM_CPUS_PER_TASK" "$@"
