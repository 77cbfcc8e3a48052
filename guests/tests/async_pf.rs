//! Asynchronous page faults on bare metal, by the numbers of their test plan. `asm/async_pf.S` touches pages that a userfaultfd of
//! ours serves: some when the program asks for them, and the others at once.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use guests::lazy::{LazyMemory, PAGE};
use guests::{ASYNC_PF, machine};
use hypervisor::{HostParams, VcpuExit, VcpuHandle};
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use silicon::model::CpuModel;

/// The slot: where, and its bytes.
const LAZY: u64 = 0x1000_0000;
const SIZE: usize = 2 << 20;
/// Pages that come only when the program asks.
const ASKED: [std::ops::RangeInclusive<u64>; 3] = [1..=1, 6..=6, 8..=76];
/// It asks for the page when the vCPU is held.
const WHEN_HELD: u32 = 1 << 31;

fn held(handle: &VcpuHandle) -> u64 {
    handle.stats.async_pf_holds.load(Ordering::Relaxed)
}

/// The memory; `None` where nobody may have a userfaultfd.
fn lazy() -> Option<LazyMemory> {
    LazyMemory::new(SIZE).inspect_err(|error| eprintln!("no userfaultfd: {error}")).ok()
}

/// Brings a page: each word is its number.
fn bring(lazy: &LazyMemory, page: u64) {
    let mut content = [0; PAGE];
    content.as_chunks_mut::<4>().0.iter_mut().for_each(|word| *word = (page as u32).to_le_bytes());
    lazy.bring(page, &content).unwrap();
}

/// What the program has asked for.
#[derive(Default)]
struct Asked {
    pages: Mutex<Vec<u64>>,
    changed: Condvar,
}

impl Asked {
    fn wait_for(&self, page: u64) {
        let mut pages = self.pages.lock().unwrap();
        while !pages.contains(&page) {
            pages = self.changed.wait(pages).unwrap();
        }
    }

    fn ask(&self, page: u64) {
        self.pages.lock().unwrap().push(page);
        self.changed.notify_all();
    }
}

/// The slot of pages that somebody has to bring.
fn slot(lazy: &LazyMemory) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region {
        slot: 1,
        flags: 0,
        guest_phys_addr: LAZY,
        memory_size: SIZE as u64,
        userspace_addr: lazy.host(),
    }
}

/// A split lock on a page that is elsewhere, of a host that emulates it: the vCPU is held, and hears that it is wanted; when the page
/// has come the lock is made, once.
#[test]
fn apf_a_split_lock_waits_for_its_page_and_can_be_interrupted() {
    hypervisor::memory::catch_absence();
    let Some(lazy) = lazy() else { return };
    let host = HostParams::parse("split_lock_detect=fatal ring3.split_lock_policy=emulate").unwrap();
    let mut machine = machine::build(ASYNC_PF.image, 1, CpuModel::default(), host).unwrap();
    machine.vm.set_user_memory_region(slot(&lazy)).unwrap();
    // lock inc dword [LAZY + 0x3e]; out 0xf4, al
    let code = [0xf0, 0xff, 0x05, 0x3e, 0x00, 0x00, 0x10, 0xe6, 0xf4];
    assert!(machine.vm.memory().write(0x1000, &code));
    let vcpu = &mut machine.vcpus[0];
    let regs = vcpu.regs();
    vcpu.set_regs(&kvm_regs { rip: 0x1000, rflags: 0x202, ..regs });
    let handle = vcpu.handle();
    thread::scope(|scope| {
        let running = scope.spawn(|| {
            let interrupted = matches!(vcpu.run(), Err(hypervisor::Error::Interrupted));
            (interrupted, vcpu)
        });
        assert_eq!(lazy.next().unwrap(), 0, "a worker wants the page");
        handle.interrupt();
        let (interrupted, vcpu) = running.join().unwrap();
        assert!(interrupted);
        bring(&lazy, 0);
        handle.settle();
        assert!(matches!(vcpu.run(), Ok(VcpuExit::Io { port: 0xf4, .. })));
    });
    let mut word = [0; 4];
    assert!(machine.vm.memory().read(LAZY + 0x3e, &mut word));
    assert_eq!(u32::from_le_bytes(word), 1);
    let emulated = handle.stats.split_locks_emulated.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(emulated, 1);
}

#[test]
fn apf_events_of_pages_that_are_elsewhere() {
    hypervisor::memory::catch_absence();
    let Some(lazy) = lazy().map(Arc::new) else { return };
    let mut machine = machine::build(ASYNC_PF.image, 1, CpuModel::default(), HostParams::default()).unwrap();
    machine.vm.set_user_memory_region(slot(&lazy)).unwrap();
    let asked = Arc::new(Asked::default());
    {
        // Until the end of the process: nobody says when the last page has been asked for.
        let (lazy, asked) = (lazy.clone(), asked.clone());
        thread::spawn(move || {
            while let Ok(page) = lazy.next() {
                let (lazy, asked) = (lazy.clone(), asked.clone());
                thread::spawn(move || {
                    if ASKED.iter().any(|pages| pages.contains(&page)) {
                        asked.wait_for(page);
                    }
                    bring(&lazy, page);
                });
            }
        });
    }
    let vcpu = &mut machine.vcpus[0];
    let (mut console, mut behaviours) = (String::new(), Vec::new());
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::Io { port: 0xec, write: Some(page), .. } if page & WHEN_HELD != 0 => {
                let (handle, asked) = (vcpu.handle(), asked.clone());
                let seen = held(&handle);
                thread::spawn(move || {
                    while held(&handle) == seen {
                        thread::yield_now();
                    }
                    asked.ask(u64::from(page & !WHEN_HELD));
                });
            }
            VcpuExit::Io { port: 0xec, write: Some(page), .. } => asked.ask(page.into()),
            VcpuExit::Io { port: 0xed, .. } => {}
            VcpuExit::Io { port: 0xea, write: Some(line), .. } => behaviours.push(line as u16),
            VcpuExit::Io { port: 0x3f8, write: Some(value), .. } => console.push(char::from(value as u8)),
            VcpuExit::Io { port: 0xf4, .. } => break,
            other => panic!("{other:?} at {:#x}", vcpu.state().rip),
        }
    }
    assert_eq!(console, "PASS\n");
    let expected: Vec<u16> = ASYNC_PF.behaviours().map(|(line, _)| line).collect();
    assert_eq!(behaviours, expected);
    let handle = vcpu.handle();
    let counted = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    let stats = &handle.stats;
    assert_eq!(counted(&stats.async_pf_not_present), 70, "pages 1 and 6, 8 to 76 but 73");
    assert_eq!(counted(&stats.async_pf_ready), 72, "those but 76, and three times everybody");
    assert_eq!(counted(&stats.async_pf_waits), 0);
    assert!(counted(&stats.async_pf_holds) >= 4, "pages 2 to 5");
}
