#!/usr/bin/env bash
# bash slurm/chain.sh N [OPTIONS OF sbatch] SCRIPT [OPTIONS OF hpc-grawa train]
# N jobs, each after the one before, on one run folder: for sites that forbid requeueing, and for runs longer than any
# limit. A link whose run is finished ends at once; after STOP, or two links without a new checkpoint, the rest is cancelled.
# CHAIN=NAME bash slurm/chain.sh ... goes on with the run of that name.
set -euo pipefail

if [ "$#" -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
    sed -n '2s/^# /usage: /p' "$0" >&2
    exit 2
fi
links=$((10#$1)) script=""
shift
for word; do
    if [ "${word#-}" = "$word" ]; then script=$word && break; fi # sbatch's options must be of the form --key=value
done
if ! [ -r "$script" ] || ! [ -r slurm/common.sh ]; then
    echo "chain.sh: ${script:-no script} and slurm/common.sh must be readable from $PWD" >&2
    exit 2
fi
name=${CHAIN:-$(basename "$script" .sh)-$(date +%Y%m%d-%H%M%S)-$$}
rm -f "slurm/logs/$name.chain" "slurm/logs/$name"-*nodes.chain # where links before stood without progress: these are to try again

id=""
for ((link = 1; link <= links; link++)); do
    id=$(sbatch --parsable --no-requeue --job-name="$name" --export=ALL,CHAIN="$name" \
        ${id:+--dependency=afterany:"$id"} "$@")
    id=${id%%;*} # ID;CLUSTER where there are several
    echo "link $link of $links: job $id"
done
echo "run $name"
