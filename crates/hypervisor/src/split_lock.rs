//! Split locks of guests: whether the guest is offered detection, and what becomes of an access that the processor has
//! refused. Pure functions and their tables; what acts on them is [`vcpu`](crate::vcpu) and [`processors`](crate::processors).
//!
//! The requirements are those of the thread "KVM: VMX: Extend VMX's #AC handding" (linux-kernel, 2020-02-01), whose table of
//! seven rows is in docs/features/split-lock.md. The host kernel's side is arch/x86/kernel/cpu/intel.c.

use std::sync::{Mutex, PoisonError};

use silicon::bus_lock::{LockKind, core_capabilities, test_ctrl};
use silicon::model::msrs::Scope;
use silicon::model::{CpuModel, Feature};

use crate::error::Error;
use crate::host::{HostParams, SplitLockDetect};

/// How long a split lock waits on a host in warn mode, in nanoseconds (kernel: "misery factor #1" of `split_lock_warn`).
pub const PAUSE_NS: u64 = 10_000_000;

/// What becomes of a split lock that must not be executed, of a guest that has not asked for detection (rows 5 and 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
pub enum Policy {
    /// KVM_RUN fails with EFAULT. The access has not been made and RIP is at the instruction, as with all of them.
    #[default]
    Efault,
    /// KVM_RUN returns with an exit of ring3's own, which says which access it was.
    Exit,
    /// SIGBUS (BUS_ADRALN) for the thread, and KVM_EXIT_EXCEPTION with vector 17: what the kernel does.
    Kill,
    /// #AC(0) for the guest, which does not expect it.
    Forward,
    /// The access is made after all, while the other vCPUs of the VM stand still.
    Emulate,
}

impl Policy {
    /// All of them, by their bit in the argument of KVM_ENABLE_CAP.
    pub const ALL: [Policy; 5] =
        [Policy::Efault, Policy::Exit, Policy::Kill, Policy::Forward, Policy::Emulate];

    /// The name that the host's command line has for it.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Efault => "efault",
            Policy::Exit => "exit",
            Policy::Kill => "kill",
            Policy::Forward => "forward",
            Policy::Emulate => "emulate",
        }
    }

    /// The policy of this name.
    pub fn parse(name: &str) -> Option<Policy> {
        Policy::ALL.into_iter().find(|policy| policy.name() == name)
    }

    /// Its bit in the argument of RING3_CAP_SPLIT_LOCK_POLICY.
    pub fn bit(self) -> u32 {
        1 << self as u32
    }
}

/// What a VM's split locks are subject to (RING3_CAP_SPLIT_LOCK_POLICY).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct VmPolicy {
    /// What becomes of those that must not be executed.
    pub policy: Policy,
    /// On a host in warn mode too none is executed, as if it were in fatal mode.
    pub enforced: bool,
}

impl VmPolicy {
    /// The bit of [`VmPolicy::enforced`] in the capability's argument.
    pub const ENFORCE: u32 = 1 << 8;
    /// Every bit of it.
    pub const BITS: u32 = 0x1f | VmPolicy::ENFORCE;

    /// The capability's argument: one policy, and [`VmPolicy::ENFORCE`]. EINVAL for anything else.
    pub fn from_bits(bits: u64) -> Result<VmPolicy, Error> {
        let enforced = bits & u64::from(VmPolicy::ENFORCE) != 0;
        let rest = bits & !u64::from(VmPolicy::ENFORCE);
        let policy = Policy::ALL.into_iter().find(|policy| u64::from(policy.bit()) == rest);
        let policy = policy.ok_or(Error::Invalid("not one policy for split locks"))?;
        Ok(VmPolicy { policy, enforced })
    }

    /// The argument that sets it.
    pub fn bits(self) -> u32 {
        self.policy.bit() | if self.enforced { VmPolicy::ENFORCE } else { 0 }
    }
}

/// Everything that decides what becomes of a refused access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Situation {
    /// The host kernel's mode.
    pub host: SplitLockDetect,
    /// The guest's own MSR_TEST_CTRL.
    pub test_ctrl: u64,
    /// The VM's policy.
    pub vm: VmPolicy,
}

/// What becomes of a refused access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The guest gets the exception, which it has asked for.
    Forward,
    /// The access is made after a pause: the host warns.
    Warn,
    /// The access is made: nobody had anything against it, but another thread of the core.
    Execute,
    /// The access must not be made, and the guest has not asked for the exception.
    Refuse(Policy),
}

/// Decides what becomes of a refused access (rows 1 to 7).
pub fn decide(refused: LockKind, at: &Situation) -> Action {
    match refused {
        // It hits guests that have set the bit, and whoever shares a core with one.
        LockKind::Uncached if at.test_ctrl & test_ctrl::UC_LOCK_DISABLE != 0 => Action::Forward,
        LockKind::Uncached => Action::Execute,
        // Who has set the bit knows what #AC means, in whatever mode the host is.
        LockKind::Split if at.test_ctrl & test_ctrl::SPLIT_LOCK_DETECT != 0 => Action::Forward,
        LockKind::Split => match at.host {
            SplitLockDetect::Off | SplitLockDetect::RateLimit(_) => Action::Execute,
            SplitLockDetect::Warn if !at.vm.enforced => Action::Warn,
            SplitLockDetect::Warn | SplitLockDetect::Fatal => Action::Refuse(at.vm.policy),
        },
    }
}

/// Whether guests are offered split-lock detection: it must work as it does without a hypervisor. In fatal mode the control
/// never changes. In warn mode it does, so where threads share it (`shared`) a guest may have it only if no other guest
/// is on the other thread: the client has declared that its vCPUs are pinned.
pub fn exposed(host: SplitLockDetect, shared: bool, pinned: bool) -> bool {
    match host {
        SplitLockDetect::Off | SplitLockDetect::RateLimit(_) => false,
        SplitLockDetect::Fatal => true,
        SplitLockDetect::Warn => !shared || pinned,
    }
}

/// Whether threads share MSR_TEST_CTRL.
pub fn shared(model: &CpuModel, host: &HostParams) -> bool {
    host.smt && model.test_ctrl_scope() == Scope::Core
}

/// IA32_CORE_CAPABILITIES as guests may have it at best. UC-lock disable is the guest's to switch in every mode of the host,
/// so where threads share it only a guest whose vCPUs are pinned has it.
pub fn capabilities(model: &CpuModel, host: &HostParams, pinned: bool) -> u64 {
    let shared = shared(model, host);
    if !model.has(Feature::CoreCapability) || !exposed(host.split_lock_detect, shared, pinned) {
        return 0;
    }
    let uc = if shared && !pinned { 0 } else { core_capabilities::UC_LOCK_DISABLE };
    core_capabilities::SPLIT_LOCK_DETECT | uc
}

/// Whether the guest is to be told that detection is on whatever it writes to MSR_TEST_CTRL.
pub fn forced_on(host: SplitLockDetect, enforced: bool) -> bool {
    match host {
        SplitLockDetect::Fatal => true,
        SplitLockDetect::Warn => enforced,
        SplitLockDetect::Off | SplitLockDetect::RateLimit(_) => false,
    }
}

/// What the host kernel has in MSR_TEST_CTRL of every core.
pub fn host_test_ctrl(host: SplitLockDetect) -> u64 {
    match host {
        SplitLockDetect::Warn | SplitLockDetect::Fatal => test_ctrl::SPLIT_LOCK_DETECT,
        SplitLockDetect::Off | SplitLockDetect::RateLimit(_) => 0,
    }
}

/// Bits of MSR_TEST_CTRL that a guest with this IA32_CORE_CAPABILITIES can write.
pub fn test_ctrl_bits(capabilities: u64) -> u64 {
    let bit = |capability, bit| if capabilities & capability != 0 { bit } else { 0 };
    bit(core_capabilities::SPLIT_LOCK_DETECT, test_ctrl::SPLIT_LOCK_DETECT)
        | bit(core_capabilities::UC_LOCK_DISABLE, test_ctrl::UC_LOCK_DISABLE)
}

/// So many events in every second (kernel: `___ratelimit` in lib/ratelimit.c).
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    interval: u64,
    /// When the interval began, and how many events it has had.
    current: Mutex<Option<(u64, u32)>>,
}

impl RateLimit {
    /// `burst` events in each `interval` of nanoseconds.
    pub fn new(burst: u32, interval: u64) -> RateLimit {
        RateLimit { burst, interval, current: Mutex::default() }
    }

    /// An event at `now`, in nanoseconds. `Err`: when the next may come.
    pub fn take(&self, now: u64) -> Result<(), u64> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let (begin, used) = match *current {
            Some((begin, used)) if now < begin.saturating_add(self.interval) => (begin, used),
            _ => (now, 0),
        };
        if used >= self.burst {
            return Err(begin.saturating_add(self.interval));
        }
        *current = Some((begin, used + 1));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use SplitLockDetect::{Fatal, Off, RateLimit as Rate, Warn};

    const HOSTS: [SplitLockDetect; 4] = [Off, Warn, Fatal, Rate(5)];

    fn at(host: SplitLockDetect, test_ctrl: u64, policy: Policy, enforced: bool) -> Situation {
        Situation { host, test_ctrl, vm: VmPolicy { policy, enforced } }
    }

    /// Every host mode, guest bit, policy and enforcement.
    #[test]
    fn the_whole_table_of_split_locks() {
        for policy in Policy::ALL {
            let refuse = Action::Refuse(policy);
            // Host; what becomes of it: guest bit set; clear; clear and enforced.
            for (host, set, clear, enforced) in [
                (Off, Action::Forward, Action::Execute, Action::Execute),
                (Rate(1), Action::Forward, Action::Execute, Action::Execute),
                (Warn, Action::Forward, Action::Warn, refuse),
                (Fatal, Action::Forward, refuse, refuse),
            ] {
                let got = |bit, force| decide(LockKind::Split, &at(host, bit, policy, force));
                let bit = test_ctrl::SPLIT_LOCK_DETECT;
                let actions = [got(bit, false), got(bit, true), got(0, false), got(0, true)];
                assert_eq!(actions, [set, set, clear, enforced], "{host:?} {policy:?}");
                assert_eq!(got(test_ctrl::UC_LOCK_DISABLE, false), clear, "the other bit is another matter");
            }
        }
    }

    #[test]
    fn uc_locks_are_the_guests_own_affair() {
        for host in HOSTS {
            for policy in Policy::ALL {
                let got = |bits| decide(LockKind::Uncached, &at(host, bits, policy, true));
                assert_eq!(got(test_ctrl::UC_LOCK_DISABLE), Action::Forward);
                assert_eq!(got(test_ctrl::SPLIT_LOCK_DETECT), Action::Execute);
            }
        }
    }

    /// SL-E1, SL-E2.
    #[test]
    fn sl_e1_exposure_by_mode_smt_and_pinning() {
        for (host, smt, pinned, expected) in [
            (Off, false, true, false),
            (Rate(9), false, true, false),
            (Warn, false, false, true),
            (Warn, true, false, false),
            (Warn, true, true, true),
            (Fatal, true, false, true),
            (Fatal, false, false, true),
        ] {
            assert_eq!(exposed(host, smt, pinned), expected, "{host:?} smt {smt} pinned {pinned}");
        }
    }

    #[test]
    fn capabilities_need_a_processor_that_has_them() {
        let of = |model, host, pinned| {
            capabilities(&CpuModel::parse(model).unwrap(), &HostParams::parse(host).unwrap(), pinned)
        };
        for (model, host, pinned, expected) in [
            ("max", "", false, 0x30),
            ("max,-core_capability", "", false, 0),
            ("max", "smt=on", false, 0),
            ("max,test-ctrl=thread", "smt=on", false, 0x30),
            ("max", "smt=on", true, 0x30),
            ("max", "smt=on split_lock_detect=fatal", false, 0x20),
            ("max", "split_lock_detect=off", true, 0),
        ] {
            assert_eq!(of(model, host, pinned), expected, "{model} {host} {pinned}");
        }
    }

    /// SL-H1.
    #[test]
    fn sl_h1_detection_is_forced_on_where_the_access_never_executes() {
        for host in HOSTS {
            for enforced in [false, true] {
                let never = matches!(
                    decide(LockKind::Split, &at(host, 0, Policy::Efault, enforced)),
                    Action::Refuse(_)
                );
                assert_eq!(forced_on(host, enforced), never, "{host:?} {enforced}");
            }
        }
    }

    #[test]
    fn the_hardware_detects_in_warn_and_fatal_mode() {
        assert_eq!(HOSTS.map(|host| host_test_ctrl(host) >> 29), [0, 1, 1, 0]);
    }

    #[test]
    fn arguments_of_the_capability() {
        for policy in Policy::ALL {
            for enforced in [false, true] {
                let vm = VmPolicy { policy, enforced };
                assert_eq!(VmPolicy::from_bits(vm.bits().into()).unwrap(), vm);
                assert_eq!(vm.bits() & !VmPolicy::BITS, 0);
            }
            assert_eq!(Policy::parse(policy.name()), Some(policy));
        }
        for wrong in [0, 3, 0x20, 0x100, 0x201, 1 << 32 | 1, u64::MAX] {
            assert_eq!(VmPolicy::from_bits(wrong).unwrap_err().errno(), libc::EINVAL, "{wrong:#x}");
        }
    }

    #[test]
    fn writable_bits_follow_the_enumeration() {
        let (split, uc) = (test_ctrl::SPLIT_LOCK_DETECT, test_ctrl::UC_LOCK_DISABLE);
        for (capabilities, bits) in [(0, 0), (1 << 5, split), (1 << 4, uc), (1 << 4 | 1 << 5, split | uc)] {
            assert_eq!(test_ctrl_bits(capabilities), bits, "{capabilities:#x}");
        }
    }

    #[test]
    fn a_rate_limit_opens_again_after_its_interval() {
        let limit = RateLimit::new(2, 1000);
        assert_eq!([limit.take(500), limit.take(600), limit.take(700)], [Ok(()), Ok(()), Err(1500)]);
        assert_eq!(limit.take(1499), Err(1500));
        assert_eq!([limit.take(1500), limit.take(1500), limit.take(1500)], [Ok(()), Ok(()), Err(2500)]);
        assert_eq!(limit.take(1 << 40), Ok(()));
    }
}
