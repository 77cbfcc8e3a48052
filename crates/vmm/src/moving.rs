//! Saving and restoring virtual CPUs while their machine runs, as a migration does with each: for tests that nothing of a guest's
//! state is left behind. Memory, interrupt controllers and clocks stay; what a vCPU's registers hold is read, overwritten, and set
//! again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hypervisor::{Error, Vcpu, VcpuHandle};
use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_xcrs};

/// Registers that time writes: IA32_TSC, IA32_TSC_ADJUST, IA32_TSC_DEADLINE. It goes on meanwhile.
const CLOCKS: [u32; 3] = [0x10, 0x3b, 0x6e0];
/// How often somebody looks whether the machine has ended.
const TICK: Duration = Duration::from_millis(20);

/// When the virtual CPUs of a machine are to be moved.
#[derive(Debug, Default)]
pub(crate) struct Mover {
    /// Counts the times.
    due: AtomicU64,
    /// vCPUs that have been moved.
    pub(crate) moves: AtomicU64,
}

impl Mover {
    /// Has all `cpus` moved once in each interval, until `ended`.
    pub(crate) fn run(&self, every: Duration, cpus: &[Arc<VcpuHandle>], ended: impl Fn() -> bool) {
        let mut last = Instant::now();
        while !ended() {
            std::thread::sleep(TICK.min(every));
            if last.elapsed() >= every {
                last = Instant::now();
                self.due.fetch_add(1, Ordering::SeqCst);
                cpus.iter().for_each(|cpu| cpu.interrupt());
            }
        }
    }

    /// Moves `vcpu` if that is due; `moved` is the last time that it was.
    pub(crate) fn attend(&self, vcpu: &mut Vcpu, moved: &mut u64) -> Result<(), Error> {
        let due = self.due.load(Ordering::SeqCst);
        if due == *moved || vcpu.awaits_init() {
            return Ok(());
        }
        *moved = due;
        move_state(vcpu)?;
        self.moves.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Reads the state of a vCPU, overwrites what it can, and sets it again, in QEMU's order.
fn move_state(vcpu: &mut Vcpu) -> Result<(), Error> {
    let indices = vcpu.vm().system().msr_index_list();
    let entry = |index| kvm_msr_entry { index, ..kvm_msr_entry::default() };
    let mut msrs: Vec<_> = indices.into_iter().filter(|i| !CLOCKS.contains(i)).map(entry).collect();
    msrs.retain_mut(|msr| vcpu.get_msrs(std::slice::from_mut(msr)) == 1);
    let events = vcpu.vcpu_events();
    let (regs, sregs, debugregs) = (vcpu.regs(), vcpu.sregs(), vcpu.debugregs());
    let (xcrs, xsave) = (vcpu.xcrs(), vcpu.xsave2());

    let mut reset = kvm_xcrs { nr_xcrs: xcrs.nr_xcrs, ..kvm_xcrs::default() };
    reset.xcrs[0].value = 1;
    vcpu.set_regs(&kvm_regs { rflags: 2, ..kvm_regs::default() });
    vcpu.set_xsave(&vec![0; xsave.len()])?;
    vcpu.set_xcrs(&reset)?;

    vcpu.set_sregs(&sregs)?;
    vcpu.set_xcrs(&xcrs)?;
    if vcpu.set_msrs(&msrs) != msrs.len() {
        return Err(Error::Invalid("an MSR cannot be set to what it was"));
    }
    vcpu.set_xsave(&xsave)?;
    vcpu.set_regs(&regs);
    vcpu.set_debugregs(&debugregs)?;
    vcpu.set_vcpu_events(&events)
}
