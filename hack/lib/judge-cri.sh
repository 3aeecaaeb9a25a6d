# shellcheck shell=bash
# critest, with which the Kubernetes project judges container runtimes, and crictl:
# built from the Go module that has both. Sourced, never run.
# Needs common.sh, image.sh, node.sh.

CRI_TOOLS_VERSION=v1.36.0

go_architecture() {
  case $(uname -m) in
    x86_64) echo amd64 ;;
    aarch64) echo arm64 ;;
    *) uname -m ;;
  esac
}

# What critest pulls, and the image of hack/images that stands for it.
CRITEST_IMAGES=(
  'registry.k8s.io/e2e-test-images/busybox:1.29-2 toolbox'
  'registry.k8s.io/e2e-test-images/nginx:1.14-2 webserver'
  'registry.k8s.io/e2e-test-images/httpd:2.4.39-4 webserver'
  'registry.k8s.io/e2e-test-images/nonewprivs:1.3 escalate'
  "gcr.io/k8s-staging-cri-tools/hostnet-nginx-$(go_architecture):latest webserver"
  'gcr.io/k8s-staging-cri-tools/test-image-predefined-group:latest toolbox'
)

# Not a runtime's business but that of containerd's image service, which wants its
# registry; and what nodes do not have.
CRITEST_SKIP='Image Manager|Image Consistency|Image Identifier|AppArmor|SELinux'

# Of two containers that ask for no seccomp profile, critest wants that they have
# no filter at all. Ours have one that refuses what cannot be moved: see 'Staying
# movable' in docs/shim.md.
CRITEST_ON_PURPOSE='Security Context SeccompProfilePath should support (nil profile, which is unconfined|seccomp unconfined on the container)'

# What the go.mod of cri-tools asks for.
CRI_TOOLS_GO_MINOR=26
CRITEST_NODE=critest

has_go_for_cri() {
  GO_MINOR=$CRI_TOOLS_GO_MINOR has_go
}

# cri OPTION...: see hack/judge --help.
cri() {
  local handler=sterna flavour=forky focus=''
  local bin=$REPO_DIR/target/release out=$REPO_DIR/target/judge
  while (($#)); do
    case $1 in
      --handler) handler=${2:?--handler needs a value} && shift ;;
      --flavour) flavour=${2:?--flavour needs a value} && shift ;;
      --focus) focus=${2:?--focus needs a value} && shift ;;
      --bin) bin=$(realpath "${2:?--bin needs a value}") && shift ;;
      --out) out=$(realpath -m "${2:?--out needs a value}") && shift ;;
      *) die "cri: unknown option '$1' (see hack/judge --help)" ;;
    esac
    shift
  done
  check_flavour "$flavour"
  [[ $handler == @(sterna|runc|both) ]] || die "cri: --handler is 'sterna', 'runc' or 'both'"
  [[ $handler == runc || -x $bin/containerd-shim-sterna-v1 ]] ||
    die "there is no $bin/containerd-shim-sterna-v1: build it with hack/build"
  has_go_for_cri || die "critest cannot be built: $NO_GO"
  need python3 python3
  mkdir -p "$out"
  ensure_cri_tools
  "$HACK_DIR/nodes" down "$CRITEST_NODE"
  "$HACK_DIR/nodes" up --flavour "$flavour" --bin "$bin" "$CRITEST_NODE"
  trap '"$HACK_DIR/nodes" down "$CRITEST_NODE"' EXIT
  furnish_cri "$CRITEST_NODE"
  local ours=$out/cri-$flavour-sterna theirs=$out/cri-$flavour-runc
  if [[ $handler != sterna ]]; then
    critest "$CRITEST_NODE" runc "$theirs" "$focus"
    [[ $handler != runc ]] || return 0
  fi
  critest "$CRITEST_NODE" sterna "$ours" "$focus"
  if [[ $handler == sterna ]]; then
    theirs=$ours.again
    focus=$(critest_failed "$ours" | sed 's/[][()|.*+?^$\\]/\\&/g' | paste -sd '|')
    : >"$theirs"
    [[ -z $focus ]] || critest "$CRITEST_NODE" runc "$theirs" "$focus"
  fi
  compare_critest "$theirs" "$ours"
}

# cri_tools: prints the directory with crictl and critest.
cri_tools() {
  has_go_for_cri || {
    say "crictl cannot be built: $NO_GO"
    exit 77
  }
  ensure_cri_tools
  cri_tools_path
}

cri_tools_path() { echo "$STERNA_CACHE/judge/cri-tools-$CRI_TOOLS_VERSION"; }

ensure_cri_tools() {
  [[ -d $(cri_tools_path) ]] || with_lock "$STERNA_CACHE/locks/cri-tools" build_cri_tools
}

build_cri_tools() {
  local path module log started
  path=$(cri_tools_path)
  [[ ! -d $path ]] || return 0
  started=$(now_ms)
  say "building crictl and critest $CRI_TOOLS_VERSION (once, minutes)"
  rm -rf "$path.new"
  mkdir -p "$path.new" "$STERNA_CACHE/logs"
  log=$STERNA_CACHE/logs/cri-tools.log
  module=$(mktemp -d)
  (
    cd "$module"
    export GOTOOLCHAIN=local CGO_ENABLED=0 GOFLAGS='-mod=mod -buildvcs=false'
    go mod init judge
    go mod edit -require "sigs.k8s.io/cri-tools@$CRI_TOOLS_VERSION"
    nice -n 12 go build -trimpath -ldflags='-s -w' -o "$path.new/crictl" sigs.k8s.io/cri-tools/cmd/crictl
    nice -n 12 go test -c -trimpath -ldflags='-s -w' -o "$path.new/critest" sigs.k8s.io/cri-tools/cmd/critest
  ) >"$log" 2>&1 || {
    tail -n 15 "$log" >&2
    die "crictl and critest did not build (the whole log: $log)"
  }
  rm -rf "$module"
  mv -T "$path.new" "$path"
  say "built $path in $((($(now_ms) - started) / 1000)) s"
}

# furnish_cri NODE: brings the programs and the images.
furnish_cri() {
  local image reference name
  local -A seen=()
  for name in crictl critest; do
    node_run "$1" sh -c "cat >/usr/local/bin/$name && chmod 755 /usr/local/bin/$name" <"$(cri_tools_path)/$name"
  done
  for image in "localhost/pause:1 pause" "${CRITEST_IMAGES[@]}"; do
    read -r reference name <<<"$image"
    if [[ -z ${seen[$name]:-} ]]; then
      seen[$name]=1
      ensure_image "$name"
      import_image "$1" k8s.io "$name"
    fi
    node_run "$1" ctr -n k8s.io images tag --force "$(<"$(image_path "$name").reference")" "$reference" >/dev/null
  done
}

# critest NODE HANDLER FILE FOCUS: one run; FILE.log is what it said, FILE has a
# line "PASS|FAIL|SKIP TEST" for each test.
critest() {
  local node=$1 handler=$2 file=$3 focus=$4 started
  local -a options=(-runtime-handler "$handler" "-ginkgo.skip=$CRITEST_SKIP" -ginkgo.no-color
    -ginkgo.junit-report=/tmp/critest.xml)
  [[ -z $focus ]] || options+=("-ginkgo.focus=$focus")
  # What fails is tried once more: tests look for processes that are just ending,
  # and a machine may be busy.
  options+=(-ginkgo.flake-attempts=2)
  say "critest with the handler $handler (output: $file.log)"
  started=$(now_ms)
  node_run "$node" rm -f /tmp/critest.xml
  node_run "$node" critest "${options[@]}" >"$file.log" 2>&1 </dev/null || true
  node_run "$node" cat /tmp/critest.xml | critest_outcomes >"$file" ||
    die "critest left no report: see $file.log"
  say "$handler: $(grep -c '^PASS' "$file") passed, $(grep -c '^FAIL' "$file") failed, $(grep -c '^SKIP' "$file") skipped in $((($(now_ms) - started) / 1000)) s"
}

# critest_outcomes: from the report; what was filtered out has no reason.
critest_outcomes() {
  python3 -c '
import sys, xml.etree.ElementTree as tree
words = {"passed": "PASS", "skipped": "SKIP"}
for case in tree.parse(sys.stdin).iter("testcase"):
    name = case.get("name").removeprefix("[It] [k8s.io] ")
    skipped = case.find("skipped")
    if name.startswith("[") or (skipped is not None and skipped.get("message") == "skipped"):
        continue
    print(words.get(case.get("status"), "FAIL"), name)
' | LC_ALL=C sort -k2
}

critest_passed() { sed -n 's/^PASS //p' "$1" | LC_ALL=C sort; }
critest_failed() { sed -n 's/^FAIL //p' "$1" | LC_ALL=C sort; }

# compare_critest RUNC STERNA: fails where something passes with the first only.
compare_critest() {
  local lost meant
  lost=$(comm -12 <(critest_passed "$1") <(critest_failed "$2"))
  meant=$(grep -E "^$CRITEST_ON_PURPOSE" <<<"$lost" || true)
  lost=$(grep -vE "^$CRITEST_ON_PURPOSE|^$" <<<"$lost" || true)
  critest_failed "$2" | comm -23 - <(critest_passed "$1") | while read -r test; do
    say "fails with containerd's shim as well: $test"
  done
  # As cargo says it, for hack/test.
  [[ -z $meant ]] || while read -r test; do
    echo "test $test ... ignored, differs on purpose (docs/shim.md)"
  done <<<"$meant"
  echo "test result: judged. $(critest_passed "$2" | wc -l) passed; $(grep -c . <<<"$lost" || true) failed"
  [[ -z $lost ]] || die "passed with containerd's shim and not with ours:"$'\n'"$lost"
}
