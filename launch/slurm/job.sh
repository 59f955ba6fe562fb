# shellcheck shell=bash
# Sourced by the batch scripts of this folder: where they run, how ranks are started on all nodes of
# the job, and what becomes of a training that ends early.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source=wait.sh
. "$here/wait.sh"
# shellcheck source=site.sh
. "$here/site.sh"

readonly MISTAKE=2 STOPPED=75 # what commands leave with: megatron_mod/process.py

mistake() {
    echo "error: $*" >&2
    exit "$MISTAKE"
}

# Become srun, with the arguments $@ after what is the same for every step: to be called in a subshell,
# whose process is srun's then.
step() {
    local options words
    options=(--export=ALL --kill-on-bad-exit=1)
    if [ -n "$CONTAINER_IMAGE" ]; then
        options+=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD"
            --container-mounts="$root:$root,$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
    fi
    read -ra words <<<"$SRUN_OPTIONS"
    # Each rank sees all of its node's GPUs, and takes the one of its number on the node.
    exec env -u SLURM_GPUS_PER_TASK -u SLURM_NTASKS_PER_GPU -u SLURM_TRES_PER_TASK -u SLURM_GPU_BIND \
        srun "${options[@]}" "${words[@]}" "$@"
}

# Run a script of the repository ($1) once, on the first node.
step_of_one_task() {
    step --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
        "$PYTHON" "$root/$1" "${@:2}"
}

# Run it on all ranks of the job.
step_of_all_ranks() {
    local tasks=1 overcommit=()
    [ "$LAUNCHER" = torchrun ] || tasks=$ranks_per_node
    [ "$SLURM_CPUS_ON_NODE" -ge "$tasks" ] || overcommit=(--overcommit)
    step --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * tasks))" \
        --ntasks-per-node="$tasks" --cpus-per-task="$(share "$SLURM_CPUS_ON_NODE" "$tasks")" \
        "${overcommit[@]}" bash "$here/rank.sh" "$PYTHON" "$root/$1" "${@:2}"
}

# $1 divided by $2, at least 1.
share() {
    echo $(($1 > $2 ? $1 / $2 : 1))
}

# A training: its end, a signal or a failure of a node, and what the job does then.
train() {
    echo "Job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)):" \
        "$ranks_per_node rank(s) on each of $SLURM_JOB_NODELIST, by $LAUNCHER"
    # srun hands SIGUSR1 on to the ranks; on SIGTERM it would kill them.
    run_and_hand_on USR1 step_of_all_ranks "$@"
    if [ "$status" != 0 ] && [ -s "$MESSAGES/status" ]; then
        status=$(<"$MESSAGES/status")
    fi
    # Ranks that a signal reached before they could catch it.
    [ -z "$signalled" ] || [ "$status" -le 128 ] || status=$STOPPED
    case $status in
        0 | "$MISTAKE") ;;
        *) requeue "$status" "${@:2}" ;;
    esac
    exit "$status"
}

# Put the job back into the queue, after a training with the arguments $2... ended with status $1.
requeue() {
    # A job that is cancelled is to end, and one that is preempted is in the queue already.
    scontrol show job "$SLURM_JOB_ID" | grep '^ *JobState=RUNNING ' >/dev/null || return 0
    (step_of_one_task launch/slurm/may_requeue.py "$@") || return 0
    echo "Putting job $SLURM_JOB_ID back into the queue." >&2
    scontrol requeue "$SLURM_JOB_ID"
}

# The environment that commands run in.
prepare_environment() {
    if [ -n "$CONTAINER_IMAGE" ]; then
        [ -z "$VENV" ] || mistake "VENV = $VENV would be ignored in a container; unset it, or" \
            "CONTAINER_IMAGE (launch/slurm/site.sh)."
        return
    fi
    [ -z "$CONTAINER_MOUNTS" ] || mistake "CONTAINER_MOUNTS = $CONTAINER_MOUNTS would be ignored" \
        "without CONTAINER_IMAGE; set that too (launch/slurm/site.sh)."
    if [ -z "$VENV${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -e "$root/.venv/bin/activate" ]; then
        VENV=$root/.venv
    fi
    if [ -n "$VENV" ]; then
        [ -e "$VENV/bin/activate" ] || mistake "VENV = $VENV: is no virtual environment on" \
            "$(hostname) (no bin/activate); give one that all nodes have (launch/slurm/site.sh)."
        # shellcheck source=/dev/null
        . "$VENV/bin/activate"
    fi
}

# Ranks of each node: one a GPU; without GPUs one a task.
count_ranks() {
    case $LAUNCHER in
        srun | torchrun) ;;
        *) mistake "LAUNCHER = $LAUNCHER: must be srun or torchrun (launch/slurm/site.sh)." ;;
    esac
    if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
        ranks_per_node=$SLURM_GPUS_ON_NODE
    else
        local tasks=${SLURM_TASKS_PER_NODE:-1} # as 2(x4), or 2,1 where nodes differ
        case $tasks in
            *,*) mistake "sbatch gave the nodes different numbers of tasks ($tasks); give" \
                "--nodes and --ntasks-per-node." ;;
        esac
        ranks_per_node=${tasks%%(*}
    fi
}

# How ranks meet: the addresses by which SLURM itself reaches the job's nodes, in their order.
meet_on_first_node() {
    local name lines
    lines=$(scontrol --oneliner show node "$SLURM_JOB_NODELIST")
    node_addresses=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | while read -r name; do
        sed -n "s/^NodeName=$name .*NodeAddr=\([^ ]*\).*/\1/p" <<<"$lines"
    done)
    export node_addresses
    export MASTER_ADDR=${node_addresses%%$'\n'*}
    # Another one at each start: ranks that a lost node left behind may still have the last.
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0} % 16) % 10000))
}

: "${SLURM_CPUS_ON_NODE:=1}"
prepare_environment
count_ranks
meet_on_first_node
# The first rank that fails leaves its message here, and the others say nothing then; and its exit
# status, which is the job's: srun's is the largest of all, and it ends the other ranks.
export MESSAGES=$PWD/.slurm-$SLURM_JOB_ID
trap 'rm -rf "$MESSAGES"' EXIT
rm -rf "$MESSAGES"
mkdir "$MESSAGES" 2>/dev/null || mistake "$PWD: cannot be written; submit the job from a folder that can."
export LAUNCHER ranks_per_node
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(share "$SLURM_CPUS_ON_NODE" "$ranks_per_node")}
