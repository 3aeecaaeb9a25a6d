//! Tells when the kernel kills a process of a container for want of memory.
//!
//! Version 1 signals an eventfd; version 2 changes `memory.events`, which
//! inotify shows. Before a container's exit is published the counter is read a
//! last time, so that the reason is known before its consequence.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::cgroup::Cgroup;
use crate::container::Container;

/// Watches one container. Dropping it ends that.
#[derive(Debug)]
pub(crate) struct OomWatch {
    task: JoinHandle<()>,
    counter: Counter,
    /// Kills that were told.
    told: Arc<AtomicU64>,
}

/// Where kills are counted.
#[derive(Debug, Clone)]
struct Counter(PathBuf);

impl Counter {
    fn of(cgroup: &Cgroup) -> Option<Self> {
        let file = match cgroup {
            Cgroup::V1(_) => "memory.oom_control",
            Cgroup::V2(_) => "memory.events",
        };
        Some(Self(cgroup.directory("memory")?.join(file)))
    }

    /// 0 where it cannot be read: the group may be gone.
    fn read(&self) -> u64 {
        fs::read_to_string(&self.0).map_or(0, |text| kills(&text))
    }
}

/// The line `oom_kill N`, which both versions have.
fn kills(text: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix("oom_kill "))
        .and_then(|number| number.trim().parse().ok())
        .unwrap_or(0)
}

impl OomWatch {
    /// None where memory is not accounted.
    pub(crate) fn start(container: &Arc<Container>, cgroup: &Cgroup) -> Option<Self> {
        let counter = Counter::of(cgroup)?;
        let signal = match Signal::open(cgroup) {
            Ok(signal) => signal?,
            Err(error) => {
                tracing::debug!(%error, id = container.id, "memory is not watched");
                return None;
            }
        };
        let told = Arc::new(AtomicU64::new(counter.read()));
        // Weak: a container must not be kept by what watches it.
        let watched = Arc::downgrade(container);
        let (seen, at) = (Arc::clone(&told), counter.clone());
        let task = tokio::spawn(async move {
            while signal.next().await.is_ok() {
                let Some(container) = watched.upgrade() else {
                    return;
                };
                if news(&seen, at.read()) {
                    container.publish_oom();
                }
            }
        });
        Some(Self {
            task,
            counter,
            told,
        })
    }

    /// Ends watching; whether there was a kill that has not been told.
    pub(crate) async fn stop(self) -> bool {
        self.task.abort();
        news(&self.told, self.counter.read())
    }
}

impl Drop for OomWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Remembers the count; whether it grew.
fn news(told: &AtomicU64, count: u64) -> bool {
    told.fetch_max(count, Ordering::Relaxed) < count
}

/// Something that becomes readable when it is worth looking.
struct Signal(AsyncFd<OwnedFd>);

impl Signal {
    /// None where there is no such file: a version 2 group without the memory
    /// controller.
    fn open(cgroup: &Cgroup) -> io::Result<Option<Self>> {
        let Some(directory) = cgroup.directory("memory") else {
            return Ok(None);
        };
        let opened = match cgroup {
            Cgroup::V1(_) => eventfd_of(directory),
            Cgroup::V2(_) => inotify_of(directory),
        };
        match opened {
            Ok(fd) => Ok(Some(Self(crate::io::on_reactor(fd)?))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn next(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut bytes = [MaybeUninit::uninit(); 512];
            // An eventfd's counter or inotify's events: what they say is read
            // elsewhere.
            let read = ready.try_io(|fd| Ok(rustix::io::read(fd, &mut bytes[..]).map(|_| ())?));
            match read {
                Err(_would_block) => {}
                Ok(read) => return read,
            }
        }
    }
}

fn eventfd_of(directory: &Path) -> io::Result<OwnedFd> {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let control = fs::File::open(directory.join("memory.oom_control"))?;
    fs::write(
        directory.join("cgroup.event_control"),
        format!("{} {}", event.as_raw_fd(), control.as_raw_fd()),
    )?;
    Ok(event)
}

fn inotify_of(directory: &Path) -> io::Result<OwnedFd> {
    let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(
        &events,
        directory.join("memory.events"),
        inotify::WatchFlags::MODIFY,
    )?;
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_counted_in_both_versions() {
        assert_eq!(kills("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"), 3);
        assert_eq!(kills("low 0\nhigh 0\nmax 9\noom 9\noom_kill 2\n"), 2);
        assert_eq!(kills(""), 0);
    }

    #[test]
    fn a_kill_is_told_once() {
        let told = AtomicU64::new(1);
        assert!(!news(&told, 1));
        assert!(news(&told, 2));
        assert!(!news(&told, 2));
        assert!(!news(&told, 0));
    }

    #[tokio::test]
    async fn a_change_of_memory_events_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("memory.events");
        let cgroup = Cgroup::V2(dir.path().to_owned());
        assert!(Signal::open(&cgroup).unwrap().is_none());
        fs::write(&file, "oom_kill 0\n").unwrap();
        let signal = Signal::open(&cgroup).unwrap().unwrap();
        fs::write(&file, "oom_kill 1\n").unwrap();
        signal.next().await.unwrap();
        assert_eq!(Counter::of(&cgroup).unwrap().read(), 1);
    }
}
