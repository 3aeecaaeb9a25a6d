//! System calls in the registers of x86-64.

use std::io;

/// The general registers of a thread, as `PTRACE_GETREGSET` with `NT_PRSTATUS` delivers them.
pub(super) type Registers = libc::user_regs_struct;

/// `%cs` of native 64-bit user code (`__USER_CS`). A 32-bit thread, or 64-bit code that switched, has another.
const USER_CS: u64 = 0x33;

/// The largest errno: results in the last 4095 values are errors.
const MAX_ERRNO: u64 = 4095;

/// The `syscall` instruction.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// Offset of a system call instruction in code. Instructions are not aligned here, so any occurrence will do.
pub(super) fn find_syscall_instruction(code: &[u8]) -> Option<usize> {
    code.windows(SYSCALL.len())
        .position(|bytes| bytes == SYSCALL)
}

/// Whether the thread runs code that our system call numbers are for.
pub(super) fn is_native(registers: &Registers) -> bool {
    registers.cs == USER_CS
}

/// Where the thread is.
pub(super) fn instruction_pointer(registers: &Registers) -> u64 {
    registers.rip
}

/// The registers with which a thread that has `registers` makes a system call when it resumes.
pub(super) fn call(
    registers: &Registers,
    instruction: u64,
    number: libc::c_long,
    arguments: [u64; 3],
) -> Registers {
    let mut call = *registers;
    call.rip = instruction;
    call.rax = number as u64;
    // "Not in a system call": otherwise the kernel, seeing -ERESTARTSYS of the interrupted one in rax's old place,
    // would move the instruction pointer back.
    call.orig_rax = u64::MAX;
    [call.rdi, call.rsi, call.rdx] = arguments;
    call
}

/// What the system call that has just returned returned.
pub(super) fn result(registers: &Registers) -> io::Result<u64> {
    let value = registers.rax;
    if value > u64::MAX - MAX_ERRNO {
        let errno = i32::try_from(value.wrapping_neg()).unwrap_or(libc::EINVAL);
        return Err(io::Error::from_raw_os_error(errno));
    }
    Ok(value)
}
