# shellcheck shell=bash
# Sterna in a cluster without images and chart, as one has it while working on it:
# sternad on every node, the controller beside the control plane. Objects and rights
# are those of the chart. Sourced, never run.
# Needs common.sh, node.sh, pair.sh, kube/*.sh.

STERNA_NAMESPACE=sterna-system
CHART=$REPO_DIR/install/helm/sterna

# sterna_up: also brings newer programs into use.
sterna_up() {
  local node
  local -a names
  mapfile -t names < <(cluster_nodes)
  for node in $CONTROL "${names[@]}"; do
    node_run "$node" test -x /opt/sterna/bin/sternad ||
      die "node $node has no programs of Sterna's: hack/kube up --bin target/release"
  done
  sterna_objects
  for node in "${names[@]}"; do
    account "$node" sternad
    { sternad_config && printf '[kubernetes]\nkubeconfig = "/etc/sterna/sternad.conf"\n'; } |
      node_file "$node" /etc/sterna/sternad.toml
  done
  pair "${names[@]}"
  kubectl label --overwrite node "${names[@]}" sterna.dev/ready=true >/dev/null
  account "$CONTROL" controller
  node_unit "$CONTROL" sterna-controller env KUBECONFIG=/etc/sterna/controller.conf POD_NAMESPACE=$STERNA_NAMESPACE \
    /opt/sterna/bin/sterna-controller run --listen=127.0.0.1:8090
  node_run "$CONTROL" node-service restart sterna-controller
  wait_for "$CONTROL" sterna-controller "sterna-controller" controller_leads
  say "Sterna's controller leads"
}

# sterna_objects: the chart's, but for those that need images.
sterna_objects() {
  local kind
  local -a options=()
  for kind in crds runtimeclasses sternad-rbac controller-rbac; do
    options+=(--show-only "templates/$kind.yaml")
  done
  ensure_programs helm
  kubectl create namespace $STERNA_NAMESPACE --dry-run=client -o yaml | kubectl apply -f - >/dev/null
  "$(programs_path helm)/helm" template sterna "$CHART" --namespace $STERNA_NAMESPACE "${options[@]}" |
    kubectl apply -f - >/dev/null
}

# account NODE NAME: a kubeconfig for one who is to the API server what the chart's
# pods are by their service account.
account() {
  local pki=$KUBE_STATE/pki user=system:serviceaccount:$STERNA_NAMESPACE:sterna-$2
  [[ -e $pki/sterna-$2.crt ]] || issue "$pki" "sterna-$2" "/O=system:serviceaccounts/CN=$user"
  kubeconfig "$pki" "sterna-$2" "$(api_server)" | node_file "$1" "/etc/sterna/$2.conf"
}

controller_leads() {
  local holder
  holder=$(kubectl --namespace $STERNA_NAMESPACE get lease sterna-controller -o 'jsonpath={.spec.holderIdentity}') &&
    [[ -n $holder ]]
}
