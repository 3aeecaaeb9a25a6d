# shellcheck shell=bash
# shellcheck disable=SC2034 # used where this is sourced
# The files of a cluster in its nodes: services for node-service, the kubelet's
# configuration, pod networks. Sourced, never run.
# Needs common.sh, network.sh, node.sh, kube/pki.sh.

# The node with the control plane, which runs no pods.
CONTROL=control
KUBE_STATE=$STERNA_RUN/$CONTROL/kube
KUBECONFIG_ADMIN=$KUBE_STATE/admin.conf

# Pods have addresses of their own for each lab and node, routed between nodes (and to
# this machine). Services exist inside of nodes only: the same for all labs.
POD_PREFIX=10.$((100 + STERNA_LAB))
SERVICE_NETWORK=10.96.0.0/16
API_SERVICE=10.96.0.1
DNS_SERVICE=10.96.0.10

pod_network() { echo "$POD_PREFIX.$(<"$STERNA_RUN/$1/slot").0/24"; }
node_address() { slot_address "$(<"$STERNA_RUN/$1/slot")"; }
api_server() { echo "https://$(node_address "$CONTROL"):6443"; }

# node_file NODE PATH: writes standard input there; says whether that changed it.
node_file() {
  local file
  require_node "$1"
  file=/proc/$NODE_PID/root$2
  mkdir -p "${file%/*}"
  cat >"$file.new"
  chmod 600 "$file.new"
  mv "$file.new" "$file"
}

# node_unit NODE NAME COMMAND...: a service for node-service.
node_unit() {
  local node=$1 name=$2
  shift 2
  { printf 'command=(' && printf '%q ' "$@" && echo ')'; } | node_file "$node" "/etc/node-services/$name"
}

# configure_control: etcd and the control plane, each as a service.
configure_control() {
  local address file pki=/etc/kubernetes
  address=$(node_address $CONTROL)
  for file in "$KUBE_STATE"/pki/*; do
    node_file $CONTROL "$pki/${file##*/}" <"$file"
  done
  for file in controller-manager scheduler; do
    kubeconfig "$KUBE_STATE/pki" $file "$(api_server)" | node_file $CONTROL "$pki/$file.conf"
  done
  # A machine that crashes takes the cluster along: nothing has to reach the disk.
  node_unit $CONTROL etcd /opt/kubernetes/etcd --data-dir=/var/lib/etcd --unsafe-no-fsync --log-level=warn
  # Webhooks are called at their pods' addresses, as no kube-proxy runs here.
  node_unit $CONTROL kube-apiserver /opt/kubernetes/kube-apiserver \
    --etcd-servers=http://127.0.0.1:2379 --advertise-address="$address" --secure-port=6443 \
    --tls-cert-file=$pki/apiserver.crt --tls-private-key-file=$pki/apiserver.key --client-ca-file=$pki/ca.crt \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged \
    --service-cluster-ip-range=$SERVICE_NETWORK --enable-aggregator-routing \
    --service-account-issuer=https://kubernetes.default.svc.cluster.local \
    --service-account-key-file=$pki/service-account.pub --service-account-signing-key-file=$pki/service-account.key \
    --kubelet-client-certificate=$pki/apiserver-kubelet.crt --kubelet-client-key=$pki/apiserver-kubelet.key \
    --kubelet-preferred-address-types=InternalIP \
    --requestheader-client-ca-file=$pki/front-proxy-ca.crt --requestheader-allowed-names=front-proxy \
    --requestheader-extra-headers-prefix=X-Remote-Extra- --requestheader-group-headers=X-Remote-Group \
    --requestheader-username-headers=X-Remote-User \
    --proxy-client-cert-file=$pki/front-proxy.crt --proxy-client-key-file=$pki/front-proxy.key
  node_unit $CONTROL kube-controller-manager /opt/kubernetes/kube-controller-manager \
    --kubeconfig=$pki/controller-manager.conf --leader-elect=false --use-service-account-credentials \
    --service-account-private-key-file=$pki/service-account.key --root-ca-file=$pki/ca.crt \
    --cluster-signing-cert-file=$pki/ca.crt --cluster-signing-key-file=$pki/ca.key
  node_unit $CONTROL kube-scheduler /opt/kubernetes/kube-scheduler \
    --kubeconfig=$pki/scheduler.conf --leader-elect=false
}

# configure_node NODE: kubelet, kube-proxy and the pods' network.
configure_node() {
  local node=$1 pki=$KUBE_STATE/pki
  [[ -e $pki/kubelet-$node.crt ]] || issue "$pki" "kubelet-$node" "/O=system:nodes/CN=system:node:$node"
  node_file "$node" /etc/kubernetes/ca.crt <"$pki/ca.crt"
  kubeconfig "$pki" "kubelet-$node" "$(api_server)" | node_file "$node" /etc/kubernetes/kubelet.conf
  kubeconfig "$pki" proxy "$(api_server)" | node_file "$node" /etc/kubernetes/proxy.conf
  kubelet_config | node_file "$node" /etc/kubernetes/kubelet.yaml
  pod_network_config "$(pod_network "$node")" | node_file "$node" /etc/cni/net.d/10-sterna.conflist
  node_unit "$node" kubelet /opt/kubernetes/kubelet --config=/etc/kubernetes/kubelet.yaml \
    --kubeconfig=/etc/kubernetes/kubelet.conf --hostname-override="$node" --node-ip="$(node_address "$node")"
  # The limits of connection tracking are the machine's, and not ours to change.
  node_unit "$node" kube-proxy /opt/kubernetes/kube-proxy --kubeconfig=/etc/kubernetes/proxy.conf \
    --hostname-override="$node" --proxy-mode=iptables --cluster-cidr="$POD_PREFIX.0.0/16" \
    --conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0
}

# Nodes share one machine: nothing is evicted for a disk or memory that is not theirs.
kubelet_config() {
  cat <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: { enabled: false }
  webhook: { enabled: true }
  x509: { clientCAFile: /etc/kubernetes/ca.crt }
authorization: { mode: Webhook }
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
enforceNodeAllocatable: []
localStorageCapacityIsolation: false
evictionHard: { memory.available: 1Mi }
imageGCHighThresholdPercent: 100
makeIPTablesUtilChains: false
clusterDomain: cluster.local
clusterDNS: [$DNS_SERVICE]
resolvConf: /etc/resolv.conf
END
}

pod_network_config() {
  cat <<END
{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {
      "type": "ptp",
      "ipam": {
        "type": "host-local",
        "dataDir": "/run/cni",
        "ranges": [[{ "subnet": "$1" }]],
        "routes": [{ "dst": "0.0.0.0/0" }]
      }
    },
    { "type": "portmap", "capabilities": { "portMappings": true } }
  ]
}
END
}

# route_pods NODE...: to the pods of each from all others, and from this machine.
route_pods() {
  local node other
  for node in "$@"; do
    ip route replace "$(pod_network "$node")" via "$(node_address "$node")" dev "$BRIDGE"
    for other in "$@" $CONTROL; do
      [[ $other != "$node" ]] || continue
      require_node "$other"
      nsenter --net="/proc/$NODE_PID/ns/net" \
        ip route replace "$(pod_network "$node")" via "$(node_address "$node")"
    done
  done
}
