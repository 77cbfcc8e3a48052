//! Host memory that may not be there.
//!
//! Whoever gives memory to a VM can take it away under a running guest: unmap it, protect it, truncate the file
//! behind it; or it fails. An access to it is then a signal, SIGSEGV or SIGBUS. Nothing is asked before an access. In
//! its place each instruction in this crate that touches guest memory has an entry in a table, as the
//! kernel's accesses to user memory have: where to go on if it faults. [`recover`], called by a signal handler, goes
//! there, and the access returns [`Absent`].
//!
//! # Why this is sound
//!
//! The instructions are inline assembly, and where they go on is part of the same `asm!` block: either an operand
//! that says so to the compiler (`label`), or code of the block's that marks its result and goes on behind the
//! instruction. So each block ends in one of the ways that it is declared to end in, and the compiler knows
//! all that may follow; no frame is skipped and no destructor left out. A faulting x86 instruction has had no effect but
//! for REP's registers, which say how far it came.
//!
//! Stubs ([`crate::hostexec`]) are code made at run time. The one access to guest memory in each is recognized by where
//! the stubs of the running CPU lie; it ends the stub, which keeps nothing on the stack, and goes on where the
//! entry for the return address says. The call is an `asm!` block with that label.
//!
//! Translated code ([`crate::translate`]) is recognized by where it lies, too, and has a table of its own ([`Recovery`]).
//! Its accesses go on in code of the same block that gives the instruction to the interpreter.
//!
//! Nothing is recovered, and signals do what they did, unless somebody installs a handler: [`install`], or a client's
//! trampoline that calls [`recover`].
#![expect(
    unsafe_code,
    reason = "inline assembly reaches guest memory; a signal handler changes where to go on"
)]

use std::arch::asm;
use std::cell::Cell;
use std::ops::Range;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{c_int, c_void, siginfo_t, ucontext_t};

use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::mmu::Word;
use crate::mmu::ept::SMM_SPACE;
use crate::mmu::tlb::PAGE_MASK;
use crate::mmu::ve::Violation;
use crate::mmu::walk::Kind;
use crate::vmx::Exit;

/// The host has no memory where guest memory should be, or none that allows the access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Absent;

/// Assembly: if the instruction at label `$from` faults, go on at `$to`.
macro_rules! on_fault {
    ($from:literal => $to:literal) => {
        concat!(
            ".pushsection ring3_fixups, \"aR\", @progbits\n.balign 4\n.long ",
            $from,
            " - .\n.long ",
            $to,
            " - .\n.popsection"
        )
    };
}

/// Assembly: if the instruction at label 2 faults, go on at label 3 with register `$mark` zero. The flags stay.
macro_rules! on_fault_zero {
    ($mark:literal) => {
        concat!(
            ".pushsection .text.unlikely.ring3_fixups, \"ax\", @progbits\n4: mov ",
            $mark,
            ", 0\njmp 3b\n.popsection\n",
            $crate::mmu::host::on_fault!("2b" => "4b")
        )
    };
}

pub(crate) use {on_fault, on_fault_zero};

/// An entry of the table: both addresses are relative to where they stand.
#[repr(C)]
struct Fixup {
    from: i32,
    to: i32,
}

unsafe extern "C" {
    // The linker gives the bounds of a section whose name is an identifier.
    #[link_name = "__start_ring3_fixups"]
    static FIXUPS: Fixup;
    #[link_name = "__stop_ring3_fixups"]
    static FIXUPS_END: Fixup;
}

/// Where to go on if the instruction at `rip` faults.
fn fixup(rip: u64) -> Option<u64> {
    // An entry that no address equals: the section, and with it its bounds, is there in programs without guests, too.
    // SAFETY: no instruction at all.
    unsafe {
        asm!(
            ".pushsection ring3_fixups, \"aR\", @progbits",
            ".balign 4",
            ".long 0, 0",
            ".popsection",
            options(nomem, nostack, preserves_flags)
        );
    }
    let (start, end) = (&raw const FIXUPS, &raw const FIXUPS_END);
    let count = (end as usize - start as usize) / size_of::<Fixup>();
    // SAFETY: the section holds nothing but entries, and is never written.
    let entries = unsafe { std::slice::from_raw_parts(start, count) };
    let absolute = |field: &i32| (ptr::from_ref(field) as u64).wrapping_add_signed(i64::from(*field));
    entries.iter().find(|entry| absolute(&entry.from) == rip).map(|entry| absolute(&entry.to))
}

/// Where translated code goes on after accesses that fault. Both addresses of an entry are of the code.
#[derive(Debug, Default)]
pub(crate) struct Recovery {
    /// Of code that often runs, and of code that seldom does: each in the order of the first address.
    lists: [Vec<(u64, u64)>; 2],
}

impl Recovery {
    /// If the instruction at `from` faults, go on at `to`. Entries come in the order of `from`, those of code that seldom runs apart.
    pub(crate) fn add(&mut self, from: u64, to: u64, seldom: bool) {
        self.lists[usize::from(seldom)].push((from, to));
    }
    /// Forgets all of them.
    pub(crate) fn clear(&mut self) {
        self.lists.iter_mut().for_each(Vec::clear);
    }
    fn find(&self, rip: u64) -> Option<u64> {
        self.lists.iter().find_map(|list| {
            let at = list.binary_search_by_key(&rip, |entry| entry.0).ok()?;
            Some(list[at].1)
        })
    }
}

/// The last fault that was recovered from on this thread.
#[derive(Clone, Copy)]
struct Fault {
    /// Host address.
    address: u64,
    cause: Cause,
}

/// What a signal says of the memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// It is not mapped, or protected.
    Absent,
    /// It cannot be had: beyond the end of its file, or failed, where a host kernel without memory failure handling
    /// makes no difference.
    Unavailable,
    /// It has failed.
    Failed,
    /// There was no signal: nobody has made the access, which would wait for the host to bring the page.
    Elsewhere(Violation),
}

impl Fault {
    /// Whether the memory has failed.
    fn is_failure(self) -> bool {
        self.cause == Cause::Failed
            || self.cause == Cause::Unavailable && has_failed(self.address & !PAGE_MASK)
    }
}

/// What an access that was not made returns, to a byte at `host`, because its page is elsewhere.
pub(crate) fn elsewhere(host: u64, violation: Violation) -> Absent {
    LAST.set(Fault { address: host, cause: Cause::Elsewhere(violation) });
    Absent
}

/// Whether the memory of the page at `host` has failed, as far as the kernel says without a signal.
fn has_failed(host: u64) -> bool {
    let size = PAGE_MASK as usize + 1;
    // SAFETY: populating changes no byte.
    let done = unsafe { libc::madvise(host as *mut c_void, size, libc::MADV_POPULATE_READ) };
    done != 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EHWPOISON)
}

thread_local! {
    // Constant values without destructors: there whenever a signal handler asks, with nothing allocated.
    static LAST: Cell<Fault> = const { Cell::new(Fault { address: 0, cause: Cause::Absent }) };
    static STUBS: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
    static TRANSLATED: Cell<(u64, u64, *const Recovery)> = const { Cell::new((0, 0, ptr::null())) };
    static LAPS: Cell<u32> = const { Cell::new(0) };
}

/// Bytes of the load by which translated code looks for requests where it goes backwards.
const POLL_LENGTH: u64 = 3;

/// Although somebody wants something, translated code that runs on this thread goes backwards so often more. (For comparing engines.)
pub(crate) fn allow_laps(laps: u32) {
    LAPS.set(laps);
}

/// Whether what has faulted in translated code is a look for requests, the pointer being null, and it may go on once more all the same.
fn takes_lap(address: u64) -> bool {
    let laps = LAPS.get();
    let takes = address == 0 && laps != 0;
    LAPS.set(laps - u32::from(takes));
    takes
}

/// Where [`recover`] notes the last fault of this thread.
pub(crate) fn last_fault_lies_at() -> Range<u64> {
    let start = LAST.with(Cell::as_ptr) as u64;
    start..start + size_of::<Fault>() as u64
}

/// The CPU that runs on this thread has its stubs at these addresses.
pub(crate) fn stubs_lie_at(range: Range<u64>) {
    STUBS.set((range.start, range.end));
}

/// The CPU that runs on this thread has translated code at these addresses.
///
/// # Safety
///
/// While code there runs on this thread, `recovery` is valid and nobody changes it.
pub(crate) unsafe fn translated_code_lies_at(range: Range<u64>, recovery: *const Recovery) {
    TRANSLATED.set((range.start, range.end, recovery));
}

/// Codes of the signals that stand for memory that is not there or may not be used so: si_code of SIGSEGV
/// (SEGV_MAPERR, SEGV_ACCERR, SEGV_PKUERR) and SIGBUS (BUS_ADRERR, BUS_OBJERR, BUS_MCEERR_AR).
fn tells_of_absence(signal: c_int, code: c_int) -> bool {
    match signal {
        libc::SIGSEGV => matches!(code, 1 | 2 | 4),
        libc::SIGBUS => matches!(code, 2..=4),
        _ => false,
    }
}

/// For signal handlers of SIGSEGV and SIGBUS: if the signal is that of an access to guest memory by this crate, has the
/// access fail instead, and the handler is to return at once; likewise where a vector of translated code is not aligned. False, with
/// nothing changed, if it is not.
///
/// # Safety
///
/// The arguments are those with which the kernel has called the handler (`SA_SIGINFO`).
pub unsafe fn recover(signal: c_int, info: *const siginfo_t, context: *mut c_void) -> bool {
    // SAFETY: the kernel's own structures; nobody else has references to them.
    let (info, registers) = unsafe { (&*info, &mut (*context.cast::<ucontext_t>()).uc_mcontext.gregs) };
    // SAFETY: signals of these numbers have an address, of whatever meaning.
    let address = unsafe { info.si_addr() } as u64;
    let misaligned = signal == libc::SIGSEGV && info.si_code == GENERAL_PROTECTION;
    if !misaligned && !tells_of_absence(signal, info.si_code) {
        return false;
    }
    let [rip, rsp] = [libc::REG_RIP, libc::REG_RSP].map(|register| register as usize);
    let at = registers[rip] as u64;
    let (stubs, stubs_end) = STUBS.get();
    let (translated, translated_end, recovery) = TRANSLATED.get();
    let next = if (translated..translated_end).contains(&at) {
        // SAFETY: the promise of whoever said so: code there runs, for it is what faulted.
        let next = unsafe { (*recovery).find(at) };
        next.map(|next| if !misaligned && takes_lap(address) { at + POLL_LENGTH } else { next })
    } else if misaligned {
        None
    } else if (stubs..stubs_end).contains(&at) {
        // SAFETY: stubs use no stack, so that the return address is on top of it.
        let next = fixup(unsafe { *(registers[rsp] as *const u64) });
        registers[rsp] += if next.is_some() { 8 } else { 0 };
        next
    } else {
        fixup(at)
    };
    let Some(next) = next else { return false };
    registers[rip] = next as i64;
    if misaligned {
        return true;
    }
    let cause = match (signal, info.si_code) {
        (libc::SIGBUS, BUS_MCEERR_AR) => Cause::Failed,
        (libc::SIGBUS, _) => Cause::Unavailable,
        _ => Cause::Absent,
    };
    LAST.set(Fault { address, cause });
    true
}

/// `si_code` of a #GP (kernel: `SI_KERNEL`), which translated code gets where a vector is not aligned.
const GENERAL_PROTECTION: c_int = 0x80;

/// Memory that has failed was accessed.
const BUS_MCEERR_AR: c_int = 4;

/// Whether somebody calls [`recover`].
static RECOVERS: AtomicBool = AtomicBool::new(false);

/// The process has handlers of SIGSEGV and SIGBUS that call [`recover`]: translated code may count on it from now on.
pub fn announce_recovery() {
    RECOVERS.store(true, Ordering::SeqCst);
}

/// Whether faults are recovered from.
pub(crate) fn recovers() -> bool {
    RECOVERS.load(Ordering::SeqCst)
}

/// The signals.
const SIGNALS: [c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// What was installed for [`SIGNALS`] before.
static BEFORE: OnceLock<[libc::sigaction; 2]> = OnceLock::new();

/// Installs handlers of SIGSEGV and SIGBUS for the process that call [`recover`], and pass on what is not for it. For
/// programs whose handlers are their own affair; a second call does nothing.
pub fn install() {
    BEFORE.get_or_init(|| {
        SIGNALS.map(|signal| {
            // SAFETY: all bytes zero is a valid value.
            let (mut action, mut before): (libc::sigaction, libc::sigaction) =
                unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            // SAFETY: both structures are ours, and the handler does nothing that a handler must not.
            unsafe { libc::sigaction(signal, &raw const action, &raw mut before) };
            before
        })
    });
    announce_recovery();
}

extern "C" fn on_signal(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel's arguments.
    if unsafe { recover(signal, info, context) } {
        return;
    }
    // Between the installation of the first handler and the end of `install` nothing is known yet.
    let before = SIGNALS.iter().position(|&s| s == signal).and_then(|at| BEFORE.get()?.get(at).copied());
    match before {
        Some(before) if !matches!(before.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) => {
            type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);
            // SAFETY: a handler that somebody had installed. One that takes one argument ignores the others.
            let handler: Handler = unsafe { std::mem::transmute(before.sa_sigaction) };
            handler(signal, info, context);
        }
        // The instruction faults again, or the signal is gone.
        // SAFETY: the default action, or the one of before.
        _ => unsafe {
            libc::signal(signal, before.map_or(libc::SIG_DFL, |before| before.sa_sigaction));
        },
    }
}

/// Copies `len` bytes, upwards; how many were not copied because memory is absent.
///
/// # Safety
///
/// `from` and `to` are valid for so many bytes, or guest memory (whose host memory may be absent).
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) -> Result<(), Absent> {
    // SAFETY: the caller's promise.
    if unsafe { u8::copy_up(from, to, len) } == 0 { Ok(()) } else { Err(Absent) }
}

/// Whether the bytes at `host` are `bytes`.
///
/// # Safety
///
/// So many bytes at `host` are guest memory.
pub(crate) unsafe fn same(host: u64, bytes: &[u8]) -> Result<bool, Absent> {
    let (words, rest) = bytes.as_chunks::<8>();
    let mut at = host;
    for word in words {
        // SAFETY: the caller's promise.
        if unsafe { u64::read(at as *const u64) }? != u64::from_le_bytes(*word) {
            return Ok(false);
        }
        at += 8;
    }
    for byte in rest {
        // SAFETY: as above.
        if unsafe { u8::read(at as *const u8) }? != *byte {
            return Ok(false);
        }
        at += 1;
    }
    Ok(true)
}

/// Whether a byte can be written; it stays what it is.
///
/// # Safety
///
/// The byte is guest memory.
pub(crate) unsafe fn touch(pointer: *mut u8) -> Result<(), Absent> {
    // SAFETY: the caller's promise; a locked OR with nothing changes nothing.
    unsafe {
        asm!(
            "2: lock or byte ptr [{p}], 0", on_fault!("2b" => "{absent}"), p = in(reg) pointer,
            absent = label { return Err(Absent) }, options(nostack)
        );
    }
    Ok(())
}

/// Reads memory that belongs to a VM, for those who are not in guest mode. [`Absent`] if any of it is.
///
/// # Safety
///
/// So many bytes at `host` are memory of a registered [`super::ept::Region`].
pub unsafe fn read(host: u64, out: &mut [u8]) -> Result<(), Absent> {
    // SAFETY: the caller's promise.
    unsafe { copy(host as *const u8, out.as_mut_ptr(), out.len()) }
}

/// Writes memory that belongs to a VM, as far as there is any.
///
/// # Safety
///
/// So many bytes at `host` are memory of a registered [`super::ept::Region`], and no reference covers them.
pub unsafe fn write(host: u64, data: &[u8]) -> Result<(), Absent> {
    // SAFETY: the caller's promise.
    unsafe { copy(data.as_ptr(), host as *mut u8, data.len()) }
}

impl Cpu {
    /// Leaves guest mode, with RIP at the instruction, because the access that it has just made found no host memory.
    ///
    /// This is where a vCPU learns that it must wait for memory; it has not blocked, and nothing has happened.
    #[cold]
    #[inline(never)]
    pub(crate) fn absent(&mut self, _: Absent) -> Abort {
        let fault = LAST.get();
        let host = fault.address & !PAGE_MASK;
        match (self.ept.address_of(fault.address), fault.cause) {
            (Some(address), Cause::Elsewhere(violation)) => {
                if let Some(exception) = self.convert_violation(address, violation) {
                    return exception;
                }
                let lin = (!violation.walk).then_some(violation.lin);
                self.exit(Exit::MemoryElsewhere { address, host, lin, write: violation.kind == Kind::Write })
            }
            (Some(gpa), _) => {
                let (gpa, failed) = (gpa & !(PAGE_MASK | SMM_SPACE), fault.is_failure());
                self.exit(Exit::MemoryAbsent { gpa, host, failed })
            }
            // It belonged to a region that is no longer there.
            (None, _) => self.retry(),
        }
    }

    /// `result`, with absence as the exit that it is.
    #[inline(always)]
    pub(crate) fn present<T>(&mut self, result: Result<T, Absent>) -> Result<T, Abort> {
        match result {
            Ok(value) => Ok(value),
            Err(absent) => Err(self.absent(absent)),
        }
    }
}
