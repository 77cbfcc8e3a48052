//! Runs one instruction on the host's own processor, with the whole register state set before and taken after.
//!
//! [`Host::run`] loads the state (XRSTOR, WRFSBASE, POPF, general registers) and jumps to the instruction in
//! the code window. Behind the instruction lies a jump back that changes no register; wherever else execution
//! arrives is an undefined opcode. Exceptions come as signals on an alternate stack; the handler takes the
//! state from the signal frame and returns into our exit path. One process has one `Host`: the windows lie at
//! fixed addresses and signal handlers are the process's.
#![expect(unsafe_code, reason = "runs arbitrary instructions natively and handles the signals they cause")]

use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::arch::{asm, global_asm};
use std::io;
use std::mem::{offset_of, zeroed};
use std::ptr::{addr_of_mut, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use silicon::cpu::Requests;
use silicon::mmu::host::recover;
use silicon::model::xstate::LEGACY_AND_HEADER;

use crate::layout::{self, Access, CODE, CODE_SIZE, Contents, FILLER, PAGE};
use crate::machine::{Event, Machine, Vectors};

/// State components that test cases load and compare: x87, SSE, AVX, opmask, ZMM_Hi256, Hi16_ZMM, PKRU.
pub const COMPONENTS: u64 = 0x2e7;
/// Where the way back is stored: a page of its own near the code window.
const CONTROL: u64 = CODE + 0x1_0000;
/// Length of `jmp qword ptr [rip+disp32]`.
const JUMP_LENGTH: u64 = 6;
/// Bytes of the alternate signal stack.
const SIGNAL_STACK: usize = 1 << 16;
/// CPU time after which a case counts as endless is between one and two of these.
const TICK_MICROSECONDS: libc::suseconds_t = 50_000;
/// RFLAGS.AC.
const AC: u64 = 1 << 18;
/// Offset of the XSAVE header's XSTATE_BV.
const XSTATE_BV: usize = 512;

/// What the assembly below and the signal handler share.
#[repr(C, align(64))]
struct Context {
    gpr: [u64; 16],
    rflags: u64,
    rip: u64,
    in_fs: u64,
    in_gs: u64,
    out_fs: u64,
    out_gs: u64,
    host_rsp: u64,
    host_fs: u64,
    host_gs: u64,
    components: u64,
    /// Bytes of the standard-format XSAVE area for `components`.
    area_size: u64,
    /// A test case's state is (or is about to be) in the registers.
    active: u32,
    /// FSGSBASE instructions can be used.
    fsgsbase: u32,
    host_mxcsr: u32,
    host_fcw: u32,
    vector: u64,
    error: u64,
    cr2: u64,
    /// Clock ticks that this case has seen.
    ticks: u64,
    area: Area,
}

#[repr(C, align(64))]
struct Area([u8; 4096]);

/// Vector that stands for "the instruction completed".
const COMPLETED: u64 = 256;
/// Vector that stands for "did not end in time".
const ENDLESS: u64 = 257;

// SAFETY: all fields are integers.
static mut CONTEXT: Context = unsafe { zeroed() };

global_asm!(
    // Load the test state and go.
    ".global conformance_enter",
    "conformance_enter:",
    "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15", "sub rsp, 8",
    "mov [rip + {c} + {host_rsp}], rsp",
    "stmxcsr [rip + {c} + {host_mxcsr}]",
    "fnstcw [rip + {c} + {host_fcw}]",
    "cmp dword ptr [rip + {c} + {fsgsbase}], 0",
    "je 2f",
    "rdfsbase rax", "mov [rip + {c} + {host_fs}], rax",
    "rdgsbase rax", "mov [rip + {c} + {host_gs}], rax",
    "2:",
    "mov dword ptr [rip + {c} + {active}], 1",
    "mov eax, [rip + {c} + {components}]",
    "mov edx, [rip + {c} + {components} + 4]",
    "xrstor64 [rip + {c} + {area}]",
    "cmp dword ptr [rip + {c} + {fsgsbase}], 0",
    "je 2f",
    "mov rax, [rip + {c} + {in_fs}]", "wrfsbase rax",
    "mov rax, [rip + {c} + {in_gs}]", "wrgsbase rax",
    "2:",
    "push qword ptr [rip + {c} + {rflags}]",
    "popfq",
    "mov rax, [rip + {c} + 0]",
    "mov rcx, [rip + {c} + 8]",
    "mov rdx, [rip + {c} + 16]",
    "mov rbx, [rip + {c} + 24]",
    "mov rsp, [rip + {c} + 32]",
    "mov rbp, [rip + {c} + 40]",
    "mov rsi, [rip + {c} + 48]",
    "mov rdi, [rip + {c} + 56]",
    "mov r8, [rip + {c} + 64]",
    "mov r9, [rip + {c} + 72]",
    "mov r10, [rip + {c} + 80]",
    "mov r11, [rip + {c} + 88]",
    "mov r12, [rip + {c} + 96]",
    "mov r13, [rip + {c} + 104]",
    "mov r14, [rip + {c} + 112]",
    "mov r15, [rip + {c} + 120]",
    "jmp qword ptr [rip + {c} + {rip_slot}]",
    // The instruction completed: take the state. Until RFLAGS is reset, only aligned moves (AC may be set).
    ".global conformance_leave",
    "conformance_leave:",
    "mov dword ptr [rip + {c} + {active}], 0",
    "mov [rip + {c} + 0], rax",
    "mov [rip + {c} + 8], rcx",
    "mov [rip + {c} + 16], rdx",
    "mov [rip + {c} + 24], rbx",
    "mov [rip + {c} + 32], rsp",
    "mov [rip + {c} + 40], rbp",
    "mov [rip + {c} + 48], rsi",
    "mov [rip + {c} + 56], rdi",
    "mov [rip + {c} + 64], r8",
    "mov [rip + {c} + 72], r9",
    "mov [rip + {c} + 80], r10",
    "mov [rip + {c} + 88], r11",
    "mov [rip + {c} + 96], r12",
    "mov [rip + {c} + 104], r13",
    "mov [rip + {c} + 112], r14",
    "mov [rip + {c} + 120], r15",
    "mov rsp, [rip + {c} + {host_rsp}]",
    "pushfq",
    "pop qword ptr [rip + {c} + {rflags}]",
    "push 2",
    "popfq",
    "mov eax, [rip + {c} + {components}]",
    "mov edx, [rip + {c} + {components} + 4]",
    "xsave64 [rip + {c} + {area}]",
    "cmp dword ptr [rip + {c} + {fsgsbase}], 0",
    "je 2f",
    "rdfsbase rax", "mov [rip + {c} + {out_fs}], rax",
    "rdgsbase rax", "mov [rip + {c} + {out_gs}], rax",
    "mov rax, [rip + {c} + {host_fs}]", "wrfsbase rax",
    "mov rax, [rip + {c} + {host_gs}]", "wrgsbase rax",
    "2:",
    // Back to Rust; the signal handler returns here with RSP = host_rsp and FS, GS restored.
    ".global conformance_return",
    "conformance_return:",
    "fninit",
    "fldcw [rip + {c} + {host_fcw}]",
    "ldmxcsr [rip + {c} + {host_mxcsr}]",
    "vzeroupper",
    "add rsp, 8", "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
    "ret",
    // Signal entry: the kernel keeps AC, FS and GS of the interrupted code.
    ".global conformance_signal",
    "conformance_signal:",
    "pushfq",
    "and dword ptr [rsp], ~0x40000",
    "popfq",
    "cmp dword ptr [rip + {c} + {active}], 0",
    "je {handler}",
    "cmp dword ptr [rip + {c} + {fsgsbase}], 0",
    "je {handler}",
    "rdfsbase rax", "mov [rip + {c} + {out_fs}], rax",
    "rdgsbase rax", "mov [rip + {c} + {out_gs}], rax",
    "mov rax, [rip + {c} + {host_fs}]", "wrfsbase rax",
    "mov rax, [rip + {c} + {host_gs}]", "wrgsbase rax",
    "sub rsp, 8",
    "call {handler}",
    "add rsp, 8",
    "cmp dword ptr [rip + {c} + {active}], 0",
    "je 2f",
    "mov rax, [rip + {c} + {out_fs}]", "wrfsbase rax",
    "mov rax, [rip + {c} + {out_gs}]", "wrgsbase rax",
    "2:",
    "ret",
    c = sym CONTEXT,
    handler = sym on_signal,
    rflags = const offset_of!(Context, rflags),
    rip_slot = const offset_of!(Context, rip),
    in_fs = const offset_of!(Context, in_fs),
    in_gs = const offset_of!(Context, in_gs),
    out_fs = const offset_of!(Context, out_fs),
    out_gs = const offset_of!(Context, out_gs),
    host_rsp = const offset_of!(Context, host_rsp),
    host_fs = const offset_of!(Context, host_fs),
    host_gs = const offset_of!(Context, host_gs),
    components = const offset_of!(Context, components),
    active = const offset_of!(Context, active),
    fsgsbase = const offset_of!(Context, fsgsbase),
    host_mxcsr = const offset_of!(Context, host_mxcsr),
    host_fcw = const offset_of!(Context, host_fcw),
    area = const offset_of!(Context, area),
);

unsafe extern "C" {
    fn conformance_enter();
    fn conformance_leave();
    fn conformance_return();
    fn conformance_signal();
}

/// Runs with the host's FS and GS. Takes the state from the frame and makes the return go to our exit path.
unsafe extern "C" fn on_signal(signal: i32, info: *mut libc::siginfo_t, frame: *mut libc::ucontext_t) {
    let context = addr_of_mut!(CONTEXT);
    // SAFETY: the context is only touched by this thread, and the kernel passes a valid frame.
    unsafe {
        if (*context).active == 0 {
            if !recover(signal, info, frame.cast()) {
                outside(signal);
            }
            return;
        }
        if signal == libc::SIGVTALRM {
            (*context).ticks += 1;
            if (*context).ticks < 2 {
                return;
            }
        }
        take_frame(context, &mut (*frame).uc_mcontext);
        if signal == libc::SIGVTALRM {
            (*context).vector = ENDLESS;
        }
        (*context).active = 0;
    }
}

/// A signal while no test case runs on the host: the clock, or the end.
fn outside(signal: i32) {
    if signal != libc::SIGVTALRM {
        // SAFETY: async-signal-safe; the fault happens again and ends the process.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    } else if WATCHED_TICKS.fetch_add(1, Ordering::Relaxed) >= WATCHED_LIMIT {
        // SAFETY: null, or what a `Watch` keeps; this thread, which would drop it, is here.
        if let Some(requests) = unsafe { WATCHED.load(Ordering::Relaxed).as_ref() } {
            requests.post(Requests::KICK);
        }
    }
}

/// The guest whose time is measured, and how many ticks it has seen.
static WATCHED: AtomicPtr<Requests> = AtomicPtr::new(null_mut());
static WATCHED_TICKS: AtomicU64 = AtomicU64::new(0);
/// Ticks after which it has to leave guest mode.
const WATCHED_LIMIT: u64 = 20;

/// While this lives, a guest that takes too long is asked to leave guest mode.
#[derive(Debug)]
pub struct Watch {
    _requests: Arc<Requests>,
}

/// Watches the guest with these requests.
pub fn watch(requests: &Arc<Requests>) -> Watch {
    WATCHED_TICKS.store(0, Ordering::Relaxed);
    requests.take(Requests::KICK);
    WATCHED.store(Arc::as_ptr(requests).cast_mut(), Ordering::Relaxed);
    Watch { _requests: requests.clone() }
}

impl Drop for Watch {
    fn drop(&mut self) {
        WATCHED.store(null_mut(), Ordering::Relaxed);
    }
}

/// Order of the general registers in the signal frame, by our encoding order.
const FRAME_REGISTERS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// # Safety
/// `context` and the frame's pointers must be valid, as they are in a signal handler.
unsafe fn take_frame(context: *mut Context, frame: &mut libc::mcontext_t) {
    // SAFETY: see above; the kernel's frame holds a whole XSAVE image (it saves all enabled components).
    unsafe {
        let context = &mut *context;
        for (slot, register) in context.gpr.iter_mut().zip(FRAME_REGISTERS) {
            *slot = frame.gregs[register as usize] as u64;
        }
        context.rip = frame.gregs[libc::REG_RIP as usize] as u64;
        context.rflags = frame.gregs[libc::REG_EFL as usize] as u64;
        context.vector = frame.gregs[libc::REG_TRAPNO as usize] as u64;
        context.error = frame.gregs[libc::REG_ERR as usize] as u64;
        context.cr2 = frame.gregs[libc::REG_CR2 as usize] as u64;
        let size = context.area_size;
        std::ptr::copy_nonoverlapping(frame.fpregs.cast::<u8>(), context.area.0.as_mut_ptr(), size as usize);
        frame.gregs[libc::REG_RIP as usize] = conformance_return as *const () as i64;
        frame.gregs[libc::REG_RSP as usize] = context.host_rsp as i64;
        frame.gregs[libc::REG_EFL as usize] = 2;
    }
}

/// Where the extended components lie in the standard format. Makers differ.
#[derive(Clone, Copy, Debug, Default)]
struct Offsets {
    avx: usize,
    opmask: usize,
    zmm_hi256: usize,
    hi16_zmm: usize,
    pkru: usize,
}

impl Offsets {
    /// What CPUID says; 0 for what the processor does not have.
    fn of_host() -> Offsets {
        let [avx, opmask, zmm_hi256, hi16_zmm, pkru] =
            [2, 5, 6, 7, 9].map(|component| __cpuid_count(0xd, component).ebx as usize);
        Offsets { avx, opmask, zmm_hi256, hi16_zmm, pkru }
    }
}

/// Bytes of the standard-format XSAVE area for `components`.
fn area_size(components: u64) -> u64 {
    let extended = (2..63).filter(|bit| components & 1 << bit != 0).map(|bit| {
        let leaf = __cpuid_count(0xd, bit);
        u64::from(leaf.eax + leaf.ebx)
    });
    extended.max().unwrap_or(0).max(LEGACY_AND_HEADER.into())
}

/// What keeps the host executor from working here.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A system call failed.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
    /// The processor lacks something.
    #[error("this processor {0}")]
    Processor(&'static str),
}

fn system(what: &'static str) -> HostError {
    HostError::System(what, io::Error::last_os_error())
}

/// Selectors that user code runs with, ES to GS; the guest gets the same.
pub fn selectors() -> [u16; 6] {
    let mut values = [0u16; 6];
    // SAFETY: reading segment selectors has no effect.
    unsafe {
        asm!("mov {0:x}, es", out(reg) values[0], options(nomem, nostack, preserves_flags));
        asm!("mov {0:x}, cs", out(reg) values[1], options(nomem, nostack, preserves_flags));
        asm!("mov {0:x}, ss", out(reg) values[2], options(nomem, nostack, preserves_flags));
        asm!("mov {0:x}, ds", out(reg) values[3], options(nomem, nostack, preserves_flags));
        asm!("mov {0:x}, fs", out(reg) values[4], options(nomem, nostack, preserves_flags));
        asm!("mov {0:x}, gs", out(reg) values[5], options(nomem, nostack, preserves_flags));
    }
    values
}

/// The state components that test cases use on this host.
pub fn components() -> Result<u64, HostError> {
    if __cpuid(1).ecx & (1 << 27) == 0 {
        return Err(HostError::Processor("has no XSAVE"));
    }
    // SAFETY: OSXSAVE is set.
    let xcr0 = unsafe { read_xcr0() };
    let components = xcr0 & COMPONENTS;
    if area_size(components) > size_of::<Area>() as u64 {
        return Err(HostError::Processor("has its XSAVE components far apart"));
    }
    if components & 7 != 7 {
        return Err(HostError::Processor("has no AVX"));
    }
    Ok(components)
}

/// What XCR0 has besides [`COMPONENTS`]. The processor must have XSAVE.
pub fn other_components() -> Result<u64, HostError> {
    components()?;
    // SAFETY: OSXSAVE is set, or there would be no components.
    Ok(unsafe { read_xcr0() } & !COMPONENTS)
}

#[target_feature(enable = "xsave")]
unsafe fn read_xcr0() -> u64 {
    // SAFETY: the caller has checked OSXSAVE.
    unsafe { _xgetbv(0) }
}

/// Whether user code can use RDFSBASE and its like.
pub fn has_fsgsbase() -> bool {
    // SAFETY: reads the auxiliary vector. Bit 1 of AT_HWCAP2 says that the kernel has enabled the instructions.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & 2 != 0 }
}

/// The host's processor as an executor of test cases.
#[derive(Debug)]
pub struct Host {
    components: u64,
    offsets: Offsets,
}

impl Host {
    /// Maps the windows and installs the signal handlers.
    pub fn new() -> Result<Host, HostError> {
        let components = components()?;
        map(CODE, CODE_SIZE, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)?;
        map(CONTROL, PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
        for (address, _) in layout::mapped_pages().filter(|page| page.0 >= layout::DATA) {
            map(address, PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
        }
        let context = addr_of_mut!(CONTEXT);
        // SAFETY: no test case runs.
        unsafe {
            (*context).components = components;
            (*context).area_size = area_size(components);
            (*context).fsgsbase = u32::from(has_fsgsbase());
        }
        install_handlers()?;
        Ok(Host { components, offsets: Offsets::of_host() })
    }

    /// Writes the initial contents and makes read-only pages read-only.
    pub fn prepare(&mut self, contents: &Contents) -> Result<(), HostError> {
        for (address, bytes) in contents.pages() {
            protect(*address, Access::Write)?;
            self.bytes_mut(*address, PAGE as usize).copy_from_slice(bytes);
            protect(*address, layout::access(*address))?;
        }
        Ok(())
    }

    /// `length` bytes of mapped window memory. Writing to a read-only page faults.
    pub fn bytes_mut(&mut self, address: u64, length: usize) -> &mut [u8] {
        let last = address + length as u64 - 1;
        assert!(layout::access(address) != Access::None && layout::access(last) != Access::None);
        // SAFETY: the windows are mapped as `layout` says for as long as the process lives; `&mut self`
        // makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(address as *mut u8, length) }
    }

    /// As [`Host::bytes_mut`], to read.
    pub fn bytes(&self, address: u64, length: usize) -> &[u8] {
        let last = address + length as u64 - 1;
        assert!(layout::access(address) != Access::None && layout::access(last) != Access::None);
        // SAFETY: as in `bytes_mut`.
        unsafe { std::slice::from_raw_parts(address as *const u8, length) }
    }

    /// Puts the way back behind the instruction, if there is room: `jmp [rip+disp32]`. Returns whether it did.
    pub fn put_return(&mut self, next: u64) -> bool {
        if next < CODE || next + JUMP_LENGTH > CODE + CODE_SIZE {
            return false;
        }
        let displacement = (CONTROL as i64 - (next + JUMP_LENGTH) as i64) as i32;
        let jump = self.bytes_mut(next, JUMP_LENGTH as usize);
        jump[..2].copy_from_slice(&[0xff, 0x25]);
        jump[2..].copy_from_slice(&displacement.to_le_bytes());
        true
    }

    /// Takes the way back out again.
    pub fn remove_return(&mut self, next: u64) {
        self.bytes_mut(next, JUMP_LENGTH as usize).fill(FILLER);
    }

    /// Runs from `machine` until something ends the case; `next` is where the way back lies.
    pub fn run(&mut self, machine: &Machine, next: u64) -> (Event, Machine) {
        let context = addr_of_mut!(CONTEXT);
        // SAFETY: `&mut self` makes this the only user of the context; the assembly keeps the Rust ABI's
        // registers, and the test case can reach nothing but the windows (the generator's promise).
        unsafe {
            let c = &mut *context;
            c.gpr = machine.gpr;
            c.rflags = machine.rflags;
            c.rip = machine.rip;
            (c.in_fs, c.in_gs) = (machine.fs_base, machine.gs_base);
            c.vector = COMPLETED;
            c.ticks = 0;
            store_vectors(&machine.vectors, self.components, &self.offsets, &mut c.area.0);
            // An earlier case may have written over it.
            (CONTROL as *mut u64).write(conformance_leave as *const () as u64);
            conformance_enter();
        }
        // SAFETY: as above; the case is over.
        let c = unsafe { &*context };
        let mut after = Machine {
            gpr: c.gpr,
            rip: if c.vector == COMPLETED { next } else { c.rip },
            rflags: c.rflags,
            fs_base: c.out_fs,
            gs_base: c.out_gs,
            vectors: load_vectors(self.components, &self.offsets, &c.area.0),
        };
        if c.fsgsbase == 0 {
            (after.fs_base, after.gs_base) = (machine.fs_base, machine.gs_base);
        }
        (self.event(c, machine), after)
    }

    fn event(&self, c: &Context, before: &Machine) -> Event {
        match c.vector {
            COMPLETED => Event::Completed,
            ENDLESS => Event::Endless,
            6 if arrived_at_filler(c.rip, before.rip, |rip| self.bytes(rip, 1)[0]) => Event::Completed,
            14 => Event::Fault { vector: 14, error: c.error as u32, address: c.cr2 },
            vector => Event::Fault { vector: vector as u8, error: c.error as u32, address: 0 },
        }
    }
}

/// Whether an undefined opcode at `rip` is the end of the case and not the tested instruction.
pub fn arrived_at_filler(rip: u64, start: u64, byte: impl Fn(u64) -> u8) -> bool {
    rip != start && (CODE..CODE + CODE_SIZE).contains(&rip) && byte(rip) == FILLER
}

fn map(address: u64, length: u64, protection: i32) -> Result<(), HostError> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
    // SAFETY: NOREPLACE: no mapping of ours can be hit.
    let got = unsafe { libc::mmap(address as *mut _, length as usize, protection, flags, -1, 0) };
    if got as u64 == address { Ok(()) } else { Err(system("mapping the test windows")) }
}

fn protect(address: u64, access: Access) -> Result<(), HostError> {
    let code = (CODE..CODE + CODE_SIZE).contains(&address);
    let protection = match access {
        Access::None => libc::PROT_NONE,
        Access::Read => libc::PROT_READ,
        Access::Write if code => libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
        Access::Write => libc::PROT_READ | libc::PROT_WRITE,
    };
    // SAFETY: the page belongs to the windows.
    match unsafe { libc::mprotect(address as *mut _, PAGE as usize, protection) } {
        0 => Ok(()),
        _ => Err(system("protecting the test windows")),
    }
}

fn install_handlers() -> Result<(), HostError> {
    let stack: &'static mut [u8] = Box::leak(vec![0u8; SIGNAL_STACK].into_boxed_slice());
    let stack = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: SIGNAL_STACK };
    // SAFETY: plain system calls with valid arguments; the stack lives for ever.
    unsafe {
        if libc::sigaltstack(&stack, null_mut()) != 0 {
            return Err(system("sigaltstack"));
        }
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = conformance_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // The clock must not tick within a handler, which runs with the host's FS and GS already.
        libc::sigaddset(&mut action.sa_mask, libc::SIGVTALRM);
        let signals =
            [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGVTALRM];
        for signal in signals {
            if libc::sigaction(signal, &action, null_mut()) != 0 {
                return Err(system("sigaction"));
            }
        }
        let interval = libc::timeval { tv_sec: 0, tv_usec: TICK_MICROSECONDS };
        let timer = libc::itimerval { it_interval: interval, it_value: interval };
        if libc::setitimer(libc::ITIMER_VIRTUAL, &timer, null_mut()) != 0 {
            return Err(system("setitimer"));
        }
    }
    Ok(())
}

/// Writes the standard-format XSAVE image.
fn store_vectors(v: &Vectors, components: u64, offsets: &Offsets, area: &mut [u8; 4096]) {
    let has = |component: u32| components & 1 << component != 0;
    area[..576].fill(0);
    area[0..2].copy_from_slice(&v.fcw.to_le_bytes());
    area[2..4].copy_from_slice(&v.fsw.to_le_bytes());
    area[4] = v.ftw;
    area[6..8].copy_from_slice(&v.fop.to_le_bytes());
    area[8..16].copy_from_slice(&v.fip.to_le_bytes());
    area[16..24].copy_from_slice(&v.fdp.to_le_bytes());
    area[24..28].copy_from_slice(&v.mxcsr.to_le_bytes());
    for (i, st) in v.st.iter().enumerate() {
        area[32 + 16 * i..][..10].copy_from_slice(st);
    }
    area[XSTATE_BV..][..8].copy_from_slice(&components.to_le_bytes());
    for (i, zmm) in v.zmm.iter().take(16).enumerate() {
        area[160 + 16 * i..][..16].copy_from_slice(&zmm[..16]);
        area[offsets.avx + 16 * i..][..16].copy_from_slice(&zmm[16..32]);
        if has(6) {
            area[offsets.zmm_hi256 + 32 * i..][..32].copy_from_slice(&zmm[32..]);
        }
    }
    if has(7) {
        let high = v.zmm[16..].as_flattened();
        area[offsets.hi16_zmm..][..high.len()].copy_from_slice(high);
    }
    if has(5) {
        for (i, k) in v.k.iter().enumerate() {
            area[offsets.opmask + 8 * i..][..8].copy_from_slice(&k.to_le_bytes());
        }
    }
    if has(9) {
        area[offsets.pkru..][..8].copy_from_slice(&u64::from(v.pkru).to_le_bytes());
    }
}

/// Reads the standard-format XSAVE image; a component that XSTATE_BV says is in its initial state is zero.
fn load_vectors(components: u64, offsets: &Offsets, area: &[u8; 4096]) -> Vectors {
    let word = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
    let quad = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&area[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let present = components & quad(XSTATE_BV);
    let has = |component: u32| present & 1 << component != 0;
    let mut v = Vectors { mxcsr: quad(24) as u32, ..Vectors::default() };
    if has(0) {
        (v.fcw, v.fsw, v.ftw, v.fop) = (word(0), word(2), area[4], word(6));
        (v.fip, v.fdp) = (quad(8), quad(16));
        for (i, st) in v.st.iter_mut().enumerate() {
            st.copy_from_slice(&area[32 + 16 * i..][..10]);
        }
    }
    for (i, zmm) in v.zmm.iter_mut().take(16).enumerate() {
        if has(1) {
            zmm[..16].copy_from_slice(&area[160 + 16 * i..][..16]);
        }
        if has(2) {
            zmm[16..32].copy_from_slice(&area[offsets.avx + 16 * i..][..16]);
        }
        if has(6) {
            zmm[32..].copy_from_slice(&area[offsets.zmm_hi256 + 32 * i..][..32]);
        }
    }
    if has(7) {
        let high = v.zmm[16..].as_flattened_mut();
        high.copy_from_slice(&area[offsets.hi16_zmm..][..high.len()]);
    }
    if has(5) {
        v.k = std::array::from_fn(|i| quad(offsets.opmask + 8 * i));
    }
    if has(9) {
        v.pkru = quad(offsets.pkru) as u32;
    }
    v
}

/// RFLAGS bits that a case may start with: what POPF at CPL 3 can set, without TF.
pub const SETTABLE_FLAGS: u64 = 0xcd5 | (1 << 14) | AC | (1 << 21);
