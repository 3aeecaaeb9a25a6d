# shellcheck shell=bash
# Nodes that trust each other. Sourced, never run. Needs common.sh.

PKI=/etc/sterna/pki

# on NODE COMMAND...: in the node.
on() {
  local node=$1
  shift
  "$HACK_DIR/nodes" exec "$node" -- "$@"
}

# pair NODE...: an authority on the first, a certificate and sternad on each.
pair() {
  local first=$1 node
  on "$first" test -e $PKI/ca.key || on "$first" sternad init-ca >/dev/null
  for node in "$@"; do
    on "$node" test -e $PKI/node.crt || enroll "$first" "$node"
    on "$node" test -e /etc/sterna/sternad.toml || sternad_config | on "$node" tee /etc/sterna/sternad.toml >/dev/null
    "$HACK_DIR/nodes" service "$node" restart sternad
  done
  say "sternad runs on $*"
}

# enroll AUTHORITY NODE: as an operator would, with a copy where that has scp.
enroll() {
  local authority=$1 node=$2
  if [[ $node == "$authority" ]]; then
    on "$node" sternad enroll "$node" >/dev/null
    return
  fi
  on "$authority" sternad enroll "$node" --out "/root/$node" >/dev/null
  on "$node" mkdir -p -m 700 $PKI
  on "$authority" tar -C "/root/$node" -c . | on "$node" tar -C $PKI -x
  on "$authority" rm -r "/root/$node"
}

# Nodes find each other by name, in /etc/hosts.
sternad_config() {
  printf '[network]\nbridge = "br0"\n'
}

# wait_settled NODE: until all memory is in place, and the container can go on.
wait_settled() {
  local try
  for ((try = 0; try < 600; try++)); do
    [[ ! $(on "$1" sterna ps --json) =~ '"state": "running"' ]] || return 0
    sleep 0.1
  done
  on "$1" sterna ps >&2
  die "the container is not running on $1 a minute after it arrived (above: sterna ps)"
}
