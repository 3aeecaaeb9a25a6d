# shellcheck shell=bash
# shellcheck disable=SC2034 # used where this is sourced
# hack/bench migrate. Every move leaves a directory in WORK/moves with a small file
# for each fact, which bench.py reads:
#   way memory write_rate run   what it was
#   total_us                    from the command to its end
#   link_bytes                  what went out of the source node meanwhile
#   mark result                 what the client saw, as sterna-load says it
#   migration                   what sterna migrate --json says
#   steps                       NAME MICROSECONDS of the stock way
# Sourced, never run. Needs what hack/bench sources, and its variables.

memories=1G rates=20000/s max_blackout=''

migrate_option() {
  OPTION_WORDS=2
  case $1 in
    --memory) memories=${2:?--memory needs a value} ;;
    --write-rate) rates=${2:?--write-rate needs a value} ;;
    --max-blackout) max_blackout=${2:?--max-blackout needs a value} ;;
    --sweep) memories=64M,1G,4G rates=0/s,50M/s,max OPTION_WORDS=1 ;;
    *) return 1 ;;
  esac
}

migrate_check() {
  local value
  runs=${runs:-3}
  for value in ${memories//,/ }; do
    check_memory "$value"
  done
  for value in ${rates//,/ }; do
    check_rate "$value"
  done
}

migrate_bench() {
  local memory rate run way
  "$HACK_DIR/nodes" up --bin "$BIN" a b
  pair a b
  # On both, as a cluster has them: neither way has to copy the image.
  "$HACK_DIR/images" import a valkey
  "$HACK_DIR/images" import b valkey
  mkdir "$WORK/moves"
  for memory in ${memories//,/ }; do
    copy_plainly "$memory"
    for rate in ${rates//,/ }; do
      for ((run = 1; run <= runs; run++)); do
        for way in sterna stock; do
          say "$memory, writes $rate, run $run of $runs: $way"
          one_move "$way" "$memory" "$rate" "$run"
        done
      done
    done
  done
}

one_move() {
  local way=$1 memory=$2 rate=$3 run=$4 before
  local runtime=io.containerd.sterna.v1
  local -a client=(--memory "$memory" --value-size "$(value_size "$memory")" --write-rate "$rate")
  if [[ $way == stock ]]; then
    # Its outage outlasts TCP's patience: the client connects anew, every 5 ms.
    runtime=io.containerd.runc.v2 client+=(--reconnect)
  fi
  new_move "$way" "$memory" "$rate" "$run"
  valkey_start a "$runtime"
  [[ $way != stock ]] || stock_prepare a b
  load_start "${client[@]}"
  load_expect ready
  load_ask mark mark
  before=$(link_bytes a)
  "move_$way" "$rate"
  echo $(($(link_bytes a) - before)) >"$MOVE/link_bytes"
  # The client has to be answered before it can say how long that took.
  sleep 2
  load_ask mark mark
  echo "$LOAD_EVENT" >"$MOVE/mark"
  load_ask stop result
  echo "$LOAD_EVENT" >"$MOVE/result"
  wait "$LOAD_CHILD" || die "the client failed: $(<"$LOAD_ERRORS")"
  valkey_remove a
  valkey_remove b
  [[ $way != stock ]] || stock_clean a b
}

# new_move WAY MEMORY RATE RUN: sets MOVE to its directory.
new_move() {
  MOVE=$(mktemp -d "$WORK/moves/XXXXXX")
  echo "$1" >"$MOVE/way"
  echo "$2" >"$MOVE/memory"
  echo "$3" >"$MOVE/write_rate"
  echo "$4" >"$MOVE/run"
}

# move_sterna RATE: one that is given up is a result, too.
move_sterna() {
  local began=${EPOCHREALTIME/[.,]/}
  local -a options=()
  [[ -z $max_blackout && $1 == max ]] && options=(--max-blackout 2s)
  [[ -z $max_blackout ]] || options=(--max-blackout "$max_blackout")
  on a sterna migrate valkey --to b --json "${options[@]}" >"$MOVE/migration" ||
    say "not moved: $(tail -n 1 "$MOVE/migration")"
  echo $((${EPOCHREALTIME/[.,]/} - began)) >"$MOVE/total_us"
  [[ $(<"$MOVE/migration") != *'"outcome":"migrated"'* ]] || wait_settled b
}

move_stock() {
  local receiver
  stock_receive b >"$MOVE/steps" &
  receiver=$!
  wait_listening b "$STOCK_PORT"
  stock_send a "$("$HACK_DIR/nodes" ip b)" >"$MOVE/steps.source"
  wait "$receiver" || die "the container could not be restored on b: see 'hack/nodes log b containerd'"
  cat "$MOVE/steps.source" >>"$MOVE/steps"
}

# copy_plainly MEMORY: as many bytes over the same link, by nothing but TCP.
copy_plainly() {
  local receiver
  new_move plain "$1" '' 1
  on b python3 -c "$STOCK_LISTEN" "$STOCK_PORT" >/dev/null &
  receiver=$!
  wait_listening b "$STOCK_PORT"
  # shellcheck disable=SC2016 # for the node's shell
  on a bash -c '
    began=${EPOCHREALTIME/[.,]/}
    dd if=/dev/zero bs=1M count="$1" iflag=count_bytes status=none >"/dev/tcp/$2/$3"
    echo $((${EPOCHREALTIME/[.,]/} - began))' \
    copy "$1" "$("$HACK_DIR/nodes" ip b)" "$STOCK_PORT" >"$MOVE/total_us"
  wait "$receiver"
}

# wait_listening NODE PORT
wait_listening() {
  local try port
  printf -v port ':%04X 00000000:0000 0A' "$2"
  for ((try = 0; try < 250; try++)); do
    ! on "$1" grep -q "$port\|${port/00000000:/00000000000000000000000000000000:}" /proc/net/tcp /proc/net/tcp6 || return 0
    sleep 0.02
  done
  die "nothing listens on port $2 of node $1"
}

# link_bytes NODE: what has gone out of it so far.
link_bytes() {
  on "$1" cat /sys/class/net/uplink/statistics/tx_bytes
}
