//! A program that does to its memory what programs do, only more of it: the adversary of page tracking in tests
//! (feature `testing`).
//!
//! It never allocates once it runs, so that a fork of it can go on at any point.

use std::io;
use std::time::Duration;

/// Where the memory lies that is changed: places of [`SLOT_BYTES`] each, far from everything else.
const BASE: u64 = 0x1234_0000_0000;
/// Distance of two places.
const SLOT_BYTES: u64 = 64 << 20;
/// The largest mapping made.
const MAX_BYTES: u64 = 12 << 20;
const SLOTS: usize = 8;
/// Apart from each other, so that several threads have places of their own.
const THREAD_BYTES: u64 = 64 << 30;

/// What a child does before it ends.
const CHILD_STEPS: u64 = 5_000;

const PAGE: u64 = 4096;
const HUGE: u64 = 2 << 20;

/// `MADV_GUARD_INSTALL` and `MADV_GUARD_REMOVE` (Linux 6.13).
const MADV_GUARD_INSTALL: libc::c_int = 102;
const MADV_GUARD_REMOVE: libc::c_int = 103;

/// What the program does.
#[derive(Debug, Clone, Copy)]
pub struct Churn {
    /// Decides everything that happens.
    pub seed: u64,
    /// Whether it forks children, which live on and do the same for a while.
    pub forks: bool,
    /// Whether it uses guard pages where the kernel has them.
    pub guards: bool,
    /// Threads that do the same at other places.
    pub threads: u32,
    /// After each change. Without a pause there is little left at the next look of what was there at the last; with one,
    /// most of it.
    pub pause: Duration,
}

impl Churn {
    /// Runs until it is killed, or the process that started it ends.
    ///
    /// # Errors
    ///
    /// Those of the system calls that change memory, which all should succeed.
    pub fn run(self) -> io::Result<()> {
        die_with_parent()?;
        for thread in 1..=u64::from(self.threads) {
            let seed = self.seed.wrapping_add(thread * 7919);
            std::thread::spawn(move || {
                // A failure would end the tracking of nothing: the process is what counts.
                Memory::new(thread, seed, self).run(None, false)
            });
        }
        Memory::new(0, self.seed, self).run(None, self.forks)
    }
}

fn die_with_parent() -> io::Result<()> {
    // SAFETY: the request takes a signal number and touches no memory.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }.into())
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A mapping at a place of its own, with parts of it missing.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    start: u64,
    /// 0: nothing is mapped.
    len: u64,
    writable: bool,
    readable: bool,
    /// A part that is unmapped or a guard region: offset and length.
    gap: (u64, u64),
    gap_is_guard: bool,
}

#[derive(Debug)]
struct Memory {
    slots: [Slot; SLOTS],
    base: u64,
    random: u64,
    heap: u64,
    heap_len: u64,
    guards: bool,
    pause: Duration,
    child: libc::pid_t,
}

impl Memory {
    fn new(thread: u64, seed: u64, churn: Churn) -> Self {
        Self {
            slots: [Slot::default(); SLOTS],
            base: BASE + thread * THREAD_BYTES,
            random: seed.wrapping_mul(2).wrapping_add(1),
            heap: 0,
            heap_len: 0,
            guards: churn.guards,
            pause: churn.pause,
            child: 0,
        }
    }

    fn run(mut self, steps: Option<u64>, forks: bool) -> io::Result<()> {
        let mut step = 0;
        while steps.is_none_or(|steps| step < steps) {
            step += 1;
            if !self.pause.is_zero() {
                std::thread::sleep(self.pause);
            }
            let slot = self.below(SLOTS as u64) as usize;
            match self.below(100) {
                0..=7 => self.map(slot)?,
                8..=10 => self.unmap(slot)?,
                11..=14 => self.relocate(slot)?,
                15..=18 => self.resize(slot)?,
                19..=22 => self.cut(slot)?,
                23..=26 => self.mend(slot)?,
                27..=34 => self.discard(slot)?,
                35..=37 => self.advise(slot)?,
                38..=41 => self.protect(slot)?,
                42..=44 if self.base == BASE => self.grow_heap()?,
                45 if forks => self.fork()?,
                46..=49 => self.read_file(slot)?,
                50..=54 => self.read_some(slot),
                _ => self.write(slot),
            }
        }
        Ok(())
    }

    /// A pseudo-random number below a limit.
    fn below(&mut self, limit: u64) -> u64 {
        // xorshift64*
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    fn place(&self, slot: usize) -> u64 {
        self.base + slot as u64 * SLOT_BYTES
    }

    /// A length in bytes, often a whole number of huge pages.
    fn some_len(&mut self) -> u64 {
        if self.below(2) == 0 {
            (1 + self.below(MAX_BYTES / HUGE)) * HUGE
        } else {
            (32 + self.below(MAX_BYTES / PAGE - 32)) * PAGE
        }
    }

    /// A part of a mapping that is there: offset and length.
    fn some_part(&mut self, slot: usize) -> Option<(u64, u64)> {
        let Slot {
            len,
            gap: (gap, gap_len),
            ..
        } = self.slots[slot];
        if len == 0 {
            return None;
        }
        let offset = self.below(len / PAGE) * PAGE;
        let longest = (len - offset).min(match self.below(4) {
            0 => PAGE,
            1 => 16 * PAGE,
            2 => HUGE,
            _ => MAX_BYTES,
        });
        let part = (offset, longest);
        if gap_len == 0 || part.0 >= gap + gap_len || part.0 + part.1 <= gap {
            Some(part)
        } else if part.0 < gap {
            Some((part.0, gap - part.0))
        } else {
            None
        }
    }

    fn map_at(start: u64, len: u64) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let at = std::ptr::with_exposed_provenance_mut(start as usize);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the place is one of ours, which no Rust object lives in.
        let mapped = unsafe { libc::mmap(at, len as usize, protection, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    fn unmap_at(start: u64, len: u64) -> io::Result<()> {
        let at = std::ptr::with_exposed_provenance_mut(start as usize);
        // SAFETY: as in `map_at`.
        check(unsafe { libc::munmap(at, len as usize) }.into())
    }

    fn advise_at(start: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
        let at = std::ptr::with_exposed_provenance_mut(start as usize);
        // SAFETY: as in `map_at`.
        check(unsafe { libc::madvise(at, len as usize, advice) }.into())
    }

    /// Maps a slot, over what is there.
    fn map(&mut self, slot: usize) -> io::Result<()> {
        let old = self.slots[slot];
        let len = self.some_len();
        let start = if self.below(2) == 0 {
            self.place(slot)
        } else {
            self.place(slot) + 5 * PAGE
        };
        if old.len > 0 {
            Self::unmap_at(old.start, old.len)?;
        }
        Self::map_at(start, len)?;
        self.slots[slot] = Slot {
            start,
            len,
            writable: true,
            readable: true,
            ..Slot::default()
        };
        if self.below(3) == 0 {
            // No huge pages on this kernel is fine.
            let _refused = Self::advise_at(start, len, libc::MADV_HUGEPAGE);
        }
        Ok(())
    }

    fn unmap(&mut self, slot: usize) -> io::Result<()> {
        let Slot { start, len, .. } = self.slots[slot];
        if len > 0 {
            Self::unmap_at(start, len)?;
            self.slots[slot] = Slot::default();
        }
        Ok(())
    }

    /// Moves a slot's memory to another, empty one.
    fn relocate(&mut self, slot: usize) -> io::Result<()> {
        let target = self.below(SLOTS as u64) as usize;
        let from = self.slots[slot];
        if from.len == 0 || from.gap.1 > 0 || self.slots[target].len > 0 {
            return Ok(());
        }
        let start = self.place(target) + (from.start - self.place(slot));
        let old = std::ptr::with_exposed_provenance_mut(from.start as usize);
        let new = std::ptr::with_exposed_provenance_mut::<libc::c_void>(start as usize);
        let keep = self.below(4) == 0;
        let flags = libc::MREMAP_MAYMOVE
            | libc::MREMAP_FIXED
            | if keep { libc::MREMAP_DONTUNMAP } else { 0 };
        let len = from.len as usize;
        // SAFETY: both places are ours, as in `map_at`.
        let moved = unsafe { libc::mremap(old, len, len, flags, new) };
        if moved == libc::MAP_FAILED {
            // Pieces with different advice are different mappings. Newer kernels move some of them before they refuse.
            Self::unmap_at(from.start, from.len)?;
            Self::unmap_at(start, from.len)?;
            self.slots[slot] = Slot::default();
            return Ok(());
        }
        self.slots[target] = Slot { start, ..from };
        if !keep {
            self.slots[slot] = Slot::default();
        }
        Ok(())
    }

    /// Makes a mapping longer or shorter where it is.
    fn resize(&mut self, slot: usize) -> io::Result<()> {
        let Slot {
            start, len, gap, ..
        } = self.slots[slot];
        if len == 0 || gap.1 > 0 {
            return Ok(());
        }
        let new_len = self.some_len();
        let at = std::ptr::with_exposed_provenance_mut(start as usize);
        // SAFETY: the place is ours and has room, as in `map_at`.
        let moved = unsafe { libc::mremap(at, len as usize, new_len as usize, 0) };
        if moved == libc::MAP_FAILED {
            // Pieces with different advice are different mappings, which do not grow together.
            return Ok(());
        }
        self.slots[slot].len = new_len;
        Ok(())
    }

    /// Takes a part out: unmaps it, or makes it a guard region.
    fn cut(&mut self, slot: usize) -> io::Result<()> {
        let Slot { start, gap, .. } = self.slots[slot];
        let guard = self.guards && self.below(2) == 0;
        let Some((offset, len)) = self.some_part(slot) else {
            return Ok(());
        };
        if gap.1 > 0 {
            return Ok(());
        }
        if guard {
            if Self::advise_at(start + offset, len, MADV_GUARD_INSTALL).is_err() {
                return Ok(());
            }
        } else {
            Self::unmap_at(start + offset, len)?;
        }
        self.slots[slot].gap = (offset, len);
        self.slots[slot].gap_is_guard = guard;
        Ok(())
    }

    /// Puts new memory where a part was taken out.
    fn mend(&mut self, slot: usize) -> io::Result<()> {
        let Slot {
            start,
            gap: (offset, len),
            gap_is_guard,
            writable,
            ..
        } = self.slots[slot];
        if len == 0 || !writable {
            return Ok(());
        }
        if gap_is_guard {
            Self::advise_at(start + offset, len, MADV_GUARD_REMOVE)?;
        } else {
            Self::map_at(start + offset, len)?;
        }
        self.slots[slot].gap = (0, 0);
        Ok(())
    }

    /// Drops the content of a part, often of whole page tables.
    fn discard(&mut self, slot: usize) -> io::Result<()> {
        let Slot {
            start,
            len,
            gap,
            gap_is_guard,
            ..
        } = self.slots[slot];
        let Some(mut part) = self.some_part(slot) else {
            return Ok(());
        };
        let whole = self.below(3);
        if whole == 0 && (gap.1 == 0 || gap_is_guard) {
            part = (0, len);
        } else if whole == 1 {
            let first = (start + part.0).next_multiple_of(HUGE);
            let end = (start + part.0 + part.1) / HUGE * HUGE;
            if first < end {
                part = (first - start, end - first);
            }
        }
        let advice = if self.below(8) == 0 {
            libc::MADV_FREE
        } else {
            libc::MADV_DONTNEED
        };
        Self::advise_at(start + part.0, part.1, advice)
    }

    /// Asks for huge pages, or makes some at once.
    fn advise(&mut self, slot: usize) -> io::Result<()> {
        let Slot { start, .. } = self.slots[slot];
        let Some((offset, len)) = self.some_part(slot) else {
            return Ok(());
        };
        let advice = [
            libc::MADV_HUGEPAGE,
            libc::MADV_NOHUGEPAGE,
            libc::MADV_COLLAPSE,
        ];
        let advice = advice[self.below(3) as usize];
        // Collapsing fails where memory is tracked or there is no huge page to give.
        let _refused = Self::advise_at(start + offset, len, advice);
        Ok(())
    }

    /// Changes what is allowed in a whole mapping.
    fn protect(&mut self, slot: usize) -> io::Result<()> {
        let Slot {
            start,
            len,
            gap,
            gap_is_guard,
            ..
        } = self.slots[slot];
        if len == 0 || gap.1 > 0 && !gap_is_guard {
            return Ok(());
        }
        let protection = match self.below(4) {
            0 => libc::PROT_NONE,
            1 => libc::PROT_READ,
            _ => libc::PROT_READ | libc::PROT_WRITE,
        };
        let at = std::ptr::with_exposed_provenance_mut(start as usize);
        // SAFETY: as in `map_at`.
        check(unsafe { libc::mprotect(at, len as usize, protection) }.into())?;
        self.slots[slot].readable = protection & libc::PROT_READ != 0;
        self.slots[slot].writable = protection & libc::PROT_WRITE != 0;
        Ok(())
    }

    /// Moves the program break and writes to what it gained.
    fn grow_heap(&mut self) -> io::Result<()> {
        // The raw system call: the C library's malloc notices foreign breaks and copes.
        // SAFETY: without an argument the break only tells where it is.
        let now = unsafe { libc::syscall(libc::SYS_brk, 0) } as u64;
        if self.heap == 0 {
            self.heap = now.next_multiple_of(PAGE);
        }
        if now > self.heap + self.heap_len.next_multiple_of(PAGE) {
            // Somebody else moved it: theirs from now on.
            return Ok(());
        }
        let len = self.below(1024) * PAGE;
        // SAFETY: memory between where the break was first and where it is is ours alone.
        let moved = unsafe { libc::syscall(libc::SYS_brk, self.heap + len) } as u64;
        if moved != self.heap + len {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.heap_len = len;
        for _ in 0..8 {
            if len > 0 {
                let addr = self.heap + self.below(len / 8) * 8;
                let value = self.below(u64::MAX);
                store(addr, value);
            }
        }
        Ok(())
    }

    /// Forks a child that lives on for some time. There is one at a time.
    fn fork(&mut self) -> io::Result<()> {
        let mut status = 0;
        if self.child != 0 {
            // SAFETY: the status is ours to write.
            let waited = unsafe { libc::waitpid(self.child, &raw mut status, libc::WNOHANG) };
            if waited != self.child {
                return Ok(());
            }
        }
        // SAFETY: what runs on in the child allocates nothing and takes no lock.
        let child = unsafe { libc::fork() };
        check(child.into())?;
        if child != 0 {
            self.child = child;
            return Ok(());
        }
        let code = i32::from(die_with_parent().is_err());
        let memory = Self { child: 0, ..*self };
        let code = code | i32::from(memory.run(Some(CHILD_STEPS), false).is_err());
        // SAFETY: ends the process at once; nothing runs after it.
        unsafe { libc::_exit(code) }
    }

    /// Lets the kernel write: reads a file into a part.
    fn read_file(&mut self, slot: usize) -> io::Result<()> {
        let Slot {
            start, writable, ..
        } = self.slots[slot];
        let Some((offset, len)) = self.some_part(slot).filter(|_| writable) else {
            return Ok(());
        };
        let at = std::ptr::with_exposed_provenance_mut((start + offset) as usize);
        let len = len.min(64 << 10) as usize;
        // SAFETY: as in `map_at`.
        let read = unsafe { libc::getrandom(at, len, 0) };
        check(read as libc::c_long)
    }

    fn read_some(&mut self, slot: usize) {
        let Slot {
            start, readable, ..
        } = self.slots[slot];
        if let Some((offset, len)) = self.some_part(slot).filter(|_| readable) {
            for page in 0..(len / PAGE).min(64) {
                load(start + offset + page * PAGE);
            }
        }
    }

    /// Writes to a part: single words, whole pages, or zeros.
    fn write(&mut self, slot: usize) {
        let Slot {
            start, writable, ..
        } = self.slots[slot];
        let Some((offset, len)) = self.some_part(slot).filter(|_| writable) else {
            return;
        };
        let value = if self.below(6) == 0 {
            0
        } else {
            self.below(u64::MAX)
        };
        let begin = start + offset;
        if self.below(2) == 0 {
            let word = self.below(PAGE / 8) * 8;
            for page in 0..(len / PAGE).min(512) {
                store(begin + page * PAGE + word, value);
            }
        } else {
            for word in 0..len.min(64 << 10) / 8 {
                store(begin + word * 8, value);
            }
        }
    }
}

fn store(addr: u64, value: u64) {
    let word = std::ptr::with_exposed_provenance_mut::<u64>(addr as usize);
    // SAFETY: callers give addresses of words in writable memory that no Rust object lives in.
    unsafe { word.write_volatile(value) }
}

fn load(addr: u64) {
    let word = std::ptr::with_exposed_provenance::<u64>(addr as usize);
    // SAFETY: callers give addresses of words in readable memory that no Rust object lives in.
    let _value = unsafe { word.read_volatile() };
}
