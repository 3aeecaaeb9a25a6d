# shellcheck shell=bash
# Control groups of the nodes. Every node has a subtree of its own in every
# hierarchy of the machine, and its cgroup namespace is rooted there: two nodes can
# run a container of the same name, and nothing outside the subtree is touched.
# Sourced, never run. Needs common.sh.

CGROUP_PARENT=sterna-nodes-$STERNA_LAB

# The mount points of all hierarchies, v1 and v2.
# Each once, however often it is mounted.
cgroup_hierarchies() {
  findmnt -rn -t "${1:-cgroup,cgroup2}" -o MAJ:MIN,TARGET | awk '!seen[$1]++ { print $2 }'
}

has_cgroup_v1() {
  local controllers
  while IFS=: read -r _ controllers _; do
    [[ -z $controllers || $controllers == name=* ]] || return 0
  done </proc/self/cgroup
  return 1
}

default_cgroup() {
  if has_cgroup_v1; then echo v1; else echo v2; fi
}

check_cgroup() {
  case $1 in
    v1) has_cgroup_v1 || die "this machine has its controllers on cgroup v2: --cgroup v1 cannot work here" ;;
    v2) findmnt -rn -t cgroup2 >/dev/null || die "no cgroup v2 hierarchy is mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified" ;;
    *) die "unknown cgroup version '$1': it is 'v1' or 'v2'" ;;
  esac
}

# cgroup_create NAME VERSION: the subtree, with what children need handed down.
cgroup_create() {
  local mount dir
  while read -r mount; do
    dir=$mount/$CGROUP_PARENT
    mkdir -p "$dir/$1"
    if [[ -e $mount/cgroup.controllers ]]; then
      [[ $2 == v1 ]] || delegate_below "$mount"
    elif [[ -e $dir/cpuset.cpus ]]; then
      inherit_cpuset "$dir"
      inherit_cpuset "$dir/$1"
    fi
  done < <(cgroup_hierarchies)
}

# On v2, a group hands its controllers down by name; not all have to be there.
delegate() {
  local dir controller
  for dir in "$@"; do
    for controller in $(<"$dir/cgroup.controllers"); do
      { echo "+$controller" >"$dir/cgroup.subtree_control"; } 2>/dev/null || true
    done
  done
}

# delegate_below ROOT: for all nodes, and so that it can be taken back.
delegate_below() {
  local before=$STERNA_RUN/subtree_control
  [[ -e $before ]] || cat "$1/cgroup.subtree_control" >"$before"
  delegate "$1" "$1/$CGROUP_PARENT"
}

# cgroup_undelegate: when the last node is gone; what else uses a controller keeps it.
cgroup_undelegate() {
  local before=$STERNA_RUN/subtree_control mount controller
  [[ -e $before ]] || return 0
  while read -r mount; do
    for controller in $(<"$mount/cgroup.subtree_control"); do
      grep -qw "$controller" "$before" ||
        { echo "-$controller" >"$mount/cgroup.subtree_control"; } 2>/dev/null || true
    done
  done < <(cgroup_hierarchies cgroup2)
  rm "$before"
}

# cgroup_settle NAME: on v2, no process may be beside groups that share controllers
# out. So once the cgroup namespace is rooted at the subtree, all that is in it goes
# to the leaf 'init', and then its controllers can be handed down.
cgroup_settle() {
  local mount dir pid try
  while read -r mount; do
    dir=$mount/$CGROUP_PARENT/$1
    mkdir -p "$dir/init"
    for ((try = 0; try < 100; try++)); do
      [[ -n $(<"$dir/cgroup.procs") ]] || break
      while read -r pid; do
        { echo "$pid" >"$dir/init/cgroup.procs"; } 2>/dev/null || true
      done <"$dir/cgroup.procs"
    done
    delegate "$dir"
  done < <(cgroup_hierarchies cgroup2)
}

# On v1, a new cpuset is empty and takes no process before it has been filled.
inherit_cpuset() {
  local file
  for file in cpuset.cpus cpuset.mems; do
    [[ -n $(<"$1/$file") ]] || cat "${1%/*}/$file" >"$1/$file"
  done
}

# cgroup_join NAME: moves the calling process, before it becomes the node or a
# command in it.
cgroup_join() {
  local mount dir
  while read -r mount; do
    dir=$mount/$CGROUP_PARENT/$1
    [[ ! -d $dir/init || ! -e $dir/cgroup.controllers ]] || dir+=/init
    echo "$BASHPID" >"$dir/cgroup.procs"
  done < <(cgroup_hierarchies)
}

# cgroup_thaw NAME: what is frozen on v1 does not die.
cgroup_thaw() {
  local mount state
  while read -r mount; do
    [[ -d $mount/$CGROUP_PARENT/$1 && ! -e $mount/cgroup.controllers ]] || continue
    while read -r state; do
      { echo THAWED >"$state"; } 2>/dev/null || true
    done < <(find "$mount/$CGROUP_PARENT/$1" -name freezer.state 2>/dev/null)
  done < <(cgroup_hierarchies)
}

# cgroup_remove NAME: after its processes are gone. A group that a process has
# just left can be busy for a moment.
cgroup_remove() {
  local mount dir try
  while read -r mount; do
    dir=$mount/$CGROUP_PARENT/$1
    for ((try = 0; try < 100; try++)); do
      [[ -d $dir ]] || break
      find "$dir" -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.02
    done
    [[ ! -d $dir ]] || warn "the control group $dir could not be removed: see its cgroup.procs"
    rmdir "${dir%/*}" 2>/dev/null || true
  done < <(cgroup_hierarchies)
}
