//! Split locks of guests: the seven rows of the thread "KVM: VMX: Extend VMX's #AC handding" (docs/features/split-lock.md),
//! each policy, the handshake, and how detection is switched around a vCPU. Time is a value here: nothing waits.

mod guest;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use guest::{CODE, Guest};
use hypervisor::cpuid::own;
use hypervisor::split_lock::{Policy, VmPolicy};
use hypervisor::time::HostTime;
use hypervisor::vcpu::{RunRequest, SplitLockExit};
use hypervisor::{Error, HostParams, System, Vcpu, VcpuExit, VcpuHandle, Vm};
use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry, kvm_regs};
use silicon::model::CpuModel;

/// The word that is incremented: its bytes lie in two cache lines.
const WORD: u64 = 0x203f;
/// How often the guest's handler of #AC has run.
const HANDLED: u64 = 0x2100;
/// The handler.
const HANDLER: u64 = 0x600;
/// MSR_TEST_CTRL, and its bit for split locks.
const TEST_CTRL: u32 = 0x33;
const DETECT: u64 = 1 << 29;

/// `lock inc word [0x203f]`
const SPLIT: &[u8] = &[0xf0, 0xff, 0x06, 0x3f, 0x20];
const HLT: &[u8] = &[0xf4];
/// `mov ecx, 0x33; xor edx, edx; mov eax, 1 << 29; wrmsr`
const SET: &[u8] = &[0x66, 0xb9, 0x33, 0, 0, 0, 0x66, 0x31, 0xd2, 0x66, 0xb8, 0, 0, 0, 0x20, 0x0f, 0x30];
/// The same with 0.
const CLEAR: &[u8] = &[0x66, 0xb9, 0x33, 0, 0, 0, 0x66, 0x31, 0xd2, 0x66, 0xb8, 0, 0, 0, 0, 0x0f, 0x30];
/// `inc word [0x2100]`
const COUNT: &[u8] = &[0xff, 0x06, 0x00, 0x21];
const IRET: &[u8] = &[0xcf];
/// `out 0x10, al`
const OUT: &[u8] = &[0xe6, 0x10];

/// Time that passes when somebody waits for it.
#[derive(Debug, Default)]
struct Manual(AtomicU64);

impl HostTime for Manual {
    fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
    fn wait(&self, deadline: u64, _: &VcpuHandle) {
        self.0.fetch_max(deadline, Ordering::SeqCst);
    }
}

/// Each wait is cut short after a millisecond by a signal for the vCPU.
#[derive(Debug, Default)]
struct Nagging(AtomicU64);

impl HostTime for Nagging {
    fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
    fn wait(&self, deadline: u64, vcpu: &VcpuHandle) {
        self.0.fetch_add((deadline - self.now()).min(1_000_000), Ordering::SeqCst);
        vcpu.interrupt();
    }
}

/// What the guest does about split locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// It has never heard of them.
    Off,
    /// Linux's handler for user code: it clears the bit, and the instruction is executed again.
    Warn,
    /// Linux's handler for kernel code, and fatal mode: the culprit does not go on.
    Fatal,
}

struct Machine {
    system: Arc<System>,
    guest: Guest,
    vcpu: Vcpu,
}

fn system(host: &str) -> Arc<System> {
    let host = HostParams::parse(host).unwrap();
    System::with_time(CpuModel::parse("max").unwrap(), host, Box::<Manual>::default())
}

/// A vCPU with the system's CPUID table at a program in real mode.
fn vcpu(guest: &Guest, id: u32) -> Vcpu {
    let mut vcpu = guest.vcpu(id);
    vcpu.set_cpuid2(&guest.vm.system().supported_cpuid()).unwrap();
    let regs = vcpu.regs();
    vcpu.set_regs(&kvm_regs { rsp: 0x8000, ..regs });
    vcpu
}

/// The system's CPUID table with IA32_CORE_CAPABILITIES, as a client makes it that pins its vCPUs.
fn with_core_capabilities(host: &System) -> Vec<kvm_cpuid_entry2> {
    let mut cpuid = host.supported_cpuid();
    cpuid
        .iter_mut()
        .filter(|leaf| leaf.function == 7 && leaf.index == 0)
        .for_each(|leaf| leaf.edx |= 1 << 30);
    cpuid
}

impl Machine {
    fn of(system: Arc<System>, program: &[&[u8]], handler: &[&[u8]]) -> Machine {
        let vm = system.create_vm().unwrap();
        Machine::on(vm, program, handler)
    }

    fn on(vm: Arc<Vm>, program: &[&[u8]], handler: &[&[u8]]) -> Machine {
        let guest = Guest::new(vm.clone(), &program.concat(), 0);
        assert!(vm.memory().write(17 * 4, &[HANDLER as u8, (HANDLER >> 8) as u8, 0, 0]));
        assert!(vm.memory().write(HANDLER, &handler.concat()));
        let vcpu = vcpu(&guest, 0);
        Machine { system: vm.system().clone(), guest, vcpu }
    }

    /// A guest in `mode` that makes one split lock.
    fn new(host: &str, mode: Mode) -> Machine {
        let program: &[&[u8]] = if mode == Mode::Off { &[SPLIT, HLT] } else { &[SET, SPLIT, HLT] };
        let handler: &[&[u8]] = match mode {
            Mode::Off => &[COUNT, HLT],
            Mode::Warn => &[COUNT, CLEAR, IRET],
            Mode::Fatal => &[COUNT, HLT],
        };
        Machine::of(system(host), program, handler)
    }

    fn policy(mut self, policy: Policy) -> Machine {
        self.set_policy(policy, false);
        self
    }

    fn set_policy(&mut self, policy: Policy, enforced: bool) {
        let bits = VmPolicy { policy, enforced }.bits();
        self.guest.vm.set_split_lock_policy(bits.into()).unwrap();
    }

    fn word(&self, address: u64) -> u16 {
        let mut word = [0; 2];
        assert!(self.guest.vm.memory().read(address, &mut word));
        u16::from_le_bytes(word)
    }

    /// How often the access has been made, and the guest's handler been called.
    fn counts(&self) -> (u16, u16) {
        (self.word(WORD), self.word(HANDLED))
    }

    /// Runs to HLT, or to what ends it.
    fn run(&mut self) -> Result<VcpuExit, i32> {
        self.vcpu.run().map_err(|error| error.errno())
    }

    /// The guest's bit.
    fn guest_bit(&mut self) -> bool {
        let mut entry = [kvm_msr_entry { index: TEST_CTRL, ..Default::default() }];
        self.vcpu.get_msrs(&mut entry) == 1 && entry[0].data & DETECT != 0
    }

    /// The processor's bit, while no vCPU runs.
    fn hardware_bit(&self) -> bool {
        self.system.processors().test_ctrl(self.guest.vm.place()).get() & DETECT != 0
    }

    fn stats(&self) -> [u64; 6] {
        let handle = self.vcpu.handle();
        let s = &handle.stats;
        [
            &s.split_locks_forwarded,
            &s.split_locks_warned,
            &s.split_locks_emulated,
            &s.split_locks_efault,
            &s.split_locks_exit,
            &s.split_locks_killed,
        ]
        .map(|counter| counter.load(Ordering::Relaxed))
    }

    /// Where the split lock is.
    fn split_rip(&self, mode: Mode) -> u64 {
        CODE + if mode == Mode::Off { 0 } else { SET.len() as u64 }
    }
}

const HALTED: Result<VcpuExit, i32> = Ok(VcpuExit::Hlt);

/// Rows where nothing is refused, or what the guest has asked for: a test for each policy, which makes no difference.
macro_rules! under_each_policy {
    ($($(#[$doc:meta])* $row:ident;)*) => {$(
        $(#[$doc])*
        mod $row {
            use super::{Policy, rows};

            #[test]
            fn efault() {
                rows::$row(Policy::Efault);
            }

            #[test]
            fn exit() {
                rows::$row(Policy::Exit);
            }

            #[test]
            fn kill() {
                rows::$row(Policy::Kill);
            }

            #[test]
            fn forward() {
                rows::$row(Policy::Forward);
            }

            #[test]
            fn emulate() {
                rows::$row(Policy::Emulate);
            }
        }
    )*};
}

under_each_policy! {
    /// As on a processor without detection, which is not offered.
    sl_r1_host_off;
    /// The guest may split-lock, after a pause of 10 ms.
    sl_r2_host_warn_guest_off;
    /// User code: one #AC for the guest, which then gets its way.
    sl_r3_host_warn_guest_warn_user;
    /// Kernel code: as on bare metal.
    sl_r3_host_warn_guest_warn_kernel;
    /// As on bare metal.
    sl_r4_host_warn_guest_fatal;
    /// Kernel code: as on bare metal.
    sl_r6_host_fatal_guest_warn_kernel;
    /// As on bare metal.
    sl_r7_host_fatal_guest_fatal;
}

/// What is shown in those rows.
mod rows {
    use super::*;

    pub(super) fn sl_r1_host_off(policy: Policy) {
        for host in ["split_lock_detect=off", "split_lock_detect=ratelimit:1000"] {
            let mut machine = Machine::new(host, Mode::Off).policy(policy);
            assert!(!machine.hardware_bit());
            assert_eq!(machine.run(), HALTED);
            assert_eq!((machine.counts(), machine.stats()), ((1, 0), [0; 6]), "{host}");
            let mut entry = [kvm_msr_entry { index: TEST_CTRL, data: DETECT, ..Default::default() }];
            assert_eq!(machine.vcpu.set_msrs(&entry), 0);
            entry[0].data = 0;
            let results = (machine.vcpu.set_msrs(&entry), machine.vcpu.get_msrs(&mut entry));
            assert_eq!(results, (1, 1), "as unknown");
            assert!(!machine.system.msr_index_list().contains(&TEST_CTRL));
            assert!(!machine.system.msr_feature_index_list().contains(&0xcf));
        }
    }

    pub(super) fn sl_r2_host_warn_guest_off(policy: Policy) {
        let mut machine = Machine::new("split_lock_detect=warn", Mode::Off).policy(policy);
        assert!(machine.hardware_bit());
        assert_eq!(machine.run(), HALTED);
        assert_eq!((machine.counts(), machine.stats()), ((1, 0), [0, 1, 0, 0, 0, 0]));
        assert_eq!(machine.vcpu.handle().stats.split_lock_throttle.load(Ordering::Relaxed), 10_000_000);
        assert!(machine.hardware_bit());
    }

    pub(super) fn sl_r3_host_warn_guest_warn_user(policy: Policy) {
        let mut machine = Machine::new("split_lock_detect=warn", Mode::Warn).policy(policy);
        assert_eq!(machine.run(), HALTED);
        assert_eq!((machine.counts(), machine.stats()), ((1, 1), [1, 1, 0, 0, 0, 0]));
        assert!(!machine.guest_bit());
        assert!(machine.hardware_bit());
    }

    /// What guests have asked for: #AC, and the access is not made. (Linux' kernel code, and its fatal mode.)
    fn as_on_bare_metal(host: &str, policy: Policy) {
        let mut machine = Machine::new(host, Mode::Fatal).policy(policy);
        assert_eq!(machine.run(), HALTED);
        assert_eq!((machine.counts(), machine.stats()), ((0, 1), [1, 0, 0, 0, 0, 0]));
        assert!(machine.guest_bit() && machine.hardware_bit());
    }

    pub(super) fn sl_r3_host_warn_guest_warn_kernel(policy: Policy) {
        as_on_bare_metal("split_lock_detect=warn", policy);
    }

    pub(super) fn sl_r4_host_warn_guest_fatal(policy: Policy) {
        as_on_bare_metal("split_lock_detect=warn kernel.split_lock_mitigate=0", policy);
    }

    pub(super) fn sl_r6_host_fatal_guest_warn_kernel(policy: Policy) {
        as_on_bare_metal(FATAL, policy);
    }

    pub(super) fn sl_r7_host_fatal_guest_fatal(policy: Policy) {
        as_on_bare_metal("split_lock_detect=fatal ring3.split_lock_policy=emulate", policy);
    }
}

/// SL-E2: the guest's access faults.
#[test]
fn sl_e2_host_off_the_register_is_not_there() {
    let mut machine = Machine::of(system("split_lock_detect=off"), &[SET, SPLIT, HLT], &[HLT]);
    // #GP goes to 0:0, where there are zeros up to the handler's HLT, and no split lock.
    assert!(machine.guest.vm.memory().write(13 * 4, &[0, 5, 0, 0]));
    assert!(machine.guest.vm.memory().write(0x500, HLT));
    assert_eq!(machine.run(), HALTED);
    assert_eq!((machine.counts(), machine.vcpu.regs().rip), ((0, 0), 0x501));
}

/// Row 2 without the pause: detection is off while the vCPU runs, and on again when it does not.
#[test]
fn sl_r2_host_warn_guest_off_without_mitigation() {
    // The split lock, then a loop, in which the other thread looks.
    let machine = Machine::of(
        system("split_lock_detect=warn kernel.split_lock_mitigate=0"),
        &[SPLIT, SPLIT, &[0xeb, 0xfe]],
        &[HLT],
    );
    let handle = machine.vcpu.handle();
    std::thread::scope(|scope| {
        let (mut vcpu, bit) = (machine.vcpu, machine.system.processors().test_ctrl(machine.guest.vm.place()));
        let running = scope.spawn(move || (vcpu.run().map_err(|error| error.errno()), vcpu));
        while bit.get() & DETECT != 0 {
            std::thread::yield_now();
        }
        handle.interrupt();
        let (result, _) = running.join().unwrap();
        assert_eq!(result, Err(libc::EINTR));
        assert_eq!(bit.get() & DETECT, DETECT);
    });
    let warned = handle.stats.split_locks_warned.load(Ordering::Relaxed);
    let waited = handle.stats.split_lock_throttle.load(Ordering::Relaxed);
    assert_eq!((warned, waited), (1, 0), "the second one was not detected");
}

/// The guest asks for detection after a split lock that switched it off: it has it at once.
#[test]
fn sl_r4_detection_begins_with_the_guests_write() {
    let host = system("split_lock_detect=warn kernel.split_lock_mitigate=0");
    let mut machine = Machine::of(host, &[SPLIT, SET, SPLIT, HLT], &[COUNT, HLT]);
    assert_eq!(machine.run(), HALTED);
    assert_eq!((machine.counts(), machine.stats()), ((1, 1), [1, 1, 0, 0, 0, 0]));
}

/// What row 5 and the second half of row 6 have in common: `seen` times the handler has run before.
fn refused(mut machine: Machine, policy: Policy, mode: Mode, seen: u16) {
    let rip = machine.split_rip(mode);
    let before = u64::from(seen);
    let result = machine.run();
    let at = |machine: &Machine| (machine.counts(), machine.vcpu.regs().rip);
    match policy {
        Policy::Efault => {
            assert_eq!(result, Err(libc::EFAULT));
            assert_eq!((at(&machine), machine.stats()), (((0, seen), rip), [before, 0, 0, 1, 0, 0]));
            assert_eq!(machine.run(), Err(libc::EFAULT), "every time");
        }
        Policy::Exit | Policy::Kill => {
            let Ok(VcpuExit::SplitLock(exit)) = result else { panic!("{result:?}") };
            let mut instruction = ([0; 15], SPLIT.len() as u8);
            instruction.0[..SPLIT.len()].copy_from_slice(SPLIT);
            let expected = SplitLockExit {
                policy,
                rip,
                linear_address: WORD,
                gpa: WORD,
                size: 2,
                cpl: 0,
                implicit: false,
                instruction,
            };
            let counted =
                if policy == Policy::Exit { [before, 0, 0, 0, 1, 0] } else { [before, 0, 0, 0, 0, 1] };
            assert_eq!((exit, at(&machine), machine.stats()), (expected, ((0, seen), rip), counted));
            // A client may change its mind.
            machine.set_policy(Policy::Emulate, false);
            assert_eq!((machine.run(), machine.counts()), (HALTED, (1, seen)));
        }
        Policy::Forward => {
            if mode == Mode::Warn {
                // Clearing the bit again does not help it: this guest is in an endless loop.
                assert_eq!(result, Err(libc::EINTR));
                return;
            }
            assert_eq!(result, HALTED);
            assert_eq!((machine.counts(), machine.stats()), ((0, 1), [1, 0, 0, 0, 0, 0]));
        }
        Policy::Emulate => {
            assert_eq!(result, HALTED);
            assert_eq!((machine.counts(), machine.stats()), ((1, seen), [before, 0, 1, 0, 0, 0]));
        }
    }
    assert!(machine.hardware_bit(), "in fatal mode detection is never off");
}

const FATAL: &str = "split_lock_detect=fatal";

#[test]
fn sl_r5_host_fatal_guest_off_efault() {
    refused(Machine::new(FATAL, Mode::Off), Policy::Efault, Mode::Off, 0);
}

#[test]
fn sl_r5_host_fatal_guest_off_exit() {
    refused(Machine::new(FATAL, Mode::Off).policy(Policy::Exit), Policy::Exit, Mode::Off, 0);
}

#[test]
fn sl_r5_host_fatal_guest_off_kill() {
    refused(Machine::new(FATAL, Mode::Off).policy(Policy::Kill), Policy::Kill, Mode::Off, 0);
}

#[test]
fn sl_r5_host_fatal_guest_off_forward() {
    refused(Machine::new(FATAL, Mode::Off).policy(Policy::Forward), Policy::Forward, Mode::Off, 0);
}

#[test]
fn sl_r5_host_fatal_guest_off_emulate() {
    refused(Machine::new(FATAL, Mode::Off).policy(Policy::Emulate), Policy::Emulate, Mode::Off, 0);
}

#[test]
fn sl_r5_the_policy_of_the_hosts_command_line() {
    let host = "split_lock_detect=fatal ring3.split_lock_policy=emulate";
    refused(Machine::new(host, Mode::Off), Policy::Emulate, Mode::Off, 0);
}

#[test]
fn sl_r6_host_fatal_guest_warn_user_efault() {
    refused(Machine::new(FATAL, Mode::Warn), Policy::Efault, Mode::Warn, 1);
}

#[test]
fn sl_r6_host_fatal_guest_warn_user_exit() {
    refused(Machine::new(FATAL, Mode::Warn).policy(Policy::Exit), Policy::Exit, Mode::Warn, 1);
}

#[test]
fn sl_r6_host_fatal_guest_warn_user_kill() {
    refused(Machine::new(FATAL, Mode::Warn).policy(Policy::Kill), Policy::Kill, Mode::Warn, 1);
}

/// The guest does not get on, but the client does.
#[test]
fn sl_r6_host_fatal_guest_warn_user_forward() {
    let machine = Machine::new(FATAL, Mode::Warn).policy(Policy::Forward);
    let handle = machine.vcpu.handle();
    std::thread::scope(|scope| {
        scope.spawn({
            let handle = handle.clone();
            move || {
                while handle.stats.split_locks_forwarded.load(Ordering::Relaxed) < 3 {
                    std::thread::yield_now();
                }
                handle.interrupt();
            }
        });
        refused(machine, Policy::Forward, Mode::Warn, 1);
    });
}

#[test]
fn sl_r6_host_fatal_guest_warn_user_emulate() {
    refused(Machine::new(FATAL, Mode::Warn).policy(Policy::Emulate), Policy::Emulate, Mode::Warn, 1);
}

/// A host in warn mode refuses for one VM what it lets others do.
#[test]
fn sl_r5_enforced_on_a_host_in_warn_mode() {
    let mut machine = Machine::new("split_lock_detect=warn", Mode::Off);
    machine.set_policy(Policy::Efault, true);
    assert_eq!(machine.run(), Err(libc::EFAULT));
    assert_eq!(machine.counts(), (0, 0));
    let other = machine.system.create_vm().unwrap();
    let mut other = Machine::on(other, &[SPLIT, HLT], &[HLT]);
    assert_eq!((other.run(), other.counts()), (HALTED, (1, 0)));
}

/// B14: threads of a core share the control, so without a declaration there is no detection for guests.
#[test]
fn sl_b14_smt_no_exposure_in_warn_mode() {
    let mut machine = Machine::of(system("smt=on"), &[SET, HLT], &[HLT]);
    assert!(machine.guest.vm.memory().write(13 * 4, &[0, 5, 0, 0]));
    assert!(machine.guest.vm.memory().write(0x500, HLT));
    assert_eq!((machine.run(), machine.vcpu.regs().rip), (HALTED, 0x501), "#GP");
    let enforce = VmPolicy { policy: Policy::Efault, enforced: true };
    assert!(machine.guest.vm.set_split_lock_policy(enforce.bits().into()).is_err());
}

/// B14: with pinned vCPUs it is there, at the scope that the hardware has: one vCPU that goes without detection takes it from
/// its core, and gives it back.
#[test]
fn sl_b14_smt_pinned_vcpus_share_their_core() {
    let host = system("smt=on kernel.split_lock_mitigate=0");
    let vm = host.create_vm().unwrap();
    vm.declare_pinned(1).unwrap();
    let mut machine = Machine::on(vm.clone(), &[SPLIT, &[0xeb, 0xfe]], &[COUNT, HLT]);
    // The other thread of the core has asked for detection.
    let mut second = vcpu(&machine.guest, 1);
    second.set_cpuid2(&with_core_capabilities(&host)).unwrap();
    assert!(vm.memory().write(0x3000, &[SET, SPLIT, HLT].concat()));
    let split_again = || kvm_regs { rip: 0x3000, rsp: 0x7000, rflags: 2, ..Default::default() };
    let bit = |id| host.processors().test_ctrl(vm.place() + id);
    let handle = machine.vcpu.handle();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| machine.run());
        while bit(0).get() & DETECT != 0 {
            std::thread::yield_now();
        }
        assert_eq!((bit(1).get() & DETECT, bit(2).get() & DETECT), (0, DETECT), "the core and no other");
        second.set_regs(&split_again());
        assert_eq!(second.run().unwrap(), VcpuExit::Hlt);
        assert_eq!(second.regs().rip, 0x3000 + (SET.len() + SPLIT.len()) as u64 + 1, "not detected");
        handle.interrupt();
        assert_eq!(first.join().unwrap(), Err(libc::EINTR));
    });
    assert_eq!(bit(1).get() & DETECT, DETECT);
    second.set_regs(&split_again());
    assert_eq!(second.run().unwrap(), VcpuExit::Hlt);
    assert_eq!(machine.counts(), (2, 1), "detected now");
}

/// Where each thread has a control of its own, SMT is no reason.
#[test]
fn sl_e1_a_control_per_thread_is_offered_with_smt() {
    let model = CpuModel::parse("max,test-ctrl=thread").unwrap();
    let host = HostParams::parse("smt=on").unwrap();
    let system = System::with_time(model, host, Box::<Manual>::default());
    let mut machine = Machine::of(system, &[SET, SPLIT, HLT], &[COUNT, HLT]);
    assert_eq!((machine.run(), machine.counts()), (HALTED, (0, 1)));
}

/// B15: no acknowledgement; acknowledged; acknowledged and taken back.
#[test]
fn sl_b15_forced_on_handshake() {
    let leaf = system(FATAL).supported_cpuid().iter().find(|e| e.function == 0x4000_0101).copied().unwrap();
    assert_eq!(
        (leaf.eax, leaf.ebx & own::SPLIT_LOCK_FORCED_ON),
        (own::VERSION, own::SPLIT_LOCK_FORCED_ON),
        "SL-H1"
    );
    let run = |program: &[&[u8]]| {
        let mut machine = Machine::of(system(FATAL), program, &[COUNT, HLT]);
        let result = machine.run();
        assert!(machine.hardware_bit(), "SL-H2: the guest's write does not reach the hardware");
        (result, machine.counts())
    };
    assert_eq!(run(&[SPLIT, HLT]), (Err(libc::EFAULT), (0, 0)), "SL-H4");
    assert_eq!(run(&[SET, SPLIT, HLT]), (HALTED, (0, 1)), "SL-H3");
    assert_eq!(run(&[SET, CLEAR, SPLIT, HLT]), (Err(libc::EFAULT), (0, 0)), "taken back");
}

/// The acknowledgement is MSR_TEST_CTRL and nothing else, so it moves with the registers that clients save.
#[test]
fn sl_b15_the_handshake_migrates() {
    let mut from = Machine::of(system(FATAL), &[SET, OUT, SPLIT, HLT], &[COUNT, HLT]);
    assert!(matches!(from.run(), Ok(VcpuExit::Io { .. })));
    from.vcpu.complete(0);
    let immediate = RunRequest { immediate_exit: true, ..RunRequest::default() };
    assert!(matches!(from.vcpu.run_request(immediate), Err(Error::Interrupted)));
    let list = from.system.msr_index_list();
    assert!(list.contains(&TEST_CTRL) && list.contains(&0xcf));
    let mut saved: Vec<_> = list.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    assert_eq!(from.vcpu.get_msrs(&mut saved), saved.len());
    let mut to = Machine::of(system(FATAL), &[SET, OUT, SPLIT, HLT], &[COUNT, HLT]);
    to.vcpu.set_regs(&from.vcpu.regs());
    assert_eq!(to.vcpu.set_msrs(&saved), saved.len());
    assert!(to.guest_bit());
    assert_eq!((to.run(), to.counts()), (HALTED, (0, 1)));
}

/// B16: nothing is lost when vCPUs make the same split lock at once.
#[test]
fn sl_b16_emulated_split_locks_are_atomic() {
    const ROUNDS: u32 = if cfg!(debug_assertions) { 20_000 } else { 1_000_000 };
    // Increments a doubleword across lines ECX times.
    let program: &[u8] = &[0xf0, 0x66, 0xff, 0x06, 0x3e, 0x20, 0x66, 0x49, 0x75, 0xf6, 0xf4];
    let mut machine = Machine::of(system(FATAL), &[program], &[HLT]);
    machine.set_policy(Policy::Emulate, false);
    let second = vcpu(&machine.guest, 1);
    let emulated = std::thread::scope(|scope| {
        let run = |mut vcpu: Vcpu| {
            let regs = vcpu.regs();
            vcpu.set_regs(&kvm_regs { rcx: ROUNDS.into(), ..regs });
            assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
            vcpu.handle().stats.split_locks_emulated.load(Ordering::Relaxed)
        };
        let threads = [machine.vcpu, second].map(|vcpu| scope.spawn(move || run(vcpu)));
        threads.map(|thread| thread.join().unwrap())
    });
    let mut sum = [0; 4];
    assert!(machine.guest.vm.memory().read(0x203e, &mut sum));
    assert_eq!((u32::from_le_bytes(sum), emulated), (2 * ROUNDS, [ROUNDS.into(); 2]));
}

/// B17 (G3): signals that come more often than the pause is long do not keep the instruction from completing.
#[test]
fn sl_b17_a_vcpu_that_is_signalled_all_the_time_gets_on() {
    let system = System::with_time(CpuModel::default(), HostParams::default(), Box::<Nagging>::default());
    let mut machine = Machine::of(system, &[SPLIT, SPLIT, HLT], &[HLT]);
    let handle = machine.vcpu.handle();
    let mut interrupted = 0;
    let result = loop {
        match machine.run() {
            Err(libc::EINTR) => {
                interrupted += 1;
                assert!(interrupted <= 20, "it has waited 10 ms for each");
                handle.settle();
            }
            result => break result,
        }
    };
    assert_eq!((result, machine.counts(), interrupted), (HALTED, (2, 0), 20));
    assert_eq!(handle.stats.split_lock_throttle.load(Ordering::Relaxed), 20_000_000);
}

/// G4: each vCPU makes its own pause; nobody waits for another one's.
#[test]
fn sl_g4_pauses_are_no_queue() {
    let host = system("split_lock_detect=warn");
    let machines: Vec<_> = (0..8).map(|_| Machine::of(host.clone(), &[SPLIT, HLT], &[HLT])).collect();
    for mut machine in machines {
        assert_eq!(machine.run(), HALTED);
        assert_eq!(machine.vcpu.handle().stats.split_lock_throttle.load(Ordering::Relaxed), 10_000_000);
    }
}

/// The sysctl counts from the next split lock on.
#[test]
fn sl_g4_the_sysctl_is_live() {
    let mut machine = Machine::of(system(""), &[SPLIT, OUT, SPLIT, OUT, SPLIT, HLT], &[HLT]);
    let waited = |machine: &Machine| machine.vcpu.handle().stats.split_lock_throttle.load(Ordering::Relaxed);
    assert!(matches!(machine.run(), Ok(VcpuExit::Io { .. })));
    assert_eq!(waited(&machine), 10_000_000);
    machine.system.set_split_lock_mitigate(false);
    assert!(matches!(machine.run(), Ok(VcpuExit::Io { .. })));
    assert_eq!(waited(&machine), 10_000_000);
    machine.system.set_split_lock_mitigate(true);
    assert_eq!((machine.run(), waited(&machine)), (HALTED, 20_000_000));
}

/// G7: the rate limit of the host holds for guests.
#[test]
fn sl_g7_ratelimit_holds_guests_back() {
    let mut machine = Machine::of(
        system("split_lock_detect=ratelimit:2"),
        &[SPLIT, SPLIT, SPLIT, SPLIT, SPLIT, SPLIT, SPLIT, SPLIT, SPLIT, HLT],
        &[HLT],
    );
    assert_eq!(machine.run(), HALTED);
    let handle = machine.vcpu.handle();
    let counters = [&handle.stats.bus_locks, &handle.stats.split_lock_throttle];
    let [locks, waited] = counters.map(|counter| counter.load(Ordering::Relaxed));
    assert_eq!((machine.counts(), locks), ((9, 0), 9));
    assert_eq!(waited, 4_000_000_000, "two in each second, the ninth in the fifth");
}

/// A vCPU that the rate limit holds back can be called out, and does not run before its time.
#[test]
fn sl_g7_a_vcpu_held_back_can_be_interrupted() {
    let host = HostParams::parse("split_lock_detect=ratelimit:1").unwrap();
    let system = System::with_time(CpuModel::default(), host, Box::<Nagging>::default());
    let mut machine = Machine::of(system, &[SPLIT, SPLIT, OUT, HLT], &[HLT]);
    let handle = machine.vcpu.handle();
    let mut interrupted = 0;
    while machine.run() == Err(libc::EINTR) {
        assert_eq!(machine.counts(), (2, 0));
        interrupted += 1;
        handle.settle();
    }
    assert_eq!(interrupted, 1000, "a second");
}

/// B11: one exit for each, behind the instruction.
#[test]
fn sl_b11_bus_lock_exits() {
    // Split 100 times; HLT.
    let mut machine =
        Machine::of(system("split_lock_detect=off"), &[&[0xb9, 100, 0], SPLIT, &[0xe2, 0xf9], HLT], &[HLT]);
    machine.guest.vm.set_bus_lock_exit(2).unwrap();
    for count in 1..=100 {
        assert_eq!(machine.run(), Ok(VcpuExit::BusLock));
        assert_eq!((machine.counts(), machine.vcpu.regs().rip), ((count, 0), CODE + 3 + SPLIT.len() as u64));
        assert!(machine.vcpu.run_state().bus_lock);
    }
    assert_eq!(machine.run(), HALTED);
    assert!(!machine.vcpu.run_state().bus_lock);
    // Off again, from the next entry on.
    machine.guest.vm.set_bus_lock_exit(1).unwrap();
    machine.vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() });
    assert_eq!(machine.run(), HALTED);
    assert!(!machine.vcpu.run_state().bus_lock);
}

/// Detection and exits: what is forwarded is no bus lock, what is let through or emulated is one.
#[test]
fn sl_b11_only_what_is_executed_is_a_bus_lock() {
    let mut forwarded = Machine::new(FATAL, Mode::Fatal);
    forwarded.guest.vm.set_bus_lock_exit(2).unwrap();
    assert_eq!(forwarded.run(), HALTED);
    for (host, policy) in [("split_lock_detect=warn", Policy::Efault), (FATAL, Policy::Emulate)] {
        let mut machine = Machine::new(host, Mode::Off).policy(policy);
        machine.guest.vm.set_bus_lock_exit(2).unwrap();
        assert_eq!((machine.run(), machine.counts()), (Ok(VcpuExit::BusLock), (1, 0)), "{host}");
        assert_eq!(machine.run(), HALTED);
    }
}

/// G10: a locked access to a device takes the bus, and is seen to.
#[test]
fn sl_b12_locks_on_devices_are_bus_locks() {
    // lock inc word [0x10], where there is no memory.
    let mut machine =
        Machine::of(system("split_lock_detect=off"), &[&[0xf0, 0xff, 0x06, 0x10, 0], HLT], &[HLT]);
    machine.guest.vm.set_bus_lock_exit(2).unwrap();
    let mut sregs = machine.vcpu.sregs();
    sregs.ds.base = 0x20_0000;
    machine.vcpu.set_sregs(&sregs).unwrap();
    let mut value = 41;
    let mut locks = 0;
    loop {
        match machine.run().unwrap() {
            VcpuExit::Mmio { gpa: 0x20_0010, size: 2, write: None } => machine.vcpu.complete(value),
            VcpuExit::Mmio { gpa: 0x20_0010, size: 2, write: Some(new) } => {
                value = new;
                machine.vcpu.complete(0);
            }
            VcpuExit::BusLock => locks += 1,
            exit => break assert_eq!(exit, VcpuExit::Hlt),
        }
    }
    assert_eq!((value, locks), (42, 1));
}

/// G11: locks on memory that is not write-back fault where the guest has asked for it.
#[test]
fn sl_g11_uc_lock_disable() {
    // mov eax, cr0; or eax, 1 << 30; mov cr0, eax: no caching. MSR_TEST_CTRL := 1 << 28; lock inc word [0x2080]; hlt
    let program: &[u8] = &[
        0x0f, 0x20, 0xc0, 0x66, 0x0d, 0, 0, 0, 0x40, 0x0f, 0x22, 0xc0, 0x66, 0xb9, 0x33, 0, 0, 0, 0x66, 0x31,
        0xd2, 0x66, 0xb8, 0, 0, 0, 0x10, 0x0f, 0x30, 0xf0, 0xff, 0x06, 0x80, 0x20, 0xf4,
    ];
    let mut machine = Machine::of(system(""), &[program], &[COUNT, HLT]);
    assert_eq!(machine.run(), HALTED);
    assert_eq!((machine.word(0x2080), machine.word(HANDLED)), (0, 1));
    assert_eq!(machine.vcpu.handle().stats.uc_locks.load(Ordering::Relaxed), 1);
    let bit = machine.system.processors().test_ctrl(machine.guest.vm.place()).get();
    assert_eq!(bit, DETECT, "the host's setting once the vCPU is put");
}

/// G11: emulation of a split lock once made it on memory where the guest has asked for UC locks to fault.
#[test]
fn sl_g11_an_emulated_split_lock_is_still_refused_as_a_uc_lock() {
    // As above, with lock inc word [0x203f].
    let program: &[u8] = &[
        0x0f, 0x20, 0xc0, 0x66, 0x0d, 0, 0, 0, 0x40, 0x0f, 0x22, 0xc0, 0x66, 0xb9, 0x33, 0, 0, 0, 0x66, 0x31,
        0xd2, 0x66, 0xb8, 0, 0, 0, 0x10, 0x0f, 0x30, 0xf0, 0xff, 0x06, 0x3f, 0x20, 0xf4,
    ];
    let mut machine = Machine::of(system(FATAL), &[program], &[COUNT, HLT]).policy(Policy::Emulate);
    assert_eq!(machine.run(), HALTED);
    assert_eq!((machine.word(WORD), machine.word(HANDLED)), (0, 1));
    assert_eq!(machine.vcpu.handle().stats.uc_locks.load(Ordering::Relaxed), 1);
    assert_eq!(machine.stats(), [0; 6], "and so it is not counted as emulated");
}

/// G11, B14: a vCPU that wants UC locks to fault does not do it to the other thread of its core, whichever exception it is.
#[test]
fn sl_g11_uc_lock_disable_of_the_cores_other_thread() {
    // MSR_TEST_CTRL := 1 << 28, then a loop.
    let disable: &[u8] =
        &[0x66, 0xb9, 0x33, 0, 0, 0, 0x66, 0x31, 0xd2, 0x66, 0xb8, 0, 0, 0, 0x10, 0x0f, 0x30, 0xeb, 0xfe];
    const DISABLED: u64 = 1 << 28;
    for model in ["max", "sapphire-rapids"] {
        let host = HostParams::parse("smt=on split_lock_detect=warn").unwrap();
        let host = System::with_time(CpuModel::parse(model).unwrap(), host, Box::<Manual>::default());
        let vm = host.create_vm().unwrap();
        vm.declare_pinned(1).unwrap();
        let mut machine = Machine::on(vm.clone(), &[disable], &[COUNT, HLT]);
        machine.vcpu.set_cpuid2(&with_core_capabilities(&host)).unwrap();
        // lock inc word [0x10], where there is no memory.
        assert!(vm.memory().write(0x3000, &[0xf0, 0xff, 0x06, 0x10, 0, 0xf4]));
        let mut second = vcpu(&machine.guest, 1);
        let mut sregs = second.sregs();
        sregs.ds.base = 0x20_0000;
        second.set_sregs(&sregs).unwrap();
        second.set_regs(&kvm_regs { rip: 0x3000, rsp: 0x7000, rflags: 2, ..Default::default() });
        let bit = host.processors().test_ctrl(vm.place() + 1);
        let handle = machine.vcpu.handle();
        std::thread::scope(|scope| {
            let first = scope.spawn(|| machine.run());
            while bit.get() & DISABLED == 0 {
                std::thread::yield_now();
            }
            let read = VcpuExit::Mmio { gpa: 0x20_0010, size: 2, write: None };
            assert_eq!(second.run().unwrap(), read, "{model}");
            second.complete(41);
            let write = VcpuExit::Mmio { gpa: 0x20_0010, size: 2, write: Some(42) };
            assert_eq!(second.run().unwrap(), write, "{model}");
            second.complete(0);
            assert_eq!(second.run().unwrap(), VcpuExit::Hlt);
            handle.interrupt();
            assert_eq!(first.join().unwrap(), Err(libc::EINTR));
        });
        assert_eq!((second.regs().rip, bit.get()), (0x3006, DETECT), "{model}: the host's setting again");
    }
}
