# shellcheck shell=bash
# shellcheck disable=SC2034 # used where this is sourced
# hack/bench shim. Sourced, never run. Needs what hack/bench sources, and its
# variables.

containers=50 settle=20

shim_option() {
  OPTION_WORDS=2
  case $1 in
    --containers) containers=${2:?--containers needs a value} ;;
    --settle) settle=${2:?--settle needs a value} ;;
    *) return 1 ;;
  esac
}

shim_check() {
  runs=${runs:-30}
  ((runs > 1)) || die "--runs $runs: for a spread it takes two"
  [[ $containers =~ ^[1-9][0-9]*$ ]] || die "--containers $containers: how many?"
  [[ $settle =~ ^[0-9]+$ ]] || die "--settle $settle: how many seconds?"
}

shim_bench() {
  local runtime count
  local -a options=()
  "$HACK_DIR/nodes" up --bin "$BIN" a
  "$HACK_DIR/images" import a busybox
  # ctr asks for CPU shares, which a cgroup v2 node without controllers lacks.
  [[ $(<"$STERNA_RUN/a/cgroup") == v1 ]] || options+=(--cpu-shares 0)
  mkdir "$WORK/moves"
  for count in 1 "$containers"; do
    for runtime in sterna runc; do
      say "memory of $count at rest: $runtime"
      in_node memory "$runtime" "$count" "$settle" "${options[@]}" >>"$WORK/moves/memory"
    done
  done
  say "times, $runs of each"
  in_node durations "$runs" "${options[@]}" >"$WORK/moves/times"
}

# in_node ARGUMENT...: without a step over the node's border in what is timed.
in_node() {
  on a bash -s -- "$@" <"$LIB_DIR/shim-timer"
}
