# shellcheck shell=bash
# containerd's client integration suite: built from the sources of the containerd
# that a flavour has, with the images it pulls. Sourced, never run.
# Needs common.sh, rootfs.sh, image.sh, node.sh.

REGISTRY_PORT=5000
# A pull from 'localhost' goes without TLS.
REGISTRY=localhost:$REGISTRY_PORT

# What the go.mod of containerd 2.1 asks for.
GO_MINOR=24

# has_go: is there a Go that can build the suite? Otherwise sets NO_GO to the reason.
has_go() {
  local minor
  command -v go >/dev/null || PATH=$PATH:/usr/local/go/bin
  NO_GO="Go is not installed"
  command -v go >/dev/null || return 1
  minor=$(go env GOVERSION | sed -nE 's/^go1\.([0-9]+).*/\1/p')
  NO_GO="$(go env GOVERSION) is too old: it takes 1.$GO_MINOR"
  ((minor >= GO_MINOR))
}

need_go() {
  has_go || die "the suite cannot be built: $NO_GO"
}

# suite_version FLAVOUR: the version of its containerd as Debian has it.
suite_version() {
  sed -n 's/^containerd //p' "$(rootfs_path "$1")/etc/sterna/packages"
}

# suite_path FLAVOUR: the directory with the programs of the suite.
suite_path() {
  local version
  version=$(suite_version "$1")
  echo "$STERNA_CACHE/judge/containerd-${version%%[+~-]*}"
}

ensure_suite() {
  [[ -d $(suite_path "$1") ]] || with_lock "$STERNA_CACHE/locks/judge-$1" build_suite "$1"
}

build_suite() {
  local path version upstream started
  path=$(suite_path "$1")
  [[ ! -d $path ]] || return 0
  version=$(suite_version "$1")
  upstream=${version%%[+~-]*}
  started=$(now_ms)
  say "building the suite of containerd $upstream (once, minutes)"
  rm -rf "$path.new" "$path.source"
  mkdir -p "$path.new"
  # The suite of 1.7 is a module of its own, which no module proxy has.
  case $upstream in
    1.*) debian_source "$1" containerd "$version" "$path.source" ;;
    *) go_module "github.com/containerd/containerd/v2@v$upstream" "$path.source" ;;
  esac
  # Debian leaves parts of it out: what go.sum has recorded is all there.
  rm -rf "$path.source/vendor"
  # The suite takes its images' names from the list before it reads its flags, and
  # some from nowhere else.
  sed -Ei 's#"(ghcr\.io/containerd|registry\.k8s\.io)/#"'"$REGISTRY"'/#' \
    "$path.source/integration/images/image_list.go" "$path.source"/integration/client/*_linux_test.go
  build_go "$path.source/integration/client" test -c -o "$path.new/client.test" .
  # A runc that misbehaves in ways that a test asks for.
  build_go "$path.source" build -o "$path.new/runc-fp" ./integration/failpoint/cmd/runc-fp
  [[ ! -d $path.source/integration/client/testdata ]] || cp -r "$path.source/integration/client/testdata" "$path.new"
  rm -rf "$path.source"
  mv -T "$path.new" "$path"
  say "built $path in $((($(now_ms) - started) / 1000)) s"
}

build_go() {
  (cd "$1" && GOTOOLCHAIN=local CGO_ENABLED=0 GOFLAGS=-buildvcs=false nice -n 12 go "${@:2}") ||
    die "the suite did not build: go ${*:2}"
}

# go_module MODULE@VERSION TARGET: a copy of it that can be changed.
go_module() {
  local answer directory
  answer=$(cd / && GOTOOLCHAIN=local GOFLAGS=-mod=mod go mod download -json "$1") ||
    die "cannot download the Go module $1: $answer"
  directory=$(python3 -c 'import json, sys; print(json.load(sys.stdin)["Dir"])' <<<"$answer")
  cp -r --no-preserve=mode "$directory" "$2"
}

# debian_source SUITE PACKAGE VERSION TARGET: the upstream part of a Debian source
# package, unpacked. With package lists of its own, so that the machine's stay.
debian_source() {
  local work archive log
  work=$(mktemp -d)
  log=$work/log
  mkdir -p "$work"/{lists/partial,archives/partial} "$4"
  echo "deb-src [signed-by=$KEYRING] $(debian_mirror) $1 main" >"$work/sources.list"
  local -a apt=(
    apt-get -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work" -o Acquire::Languages=none
    -o 'Acquire::Check-Valid-Until=false' -o APT::Sandbox::User=root
  )
  {
    "${apt[@]}" update && (cd "$work" && "${apt[@]}" source --download-only --tar-only "$2=$3")
  } >"$log" 2>&1 || {
    tail -n 15 "$log" >&2
    die "cannot download the source of $2 $3"
  }
  archive=$(compgen -G "$work/*.orig.tar.*")
  tar -x -f "$archive" -C "$4" --strip-components=1
  rm -rf "$work"
}

# The images of the suite, of all versions, and what they are made of. No two may
# be alike, and one has to have several layers.
SUITE_IMAGES=(
  'alpine:3.14.0 debian'
  'busybox:1.36 debian'
  'pause:3.8 pause'
  'pause:3.10 pause'
  'volume-copy-up:2.1 debian+pause'
  'volume-copy-up:2.2 debian+pause'
  'volume-ownership:2.1 debian'
)

# registry_start NODE: serves the images in the node's network; sets REGISTRY_PID.
registry_start() {
  local image reference parts part paths line=
  local -a arguments=()
  for image in "${SUITE_IMAGES[@]}"; do
    read -r reference parts <<<"$image"
    paths=
    for part in ${parts//+/ }; do
      ensure_image "$part"
      paths+=+$(image_path "$part")
    done
    arguments+=("$reference=${paths#+}")
  done
  node_alive "$1" || die "node '$1' does not run"
  coproc SERVER { exec nsenter --target "$NODE_PID" --net "$LIB_DIR/registry.py" "$REGISTRY_PORT" "${arguments[@]}"; }
  REGISTRY_PID=$SERVER_PID
  IFS= read -r -t 20 line <&"${SERVER[0]}" || true
  [[ $line == serving ]] || die "the registry for the suite's images does not start"
}

registry_stop() {
  [[ -z ${REGISTRY_PID:-} ]] || kill "$REGISTRY_PID" 2>/dev/null || true
  REGISTRY_PID=
}
