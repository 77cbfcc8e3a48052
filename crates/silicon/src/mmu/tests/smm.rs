//! The address space of system management mode.

use std::sync::Arc;

use super::{Machine, Memory, PML4, PT, PWU};
use crate::cpu::Requests;
use crate::exception::Exception;
use crate::mmu::ept::{Ept, Logging, Region, SMM_SPACE};
use crate::state::Seg;
use crate::vmx::{BusAccess, Exit, Space};

const DS: Seg = Seg::Ds;
const CODE: u64 = 0x5000;

/// Flat protected mode, and other memory in the address space of SMM.
fn machine() -> (Machine, Memory) {
    let machine = Machine::new();
    let smram = Memory::new(0x1_0000);
    let region = Region { gpa: SMM_SPACE, ..smram.region() };
    assert!(machine.cpu.ept.change_region(None, Some((region, Logging::On))));
    (machine, smram)
}

/// Length of the instruction at `lin`.
fn decoded(m: &mut Machine, lin: u64) -> u8 {
    if m.cpu.requests.any() {
        let bits = m.cpu.requests.take(Requests::FLUSH | Requests::MAIL | Requests::EXCLUSIVE);
        m.cpu.mmu_requests(bits);
    }
    m.cpu.state.rip = lin;
    m.cpu.find_block(false).unwrap().ops()[0].length
}

fn switch(m: &mut Machine, smm: bool) {
    m.cpu.set_smm(smm);
    m.cpu.paging_changed();
}

#[test]
fn smm_sees_its_own_memory() {
    let (mut m, smram) = machine();
    m.memory.write(0x2000, 1u32);
    smram.write(0x2000, 2u32);
    for (smm, value) in [(false, 1), (true, 2), (false, 1), (true, 2)] {
        switch(&mut m, smm);
        assert_eq!(m.cpu.load::<u32>(DS, 0x2000).unwrap(), value);
        m.cpu.store::<u32>(DS, 0x2004, value + 6).unwrap();
    }
    assert_eq!((m.memory.read::<u32>(0x2004), smram.read::<u32>(0x2004)), (7, 8));
    assert_eq!(m.cpu.ept.dirty(SMM_SPACE), Some(vec![1 << 2]), "logged where it was written");
}

#[test]
fn exits_from_smm_carry_plain_addresses() {
    let (mut m, _smram) = machine();
    switch(&mut m, true);
    let result = m.cpu.load::<u32>(DS, 0x2_0000);
    let access = BusAccess { space: Space::Memory, address: 0x2_0000, size: 4, write: None };
    assert_eq!(m.exit(result), Exit::EptViolation(access));
    let result = m.cpu.fetch_page(0x2_0123);
    assert_eq!(m.exit(result), Exit::FetchFailed { gpa: 0x2_0123 });
    assert_eq!(m.cpu.translate(0x123), Some((0x123, true, true)));
}

#[test]
fn page_walks_in_smm_read_smram() {
    let (mut m, smram) = machine();
    m.enter_long_mode();
    switch(&mut m, true);
    // The tables are not in SMRAM yet.
    let result = m.cpu.load::<u8>(DS, 0x9010);
    assert_eq!(m.exception(result), Exception::pf(0x9010, 0));
    for (table, next) in [(PML4, 0x2000), (0x2000, 0x3000), (0x3000, PT)] {
        smram.write(table, next | PWU);
    }
    smram.write(PT + 8 * 9, 0x7000 | PWU);
    smram.write(0x7010, 0x5au8);
    m.cpu.flush_all(false);
    assert_eq!(m.cpu.load::<u8>(DS, 0x9010).unwrap(), 0x5a);
    assert_ne!(smram.read::<u64>(PT + 8 * 9), 0x7000 | PWU, "accessed");
    assert_eq!(m.memory.read::<u64>(PT + 8 * 9), 0x9000 | PWU);
}

#[test]
fn code_of_the_two_spaces_is_not_mixed() {
    let (mut m, smram) = machine();
    m.memory.write(CODE, 0xc390u16);
    smram.write(CODE, 0xc390_9066u32);
    for (smm, length) in [(false, 1), (true, 2), (false, 1), (true, 2)] {
        switch(&mut m, smm);
        assert_eq!(decoded(&mut m, CODE), length);
    }
    // Stores there do not concern the code here.
    m.cpu.store::<u8>(DS, CODE, 0x90).unwrap();
    assert_eq!(decoded(&mut m, CODE), 1);
    switch(&mut m, false);
    assert_eq!((decoded(&mut m, CODE), m.cpu.counters.blocks_invalidated), (1, 1));
}

#[test]
fn code_written_from_smm_is_seen_after_it_by_all() {
    let memory = Arc::new(Memory::new(0x10_0000));
    let ept = Arc::new(Ept::new());
    ept.set_regions(vec![memory.region(), Region { gpa: SMM_SPACE, ..memory.region() }]);
    let (mut a, mut b) = (Machine::with(ept.clone(), memory.clone()), Machine::with(ept, memory.clone()));
    memory.write(CODE, 0xc390u16);
    assert_eq!((decoded(&mut a, CODE), decoded(&mut b, CODE)), (1, 1));
    switch(&mut a, true);
    a.cpu.store::<u16>(DS, CODE, 0x9066).unwrap();
    switch(&mut a, false);
    assert_eq!((decoded(&mut a, CODE), decoded(&mut b, CODE)), (2, 2));
}
