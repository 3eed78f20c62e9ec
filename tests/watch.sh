#!/usr/bin/env bash
# watch.sh COMMAND...: runs it, and ends it where it has written nothing for QUIET (700) seconds: a hang, on any machine.
# Of a test that hangs pytest tells before that, and where it stands (conftest.py).
set -euo pipefail
quiet=${QUIET:-700}
exec 3< <(exec setsid "$@" 2>&1)
job=$!

all_gone() {
    kill -TERM -- "-$job" 2>/dev/null || return 0 # mpirun ends its ranks, which have groups of their own
    sleep 5
    kill -KILL -- "-$job" 2>/dev/null || true
}
trap all_gone EXIT

while IFS= LC_ALL=C read -r -d '' -n 1 -t "$quiet" letter <&3 || { ended=$?; false; }; do
    printf '%s' "$letter"
done
if [ "$ended" -gt 128 ]; then
    printf '\n== FAILED: no output for %s s: %s\n' "$quiet" "$*" >&2
    exit 124
fi
wait "$job"
