//! Mounts that are really made; they need root.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use containerd_shim_protos::api::Mount;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::rootfs::{mount_all, unmount};

/// Runs `work` in a directory of its own, in a mount namespace of its own.
fn apart(work: impl FnOnce(&Path) + Send) {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: mounting needs root");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("rootfs")).unwrap();
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_NEWNS).unwrap();
                let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
                mount::<str, str, str, str>(None, "/", None, private, None).unwrap();
                work(directory.path());
            })
            .join()
            .unwrap();
    });
}

fn request(kind: &str, source: &Path, options: &[&str]) -> Mount {
    Mount {
        type_: kind.into(),
        source: source.to_str().unwrap().into(),
        options: options.iter().map(|&option| option.into()).collect(),
        ..Default::default()
    }
}

/// Layers as directories that each hold a file with the layer's number as its name.
fn layers(directory: &Path, count: usize) -> Vec<PathBuf> {
    (0..count)
        .map(|number| {
            let layer = directory.join(format!("a-directory-with-a-long-name-{number}/fs"));
            fs::create_dir_all(&layer).unwrap();
            fs::write(layer.join(number.to_string()), "").unwrap();
            layer
        })
        .collect()
}

fn lowerdir(layers: &[PathBuf]) -> String {
    let names: Vec<&str> = layers.iter().map(|layer| layer.to_str().unwrap()).collect();
    format!("lowerdir={}", names.join(":"))
}

fn writable(directory: &Path) -> [String; 2] {
    ["upperdir", "workdir"].map(|name| {
        let path = directory.join(name);
        fs::create_dir(&path).unwrap();
        format!("{name}={}", path.display())
    })
}

fn mounts_below(path: &Path) -> usize {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    table
        .lines()
        .filter(|line| line.contains(path.to_str().unwrap()))
        .count()
}

#[test]
fn more_layers_than_a_page_can_name_are_mounted() {
    apart(|directory| {
        let lower = lowerdir(&layers(directory, 100));
        assert!(lower.len() > 4096);
        let [upper, work] = writable(directory);
        let rootfs = directory.join("rootfs");
        let overlay = request("overlay", Path::new("overlay"), &[&lower, &upper, &work]);
        mount_all(&[overlay], &rootfs).unwrap();
        assert!(rootfs.join("0").exists() && rootfs.join("99").exists());
        fs::write(rootfs.join("new"), "").unwrap();
        assert!(directory.join("upperdir/new").exists());
    });
}

#[test]
fn owners_of_lower_layers_are_mapped_and_nothing_else_stays_mounted() {
    apart(|directory| {
        let layers = layers(directory, 3);
        chown(layers[1].join("1"), Some(7), Some(8)).unwrap();
        let [upper, work] = writable(directory);
        let options = [
            &lowerdir(&layers),
            &upper,
            &work,
            "uidmap=0:100000:1000",
            "gidmap=0:200000:5,5:300000:1000",
        ];
        let rootfs = directory.join("rootfs");
        let overlay = request("overlay", Path::new("overlay"), &options);
        mount_all(&[overlay], &rootfs).unwrap();
        let owner = |name| {
            let metadata = fs::metadata(rootfs.join(name)).unwrap();
            (metadata.uid(), metadata.gid())
        };
        assert_eq!(owner("0"), (100_000, 200_000));
        assert_eq!(owner("1"), (100_007, 300_003));
        assert_eq!(mounts_below(directory), 1);
        unmount(&rootfs).unwrap();
    });
}

#[test]
fn owners_of_a_bind_mount_are_mapped() {
    apart(|directory| {
        let source = &layers(directory, 1)[0];
        let rootfs = directory.join("rootfs");
        let options = ["rbind", "ro", "uidmap=0:1000:1", "gidmap=0:2000:1"];
        mount_all(&[request("bind", source, &options)], &rootfs).unwrap();
        assert_eq!(fs::metadata(rootfs.join("0")).unwrap().uid(), 1000);
        assert!(fs::write(rootfs.join("new"), "").is_err());
        assert_eq!(fs::metadata(source.join("0")).unwrap().uid(), 0);
    });
}

#[test]
fn a_mount_with_a_target_goes_below_the_root() {
    apart(|directory| {
        let source = &layers(directory, 1)[0];
        let rootfs = directory.join("rootfs");
        let mut below = request("tmpfs", Path::new("tmpfs"), &[]);
        below.target = "/var/data".into();
        let root = request("bind", source, &["rbind", "rw"]);
        mount_all(&[root, below], &rootfs).unwrap();
        fs::write(rootfs.join("var/data/new"), "").unwrap();
        assert!(!source.join("var/data/new").exists());
    });
}

#[test]
fn an_image_of_a_file_system_is_mounted_over_a_loop_device() {
    apart(|directory| {
        let image = directory.join("image");
        fs::File::create(&image).unwrap().set_len(4 << 20).unwrap();
        let made = Command::new("mkfs.ext4").arg("-q").arg(&image).status();
        if !made.is_ok_and(|status| status.success()) {
            println!("skipped: mkfs.ext4 is not installed");
            return;
        }
        let rootfs = directory.join("rootfs");
        mount_all(&[request("ext4", &image, &["loop", "ro"])], &rootfs).unwrap();
        assert!(rootfs.join("lost+found").is_dir());
        unmount(&rootfs).unwrap();
    });
}
