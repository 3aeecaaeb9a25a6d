# shellcheck shell=bash
# Workload images, made from Debian packages without a registry. For each image
# there is a function image_NAME, which fills a root directory and sets:
#   reference   the name it is imported under
#   settings    the image config's "config" member, as JSON
# Sourced, never run. Needs common.sh, rootfs.sh, kube/programs.sh.

IMAGES=(valkey busybox python nginx node goserver pause coredns debian webserver escalate toolbox sternad controller)
IMAGE_SUITE=forky
IMAGE_PATH='PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'

check_image() {
  local image
  for image in "${IMAGES[@]}"; do
    [[ $1 != "$image" ]] || return 0
  done
  die "there is no image '$1': it is one of ${IMAGES[*]}"
}

image_valkey() {
  reference=docker.io/valkey/valkey:9
  settings='{
    "Env": ["'$IMAGE_PATH'"], "WorkingDir": "/data", "ExposedPorts": {"6379/tcp": {}},
    "Entrypoint": ["valkey-server"],
    "Cmd": ["--save", "", "--appendonly", "no", "--protected-mode", "no", "--bind", "0.0.0.0"]
  }'
  # The standalone packages keep all of systemd out.
  unpack "$1" valkey-server valkey-tools systemd-standalone-sysusers systemd-standalone-tmpfiles busybox-static
  add_applets "$1"
  add_user "$1" valkey 999 /data
}

image_busybox() {
  reference=docker.io/library/busybox:1
  settings='{"Env": ["'$IMAGE_PATH'"], "Cmd": ["sh"]}'
  unpack "$1" busybox-static
  add_applets "$1"
}

image_python() {
  reference=docker.io/library/python:3
  settings='{"Env": ["'$IMAGE_PATH'"], "Cmd": ["python3", "/srv/server.py"]}'
  unpack "$1" python3 busybox-static
  add_applets "$1"
  install -m 644 "$LIB_DIR/images/server.py" "$1/srv/server.py"
}

image_nginx() {
  reference=docker.io/library/nginx:1
  settings='{"Env": ["'$IMAGE_PATH'"], "Cmd": ["nginx", "-c", "/etc/nginx/sterna.conf"]}'
  unpack "$1" nginx busybox-static
  add_applets "$1"
  add_user "$1" www-data 33 /var/www
  mkdir -p "$1/var/lib/nginx" "$1/var/log/nginx" "$1/srv/www"
  install -m 644 "$LIB_DIR/images/nginx.conf" "$1/etc/nginx/sterna.conf"
  echo 'served by nginx' >"$1/srv/www/index.html"
  head -c 8388608 /dev/zero >"$1/srv/www/8M"
}

image_node() {
  reference=docker.io/library/node:24
  settings='{"Env": ["'$IMAGE_PATH'"], "Cmd": ["node", "/srv/server.js"]}'
  unpack "$1" nodejs busybox-static
  add_applets "$1"
  install -m 644 "$LIB_DIR/images/server.js" "$1/srv/server.js"
}

image_goserver() {
  reference=localhost/goserver:1
  settings='{"Env": ["'$IMAGE_PATH'"], "Cmd": ["/server"]}'
  skeleton "$1"
  go_program server.go "$1/server"
}

# What the CRI holds a pod's namespaces with.
image_pause() {
  reference=$PAUSE_IMAGE
  settings='{"Env": ["'$IMAGE_PATH'"], "Cmd": ["/pause"]}'
  need cc gcc
  [[ -e /usr/include/stdio.h ]] || install_package libc6-dev
  skeleton "$1"
  cc -Os -static -s -Wall -Wextra -Werror -o "$1/pause" "$LIB_DIR/images/pause.c"
}

# What critest asks of several images: a server on the ports 80 and 12003 that says
# httpd, and whose first process is nginx.
image_webserver() {
  reference=localhost/webserver:1
  settings='{"Env": ["'$IMAGE_PATH'"], "Cmd": ["sh", "-c", "echo httpd; exec nginx -c /etc/nginx/critest.conf"]}'
  unpack "$1" nginx busybox-static
  add_applets "$1"
  add_user "$1" www-data 33 /var/www
  mkdir -p "$1/var/lib/nginx" "$1/var/log/nginx" "$1/srv/www"
  ln -s ../run "$1/var/run"
  install -m 644 "$LIB_DIR/images/critest.conf" "$1/etc/nginx/critest.conf"
  echo 'served by nginx' >"$1/srv/www/index.html"
}

# A program that is root whoever starts it, unless it may not.
image_escalate() {
  reference=localhost/escalate:1
  settings='{"Env": ["'$IMAGE_PATH'"], "Cmd": ["/effective-uid"]}'
  skeleton "$1"
  go_program effective-uid.go "$1/effective-uid"
  chmod 4755 "$1/effective-uid"
}

# A shell and what critest asks of processes and IPC; a user that the image itself
# has in one more group.
image_toolbox() {
  reference=localhost/toolbox:1
  settings='{"Env": ["'$IMAGE_PATH'"], "Cmd": ["sh"]}'
  unpack "$1" busybox-static procps util-linux
  # That of procps wants a terminal, and critest runs it without.
  rm "$1/usr/bin/top"
  add_applets "$1"
  add_user "$1" default-user 1000 /home
  echo 'group-defined-in-image:x:50000:default-user' >>"$1/etc/group"
}

# go_program SOURCE TARGET: a static program from a file of lib/images.
go_program() {
  need go golang-go
  # As a module of today's Go: without go.mod, the defaults are those of old versions.
  local source
  source=$(mktemp -d)
  cp "$LIB_DIR/images/$1" "$source"
  (
    cd "$source" || exit
    export GO111MODULE=on GOFLAGS='' GOTOOLCHAIN=local CGO_ENABLED=0
    go mod init program 2>/dev/null
    go build -trimpath -ldflags='-s -w' -o "$2" .
  )
  rm -rf "$source"
}

# A cluster's name server. It binds port 53 as root.
image_coredns() {
  reference=localhost/coredns:1
  settings='{"Env": ["'$IMAGE_PATH'"], "Entrypoint": ["/coredns"]}'
  skeleton "$1"
  cp "$(programs_path coredns)/coredns" "$1/coredns"
}

# For tests that look for Debian's users, setuid programs, a directory that root
# does not own, and a sleep that goes on after a signal, unlike busybox's.
image_debian() {
  reference=localhost/debian:1
  settings='{"Env": ["'$IMAGE_PATH'"], "Cmd": ["sh"]}'
  unpack "$1" base-passwd bash busybox-static coreutils passwd
  add_applets "$1"
  cp "$1/usr/share/base-passwd/passwd.master" "$1/etc/passwd"
  cp "$1/usr/share/base-passwd/group.master" "$1/etc/group"
  install -d -o 65534 -g 65534 "$1/test_dir"
}

# The chart's images. Their programs are those that hack/build made last, or those in
# STERNA_PROGRAMS.
programs_dir() {
  local dir newest=
  for dir in ${STERNA_PROGRAMS:-"$REPO_DIR/target/release" "$REPO_DIR/target/debug"}; do
    [[ ! -x $dir/sterna-controller ]] || [[ -n $newest && $dir/sterna-controller -ot $newest/sterna-controller ]] || newest=$dir
  done
  [[ -n $newest ]] || die "there is no sterna-controller to make images of: hack/build"
  echo "$newest"
}

image_controller() {
  reference=ghcr.io/sterna-dev/sterna-controller:$(chart_version)
  settings='{"Env": ["'$IMAGE_PATH'"], "Entrypoint": ["/usr/local/bin/sterna-controller"], "User": "65534:65534"}'
  unpack "$1" libc6 libgcc-s1 ca-certificates
  install -D -m 755 "$(programs_dir)/sterna-controller" "$1/usr/local/bin/sterna-controller"
}

# What on-node puts on a node lies in /opt/sterna-image: programs, and every library
# that they and CRIU need.
image_sternad() {
  local ours=$1/opt/sterna-image program file loader libraries
  reference=ghcr.io/sterna-dev/sternad:$(chart_version)
  settings='{"Env": ["'$IMAGE_PATH'"], "Entrypoint": ["/usr/local/bin/on-node"]}'
  unpack "$1" busybox-static criu libcriu2 patchelf
  rm -rf "$1"/usr/lib/python3* "$1"/usr/share/python3
  add_applets "$1"
  install -D -m 755 "$REPO_DIR/install/kubernetes/on-node" "$1/usr/local/bin/on-node"
  mkdir -p "$ours"/{bin,lib,libexec}
  for program in containerd-shim-sterna-v1 sternad sterna; do
    install -m 755 "$(programs_dir)/$program" "$ours/libexec/$program"
  done
  install -m 755 "$1/usr/sbin/criu" "$ours/libexec/criu"
  cp -L "$1"/usr/lib/*/libcriu.so.2 "$ours/lib/"
  # The dynamic loader tells what it would load; its own name differs by architecture.
  for loader in "$1"/usr/lib{64,}/ld-linux-*.so.*; do
    [[ ! -e $loader ]] || break
  done
  libraries=$(for file in "$ours"/libexec/* "$ours"/lib/*; do
    chroot "$1" "${loader#"$1"}" --list "${file#"$1"}" || exit
  done) || die "cannot tell the libraries of the programs in the image"
  while read -r file; do
    cp -Lf "$1$file" "$ours/lib/"
  done < <(grep -o ' => /[^ ]*' <<<"$libraries" | cut -d ' ' -f 3 | sort -u)
  cp -L "$loader" "$ours/lib/ld.so"
  (cd "$ours" && find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c 1-12 >version)
}

chart_version() { sed -n 's/^appVersion: *//p' "$REPO_DIR/install/helm/sterna/Chart.yaml"; }

# unpack ROOT PACKAGE...: the files of the packages and of what they depend on. No
# maintainer script runs: what those would have made is made by the image's function.
unpack() {
  local root=$1 packages
  shift
  packages=$(IFS=, && echo "$*")
  debootstrap_to "$IMAGE_SUITE" "$root" --variant=extract --include="$packages"
  rm -rf "$root"/usr/share/{bash-completion,bug,doc,info,lintian,locale,man} "$root"/usr/lib/systemd \
    "$root"/etc/{init.d,apt,dpkg} "$root"/var/lib/{apt,dpkg} "$root"/var/cache/apt "$root"/var/log/*
  skeleton "$root"
}

skeleton() {
  local root=$1 dir
  mkdir -p "$root"/{dev,etc,proc,root,run,srv,sys,tmp,usr/bin,usr/lib,usr/sbin,var/log}
  chmod 1777 "$root/tmp"
  for dir in bin sbin lib lib64; do
    [[ -e $root/$dir || ! -d $root/usr/$dir ]] || ln -s "usr/$dir" "$root/$dir"
  done
  echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
  echo 'root:x:0:' >"$root/etc/group"
  add_user "$root" nobody 65534 /nonexistent
}

# add_user ROOT NAME ID HOME
add_user() {
  echo "$2:x:$3:$3::$4:/bin/sh" >>"$1/etc/passwd"
  echo "$2:x:$3:" >>"$1/etc/group"
  [[ $4 == /nonexistent ]] || install -d -o "$3" -g "$3" "$1$4"
}

add_applets() {
  local applet
  while read -r applet; do
    [[ -e $1/usr/bin/$applet ]] || ln -s busybox "$1/usr/bin/$applet"
  done < <("$1/usr/bin/busybox" --list)
}

# image_path NAME: where the finished archive is; the name changes with the recipe.
image_path() {
  local recipe file
  recipe=$({
    declare -f "image_$1" unpack skeleton add_user add_applets debootstrap_to
    [[ $(declare -f "image_$1") != *go_program* ]] || declare -f go_program
    printf '%s\n' "$IMAGE_SUITE" "${SLIM_OPTIONS[@]}"
    cat "$LIB_DIR/oci.py"
    [[ $1 != coredns ]] || programs_path coredns
    case $1 in
      controller) chart_version && sha256sum <"$(programs_dir)/sterna-controller" ;;
      sternad)
        chart_version && cat "$REPO_DIR/install/kubernetes/on-node"
        for file in containerd-shim-sterna-v1 sternad sterna; do
          sha256sum <"$(programs_dir)/$file"
        done
        ;;
    esac
    for file in "$LIB_DIR"/images/*; do
      [[ $(declare -f "image_$1") != *"${file##*/}"* ]] || cat "$file"
    done
  } | sha256sum)
  echo "$STERNA_CACHE/images/$1-${recipe:0:12}.tar"
}

ensure_image() {
  [[ $1 != coredns ]] || ensure_programs coredns
  [[ -e $(image_path "$1") ]] || with_lock "$STERNA_CACHE/locks/image-$1" build_image "$1"
}

build_image() {
  local name=$1 path root started old reference settings
  path=$(image_path "$name")
  [[ ! -e $path ]] || return 0
  need python3 python3
  root=$STERNA_CACHE/images/image-$name.new
  started=$(now_ms)
  say "building the image $name"
  mkdir -p "${path%/*}"
  [[ ! -e $root ]] || remove_tree "$root"
  "image_$name" "$root"
  python3 "$LIB_DIR/oci.py" "$root" "$path.new" "$reference" "$settings" >"$path.digest"
  echo "$reference" >"$path.reference"
  remove_tree "$root"
  mv "$path.new" "$path"
  say "built $reference ($(($(stat -c %s "$path") / 1000000)) MB) in $((($(now_ms) - started) / 1000)) s"
  for old in "$STERNA_CACHE/images/$name"-*.tar; do
    [[ $old == "$path" ]] || rm -f "$old" "$old".*
  done
}

# import_image NODE NAMESPACE NAME: unless the node has the very same one.
import_image() {
  local node=$1 namespace=$2 name=$3 path reference
  path=$(image_path "$name")
  reference=$(<"$path.reference")
  if [[ $(node_run "$node" ctr -n "$namespace" images list "name==$reference") == *"$(<"$path.digest")"* ]]; then
    return 0
  fi
  import_archive "$node" "$namespace" "$path"
  say "$node has $reference"
}

# import_archive NODE NAMESPACE FILE
import_archive() {
  node_run "$1" ctr -n "$2" images import - <"$3" >/dev/null ||
    die "node $1 did not take $3: see 'hack/nodes log $1 containerd'"
}
