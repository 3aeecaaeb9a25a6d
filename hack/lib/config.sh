# shellcheck shell=bash
# The files in /etc of a node. Sourced, never run. Needs common.sh, network.sh.

PAUSE_IMAGE=localhost/pause:1

# write_config UPPER NAME SLOT FLAVOUR
write_config() {
  local etc=$1/etc name=$2 slot=$3 flavour=$4
  mkdir -p "$etc/containerd" "$etc/cni/net.d" "$1/usr/local/sbin"
  echo "$name" >"$etc/hostname"
  tr -d - </proc/sys/kernel/random/uuid >"$etc/machine-id"
  # Nothing outside is looked up: an own, empty one keeps the machine's out.
  echo '# no name server: /etc/hosts has the nodes' >"$etc/resolv.conf"
  hosts_file >"$etc/hosts"
  containerd_config "$flavour" >"$etc/containerd/config.toml"
  cni_config "$slot" >"$etc/cni/net.d/10-sterna.conflist"
  install -m 755 "$LIB_DIR/node-service" "$LIB_DIR/systemctl" "$1/usr/local/sbin/"
}

# containerd 1.7 has one CRI plugin and version 2 of the file, 2.x has it split in
# two and version 3. For the CRI our runtime has the type of runc's, with another
# path: with any other type containerd would drop the typed options.
containerd_config() {
  local version=3 runtime=io.containerd.cri.v1.runtime plugins='bin_dirs = ["/usr/lib/cni"]'
  if [[ $1 == trixie ]]; then
    version=2 runtime=io.containerd.grpc.v1.cri plugins='bin_dir = "/usr/lib/cni"'
  fi
  cat <<END
version = $version
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
  address = "/run/containerd/containerd.sock"

END
  if [[ $version == 3 ]]; then
    cat <<END
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "$PAUSE_IMAGE"

END
  fi
  cat <<END
[plugins."$runtime"]
  disable_apparmor = true
  # Machines without CAP_SYS_RESOURCE cannot lower an oom_score_adj.
  restrict_oom_score_adj = true
END
  [[ $version == 3 ]] || echo "  sandbox_image = \"$PAUSE_IMAGE\""
  cat <<END
[plugins."$runtime".cni]
  $plugins
  conf_dir = "/etc/cni/net.d"
[plugins."$runtime".containerd]
  default_runtime_name = "runc"
[plugins."$runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."$runtime".containerd.runtimes.runc.options]
  SystemdCgroup = false
[plugins."$runtime".containerd.runtimes.sterna]
  runtime_type = "io.containerd.runc.v2"
  runtime_path = "/usr/local/bin/containerd-shim-sterna-v1"
  pod_annotations = ["sterna.dev/*", "architect.loopholelabs.io/*"]
  container_annotations = ["sterna.dev/*"]
[plugins."$runtime".containerd.runtimes.sterna.options]
  SystemdCgroup = false
END
}

cni_config() {
  cat <<END
{
  "cniVersion": "0.4.0",
  "name": "sterna",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "br0",
      "ipam": {
        "type": "host-local",
        "dataDir": "/run/cni",
        "ranges": [[{
          "subnet": "$SUBNET",
          "rangeStart": "$(slot_range_start "$1")",
          "rangeEnd": "$(slot_range_end "$1")",
          "gateway": "$HOST_ADDRESS"
        }]],
        "routes": [{ "dst": "0.0.0.0/0" }]
      }
    },
    { "type": "portmap", "snat": true, "capabilities": { "portMappings": true } }
  ]
}
END
}

# hosts_file: every node by name, and the machine itself.
hosts_file() {
  local name
  printf '127.0.0.1 localhost\n::1 localhost ip6-localhost\n%s host\n' "$HOST_ADDRESS"
  while read -r name; do
    printf '%s %s\n' "$(slot_address "$(<"$STERNA_RUN/$name/slot")")" "$name"
  done < <(node_names)
}

# update_hosts: tells all running nodes of each other.
update_hosts() {
  local name hosts
  hosts=$(hosts_file)
  while read -r name; do
    ! node_ready "$name" || nsenter --mount="/proc/$NODE_PID/ns/mnt" sh -c 'cat >/etc/hosts' <<<"$hosts"
  done < <(node_names)
}
