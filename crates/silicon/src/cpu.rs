//! One logical processor: its architectural state and everything that executes on it.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use iced_x86::Decoder;

use crate::buffers::{Buffer, Cleared};
use crate::bus_lock::{LockKind, LockedAccess, TestCtrl};
use crate::clock::Clock;
use crate::code::CodeCache;
use crate::code::op::Op;
use crate::exception::{Abort, Exception};
use crate::hostexec::HostExec;
use crate::mmu::Mmu;
use crate::mmu::ept::Ept;
use crate::model::Features;
use crate::state::{CodeSize, CpuState, reg};
use crate::system::deliver::Event;
use crate::system::window::EventWindow;
use crate::tiles::TileData;
use crate::translate::{Engine, Translator};
use crate::vmx::{BusAccess, Controls, Exit, Injection, Space};

/// Why the current instruction did not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pending {
    /// Nothing is pending.
    None,
    /// A fault to deliver at the instruction's address.
    Exception(Exception),
    /// An exit to the hypervisor; RIP is left at the instruction.
    Exit(Exit),
    /// Nothing happened that the guest could see: look at the requests, then execute the instruction again.
    Retry,
}

/// Things that a CPU looks at between blocks. Other threads set bits; see [`Requests::post`].
#[derive(Debug)]
#[repr(C)]
pub struct Requests {
    bits: AtomicU32,
    /// Loops of translated code load what this points to. While they have to stop it is null, the load faults, and the
    /// loop ends ([`crate::mmu::host::recover`]): that costs less than a branch, and keeps the flags.
    pub(crate) poll: AtomicPtr<u32>,
}

/// What [`Requests::poll`] points to otherwise.
static QUIET: u32 = 0;

impl Default for Requests {
    fn default() -> Requests {
        Requests { bits: AtomicU32::new(0), poll: AtomicPtr::new(quiet()) }
    }
}

fn quiet() -> *mut u32 {
    (&raw const QUIET).cast_mut()
}

impl Requests {
    /// Leave guest mode ([`Exit::ExternalInterrupt`]).
    pub const KICK: u32 = 1 << 0;
    /// Drop all cached translations and code.
    pub const FLUSH: u32 = 1 << 1;
    /// Messages wait in the MMU's mailbox (code pages written, write permissions to drop).
    pub const MAIL: u32 = 1 << 2;
    /// Own state needs care between blocks: single step, an interrupt shadow, a window to watch. Only the owning thread sets and
    /// clears it, and loops of translated code need not stop for it: nothing in them changes that state.
    pub const LOCAL: u32 = 1 << 3;
    /// Pause until an exclusive operation of another CPU is over.
    pub const EXCLUSIVE: u32 = 1 << 4;
    /// There is an instruction limit. Only the owning thread sets and clears it.
    pub const LIMIT: u32 = 1 << 5;
    /// Host code is to leave soon, for what it does is compared ([`Engine::Check`]). Set only while it runs.
    pub(crate) const COMPARING: u32 = 1 << 6;
    /// What other threads ask for.
    pub(crate) const FOREIGN: u32 = Requests::KICK | Requests::FLUSH | Requests::MAIL | Requests::EXCLUSIVE;

    /// Asks for attention at the next block boundary.
    pub fn post(&self, bits: u32) {
        self.bits.fetch_or(bits, Ordering::SeqCst);
        if bits & !Requests::LOCAL != 0 {
            self.poll.store(ptr::null_mut(), Ordering::SeqCst);
        }
    }
    /// Whether anything is asked for.
    #[inline(always)]
    pub fn any(&self) -> bool {
        self.bits.load(Ordering::Relaxed) != 0
    }
    /// Current bits.
    pub fn get(&self) -> u32 {
        self.bits.load(Ordering::SeqCst)
    }
    /// Clears `bits` and returns those of them that were set.
    pub fn take(&self, bits: u32) -> u32 {
        let taken = self.bits.fetch_and(!bits, Ordering::SeqCst) & bits;
        self.settle();
        taken
    }
    /// If there is nothing to stop for, translated code's loops go on. (Whoever posts may still be about to stop them for what has
    /// been taken already.)
    pub(crate) fn settle(&self) {
        let stops = || self.get() & !Requests::LOCAL != 0;
        if !stops() && self.poll.load(Ordering::SeqCst).is_null() {
            self.poll.store(quiet(), Ordering::SeqCst);
            if stops() {
                self.poll.store(ptr::null_mut(), Ordering::SeqCst);
            }
        }
    }
}

/// Accesses that the running instruction has already made outside guest mode, so that executing it again
/// repeats none of them.
#[derive(Clone, Debug, Default)]
pub struct Replay {
    /// Completed accesses, in program order, with the value read (0 for writes).
    pub(crate) done: Vec<(BusAccess, u64)>,
    /// How many of them the current attempt has consumed.
    pub(crate) cursor: usize,
    /// The access that the last exit carried and that awaits [`Cpu::complete_read`].
    pub(crate) waiting: Option<BusAccess>,
}

/// Counts that silicon keeps of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Instructions completed (each REP iteration is part of one).
    pub instructions: u64,
    /// Exceptions delivered through the IDT.
    pub exceptions: u64,
    /// External interrupts and NMIs delivered.
    pub interrupts: u64,
    /// Basic blocks decoded.
    pub blocks_decoded: u64,
    /// Blocks translated to host code.
    pub blocks_translated: u64,
    /// Blocks dropped because their bytes changed.
    pub blocks_invalidated: u64,
    /// Software-TLB refills by a page walk.
    pub page_walks: u64,
    /// Bus locks taken, whether or not anything detects them.
    pub bus_locks: u64,
    /// Locked accesses refused by split-lock detection.
    pub split_lock_faults: u64,
    /// Locked accesses refused by UC-lock disable.
    pub uc_lock_faults: u64,
    /// #NMs for components that IA32_XFD disables.
    pub xfd_faults: u64,
    /// VERWs with a memory operand that cleared fill buffers.
    pub fb_clears: u64,
    /// VERWs with a memory operand that cleared the register file.
    pub register_file_clears: u64,
    /// Commands to flush the first-level data cache (IA32_FLUSH_CMD).
    pub l1d_flushes: u64,
    /// Indirect branch prediction barriers (IA32_PRED_CMD).
    pub branch_barriers: u64,
}

/// A logical processor executing guest code.
pub struct Cpu {
    /// Architectural state.
    pub state: CpuState,
    /// What this CPU offers.
    pub features: Features,
    /// Where the time-stamp counter comes from.
    pub clock: Clock,
    /// VM-execution controls; the hypervisor sets them before [`Cpu::run`].
    pub controls: Controls,
    /// Event to inject at the next entry.
    pub injection: Option<Injection>,
    /// Guest-physical memory.
    pub ept: Arc<Ept>,
    /// Requests of other threads.
    pub requests: Arc<Requests>,
    /// Counters.
    pub counters: Counters,
    /// The page-modification log ([`Controls::page_modification_logging`]): guest-physical pages that this CPU was the
    /// first to write since their marks in the dirty log were cleared. The hypervisor empties it.
    pub modified_pages: Vec<u64>,
    /// Why the last instruction did not complete.
    pub pending: Pending,
    /// Length in bytes of the instruction that the last exit interrupted.
    pub exit_instruction_length: u8,
    /// How many reads of its port, one after the other, the instruction makes whose first the last [`Exit::Io`] carries:
    /// what REP INS stores in one page. A client may answer them together.
    pub port_reads: u32,
    /// Debug exceptions (DR6 bits) that the next instruction boundary delivers: the VMCS's pending debug
    /// exceptions (SDM vol. 3C, 25.4.2). A halted CPU that has any is to be run.
    pub pending_debug: u64,
    /// The event whose delivery the last exit interrupted: the VMCS's IDT-vectoring information.
    pub idt_vectoring: Option<Event>,
    /// The physical MSR_TEST_CTRL: that of the thread that the CPU is loaded on. Read at each locked access that is split or
    /// goes to memory that is not write-back.
    pub test_ctrl: TestCtrl,
    /// The locked accesses of the next instruction, or of the delivery of the event that the entry injects, go through
    /// atomically although [`Cpu::test_ctrl`] would refuse them for this reason: all other CPUs of the VM stand still
    /// meanwhile. The processor looks for split locks first, so what is permitted to be [`LockKind::Uncached`] may be split
    /// as well. They are bus locks all the same: BLD and bus-lock detection report them. The hypervisor sets it before an
    /// entry; it ends when the instruction at RIP completes or faults, or when an event has been delivered, and outlasts exits
    /// that repeat the instruction (ports, MMIO).
    pub permitted_lock: Option<LockKind>,
    /// The locked access that the last exception refused, set with [`Exit::Exception`] when #AC or #GP is from split-lock
    /// detection or UC-lock disable; `None` for those of any other cause. RIP is at the instruction, which has changed nothing.
    pub refused_lock: Option<LockedAccess>,
    /// Bit 26 of the exit reason: a bus lock was taken since the entry and [`Controls::bus_lock_detection`] is on. Set with
    /// every [`Exit::BusLock`], and with another exit that came in its place, which is then the only report.
    pub exit_bus_lock: bool,
    /// What VERW with a memory operand clears, by what the guest has been told of its processor. The hypervisor sets it.
    pub verw_clears: Cleared,
    /// What the guest has cleared since the hypervisor last looked.
    pub cleared: Cleared,
    /// How long there has been no event window.
    pub event_window: EventWindow,
    /// A fault met in a new task before its first instruction.
    pub(crate) deferred: Option<Exception>,
    /// A single-step trap follows the running instruction.
    pub(crate) trap_after: bool,
    /// What the running instruction or delivery leaves behind is looked at right after it.
    pub(crate) stepping: bool,
    /// An event is being delivered.
    pub(crate) delivering: bool,
    /// The next instruction is to run as a single step: it takes a bus lock that is to be reported.
    pub(crate) step_next: bool,
    /// A bus lock has been taken and is still to be reported.
    pub(crate) bus_lock_taken: bool,
    /// Address of the operation that ended the block; see [`Cpu::at`].
    pub(crate) current_op: usize,
    /// Address of the first operation of the running block.
    pub(crate) block_start: usize,
    /// How many more blocks may follow before the engine is to look around.
    pub(crate) chain: u32,
    pub(crate) replay: Replay,
    pub(crate) code: CodeCache,
    pub(crate) mmu: Mmu,
    pub(crate) hostexec: HostExec,
    /// Host code for guest code.
    pub(crate) translator: Translator,
    /// AMX's tiles, once there is room for them.
    pub(crate) tiles: TileData,
}

impl Cpu {
    /// A CPU after reset, with the engine of this process.
    pub fn new(features: Features, ept: Arc<Ept>) -> Cpu {
        Cpu::with_engine(features, ept, Engine::configured())
    }

    /// A CPU after reset that executes guest code in this way, whatever the process is configured for.
    pub fn with_engine(features: Features, ept: Arc<Ept>, engine: Engine) -> Cpu {
        let requests = Arc::default();
        let mmu = Mmu::new(&ept, &requests);
        let mut cpu = Cpu {
            state: CpuState::reset(features.signature()),
            features,
            clock: Clock::default(),
            controls: Controls::default(),
            injection: None,
            ept,
            requests,
            counters: Counters::default(),
            modified_pages: Vec::new(),
            pending: Pending::None,
            exit_instruction_length: 0,
            port_reads: 0,
            pending_debug: 0,
            idt_vectoring: None,
            test_ctrl: TestCtrl::default(),
            permitted_lock: None,
            refused_lock: None,
            exit_bus_lock: false,
            verw_clears: Cleared::NOTHING,
            cleared: Cleared::NOTHING,
            event_window: EventWindow::default(),
            deferred: None,
            trap_after: false,
            stepping: false,
            delivering: false,
            step_next: false,
            bus_lock_taken: false,
            current_op: 0,
            block_start: 0,
            chain: 0,
            replay: Replay::default(),
            code: CodeCache::new(),
            mmu,
            hostexec: HostExec::default(),
            translator: Translator::new(engine),
            tiles: TileData::default(),
        };
        cpu.refresh_mode();
        cpu
    }

    /// Instructions completed since creation.
    pub fn instructions(&self) -> u64 {
        self.counters.instructions
    }

    /// Recomputes what is derived from control registers, EFER, RFLAGS.VM and segment registers. Everything
    /// that writes one of those calls it before the next instruction runs.
    pub fn refresh_mode(&mut self) {
        let state = &mut self.state;
        let cs = state.segs[1];
        state.code_size = if state.long_mode() && cs.long() {
            CodeSize::Bits64
        } else if cs.big() {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
        state.stack32 = state.segs[2].big();
        let flat = state.code_size == CodeSize::Bits64;
        for (i, seg) in state.segs.iter().enumerate() {
            state.ea_base[i] = if flat && i < 4 { 0 } else { seg.base };
        }
        self.mode_changed();
        self.hostexec.refresh(&self.state);
    }

    /// Stores a fault to be delivered and returns the token that unwinds the instruction.
    #[cold]
    pub fn raise(&mut self, exception: Exception) -> Abort {
        self.refused_lock = None;
        self.pending = Pending::Exception(exception);
        Abort::stored()
    }

    /// Raises a fault once more that was met before and kept; [`Cpu::refused_lock`] is still its own.
    pub(crate) fn raise_again(&mut self, exception: Exception) -> Abort {
        let lock = self.refused_lock;
        let abort = self.raise(exception);
        self.refused_lock = lock;
        abort
    }

    /// Stores an exit and returns the token that unwinds the instruction.
    #[cold]
    pub fn exit(&mut self, exit: Exit) -> Abort {
        self.pending = Pending::Exit(exit);
        Abort::stored()
    }

    /// Unwinds the instruction so that requests are looked at; it is executed again afterwards.
    #[cold]
    pub fn retry(&mut self) -> Abort {
        self.pending = Pending::Retry;
        Abort::stored()
    }

    /// Makes one port or MMIO access: from the replay log if this instruction already made it, else by an exit.
    pub fn bus(&mut self, access: BusAccess) -> Result<u64, Abort> {
        let cursor = self.replay.cursor;
        if let Some(&(done, value)) = self.replay.done.get(cursor)
            && (done.space, done.address, done.size) == (access.space, access.address, access.size)
        {
            self.replay.cursor += 1;
            return Ok(value);
        }
        self.replay.done.truncate(cursor);
        self.replay.waiting = Some(access);
        Err(match access.space {
            Space::Port => self.exit(Exit::Io(access)),
            Space::Memory => self.exit(Exit::EptViolation(access)),
        })
    }

    /// Gives the result of the access that the last exit carried (ignored for a write). The next entry
    /// executes the instruction again and finds the access done.
    pub fn complete_read(&mut self, value: u64) {
        if let Some(access) = self.replay.waiting.take() {
            self.replay.done.push((access, value));
        }
    }

    /// The guest has had buffers cleared: by VERW with a memory operand, or by a command of the hypervisor's on its behalf.
    pub fn clear_buffers(&mut self, what: Cleared) {
        let counters = &mut self.counters;
        counters.register_file_clears += u64::from(what.has(Buffer::RegisterFile));
        counters.l1d_flushes += u64::from(what.has(Buffer::L1d));
        counters.branch_barriers += u64::from(what.has(Buffer::BranchPredictor));
        counters.fb_clears += u64::from(what.has(Buffer::Fill) && !what.has(Buffer::L1d));
        self.cleared = self.cleared.union(what);
    }

    /// Whether an access that an exit carried has been answered and its instruction waits to be executed again.
    pub fn access_pending(&self) -> bool {
        !self.replay.done.is_empty()
    }

    /// Forgets the accesses that an instruction has made outside guest mode: RIP has been moved away from it, so it is
    /// not executed again.
    pub fn abandon_access(&mut self) {
        self.end_lock_permission();
        self.replay = Replay::default();
    }

    /// The instruction, or one iteration of a REP instruction, is complete: accesses made for it are forgotten.
    #[inline(always)]
    pub(crate) fn commit_bus(&mut self) {
        if self.replay.cursor != 0 {
            self.note_port_breakpoints();
            self.replay.done.clear();
            self.replay.cursor = 0;
        }
    }

    /// Moves RIP past the instruction that exited; for exits that the hypervisor completes itself (CPUID, MSRs …).
    /// Interrupt shadows end, and under single step a debug exception becomes pending.
    pub fn skip_instruction(&mut self) {
        let next = self.state.rip.wrapping_add(u64::from(self.exit_instruction_length));
        self.state.rip = next & self.state.eip_mask();
        self.replay.done.clear();
        self.replay.cursor = 0;
        self.replay.waiting = None;
        self.instruction_skipped();
    }

    /// The bytes of the instruction at RIP, for messages: read without effects on the guest, and fewer than the instruction
    /// has (none perhaps) where memory ends or is not mapped.
    pub fn instruction_bytes(&mut self) -> Vec<u8> {
        let start = self.code_linear();
        let wide = self.state.code_size == CodeSize::Bits64;
        let at = |i: u64| if wide { start.wrapping_add(i) } else { start.wrapping_add(i) & 0xffff_ffff };
        let mut bytes: Vec<u8> = (0..15).map_while(|i| self.peek_byte(at(i))).collect();
        let bits = self.state.code_size.bits();
        let length = Decoder::new(bits, &bytes, self.features.decoder_options()).decode().len();
        if length != 0 {
            bytes.truncate(length);
        }
        bytes
    }

    /// Instruction pointer of `op`, which must belong to the running block.
    #[inline(always)]
    pub(crate) fn ip_of(&self, op: &Op) -> u64 {
        self.state.regs[reg::IP_BASE as usize].wrapping_add(u64::from(op.page_offset)) & self.state.eip_mask()
    }

    /// Instruction pointer after `op`.
    #[inline(always)]
    pub(crate) fn next_ip(&self, op: &Op) -> u64 {
        let next = u64::from(op.page_offset) + u64::from(op.length);
        self.state.regs[reg::IP_BASE as usize].wrapping_add(next) & self.state.eip_mask()
    }
}
