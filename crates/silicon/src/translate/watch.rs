//! Watching host code: somebody who looks at the process's memory right before and right after each stay in it.
//!
//! This is for tests of what [`super`] says about isolation. What host code may write is told with each stay, as narrowly as it is known
//! here; whatever else differs afterwards has been written by code that a guest has made.
//!
//! The watcher runs on a stack of its own, and what calls it is one piece of assembly that has the stack of the running thread as it
//! was: above where host code begins, and below what it may use, not a byte of that may change either.
#![expect(unsafe_code, reason = "changes stacks and calls host code")]

use std::arch::asm;
use std::ffi::c_void;
use std::mem::offset_of;
use std::ops::Range;

use super::emit::COUNT;
use super::frame::STOP;
use super::registers::slot_offset;
use super::routines::RETURNS;
use crate::code::op::Op;
use crate::cpu::Cpu;
use crate::mmu::host;
use crate::mmu::tlb::Recent;
use crate::state::{Seg, Segment, reg};

/// Who is called around stays in host code.
#[derive(Clone, Copy, Debug)]
pub struct Watcher {
    /// Called right before host code runs.
    pub before: extern "C" fn(*mut c_void, &Stay),
    /// Called right after.
    pub after: extern "C" fn(*mut c_void, &Stay),
    /// Given to both.
    pub context: *mut c_void,
    /// The end of the stack that both run on, a multiple of 16.
    pub stack: *mut u8,
}

/// A stay in host code.
#[derive(Debug)]
pub struct Stay {
    stack: u64,
    code: u64,
    writes: Vec<Written>,
}

/// Memory that host code may write besides the guest's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// What it is.
    pub what: &'static str,
    /// Where it is.
    pub range: Range<u64>,
}

impl Stay {
    /// Memory of the vCPU that host code may write.
    pub fn writes(&self) -> &[Written] {
        &self.writes
    }

    /// What it may write of the running thread's stack.
    pub fn stack(&self) -> Range<u64> {
        self.stack - (RETURNS as u64 + BESIDES_RETURNS)..self.stack
    }

    /// Where the stay begins: an address of host code.
    pub fn code(&self) -> u64 {
        self.code
    }
}

/// Bytes of stack besides the guest's return addresses: five words that the way in saves, two that stand for no call; and where there is
/// room for return addresses just so, two for the call, and three that a shared routine uses: its
/// return address, RCX and RDX.
const BESIDES_RETURNS: u64 = 8 * (5 + 2 + 2 + 3);

/// The fields of the [`Cpu`] that host code writes: what they are, offset and size.
const FIELDS: [(&str, usize, usize); 19] = [
    ("general registers", slot_offset(reg::RAX), 8 * 16),
    ("base of RIP", slot_offset(reg::IP_BASE), 8),
    ("base added for GS", offset_of!(Cpu, state.ea_base) + 8 * Seg::Gs as usize, 8),
    ("RIP", offset_of!(Cpu, state.rip), 8),
    ("RFLAGS but status flags", offset_of!(Cpu, state.rflags_system), 8),
    ("status flags", offset_of!(Cpu, state.status), 2),
    ("base of GS", GS + offset_of!(Segment, base), 8),
    ("IA32_KERNEL_GS_BASE", offset_of!(Cpu, state.kernel_gs_base), 8),
    ("MXCSR", offset_of!(Cpu, state.mxcsr), 4),
    ("vector registers", offset_of!(Cpu, state.zmm), 64 * 32),
    ("mask registers", offset_of!(Cpu, state.k), 8 * 8),
    ("FIP", offset_of!(Cpu, state.x87.fip), 8),
    ("pages accessed last", offset_of!(Cpu, mmu.tlb.recent), 2 * size_of::<Recent>() * Recent::ALL),
    ("count of instructions", COUNT, 8),
    ("a loaded value", offset_of!(Cpu, translator.kept), 8),
    ("count to look for requests at", STOP, 8),
    ("where the stack is", offset_of!(Cpu, translator.stack), 8),
    ("where it ends", offset_of!(Cpu, translator.stack_limit), 8),
    ("live vector registers", offset_of!(Cpu, translator.vectors), 4),
];

const GS: usize = offset_of!(Cpu, state.segs) + size_of::<Segment>() * Seg::Gs as usize;

/// What the assembly goes by.
#[repr(C)]
struct Hand {
    before: extern "C" fn(*mut c_void, &Stay),
    after: extern "C" fn(*mut c_void, &Stay),
    context: *mut c_void,
    own_stack: *mut u8,
    stay: *const Stay,
    stack: *mut u64,
    way_in: u64,
    code: u64,
}

impl Cpu {
    /// From now on `watcher` is called around each stay in host code; nobody, if it is `None`. Where engines are
    /// [checked](super::Engine::Check), nobody is.
    ///
    /// # Safety
    ///
    /// Until somebody else watches, or the CPU is gone: the functions do not unwind, may be called with the context on the thread that
    /// the CPU runs on, and fit on the stack, which nothing else uses.
    pub unsafe fn watch_host_code(&mut self, watcher: Option<Watcher>) {
        self.translator.watcher = watcher;
        self.translator.observed = watcher.is_some() || self.translator.checks.is_some();
    }

    /// As [`super::run::call`], for engines that are checked and for host code that is watched.
    ///
    /// # Safety
    ///
    /// As for [`Cpu::checked_call`].
    #[cold]
    pub(super) unsafe fn observed_call(&mut self, way_in: u64, code: u64, first: &Op) -> (u64, u64) {
        match self.translator.watcher {
            // SAFETY: the caller's promise.
            Some(watcher) if self.translator.checks.is_none() => unsafe {
                self.watched_call(watcher, way_in, code)
            },
            // SAFETY: as above.
            _ => unsafe { self.checked_call(way_in, code, first) },
        }
    }

    /// What host code may write of the vCPU's.
    fn host_code_writes(&self) -> Vec<Written> {
        let own = std::ptr::from_ref(self) as u64;
        let field = |&(what, offset, size): &(&'static str, usize, usize)| {
            let start = own + offset as u64;
            Written { what, range: start..start + size as u64 }
        };
        let frame = self.translator.code.as_ref().map(|code| code.routines.frame.range());
        let others = [
            Some(("pages found", self.mmu.tlb.found_lie_at())),
            frame.map(|range| ("frame", range)),
            Some(("last fault", host::last_fault_lies_at())),
        ];
        let others = others.into_iter().flatten().map(|(what, range)| Written { what, range });
        FIELDS.iter().map(field).chain(others).collect()
    }

    /// As [`super::run::call`], between calls of `watcher`.
    ///
    /// # Safety
    ///
    /// As for [`super::run::call`].
    unsafe fn watched_call(&mut self, watcher: Watcher, way_in: u64, code: u64) -> (u64, u64) {
        let mut stay = Stay { stack: 0, code, writes: self.host_code_writes() };
        let hand = Hand {
            before: watcher.before,
            after: watcher.after,
            context: watcher.context,
            own_stack: watcher.stack,
            stack: &raw mut stay.stack,
            stay: &raw const stay,
            way_in,
            code,
        };
        let (exit, extra);
        // SAFETY: as for `call`. The watcher's functions get a stack of their own; R12 to R14 and RBP are theirs to keep. Host code
        // keeps R12, which is on the stack besides.
        unsafe {
            asm!(
                "push rbx", "push rbp", "push r12",
                "mov rax, [r12 + {stack}]", "mov [rax], rsp",
                "mov rdi, [r12 + {context}]", "mov rsi, [r12 + {stay}]", "mov rbp, rsp",
                "mov rsp, [r12 + {own_stack}]", "call [r12 + {before}]", "mov rsp, rbp",
                "mov rdi, [r12 + {code}]", "mov rax, [r12 + {way_in}]", "call rax",
                "pop r12", "mov r13, rax", "mov r14, rdx",
                "mov rdi, [r12 + {context}]", "mov rsi, [r12 + {stay}]", "mov rbp, rsp",
                "mov rsp, [r12 + {own_stack}]", "call [r12 + {after}]", "mov rsp, rbp",
                "mov rax, r13", "mov rdx, r14",
                "pop rbp", "pop rbx",
                stack = const offset_of!(Hand, stack),
                context = const offset_of!(Hand, context),
                stay = const offset_of!(Hand, stay),
                own_stack = const offset_of!(Hand, own_stack),
                before = const offset_of!(Hand, before),
                after = const offset_of!(Hand, after),
                code = const offset_of!(Hand, code),
                way_in = const offset_of!(Hand, way_in),
                inout("r12") &raw const hand => _, out("rax") exit, out("rdx") extra,
                out("r13") _, out("r14") _, out("r15") _, clobber_abi("sysv64"),
            );
        }
        (exit, extra)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::exec::testing::{DATA, Guest};
    use crate::hostexec::arena::Arena;
    use crate::state::CodeSize;
    use crate::translate::{Engine, Translator};

    /// Remembers the bytes of a CPU, and what has changed where it may not.
    struct Memory {
        stack: Vec<u128>,
        own_stack: Range<u64>,
        cpu: Range<u64>,
        before: Vec<u8>,
        victim: u64,
        victim_changed: bool,
        stays: u64,
        changed: Vec<u64>,
        elsewhere: bool,
    }

    static VICTIM: AtomicU64 = AtomicU64::new(0);

    fn bytes(range: &Range<u64>) -> Vec<u8> {
        // SAFETY: a CPU, which its own thread looks at.
        (range.clone()).map(|at| unsafe { (at as *const u8).read_volatile() }).collect()
    }

    extern "C" fn before(context: *mut c_void, stay: &Stay) {
        // SAFETY: `memory` has made it, and looks at it after the last stay.
        let memory = unsafe { &mut *context.cast::<Memory>() };
        let local = 0u8;
        memory.elsewhere |= !memory.own_stack.contains(&(&raw const local as u64));
        memory.before = bytes(&memory.cpu);
        memory.victim = VICTIM.load(Ordering::SeqCst);
        assert!(stay.stack().end - stay.stack().start < 8192);
    }

    extern "C" fn after(context: *mut c_void, stay: &Stay) {
        // SAFETY: as above.
        let memory = unsafe { &mut *context.cast::<Memory>() };
        let now = bytes(&memory.cpu);
        memory.stays += 1;
        memory.victim_changed |= VICTIM.load(Ordering::SeqCst) != memory.victim;
        let allowed = |at: &u64| stay.writes().iter().any(|written| written.range.contains(at));
        let differ = memory.cpu.clone().zip(memory.before.iter().zip(&now)).filter(|(_, (a, b))| a != b);
        memory.changed.extend(differ.map(|(at, _)| at).filter(|at| !allowed(at)));
    }

    /// Has everything be remembered from now on.
    fn watch(cpu: &mut Cpu) -> Box<Memory> {
        let start = std::ptr::from_ref(cpu) as u64;
        let mut memory = Box::new(Memory {
            stack: vec![0; 16 << 10],
            own_stack: 0..0,
            cpu: start..start + size_of::<Cpu>() as u64,
            before: Vec::new(),
            victim: 0,
            victim_changed: false,
            stays: 0,
            changed: Vec::new(),
            elsewhere: false,
        });
        let stack = memory.stack.as_mut_ptr_range();
        memory.own_stack = stack.start as u64..stack.end as u64;
        let context = (&raw mut *memory).cast();
        // SAFETY: the guest is gone before what is returned here, and the functions are content with 256 KiB.
        unsafe { cpu.watch_host_code(Some(Watcher { before, after, context, stack: stack.end.cast() })) };
        memory
    }

    #[test]
    fn host_code_writes_only_the_declared_fields_of_its_cpu() {
        let mut guest = Guest::new(CodeSize::Bits64);
        guest.cpu.translator = Translator::new(Engine::Translate(0));
        let memory = watch(&mut guest.cpu);
        // mov rbx, DATA; mov ecx, 200; 1: mov [rbx], rcx; add rbx, 8; push rcx; pop rdx; call 2; 2: pop rax; dec ecx; jnz 1
        let code = [
            &[0xbb][..],
            &(DATA as u32).to_le_bytes(),
            &[0xb9, 200, 0, 0, 0, 0x48, 0x89, 0x0b, 0x48, 0x83, 0xc3, 8, 0x51, 0x5a],
            &[0xe8, 0, 0, 0, 0, 0x58, 0xff, 0xc9, 0x75, 0xed],
        ]
        .concat();
        guest.finish(&code);
        assert_eq!(guest.reg(reg::RBX), DATA + 200 * 8);
        assert!(memory.stays > 0);
        assert_eq!(memory.changed, [] as [u64; 0], "of a CPU at {:#x}", memory.cpu.start);
        assert!(!memory.elsewhere, "the watcher has a stack of its own");
    }

    #[test]
    fn what_broken_host_code_does_lies_between_the_two_calls() {
        let mut guest = Guest::new(CodeSize::Bits64);
        let memory = watch(&mut guest.cpu);
        let mut arena = Arena::new(4096).unwrap();
        // mov rax, VICTIM; inc qword [rax]; mov rax, rdi; mov edx, 7; ret
        let victim = (&raw const VICTIM as u64).to_le_bytes();
        let rest = [0x48, 0xff, 0, 0x48, 0x89, 0xf8, 0xba, 7, 0, 0, 0, 0xc3];
        let code = arena.add(&[&[0x48, 0xb8][..], &victim, &rest].concat()).unwrap();
        let watcher = guest.cpu.translator.watcher.unwrap();
        // SAFETY: the code changes a static, and registers that the call says it changes.
        assert_eq!(unsafe { guest.cpu.watched_call(watcher, code, 5) }, (5, 7));
        assert_eq!(memory.stays, 1);
        assert!(memory.victim_changed);
    }
}
