#!/bin/sh
# A real Slurm of two nodes on this machine, to try launches on and for the tests. As on most clusters, it takes jobs
# that can never start, requeues none that doesn't ask for it, and preempts those of partition low for those of main.
#   eval "$(tools/slurm_sandbox.sh up)"    start it, and point this shell's sbatch at it
#   tools/slurm_sandbox.sh status          nodes and jobs
#   tools/slurm_sandbox.sh down            stop it and remove its files
# TDKD_SLURM is its folder (default: /tmp/tdkd-slurm-UID). Needs Debian's slurmctld, slurmd, slurm-client and munge;
# root only to install these and to put the nodes' names into /etc/hosts.
set -eu
home="${TDKD_SLURM:-/tmp/tdkd-slurm-$(id -u)}"
conf="$home/slurm.conf"
nodes="tdkd-n1 tdkd-n2"
PATH="$PATH:/usr/sbin:/sbin"

say() { echo "$*" >&2; }
fail() { say "slurm_sandbox: $*"; exit 2; }
is_root() { [ "$(id -u)" = 0 ]; }
answers() { [ -f "$conf" ] && SLURM_CONF="$conf" timeout 10 scontrol ping 2>/dev/null | grep -q UP; }

need_programs() {
    missing=""
    for program in slurmctld slurmd sbatch munged; do
        command -v "$program" >/dev/null || missing="$missing $program"
    done
    [ -n "$missing" ] || return 0
    packages="slurmctld slurmd slurm-client munge"
    is_root || fail "$missing not found; install: sudo apt-get install --no-install-recommends $packages"
    say "installing with apt: $packages"
    apt-get update -qq >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
}

need_names() {
    # The first node's name becomes the ranks' MASTER_ADDR.
    for node in $nodes; do
        getent hosts "$node" >/dev/null && continue
        is_root || fail "$node does not resolve; run: echo '127.0.0.1 $nodes' | sudo tee -a /etc/hosts"
        echo "127.0.0.1 $nodes" >>/etc/hosts
        return
    done
}

write_conf() {
    host="$(hostname -s)"
    user="$(id -un)"
    cat >"$conf" <<END
ClusterName=tdkd
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$home/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd-%n.pid
SlurmdSpoolDir=$home/spool/%n
StateSaveLocation=$home/state
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/slurmd-%n.log
SlurmdTimeout=15
MessageTimeout=60
SchedulerParameters=sched_interval=3,bf_interval=3
MpiDefault=none
ReturnToService=2
EnforcePartLimits=NO
JobRequeue=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES PriorityTier=2 MaxTime=1-00:00:00 State=UP
PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=60 State=UP
PartitionName=closed Nodes=ALL AllowAccounts=nobody State=UP
END
    # Two devices that every machine has stand in for GPUs: Slurm hands out their numbers.
    echo "Name=gpu File=/dev/null" >"$home/gres.conf"
    echo "Name=gpu File=/dev/zero" >>"$home/gres.conf"
    port=17001
    for node in $nodes; do
        echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$port CPUs=$(env -u OMP_NUM_THREADS nproc) Gres=gpu:2 State=UNKNOWN" >>"$conf"
        port=$((port + 1))
    done
}

start_munge() {
    (umask 077 && head -c 1024 /dev/urandom >"$home/munge/key")
    options="--key-file=$home/munge/key --socket=$home/munge/socket --pid-file=$home/munge/pid"
    options="$options --log-file=$home/munge/log --seed-file=$home/munge/seed"
    if is_root; then
        chown -R munge: "$home/munge"
        su -s /bin/sh munge -c "$(command -v munged) $options"
    else
        munged $options
    fi
}

up() {
    need_programs
    need_names
    if ! answers; then
        [ ! -d "$home" ] || down
        mkdir -p "$home/state" "$home/spool" "$home/log" "$home/munge"
        chmod 755 "$home" "$home/munge"
        write_conf
        start_munge
        export SLURM_CONF="$conf"
        slurmctld -c
        for node in $nodes; do slurmd -N "$node"; done
        for _ in $(seq 30); do
            [ "$(sinfo -h -t idle -o %D 2>/dev/null)" != 2 ] || break
            sleep 1
        done
        [ "$(sinfo -h -t idle -o %D)" = 2 ] || fail "the nodes did not come up; see $home/log"
    fi
    say "Slurm with two nodes is up; tools/slurm_sandbox.sh down stops it"
    echo "export SLURM_CONF=$conf"
}

down() {
    [ -d "$home" ] || return 0
    ! answers || SLURM_CONF="$conf" timeout 10 scancel -Q -u "$(id -un)" 2>/dev/null || true
    for file in "$home"/slurmd-*.pid "$home/slurmctld.pid" "$home/munge/pid"; do
        [ -f "$file" ] || continue
        pid="$(cat "$file")"
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 50); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
        kill -9 "$pid" 2>/dev/null || true
    done
    rm -rf "$home"
}

case "${1:-}" in
up) up ;;
down) down ;;
status)
    answers || fail "not running; start it with: eval \"\$(tools/slurm_sandbox.sh up)\""
    export SLURM_CONF="$conf"
    sinfo
    squeue
    ;;
*) fail "usage: tools/slurm_sandbox.sh up|down|status" ;;
esac
