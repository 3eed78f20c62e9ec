#!/usr/bin/env bash
# The battery of `make test`, which puts the environment first on PATH. Stops at the first launch that fails.
# Each launch has its own time limit, so that ranks that wait for each other end the battery instead of stopping it.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks outnumber cores here

launch() { # SECONDS COMMAND...
    local limit=$1 start=$SECONDS status=0
    shift
    printf '\n== %s\n' "$*"
    # The ranks' own limit comes first: it prints where each of them stands.
    HPC_GRAWA_TEST_SECONDS=$((limit - 20)) timeout --kill-after=10 "$limit" "$@" || status=$?
    case $status in
        0) printf '== %d s\n' $((SECONDS - start)) ;;
        124 | 137) printf '== FAILED: no end after %d s: %s\n' "$limit" "$*" >&2 ;;
        *) printf '== FAILED (status %d): %s\n' "$status" "$*" >&2 ;;
    esac
    [ "$status" -eq 0 ] || exit "$status"
}

# no cache: ranks would write it at once; no colours: mpirun gives ranks a terminal of their own even where none is
pytest=(python -m pytest -p no:cacheprovider -q --color=no)
ranks=("${pytest[@]}" -m ranks)

launch 1800 python -m pytest -q -m "not slow"
launch 120 python -m pytest -q --doctest-modules hpc_grawa # the examples in docstrings
for size in 1 2 3 4; do
    launch 900 mpirun -np "$size" "${ranks[@]}" --backend mpi
done
for size in 2 4; do
    launch 900 mpirun -np "$size" "${ranks[@]}" --backend gloo
done
gpus=$(python -c 'import torch; print(min(4, torch.cuda.device_count()))')
if [ "$gpus" -gt 0 ]; then
    launch 900 mpirun -np "$gpus" "${ranks[@]}" --backend nccl -k cuda
fi
launch 120 torchrun --standalone --nproc-per-node 2 --no-python "${ranks[@]}" --backend gloo -k smoke
if command -v horovodrun >/dev/null; then
    for size in 2 4; do
        launch 900 mpirun -np "$size" "${ranks[@]}" --backend horovod
    done
    launch 120 horovodrun --mpi -np 2 "${ranks[@]}" --backend horovod -k smoke
    launch 120 horovodrun --gloo -np 2 -H localhost:2 "${ranks[@]}" --backend horovod -k smoke
else
    printf '\n== Horovod is not built here: its launches are left out\n'
fi
printf '\n== all launches passed\n'
