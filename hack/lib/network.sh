# shellcheck shell=bash
# The network of the nodes: one bridge on the machine, a veth pair to each node,
# and in the node another bridge, br0, which has the node's address. What is
# plugged into any br0 is on one layer 2 network with all nodes.
# Sourced, never run. Needs common.sh.

BRIDGE=${STERNA_BRIDGE:-sterna$STERNA_LAB}
SUBNET=${STERNA_SUBNET:-10.77.$STERNA_LAB.0/24}
PREFIX=${SUBNET%.0/24}
HOST_ADDRESS=$PREFIX.1

# Who has which address, so that nothing has to be asked twice:
#   .1          the machine
#   .11 - .18   the nodes, by slot
#   .20 - .127  free: containers that are given an address by hand
#   .128 - .255 containers plugged in by CNI, 16 addresses for each slot
SLOTS=8

slot_address() { echo "$PREFIX.$((11 + $1))"; }
slot_range_start() { echo "$PREFIX.$((128 + 16 * $1))"; }
slot_range_end() { echo "$PREFIX.$((128 + 16 * $1 + ($1 == SLOTS - 1 ? 14 : 15)))"; }
slot_link() { echo "$BRIDGE-$1"; }

# mac_of ADDRESS KIND: locally administered, the same for the same address always.
mac_of() {
  local -a byte
  IFS=. read -ra byte <<<"$1"
  printf '02:%02x:%02x:%02x:%02x:%02x\n' "$2" "${byte[@]}"
}

# netns_link ADDRESS: the node's end of the pair of a network namespace with it.
netns_link() { echo "v$(mac_of "$1" 2 | cut -d: -f3- | tr -d :)"; }

# /sys may show another network namespace than ours; ip asks the kernel.
has_link() { ip link show dev "$1" >/dev/null 2>&1; }

check_subnet() {
  [[ $SUBNET == *.*.*.0/24 ]] || die "STERNA_SUBNET is '$SUBNET': it has to be a /24, such as 10.77.0.0/24"
  ((${#BRIDGE} <= 13)) || die "STERNA_BRIDGE is '$BRIDGE': at most 13 characters"
}

bridge_up() {
  need ip iproute2
  if ! has_link "$BRIDGE"; then
    local other
    other=$(ip -o -4 address show to "$SUBNET" | head -n 1)
    [[ -z $other ]] || die "$SUBNET is in use on this machine ($other): set STERNA_SUBNET or STERNA_LAB"
    ip link add "$BRIDGE" type bridge forward_delay 0 mcast_snooping 0
  fi
  ip link set "$BRIDGE" address "$(mac_of "$HOST_ADDRESS" 0)" up
  ip address replace "$HOST_ADDRESS/24" dev "$BRIDGE"
  allow_forwarding
}

bridge_down() {
  ! has_link "$BRIDGE" || ip link delete "$BRIDGE"
  forbid_forwarding
}

# Where bridged frames go through the machine's packet filter and that drops what
# it does not know (Docker sets such a policy), our frames need a rule.
allow_forwarding() {
  local switch=/proc/sys/net/bridge/bridge-nf-call-iptables
  [[ -r $switch && $(<"$switch") == 1 ]] || return 0
  command -v iptables >/dev/null || return 0
  local -a rule=(FORWARD -i "$BRIDGE" -o "$BRIDGE" -j ACCEPT)
  iptables -w -S FORWARD 2>/dev/null | grep -qv '^-P FORWARD ACCEPT$' || return 0
  iptables -w -C "${rule[@]}" 2>/dev/null || iptables -w -I "${rule[@]}"
}

forbid_forwarding() {
  command -v iptables >/dev/null || return 0
  while iptables -w -D FORWARD -i "$BRIDGE" -o "$BRIDGE" -j ACCEPT 2>/dev/null; do :; done
}

# node_link_up PID SLOT: joins the network namespace of PID to the bridge. What an
# interrupted run has left of it is made anew.
node_link_up() {
  local pid=$1 slot=$2 link address
  link=$(slot_link "$slot")
  address=$(slot_address "$slot")
  if has_link "$link"; then
    ip link delete "$link"
    nsenter --net="/proc/$pid/ns/net" ip link delete br0 2>/dev/null || true
  fi
  ip link add "$link" type veth peer name uplink netns "$pid"
  ip link set "$link" master "$BRIDGE" up
  nsenter --net="/proc/$pid/ns/net" ip -batch - <<END
link set lo up
link add br0 type bridge forward_delay 0 mcast_snooping 0
link set br0 address $(mac_of "$address" 1)
link set uplink master br0 up
link set br0 up
address add $address/24 dev br0
route add default via $HOST_ADDRESS
END
  # shellcheck disable=SC2016 # for the inner shell
  # Per network namespace: frames inside a node need no packet filter.
  nsenter --net="/proc/$pid/ns/net" sh -c \
    'for f in /proc/sys/net/bridge/bridge-nf-call-*; do [ ! -w "$f" ] || echo 0 >"$f"; done'
}

# node_link_down SLOT: the pair usually went with the node's network namespace.
node_link_down() {
  local link
  link=$(slot_link "$1")
  ! has_link "$link" || ip link delete "$link" 2>/dev/null || ! has_link "$link"
}
