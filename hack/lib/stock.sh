# shellcheck shell=bash
# Moving a container without Sterna, as well as it can be done with what comes with
# containerd and runc: a checkpoint, a copy of it, a restore. Careful, so that
# nothing is lost: the container is off the network before its checkpoint, and has
# the same address on the other node. Sourced, never run.
# Needs common.sh, network.sh, pair.sh and valkey.sh.

STOCK_PORT=7000
STOCK_IMAGE=localhost/checkpoint:1

# What busybox's nc does, which moves a KiB at a time: one connection to the port,
# to standard output.
STOCK_LISTEN='
import shutil, socket, sys
connection = socket.create_server(("", int(sys.argv[1]))).accept()[0]
shutil.copyfileobj(connection.makefile("rb"), sys.stdout.buffer, 1 << 20)'

# stock_prepare FROM TO: what can be done beforehand: connections may be dumped
# (runc has no flag for it by way of containerd), the destination has the network
# namespace, unplugged, and waits for the copy.
stock_prepare() {
  local node
  for node in "$@"; do
    on "$node" sh -c 'mkdir -p /etc/criu && echo tcp-established >/etc/criu/runc.conf'
  done
  # Meanwhile nobody must hear of a second one with this address.
  "$HACK_DIR/nodes" link "$2" down
  "$HACK_DIR/nodes" netns "$2" valkey "$VALKEY_ADDRESS/24"
  on "$2" ip -n valkey link set eth0 down
  "$HACK_DIR/nodes" link "$2" up
}

# stock_receive TO: prints when the copy was there and when the container ran, in
# microseconds since the epoch.
stock_receive() {
  on "$1" bash -c "$STOCK_RECEIVE" receive "$STOCK_PORT" "$STOCK_IMAGE" "$HOST_ADDRESS" "$STOCK_LISTEN"
}

# The ping is the first frame, which tells the bridges where the address is now.
# shellcheck disable=SC2016 # for the node's shell
STOCK_RECEIVE='
  set -euo pipefail
  python3 -c "$4" "$1" | ctr images import --local --all-platforms --no-unpack - >/dev/null
  echo "copied ${EPOCHREALTIME/[.,]/}"
  ip -n valkey link set eth0 up
  ip netns exec valkey ping -q -c 1 -W 1 "$3" >/dev/null 2>&1 &
  ctr containers restore --live --rw valkey "$2" >/dev/null
  echo "restored ${EPOCHREALTIME/[.,]/}"'

# stock_send FROM ADDRESS: prints when it began and had the checkpoint.
stock_send() {
  on "$1" bash -c "$STOCK_SEND" send "$2" "$STOCK_PORT" "$STOCK_IMAGE" </dev/null
}

# shellcheck disable=SC2016 # for the node's shell
STOCK_SEND='
  set -euo pipefail
  echo "began ${EPOCHREALTIME/[.,]/}"
  ip -n valkey link set eth0 down
  ctr containers checkpoint --task --rw valkey "$3"
  echo "checkpointed ${EPOCHREALTIME/[.,]/}"
  ctr images export --all-platforms --skip-manifest-json - "$3" >"/dev/tcp/$1/$2"
  ctr tasks kill --signal KILL valkey'

# stock_clean NODE...: the checkpoint, and what containerd leaves of it.
stock_clean() {
  local node
  for node in "$@"; do
    on "$node" ctr images remove --sync "$STOCK_IMAGE" >/dev/null
    on "$node" sh -c 'rm -rf /tmp/ctrd-checkpoint* /etc/criu/runc.conf'
  done
}
