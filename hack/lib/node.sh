# shellcheck shell=bash
# A node's life: prepared, started, linked, ready, stopped. Its state directory
# $STERNA_RUN/NAME has one small file for each fact:
#   slot flavour cgroup rootfs bin   what it was asked to be
#   shares                           "DIR:PATH" of the machine's directories that it has
#   pid                              "PID START" of its init, as seen from the machine
#   linked                           has its network
#   boot.log                         what was said while it started
# Sourced, never run. Needs common.sh, rootfs.sh, cgroup.sh, network.sh, config.sh.

check_name() {
  [[ $1 =~ ^[a-z][a-z0-9-]{0,31}$ ]] || die "'$1' cannot name a node: lower-case letters, digits and '-', a letter first"
}

# node_names: all nodes that left a trace, running or not.
node_names() {
  local dir
  for dir in "$STERNA_RUN"/*/; do
    [[ ! -e $dir/slot ]] || basename "$dir"
  done
}

# node_alive NAME: sets NODE_PID to its init if that runs.
node_alive() {
  local started
  read -r NODE_PID started 2>/dev/null <"$STERNA_RUN/$1/pid" || return 1
  [[ $(process_start "$NODE_PID") == "$started" ]]
}

# node_booted NAME: it has changed its root, which is what turns boot.sh into tini.
# Before that, whoever entered it would be in the machine's own files.
node_booted() {
  node_alive "$1" && [[ $(<"/proc/$NODE_PID/comm") == tini ]]
}

node_ready() {
  node_booted "$1" && [[ -e /proc/$NODE_PID/root/run/sterna-node/ready ]]
}

require_node() {
  check_name "$1"
  node_ready "$1" || die "node '$1' does not run: start it with 'hack/nodes up $1'"
}

# choose_slot NAME: a to h have their places, other names fill up from the end.
choose_slot() {
  local -A taken=()
  local name slot
  while read -r name; do
    taken[$(<"$STERNA_RUN/$name/slot")]=1
  done < <(node_names)
  if [[ $1 == [a-h] ]]; then
    printf -v slot '%d' "'$1"
    slot=$((slot - 97))
    [[ -n ${taken[$slot]:-} ]] || { echo "$slot" && return; }
  fi
  for ((slot = SLOTS - 1; slot >= 0; slot--)); do
    [[ -n ${taken[$slot]:-} ]] || { echo "$slot" && return; }
  done
  die "there are $SLOTS nodes already: stop one, or use another lab (STERNA_LAB=1)"
}

# node_prepare NAME FLAVOUR CGROUP BIN [SHARE...]: what it is to be, and its place
# among the others; done for all before one starts, so that each knows all.
node_prepare() {
  local name=$1 state=$STERNA_RUN/$1 slot
  [[ ! -e $state && ! -e $STERNA_DISK/$name ]] || node_stop "$name"
  slot=$(choose_slot "$name")
  mkdir -p "$state" "$STERNA_DISK/$name"/{upper,work,root,containerd,sterna} "$4"
  rootfs_path "$2" >"$state/rootfs"
  echo "$2" >"$state/flavour"
  echo "$3" >"$state/cgroup"
  echo "$4" >"$state/bin"
  (($# < 5)) && : >"$state/shares" || printf '%s\n' "${@:5}" >"$state/shares"
  echo "$slot" >"$state/slot"
}

# node_start NAME: starts its init, which waits for node_link.
node_start() {
  local name=$1 state=$STERNA_RUN/$1
  write_config "$STERNA_DISK/$name/upper" "$name" "$(<"$state/slot")" "$(<"$state/flavour")"
  cgroup_create "$name" "$(<"$state/cgroup")"
  (
    exec {LOCK_FD}>&-
    cgroup_join "$name"
    cd /
    exec setsid unshare --mount --uts --ipc --net --pid --cgroup --fork --kill-child \
      "$LIB_DIR/boot.sh" "$name"
  ) >"$state/boot.log" 2>&1 </dev/null &
  local launcher=$! try
  for ((try = 0; try < 500; try++)); do
    [[ ! -e $state/pid ]] || break
    kill -0 "$launcher" 2>/dev/null || break
    sleep 0.01
  done
  node_alive "$name" || boot_failed "$name"
}

boot_failed() {
  cat "$STERNA_RUN/$1/boot.log" >&2
  die "node '$1' did not start (above: what it said)"
}

# node_link NAME: gives it its network and lets it go on.
node_link() {
  [[ ! -e $STERNA_RUN/$1/linked ]] || return 0
  node_alive "$1" || boot_failed "$1"
  [[ $(<"$STERNA_RUN/$1/cgroup") == v1 ]] || cgroup_settle "$1"
  node_link_up "$NODE_PID" "$(<"$STERNA_RUN/$1/slot")"
  touch "$STERNA_RUN/$1/linked"
}

node_wait() {
  local try
  for ((try = 0; try < 1500; try++)); do
    node_alive "$1" || boot_failed "$1"
    ! node_ready "$1" || return 0
    ! node_booted "$1" || [[ ! -e /proc/$NODE_PID/root/run/sterna-node/failed ]] || boot_failed "$1"
    sleep 0.02
  done
  die "node '$1' is not ready after 30 s: see $STERNA_RUN/$1/boot.log"
}

# node_stop NAME: ends its init, by which the kernel ends all that runs in it, and
# removes what it had. Works on half-made nodes too.
node_stop() {
  local name=$1 state=$STERNA_RUN/$1 try
  if node_alive "$name"; then
    kill -KILL "$NODE_PID"
    for ((try = 0; try < 500; try++)); do
      [[ -e /proc/$NODE_PID ]] || break
      cgroup_thaw "$name"
      sleep 0.02
    done
    [[ ! -e /proc/$NODE_PID ]] || die "node '$name' (pid $NODE_PID) does not die: something in it hangs in the kernel"
  fi
  [[ ! -e $state/slot ]] || node_link_down "$(<"$state/slot")"
  cgroup_remove "$name"
  remove_tree "$STERNA_DISK/$name"
  remove_tree "$state"
}

# node_enter NAME COMMAND...: becomes COMMAND in all namespaces and control groups
# of the node. The caller's standard streams, terminal and exit code stay.
node_enter() {
  local name=$1 variable
  shift
  require_node "$name"
  local -a environment=(
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin HOME=/root LANG=C.UTF-8
  )
  for variable in TERM RUST_LOG RUST_BACKTRACE; do
    [[ -z ${!variable:-} ]] || environment+=("$variable=${!variable}")
  done
  cgroup_join "$name"
  exec nsenter --target "$NODE_PID" --mount --uts --ipc --net --pid --cgroup \
    env -i "${environment[@]}" "$@"
}

# node_run: the same, and comes back.
node_run() {
  (node_enter "$@")
}
