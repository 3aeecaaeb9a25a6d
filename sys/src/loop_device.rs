//! Loop devices: a file as a block device (`loop(4)`).
//!
//! A device that [`attach`] made detaches itself when its last user is gone: the
//! mount, or the [`LoopDevice`] if it was never mounted.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

/// `linux/loop.h`; the numbers are the same on every architecture.
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// Others take free devices too, between our asking for one and taking it.
const ATTEMPTS: usize = 100;

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
#[derive(Default)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    // Two names of 64 bytes, a key of 32, two words of 8.
    rest: [u64; 22],
}

/// `struct loop_config` of `linux/loop.h` (Linux 5.8).
#[repr(C)]
#[derive(Default)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// A device that is attached at least as long as this lives.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    _open: File,
}

impl LoopDevice {
    /// Its device node.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Makes `backing` a block device.
///
/// # Errors
///
/// When the file cannot be opened, when there are no loop devices here, when the
/// kernel is older than 5.8 (`EINVAL`).
pub fn attach(backing: &Path, read_only: bool) -> io::Result<LoopDevice> {
    let backing = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(backing)?;
    let control = File::options()
        .read(true)
        .write(true)
        .open("/dev/loop-control")?;
    for _ in 0..ATTEMPTS {
        let path = PathBuf::from(format!("/dev/loop{}", free_device(&control)?));
        let device = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(&path)?;
        match configure(&device, &backing, read_only) {
            Ok(()) => {
                return Ok(LoopDevice {
                    path,
                    _open: device,
                });
            }
            // Somebody else was quicker.
            Err(Errno::EBUSY) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::EBUSY.into())
}

fn free_device(control: &File) -> io::Result<libc::c_int> {
    // SAFETY: LOOP_CTL_GET_FREE takes no argument and touches no memory of ours.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
    Ok(Errno::result(number)?)
}

fn configure(device: &File, backing: &File, read_only: bool) -> Result<(), Errno> {
    let mut flags = LO_FLAGS_AUTOCLEAR;
    if read_only {
        flags |= LO_FLAGS_READ_ONLY;
    }
    let config = LoopConfig {
        fd: backing.as_raw_fd().cast_unsigned(),
        info: LoopInfo {
            flags,
            ..LoopInfo::default()
        },
        ..LoopConfig::default()
    };
    // SAFETY: the argument is a valid loop_config, which the kernel only reads; both descriptors are open for as long
    // as the call lasts.
    let result = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            LOOP_CONFIGURE as _,
            std::ptr::from_ref(&config),
        )
    };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    // linux/loop.h: static_assert of nobody's, so checked here.
    #[test]
    fn the_structures_are_as_large_as_the_kernels() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }

    #[test]
    fn a_file_becomes_a_device_and_stops_being_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [7; 4096]).unwrap();
        let device = match attach(file.path(), true) {
            Ok(device) => device,
            // Not for everybody, and not on every machine.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EACCES | libc::EPERM | libc::ENOENT)
                ) =>
            {
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let mut first = [0; 16];
        File::open(device.path())
            .unwrap()
            .read_exact(&mut first)
            .unwrap();
        assert_eq!(first, [7; 16]);
        let sys = Path::new("/sys/block")
            .join(device.path().file_name().unwrap())
            .join("loop/backing_file");
        let ours = || {
            std::fs::read_to_string(&sys)
                .is_ok_and(|backing| Path::new(backing.trim()) == file.path())
        };
        assert!(ours());
        drop(device);
        assert!(!ours(), "nobody uses it any more");
    }

    #[test]
    fn a_file_that_is_not_there_is_an_error() {
        assert!(attach(Path::new("/nowhere"), true).is_err());
    }
}
