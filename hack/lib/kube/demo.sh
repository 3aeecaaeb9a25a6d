# shellcheck shell=bash
# hack/demo kube: the main story in a cluster. Sourced, never run. Needs common.sh.

DEMO_MANIFESTS=$REPO_DIR/tests/integration/manifests

# Counts in Valkey, with a connection for each step, and says what it is told and when.
# shellcheck disable=SC2016 # it is the client's shell that expands
DEMO_WRITER='while :; do
  step=$(timeout 2 valkey-cli -t 1 -h valkey incr writes)
  read -r now idle </proc/uptime
  echo "$step $now"
  sleep 0.02
done'

kube() { "$HACK_DIR/kube" "$@"; }
valkey() { kube kubectl exec client -- valkey-cli -h valkey "$@"; }

# Another Valkey would have drawn another run id.
demo_answers() {
  valkey hgetall bird
  valkey lrange stops 0 -1
  valkey get greeting
  valkey info server | grep '^run_id:'
}

# demo_kube BIN WORK: leaves the report's last line in WORK/report.
demo_kube() {
  local bin=$1 work=$2 pod node started writer
  kube up --nodes 3
  STERNA_PROGRAMS=$bin kube images import valkey sternad controller 2>/dev/null
  say "helm install sterna install/helm/sterna"
  kube helm install sterna "$REPO_DIR/install/helm/sterna" --namespace sterna-system --create-namespace --wait \
    >/dev/null 2>"$work/helm" ||
    die "the chart was not installed: $(<"$work/helm")"
  kube kubectl wait --for=jsonpath='{.metadata.labels.sterna\.dev/ready}'=true node a b c --timeout=60s >/dev/null
  kube kubectl get nodes -L sterna.dev/ready >&2

  say "a Valkey whose memory follows it, its Service, and a client on another node"
  kube kubectl apply -f "$DEMO_MANIFESTS/architect.yaml" >/dev/null
  kube kubectl expose deployment valkey --port=6379 >/dev/null
  kube kubectl apply -f "$DEMO_MANIFESTS/client.yaml" >/dev/null
  kube kubectl rollout status deployment/valkey --timeout=120s >/dev/null
  kube kubectl wait --for=condition=Ready pod/client --timeout=120s >/dev/null
  { valkey hset bird name tern km 70900 && valkey lpush stops weddell walvis farne && valkey set greeting hello; } >/dev/null
  demo_answers >"$work/before"
  kube kubectl get pods -o wide >&2

  pod=$(kube kubectl get pods -l app=valkey -o 'jsonpath={.items[0].metadata.name}')
  node=$(kube kubectl get pod "$pod" -o 'jsonpath={.spec.nodeName}')
  kube kubectl exec client -- sh -c "$DEMO_WRITER" >"$work/writes" 2>/dev/null &
  writer=$!
  sleep 2
  say "kubectl drain $node --ignore-daemonsets --delete-emptydir-data, while the client writes"
  started=$(now_ms)
  kube kubectl drain "$node" --ignore-daemonsets --delete-emptydir-data --timeout=150s >"$work/drain" 2>&1 ||
    die "the drain failed: $(<"$work/drain")"
  echo $(($(now_ms) - started)) >"$work/drain-ms"
  kube kubectl rollout status deployment/valkey --timeout=120s >/dev/null
  demo_answers >"$work/after"
  sleep 2
  kill "$writer" 2>/dev/null || true
  wait "$writer" 2>/dev/null || true
  kube kubectl get pods -o wide >&2
  kube kubectl get migrations >&2
  kube kubectl get migrations -o "jsonpath={.items[?(@.spec.podName=='$pod')]}" >"$work/migration"
  python3 "$LIB_DIR/kube/demo.py" "$work/migration" "$work/writes" "$work/before" "$work/after" "$(<"$work/drain-ms")" | tee "$work/report"
}
