#!/bin/bash
# The part of recipes.sh that runs in the clean root: a registry, the daemon, docker, Slurm.
set -euo pipefail
die() { echo "recipes.sh: $*" >&2; exit 1; }
# eventually COMMAND... : within half a minute
eventually() {
  for _ in $(seq 150); do ! "$@" >/dev/null 2>&1 || return 0; sleep 0.2; done
  die "does not come: $*"
}
# expect TEXT COMMAND... : COMMAND prints TEXT
expect() {
  local said
  said=$("${@:2}" 2>/recipes/said) || { cat /recipes/said >&2; die "failed: ${*:2}"; }
  [[ $said == "$1" ]] || die "it said '$said', not '$1': ${*:2}"
}
nothing_attached() { [[ $(ublkimg ls --json) == '[]' ]]; }

ip link set lo up
# Slurm resolves names only where there is an address that is not loopback's.
ip address add 192.0.2.1/32 dev lo
echo "127.0.0.1 localhost $(hostname -s)" >/etc/hosts
mkdir -p /etc/ublkimg /run/ublkimg /var/lib/ublkimg
[[ -e /dev/ublk-control ]] || echo 'transport = "fuse"' >/etc/ublkimg/config.toml
/recipes/test-registry --load app:1=/recipes/app >/recipes/registry.out 2>&1 &
eventually grep -q 127.0.0.1 /recipes/registry.out
address=$(grep -oE '127\.0\.0\.1:[0-9]+' /recipes/registry.out | head -n 1)
ublkimg convert "$address/app:1" "$address/app:ublk" >/dev/null
ublkimg daemon >/recipes/daemon.log 2>&1 &
eventually ublkimg ls

echo "recipes.sh: $(docker --version)" >&2
mkdir -p /etc/docker
cat >/etc/docker/daemon.json <<'JSON'
{ "runtimes": { "ublkimg": { "path": "/usr/bin/ublkimg-runc" } } }
JSON
dockerd --iptables=false --ip6tables=false --bridge=none --storage-driver=vfs >/recipes/dockerd.log 2>&1 &
dockerd=$!
eventually docker info
tar -c --files-from /dev/null | docker import - empty >/dev/null
run=(docker run --rm --network none --runtime ublkimg --annotation "dev.ublkimg.image=$address/app:ublk" empty)
expect 'hello from app' "${run[@]}" /bin/cat /etc/motd
expect changed "${run[@]}" /bin/sh -c 'echo changed >/x; cat /x'
eventually nothing_attached
docker run -d --name lasting "${run[@]:3}" /bin/sh -c 'while :; do sleep 1; done' >/dev/null
expect 'hello from app' docker exec lasting /bin/cat /etc/motd
name=$(ublkimg ls --json | sed -nE 's/^ *"name": "(.*)",$/\1/p' | head -n 1)
! ublkimg rm "$name" 2>/dev/null || die "the root of a container that runs was removed"
docker rm -f lasting >/dev/null
eventually nothing_attached
kill "$dockerd"

echo "recipes.sh: $(slurmd -V)" >&2
mkdir -p /etc/slurm/prolog.d /etc/slurm/epilog.d /var/spool/slurmd /var/spool/slurmctld /run/munge /run/jobs
awk -v address="$address" '/^```sh$/ { file = "" ; inside = 1; text = ""; next }
  /^```$/ { if (inside && file != "") printf "%s", text >file; inside = 0; next }
  inside { gsub("registry[.]example", address); text = text $0 "\n"; if (match($0, "/etc/slurm/[^ :]*[.]sh")) file = substr($0, RSTART, RLENGTH) }
' /recipes/slurm.md
chmod 755 /etc/slurm/*.d/*.sh
host=$(hostname -s)
{
  sed -n '/^Prolog=/,/^```$/p' /recipes/slurm.md | grep -v '^```'
  cat <<CONF
ClusterName=recipes
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
CONF
} >/etc/slurm/slurm.conf
echo CgroupPlugin=disabled >/etc/slurm/cgroup.conf
[[ -e /etc/munge/munge.key ]] || mungekey
chown -R munge: /etc/munge /run/munge
chmod 755 /run/munge
runuser -u munge -- munged
slurmctld
slurmd
eventually srun true
job() { srun --comment="$1" sh -c "$2"; }
in_root='exec unshare --user --map-root-user --root=/run/jobs/$SLURM_JOB_ID /bin/cat /etc/motd'
expect 'hello from app' job "image=$address/app:ublk" "$in_root"
eventually nothing_attached
expect 'no root' job 'something else' '[ -d "/run/jobs/$SLURM_JOB_ID" ] || echo "no root"'
[[ -z $(ls -A /run/jobs) ]] || die "a job's root is still there: $(ls /run/jobs)"
scontrol shutdown >/dev/null
ublkimg daemon --stop
