# shellcheck shell=bash
# shellcheck disable=SC2034 # used where this is sourced
# What every script in hack/ needs: messages, settings, locks, missing tools.
# Sourced, never run.

HACK_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REPO_DIR=$(dirname "$HACK_DIR")
LIB_DIR=$HACK_DIR/lib

# Where built things live between runs: root file systems, images.
STERNA_CACHE=${STERNA_CACHE:-/var/cache/sterna}
# Several sets of nodes can run beside each other: each lab (0 to 99) has its own
# bridge, addresses, state and control groups.
STERNA_LAB=${STERNA_LAB:-0}
# What running nodes are known by: pid files and settings, gone after a reboot.
STERNA_RUN=${STERNA_RUN:-/run/sterna-nodes/$STERNA_LAB}
# What nodes write to disk: overlay uppers, containerd's store. Has to be on a
# file system that overlayfs accepts as an upper layer (ext4, xfs, btrfs, tmpfs).
STERNA_DISK=${STERNA_DISK:-/var/lib/sterna-nodes/$STERNA_LAB}

PROGRAM=${0##*/}

say() { printf '%s: %s\n' "$PROGRAM" "$*" >&2; }
warn() { printf '%s: warning: %s\n' "$PROGRAM" "$*" >&2; }
die() {
  printf '%s: error: %s\n' "$PROGRAM" "$*" >&2
  exit 1
}

require_root() {
  [[ $EUID -eq 0 ]] || die "has to run as root (it makes namespaces, mounts and network devices)"
}

# need COMMAND PACKAGE: installs PACKAGE with apt-get when COMMAND is missing.
need() {
  command -v "$1" >/dev/null || install_package "$2"
}

install_package() {
  local log
  log=$(mktemp)
  if [[ -z ${APT_UPDATED:-} ]]; then
    say "updating the package lists (to install $1)"
    apt-get update >"$log" 2>&1 || {
      cat "$log" >&2
      die "apt-get update failed: install '$1' by hand and try again"
    }
    APT_UPDATED=1
  fi
  say "installing $1"
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$1" >"$log" 2>&1 || {
    cat "$log" >&2
    die "cannot install '$1': install it by hand and try again"
  }
  rm -f "$log"
  hash -r
}

# with_lock FILE FUNCTION ARGUMENT...: one at a time on this machine; waits its
# turn. What the function leaves running must not inherit the lock: LOCK_FD.
with_lock() {
  local file=$1
  shift
  mkdir -p "${file%/*}"
  exec {LOCK_FD}>"$file"
  flock -w 1800 "$LOCK_FD" || die "another run has held $file for half an hour: 'fuser -v $file' shows which"
  "$@"
  exec {LOCK_FD}>&-
}

# The time in milliseconds, for progress lines.
now_ms() {
  local t=$EPOCHREALTIME
  echo $((${t/[.,]/} / 1000))
}

# process_start PID: when the process started, in clock ticks since boot. With
# the pid it names a process for good, as pids are used again. Fails for the dead.
process_start() {
  local stat
  read -r stat 2>/dev/null <"/proc/$1/stat" || return 1
  stat=${stat##*) }
  local -a field
  read -ra field <<<"$stat"
  [[ ${field[0]} != Z ]] || return 1
  echo "${field[19]}"
}
