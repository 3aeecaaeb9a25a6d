use std::os::unix::fs::symlink;

use super::*;

/// A state.json of runc 1.3.6 for this very process, cut down to what is read.
fn state_json(rootfs: &Path, cgroup_paths: &str) -> String {
    let pid = std::process::id() as i32;
    format!(
        r#"{{"id":"web","init_process_pid":{pid},"init_process_start":{start},
        "config":{{"rootfs":{rootfs:?},"readonlyfs":false,
          "mounts":[{{"source":"proc","destination":"/proc","device":"proc","flags":14}},
            {{"source":"/srv","destination":"/var/run/srv","device":"bind","flags":20480}},
            {{"source":"/etc/hosts","destination":"/etc/hosts","device":"bind"}}],
          "devices":[{{"type":99,"major":1,"minor":3,"path":"/dev/null"}}],
          "namespaces":[{{"type":"NEWNET","path":"/proc/self/ns/net"}},{{"type":"NEWPID","path":""}}],
          "mask_paths":["/proc/kcore-of-nothing","/proc/version","/proc/sys"],
          "labels":["bundle=/run/web"]}},
        "cgroup_paths":{cgroup_paths},
        "external_descriptors":["pipe:[1]","/dev/null","pipe:[2]"]}}"#,
        start = start_time(pid).unwrap(),
    )
}

const V1: &str = r#"{"":"/sys/fs/cgroup/unified/web","freezer":"/sys/fs/cgroup/freezer/web"}"#;
const V2: &str = r#"{"":"/sys/fs/cgroup/web"}"#;

struct Fixture {
    directory: tempfile::TempDir,
}

impl Fixture {
    fn new(cgroup_paths: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let rootfs = directory.path().join("rootfs");
        fs::create_dir_all(rootfs.join("var")).unwrap();
        symlink("/run", rootfs.join("var/run")).unwrap();
        let container = directory.path().join("runc/web");
        fs::create_dir_all(&container).unwrap();
        fs::write(
            container.join("state.json"),
            state_json(&rootfs, cgroup_paths),
        )
        .unwrap();
        Self { directory }
    }

    fn container(&self) -> RuncContainer {
        RuncContainer {
            runc_root: self.directory.path().join("runc"),
            id: "web".into(),
        }
    }

    fn options(&self) -> CheckpointOptions {
        CheckpointOptions::new(self.directory.path().join("images"))
    }

    fn request(&self) -> DumpRequest {
        dump_request_for_runc(&self.container(), &self.options()).unwrap()
    }
}

#[test]
fn mounts_from_outside_are_named_by_where_they_lead_in_the_container() {
    let request = Fixture::new(V1).request();
    let mounts: Vec<_> = request
        .external_mounts
        .iter()
        .map(|mount| (mount.key.to_str().unwrap(), mount.value.to_str().unwrap()))
        .collect();
    assert_eq!(
        mounts,
        [
            ("/run/srv", "/run/srv"),
            ("/etc/hosts", "/etc/hosts"),
            // A masked directory is none, one that is not there neither.
            ("/proc/version", "/dev/null"),
            ("/dev/null", "/dev/null"),
        ]
    );
}

#[test]
fn joined_namespaces_are_external_and_own_ones_are_not() {
    let request = Fixture::new(V1).request();
    let inode = sys::netns::inode(Path::new("/proc/self/ns/net")).unwrap();
    assert_eq!(request.external, [format!("net[{inode}]:extRootNetNS")]);
    assert_eq!(request.empty_namespaces, libc::CLONE_NEWNET);
}

#[test]
fn the_freezer_is_the_one_of_the_hierarchy_that_the_node_uses() {
    let state = Fixture::new(V1).container().state().unwrap();
    assert_eq!(
        state.freezer().unwrap(),
        Freezer::V1("/sys/fs/cgroup/freezer/web".into())
    );
    let fixture = Fixture::new(V2);
    let state = fixture.container().state().unwrap();
    assert_eq!(
        state.freezer().unwrap(),
        Freezer::V2("/sys/fs/cgroup/web".into())
    );
    let directory = fixture.request().freeze_cgroup;
    assert_eq!(directory, Some("/sys/fs/cgroup/web".into()));
    let state = Fixture::new("{}").container().state().unwrap();
    assert!(matches!(
        state.freezer(),
        Err(ContainerError::NoFreezer { .. })
    ));
}

#[test]
fn the_names_of_stdio_are_written_where_runc_restore_reads_them() {
    let fixture = Fixture::new(V1);
    fixture.request();
    let text = fs::read(fixture.options().image_path.join(DESCRIPTORS_FILE)).unwrap();
    let names: Vec<String> = serde_json::from_slice(&text).unwrap();
    assert_eq!(names, ["pipe:[1]", "/dev/null", "pipe:[2]"]);
}

#[test]
fn options_are_those_of_containerd() {
    let fixture = Fixture::new(V1);
    let defaults = fixture.request();
    assert!(defaults.leave_running && defaults.orphan_pts_master && !defaults.tcp_established);
    assert_eq!(defaults.cgroups, Some(CgroupsMode::Default));
    assert_eq!(defaults.config_file, Some(RUNC_CONFIG_FILE.into()));
    let options = CheckpointOptions {
        exit: true,
        open_tcp: true,
        cgroups_mode: "ignore".into(),
        empty_namespaces: vec!["network".into()],
        ..fixture.options()
    };
    let request = dump_request_for_runc(&fixture.container(), &options).unwrap();
    assert!(!request.leave_running && request.tcp_established);
    assert_eq!(request.cgroups, Some(CgroupsMode::Ignore));
}

#[test]
fn unknown_options_are_refused_as_runc_does() {
    let fixture = Fixture::new(V1);
    let refused = |options| {
        let error = dump_request_for_runc(&fixture.container(), &options).unwrap_err();
        matches!(error, ContainerError::Option { .. })
    };
    assert!(refused(CheckpointOptions {
        cgroups_mode: "hard".into(),
        ..fixture.options()
    }));
    let empty_namespaces = vec!["ipc".into()];
    assert!(refused(CheckpointOptions {
        empty_namespaces,
        ..fixture.options()
    }));
}

#[test]
fn a_process_that_only_has_the_same_pid_is_not_the_container() {
    let fixture = Fixture::new(V1);
    let path = fixture.container().runc_root.join("web/state.json");
    let start = start_time(std::process::id() as i32).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    let stale = text.replace(&format!("start\":{start}"), "start\":1");
    fs::write(&path, stale).unwrap();
    let error = fixture.container().state().unwrap_err();
    assert_eq!(error.to_string(), "container web does not run");
}

#[test]
fn cgroup_hierarchies_are_named_once_by_their_mount_points() {
    let text = b"\
31 24 0:27 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
34 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:31 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
36 31 0:31 / /elsewhere/freezer2 rw - cgroup cgroup rw,freezer
37 31 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";
    let names = hierarchies_of(text);
    assert_eq!(
        names,
        [PathBuf::from("cpu,cpuacct"), PathBuf::from("freezer")]
    );
}
