//! What the guest writes is in the dirty log or in the dirty ring, and, as with KVM, each page that it has accessed for the
//! first time since the slot was made with logging on: its translation is one for writing, too.

mod guest;

use std::sync::{Arc, Mutex};

use guest::{Guest, run_to_hlt, system};
use hypervisor::VcpuExit;
use hypervisor::dirty_ring::Entries;
use hypervisor::memory::DirtyRange;
use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;

/// Writes AL to BX:0 for BX from 0x200 up, one page after the other, CX of them; HLT; again.
const WRITE_PAGES: &[u8] = &[
    0x8e, 0xdb, // mov ds, bx
    0xa2, 0x00, 0x00, // mov [0], al
    0x81, 0xc3, 0x00, 0x01, // add bx, 0x100
    0xe2, 0xf5, // loop
    0xf4, // hlt
    0xeb, 0xf2, // jmp to the start
];
const FIRST: u64 = 0x2000;

fn set(vcpu: &mut hypervisor::Vcpu, pages: u64) {
    let regs = vcpu.regs();
    vcpu.set_regs(&kvm_bindings::kvm_regs { rbx: FIRST >> 4, rcx: pages, rax: regs.rax + 1, ..regs });
}

#[test]
fn a_manual_log_keeps_bits_until_they_are_cleared() {
    let vm = system().create_vm().unwrap();
    vm.set_manual_dirty_log(1).unwrap();
    let guest = Guest::new(vm.clone(), WRITE_PAGES, KVM_MEM_LOG_DIRTY_PAGES);
    let mut vcpu = guest.vcpu(0);
    let log = || vm.dirty_log(0).unwrap();
    for _ in 0..2 {
        set(&mut vcpu, 4);
        run_to_hlt(&mut vcpu);
        assert_eq!(log()[0], 0b11_1110, "the page with the code as well");
    }
    let range = DirtyRange { slot: 0, first_page: 0, pages: 64 };
    vm.clear_dirty_log(range, |_| Ok::<_, hypervisor::Error>(vec![0b1100])).unwrap();
    assert_eq!(log()[0], 0b11_0010);
    set(&mut vcpu, 1);
    run_to_hlt(&mut vcpu);
    assert_eq!(log()[0], 0b11_0110, "a page whose bit was cleared is logged again");
}

/// kvm-ioctls' test of KVM_RUN counts the page that the code is in.
#[test]
fn the_first_access_to_a_page_is_in_the_log() {
    let vm = system().create_vm().unwrap();
    // mov al, [0x2000]; mov al, [0x3000]; hlt; again
    let program = [0xa0, 0x00, 0x20, 0xa0, 0x00, 0x30, 0xf4, 0xeb, 0xf7];
    let guest = Guest::new(vm.clone(), &program, KVM_MEM_LOG_DIRTY_PAGES);
    let mut vcpu = guest.vcpu(0);
    run_to_hlt(&mut vcpu);
    assert_eq!(vm.dirty_log(0).unwrap()[0], 0b1110);
    run_to_hlt(&mut vcpu);
    assert_eq!(vm.dirty_log(0).unwrap()[0], 0, "read again");
    // Logging that begins later finds translations that there are already.
    let slot = |flags| kvm_bindings::kvm_userspace_memory_region {
        slot: 0,
        flags,
        guest_phys_addr: 0,
        memory_size: guest::SIZE,
        userspace_addr: guest.host(0),
    };
    vm.set_user_memory_region(slot(0)).unwrap();
    vm.set_user_memory_region(slot(KVM_MEM_LOG_DIRTY_PAGES)).unwrap();
    run_to_hlt(&mut vcpu);
    assert_eq!(vm.dirty_log(0).unwrap()[0], 0);
}

#[derive(Clone)]
struct Ring(Arc<Mutex<Vec<(u32, u32, u64)>>>);

impl Entries for Ring {
    fn count(&self) -> u32 {
        1024
    }
    fn flags(&self, index: u32) -> u32 {
        self.0.lock().unwrap()[index as usize].0
    }
    fn set_flags(&self, index: u32, flags: u32) {
        self.0.lock().unwrap()[index as usize].0 = flags;
    }
    fn page(&self, index: u32) -> (u32, u64) {
        let entry = self.0.lock().unwrap()[index as usize];
        (entry.1, entry.2)
    }
    fn set_page(&self, index: u32, slot: u32, page: u64) {
        let entry = &mut self.0.lock().unwrap()[index as usize];
        (entry.1, entry.2) = (slot, page);
    }
}

#[test]
fn a_ring_lists_each_page_once_between_resets() {
    let vm = system().create_vm().unwrap();
    vm.set_dirty_ring(1024 * 16).unwrap();
    assert!(vm.set_dirty_ring(1024 * 16).is_err());
    let guest = Guest::new(vm.clone(), WRITE_PAGES, KVM_MEM_LOG_DIRTY_PAGES);
    let mut vcpu = guest.vcpu(0);
    let ring = Ring(Arc::new(Mutex::new(vec![(0, 0, 0); 1024])));
    vcpu.attach_dirty_ring(Box::new(ring.clone()));
    assert_eq!(vm.dirty_log(0).map_err(|e| e.errno()), Err(libc::ENXIO));
    let harvest = |next: &mut usize| {
        let mut entries = ring.0.lock().unwrap();
        let mut pages = Vec::new();
        while entries[*next % 1024].0 == 1 {
            let entry = &mut entries[*next % 1024];
            entry.0 |= 2;
            pages.push(entry.2);
            *next += 1;
        }
        pages
    };
    let mut next = 0;
    for round in 1..=20u32 {
        for _ in 0..2 {
            set(&mut vcpu, 100);
            run_to_hlt(&mut vcpu);
        }
        let pages = harvest(&mut next);
        // The code's page comes once.
        let first = if round == 1 { 1 } else { 2 };
        assert!(pages.iter().copied().eq(first..102), "round {round}: {pages:?}");
        assert_eq!(u64::from(vm.reset_dirty_rings().unwrap()), 102 - first);
        assert_eq!(guest.byte(FIRST), 2 * round as u8);
    }
    // What the hypervisor itself writes is listed by the next vCPU that runs.
    assert!(vm.memory().write(0x9_0000, b"x"));
    set(&mut vcpu, 1);
    run_to_hlt(&mut vcpu);
    assert_eq!(harvest(&mut next), [0x90, 2]);
    assert_eq!(vm.reset_dirty_rings().unwrap(), 2);
    assert_eq!(vm.reset_dirty_rings().unwrap(), 0);
}

#[test]
fn a_full_ring_stops_the_vcpu_until_it_is_read() {
    let vm = system().create_vm().unwrap();
    vm.set_dirty_ring(1024 * 16).unwrap();
    let guest = Guest::new(vm.clone(), WRITE_PAGES, KVM_MEM_LOG_DIRTY_PAGES);
    let mut vcpu = guest.vcpu(0);
    let ring = Ring(Arc::new(Mutex::new(vec![(0, 0, 0); 1024])));
    vcpu.attach_dirty_ring(Box::new(ring.clone()));
    // Twice as many pages as there are, of which some come again: 250 pages of a megabyte, then the first ones.
    let mut total = 0;
    let mut written = 0;
    while written < 1000 {
        set(&mut vcpu, 200);
        loop {
            match vcpu.run().unwrap() {
                VcpuExit::Hlt => break,
                VcpuExit::DirtyRingFull => {
                    assert_eq!(vcpu.run().unwrap(), VcpuExit::DirtyRingFull, "still");
                    let read = ring.0.lock().unwrap().iter_mut().fold(0, |n, entry| {
                        entry.0 <<= 1;
                        n + u32::from(entry.0 != 0)
                    });
                    assert!(read >= 1024 - 576);
                    assert_eq!(vm.reset_dirty_rings().unwrap(), read);
                    total += read;
                }
                exit => panic!("{exit:?}"),
            }
        }
        written += 200;
        // The pages are to be listed again without the ring being read.
        let marks: Vec<u64> = (2..202).map(|page| page << 12).collect();
        vm.memory().ept().clear_pages(&marks);
    }
    assert!(total >= 448, "{total}");
}

#[test]
fn a_ring_tells_what_was_written_in_smm_from_the_rest() {
    let vm = system().create_vm().unwrap();
    vm.set_dirty_ring(1024 * 16).unwrap();
    let guest = Guest::new(vm.clone(), &[0xf4, 0xf4], KVM_MEM_LOG_DIRTY_PAGES);
    // The same memory in both address spaces.
    let smram = kvm_bindings::kvm_userspace_memory_region {
        slot: 1 << 16 | 5,
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        guest_phys_addr: 0,
        memory_size: guest::SIZE,
        userspace_addr: guest.host(0),
    };
    vm.set_user_memory_region(smram).unwrap();
    let mut vcpu = guest.vcpu(0);
    let ring = Ring(Arc::new(Mutex::new(vec![(0, 0, 0); 1024])));
    vcpu.attach_dirty_ring(Box::new(ring.clone()));
    // The handler: mov [0x5000], al; rsm
    assert!(vm.memory().write(0x3_8000, &[0xa2, 0x00, 0x50, 0x0f, 0xaa]));
    let harvest = || {
        let mut entries = ring.0.lock().unwrap();
        let fresh = entries.iter_mut().filter(|entry| entry.0 == 1);
        let mut pages: Vec<_> =
            fresh.map(|entry| (std::mem::replace(&mut entry.0, 2), entry.1, entry.2)).collect();
        pages.sort_unstable();
        pages.into_iter().map(|(_, slot, page)| (slot, page)).collect::<Vec<_>>()
    };
    // The state-save area is in page 0x3f.
    let in_smm = [(1 << 16 | 5, 5), (1 << 16 | 5, 0x3f)];
    vcpu.smi();
    run_to_hlt(&mut vcpu);
    // At first, what was accessed outside, what we wrote there, and the handler's code as well.
    let first = [(0, 1), (0, 0x38), (1 << 16 | 5, 5), (1 << 16 | 5, 0x38), (1 << 16 | 5, 0x3f)];
    assert_eq!(harvest(), first);
    assert_eq!(vm.reset_dirty_rings().unwrap(), 5);
    vcpu.smi();
    run_to_hlt(&mut vcpu);
    assert_eq!(harvest(), in_smm);
}
