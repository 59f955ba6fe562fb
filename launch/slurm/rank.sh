#!/usr/bin/env bash
# One task of the job: a rank, or with LAUNCHER=torchrun the torchrun that starts a node's ranks. The
# arguments are the rank's command, an interpreter first; the rest comes from job.sh.
set -euo pipefail
: "${LAUNCHER:?}" "${ranks_per_node:?}" "${node_addresses:?}" "${MESSAGES:?}"
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=wait.sh
. "$here/wait.sh"

command=("$@")
if [ "$LAUNCHER" = torchrun ]; then
    mapfile -t addresses <<<"$node_addresses"
    command=("$1" "$here/torchrun.py"
        --nnodes "$SLURM_NNODES" --nproc_per_node "$ranks_per_node"
        --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT"
        --rdzv_id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
        --rdzv_conf "is_host=$((SLURM_NODEID == 0))" --local_addr "${addresses[SLURM_NODEID]}"
        "${@:2}")
else
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$ranks_per_node
    export TORCHELASTIC_ERROR_FILE=$MESSAGES/$RANK/error.json
    mkdir -p "$MESSAGES/$RANK"
fi
run_and_hand_on "" "${command[@]}"
if [ "$status" != 0 ]; then
    set -o noclobber # the first one's stays
    echo "$status" 2>/dev/null >"$MESSAGES/status" || true
    exit "$status"
fi
