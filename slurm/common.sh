# shellcheck shell=bash
# What all templates share:  source "$SLURM_SUBMIT_DIR/slurm/common.sh" RECIPE [RECIPE] [OPTIONS OF hpc-grawa train]
#                            source "$SLURM_SUBMIT_DIR/slurm/common.sh" -- PROGRAM [ARGUMENTS]
# Trains on all nodes of the job, or on each of the numbers of nodes in STEPS in turn; ends the script.
# What differs from site to site stands in site.sh.

unset SLURM_EXPORT_ENV # with sbatch --export=NONE it is NONE, and srun would start ranks with an empty environment
cd "$SLURM_SUBMIT_DIR" || exit 2
if [ -r slurm/site.sh ]; then
    source slurm/site.sh
fi
if [ -n "${VENV:-}" ] && [ -z "${CONTAINER:-}" ]; then
    source "$VENV/bin/activate" || exit 2
fi
set -euo pipefail # only now: modules and activate scripts use unset variables

if [ -n "${VENV:-}${CONTAINER:-}" ]; then
    export PYTHONNOUSERSITE=1 # ~/.local would come before what is installed there
fi
cpus=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=$cpus
if [ -n "${NET_IF:-}" ]; then
    export NCCL_SOCKET_IFNAME=$NET_IF GLOO_SOCKET_IFNAME=$NET_IF HOROVOD_GLOO_IFACE=$NET_IF
    export OMPI_MCA_btl_tcp_if_include=$NET_IF OMPI_MCA_oob_tcp_if_include=$NET_IF PRTE_MCA_oob_tcp_if_include=$NET_IF
fi

declare -A bound=([/]=no) # a container has its own
inside=()
bind() { # PATH...: seen in the container at the same place; of one that is not there yet, what is above it
    local word place
    for word; do
        for place in "$(realpath -ms -- "$word")" "$(realpath -m -- "$word")"; do # a link, and where it leads
            while ! [ -e "$place" ]; do place=$(dirname "$place"); done
            if [ -z "${bound[$place]:-}" ] && [[ $place/ != "$PWD"/* ]]; then inside+=(--bind "$place"); fi
            bound[$place]=yes
        done
    done
}
if [ -n "${CONTAINER:-}" ]; then
    inside=(apptainer exec --nv --bind "$PWD")
    bind "${DATA:-data}" "${RUNS:-runs}" ${STAGE:+"$STAGE"}
    for word; do
        case ${word#*=} in /* | ../*) bind "${word#*=}" ;; esac
    done
    inside+=("$CONTAINER")
fi

if [ "$1" = -- ]; then
    shift
    exec ${inside[@]+"${inside[@]}"} "$@" # bash before 4.4 takes an empty array for an unset one
fi

say() { printf '%s: %s\n' "$SLURM_JOB_NAME" "$*" >&2; }

if [ $# -gt 1 ] && [[ $2 != -* ]]; then shift; fi # a recipe of the user's, in place of the script's

option() { # KEY WORD...: the value of the last --KEY among the words
    local key=--$1 before="" value="" word
    shift
    for word; do
        if [ "$before" = "$key" ]; then value=$word; fi
        if [ "${word%%=*}" = "$key" ] && [ "$word" != "$key" ]; then value=${word#*=}; fi
        before=$word
    done
    printf '%s' "$value"
}

data_of() { # RECIPE: the folder in DATA that a recipe of the package trains on; nothing for a file of the user's
    if [ -f "$1" ]; then return; fi
    case $1 in
        cifar10_* | cifar100_* | imagenet_*) printf '%s' "${1%%_*}" ;;
        results_cifar10* | ablations_*) printf cifar10 ;;
        gpt_text* | results_gpt*) printf text ;;
    esac
}

latest() { cat "$folder/checkpoints/latest" 2>/dev/null || true; } # the step that a start would go on from

summary_says() { grep -Eqs "\"$1\": \"$2\"" "$folder/summary.json"; }

changed() { stat -c %y "$folder/$1" 2>/dev/null || true; } # when; ranks at work change the folder "ranks"

begun() { # whether a rank has said anything, in heartbeats or a summary, since the marks $1 and $2 were taken
    [ "$(changed ranks)" != "$1" ] || [ "$(changed summary.json)" != "$2" ]
}

still_ours() { # ID: whether SLURM lets this attempt of the job run; on a node that it had lost, another may be under way
    local state="" count="" said="" try
    for try in 1 2 3 4 5 6; do # a controller whose nodes die may be too busy to answer at once
        if said=$(squeue -h -j "$1" -O State,RestartCnt 2>&1); then break; fi
        case $said in *"Invalid job id"*) return 1 ;; esac
        if [ "$try" = 6 ]; then say "SLURM does not answer: $said"; else sleep 10; fi
    done
    read -r state count <<<"${said##*$'\n'}" || true # before it may stand warnings
    [ "$state" = RUNNING ] && [ "$count" = "${SLURM_RESTART_COUNT:-0}" ]
}

dies_of_usr2() { # whether the launcher would, and its ranks with it: horovodrun, and mpirun of others than Open MPI
    local said
    case ${LAUNCHER:-srun} in
        horovodrun) return 0 ;;
        mpirun)
            said=$(mpirun --version 2>&1) || true
            ! grep -Eiq "open ?mpi|prrte|openrte" <<<"$said"
            ;;
        *) return 1 ;;
    esac
}

pass_on() { # ask the ranks to save and end
    told=yes interrupted=yes
    say "told to end: passed on to the ranks"
    if dies_of_usr2; then
        { mkdir -p "$folder" && echo SIGUSR2 >"$folder/.STOP" && mv "$folder/.STOP" "$folder/STOP"; } || true
    elif [ -n "$pid" ]; then
        kill -USR2 "$pid" || true
    fi
}

launch() { # NODES WORD...: hpc-grawa on so many nodes; sets status
    local nodes=$1 each=${SLURM_NTASKS_PER_NODE:-1} start=() mpi hosts
    local ranks=$((nodes * each))
    shift
    case ${LAUNCHER:-srun} in
        srun)
            read -ra mpi <<<"${SRUN_MPI---mpi=pmix}"
            start=(srun ${mpi[@]+"${mpi[@]}"} --nodes="$nodes" --ntasks="$ranks" --ntasks-per-node="$each"
                --cpus-per-task="$cpus" --kill-on-bad-exit=1)
            ;;
        mpirun) start=(mpirun -np "$ranks" --map-by "ppr:$each:node" --bind-to none) ;;
        horovodrun)
            hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n "$nodes" | sed "s/\$/:$each/" | paste -sd,)
            start=(horovodrun -np "$ranks" -H "$hosts")
            if [ -n "${NET_IF:-}" ]; then start+=(--network-interfaces "$NET_IF"); fi
            ;;
        *)
            say "LAUNCHER is $LAUNCHER: must be srun, mpirun or horovodrun"
            exit 2
            ;;
    esac
    if grep -qs SIGUSR2 "$folder/STOP"; then rm -f "$folder/STOP"; fi # its ranks were killed before they saw it
    # In the background: bash would put off its traps until a command in the foreground has ended.
    "${start[@]}" ${inside[@]+"${inside[@]}"} hpc-grawa "$@" &
    pid=$!
    while :; do
        interrupted="" status=0
        wait "$pid" || status=$?
        if [ -z "$interrupted" ]; then break; fi # else a trap ended the wait
    done
    pid=""
}

train() { # NODES RECIPE OPTIONS...; leaves the script unless the run is finished
    local nodes=$1 recipe=$2 again try before after silent said name data words=()
    shift 2
    name=${CHAIN:-$SLURM_JOB_NAME-$id}${STEPS:+-${nodes}nodes}
    words=(train --config "$recipe" --run.resume auto --run.dir "${RUNS:-runs}" --run.name "$name"
        --backend "${BACKEND:-auto}")
    data=$(data_of "$recipe")
    if [ -n "$(option config "$@")$(option data "$@")$(option data.class_path "$@")" ]; then data=""; fi # other data
    if [ -n "$data" ]; then
        words+=(--data.path "${DATA:-data}/$data")
        if [ "$data" = imagenet ] && [ -n "${STAGE:-}" ]; then words+=(--data.stage "$STAGE"); fi
    fi
    words+=("$@")
    name=$(option run.name "$@")
    if [ -n "${STEPS:-}" ] && [ -n "$name" ]; then words+=(--run.name "$name-${nodes}nodes"); fi # a run for each size
    folder=$(option run.dir "${words[@]}")/$(option run.name "${words[@]}")

    before=$(latest) silent=$(changed ranks) said=$(changed summary.json)
    if [ -n "${CHAIN:-}" ]; then check_chain "$before"; fi
    for again in yes no; do
        launch "$nodes" "${words[@]}"
        if [ "$status" = 0 ] && [[ " $* " != *" --dry"[-_]"run"* ]] && ! summary_says state finished; then
            say "the launcher ended with status 0, but $folder/summary.json does not say that the run is finished"
            if begun "$silent" "$said"; then exit 1; fi
            status=1 # srun does so where it could not start a step
        fi
        if [ "$status" = 0 ]; then return; fi
        if [ "$(changed summary.json)" != "$said" ] && summary_says state finished; then
            say "the launcher ended with status $status, though the run in $folder is finished"
            return
        fi
        # Busy or still ending an earlier step, a node may fail to start one, and can the next time; bad input is 2.
        if [ "$again" = no ] || [ "$status" = 2 ] || begun "$silent" "$said"; then break; fi
        sleep 5
        if [ -n "$told" ] || ! still_ours "$id"; then break; fi
        say "no rank came as far as training (status $status): started once more"
    done
    # Of ranks that leave with 75, saved, srun kills the last, and horovodrun makes 1.
    if [ "$(changed summary.json)" != "$said" ] && summary_says state "(timed out|preempted|stopped)"; then status=75; fi
    if [ "$status" -gt 128 ] && [ -n "$told" ]; then status=75; fi # so ends one that is told before it listens
    after=$(latest)
    if [ "$status" != 75 ]; then
        # A program that fails says so in its summary; bad input is 2; else ranks were killed, or lost with their node.
        if [ "$status" = 2 ] || [ -e "$folder/summary.json" ] || ! begun "$silent" "$said"; then exit "$status"; fi
        if grep -qs "\"job $id\", \"restarts\": ${SLURM_RESTART_COUNT:-0}," "$folder/lock.json"; then rm -f "$folder/lock.json"; fi # or a link of a chain would wait
        say "the ranks died (status $status), last checkpoint: ${after:-none}; hpc-grawa status $folder says more"
    fi
    if [ -z "$told" ] && summary_says cause STOP; then
        say "ended by $folder/STOP: not requeued"
        if [ -n "${CHAIN:-}" ]; then cancel_links; fi
    elif [ -n "${CHAIN:-}" ] || [ "${REQUEUE:-yes}" = no ]; then
        say "not requeued, as CHAIN or REQUEUE=no want it"
    elif [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "$after" = "$before" ]; then
        say "no progress since the last requeue: not requeued again"
    elif ! still_ours "$id"; then
        say "not requeued from here: SLURM is ending the job, or does not answer" # cancelled, or preempted, which requeues
    else
        say "requeued as $id"
        for try in 1 2 3; do
            if scontrol requeue "$id"; then
                sleep 600 # SLURM ends this script, after KillWait at most
                exit "$status"
            fi
            if [ "$try" != 3 ]; then sleep 5; fi
        done
        say "SLURM has not requeued it: see slurm/chain.sh"
    fi
    exit "$status"
}

check_chain() { # STEP: where the run stands at the start of each link
    local history=slurm/logs/$CHAIN${STEPS:+-${nodes}nodes}.chain
    if summary_says state finished; then return; fi
    printf '%s\n' "${1:-none}" >>"$history"
    if [ "$(tail -n 3 "$history" | wc -l)" = 3 ] && [ "$(tail -n 3 "$history" | sort -u | wc -l)" = 1 ]; then
        say "no progress in two links (at step ${1:-none}): the chain ends here"
        cancel_links
        exit 1
    fi
}

cancel_links() { # those that wait for this one
    scancel --user="$(id -un)" --name="$SLURM_JOB_NAME" --state=PENDING || say "the links that wait are still there"
}

id=$SLURM_JOB_ID # of an array: the task; its bare number would stand for all
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
HPC_GRAWA_ENDS=$(SLURM_TIME_FORMAT=%s squeue -h -j "$id" -o %e) || true # in seconds since 1970
if [[ $HPC_GRAWA_ENDS =~ ^[0-9]+$ ]]; then
    export HPC_GRAWA_ENDS
    say "the limit ends this job at $(date -d "@$HPC_GRAWA_ENDS" "+%F %T")"
fi
told="" interrupted="" pid="" status=0 folder=""
trap pass_on USR2
trap interrupted=yes TERM # the ranks get it too; wait until they have saved
for nodes in ${STEPS:-$SLURM_JOB_NUM_NODES}; do train "$nodes" "$@"; done
exit 0
