#!/bin/bash
# Turns the namespaces it is started in into a node: mounts the root, /proc, /sys,
# /dev and the rest, waits for its network, changes root and becomes the node's init.
# Started by node_start in node.sh, as pid 1 of the new pid namespace.
set -euo pipefail

# shellcheck source=SCRIPTDIR/common.sh
. "${BASH_SOURCE[0]%/*}/common.sh"

name=$1
state=$STERNA_RUN/$name
disk=$STERNA_DISK/$name
rootfs=$(<"$state/rootfs")
cgroup=$(<"$state/cgroup")
bin=$(<"$state/bin")

# /proc is still the machine's, so these are the pid and start as seen from there.
read -r pid _ </proc/self/stat
echo "$pid $(process_start "$pid")" >"$state/pid.new"
mv "$state/pid.new" "$state/pid"

mount_root() {
  mount -t overlay -o "lowerdir=$rootfs,upperdir=$disk/upper,workdir=$disk/work" overlay "$disk/root"
  cd "$disk/root"
  mount -t proc -o nosuid,nodev,noexec proc proc
  mount -t sysfs -o nosuid,nodev,noexec sysfs sys
  mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs run
  mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs tmp
  # overlayfs on overlayfs does not work: containerd's snapshots need a plain one.
  mount --bind "$disk/containerd" var/lib/containerd
  mount --bind "$disk/sterna" var/lib/sterna
  mount --bind "$bin" opt/sterna/bin
  mount -o remount,bind,ro opt/sterna/bin
  local shared target
  while IFS=: read -r shared target; do
    mkdir -p "./$target"
    mount --bind "$shared" "./$target"
    mount -o remount,bind,ro "./$target"
  done <"$state/shares"
}

mount_dev() {
  local device major minor
  mount -t tmpfs -o nosuid,mode=755 tmpfs dev
  mkdir dev/pts dev/shm dev/net dev/mqueue
  mount -t devpts -o nosuid,noexec,gid=5,mode=620,ptmxmode=666 devpts dev/pts
  mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs dev/shm
  mount -t mqueue -o nosuid,nodev,noexec mqueue dev/mqueue
  for device in null zero full random urandom tty kmsg fuse net/tun userfaultfd; do
    [[ -c /dev/$device ]] || continue
    read -r major minor < <(stat -c '0x%t 0x%T' "/dev/$device")
    mknod -m 666 "dev/$device" c "$major" "$minor"
  done
  ln -s /proc/self/fd dev/fd
  ln -s /proc/self/fd/0 dev/stdin
  ln -s /proc/self/fd/1 dev/stdout
  ln -s /proc/self/fd/2 dev/stderr
  ln -s pts/ptmx dev/ptmx
}

# The cgroup namespace makes every mount show the node's subtree only.
mount_cgroup() {
  if [[ $cgroup == v2 ]]; then
    mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
    return
  fi
  local controllers options part
  mount -t tmpfs -o nosuid,nodev,noexec,mode=755 tmpfs sys/fs/cgroup
  while IFS=: read -r _ controllers _; do
    case $controllers in
      '')
        mkdir sys/fs/cgroup/unified
        mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
        continue
        ;;
      name=*) options=none,$controllers ;;
      *) options=$controllers ;;
    esac
    controllers=${controllers#name=}
    mkdir "sys/fs/cgroup/$controllers"
    mount -t cgroup -o "$options" cgroup "sys/fs/cgroup/$controllers"
    [[ $controllers != *,* ]] || for part in ${controllers//,/ }; do
      ln -s "$controllers" "sys/fs/cgroup/$part"
    done
  done </proc/self/cgroup
}

wait_for_network() {
  local try
  for ((try = 0; try < 1000; try++)); do
    [[ ! -e $state/linked ]] || return 0
    sleep 0.01
  done
  die "no network after 10 s: the command that started this node is gone; start it again"
}

hostname "$name" 2>/dev/null || echo "$name" >/proc/sys/kernel/hostname
mount_root
mount_dev
mount_cgroup
wait_for_network
pivot_root . .old
cd /
umount -l /.old
mount --make-rshared /
ulimit -n "$(ulimit -H -n)"
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin HOME=/root LANG=C.UTF-8 \
  tini -g -- /usr/local/sbin/node-service boot
