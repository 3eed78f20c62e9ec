#!/usr/bin/env bash
# The battery of `make test`, which puts the environment first on PATH. Stops at the first launch that fails or hangs.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks outnumber cores here

launch() { # COMMAND...
    local start=$SECONDS status=0
    printf '\n== %s\n' "$*"
    bash tests/watch.sh "$@" || status=$?
    case $status in
        0) printf '== %d s\n' $((SECONDS - start)) ;;
        *) printf '== FAILED (status %d): %s\n' "$status" "$*" >&2 ;;
    esac
    [ "$status" -eq 0 ] || exit "$status"
}

# Rank tests run on 1, 2 and 4 simulated ranks here; on 3 they are launched below, but for pools, where speed decides.
launch python -m pytest -q -n logical --maxprocesses 8 --dist worksteal -m "not slow" -k "not W3 or pooled"

# no cache: ranks would write it at once; no colours: mpirun gives ranks a terminal of their own even where none is
ranks=(python -m pytest -p no:cacheprovider -q --color=no -m ranks)
# One launch makes all of the rank tests: simulated ranks have shown the same. What else a backend, a launcher or
# a number of ranks may break is what ranks send each other: the communicator, gradients under way during backward,
# tickets, words, and the messages of every method.
wire=(
    tests/test_comm.py tests/test_control.py tests/test_data_parallel.py tests/test_doctor.py tests/test_pooled.py
    tests/test_throttled.py
    tests/test_methods.py::test_follows_the_oracle
    tests/test_distributed_optimizer.py::test_smoke_a_script_follows_the_oracle
    --deselect tests/test_data_parallel.py::test_every_step_is_that_of_the_mean_gradient # what is summed, not how
)
# Another launcher of the same backend may break only how ranks find each other: that every verb then works shows it. Such
# a launch mostly waits for its start, so that it runs beside the others.
verbs=(-k smoke tests/test_comm.py)
said=$(mktemp -d)
trap 'rm -rf "$said"' EXIT
beside() { launch "$@" >"$said/${#jobs[@]}" 2>&1 & jobs+=($!); }
jobs=()
# Sizes: 3, which halves do not fit and where a part of one rank stands beside one of two; 1; 4 for two groups of two. With
# 2 every rank is first or last: the battery above has started many jobs of two.
mapfile -t all < <(grep -lE 'on_(several_)?ranks' tests/test_*.py) # every rank would import the others for nothing

launch mpirun -np 3 "${ranks[@]}" --backend mpi "${all[@]}"
gpus=$(python -c 'import torch; print(min(4, torch.cuda.device_count()))')
if [ "$gpus" -gt 0 ]; then
    launch mpirun -np "$gpus" "${ranks[@]}" --backend nccl -k cuda
fi
launch mpirun -np 4 "${ranks[@]}" --backend gloo "${wire[@]}"
if command -v horovodrun >/dev/null; then
    launch horovodrun --mpi -np 3 "${ranks[@]}" --backend horovod "${wire[@]}"
    beside horovodrun --gloo -np 2 -H localhost:2 "${ranks[@]}" --backend horovod "${verbs[@]}"
else
    printf '\n== Horovod is not built here: its launches are left out\n'
fi
beside mpirun -np 1 "${ranks[@]}" --backend mpi "${wire[@]}" # no rank to send to
beside torchrun --standalone --nproc-per-node 2 --no-python "${ranks[@]}" --backend gloo "${verbs[@]}"
failed=0
for number in "${!jobs[@]}"; do
    wait "${jobs[number]}" || failed=$?
    cat "$said/$number"
done
[ "$failed" -eq 0 ] || exit "$failed"
printf '\n== all launches passed\n'
