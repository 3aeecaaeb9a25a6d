//! Dumps a process tree or a container of runc by hand, the way an engine does:
//! freeze, keep CRIU away from large mappings, stop at any step.
//!
//! ```text
//! dump process PID IMAGES [OPTION...]
//! dump runc ROOT ID IMAGES [OPTION...]
//! dump checkpoint ROOT ID IMAGES [OPTION...]   at one go
//! dump restore IMAGES [no]
//! dump clear-lazy IMAGES
//!
//! --own BYTES     CRIU sees no private anonymous mapping of at least this size
//! --snap FILE     write these to FILE, and their places to FILE.addr, at post-dump
//! --freeze        freeze the container's cgroup first
//! --tcp           dump TCP connections
//! --iptables      lock the network with iptables instead of nftables
//! --log-level N
//! --nack STEP     say no at a step such as PostDump
//! --hold STEP MS  wait there
//! --die STEP      kill this process there
//! --kill STEP     kill the helper there
//! --kill-criu STEP
//! --refreeze      ask for a freeze again at post-dump
//! ```

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criu::{
    Action, CheckpointOptions, DumpEvent, DumpRequest, DumpSession, Freezer, Interceptor, Memory,
    NetworkLock, RuncContainer, Tools,
};

type Failure = Box<dyn std::error::Error>;

#[derive(Default)]
struct Arguments {
    own: Option<u64>,
    snap: Option<PathBuf>,
    freeze: bool,
    refreeze: bool,
    tcp: bool,
    iptables: bool,
    log_level: Option<i32>,
    at: HashMap<String, Deed>,
}

#[derive(Clone, Copy)]
enum Deed {
    Refuse,
    Die,
    KillHelper,
    KillCriu,
    Hold(u64),
}

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(criu::HELPER_ARGUMENT) {
        return criu::helper_main();
    }
    match run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                text = format!("{text}: {error}");
                cause = error.source();
            }
            println!("error: {text}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut words: impl Iterator<Item = String>) -> Result<(), Failure> {
    let mut word = || words.next().ok_or("missing argument");
    match word()?.as_str() {
        "process" => {
            let (pid, images) = (word()?.parse()?, PathBuf::from(word()?));
            let arguments = parse(words)?;
            fs::create_dir_all(&images)?;
            let mut request = DumpRequest::new(pid, images);
            request.shell_job = true;
            dump(request, None, &arguments)
        }
        "runc" => {
            let (container, images) = (runc(word()?, word()?), word()?);
            let arguments = parse(words)?;
            let request = criu::dump_request_for_runc(&container, &options(images, &arguments))?;
            let freezer = arguments
                .freeze
                .then(|| container.state()?.freezer())
                .transpose()?;
            dump(request, freezer, &arguments)
        }
        "checkpoint" => {
            let (container, images) = (runc(word()?, word()?), word()?);
            let arguments = parse(words)?;
            let options = CheckpointOptions {
                exit: false,
                ..options(images, &arguments)
            };
            let request = criu::dump_request_for_runc(&container, &options)?;
            let begun = Instant::now();
            criu::checkpoint(&std::env::current_exe()?, &Tools::find()?, &request)?;
            println!("done in {:?}", begun.elapsed());
            Ok(())
        }
        "restore" => {
            let images = PathBuf::from(word()?);
            let go_on = word().is_err();
            let pid = criu::restore_process(&Tools::find()?, &images, move |pid| {
                println!("commit point of {pid}, saying {go_on}");
                go_on
            })?;
            println!("restored {pid}");
            Ok(())
        }
        "clear-lazy" => {
            println!("cleared {}", criu::images::clear_lazy(Path::new(&word()?))?);
            Ok(())
        }
        _ => Err("process, runc, checkpoint, restore or clear-lazy?".into()),
    }
}

fn runc(root: String, id: String) -> RuncContainer {
    RuncContainer {
        runc_root: root.into(),
        id,
    }
}

fn options(images: String, arguments: &Arguments) -> CheckpointOptions {
    let mut options = CheckpointOptions::new(images);
    options.exit = true;
    options.open_tcp = arguments.tcp;
    options.network_lock = (!arguments.iptables).then_some(NetworkLock::Nftables);
    options.log_level = arguments.log_level.unwrap_or(options.log_level);
    options
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, Failure> {
    let mut arguments = Arguments::default();
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or("missing value");
        match word.as_str() {
            "--own" => arguments.own = Some(value()?.parse()?),
            "--snap" => arguments.snap = Some(value()?.into()),
            "--freeze" => arguments.freeze = true,
            "--refreeze" => arguments.refreeze = true,
            "--kill-criu" => drop(arguments.at.insert(value()?, Deed::KillCriu)),
            "--tcp" => arguments.tcp = true,
            "--iptables" => arguments.iptables = true,
            "--log-level" => arguments.log_level = Some(value()?.parse()?),
            "--nack" => drop(arguments.at.insert(value()?, Deed::Refuse)),
            "--die" => drop(arguments.at.insert(value()?, Deed::Die)),
            "--kill" => drop(arguments.at.insert(value()?, Deed::KillHelper)),
            "--hold" => drop(arguments.at.insert(value()?, Deed::Hold(value()?.parse()?))),
            other => return Err(format!("unknown option {other}").into()),
        }
    }
    Ok(arguments)
}

fn dump(
    request: DumpRequest,
    freezer: Option<Freezer>,
    arguments: &Arguments,
) -> Result<(), Failure> {
    let begun = Instant::now();
    let tell = |what: String| println!("{:7.1} ms  {what}", begun.elapsed().as_secs_f64() * 1e3);
    let tools = Tools::find()?;
    tell(format!("criu {} found", tools.version));
    let mut session = DumpSession::spawn(&std::env::current_exe()?, &tools)?;
    tell("criu waits".into());
    let interceptor = Interceptor::new(session.take_listener().ok_or("no listener")?);
    let slot = interceptor.memory();
    let answering = std::thread::spawn(move || interceptor.run());
    session.start(&request)?;
    let mut owned = None;
    let mut frozen = None;
    let ended = loop {
        let action = match session.next(Duration::from_secs(60)) {
            Ok(DumpEvent::Notify(action)) => action,
            Ok(DumpEvent::Finished) => break Ok(()),
            Err(error) => break Err(error),
        };
        tell(format!("{action:?}"));
        if action == Action::PreDump {
            let prepared = arguments
                .own
                .map(|least| Owned::prepare(request.pid, least));
            frozen = Some(Instant::now());
            if let Some(freezer) = &freezer {
                freezer.freeze(Duration::from_secs(2))?;
                tell("frozen".into());
            }
            if let Some(memory) = prepared.transpose()? {
                let memory = Arc::new(memory.claim()?);
                tell(format!("{} MiB are not criu's", memory.bytes() >> 20));
                slot.set(memory.clone());
                owned = Some(memory);
            }
        }
        if let (Action::PostDump, Some(file), Some(memory)) = (&action, &arguments.snap, &owned) {
            memory.write(file)?;
            tell("snapshot written".into());
        }
        if let (Action::PostDump, true, Some(freezer)) = (&action, arguments.refreeze, &freezer) {
            freezer.freeze_later()?;
        }
        let mut go_on = true;
        match arguments.at.get(&format!("{action:?}")) {
            None => {}
            Some(Deed::Refuse) => go_on = false,
            Some(Deed::Hold(ms)) => std::thread::sleep(Duration::from_millis(*ms)),
            Some(Deed::Die) => kill(std::process::id()),
            Some(Deed::KillHelper) => kill(child_of(std::process::id())?),
            Some(Deed::KillCriu) => kill(child_of(child_of(std::process::id())?)?),
        }
        if action == Action::PostDump {
            let frozen = frozen.map(|since| since.elapsed()).unwrap_or_default();
            let alive = session.still_waits()?;
            tell(format!("stopped for {frozen:.1?}; still waiting: {alive}"));
        }
        if let Err(error) = session.answer(go_on) {
            break Err(error);
        }
        if let (Action::PostDump, true, true, Some(freezer)) =
            (&action, arguments.refreeze, go_on, &freezer)
        {
            freezer.thaw()?;
        }
    };
    tell(format!(
        "ended, {}",
        if ended.is_ok() {
            "successfully"
        } else {
            "without success"
        }
    ));
    drop(session);
    let stats = answering.join().map_err(|_| "the interceptor panicked")??;
    tell(format!("criu is gone: {stats:?}"));
    if let (Err(_), Some(freezer)) = (&ended, &freezer) {
        tell(format!("still frozen: {}; thawing", freezer.is_frozen()?));
        freezer.thaw()?;
    }
    Ok(ended?)
}

fn kill(pid: u32) {
    println!("killing {pid}");
    let pid = nix::unistd::Pid::from_raw(pid as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap_or_default();
    std::thread::sleep(Duration::from_millis(50));
}

fn child_of(pid: u32) -> Result<u32, Failure> {
    // A child belongs to the thread that made it.
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let children = fs::read_to_string(task?.path().join("children"))?;
        if let Some(child) = children.split_whitespace().next() {
            return Ok(child.parse()?);
        }
    }
    Err("no child".into())
}

/// What an engine would own: large private anonymous mappings of one process.
struct Owned {
    pid: i32,
    least: u64,
    maps: Vec<u8>,
    smaps: Vec<u8>,
    ranges: Vec<Range<u64>>,
    stack_pages: Vec<u64>,
}

impl Owned {
    /// While it runs.
    fn prepare(pid: i32, least: u64) -> std::io::Result<Self> {
        Ok(Self {
            pid,
            least,
            smaps: fs::read(format!("/proc/{pid}/smaps"))?,
            maps: fs::read(format!("/proc/{pid}/maps"))?,
            ranges: Vec::new(),
            stack_pages: Vec::new(),
        })
    }

    /// While it stands still.
    fn claim(mut self) -> std::io::Result<Self> {
        for line in fs::read_to_string(format!("/proc/{}/maps", self.pid))?.lines() {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let anonymous = fields.get(4) == Some(&"0")
                && fields
                    .get(5)
                    .is_none_or(|name| matches!(*name, "[heap]" | "[stack]"));
            let range = fields[0].split_once('-').and_then(|(start, end)| {
                let number = |text| u64::from_str_radix(text, 16).ok();
                Some(number(start)?..number(end)?)
            });
            if let Some(range) = range.filter(|range| range.end - range.start >= self.least)
                && anonymous
                && fields[1].starts_with("rw")
                && fields[1].ends_with('p')
            {
                self.ranges.push(range);
            }
        }
        for task in fs::read_dir(format!("/proc/{}/task", self.pid))? {
            let text = fs::read_to_string(task?.path().join("syscall"))?;
            let mut fields = text.split_whitespace().rev();
            let pointer = fields.nth(1).and_then(|field| field.strip_prefix("0x"));
            if let Some(pointer) = pointer.and_then(|text| u64::from_str_radix(text, 16).ok()) {
                self.stack_pages.push(pointer & !4095);
            }
        }
        self.stack_pages.sort_unstable();
        self.stack_pages.dedup();
        Ok(self)
    }

    fn bytes(&self) -> u64 {
        self.ranges
            .iter()
            .map(|range| range.end - range.start)
            .sum()
    }

    /// For `proofs/lazyd.c`: the content, and a line per range with address,
    /// length and place in the file.
    fn write(&self, path: &Path) -> Result<(), Failure> {
        let memory = fs::File::open(format!("/proc/{}/mem", self.pid))?;
        let mut content = fs::File::create(path)?;
        let mut places = fs::File::create(format!("{}.addr", path.display()))?;
        let mut offset = 0;
        for range in &self.ranges {
            let length = range.end - range.start;
            let mut buffer = vec![0; length as usize];
            if memory.read_exact_at(&mut buffer, range.start).is_err() {
                // Guard regions, in the stacks of threads, cannot be read.
                for (page, address) in buffer.chunks_mut(4096).zip((range.start..).step_by(4096)) {
                    memory.read_exact_at(page, address).unwrap_or_default();
                }
            }
            content.write_all(&buffer)?;
            writeln!(places, "{} {length} {offset}", range.start)?;
            offset += length;
        }
        Ok(())
    }
}

impl Memory for Owned {
    fn owns(&self, pid: i32, range: Range<u64>) -> bool {
        let inside = |own: &Range<u64>| own.start <= range.start && range.end <= own.end;
        pid == self.pid && self.ranges.iter().any(inside)
    }

    fn may_own(&self, pid: i32, range: Range<u64>) -> bool {
        let overlaps = |own: &Range<u64>| own.start < range.end && range.start < own.end;
        pid == self.pid && self.ranges.iter().any(overlaps)
    }

    fn stack_pages(&self, pid: i32) -> &[u64] {
        if pid == self.pid {
            &self.stack_pages
        } else {
            &[]
        }
    }

    fn smaps(&self, pid: i32) -> Option<Vec<u8>> {
        let same = fs::read(format!("/proc/{pid}/maps")).is_ok_and(|maps| maps == self.maps);
        (pid == self.pid && same).then(|| self.smaps.clone())
    }
}
