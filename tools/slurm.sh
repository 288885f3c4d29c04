#!/usr/bin/env bash
# Set up Slurm on this one machine, to try what runs on a cluster; not for a real one.
#
#   tools/slurm.sh start     install Debian's packages where they lack, start the daemons
#   tools/slurm.sh stop      end the jobs and the daemons
#
# Needs root and apt. A configuration of Slurm that is not of this script is never touched.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail

conf=/etc/slurm/slurm.conf
mark="# Written by tools/slurm.sh of dldkit."
state=/var/lib/slurm
logs=/var/log/slurm

die() {
    echo "error: $*" >&2
    exit 1
}

runs() { # runs DAEMON
    pgrep -x "$1" >/dev/null
}

wait_until() { # wait_until "what" COMMAND...
    local what=$1 i
    shift
    for ((i = 0; i < 100; i++)); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.2
    done
    die "after 20 s, ${what}: see ${logs}/slurmctld.log and ${logs}/slurmd.log"
}

install_packages() {
    if dpkg -s slurm-wlm munge >/dev/null 2>&1; then return; fi
    command -v apt-get >/dev/null || die "there is no apt-get: this script needs Debian's packages"
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
        slurm-wlm munge
}

write_conf() {
    local host memory
    host=$(hostname -s)
    memory=$(awk '/^MemTotal/ { print int($2 / 1024) - 256 }' /proc/meminfo)
    # No cgroups, which a container may lack. A job that is requeued would rest for
    # cred_expire seconds, two minutes if nothing is said.
    cat >"${conf}" <<EOF
${mark}
ClusterName=local
SlurmctldHost=${host}
SlurmUser=slurm
AuthInfo=cred_expire=5
StateSaveLocation=${state}/slurmctld
SlurmdSpoolDir=${state}/slurmd
SlurmctldLogFile=${logs}/slurmctld.log
SlurmdLogFile=${logs}/slurmd.log
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
NodeName=${host} CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=${memory} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
}

start() {
    install_packages
    if [ -e "${conf}" ] && [ "$(head -n 1 "${conf}")" != "${mark}" ]; then
        die "${conf} is there already: this machine has a Slurm, so use that"
    fi
    if sinfo -h >/dev/null 2>&1; then
        echo "Slurm runs already"
        return
    fi
    write_conf
    install -d -o slurm -g slurm "${state}/slurmctld" "${logs}"
    install -d "${state}/slurmd"
    install -d -o munge -g munge -m 0755 /run/munge
    if ! runs munged; then runuser -u munge -- munged; fi
    wait_until "munge does not answer" munge -n
    if ! runs slurmctld; then slurmctld; fi
    if ! runs slurmd; then slurmd; fi
    wait_until "no node is idle" srun --immediate=1 true
    sinfo
}

stop() {
    if [ "$(head -n 1 "${conf}" 2>/dev/null)" != "${mark}" ]; then
        die "no Slurm of this script is here: there is no ${conf} of its own"
    fi
    if runs slurmctld; then
        squeue -h -o %i | xargs -r scancel || true
        wait_until "jobs still end" no_jobs
        scontrol shutdown
    fi
    wait_until "the daemons still run" daemons_ended
    if runs munged; then runuser -u munge -- munged --stop; fi
    rm -f "${conf}"
}

no_jobs() {
    [ -z "$(squeue -h)" ]
}

daemons_ended() {
    ! runs slurmctld && ! runs slurmd && ! runs slurmstepd
}

case ${1-} in
    start | stop)
        [ "$(id -u)" -eq 0 ] || die "$0 $1 needs root"
        "$1"
        ;;
    -h | --help) sed -n '2,/^\[/{/^\[/d;s/^# \{0,1\}//p}' "$0" ;;
    *) die "'${1-}': say start or stop (see $0 --help)" ;;
esac
