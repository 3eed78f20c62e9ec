#!/usr/bin/env bash
#SBATCH --job-name=compare
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.out
# Submitted by  hpc-grawa compare ... --submit slurm/compare.sh: task i trains what line i of the plan says, counted from 0.
words=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$1")
declare -a run="($words)" # they are quoted
[ -r "${SLURM_SUBMIT_DIR:-}/slurm/common.sh" ] || { echo "must be submitted by sbatch in the folder that holds slurm/, not in $PWD" >&2; exit 2; }; source "$SLURM_SUBMIT_DIR/slurm/common.sh" "${run[@]}"
