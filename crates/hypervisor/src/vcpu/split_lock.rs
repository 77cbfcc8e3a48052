//! Split locks and bus locks of the guest: does what [`split_lock`](crate::split_lock) decides (kernel: `handle_exception_nmi`
//! and `handle_bus_lock_vmexit` in arch/x86/kvm/vmx/vmx.c, `handle_guest_split_lock` in arch/x86/kernel/cpu/intel.c).

use silicon::Cpu;
use silicon::bus_lock::{LockKind, LockedAccess, core_capabilities, test_ctrl};
use silicon::exception::{Exception, vector};
use silicon::model::Feature;
use silicon::system::deliver::Event;
use silicon::vmx::Exit;

use super::{Vcpu, VcpuExit};
use crate::error::Error;
use crate::processors::{Claim, Processors, Want};
use crate::split_lock::{Action, PAUSE_NS, Policy, Situation, decide, shared};
use crate::vm::Vm;

/// A split lock that is not executed, for the client. RIP is at the instruction, which has changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SplitLockExit {
    /// Why it is not: exit or kill.
    pub policy: Policy,
    /// RIP.
    pub rip: u64,
    /// Linear address of the access.
    pub linear_address: u64,
    /// Its guest-physical address.
    pub gpa: u64,
    /// Its bytes.
    pub size: u8,
    /// Privilege level.
    pub cpl: u8,
    /// The processor's own access to a descriptor table, not the instruction's operand.
    pub implicit: bool,
    /// Bytes of the instruction, as far as they can be read, and how many there are.
    pub instruction: ([u8; 15], u8),
}

impl SplitLockExit {
    /// Under [`Policy::Efault`] KVM_RUN fails.
    pub(super) fn or_fault(exit: VcpuExit) -> Result<VcpuExit, Error> {
        match exit {
            VcpuExit::SplitLock(split) if split.policy == Policy::Efault => {
                Err(Error::SplitLock { rip: split.rip })
            }
            other => Ok(other),
        }
    }
}

/// How a refused access is executed after all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The host's detection is off for it, as the host kernel does it in warn mode. A UC lock that the guest wants refused is.
    Undetected,
    /// The processor is told to let it pass, or the delivery of the event that made it, although it is a lock of this kind;
    /// detection stays on.
    Permitted(LockKind),
}

/// What a vCPU's locks have to do with its place on the host.
#[derive(Debug)]
pub(super) struct Locks {
    thread: u32,
    /// Exceptions that may be a refused access.
    intercepted: u32,
    /// Split locks execute until the vCPU is put.
    undetected: Option<Claim>,
    /// The guest wants UC locks to fault.
    uc_lock_faults: Option<Claim>,
    /// When the pause is over that a split lock has to make; it goes on if a signal cuts KVM_RUN short.
    pause: Option<u64>,
    /// The next instruction is one that may be executed.
    step: Option<Step>,
    /// The next instruction, once it is complete, has made a split lock that was emulated.
    emulates: bool,
    /// The rate limit has not yet allowed for the last bus lock.
    owes: bool,
    /// There was a bus lock in this KVM_RUN.
    pub(super) bus_lock: bool,
    /// The log has this vCPU.
    reported: bool,
}

impl Locks {
    /// For vCPU `id` of a new vCPU of `vm`.
    pub(super) fn new(vm: &Vm, id: u32) -> Locks {
        let thread = Processors::thread_of(vm.place(), id);
        let detects = vm.system().processors().test_ctrl(thread).get() & test_ctrl::SPLIT_LOCK_DETECT != 0;
        let split = if detects { 1 << vector::AC } else { 0 };
        // Where nobody shares the register, only guests that have asked for it meet this fault, and need no help.
        let (model, host) = (vm.system().model(), vm.system().host());
        let has_uc = vm.core_capabilities() & core_capabilities::UC_LOCK_DISABLE != 0;
        let uc = if !has_uc || !shared(model, host) {
            0
        } else if model.has(Feature::UcLockDisable) {
            1 << vector::AC
        } else {
            1 << vector::GP
        };
        Locks {
            thread,
            intercepted: split | uc,
            undetected: None,
            uc_lock_faults: None,
            pause: None,
            step: None,
            emulates: false,
            owes: false,
            bus_lock: false,
            reported: false,
        }
    }

    /// The host's thread.
    pub(super) fn thread(&self) -> u32 {
        self.thread
    }

    /// Exceptions that have to exit, since the processor may have raised them for a locked access.
    pub(super) fn intercepted(&self) -> u32 {
        self.intercepted
    }

    /// The vCPU is taken off its thread: the host's settings hold again.
    pub(super) fn put(&mut self) {
        self.undetected = None;
        self.uc_lock_faults = None;
    }

    pub(super) fn take_step(&mut self) -> Option<Step> {
        self.step.take()
    }

    /// RIP has been moved away from the instruction that might be executed.
    pub(super) fn forget_step(&mut self) {
        self.step = None;
        self.emulates = false;
    }
}

impl Vcpu {
    /// The vCPU is loaded on its thread.
    pub(super) fn load_locks(&mut self) {
        self.locks.bus_lock = false;
        self.test_ctrl_written();
        self.update_bus_lock_detection();
    }

    fn claim(&self, want: Want) -> Claim {
        Claim::new(self.vm.system().processors(), self.locks.thread, want)
    }

    /// The guest's MSR_TEST_CTRL has changed, or the vCPU has been loaded.
    pub(super) fn test_ctrl_written(&mut self) {
        let value = self.msrs.test_ctrl();
        if value & test_ctrl::SPLIT_LOCK_DETECT != 0 {
            // What it did before it asked for detection counts no more.
            self.locks.undetected = None;
        }
        let wanted = value & test_ctrl::UC_LOCK_DISABLE != 0;
        if wanted != self.locks.uc_lock_faults.is_some() {
            self.locks.uc_lock_faults = wanted.then(|| self.claim(Want::UcLockFaults));
        }
    }

    /// What the processor is to tell of bus locks.
    pub(super) fn update_bus_lock_detection(&mut self) {
        let limited = self.vm.system().bus_lock_limit().is_some();
        let controls = &mut self.cpu.controls;
        controls.bus_lock_detection = limited || self.vm.policy().bus_lock_exit();
        // As KVM has it, unless the guest could tell the difference by a fault that it has asked for.
        controls.ignore_pat = self.msrs.test_ctrl_bits() & test_ctrl::UC_LOCK_DISABLE == 0;
    }

    /// Whether the last exit came with a bus lock.
    pub(super) fn note_bus_lock(&mut self) {
        if self.cpu.exit_bus_lock {
            self.locks.bus_lock = true;
            self.locks.owes |= self.vm.system().bus_lock_limit().is_some();
        }
    }

    /// KVM_EXIT_X86_BUS_LOCK, if that has been asked for and there was one.
    pub(super) fn bus_lock_exit(&self) -> Option<VcpuExit> {
        (self.locks.bus_lock && self.vm.policy().bus_lock_exit()).then_some(VcpuExit::BusLock)
    }

    /// Whether the vCPU has to wait before it goes on: `split_lock_detect=ratelimit:N`, which upstream does not hold guests to.
    /// Waits for one turn.
    pub(super) fn owes_bus_lock(&mut self) -> bool {
        if !self.locks.owes {
            return false;
        }
        let system = self.vm.system().clone();
        match system.bus_lock_limit().map_or(Ok(()), |limit| limit.take(system.time().now())) {
            Ok(()) => self.locks.owes = false,
            Err(next) => self.hold_back(next),
        }
        self.locks.owes
    }

    /// Waits until `deadline` or until KVM_RUN has to return.
    fn hold_back(&self, deadline: u64) {
        let time = self.vm.system().time();
        let since = time.now();
        time.wait(deadline, &self.handle);
        let nanoseconds = time.now().saturating_sub(since);
        self.handle.stats.split_lock_throttle.fetch_add(nanoseconds, std::sync::atomic::Ordering::Relaxed);
    }

    /// #AC or #GP, which may be a locked access that the processor has refused. (KVM tells them apart by CPL, CR0.AM and
    /// EFLAGS.AC, which misses descriptor accesses.)
    pub(super) fn refused_or_raised(&mut self, exception: Exception) -> Option<VcpuExit> {
        if matches!(self.cpu.idt_vectoring, Some(Event::Software { .. })) {
            // RIP is at the INT, which is executed again.
            self.cpu.idt_vectoring = None;
        }
        let event = self.requeue_vectored();
        let Some(access) = self.cpu.refused_lock.take() else {
            return self.raise_in_delivery(event, exception);
        };
        let situation = Situation {
            host: self.vm.system().host().split_lock_detect,
            test_ctrl: self.msrs.test_ctrl(),
            vm: self.vm.policy().split_locks(),
        };
        match decide(access.kind, &situation) {
            Action::Forward => self.forward(access.kind, exception),
            Action::Execute => self.locks.step = Some(Step::Permitted(access.kind)),
            Action::Warn => self.warn(),
            Action::Refuse(policy) => return self.refuse(policy, &access, exception),
        }
        None
    }

    fn forward(&mut self, kind: LockKind, exception: Exception) {
        if kind == LockKind::Split {
            self.handle.stats.split_locks_forwarded.count();
        }
        self.locks.emulates = false;
        self.events.raise(exception);
    }

    /// The host in warn mode: a message, a pause of 10 ms if the sysctl says so, and the access is made. Each vCPU makes its
    /// own pause (upstream lets one of all through at a time), it is not made again if a signal cuts it short (which upstream
    /// does, so that the instruction never completes), and detection is off for the one instruction that has paid for it.
    /// Without the pause it is off until the vCPU is put.
    fn warn(&mut self) {
        if !self.locks.reported {
            self.locks.reported = self.report("took a split_lock trap");
        }
        let system = self.vm.system().clone();
        if !system.split_lock_mitigate() {
            self.locks.pause = None;
            self.handle.stats.split_locks_warned.count();
            let claim = self.claim(Want::SplitLocks);
            self.locks.undetected = Some(claim);
            return;
        }
        let time = system.time();
        let deadline = *self.locks.pause.get_or_insert_with(|| time.now().saturating_add(PAUSE_NS));
        while time.now() < deadline {
            if self.handle.interrupted() {
                return;
            }
            self.hold_back(deadline);
        }
        self.locks.pause = None;
        self.handle.stats.split_locks_warned.count();
        self.locks.step = Some(Step::Undetected);
    }

    fn refuse(&mut self, policy: Policy, access: &LockedAccess, exception: Exception) -> Option<VcpuExit> {
        let stats = &self.handle.stats;
        match policy {
            Policy::Forward => {
                self.forward(access.kind, exception);
                return None;
            }
            Policy::Emulate => {
                self.locks.emulates = true;
                self.locks.step = Some(Step::Permitted(access.kind));
                return None;
            }
            Policy::Efault => stats.split_locks_efault.count(),
            Policy::Exit => stats.split_locks_exit.count(),
            Policy::Kill => stats.split_locks_killed.count(),
        }
        if policy != Policy::Exit {
            self.report("fatal split_lock trap");
        }
        let bytes = self.cpu.instruction_bytes();
        let mut instruction = ([0; 15], bytes.len().min(15) as u8);
        instruction.0.iter_mut().zip(&bytes).for_each(|(place, byte)| *place = *byte);
        Some(VcpuExit::SplitLock(SplitLockExit {
            policy,
            rip: self.cpu.state.rip,
            linear_address: access.lin,
            gpa: access.gpa,
            size: access.size,
            cpl: self.cpu.state.cpl,
            implicit: access.implicit,
            instruction,
        }))
    }

    /// Executes the instruction whose access was refused, or delivers the event.
    pub(super) fn execute_step(&mut self, step: Step, enter: fn(&mut Cpu) -> Exit) -> Exit {
        let claim = (step == Step::Undetected).then(|| self.claim(Want::SplitLocks));
        self.cpu.permitted_lock = match step {
            Step::Permitted(kind) => Some(kind),
            Step::Undetected => None,
        };
        self.cpu.controls.smi_exiting = false;
        if self.events.reinjects() {
            self.cpu.injection = self.next_injection();
        }
        let before = (self.cpu.instructions(), self.cpu.state.rip);
        let next = before.0 + 1;
        let limit = std::mem::replace(&mut self.cpu.controls.instruction_limit, next);
        let exit = self.enter(enter);
        self.cpu.controls.instruction_limit = limit;
        drop(claim);
        let undone = matches!(exit, Exit::ExternalInterrupt | Exit::MemoryAbsent { .. });
        let complete = before != (self.cpu.instructions(), self.cpu.state.rip);
        if undone && !complete {
            // Somebody wanted the vCPU's attention before it could begin, or the client has no memory there.
            self.locks.step = Some(step);
        }
        if complete && std::mem::take(&mut self.locks.emulates) {
            self.handle.stats.split_locks_emulated.count();
        }
        match exit {
            // Ours, unless a tool's limit has been reached as well.
            Exit::Budget if next < limit => Exit::ExternalInterrupt,
            other => other,
        }
    }

    /// The kernel's message, with the bytes of the instruction. False: there have been too many lately.
    fn report(&mut self, what: &str) -> bool {
        if !self.vm.system().may_report_split_lock() {
            return false;
        }
        let (name, id) = this_thread();
        let rip = self.cpu.state.rip;
        let bytes: Vec<String> =
            self.cpu.instruction_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let bytes = bytes.join(" ");
        tracing::warn!("x86/split lock detection: #AC: {name}/{id} {what} at address: {rip:#x} ({bytes})");
        true
    }
}

/// Name and number of the calling thread, as the kernel's messages have them.
fn this_thread() -> (String, String) {
    let name = std::fs::read_to_string("/proc/thread-self/comm").unwrap_or_default();
    let path = std::fs::read_link("/proc/thread-self").unwrap_or_default();
    let id = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    (name.trim_end().into(), id)
}
