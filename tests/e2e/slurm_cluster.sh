#!/bin/bash
# slurm_cluster.sh DIRECTORY NODES COMMAND...: a SLURM cluster with nodes n0, n1, … on this machine, for as long as COMMAND
# runs. Network, mounts and processes are in namespaces of its own, so it meets nobody and leaves nothing. As root.
set -euo pipefail
if [ "${SLURM_CLUSTER_INSIDE:-}" != yes ]; then
    SLURM_CLUSTER_INSIDE=yes exec unshare --net --mount --pid --fork --mount-proc --kill-child "$0" "$@"
fi
directory=$1 nodes=$2
shift 2
mkdir -p "$directory"/{state,spool,log}

# The C library looks up no name where there is loopback only: both ends of a pair stay in this namespace.
ip link set lo up
ip link add cluster type veth peer name other
ip link set other up
ip link set cluster up
for ((i = 0; i <= nodes; i++)); do ip address add "10.17.0.$((i + 1))/24" dev cluster; done
{
    printf '127.0.0.1 localhost\n10.17.0.1 %s\n' "$(hostname)"
    for ((i = 0; i < nodes; i++)); do echo "10.17.0.$((i + 2)) n$i"; done
} > "$directory/hosts"
mount --bind "$directory/hosts" /etc/hosts

# In a directory of the user munge: the socket for all, the key for munged.
munge=$(mktemp -d)
chmod 755 "$munge"
dd if=/dev/urandom of="$munge/key" bs=128 count=1 status=none
chmod 400 "$munge/key"
chown -R munge: "$munge"
setpriv --reuid=munge --regid=munge --clear-groups munged --foreground --key-file="$munge/key" \
    --socket="$munge/socket" --pid-file="$munge/pid" --log-file="$munge/log" --seed-file="$munge/seed" \
    > "$directory/log/munged" 2>&1 &

{
    cat << CONFIGURATION
ClusterName=weightsync
SlurmctldHost=$(hostname)(10.17.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$munge/socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1
ReturnToService=2
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool/%n
SlurmctldPidFile=$directory/state/slurmctld.pid
SlurmdPidFile=$directory/state/%n.pid
SlurmctldLogFile=$directory/log/slurmctld
SlurmdLogFile=$directory/log/%n
CONFIGURATION
    for ((i = 0; i < nodes; i++)); do
        echo "NodeName=n$i NodeHostname=$(hostname) NodeAddr=10.17.0.$((i + 2)) Port=$((17001 + i)) CPUs=4"
    done
    echo "PartitionName=all Nodes=ALL Default=YES State=UP"
} > "$directory/slurm.conf"
export SLURM_CONF=$directory/slurm.conf

for ((i = 0; i < 300; i++)); do [ -S "$munge/socket" ] && break || sleep 0.1; done
slurmctld -D -c > /dev/null 2>&1 &
for ((i = 0; i < nodes; i++)); do slurmd -D -N "n$i" > /dev/null 2>&1 & done
for ((i = 0; i < 300; i++)); do
    [ "$(sinfo --noheader --states=idle --format=%D 2> /dev/null)" = "$nodes" ] && break || sleep 0.1
done
code=0
"$@" || code=$?
rm -rf "$munge"
exit "$code"
