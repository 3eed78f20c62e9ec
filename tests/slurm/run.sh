#!/usr/bin/env bash
# make test-slurm: the tests of slurm/, on the controller that answers, else on one that the script LAB starts and stops.
set -euo pipefail
cd "$(dirname "$0")/../.."
export LAB=${1:-} # tests break nodes of a lab only
if [ -r "$LAB" ]; then LAB=$(realpath "$LAB"); fi

if ! timeout 20 sinfo -h >/dev/null 2>&1; then
    if ! command -v slurmctld >/dev/null || ! [ -r "$LAB" ]; then
        echo "test-slurm: left out: no SLURM controller answers, and there is none to start (slurmctld and ${LAB:-LAB=SCRIPT})"
        exit 0
    fi
    trap 'bash "$LAB" stop' EXIT
    SLURMLAB_NODES=5 bash "$LAB" reset # three for the largest jobs, and two beside them, which memory (24 GB) allows
    eval "$(bash "$LAB" env)"
fi
export OMPI_MCA_mpi_yield_when_idle=1 # ranks outnumber cores here: one that waits is not to hold up the others
mkdir -p runs
# Three files at once, as each waits much; those of most tests come first. Not in /tmp, which the nodes of a cluster do
# not share.
QUIET=1300 bash tests/watch.sh python -m pytest -p no:cacheprovider --basetemp=runs/test-slurm -v \
    -n 3 --dist loadfile -o faulthandler_timeout=1200 tests/slurm
