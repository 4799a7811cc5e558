#!/usr/bin/env bash
# Installs Slurm from Debian's packages and starts it on this one machine, as root, for tests/test_slurm.py.
# usage: export SLURM_CONF=$(.ci/slurm.sh)
set -euo pipefail
folder=/tmp/foldkit-slurm
PATH=$PATH:/usr/sbin
if ! type -P slurmctld slurmd sbatch munged >/dev/null; then
    apt-get update -qq >&2
    apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
fi
# Afresh each time: what an earlier run left behind (jobs, a node that stopped answering) must not matter.
while pkill -KILL -f "^slurm(ctld|d) -f $folder/slurm.conf"; do sleep 0.2; done
rm -rf $folder
mkdir -p $folder/state $folder/spool /run/munge
chown munge /run/munge
munge -n >/dev/null 2>&1 || setpriv --reuid munge --regid munge --clear-groups munged
memory=$(awk '/MemTotal/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)
cat >$folder/slurm.conf <<CONF
ClusterName=foldkit
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MailProg=/bin/true
SchedulerParameters=sched_interval=2,batch_sched_delay=1
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
slurmctld -f $SLURM_CONF >&2
slurmd -f $SLURM_CONF >&2
for _ in $(seq 60); do
    if [[ $(sinfo -h -o %T 2>/dev/null) == idle ]]; then echo "$SLURM_CONF" && exit; fi
    sleep 0.5
done
echo "slurm.sh: error: the node isn't idle: $(sinfo -h -o %T 2>&1)" >&2
tail -n 5 $folder/*.log >&2
exit 1
