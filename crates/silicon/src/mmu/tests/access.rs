//! Loads, stores and their relatives.

use super::{Machine, PT, PWU};
use crate::exception::Exception;
use crate::flags::Rflags;
use crate::state::{Seg, cr0, cr4};
use crate::vmx::{BusAccess, Exit, Space};

const DS: Seg = Seg::Ds;

fn mmio(address: u64, size: u8, write: Option<u64>) -> BusAccess {
    BusAccess { space: Space::Memory, address, size, write }
}

#[test]
fn words_go_where_the_tables_say() {
    let mut m = Machine::long_mode();
    m.entry(PT + 16 * 8, 0x20_000 | PWU);
    for _ in 0..2 {
        m.cpu.store::<u64>(DS, 0x10_010, 0x1122_3344_5566_7788).unwrap();
        assert_eq!(m.memory.read::<u64>(0x20_010), 0x1122_3344_5566_7788);
        assert_eq!(m.cpu.load::<u8>(DS, 0x10_011), Ok(0x77));
        assert_eq!(m.cpu.load::<u16>(DS, 0x10_011), Ok(0x6677));
        assert_eq!(m.cpu.load::<u32>(DS, 0x10_013), Ok(0x2233_4455));
    }
    assert_eq!(m.cpu.counters.page_walks, 1, "one walk serves all");
}

#[test]
fn crossing_accesses_are_whole_or_not_at_all() {
    let mut m = Machine::long_mode();
    m.entry(PT + 16 * 8, 0x20_000 | PWU);
    m.entry(PT + 17 * 8, 0x30_000 | PWU);
    m.cpu.store::<u64>(DS, 0x10_ffd, 0x1122_3344_5566_7788).unwrap();
    assert_eq!(m.memory.read::<u16>(0x20_ffd), 0x7788);
    assert_eq!(m.memory.read::<u32>(0x30_000), 0x2233_4455);
    assert_eq!(m.cpu.load::<u64>(DS, 0x10_ffd), Ok(0x1122_3344_5566_7788));
    m.entry(PT + 17 * 8, 0x30_000 | 5);
    let result = m.cpu.store::<u64>(DS, 0x10_ffd, 0);
    assert_eq!(m.exception(result), Exception::pf(0x11_000, 3));
    assert_eq!(m.memory.read::<u16>(0x20_ffd), 0x7788, "nothing was written");
    assert_eq!(m.cpu.load::<u64>(DS, 0x10_ffd), Ok(0x1122_3344_5566_7788));
    let result = m.cpu.write_bytes(DS, 0x10_ff0, &[0; 40]);
    assert_eq!(m.exception(result), Exception::pf(0x11_000, 3));
    m.entry(PT + 17 * 8, 0);
    let result = m.cpu.load::<u16>(DS, 0x10_fff);
    assert_eq!(m.exception(result), Exception::pf(0x11_000, 0));
}

#[test]
fn non_canonical_addresses() {
    let mut m = Machine::long_mode();
    for (la57, lin, canonical) in [
        (false, 0x0000_7fff_ffff_f000, true),
        (false, 0x0000_8000_0000_0000, false),
        (false, 0xffff_7fff_ffff_ffff, false),
        (false, 0xffff_8000_0000_0000, true),
        (true, 0x0000_8000_0000_0000, true),
        (true, 0x00ff_ffff_ffff_f000, true),
        (true, 0x0100_0000_0000_0000, false),
        (true, 0xfeff_ffff_ffff_ffff, false),
    ] {
        m.change(|state| state.cr4 = if la57 { state.cr4 | cr4::LA57 } else { state.cr4 & !cr4::LA57 });
        for (seg, expected) in [(DS, Exception::gp(0)), (Seg::Ss, Exception::ss(0))] {
            let result = m.cpu.load::<u8>(seg, lin);
            let fault = m.exception(result);
            assert_eq!(fault == expected, !canonical, "{lin:#x} {fault:?}");
        }
        let result = m.cpu.fetch_page(lin);
        assert_eq!(m.exception(result) == Exception::gp(0), !canonical);
    }
    let mut m = Machine::long_mode();
    m.entry(super::PML4 + 255 * 8, super::PDPT | PWU);
    m.entry(super::PDPT + 511 * 8, super::PD | PWU);
    m.entry(super::PD + 511 * 8, super::PT | PWU);
    m.entry(PT + 511 * 8, 0x9000 | PWU);
    assert!(m.cpu.load::<u32>(DS, 0x0000_7fff_ffff_fffc).is_ok());
    let result = m.cpu.load::<u32>(DS, 0x0000_7fff_ffff_fffd);
    assert_eq!(m.exception(result), Exception::gp(0), "the second part is not canonical");
}

#[test]
fn accesses_wrap_at_four_gigabytes_outside_64_bit_mode() {
    let mut m = Machine::new();
    let mut top = m.memory.region();
    (top.gpa, top.size, top.host) = (0xffff_f000, 0x1000, top.host + 0x1000);
    m.cpu.ept.set_regions(vec![m.memory.region(), top]);
    m.cpu.store::<u32>(DS, 0xffff_fffe, 0x1122_3344).unwrap();
    assert_eq!(m.memory.read::<u16>(0x1ffe), 0x3344);
    assert_eq!(m.memory.read::<u16>(0), 0x1122);
    assert_eq!(m.cpu.load::<u32>(DS, 0xffff_fffe), Ok(0x1122_3344));
}

#[test]
fn rights_follow_the_mode() {
    let mut m = Machine::long_mode();
    m.entry(PT + 5 * 8, 0x5003);
    m.change(|state| state.cr4 |= cr4::SMAP);
    assert!(m.cpu.load::<u8>(DS, 0x5000).is_ok());
    let result = m.cpu.load::<u8>(DS, 0x6000);
    assert_eq!(m.exception(result), Exception::pf(0x6000, 1));
    m.cpu.state.rflags_system |= Rflags::AC.bits();
    m.cpu.mode_changed();
    assert!(m.cpu.load::<u8>(DS, 0x6000).is_ok());
    // Implicit accesses do not care for AC.
    let result = m.cpu.system_load::<u64>(0x6000);
    assert_eq!(m.exception(result), Exception::pf(0x6000, 1));
    m.cpu.state.rflags_system &= !Rflags::AC.bits();
    m.cpu.mode_changed();
    let result = m.cpu.load::<u8>(DS, 0x6000);
    assert_eq!(m.exception(result), Exception::pf(0x6000, 1));
    m.cpu.state.cpl = 3;
    m.cpu.mode_changed();
    assert!(m.cpu.load::<u8>(DS, 0x6000).is_ok());
    let result = m.cpu.store::<u8>(DS, 0x5000, 0);
    assert_eq!(m.exception(result), Exception::pf(0x5000, 7));
    assert!(m.cpu.system_load::<u64>(0x5000).is_ok());
    assert!(m.cpu.system_store::<u64>(0x5000, 1).is_ok());
    let result = m.cpu.system_store::<u64>(0x6000, 1);
    assert_eq!(m.exception(result), Exception::pf(0x6000, 3));
}

#[test]
fn stale_translations_live_until_flushed() {
    let mut m = Machine::long_mode();
    for (flush, gone) in [
        ((|m| m.cpu.flush_page(0x5008)) as fn(&mut Machine), true),
        (|m| m.cpu.flush_page(0x6000), false),
        (|m| m.cpu.flush_context(0), true),
        (|m| m.cpu.flush_context(1), false),
        (|m| m.cpu.flush_all(true), true),
        (|m| m.cpu.cr3_loaded(false), true),
        (|m| m.change(|state| state.cr4 ^= cr4::PGE), true),
        (|m| m.change(|state| state.cr4 ^= cr4::PKE), false),
        (|m| m.cpu.mode_changed(), false),
    ] {
        m.memory.write(0x5000, 1u64);
        m.memory.write(0x7000, 2u64);
        m.entry(PT + 5 * 8, 0x5000 | PWU);
        assert_eq!(m.cpu.load::<u64>(DS, 0x5000), Ok(1));
        m.memory.write(PT + 5 * 8, 0x7000 | PWU);
        flush(&mut m);
        assert_eq!(m.cpu.load::<u64>(DS, 0x5000), Ok(if gone { 2 } else { 1 }));
    }
}

#[test]
fn pcids_and_global_pages() {
    let mut m = Machine::long_mode();
    m.change(|state| state.cr4 |= cr4::PCIDE);
    let switch = |m: &mut Machine, pcid: u64, preserve| {
        m.cpu.state.cr3 = super::PML4 | pcid;
        m.cpu.cr3_loaded(preserve);
    };
    m.memory.write(0x7000, 2u64);
    m.memory.write(PT + 6 * 8, 0x6000 | 1 << 8 | PWU);
    switch(&mut m, 1, false);
    assert_eq!((m.cpu.load::<u64>(DS, 0x5000), m.cpu.load::<u64>(DS, 0x6000)), (Ok(0), Ok(0)));
    m.memory.write(PT + 5 * 8, 0x7000 | PWU);
    m.memory.write(PT + 6 * 8, 0x7000 | PWU);
    switch(&mut m, 2, true);
    assert_eq!(m.cpu.load::<u64>(DS, 0x5000), Ok(2), "nothing was cached for PCID 2");
    assert_eq!(m.cpu.load::<u64>(DS, 0x6000), Ok(0), "global");
    switch(&mut m, 1, true);
    assert_eq!(m.cpu.load::<u64>(DS, 0x5000), Ok(0), "PCID 1 was preserved");
    switch(&mut m, 1, false);
    assert_eq!((m.cpu.load::<u64>(DS, 0x5000), m.cpu.load::<u64>(DS, 0x6000)), (Ok(2), Ok(0)));
    m.cpu.flush_page_in(1, 0x6000);
    assert_eq!(m.cpu.load::<u64>(DS, 0x6000), Ok(0));
    m.cpu.flush_page(0x6000);
    assert_eq!(m.cpu.load::<u64>(DS, 0x6000), Ok(2));
}

#[test]
fn pkru_takes_effect_at_once() {
    let mut m = Machine::long_mode();
    m.change(|state| state.cr4 |= cr4::PKE);
    m.entry(PT + 5 * 8, 0x5000 | 3 << 59 | PWU);
    assert!(m.cpu.store::<u8>(DS, 0x5000, 1).is_ok());
    m.cpu.state.pkru = 2 << 6;
    m.cpu.pkru_changed();
    assert!(m.cpu.load::<u8>(DS, 0x5000).is_ok());
    let result = m.cpu.store::<u8>(DS, 0x5000, 1);
    assert_eq!(m.exception(result), Exception::pf(0x5000, 0x23));
    m.cpu.state.pkru = 0;
    m.cpu.pkru_changed();
    assert!(m.cpu.store::<u8>(DS, 0x5000, 1).is_ok());
}

#[test]
fn a_write_after_a_read_sets_the_dirty_flag() {
    let mut m = Machine::long_mode();
    assert!(m.cpu.load::<u8>(DS, 0x5000).is_ok());
    assert_eq!(m.memory.read::<u64>(PT + 40) & 0x60, 0x20);
    assert!(m.cpu.store::<u8>(DS, 0x5000, 1).is_ok());
    assert_eq!(m.memory.read::<u64>(PT + 40) & 0x60, 0x60);
}

#[test]
fn rights_that_were_granted_since_are_found() {
    let mut m = Machine::long_mode();
    m.entry(PT + 5 * 8, 0x5001 | 4);
    assert!(m.cpu.load::<u8>(DS, 0x5000).is_ok());
    m.memory.write(PT + 5 * 8, 0x5000 | PWU);
    assert!(m.cpu.store::<u8>(DS, 0x5000, 1).is_ok(), "no flush is needed to grant rights");
}

#[test]
fn alignment_checking() {
    let mut m = Machine::long_mode();
    m.change(|state| {
        state.cr0 |= cr0::AM;
        state.rflags_system |= Rflags::AC.bits();
        state.cpl = 3;
    });
    for _ in 0..2 {
        assert!(m.cpu.load::<u64>(DS, 0x5008).is_ok());
        assert!(m.cpu.load::<u8>(DS, 0x5001).is_ok());
        let faults = [
            m.cpu.load::<u64>(DS, 0x5004).map(|_| ()),
            m.cpu.load::<u16>(DS, 0x5fff).map(|_| ()),
            m.cpu.store::<u32>(DS, 0x5002, 0),
            m.cpu.update::<u32, _>(DS, 0x5002, |v| (v, ())),
            m.cpu.locked::<u32>(DS, 0x5001, Some).map(|_| ()),
        ];
        assert!(faults.iter().all(Result::is_err));
        let last = m.cpu.load::<u32>(DS, 0x5001);
        assert_eq!(m.exception(last), Exception::AC);
    }
    assert!(m.cpu.system_load::<u64>(0x5001).is_ok());
    m.change(|state| state.cpl = 0);
    assert!(m.cpu.load::<u64>(DS, 0x5004).is_ok());
}

#[test]
fn device_accesses_exit_in_pieces_and_are_replayed() {
    let mut m = Machine::long_mode();
    m.entry(PT + 5 * 8, 0x8000_0000 | PWU);
    let result = m.cpu.load::<u32>(DS, 0x5002);
    assert_eq!(m.exit(result), Exit::EptViolation(mmio(0x8000_0002, 4, None)));
    m.cpu.complete_read(0x1234_5678);
    assert_eq!(m.cpu.load::<u32>(DS, 0x5002), Ok(0x1234_5678));
    m.cpu.commit_bus();
    // 11 bytes: 8, 2, 1.
    let mut bytes = [0; 11];
    for (at, size, value) in [(0, 8, 0x0807_0605_0403_0201), (8, 2, 0x0a09), (10, 1, 0x0b)] {
        let result = m.cpu.read_bytes(DS, 0x5010, &mut bytes);
        assert_eq!(m.exit(result), Exit::EptViolation(mmio(0x8000_0010 + at, size, None)));
        m.cpu.complete_read(value);
        m.cpu.replay.cursor = 0;
    }
    assert!(m.cpu.read_bytes(DS, 0x5010, &mut bytes).is_ok());
    assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
    m.cpu.commit_bus();
    // A store that begins in memory and ends in a device: the device first.
    m.memory.write(0x4ffc, 0u32);
    let result = m.cpu.store::<u64>(DS, 0x4ffd, 0x8877_6655_4433_2211);
    assert_eq!(m.exit(result), Exit::EptViolation(mmio(0x8000_0000, 4, Some(0x7766_5544))));
    assert_eq!(m.memory.read::<u32>(0x4ffc), 0);
    m.cpu.complete_read(0);
    m.cpu.replay.cursor = 0;
    let result = m.cpu.store::<u64>(DS, 0x4ffd, 0x8877_6655_4433_2211);
    assert_eq!(m.exit(result), Exit::EptViolation(mmio(0x8000_0004, 1, Some(0x88))));
    m.cpu.complete_read(0);
    m.cpu.replay.cursor = 0;
    assert!(m.cpu.store::<u64>(DS, 0x4ffd, 0x8877_6655_4433_2211).is_ok());
    assert_eq!(m.memory.read::<u32>(0x4ffc), 0x3322_1100);
    m.cpu.commit_bus();
    // Read-modify-write.
    let result = m.cpu.update::<u16, _>(DS, 0x5000, |v| (v + 1, v));
    assert_eq!(m.exit(result), Exit::EptViolation(mmio(0x8000_0000, 2, None)));
    m.cpu.complete_read(7);
    m.cpu.replay.cursor = 0;
    let result = m.cpu.update::<u16, _>(DS, 0x5000, |v| (v + 1, v));
    assert_eq!(m.exit(result), Exit::EptViolation(mmio(0x8000_0000, 2, Some(8))));
    m.cpu.complete_read(0);
    m.cpu.replay.cursor = 0;
    assert_eq!(m.cpu.update::<u16, _>(DS, 0x5000, |v| (v + 1, v)), Ok(7));
    let result = m.cpu.fetch_page(0x5123);
    assert_eq!(m.exit(result), Exit::FetchFailed { gpa: 0x8000_0123 });
    assert_eq!(m.cpu.host_pointer(DS, 0x5000, 4, false), Ok(None));
    assert_eq!(m.cpu.chunk(DS, 0x5000, true), Ok(None));
}

#[test]
fn read_only_regions_read_as_memory_and_write_as_devices() {
    let mut m = Machine::new();
    let mut rom = m.memory.region();
    (rom.gpa, rom.size, rom.readonly) = (0x20_0000, 0x1000, true);
    m.cpu.ept.set_regions(vec![m.memory.region(), rom]);
    m.memory.write(8, 0x1234u16);
    for _ in 0..2 {
        assert_eq!(m.cpu.load::<u16>(DS, 0x20_0008), Ok(0x1234));
        let result = m.cpu.store::<u16>(DS, 0x20_0008, 0x5555);
        assert_eq!(m.exit(result), Exit::EptViolation(mmio(0x20_0008, 2, Some(0x5555))));
        m.cpu.replay.waiting = None;
    }
    assert!(m.cpu.host_pointer(DS, 0x20_0000, 16, false).is_ok_and(|p| p.is_some()));
    assert_eq!(m.cpu.host_pointer(DS, 0x20_0000, 16, true), Ok(None));
    assert!(m.cpu.fetch_page(0x20_0000).is_ok());
    let result = m.cpu.locked::<u16>(DS, 0x20_0008, |v| Some(v + 1));
    assert_eq!(m.exit(result), Exit::EptViolation(mmio(0x20_0008, 2, Some(0x1235))));
    assert_eq!(m.memory.read::<u16>(8), 0x1234);
}

#[test]
fn updates_and_locked_operations() {
    let mut m = Machine::long_mode();
    for lin in [0x5000, 0x5003, 0x503e, 0x5ffe] {
        m.cpu.store::<u32>(DS, lin, 40).unwrap();
        assert_eq!(m.cpu.update::<u32, _>(DS, lin, |v| (v + 1, v * 2)), Ok(80));
        assert_eq!(m.cpu.locked::<u32>(DS, lin, |v| Some(v + 1)), Ok(41));
        assert_eq!(m.cpu.locked::<u32>(DS, lin, |_| None), Ok(42));
        assert_eq!(m.cpu.system_locked::<u32>(lin, |v| Some(v + 1)), Ok(42));
        assert_eq!(m.cpu.load::<u32>(DS, lin), Ok(43));
    }
    assert!(m.cpu.locked_pointer::<u32>(DS, 0x503c).is_ok_and(|p| p.is_some()));
    assert!(m.cpu.locked_pointer::<u32>(DS, 0x503d).is_ok_and(|p| p.is_none()));
    m.entry(PT + 5 * 8, 0x5005);
    let result = m.cpu.locked::<u32>(DS, 0x5000, |_| None);
    assert_eq!(m.exception(result), Exception::pf(0x5000, 3));
    let result = m.cpu.update::<u32, _>(DS, 0x5000, |v| (v, ()));
    assert_eq!(m.exception(result), Exception::pf(0x5000, 3));
    let (old, new) = (7u128 << 64 | 9, 1u128 << 127);
    m.cpu.write_bytes(DS, 0x6010, &old.to_le_bytes()).unwrap();
    assert_eq!(m.cpu.locked_compare_exchange_16(DS, 0x6010, 1, new), Ok(old));
    assert_eq!(m.cpu.locked_compare_exchange_16(DS, 0x6010, old, new), Ok(old));
    assert_eq!(m.cpu.locked_compare_exchange_16(DS, 0x6010, old, 0), Ok(new));
}

#[test]
fn pointers_and_chunks_end_with_the_page() {
    let mut m = Machine::long_mode();
    m.entry(PT + 6 * 8, 0);
    for write in [false, true] {
        assert!(m.cpu.host_pointer(DS, 0x5ff0, 16, write).is_ok_and(|p| p.is_some()));
        let result = m.cpu.host_pointer(DS, 0x5ff1, 16, write);
        assert_eq!(m.exception(result), Exception::pf(0x6000, if write { 2 } else { 0 }));
        assert_eq!(m.cpu.chunk(DS, 0x5ff1, write).map(|c| c.map(|(_, len)| len)), Ok(Some(15)));
        let result = m.cpu.chunk(DS, 0x6010, write);
        assert_eq!(m.exception(result), Exception::pf(0x6010, if write { 2 } else { 0 }));
        let result = m.cpu.probe(Seg::Ss, 0x4000, 0x2001, write);
        assert_eq!(m.exception(result), Exception::pf(0x6000, if write { 2 } else { 0 }));
        assert!(m.cpu.probe(DS, 0x4000, 0x2000, write).is_ok());
    }
    assert_eq!(m.cpu.host_pointer(DS, 0x7ff8, 16, true), Ok(None));
}

#[test]
fn data_breakpoints_are_seen() {
    let mut m = Machine::long_mode();
    assert!(m.cpu.store::<u64>(DS, 0x5000, 0).is_ok());
    m.cpu.state.dr = [0x5006, 0x5010, 0x5020, 0x5030];
    // 0: write, 2 bytes; 1: access, 8 bytes; 2: execute; 3: write, 4 bytes, but not enabled.
    m.cpu.state.dr7 = 0x400 | 0b1_01_01 | 0b0101 << 16 | 0b1011 << 20 | 0b1101 << 28;
    m.cpu.debug_changed();
    for (lin, hits) in [
        (0x5000u64, 0u64),
        (0x5002, 0),
        (0x5003, 1),
        (0x5007, 1),
        (0x500d, 2),
        (0x5018, 0),
        (0x5020, 0),
        (0x5030, 0),
    ] {
        for _ in 0..2 {
            assert!(m.cpu.store::<u32>(DS, lin, 0).is_ok());
            assert_eq!(m.cpu.mmu.take_debug_hits(), hits, "{lin:#x}");
            assert!(m.cpu.load::<u32>(DS, lin).is_ok());
            assert_eq!(m.cpu.mmu.take_debug_hits(), hits & 2, "{lin:#x}");
        }
    }
    assert!(m.cpu.locked::<u64>(DS, 0x5000, Some).is_ok());
    assert_eq!(m.cpu.mmu.take_debug_hits(), 1);
    assert!(m.cpu.write_bytes(DS, 0x4ff0, &[0; 64]).is_ok());
    assert_eq!(m.cpu.mmu.take_debug_hits(), 3);
    assert_eq!(m.cpu.host_pointer(DS, 0x5000, 1, false), Ok(None));
    m.cpu.state.dr7 = 0x400;
    m.cpu.debug_changed();
    assert!(m.cpu.host_pointer(DS, 0x5000, 1, false).is_ok_and(|p| p.is_some()));
}

#[test]
fn own_writes_are_logged() {
    let mut m = Machine::long_mode();
    let ept = m.cpu.ept.clone();
    assert!(m.cpu.store::<u8>(DS, 0x5000, 1).is_ok());
    assert!(ept.set_dirty_log(0, true));
    m.cpu.mmu_requests(m.cpu.requests.get());
    assert!(m.cpu.load::<u8>(DS, 0x6000).is_ok());
    assert!(m.cpu.store::<u8>(DS, 0x5000, 1).is_ok());
    let mut log = ept.take_dirty(0).unwrap();
    assert_eq!(log[0], 1 << 5 | 1 << 4, "the page, and the table whose entry got its accessed flag");
    m.cpu.mmu_requests(m.cpu.requests.get());
    assert!(m.cpu.store::<u8>(DS, 0x5000, 1).is_ok());
    log = ept.take_dirty(0).unwrap();
    assert_eq!(log[0], 1 << 5);
    m.cpu.mmu_requests(m.cpu.requests.get());
    assert!(m.cpu.load::<u8>(DS, 0x5000).is_ok());
    assert_eq!(ept.take_dirty(0).unwrap()[0], 0);
}

#[test]
fn newly_written_pages_are_listed() {
    let mut m = Machine::long_mode();
    m.cpu.controls.page_modification_logging = true;
    let ept = m.cpu.ept.clone();
    assert!(ept.set_dirty_log(0, true));
    m.cpu.mmu_requests(m.cpu.requests.get());
    for _ in 0..2 {
        assert!(m.cpu.store::<u8>(DS, 0x5123, 1).is_ok() && m.cpu.store::<u8>(DS, 0x6000, 1).is_ok());
    }
    let mut listed = std::mem::take(&mut m.cpu.modified_pages);
    listed.sort_unstable();
    assert_eq!(listed, [0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000], "each once, and the tables");
    ept.clear_pages(&[0x5000]);
    m.cpu.mmu_requests(m.cpu.requests.get());
    assert!(m.cpu.store::<u8>(DS, 0x6000, 1).is_ok() && m.cpu.store::<u8>(DS, 0x5000, 1).is_ok());
    assert_eq!(m.cpu.modified_pages, [0x5000]);
}
