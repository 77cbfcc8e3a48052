//! A CPU with its TLB and one that forgets everything before each access must never differ, whatever page tables,
//! modes and address spaces a guest goes through, as long as it flushes what it changes.

use super::{Machine, Memory, NX, PWU};
use crate::cpu::Pending;
use crate::flags::Rflags;
use crate::mmu::ept::Ept;
use crate::state::{Seg, cr0, cr4};
use std::sync::Arc;

const DS: Seg = Seg::Ds;
/// Address spaces, with PCID 1 and up; the tables of each are 16 pages apart.
const SPACES: u64 = 3;
/// Pages of the private range (first 2 MiB) and of the shared range (third 2 MiB) that are used.
const PAGES: u64 = 10;
const SHARED_PT: u64 = 0x5_0000;
/// Where data pages begin.
const DATA: u64 = 0x8_0000;
/// What a large page maps.
const LARGE: u64 = 0x20_0000;
const G: u64 = 1 << 8;
const PS: u64 = 1 << 7;

fn table(space: u64, level: u64) -> u64 {
    0x1_0000 + space * 0x1_0000 + level * 0x1000
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A step that both CPUs make.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Write a private entry of an address space, and flush.
    Private {
        space: u64,
        page: u64,
        value: u64,
    },
    /// Write a shared entry, and flush.
    Shared {
        page: u64,
        value: u64,
    },
    /// Map the second 2 MiB as one page, or through the private table once more, and flush.
    Large {
        space: u64,
        value: u64,
    },
    Switch {
        space: u64,
        preserve: bool,
    },
    Mode {
        cpl: u8,
        ac: bool,
    },
    Rights {
        wp: bool,
        smap: bool,
        smep: bool,
        pke: bool,
        pkru: u32,
    },
    Access {
        lin: u64,
        what: u64,
        value: u64,
    },
}

fn entry(random: &mut Random) -> u64 {
    let rights = if random.one_in(2) { PWU } else { random.below(8) };
    let mut value = (DATA + random.below(64) * 0x1000) | rights;
    if !random.one_in(8) {
        value |= 1;
    }
    if random.one_in(4) {
        value |= NX;
    }
    value | random.below(4) << 59
}

fn step(random: &mut Random) -> Step {
    let space = random.below(SPACES);
    match random.below(200) {
        0..3 => Step::Private { space, page: random.below(PAGES), value: entry(random) },
        3 => Step::Shared { page: random.below(PAGES), value: entry(random) | (random.below(2) * G) },
        4 => {
            let large = LARGE | PS | 1 | random.below(4) << 1;
            Step::Large { space, value: if random.one_in(2) { table(space, 3) | PWU } else { large } }
        }
        5 | 6 => Step::Switch { space, preserve: random.one_in(2) },
        7 | 8 => Step::Mode { cpl: random.below(2) as u8 * 3, ac: random.one_in(2) },
        9 => Step::Rights {
            wp: random.one_in(2),
            smap: random.one_in(2),
            smep: random.one_in(2),
            pke: random.one_in(2),
            pkru: random.below(256) as u32,
        },
        _ => {
            let page = random.below(3) * 0x200 + random.below(PAGES);
            let offset = if random.one_in(8) { 0xff0 + random.below(16) } else { random.below(0xfc0) };
            Step::Access { lin: page * 0x1000 + offset, what: random.below(16), value: random.below(1 << 31) }
        }
    }
}

/// Makes a step; what the guest sees of it.
fn perform(m: &mut Machine, step: Step) -> Result<u64, Pending> {
    let flush = |m: &mut Machine, space: u64, lin: u64| {
        if m.cpu.state.cr3 & 0xfff == space + 1 {
            m.cpu.flush_page(lin);
        } else {
            m.cpu.flush_page_in(space as u16 + 1, lin);
        }
    };
    match step {
        Step::Private { space, page, value } => {
            m.memory.write(table(space, 3) + page * 8, value);
            flush(m, space, page * 0x1000 + 5);
            if m.memory.read::<u64>(table(space, 2) + 8) & PS == 0 {
                flush(m, space, 0x20_0000 + page * 0x1000);
            }
        }
        Step::Shared { page, value } => {
            let old = m.memory.read::<u64>(SHARED_PT + page * 8);
            m.memory.write(SHARED_PT + page * 8, value);
            m.cpu.flush_page(0x40_0000 + page * 0x1000);
            if old & G == 0 {
                m.cpu.flush_all(true);
            }
        }
        Step::Large { space, value } => {
            m.memory.write(table(space, 2) + 8, value);
            m.cpu.flush_all(false);
        }
        Step::Switch { space, preserve } => {
            m.cpu.state.cr3 = table(space, 0) | (space + 1);
            m.cpu.cr3_loaded(preserve);
        }
        Step::Mode { cpl, ac } => {
            m.cpu.state.cpl = cpl;
            m.cpu.state.rflags_system =
                m.cpu.state.rflags_system & !Rflags::AC.bits() | (u64::from(ac) * Rflags::AC.bits());
            m.cpu.mode_changed();
        }
        Step::Rights { wp, smap, smep, pke, pkru } => {
            let state = &mut m.cpu.state;
            let with = |word: u64, bit: u64, on: bool| if on { word | bit } else { word & !bit };
            state.cr0 = with(state.cr0, cr0::WP, wp);
            state.cr4 = with(with(with(state.cr4, cr4::SMAP, smap), cr4::SMEP, smep), cr4::PKE, pke);
            state.pkru = pkru;
            m.cpu.paging_changed();
            m.cpu.pkru_changed();
        }
        Step::Access { lin, what, value } => return access(m, lin, what, value),
    }
    Ok(0)
}

fn access(m: &mut Machine, lin: u64, what: u64, value: u64) -> Result<u64, Pending> {
    let cpu = &mut m.cpu;
    let mut bytes = [value as u8; 60];
    let result = match what {
        0 => cpu.load::<u8>(DS, lin).map(u64::from),
        1 => cpu.load::<u16>(DS, lin).map(u64::from),
        2 => cpu.load::<u32>(DS, lin).map(u64::from),
        3 => cpu.load::<u64>(DS, lin),
        4 => cpu.store::<u8>(DS, lin, value as u8).map(|()| 0),
        5 => cpu.store::<u16>(DS, lin, value as u16).map(|()| 0),
        6 => cpu.store::<u32>(DS, lin, value as u32).map(|()| 0),
        7 => cpu.store::<u64>(DS, lin, value).map(|()| 0),
        8 => cpu.update::<u32, _>(DS, lin, |v| (v ^ value as u32, u64::from(v))),
        9 => cpu.locked::<u64>(DS, lin, |v| Some(v.wrapping_add(value))),
        10 => cpu.read_bytes(DS, lin, &mut bytes).map(|()| bytes.iter().map(|b| u64::from(*b)).sum()),
        11 => cpu.write_bytes(DS, lin, &bytes).map(|()| 0),
        12 => cpu.system_load::<u64>(lin),
        13 => cpu.system_store::<u32>(lin, value as u32).map(|()| 0),
        14 => cpu.probe(DS, lin, 60, value & 1 != 0).map(|()| 0),
        _ => cpu.fetch_page(lin).map(|page| page.gfn),
    };
    result.map_err(|_| std::mem::replace(&mut cpu.pending, Pending::None))
}

fn machine() -> Machine {
    let memory = Arc::new(Memory::new(0x40_0000));
    let ept = Arc::new(Ept::new());
    ept.set_regions(vec![memory.region()]);
    let mut m = Machine::with(ept, memory);
    m.enter_long_mode();
    for space in 0..SPACES {
        for level in 0..3 {
            m.memory.write(table(space, level), table(space, level + 1) | PWU);
        }
        m.memory.write(table(space, 2) + 16, SHARED_PT | PWU);
    }
    m.change(|state| {
        state.cr4 |= cr4::PCIDE;
        state.cr3 = table(0, 0) | 1;
    });
    m
}

#[test]
fn a_tlb_makes_no_difference() {
    for seed in 1..=4 {
        let mut random = Random(seed * 0x9e37_79b9);
        let (mut cached, mut plain) = (machine(), machine());
        for count in 0..12_000 {
            let step = step(&mut random);
            plain.cpu.flush_all(false);
            plain.cpu.mmu.tlb.clear_first_level();
            let expected = perform(&mut plain, step);
            assert_eq!(perform(&mut cached, step), expected, "seed {seed}, step {count}: {step:x?}");
        }
        for page in 0..64 {
            for word in (0..0x1000).step_by(8) {
                let at = DATA + page * 0x1000 + word;
                assert_eq!(cached.memory.read::<u64>(at), plain.memory.read::<u64>(at));
            }
        }
        let (walks, all) = (cached.cpu.counters.page_walks, plain.cpu.counters.page_walks);
        assert!(walks * 10 < all * 9, "the TLB did serve: {walks} of {all}");
    }
}
