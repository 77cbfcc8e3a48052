//! The page-not-present protocol, by the numbers of its requirements and tests (R1 to R12, P2 to P14). Real-mode programs touch pages of a
//! slot whose presence the test keeps; it also is who brings them.
#![expect(unsafe_code, reason = "protects memory of the guest's")]

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use kvm_bindings::{kvm_msr_entry, kvm_userspace_memory_region};
use silicon::mmu::ept::Lazy;

use super::super::testing::{Program, vm};
use super::*;
use crate::async_pf::PageSource;
use crate::msr::page_not_present::{DATA, RING, VECTORS};

/// The slot, in pages, and what the guest's DS is.
const LAZY: u64 = 0x10_0000;
const PAGES: u64 = 32;
/// The guest's structures, and the counters of its handlers.
const PNP_DATA: u64 = 0x2000;
const PNP_RING: u64 = 0x3000;
const EVENTS: u64 = 0x4000;
const INTERRUPTS: u64 = 0x4004;
/// Vectors: of the event, of the interrupt.
const EVENT: u64 = 0x61;
const INTERRUPT: u64 = 0x51;
/// Bits of PNP_DATA.
const ON: u64 = 1;
const MC: u64 = 1 << 2;

/// Brings pages when the test says so.
#[derive(Debug, Default)]
struct Pages {
    state: Mutex<(Vec<u64>, HashMap<u64, Outcome>)>,
    changed: Condvar,
}

impl PageSource for Pages {
    fn bring(&self, gpa: u64, _: u64) -> Outcome {
        let mut state = self.state.lock().unwrap();
        state.0.push((gpa - LAZY) / 4096);
        self.changed.notify_all();
        loop {
            if let Some(outcome) = state.1.remove(&((gpa - LAZY) / 4096)) {
                return outcome;
            }
            state = self.changed.wait(state).unwrap();
        }
    }
}

impl Pages {
    fn give(&self, page: u64, outcome: Outcome) {
        self.state.lock().unwrap().1.insert(page, outcome);
        self.changed.notify_all();
    }

    /// Waits until somebody wants the page.
    fn wanted(&self, page: u64) {
        let mut state = self.state.lock().unwrap();
        while !state.0.contains(&page) {
            state = self.changed.wait(state).unwrap();
        }
    }
}

struct Guest {
    program: Program,
    pages: Arc<Pages>,
    _lazy: Vec<u8>,
}

/// Handlers count in memory. The event's ends with OUT 0x90, so that the test has the guest where a task would be switched; then the
/// EOI, `inuse` cleared, IRET. The interrupt's is silent.
const HANDLERS: &[(u64, u64, &[u8])] = &[
    // inc dword cs:[0x4000]; out 0x90, al; iret
    (EVENT, 0x600, &[0x2e, 0x66, 0xff, 0x06, 0x00, 0x40, 0xe6, 0x90, 0xcf]),
    // inc dword cs:[0x4004]; iret
    (INTERRUPT, 0x700, &[0x2e, 0x66, 0xff, 0x06, 0x04, 0x40, 0xcf]),
    // out 0x12, al; hlt: #MC
    (18, 0x800, &[0xe6, 0x12, 0xf4]),
];

impl Guest {
    /// With `bits` in PNP_DATA and 2^`order` tokens.
    fn new(code: &[u8], bits: u64, order: u64) -> Guest {
        crate::memory::catch_absence();
        let vm = vm();
        vm.create_irqchip().unwrap();
        let pages = Arc::new(Pages::default());
        vm.set_page_source(pages.clone()).unwrap();
        let mut program = Program::on(vm.clone(), code);
        let lazy = vec![0x5a; (PAGES as usize + 1) * 4096];
        vm.set_user_memory_region(kvm_userspace_memory_region {
            slot: 1,
            guest_phys_addr: LAZY,
            memory_size: PAGES * 4096,
            userspace_addr: (lazy.as_ptr() as u64).next_multiple_of(4096),
            ..Default::default()
        })
        .unwrap();
        vm.set_lazy(LAZY, Lazy::Own).unwrap();
        for (vector, at, code) in HANDLERS {
            assert!(vm.memory().write(vector * 4, &(*at as u32).to_le_bytes()));
            assert!(vm.memory().write(*at, code));
        }
        let vcpu = &mut program.vcpu;
        let table = vcpu.vm.system().supported_cpuid();
        vcpu.set_cpuid2(&table).unwrap();
        vcpu.setup_mce(1 << 24 | 1 << 8 | 10).unwrap();
        let mut sregs = vcpu.sregs();
        sregs.ds.base = LAZY;
        sregs.cr4 |= 1 << 6;
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.regs();
        regs.rflags |= 1 << 9;
        vcpu.set_regs(&regs);
        vcpu.lapic.as_ref().unwrap().mmio_write(0xf0, &0x1ffu32.to_le_bytes());
        let mut guest = Guest { program, pages, _lazy: lazy };
        guest.write(VECTORS, INTERRUPT << 8 | EVENT).unwrap();
        guest.write(RING, PNP_RING | order).unwrap();
        guest.write(DATA, PNP_DATA | bits).unwrap();
        guest
    }

    fn write(&mut self, index: u32, value: u64) -> Result<(), crate::msr::MsrError> {
        self.program.vcpu.write_msr(index, value, false)
    }

    fn vcpu(&mut self) -> &mut Vcpu {
        &mut self.program.vcpu
    }

    fn word(&self, at: u64) -> u32 {
        let mut word = [0; 4];
        assert!(self.program.vcpu.vm.memory().read(at, &mut word));
        u32::from_le_bytes(word)
    }

    fn set_word(&self, at: u64, value: u32) {
        assert!(self.program.vcpu.vm.memory().write(at, &value.to_le_bytes()));
    }

    fn out(&mut self, port: u16) {
        let exit = self.vcpu().run().unwrap();
        assert!(matches!(exit, VcpuExit::Io { port: at, .. } if at == port), "{exit:x?}, not port {port:#x}");
    }

    /// What the guest's handler does: the EOI, `inuse`; the data that it has read.
    fn end_event(&mut self) -> [u32; 7] {
        let data = [0, 4, 8, 12, 16, 20, 24].map(|at| self.word(PNP_DATA + at));
        self.vcpu().lapic.as_ref().unwrap().end_of_interrupt();
        self.set_word(PNP_DATA, 0);
        data
    }

    /// The entries of the ring that the guest has not read: it reads them.
    fn resolutions(&self, tokens: u64) -> Vec<(u32, u32)> {
        let at = |offset| PNP_RING + tokens * 8 + offset;
        let (head, mut tail) = (self.word(at(0)), self.word(at(4)));
        let mut out = Vec::new();
        while tail != head {
            let entry = PNP_RING + 8 * (u64::from(tail) % tokens);
            out.push((self.word(entry), self.word(entry + 4)));
            tail = tail.wrapping_add(1);
        }
        self.set_word(at(4), tail);
        self.program.vcpu.lapic.as_ref().unwrap().end_of_interrupt();
        out
    }

    /// Runs until a page has come to the vCPU: the interrupt has been taken.
    fn await_interrupts(&mut self, count: u32) {
        while self.word(INTERRUPTS) < count {
            let handle = self.vcpu().handle();
            while !handle.has_pages() && self.word(INTERRUPTS) < count {
                thread::yield_now();
            }
            self.out(0x91);
        }
    }

    fn protect(&self, page: u64, protection: libc::c_int) {
        // SAFETY: a page of the slot's memory, which the guest alone reaches.
        assert_eq!(unsafe { libc::mprotect(page as *mut libc::c_void, 4096, protection) }, 0);
    }

    fn counter(&self, of: impl Fn(&crate::stats::VcpuStats) -> &crate::stats::page::Counter) -> u64 {
        of(&self.program.vcpu.handle.stats).load(std::sync::atomic::Ordering::Relaxed)
    }
}

/// mov al, [0x1234]; out 0x10, al; again: out 0x91, al; jmp again
const TOUCH: &[u8] = &[0xa0, 0x34, 0x12, 0xe6, 0x10, 0xe6, 0x91, 0xeb, 0xfc];

#[test]
fn pnp_r3_an_event_says_which_page_and_a_resolution_that_it_has_come() {
    let mut guest = Guest::new(TOUCH, ON, 2);
    guest.out(0x90);
    let [in_use, token, gpa, gpa_high, gva, gva_high, flags] = guest.end_event();
    assert_eq!((in_use, gpa, gpa_high, gva, gva_high, flags), (1, 0x10_1234, 0, 0x10_1234, 0, 1));
    assert_ne!(token, 0);
    assert_eq!(guest.vcpu().regs().rip & 0xff00, 0x600);
    guest.pages.wanted(1);
    assert_eq!(guest.resolutions(4), []);
    guest.pages.give(1, Outcome::Came);
    guest.out(0x10);
    guest.await_interrupts(1);
    assert_eq!(guest.resolutions(4), [(0, token)]);
    assert_eq!((guest.word(EVENTS), guest.word(INTERRUPTS)), (1, 1));
    assert_eq!(guest.counter(|stats| &stats.pnp_events), 1);
    assert_eq!(guest.counter(|stats| &stats.pnp_resolutions), 1);
}

#[test]
fn pnp_r2_who_takes_no_interrupts_is_not_told() {
    // Whether the vCPU is told, by: what comes before the access.
    let sti_shadow = [0xfa, 0xfb];
    let mov_ss_shadow = [0x8c, 0xd0, 0x8e, 0xd0];
    let cases: [(&str, &[u8], fn(&mut Guest), bool); 7] = [
        ("interrupts are on", &[], |_| {}, true),
        ("IF is 0", &[0xfa], |_| {}, false),
        ("in the shadow of STI", &sti_shadow, |_| {}, false),
        ("in the shadow of MOV SS", &mov_ss_shadow, |_| {}, false),
        ("the data is in use", &[], |guest| guest.set_word(PNP_DATA, 1), false),
        ("by TPR", &[], |guest| guest.vcpu().lapic.as_ref().unwrap().set_tpr(0x60), false),
        ("with a lower TPR", &[], |guest| guest.vcpu().lapic.as_ref().unwrap().set_tpr(0x5f), true),
    ];
    for (name, before, prepare, told) in cases {
        let mut guest = Guest::new(&[before, TOUCH].concat(), ON, 2);
        prepare(&mut guest);
        let before: Vec<u32> = (4..32).step_by(4).map(|at| guest.word(PNP_DATA + at)).collect();
        if told {
            guest.out(0x90);
            guest.end_event();
            guest.pages.give(1, Outcome::Came);
        } else {
            let pages = guest.pages.clone();
            let giver = thread::spawn(move || {
                pages.wanted(1);
                pages.give(1, Outcome::Came);
            });
            guest.out(0x10);
            giver.join().unwrap();
            // R1: nothing is written while it is in use, or without an event.
            let after: Vec<u32> = (4..32).step_by(4).map(|at| guest.word(PNP_DATA + at)).collect();
            assert_eq!(before, after, "{name}");
        }
        assert_eq!(guest.word(EVENTS), u32::from(told), "{name}");
    }
}

/// P5: a vCPU that is held takes interrupts if it can, and whoever wants it out of KVM_RUN gets it.
#[test]
fn pnp_r2_a_vcpu_that_waits_can_be_interrupted() {
    for (code, interrupts) in [(0xfa, 0), (0x90, 1)] {
        let mut guest = Guest::new(&[&[code], TOUCH].concat(), ON, 2);
        guest.set_word(PNP_DATA, 1);
        let handle = guest.vcpu().handle();
        let pages = guest.pages.clone();
        let lapic = guest.vcpu().lapic.clone().unwrap();
        let other = thread::spawn(move || {
            pages.wanted(1);
            lapic.accept(&crate::irqchip::bus::Message::from_icr(INTERRUPT as u32, 0));
            handle.interrupt();
        });
        assert!(matches!(guest.vcpu().run(), Err(Error::Interrupted)));
        other.join().unwrap();
        guest.pages.give(1, Outcome::Came);
        guest.vcpu().handle().settle();
        guest.out(0x10);
        assert_eq!(guest.word(INTERRUPTS), interrupts);
    }
}

/// mov al, [0x1000 * n] for n from 1 on, each behind an event; then out 0x10.
fn touch_pages(count: u8) -> Vec<u8> {
    let mut code: Vec<u8> = (1..=count).flat_map(|page| [0xa0, 0x00, page << 4]).collect();
    code.extend([0xe6, 0x10, 0xe6, 0x91, 0xeb, 0xfc]);
    code
}

/// R4 and R5: no more events than tokens, and resolutions come in the order of the pages. Each handler goes on behind the access, as one that
/// switches tasks would.
#[test]
fn pnp_r4_r5_there_are_no_more_events_than_tokens() {
    let mut guest = Guest::new(&touch_pages(5), ON, 2);
    let mut tokens = Vec::new();
    for page in 1..=4 {
        guest.out(0x90);
        let [_, token, gpa, ..] = guest.end_event();
        assert_eq!(gpa, LAZY as u32 + page * 4096);
        assert!(!tokens.contains(&token));
        tokens.push(token);
        guest.pages.wanted(page.into());
        skip_access(&mut guest);
    }
    // The fifth page: no token is free, so the vCPU waits. When it has come the access is made.
    let pages = guest.pages.clone();
    let giver = thread::spawn(move || {
        pages.wanted(5);
        pages.give(5, Outcome::Came);
    });
    guest.out(0x10);
    giver.join().unwrap();
    assert_eq!(guest.word(EVENTS), 4);
    assert_eq!(guest.counter(|stats| &stats.async_pf_holds), 1);
    for (page, result) in [(3, 0), (1, 1), (4, 0), (2, 0)] {
        guest.pages.give(page, if result == 1 { Outcome::Failed } else { Outcome::Came });
        let before = guest.word(INTERRUPTS);
        guest.await_interrupts(before + 1);
        assert_eq!(guest.resolutions(4), [(result, tokens[page as usize - 1])]);
    }
}

/// The task that was interrupted goes on behind its access, for which another task waits.
fn skip_access(guest: &mut Guest) {
    // The frame of the event: the instruction pointer is on top.
    let at = guest.vcpu().regs().rsp;
    let ip = guest.word(at) as u16;
    assert!(guest.vcpu().vm.memory().write(at, &(ip + 3).to_le_bytes()));
}

/// P14: a page that has failed is told again, its resolution before its event (P10); then it is looked at again.
#[test]
fn pnp_r6_r7_a_failed_page_is_told_as_often_as_it_is_touched() {
    let mut guest = Guest::new(TOUCH, ON, 2);
    guest.out(0x90);
    let [_, first, ..] = guest.end_event();
    guest.pages.give(1, Outcome::Failed);
    guest.pages.wanted(1);
    let handle = guest.vcpu().handle();
    while !handle.has_pages() {
        thread::yield_now();
    }
    // The access again: its resolution is there when its event comes.
    guest.out(0x90);
    let [_, second, ..] = guest.end_event();
    let resolved = guest.resolutions(4);
    assert_eq!(resolved, [(1, first), (1, second)]);
    // And again: by now it has been repaired.
    guest.out(0x90);
    let [_, third, ..] = guest.end_event();
    guest.pages.give(1, Outcome::Came);
    guest.out(0x10);
    let before = guest.word(INTERRUPTS);
    if guest.resolutions(4).is_empty() {
        guest.await_interrupts(before + 1);
    }
    assert!(![first, second].contains(&third));
}

#[test]
fn pnp_r8_a_failed_page_that_cannot_be_told_kills_or_is_a_machine_check() {
    for (bits, cr4_mce, ends) in [(ON, true, None), (ON | MC, true, Some(0x12)), (ON | MC, false, None)] {
        let mut guest = Guest::new(&[&[0xfa], TOUCH].concat(), bits, 2);
        if !cr4_mce {
            let mut sregs = guest.vcpu().sregs();
            sregs.cr4 &= !(1 << 6);
            guest.vcpu().set_sregs(&sregs).unwrap();
        }
        guest.pages.give(1, Outcome::Failed);
        match ends {
            Some(port) => {
                guest.out(port);
                let mut msrs =
                    [0x401, 0x402, 0x17a].map(|index| kvm_msr_entry { index, ..Default::default() });
                assert_eq!(guest.vcpu().get_msrs(&mut msrs), 3);
                assert_eq!(msrs.map(|msr| msr.data), [0xbd80_0000_0000_0134, LAZY + 0x1000, 7]);
                assert_eq!(guest.counter(|stats| &stats.pnp_machine_checks), 1);
            }
            None => {
                let crash = Crash { reason: CrashReason::Failed, gpa: LAZY + 0x1000, rip: Program::CODE + 1 };
                for _ in 0..2 {
                    assert_eq!(guest.vcpu().run().unwrap(), VcpuExit::Crash(crash));
                }
                guest.vcpu().reset();
                assert_eq!(guest.vcpu().crashed(), None);
            }
        }
    }
}

#[test]
fn pnp_r10_a_guest_that_breaks_the_ring_is_killed() {
    let head = PNP_RING + 4 * 8;
    let cases: [(&str, u64, u32, CrashReason); 3] = [
        ("head", head, 7, CrashReason::Ring),
        ("tail ahead of head", head + 4, 1, CrashReason::Ring),
        ("tail far behind", head + 4, 0u32.wrapping_sub(5), CrashReason::Ring),
    ];
    for (name, at, value, reason) in cases {
        for resolving in [false, true] {
            let mut guest = Guest::new(TOUCH, ON, 2);
            if resolving {
                guest.out(0x90);
                guest.end_event();
            }
            guest.set_word(at, value);
            guest.pages.give(1, Outcome::Came);
            let exit = loop {
                match guest.vcpu().run().unwrap() {
                    VcpuExit::Io { .. } => {}
                    exit => break exit,
                }
            };
            assert!(
                matches!(exit, VcpuExit::Crash(crash) if crash.reason == reason && crash.gpa == PNP_RING),
                "{name}: {exit:?}"
            );
            assert_eq!(guest.counter(|stats| &stats.pnp_killed), 1);
        }
    }
}

/// P12: a ring that the guest never reads is full when its tokens are used up, and none is handed out that would not fit.
#[test]
fn pnp_r4_a_guest_that_reads_nothing_gets_no_more_events() {
    let mut guest = Guest::new(&touch_pages(3), ON, 1);
    for page in 1..=2 {
        guest.out(0x90);
        guest.end_event();
        guest.pages.give(page, Outcome::Came);
    }
    guest.pages.give(3, Outcome::Came);
    guest.out(0x10);
    assert_eq!((guest.word(EVENTS), guest.word(PNP_RING + 16), guest.word(PNP_RING + 20)), (2, 2, 0));
    assert_eq!(guest.counter(|stats| &stats.pnp_killed), 0);
}

#[test]
fn pnp_the_registers_take_what_they_may() {
    let mut guest = Guest::new(TOUCH, ON, 2);
    assert!(
        guest.write(VECTORS, 0x3020).is_err() && guest.write(RING, 0x3000).is_err(),
        "the protocol is on"
    );
    guest.write(DATA, 0).unwrap();
    let mut refused = |index, value| guest.write(index, value).is_err();
    assert!(refused(VECTORS, 0x0f20) && refused(VECTORS, 0x200f) && refused(VECTORS, 0x1_2020));
    assert!(refused(RING, PNP_RING | 7) && refused(RING, PNP_RING | 0x10));
    assert!(refused(DATA, PNP_DATA | 0x9) && refused(DATA, PNP_DATA | 0x20));
    assert!(refused(DATA, 0x8000_0001), "no memory there");
    assert!(guest.vcpu().msrs.page_not_present().is_none());
    guest.set_word(PNP_RING + 32, 9);
    assert!(guest.write(DATA, PNP_DATA | ON).is_err(), "indices that are too far apart");
    guest.set_word(PNP_RING + 36, 5);
    guest.write(DATA, PNP_DATA | ON).unwrap();
    // Without the CPUID bit there are none for the guest; the client has them.
    let table: Vec<_> = guest.vcpu().cpuid2().into_iter().filter(|row| row.function != 0x4000_0101).collect();
    guest.vcpu().set_cpuid2(&table).unwrap();
    assert!(guest.write(DATA, 0).is_err() && guest.vcpu().read_msr(DATA, false).is_err());
    assert_eq!(guest.vcpu().read_msr(DATA, true), Ok(PNP_DATA | ON));
}

/// What is on its way when a guest is saved is resolved for it after it has been restored, whatever the order of the registers.
#[test]
fn pnp_a_restored_guest_hears_that_it_is_to_try_again() {
    for order in [[DATA, RING, VECTORS], [VECTORS, RING, DATA]] {
        let mut guest = Guest::new(TOUCH, ON, 2);
        guest.out(0x90);
        guest.end_event();
        let saved = order.map(|index| (index, guest.vcpu().read_msr(index, true).unwrap()));
        for (index, _) in saved {
            guest.vcpu().write_msr(index, 0, true).unwrap();
        }
        for (index, value) in saved {
            guest.vcpu().write_msr(index, value, true).unwrap();
        }
        guest.pages.give(1, Outcome::Came);
        guest.out(0x10);
        assert_eq!(guest.resolutions(4), [(0, u32::MAX)], "{order:x?}");
    }
}

/// Memory that may be read and not written is a mistake of the client's, and no failed page: once the vCPU tried again for ever.
#[test]
fn pnp_memory_that_cannot_be_written_is_the_clients_affair() {
    // mov [0x1234], al; hlt
    let mut guest = Guest::new(&[0xa2, 0x34, 0x12, 0xf4], ON, 2);
    guest.vcpu().vm.set_lazy(LAZY, Lazy::No).unwrap();
    let page = guest.vcpu().vm.memory().ept().find(LAZY).unwrap().host + 0x1000;
    guest.protect(page, libc::PROT_READ);
    assert!(matches!(guest.vcpu().run(), Err(Error::MemoryAbsent { gpa: 0x10_1000 })));
    guest.protect(page, libc::PROT_READ | libc::PROT_WRITE);
    assert_eq!(guest.word(EVENTS), 0);
}
