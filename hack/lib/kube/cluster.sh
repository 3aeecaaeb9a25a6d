# shellcheck shell=bash
# A cluster's life: nodes, certificates, the control plane, kubelets. Each step leaves
# alone what is as it should be. Sourced, never run.
# Needs common.sh, node.sh, network.sh, image.sh, kube/*.sh.

# cluster_release: of the cluster that runs.
cluster_release() {
  cat "$KUBE_STATE/release" 2>/dev/null || die "no cluster runs in lab $STERNA_LAB: hack/kube up"
}

# cluster_nodes: those that run pods.
cluster_nodes() {
  local name
  while read -r name; do
    [[ ! -e $STERNA_RUN/$name/kubelet ]] || echo "$name"
  done < <(node_names)
}

kubectl() {
  KUBECONFIG=$KUBECONFIG_ADMIN "$KUBE_STATE/programs/kubectl" "$@"
}

# cluster_boot RELEASE NODE-OPTIONS... -- NODE...: nodes with Kubernetes in them.
cluster_boot() {
  local release=$1 name
  local -a options=()
  shift
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  for name in $CONTROL "$@"; do
    ! node_ready "$name" || [[ -x /proc/$NODE_PID/root/opt/kubernetes/kubelet ]] ||
      die "node $name runs, but not for a cluster: take it down first (hack/nodes down $name)"
  done
  "$HACK_DIR/nodes" up "${options[@]}" --share "$(programs_path kubernetes "$release"):/opt/kubernetes" "$CONTROL" "$@"
}

# control_up RELEASE: certificates and the control plane, until that answers.
control_up() {
  local service
  if [[ ! -e $KUBE_STATE/release ]]; then
    rm -rf "$KUBE_STATE"
    mkdir -m 700 "$KUBE_STATE"
    pki_make "$KUBE_STATE/pki" "$(node_address "$CONTROL")" "$API_SERVICE" 127.0.0.1
    kubeconfig "$KUBE_STATE/pki" admin "$(api_server)" >"$KUBECONFIG_ADMIN"
    ln -s "$(programs_path kubernetes "$1")" "$KUBE_STATE/programs"
    echo "$1" >"$KUBE_STATE/release"
  fi
  configure_control
  for service in etcd kube-apiserver; do
    node_run "$CONTROL" node-service start "$service"
  done
  wait_for "$CONTROL" kube-apiserver "the API server" kubectl get --raw /readyz
  for service in kube-controller-manager kube-scheduler; do
    node_run "$CONTROL" node-service start "$service"
  done
}

# node_bare NODE: as one that never heard of Sterna.
node_bare() {
  require_node "$1"
  [[ -L /proc/$NODE_PID/root/usr/local/bin/sternad ]] || return 0
  # shellcheck disable=SC2016 # the last line of the file, not a variable
  node_run "$1" sh -euc '
    umount /opt/sterna/bin /var/lib/sterna
    rm -r /opt/sterna /etc/sterna /var/lib/sterna
    rm /usr/local/bin/containerd-shim-sterna-v1 /usr/local/bin/sternad /usr/local/bin/sterna
    sed -i "/runtimes\.sterna\]/,\$d" /etc/containerd/config.toml
    node-service restart containerd'
}

# node_join NODE: what makes a node one of the cluster.
node_join() {
  local node=$1 ours image service
  require_node "$node"
  ours=/proc/$NODE_PID/root/etc/kubernetes/ca.crt
  [[ ! -e $ours ]] || cmp -s "$ours" "$KUBE_STATE/pki/ca.crt" ||
    die "node $node is of a cluster whose control plane is gone: hack/kube down, and up again"
  configure_node "$node"
  touch "$STERNA_RUN/$node/kubelet"
  for image in pause coredns; do
    import_image "$node" k8s.io $image
  done
  for service in kubelet kube-proxy; do
    node_run "$node" node-service start $service
  done
}

# wait_for NODE SERVICE WHAT COMMAND...: until the command succeeds; says why not,
# should the service end.
wait_for() {
  local node=$1 service=$2 what=$3 started
  shift 3
  started=$(now_ms)
  until "$@" >/dev/null 2>&1; do
    if ! node_run "$node" node-service status "$service" >/dev/null || (($(now_ms) - started > 120000)); then
      node_run "$node" tail -n 15 "/var/log/$service.log" >&2
      die "$what did not come up (above: the end of hack/nodes log $node $service)"
    fi
    sleep 0.3
  done
}

# cluster_wait NODE...: until pods run on all nodes and names resolve.
cluster_wait() {
  local node
  for node in "$@"; do
    wait_for "$node" kubelet "the kubelet of $node" kubectl get node "$node"
  done
  kubectl wait --for=condition=Ready "${@/#/node/}" --timeout=120s >/dev/null ||
    die "not all nodes are ready: hack/kube kubectl describe nodes"
  kubectl -n kube-system rollout status deployment/coredns --timeout=120s >/dev/null ||
    die "CoreDNS did not come up: hack/kube kubectl -n kube-system describe pods"
}
