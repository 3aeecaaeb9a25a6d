# shellcheck shell=bash
# Debian root file systems, made by mmdebstrap and kept in the cache.
# Sourced, never run. Needs common.sh.

KEYRING=${STERNA_KEYRING:-/usr/share/keyrings/debian-archive-keyring.gpg}

# What a node has beyond a minimal system. criu, containerd and runc differ
# between the flavours, and that is why there are flavours:
#   forky    criu 4.2, containerd 2.1, runc 1.3
#   trixie   criu 4.1, containerd 1.7, runc 1.1
NODE_PACKAGES=(
  busybox ca-certificates containerd containernetworking-plugins criu gzip iproute2
  hostname iptables iputils-ping libcriu2 mount nftables procps python3-minimal runc strace tar tini
  util-linux
)

# Documentation and translations make half of the files and nobody reads them.
SLIM_OPTIONS=(
  '--dpkgopt=path-exclude=/usr/share/man/*'
  '--dpkgopt=path-exclude=/usr/share/doc/*'
  '--dpkgopt=path-include=/usr/share/doc/*/copyright'
  '--dpkgopt=path-exclude=/usr/share/locale/*'
  '--dpkgopt=path-exclude=/usr/share/info/*'
)

# The mirror this machine uses for Debian itself.
debian_mirror() {
  if [[ -n ${STERNA_MIRROR:-} ]]; then
    echo "$STERNA_MIRROR"
    return
  fi
  local origin uri
  # shellcheck disable=SC2016 # the fields are apt's
  while read -r origin uri; do
    if [[ $origin == Debian && $uri == http*/debian/ ]]; then
      echo "${uri%/}"
      return
    fi
  done < <(apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null)
  echo http://deb.debian.org/debian
}

# The machine's settings for a proxy, as options for mmdebstrap.
apt_proxy_options() {
  local scheme value
  for scheme in http https; do
    value=$(apt-config shell V "Acquire::$scheme::Proxy" 2>/dev/null | sed -n "s/^V='\(.*\)'$/\1/p")
    [[ -z $value ]] || echo "--aptopt=Acquire::$scheme::Proxy \"$value\""
  done
}

# debootstrap_to SUITE TARGET MMDEBSTRAP-OPTION...: signatures are verified
# with the Debian archive keyring; only the age of the signature of a moving
# suite is not, because mirrors and snapshots of it can lag.
debootstrap_to() {
  local suite=$1 target=$2
  shift 2
  need mmdebstrap mmdebstrap
  local name=${target##*/}
  local log=$STERNA_CACHE/logs/${name%.new*}.log
  mkdir -p "${log%/*}"
  [[ -r $KEYRING ]] || install_package debian-archive-keyring
  local -a proxy
  mapfile -t proxy < <(apt_proxy_options)
  mmdebstrap --mode=root --architectures="$(dpkg --print-architecture)" --keyring="$KEYRING" \
    --aptopt='Acquire::Check-Valid-Until "false"' --aptopt='Acquire::Languages "none"' \
    --aptopt='APT::Install-Recommends "false"' "${proxy[@]}" "${SLIM_OPTIONS[@]}" \
    "$@" "$suite" "$target" "$(debian_mirror)" >"$log" 2>&1 </dev/null || {
    tail -n 25 "$log" >&2
    die "mmdebstrap could not make $target from $suite (the whole log: $log)"
  }
}

check_flavour() {
  case $1 in
    forky | trixie) ;;
    *) die "unknown flavour '$1': it is 'forky' or 'trixie'" ;;
  esac
}

# rootfs_path FLAVOUR: where the finished tree is. A change of the package list
# or of the building code changes the name, so that an old tree is never used.
rootfs_path() {
  local recipe
  recipe=$(declare -f build_rootfs debootstrap_to)$(printf '%s\n' "${NODE_PACKAGES[@]}" "${SLIM_OPTIONS[@]}")
  recipe=$(sha256sum <<<"$recipe")
  echo "$STERNA_CACHE/rootfs/$1-${recipe:0:12}"
}

# ensure_rootfs FLAVOUR: makes the tree unless it is there.
ensure_rootfs() {
  [[ -d $(rootfs_path "$1") ]] || with_lock "$STERNA_CACHE/locks/rootfs-$1" build_rootfs "$1"
}

build_rootfs() {
  local flavour=$1 path started new
  path=$(rootfs_path "$flavour")
  [[ ! -d $path ]] || return 0
  new=$path.new
  [[ ! -e $new ]] || remove_tree "$new"
  mkdir -p "${path%/*}"
  say "building the $flavour root file system (once, about a minute)"
  started=$(now_ms)
  # Services are started by the node's own init: no unit, rc script or apt run.
  debootstrap_to "$flavour" "$new" --variant=apt "--include=$(IFS=, && echo "${NODE_PACKAGES[*]}")"
  rm -rf "$new/var/lib/apt/lists" "$new/var/cache/apt" "$new/etc/cni" "$new/etc/containerd"
  rm -f "$new/etc/hostname" "$new/etc/resolv.conf" "$new/etc/machine-id"
  mkdir -p "$new/etc/cni/net.d" "$new/etc/containerd" "$new/etc/sterna" "$new/opt/sterna/bin" \
    "$new/var/lib/containerd" "$new/var/lib/sterna" "$new/opt/cni" "$new/.old"
  ln -sfn /usr/lib/cni "$new/opt/cni/bin"
  local binary
  for binary in containerd-shim-sterna-v1 sternad sterna; do
    ln -s "/opt/sterna/bin/$binary" "$new/usr/local/bin/$binary"
  done
  # shellcheck disable=SC2016 # the fields are dpkg's
  chroot "$new" dpkg-query -W -f '${Package} ${Version}\n' >"$new/etc/sterna/packages"
  mv -T "$new" "$path"
  say "built $path in $((($(now_ms) - started) / 1000)) s"
  local old
  for old in "$STERNA_CACHE/rootfs/$flavour"-*; do
    [[ $old == "$path" ]] || rootfs_in_use "$old" || remove_tree "$old"
  done
}

# rootfs_in_use PATH: is it the lower layer of a node that exists?
rootfs_in_use() {
  grep -qsxF "$1" /run/sterna-nodes/*/*/rootfs "$STERNA_RUN"/*/rootfs
}

# remove_tree PATH: rm -rf that first makes sure that no other file system is
# mounted below (a build that was interrupted may have left /proc or /dev).
remove_tree() {
  local mount
  while read -r mount; do
    umount -l -- "$mount"
  done < <(awk -v p="$1/" 'index($5, p) == 1 { print $5 }' /proc/self/mountinfo | sort -r)
  rm -rf --one-file-system -- "$1"
}
