//! HLT with in-kernel interrupt controllers.

mod guest;

use std::sync::atomic::Ordering;
use std::thread;

use guest::{Guest, system};
use hypervisor::VcpuExit;

/// hlt; out 0x10, al
const PROGRAM: &[u8] = &[0xf4, 0xe6, 0x10];

/// Runs a halted vCPU until an NMI of its local APIC's wakes it; whether that was during polling.
fn wake(poll: u64) -> bool {
    let vm = system().create_vm().unwrap();
    vm.create_irqchip().unwrap();
    vm.set_halt_poll(poll).unwrap();
    let guest = Guest::new(vm.clone(), PROGRAM, 0);
    // The NMI's handler is the next instruction but one: IRET is not needed, as nothing follows.
    assert!(vm.memory().write(8, &[0x01, 0x10, 0, 0]));
    let mut vcpu = guest.vcpu(0);
    let handle = vcpu.handle();
    thread::scope(|scope| {
        let runner = scope.spawn(move || vcpu.run().unwrap());
        while handle.stats.blocking.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        let nmi = kvm_bindings::kvm_msi { address_lo: 0xfee0_0000, data: 0x400, ..Default::default() };
        assert!(vm.signal_msi(&nmi).unwrap());
        assert!(matches!(runner.join().unwrap(), VcpuExit::Io { port: 0x10, .. }));
    });
    let polls = handle.stats.polls.load(Ordering::SeqCst);
    let successful = handle.stats.successful_polls.load(Ordering::SeqCst);
    assert_eq!((polls, handle.stats.blocking.load(Ordering::SeqCst)), (u64::from(poll != 0), 0));
    successful == 1
}

#[test]
fn a_halted_vcpu_is_woken_asleep_or_polling() {
    assert!(!wake(0));
    // Whether it is still polling after four seconds depends on the machine.
    wake(u32::MAX.into());
}
