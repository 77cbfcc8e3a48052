//! Page walks: every format, its faults, and the flags that walks set.

use super::{Machine, NX, PD, PDPT, PML4, PT, PWU};
use crate::exception::Exception;
use crate::mmu::tlb::{Class, Leaf};
use crate::mmu::walk::{Access, Kind};
use crate::model::{Feature, Features};
use crate::state::{CpuState, cr0, cr4, efer};
use crate::vmx::Exit;

const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;

const P_: u32 = 1;
const W_: u32 = 2;
const U_: u32 = 4;
const RSVD: u32 = 8;
const I_: u32 = 16;
const PK: u32 = 32;

fn access(kind: Kind, class: Class) -> Access {
    Access { kind, class }
}
const READ: Access = Access { kind: Kind::Read, class: Class::Supervisor };
const WRITE: Access = Access { kind: Kind::Write, class: Class::Supervisor };

/// Walks and gives the guest-physical page, or the error code of the fault.
fn walk(machine: &mut Machine, lin: u64, access: Access) -> Result<Leaf, u32> {
    let result = machine.cpu.walk(lin, access);
    if let Ok(leaf) = result {
        return Ok(leaf);
    }
    let fault = machine.exception(result);
    assert_eq!((fault.vector, fault.payload), (14, lin));
    Err(fault.error_code.unwrap_or_default())
}

fn page(result: Result<Leaf, u32>) -> Result<u64, u32> {
    result.map(Leaf::page)
}

fn legacy(pse: bool) -> Machine {
    let mut machine = Machine::new();
    machine.change(|state| {
        state.cr3 = PML4 | 0x18;
        state.cr4 = if pse { cr4::PSE } else { 0 };
        state.cr0 |= cr0::PG;
    });
    machine
}

#[test]
fn two_levels_of_32_bit_entries() {
    let mut m = legacy(true);
    let lin = 0x0040_5678;
    assert_eq!(walk(&mut m, lin, READ), Err(0));
    m.memory.write::<u32>(PML4 + 4, PDPT as u32 | 7);
    assert_eq!(walk(&mut m, lin, access(Kind::Write, Class::User)), Err(W_ | U_));
    m.memory.write::<u32>(PDPT + 5 * 4, 0x9000 | 3);
    assert_eq!(page(walk(&mut m, lin, READ)), Ok(0x9000));
    assert_eq!(m.memory.read::<u32>(PML4 + 4), PDPT as u32 | 0x27);
    assert_eq!(m.memory.read::<u32>(PDPT + 20), 0x9023);
    assert_eq!(page(walk(&mut m, lin, WRITE)), Ok(0x9000));
    assert_eq!(m.memory.read::<u32>(PML4 + 4), PDPT as u32 | 0x27, "no dirty flag above the last level");
    assert_eq!(m.memory.read::<u32>(PDPT + 20), 0x9063);
    assert_eq!(walk(&mut m, lin, access(Kind::Read, Class::User)), Err(P_ | U_));
    // Without NX and SMEP a fetch is not told apart.
    assert_eq!(walk(&mut m, lin, access(Kind::Execute, Class::User)), Err(P_ | U_));
}

#[test]
fn four_megabyte_pages_and_pse_36() {
    let mut m = legacy(true);
    m.cpu.features = Features::new(m.cpu.features.set(), 40);
    let lin = 0x0076_5432;
    m.memory.write::<u32>(PML4 + 4, 0x1240_0000 | 0x45 << 13 | PS as u32 | 3);
    let high = 0x45u64 << 32;
    assert_eq!(page(walk(&mut m, lin, WRITE)), Ok(high | 0x1276_5000));
    assert_eq!(m.memory.read::<u32>(PML4 + 4) & 0x60, 0x60);
    assert!(walk(&mut m, lin, READ).is_ok_and(|leaf| leaf.has(Leaf::LARGE)));
    // Bit 21 is reserved; with fewer address bits so are the upper ones of 20:13.
    m.memory.write::<u32>(PML4 + 4, 1 << 21 | PS as u32 | 3);
    assert_eq!(walk(&mut m, lin, READ), Err(P_ | RSVD));
    m.cpu.features = Features::new(m.cpu.features.set(), 36);
    for (bit, expected) in
        [(13, Ok((1u64 << 32) | 0x36_5000)), (16, Ok((1 << 35) | 0x36_5000)), (17, Err(P_ | RSVD))]
    {
        m.memory.write::<u32>(PML4 + 4, 1 << bit | PS as u32 | 3);
        assert_eq!(page(walk(&mut m, lin, READ)), expected);
    }
    // Without CR4.PSE the bit is ignored.
    let mut m = legacy(false);
    m.memory.write::<u32>(PML4 + 4, PDPT as u32 | PS as u32 | 3);
    m.memory.write::<u32>(PDPT + 0x365 * 4, 0x7003);
    assert_eq!(page(walk(&mut m, lin, READ)), Ok(0x7000));
}

fn pae() -> Machine {
    let mut m = Machine::new();
    m.change(|state| {
        state.cr4 = cr4::PAE;
        state.cr0 |= cr0::PG | cr0::WP;
        state.efer = efer::NXE;
    });
    m
}

#[test]
fn pae_pdptes_are_loaded_and_checked() {
    let mut m = pae();
    let table = PML4 + 0x20;
    for (value, ok) in [
        (PD | 1, true),
        (PD | 1 | 0xe18, true),
        (PD | 3, false),
        (PD | 5, false),
        (PD | 1 | 1 << 5, false),
        (PD | 1 | 1 << 8, false),
        (PD | 1 | 1 << 46, false),
        (PD | 1 | NX, false),
        (PD | 0x1e6 | NX, true),
    ] {
        m.cpu.state.pdptr = [9; 4];
        m.memory.write(table + 8, value);
        let result = m.cpu.load_pdptrs(table);
        if ok {
            assert_eq!((result, m.cpu.state.pdptr), (Ok(()), [0, value, 0, 0]));
        } else {
            assert_eq!(m.exception(result), Exception::gp(0), "{value:#x}");
            assert_eq!(m.cpu.state.pdptr, [9; 4]);
        }
    }
}

#[test]
fn pae_walks() {
    let mut m = pae();
    let lin = 0x4020_3004;
    assert_eq!(walk(&mut m, lin, READ), Err(0));
    m.cpu.state.pdptr = [0, PD | 1, 0, 0];
    assert_eq!(walk(&mut m, lin, READ), Err(0));
    m.memory.write(PD + 8, PT | PWU);
    m.memory.write(PT + 24, 0x8000 | PWU);
    assert_eq!(page(walk(&mut m, lin, WRITE)), Ok(0x8000));
    assert_eq!(m.memory.read::<u64>(PD + 8), PT | PWU | A);
    assert_eq!(m.memory.read::<u64>(PT + 24), 0x8000 | PWU | A | D);
    // Unlike with four levels, bits 62:52 are reserved.
    for (bit, code) in [(46, P_ | RSVD), (52, P_ | RSVD), (59, P_ | RSVD), (62, P_ | RSVD)] {
        m.memory.write(PT + 24, 0x8000 | PWU | 1 << bit);
        assert_eq!(walk(&mut m, lin, READ), Err(code), "bit {bit}");
    }
    m.memory.write(PT + 24, 0x8000 | PWU | NX);
    assert_eq!(page(walk(&mut m, lin, READ)), Ok(0x8000));
    assert_eq!(walk(&mut m, lin, access(Kind::Execute, Class::User)), Err(P_ | U_ | I_));
    // 2 MiB.
    m.memory.write(PD + 8, 0x20_0000 | PS | PWU);
    assert_eq!(page(walk(&mut m, lin, WRITE)), Ok(0x20_3000));
    assert_eq!(m.memory.read::<u64>(PD + 8), 0x20_0000 | PS | PWU | A | D);
    m.memory.write(PD + 8, 0x20_0000 | 1 << 13 | PS | PWU);
    assert_eq!(walk(&mut m, lin, READ), Err(P_ | RSVD));
}

#[test]
fn four_levels() {
    let mut m = Machine::long_mode();
    assert_eq!(page(walk(&mut m, 0x5123, READ)), Ok(0x5000));
    for table in [PML4, PDPT, PD] {
        assert_eq!(m.memory.read::<u64>(table) & (A | D), A);
    }
    assert_eq!(m.memory.read::<u64>(PT + 40) & (A | D), A);
    let written = walk(&mut m, 0x5123, WRITE);
    assert!(written.is_ok_and(|leaf| leaf.has(Leaf::DIRTY) && !leaf.has(Leaf::LARGE)));
    assert_eq!(m.memory.read::<u64>(PT + 40) & (A | D), A | D);
    for level in [PT + 48, PD, PDPT, PML4] {
        let kept = m.memory.read::<u64>(level);
        m.memory.write(level, kept & !1);
        assert_eq!(walk(&mut m, 0x6000, WRITE), Err(W_));
        m.memory.write(level, kept);
    }
}

#[test]
fn a_walk_that_faults_sets_no_flags() {
    let mut m = Machine::long_mode();
    m.memory.write(PT + 40, 0x5005u64);
    assert_eq!(walk(&mut m, 0x5000, WRITE), Err(P_ | W_));
    for entry in [PML4, PDPT, PD, PT + 40] {
        assert_eq!(m.memory.read::<u64>(entry) & (A | D), 0);
    }
}

#[test]
fn large_pages_of_four_level_paging() {
    let mut m = Machine::long_mode();
    let lin = 0x1234_5678;
    m.memory.write(PD + 0x91 * 8, 0x60_0000 | 1 << 12 | PS | G | PWU);
    let leaf = walk(&mut m, lin, WRITE);
    assert_eq!(page(leaf), Ok(0x74_5000));
    assert!(leaf.is_ok_and(|l| l.has(Leaf::LARGE | Leaf::GLOBAL) && !l.has(Leaf::HUGE)));
    m.memory.write(PDPT, 0x4000_0000 | 1 << 12 | PS | PWU);
    let leaf = walk(&mut m, lin, READ);
    assert_eq!(page(leaf), Ok(0x5234_5000));
    assert!(leaf.is_ok_and(|l| l.has(Leaf::LARGE | Leaf::HUGE)));
    m.cpu.features =
        Features::new(m.cpu.features.set().iter().filter(|f| *f != Feature::Pdpe1gb).collect(), 46);
    assert_eq!(walk(&mut m, lin, READ), Err(P_ | RSVD));
}

#[test]
fn reserved_bits_of_four_level_paging() {
    // Entry, what it holds besides, the bit to set, whether that is reserved.
    for (entry, base, bit, reserved) in [
        (PML4, PDPT, 7, true),
        (PML4, PDPT, 46, true),
        (PML4, PDPT, 51, true),
        (PML4, PDPT, 52, false),
        (PML4, PDPT, 62, false),
        (PDPT, PD, 46, true),
        (PDPT, PD, 58, false),
        (PDPT, PS, 12, false),
        (PDPT, PS, 13, true),
        (PDPT, PS, 29, true),
        (PDPT, PS, 30, false),
        (PD, PT, 51, true),
        (PD, PS, 12, false),
        (PD, PS, 13, true),
        (PD, PS, 20, true),
        (PD, PS, 21, false),
        (PT, 0, 7, false),
        (PT, 0, 45, false),
        (PT, 0, 51, true),
        (PT, 0, 52, false),
        (PT, 0, 62, false),
    ] {
        let mut m = Machine::long_mode();
        m.memory.write(entry, base | PWU | 1 << bit);
        let result = walk(&mut m, 0, access(Kind::Read, Class::User)).map(|_| ());
        let expected = if reserved { Err(P_ | U_ | RSVD) } else { Ok(()) };
        assert_eq!(result, expected, "{entry:#x} bit {bit}");
    }
}

#[test]
fn the_nx_bit_is_reserved_without_nxe() {
    for table in [PML4, PDPT, PD, PT] {
        let mut m = Machine::long_mode();
        let value = m.memory.read::<u64>(table);
        m.entry(table, value | NX);
        assert_eq!(walk(&mut m, 0, access(Kind::Execute, Class::User)), Err(P_ | U_ | I_));
        assert!(walk(&mut m, 0, READ).is_ok());
        m.change(|state| state.efer &= !efer::NXE);
        assert_eq!(walk(&mut m, 0, READ), Err(P_ | RSVD));
        assert_eq!(walk(&mut m, 0, access(Kind::Execute, Class::User)), Err(P_ | U_ | RSVD));
    }
}

#[test]
fn five_levels() {
    let mut m = Machine::long_mode();
    m.change(|state| {
        state.cr4 |= cr4::LA57;
        state.cr3 = 0x5000;
    });
    let lin = 0x00ab_0000_0000_7000 & !(0x1ff << 39);
    let index = (lin >> 48) & 511;
    assert_eq!(walk(&mut m, lin, READ), Err(0));
    m.memory.write(0x5000 + index * 8, PML4 | PWU);
    assert_eq!(page(walk(&mut m, lin, READ)), Ok(0x7000));
    assert_eq!(m.memory.read::<u64>(0x5000 + index * 8), PML4 | PWU | A);
    m.memory.write(0x5000 + index * 8, PML4 | PS | PWU);
    assert_eq!(walk(&mut m, lin, READ), Err(P_ | RSVD));
}

/// Sets the page at 0x5000 and asks for it with every kind of access.
#[test]
fn rights() {
    use Kind::{Execute, Read, Write};
    let smep = |state: &mut CpuState| state.cr4 |= cr4::SMEP;
    let smap = |state: &mut CpuState| state.cr4 |= cr4::SMAP;
    let no_wp = |state: &mut CpuState| state.cr0 &= !cr0::WP;
    let plain = |_: &mut CpuState| {};
    type Setup = fn(&mut CpuState);
    let (user, kernel) = (5, 1);
    type Row = (u64, Setup, Kind, Class, Result<(), u32>);
    let table: &[Row] = &[
        (user, plain, Read, Class::User, Ok(())),
        (user, plain, Write, Class::User, Err(P_ | W_ | U_)),
        (user | 2, plain, Write, Class::User, Ok(())),
        (user, plain, Execute, Class::User, Ok(())),
        (user | NX, plain, Execute, Class::User, Err(P_ | U_ | I_)),
        (kernel, plain, Read, Class::User, Err(P_ | U_)),
        (kernel | 2, plain, Write, Class::User, Err(P_ | U_ | W_)),
        (kernel, plain, Execute, Class::User, Err(P_ | U_ | I_)),
        (kernel, plain, Read, Class::Supervisor, Ok(())),
        (kernel, plain, Write, Class::Supervisor, Err(P_ | W_)),
        (kernel, no_wp, Write, Class::Supervisor, Ok(())),
        (user, no_wp, Write, Class::User, Err(P_ | W_ | U_)),
        (kernel | NX, plain, Execute, Class::Supervisor, Err(P_ | I_)),
        (user, plain, Execute, Class::Supervisor, Ok(())),
        (user, smep, Execute, Class::Supervisor, Err(P_ | I_)),
        (user, smep, Execute, Class::User, Ok(())),
        (user, smep, Read, Class::Supervisor, Ok(())),
        (kernel, smep, Execute, Class::Supervisor, Ok(())),
        (user, smap, Read, Class::Supervisor, Err(P_)),
        (user | 2, smap, Write, Class::Supervisor, Err(P_ | W_)),
        (user | 2, smap, Write, Class::Override, Ok(())),
        (user, smap, Write, Class::Override, Err(P_ | W_)),
        (user, smap, Read, Class::User, Ok(())),
        (user, smap, Execute, Class::Supervisor, Ok(())),
        (kernel, smap, Read, Class::Supervisor, Ok(())),
    ];
    for (i, &(bits, setup, kind, class, expected)) in table.iter().enumerate() {
        // The right is taken away at the last level, then at an upper one.
        for at in [PT + 40, PD, PML4] {
            let mut m = Machine::long_mode();
            m.change(setup);
            let address = m.memory.read::<u64>(at) & !PWU;
            m.memory.write(at, address | bits);
            assert_eq!(walk(&mut m, 0x5000, access(kind, class)).map(|_| ()), expected, "row {i} at {at:#x}");
        }
    }
}

#[test]
fn protection_keys() {
    use Kind::{Execute, Read, Write};
    let key = 5u64;
    let (access_disable, write_disable) = (1u32 << 10, 2u32 << 10);
    for (i, (pkru, bits, kind, class, wp, expected)) in [
        (0, PWU, Write, Class::User, true, Ok(())),
        (access_disable, PWU, Read, Class::User, true, Err(P_ | U_ | PK)),
        (access_disable, PWU, Write, Class::User, true, Err(P_ | U_ | W_ | PK)),
        (access_disable, PWU, Execute, Class::User, true, Ok(())),
        (access_disable, PWU, Read, Class::Supervisor, true, Err(P_ | PK)),
        (access_disable, 3, Read, Class::Supervisor, true, Ok(())),
        (access_disable, 3, Read, Class::User, true, Err(P_ | U_)),
        (write_disable, PWU, Read, Class::User, true, Ok(())),
        (write_disable, PWU, Write, Class::User, true, Err(P_ | U_ | W_ | PK)),
        (write_disable, PWU, Write, Class::User, false, Err(P_ | U_ | W_ | PK)),
        (write_disable, PWU, Write, Class::Supervisor, true, Err(P_ | W_ | PK)),
        (write_disable, PWU, Write, Class::Supervisor, false, Ok(())),
        (write_disable, 5, Write, Class::User, true, Err(P_ | U_ | W_ | PK)),
        (!(3 << 10), PWU, Write, Class::User, true, Ok(())),
    ]
    .into_iter()
    .enumerate()
    {
        let mut m = Machine::long_mode();
        m.change(|state| {
            state.cr4 |= cr4::PKE;
            state.pkru = pkru;
            state.cr0 = if wp { state.cr0 } else { state.cr0 & !cr0::WP };
        });
        m.memory.write(PT + 40, 0x5000 | key << 59 | bits);
        let result = walk(&mut m, 0x5000, access(kind, class)).map(|_| ());
        assert_eq!(result, expected, "row {i}");
        m.change(|state| state.cr4 &= !cr4::PKE);
        assert!(!matches!(walk(&mut m, 0x5000, access(kind, class)), Err(code) if code & PK != 0));
    }
}

#[test]
fn no_paging_is_the_identity_with_all_rights() {
    let mut m = Machine::new();
    m.change(|state| state.cr4 |= cr4::SMAP | cr4::SMEP);
    for kind in [Kind::Read, Kind::Write, Kind::Execute] {
        for class in [Class::User, Class::Supervisor] {
            assert_eq!(page(walk(&mut m, 0xfff_f123, access(kind, class))), Ok(0xfff_f000));
        }
    }
    assert!(m.cpu.load::<u32>(crate::state::Seg::Ds, 0x100).is_ok());
    assert!(m.cpu.fetch_page(0x100).is_ok());
}

#[test]
fn tables_that_no_memory_backs_are_not_walked() {
    let mut m = Machine::long_mode();
    m.memory.write(PD, 0x8000_0000 | PWU);
    let result = m.cpu.walk(0x3000, WRITE);
    assert_eq!(m.exit(result), Exit::FetchFailed { gpa: 0x8000_0018 });
}

#[test]
fn tables_in_read_only_memory_keep_their_flags() {
    let m = Machine::long_mode();
    let (memory, mut region) = (m.memory, m.cpu.ept.find(0).unwrap_or_else(|| unreachable!()));
    region.readonly = true;
    let ept = std::sync::Arc::new(crate::mmu::ept::Ept::new());
    ept.set_regions(vec![region]);
    let mut m = Machine::with(ept, memory);
    m.enter_long_mode();
    assert_eq!(page(walk(&mut m, 0x3000, WRITE)), Ok(0x3000));
    assert_eq!(m.memory.read::<u64>(PT + 24), 0x3000 | PWU);
}

#[test]
fn translate_touches_nothing() {
    let mut m = Machine::long_mode();
    assert_eq!(m.cpu.translate(0x5123), Some((0x5123, true, true)));
    assert_eq!(m.memory.read::<u64>(PT + 40), 0x5000 | PWU);
    m.memory.write(PT + 40, 0x7001u64);
    assert_eq!(m.cpu.translate(0x5123), Some((0x7123, false, false)));
    m.memory.write(PT + 40, 0u64);
    assert_eq!(m.cpu.translate(0x5123), None);
    m.memory.write(PD, 0x8000_0000 | PWU);
    assert_eq!(m.cpu.translate(0x5123), None);
}
