# shellcheck shell=bash
# shellcheck disable=SC2034 # used where this is sourced
# Kubernetes and what belongs to it, compiled from their published Go modules and
# kept in the cache. Sourced, never run. Needs common.sh, rootfs.sh.

# Where the finished programs are: $KUBE_CACHE/NAME-VERSION-RECIPE/.
KUBE_CACHE=$STERNA_CACHE/kubernetes
KUBE_DIR=$LIB_DIR/kube

# The releases by what people call them, and the oldest Go that compiles each.
declare -A KUBE_RELEASES=([1.34]=v1.34.4 [1.36]=v1.36.3)
declare -A KUBE_GO=([1.34]=1.24 [1.36]=1.26)
KUBE_DEFAULT=1.36
COREDNS_RELEASE=v1.15.0
HELM_RELEASE=v4.3.1
# The oldest Go for these two, and what the builder root file system has.
TOOLS_GO=1.26
BUILDER_GO=1.26
BUILDER_SUITE=forky

# What one program answers to.
KUBE_NAMES=(etcd kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubectl kubelet)

# The exit code for "cannot be had on this machine": a test that sees it is skipped.
UNAVAILABLE=69

unavailable() {
  printf '%s: not available here: %s\n' "$PROGRAM" "$*" >&2
  exit $UNAVAILABLE
}

check_release() {
  [[ -n ${KUBE_RELEASES[$1]:-} ]] || die "unknown version '$1': it is one of ${!KUBE_RELEASES[*]}"
}

# programs_path NAME [RELEASE]: the directory of kubernetes, coredns or helm. A change
# of the recipe changes the name, so that an old program is never used.
programs_path() {
  local name=$1 version recipe
  case $name in
    kubernetes) version=${KUBE_RELEASES[$2]} ;;
    coredns) version=$COREDNS_RELEASE ;;
    helm) version=$HELM_RELEASE ;;
  esac
  recipe=$({
    declare -f "compile_$name" go_build
    [[ ! -e $KUBE_DIR/$name/main.go ]] || cat "$KUBE_DIR/$name/main.go"
  } | sha256sum)
  echo "$KUBE_CACHE/$name-$version-${recipe:0:12}"
}

# ensure_programs NAME [RELEASE]: compiles unless that has been done.
ensure_programs() {
  [[ -d $(programs_path "$@") ]] || with_lock "$STERNA_CACHE/locks/$1" compile "$@"
}

compile() {
  local path new started
  path=$(programs_path "$@")
  [[ ! -d $path ]] || return 0
  new=$path.new
  log=$STERNA_CACHE/logs/${path##*/}.log
  mkdir -p "${log%/*}"
  : >"$log"
  rm -rf "$new"
  mkdir -p "$new/source"
  [[ ! -e $KUBE_DIR/$1/main.go ]] || cp "$KUBE_DIR/$1/main.go" "$new/source"
  started=$(now_ms)
  "compile_$1" "$new" "${2:-}"
  rm -rf "$new/source"
  mv -T "$new" "$path"
  say "compiled ${path##*/} in $((($(now_ms) - started) / 1000)) s"
  local old
  for old in "${path%-*}"-*; do
    [[ $old == "$path" ]] || programs_in_use "$old" || rm -rf "$old"
  done
}

# programs_in_use PATH: does a node have it?
programs_in_use() {
  grep -qsF "$1:" /run/sterna-nodes/*/*/shares "$STERNA_RUN"/*/shares
}

# One program for all of Kubernetes, see kubernetes/main.go. The module
# k8s.io/kubernetes replaces its parts by directories; those are published as modules
# of their own, whose minor version is Kubernetes' own.
compile_kubernetes() {
  local new=$1 version=${KUBE_RELEASES[$2]} source=$1/source parts name
  local staging=v0.${version#v1.} package=k8s.io/component-base/version
  need_go "${KUBE_GO[$2]}"
  say "compiling Kubernetes $version (once; six minutes on two idle cores)"
  with_go "$source" go mod download -json "k8s.io/kubernetes@$version" >"$source/module.json" 2>>"$log" ||
    unavailable "the modules could not be fetched: $(sed -n 's/.*"Error": "\(.*\)".*/\1/p' "$source/module.json")"
  parts=$(with_go "$source" cat "$(sed -n 's/.*"GoMod": "\(.*\)",/\1/p' "$source/module.json")")
  {
    echo 'module hack/kubernetes'
    grep -E '^(go|godebug) ' <<<"$parts"
    echo "require k8s.io/kubernetes $version"
    sed -nE "s|^\t(k8s\.io/[a-z-]+) => \./staging/.*|replace \1 => \1 $staging|p" <<<"$parts"
  } >"$source/go.mod"
  go_build "$source" "$new/kubernetes" . \
    "-X $package.gitVersion=$version -X $package.gitMajor=1 -X $package.gitMinor=${2#1.}"
  for name in "${KUBE_NAMES[@]}"; do
    ln -s kubernetes "$new/$name"
  done
}

compile_coredns() {
  need_go $TOOLS_GO
  say "compiling CoreDNS $COREDNS_RELEASE (once; a minute or two)"
  printf 'module hack/coredns\n\ngo %s\n\nrequire github.com/coredns/coredns %s\n' $TOOLS_GO $COREDNS_RELEASE \
    >"$1/source/go.mod"
  go_build "$1/source" "$1/coredns" . ''
}

compile_helm() {
  need_go $TOOLS_GO
  say "compiling Helm $HELM_RELEASE (once; about two minutes)"
  printf 'module hack/helm\n\ngo %s\n\nrequire helm.sh/helm/v4 %s\n' $TOOLS_GO $HELM_RELEASE >"$1/source/go.mod"
  printf 'package tools\n\nimport _ "helm.sh/helm/v4/pkg/cmd"\n' >"$1/source/tools.go"
  go_build "$1/source" "$1/helm" helm.sh/helm/v4/cmd/helm ''
}

# go_build DIRECTORY PROGRAM PACKAGE LINKER-FLAGS. All else on the machine goes first.
go_build() {
  with_go "$1" go mod tidy >>"$log" 2>&1 || {
    tail -n 15 "$log" >&2
    unavailable "the modules could not be fetched (above: the end of $log)"
  }
  with_go "$1" nice -n 15 go build -trimpath -ldflags "-s -w $4" -o "$1/program" "$3" >>"$log" 2>&1 || {
    tail -n 15 "$log" >&2
    die "it does not compile (above: the end of $log)"
  }
  mv "$1/program" "$2"
}

# need_go OLDEST: sets go_root to where Go is to run: nothing for this machine, or a
# builder root file system where the machine's Go is missing or too old.
need_go() {
  local oldest=$1 have
  have=$(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null) || have=go0
  go_root=
  [[ $(printf '%s\n' "$oldest" "${have#go}" | sort -V | head -n 1) != "$oldest" ]] || return 0
  go_root=$KUBE_CACHE/builder-$BUILDER_SUITE-go$BUILDER_GO
  # In a process of its own, because whoever calls holds a lock already.
  [[ -d $go_root ]] || (with_lock "$STERNA_CACHE/locks/builder" build_go_root) || exit
}

build_go_root() {
  [[ ! -d $go_root ]] || return 0
  say "making a root file system with Go $BUILDER_GO, which this machine lacks"
  [[ ! -e $go_root.new ]] || remove_tree "$go_root.new"
  mkdir -p "$KUBE_CACHE"
  (debootstrap_to $BUILDER_SUITE "$go_root.new" --variant=apt --include=ca-certificates,golang-$BUILDER_GO-go) ||
    unavailable "no root file system with Go $BUILDER_GO (above: why)"
  mv -T "$go_root.new" "$go_root"
}

# with_go DIRECTORY COMMAND...: in DIRECTORY, with Go in the PATH. In the builder
# root the directory has the same name, and the machine's certificates are trusted.
with_go() {
  local dir=$1
  shift
  local -a settings=(GO111MODULE=on GOTOOLCHAIN=local GOWORK=off CGO_ENABLED=0)
  if [[ -z $go_root ]]; then
    (cd "$dir" && env "${settings[@]}" "$@")
    return
  fi
  settings+=("PATH=/usr/lib/go-$BUILDER_GO/bin:/usr/sbin:/usr/bin" HOME=/root)
  # shellcheck disable=SC2016 # for the inner shell
  unshare --mount --pid --fork --kill-child sh -euc '
    root=$1 dir=$2
    shift 2
    mkdir -p "$root$dir"
    mount --bind "$dir" "$root$dir"
    mount -t proc proc "$root/proc"
    mount --bind /dev "$root/dev"
    for file in /etc/resolv.conf /etc/hosts /etc/ssl/certs; do
      [ ! -e "$file" ] || { [ -e "$root$file" ] || : >"$root$file"; mount --bind "$file" "$root$file"; }
    done
    exec chroot "$root" sh -euc '\''cd "$1" && shift && exec "$@"'\'' sh "$dir" "$@"' \
    sh "$go_root" "$dir" env "${settings[@]}" "$@"
}
