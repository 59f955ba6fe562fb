#!/usr/bin/env bash
# The batch scripts of launch/slurm on a real SLURM: two nodes, n1 and n2, on this one machine.
#
#   bash tests/slurm/run.sh [pytest's arguments]
#   bash tests/slurm/run.sh -- COMMAND [arguments]     a command, such as bash, in place of the tests
#
# Brings the cluster up in a temporary folder, runs the tests, and takes it down by process id,
# however they end. Installs Debian's slurm-wlm and munge if they are missing and this user may (root,
# with apt-get); where it may not, it says so and leaves with status 77, as a test that is skipped.
# Half an hour on two cores that had other work, seven minutes of it the soak (SOAK_SEED).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

skip() {
    echo "tests/slurm is skipped: $*" >&2
    exit 77
}

require_slurm() {
    local program missing=()
    export PATH=$PATH:/usr/sbin:/sbin
    for program in munged slurmctld slurmd sbatch srun; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    [ "$(id -u)" = 0 ] || skip "the cluster's daemons run as root, and this user is not."
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null ||
        skip "there is no ${missing[*]} here, and no apt-get to install slurm-wlm and munge with."
    echo "Installing slurm-wlm and munge ..."
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
        --no-install-recommends slurm-wlm munge; } >"$folder/apt.log" 2>&1 ||
        skip "apt-get cannot install slurm-wlm and munge: $(tail -n 1 "$folder/apt.log")"
}

# Ports that are free now: $1 of them.
free_ports() {
    python3 - "$1" <<'PYTHON'
import socket, sys

sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for each in sockets:
    each.bind(("", 0))
print(*(each.getsockname()[1] for each in sockets))
PYTHON
}

# CPUs and GPUs are over-stated, so that ranks fit; nothing uses the GPUs, which no file stands for.
# Short times: a node that is gone is noticed in seconds, and a job that is requeued starts again.
write_settings() {
    local ports
    read -ra ports <<<"$(free_ports 3)"
    mkdir "$folder"/{state,spool-n1,spool-n2}
    touch "$folder"/gpu{0,1}
    echo "NodeName=n[1-2] Name=gpu File=$folder/gpu[0-1]" >"$folder/gres.conf"
    cat >"$SLURM_CONF" <<SETTINGS
ClusterName=megatron_mod
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
InactiveLimit=0
ReturnToService=2
GresTypes=gpu
SlurmdParameters=config_overrides
MailProg=/bin/true
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=4 RealMemory=2000 Gres=gpu:2
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=4 RealMemory=2000 Gres=gpu:2
PartitionName=normal Nodes=n1,n2 Default=YES PriorityTier=1 MaxTime=UNLIMITED OverTimeLimit=0 State=UP
PartitionName=urgent Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF State=UP
SETTINGS
}

start_cluster() {
    head -c 1024 /dev/urandom >"$folder/munge.key"
    chmod 600 "$folder/munge.key"
    munged --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
        --seed-file="$folder/munge.seed"
    slurmctld -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF" -N n1
    slurmd -f "$SLURM_CONF" -N n2
    local waited=0
    until [ "$(sinfo --noheader --format=%D --states=idle --partition=normal)" = 2 ]; do
        [ $((waited += 1)) -le 60 ] || skip "the cluster does not come up: $(cat "$folder"/*.log)"
        sleep 0.5
    done
}

# The daemons, and what they started and have not ended, of this cluster alone.
stop_cluster() {
    local pid
    [ -z "$tests" ] || kill -TERM "$tests" 2>/dev/null || true
    if [ -e "$folder/slurmctld.pid" ]; then
        scancel --quiet --user="$(id -un)" 2>/dev/null || true
        for _ in $(seq 40); do
            [ -n "$(squeue --noheader 2>/dev/null)" ] || break
            sleep 0.5
        done
    fi
    for pid in $(cluster_processes); do
        kill -KILL "$pid" 2>/dev/null || true
    done
    rm -rf "$folder"
}

# Everything that runs with this cluster's settings, the processes of its jobs included.
cluster_processes() {
    local environment pid
    for environment in /proc/[0-9]*/environ; do
        pid=${environment#/proc/}
        pid=${pid%/environ}
        [ "$pid" != $$ ] && [ "$pid" != "$BASHPID" ] || continue
        { tr '\0' '\n' <"$environment" | grep --quiet --line-regexp "SLURM_CONF=$SLURM_CONF"; } \
            2>/dev/null && echo "$pid"
    done || true
}

tests=
folder=$(mktemp -d "${TMPDIR:-/tmp}/slurm.XXXXXX")
export SLURM_CONF=$folder/slurm.conf
chmod 755 "$folder"
trap stop_cluster EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
require_slurm
[ "${1:-}" = -- ] || . launch/environment.sh test
write_settings
start_cluster
if [ "${1:-}" = -- ]; then
    "${@:2}"
    exit
fi
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
# In the background, for a signal to this script to end it at once.
python -m pytest -m slow --show-capture=no tests/slurm "$@" &
tests=$!
status=0
wait "$tests" || status=$?
if [ "$status" != 0 ]; then
    printf '%s\n' "The end of slurmctld's log:" "$(tail -n 40 "$folder/slurmctld.log")" >&2
    exit "$status"
fi
