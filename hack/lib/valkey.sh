# shellcheck shell=bash
# The workload of the demo and the benchmarks: a Valkey with an address of its
# own, and a client on the machine's side of the bridge that fills it, writes to
# it, probes it and checks it. Sourced, never run.
# Needs common.sh, network.sh, pair.sh (on), and BIN: the directory of our programs.

VALKEY_ADDRESS=$PREFIX.50
VALKEY_IMAGE=docker.io/valkey/valkey:9
VALKEY_PORT=6379

# valkey_start NODE RUNTIME: runs it as the container 'valkey'.
valkey_start() {
  local -a options=(--runtime "$2" --with-ns network:/run/netns/valkey --log-uri file:///var/log/valkey.log)
  # ctr asks for CPU shares, which a cgroup v2 node without controllers lacks.
  [[ $(<"$STERNA_RUN/$1/cgroup") == v1 ]] || options+=(--cpu-shares 0)
  "$HACK_DIR/nodes" netns "$1" valkey "$VALKEY_ADDRESS/24"
  on "$1" ctr run -d "${options[@]}" "$VALKEY_IMAGE" valkey \
    valkey-server --save '' --protected-mode no --bind 0.0.0.0
  valkey_wait || die "Valkey does not answer on $VALKEY_ADDRESS: see /var/log/valkey.log on node $1"
}

# valkey_remove NODE: whatever there is of it. Sterna removes the address itself,
# a little after the container has gone.
valkey_remove() {
  # shellcheck disable=SC2016 # for the inner shell
  on "$1" sh -c '
    ctr tasks delete --force valkey
    ctr containers delete valkey
    ip -n valkey link delete eth0
    ip netns delete valkey
    for try in $(seq 250); do
      ip link show dev "$1" || break
      sleep 0.02
    done' sh "$(netns_link "$VALKEY_ADDRESS")" >/dev/null 2>&1
}

# valkey_wait: until it accepts connections.
valkey_wait() {
  local try
  for ((try = 0; try < 250; try++)); do
    ! (exec 3<>"/dev/tcp/$VALKEY_ADDRESS/$VALKEY_PORT") 2>/dev/null || return 0
    sleep 0.02
  done
  return 1
}

# value_size MEMORY: small values for little memory, so that there are many keys;
# larger ones for much, so that Valkey's own overhead stays small.
value_size() {
  case $1 in
    *G) ((${1%G} > 2)) && echo 4096 && return ;;
    *M) ((${1%M} > 2048)) && echo 4096 && return ;;
  esac
  echo 1024
}

# check_memory MEMORY, check_rate RATE: as sterna-load reads them.
check_memory() { [[ $1 =~ ^[1-9][0-9]*[MG]$ ]] || die "--memory $1: an amount is written 64M or 1G"; }
check_rate() { [[ $1 == max || $1 =~ ^[0-9]+[KMG]?/s$ ]] || die "--write-rate $1: a rate is written 20000/s, 50M/s or max"; }

# load_start OPTION...: starts the client in the background: LOAD_IN, LOAD_OUT.
load_start() {
  LOAD_ERRORS=$WORK/load.errors
  coproc LOAD { exec "$BIN/sterna-load" run --address "$VALKEY_ADDRESS:$VALKEY_PORT" "$@" 2>"$LOAD_ERRORS"; }
  LOAD_CHILD=$LOAD_PID
  exec {LOAD_OUT}<&"${LOAD[0]}" {LOAD_IN}>&"${LOAD[1]}"
}

# load_expect EVENT: waits for it; sets LOAD_EVENT to its line.
load_expect() {
  while IFS= read -r -u "$LOAD_OUT" LOAD_EVENT; do
    [[ $LOAD_EVENT != *'"event":"'"$1"'"'* ]] || return 0
  done
  cat "$LOAD_ERRORS" >&2
  die "the client ended before its time (above: what it said)"
}

# load_ask COMMAND EVENT: tells it something and waits for the answer.
load_ask() {
  echo "$1" >&"$LOAD_IN"
  load_expect "$2"
}

# load_kill: for a script that ends early.
load_kill() {
  [[ -z ${LOAD_CHILD:-} ]] || kill "$LOAD_CHILD" 2>/dev/null || true
}
