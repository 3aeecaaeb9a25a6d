//! What a node holds, so that a test can say that nothing was left over.

use std::collections::BTreeSet;

use crate::node::Node;
use crate::wait::DEADLINE;

/// Prints one line for each thing that a container or a migration could leave.
///
/// Images, their content and their committed snapshots are meant to stay, logs
/// too, and so are the arrival records, which answer whoever asks late. A network
/// namespace is listed by its name and by its process-less mount.
const LIST: &str = r#"
cd /
for dir in /proc/[0-9]*; do
  words=$(tr '\0' ' ' <"$dir/cmdline" 2>/dev/null) || continue
  case $words in
    *containerd-shim* | *criu* | *runc* | *sterna-* | *valkey* | *nginx* | *python3* | *server*) echo "process $words" ;;
  esac
done
awk '$5 != "/run/netns" { print "mount", $5 }' /proc/self/mountinfo
for namespace in $(ls /run/netns 2>/dev/null); do echo "network namespace $namespace"; done
ip -o link | awk -F': ' '{ sub(/@.*/, "", $2); print "network device", $2 }'
nft list ruleset | sed 's/^/nftables /'
files() {
  [ ! -d "$1" ] || find "$@" -printf 'file %p\n'
}
# Directories that are named after a namespace or a kind of file stay.
files /run/containerd/s -mindepth 1
files /run/containerd/fifo -mindepth 1
for dir in /run/containerd/runc /run/containerd/io.containerd.runtime.v2.task \
  /run/containerd/io.containerd.grpc.v1.cri /var/lib/containerd/io.containerd.grpc.v1.cri \
  /var/lib/containerd/io.containerd.runtime.v2.task; do
  files $dir -mindepth 2
done
files /run/sterna -mindepth 1 \( ! -type d -o -path '*/staging/*' \) ! -path '/run/sterna/arrivals/*'
files /var/lib/sterna -mindepth 1 ! -path '/var/lib/sterna/logs*'
files /tmp -mindepth 1
files /dev/shm -mindepth 1
# runc makes a group for the namespace with its first container, and keeps it.
find /sys/fs/cgroup -type d ! -path '*/default' | sed 's/^/cgroup /'
awk 'NR > 1 && NF == 8 { print "socket", $8 }' /proc/net/unix
ctr namespaces list -q | while read -r ns; do
  ctr -n "$ns" containers list -q | sed "s/^/container $ns /"
  ctr -n "$ns" tasks list -q | sed "s/^/task $ns /"
  ctr -n "$ns" leases list -q | sed "s/^/lease $ns /"
  ctr -n "$ns" snapshots list | awk -v ns="$ns" '$NF == "Active" || $NF == "View" { print "snapshot", ns, $1 }'
done
"#;

/// Everything on a node that a container or a migration could leave behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory(BTreeSet<String>);

impl Inventory {
    /// What the node holds now.
    pub fn of(node: &Node) -> Self {
        let listing = node.exec_with(&["sh", "-s"], LIST.as_bytes());
        Self(
            listing
                .success()
                .lines()
                .map(|line| line.trim_end().to_owned())
                .collect(),
        )
    }

    /// Fails unless the node comes back to this: what was there may be gone,
    /// nothing may have been added.
    #[track_caller]
    pub fn assert_nothing_added(&self, node: &Node) {
        let begun = std::time::Instant::now();
        loop {
            let now = Self::of(node);
            let added: Vec<_> = now.0.difference(&self.0).cloned().collect();
            if added.is_empty() {
                return;
            }
            // Much is cleaned up a moment after whoever asked was answered.
            assert!(
                begun.elapsed() < DEADLINE,
                "left over on node {}:\n  {}",
                node.name(),
                added.join("\n  ")
            );
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
    }
}
