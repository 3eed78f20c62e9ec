#!/usr/bin/env bash
# make test-slurm: the tests of slurm/, on the controller that answers, else on one that the script LAB starts and stops.
set -euo pipefail
cd "$(dirname "$0")/../.."
lab=${1:-}

if ! timeout 20 sinfo -h >/dev/null 2>&1; then
    if ! command -v slurmctld >/dev/null || ! [ -r "$lab" ]; then
        echo "test-slurm: left out: no SLURM controller answers, and there is none to start (slurmctld and ${lab:-LAB=SCRIPT})"
        exit 0
    fi
    trap 'bash "$lab" stop' EXIT
    bash "$lab" reset
    eval "$(bash "$lab" env)"
fi
mkdir -p runs
# Not in /tmp, which the nodes of a cluster do not share.
timeout 1200 python -m pytest -p no:cacheprovider --basetemp=runs/test-slurm -v tests/slurm
