//! Several CPUs: code that others write, locked operations, exclusive sections, changes of the map.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{Machine, Memory, PT, PWU};
use crate::cpu::{Cpu, Pending, Requests};
use crate::mmu::ept::Ept;
use crate::state::Seg;

const DS: Seg = Seg::Ds;
const CODE: u64 = 0x5000;
const NOP_RET: u16 = 0xc390;

/// What the engine does between blocks.
fn boundary(cpu: &mut Cpu) {
    if cpu.requests.any() {
        let bits = cpu.requests.take(Requests::FLUSH | Requests::MAIL | Requests::EXCLUSIVE);
        cpu.mmu_requests(bits);
    }
}

/// Length of the instruction at `lin`, as the CPU would execute it.
fn decoded(cpu: &mut Cpu, lin: u64) -> u8 {
    cpu.state.rip = lin;
    cpu.find_block(false).unwrap().ops()[0].length
}

/// Two CPUs on the same memory, in flat protected mode.
fn pair() -> (Machine, Machine) {
    let memory = Arc::new(Memory::new(0x10_0000));
    let ept = Arc::new(Ept::new());
    ept.set_regions(vec![memory.region()]);
    (Machine::with(ept.clone(), memory.clone()), Machine::with(ept, memory))
}

#[test]
fn own_stores_to_code_are_noticed() {
    let mut m = Machine::new();
    m.memory.write(CODE, NOP_RET);
    assert!(m.cpu.store::<u8>(DS, CODE + 0x800, 1).is_ok(), "a write permission from before");
    assert_eq!(decoded(&mut m.cpu, CODE), 1);
    assert_eq!(m.cpu.host_pointer(DS, CODE, 1, true), Ok(None));
    assert!(m.cpu.store::<u8>(DS, CODE + 2, 0).is_ok());
    assert_eq!((decoded(&mut m.cpu, CODE), m.cpu.counters.blocks_decoded), (1, 1), "next to the block");
    assert!(m.cpu.store::<u16>(DS, CODE, 0x9066).is_ok());
    assert_eq!(m.cpu.counters.blocks_invalidated, 1);
    assert_eq!(decoded(&mut m.cpu, CODE), 2);
    for write in [
        (|cpu| cpu.locked::<u8>(DS, CODE, |_| Some(0x66)).map(|_| ())) as fn(&mut Cpu) -> _,
        |cpu| cpu.write_bytes(DS, CODE - 8, &[0x66; 12]),
        |cpu| cpu.update::<u32, _>(DS, CODE, |v| (v ^ 0xf6, ())),
        |cpu| cpu.system_store(CODE, 0xc390_9066_6666_6666u64),
        |cpu| cpu.system_locked::<u16>(CODE, |_| Some(0x6666)).map(|_| ()),
        |cpu| cpu.locked_compare_exchange_16(DS, CODE, 0xc390, 1).map(|_| ()),
    ] {
        m.memory.write(CODE, 0xc390u64);
        m.cpu.code.clear();
        assert_eq!(decoded(&mut m.cpu, CODE), 1);
        let before = m.cpu.counters.blocks_invalidated;
        assert!(write(&mut m.cpu).is_ok());
        assert_eq!(m.cpu.counters.blocks_invalidated, before + 1);
    }
}

#[test]
fn a_page_that_holds_no_code_any_more_is_fast_again() {
    let mut m = Machine::new();
    m.memory.write(CODE, NOP_RET);
    decoded(&mut m.cpu, CODE);
    for _ in 0..2 {
        assert!(m.cpu.store::<u16>(DS, CODE, 0).is_ok());
    }
    assert!(m.cpu.host_pointer(DS, CODE, 1, true).is_ok_and(|p| p.is_some()));
    m.memory.write(CODE, NOP_RET);
    decoded(&mut m.cpu, CODE);
    assert_eq!(m.cpu.host_pointer(DS, CODE, 1, true), Ok(None), "and slow when code is there again");
}

#[test]
fn stores_beside_code_that_does_not_run_become_fast() {
    let (mut a, mut b) = pair();
    a.memory.write(CODE, NOP_RET);
    decoded(&mut a.cpu, CODE);
    decoded(&mut b.cpu, CODE);
    for _ in 0..100 {
        b.cpu.store::<u64>(DS, CODE + 0x800, 1).unwrap();
        boundary(&mut a.cpu);
    }
    assert!(b.cpu.mmu.tlb.write_hit(CODE, 1).is_some());
    // Code that does run is decoded again, and the next time patience is longer.
    for cpu in [&mut a.cpu, &mut b.cpu] {
        assert_eq!(decoded(cpu, CODE), 1);
        assert_eq!(cpu.counters.blocks_decoded, 2);
    }
    boundary(&mut b.cpu);
    for _ in 0..100 {
        b.cpu.store::<u64>(DS, CODE + 0x800, 1).unwrap();
        boundary(&mut a.cpu);
    }
    assert!(b.cpu.mmu.tlb.write_hit(CODE, 1).is_none());
}

#[test]
fn a_replayed_instruction_lets_the_world_stop() {
    let (mut a, b) = pair();
    // The lock goes to a device: its read is made, its write is not yet.
    let result = a.cpu.locked::<u32>(DS, 0x8000_0000, |v| Some(v + 1));
    assert!(matches!(a.exit(result), crate::vmx::Exit::EptViolation(access) if access.write.is_none()));
    a.cpu.complete_read(7);
    a.cpu.replay.cursor = 0;
    a.cpu.mmu_enter();
    let ept = a.cpu.ept.clone();
    let stopper = thread::spawn(move || ept.set_regions(vec![]));
    while a.cpu.requests.get() & Requests::EXCLUSIVE == 0 {
        thread::yield_now();
    }
    let result = a.cpu.locked::<u32>(DS, 0x8000_0000, |v| Some(v + 1));
    assert!(result.is_err() && a.cpu.pending == Pending::Retry);
    stopper.join().unwrap();
    a.cpu.replay.cursor = 0;
    let result = a.cpu.locked::<u32>(DS, 0x8000_0000, |v| Some(v + 1));
    assert!(matches!(a.exit(result), crate::vmx::Exit::EptViolation(access) if access.write == Some(8)));
    a.cpu.mmu_leave();
    drop(b);
}

#[test]
fn another_cpu_writes_code() {
    let (mut a, mut b) = pair();
    a.memory.write(CODE, NOP_RET);
    assert!(b.cpu.store::<u8>(DS, CODE + 0x800, 1).is_ok());
    assert_eq!(decoded(&mut a.cpu, CODE), 1);
    // B still has its permission, so A must look at each use.
    assert!(b.cpu.mmu.tlb.write_hit(CODE, 1).is_some());
    b.cpu.store::<u16>(DS, CODE, 0x9066).unwrap();
    assert_eq!(decoded(&mut a.cpu, CODE), 2);
    b.cpu.store::<u16>(DS, CODE, NOP_RET).unwrap();
    assert_eq!(decoded(&mut a.cpu, CODE), 1);
    boundary(&mut b.cpu);
    assert!(b.cpu.mmu.tlb.write_hit(CODE, 1).is_none());
    boundary(&mut a.cpu);
    assert_eq!(decoded(&mut a.cpu, CODE), 1);
    // Now A need not look; it is told.
    a.memory.write(CODE, 0x9066u16);
    assert_eq!(decoded(&mut a.cpu, CODE), 1, "behind our back, within an epoch");
    a.memory.write(CODE, NOP_RET);
    b.cpu.store::<u16>(DS, CODE, 0x9066).unwrap();
    assert!(a.cpu.requests.get() & Requests::MAIL != 0);
    boundary(&mut a.cpu);
    assert_eq!(decoded(&mut a.cpu, CODE), 2);
    // When A has no code there any more, B becomes fast again.
    for _ in 0..2 {
        b.cpu.store::<u16>(DS, CODE, 0).unwrap();
        boundary(&mut a.cpu);
    }
    b.cpu.store::<u16>(DS, CODE, 0).unwrap();
    assert!(b.cpu.mmu.tlb.write_hit(CODE, 1).is_some());
}

#[test]
fn many_writes_become_one_message() {
    let (mut a, mut b) = pair();
    a.memory.write(CODE, NOP_RET);
    a.memory.write(CODE + 0x1000, NOP_RET);
    decoded(&mut a.cpu, CODE);
    decoded(&mut a.cpu, CODE + 0x1000);
    for i in 0..5000u64 {
        b.cpu.store::<u8>(DS, CODE + 2 + i % 4000, 0x90).unwrap();
    }
    b.cpu.store::<u16>(DS, CODE + 0x1000, 0x9066).unwrap();
    boundary(&mut a.cpu);
    assert_eq!(decoded(&mut a.cpu, CODE + 0x1000), 2);
}

#[test]
fn a_cpu_that_is_gone_holds_nothing_up() {
    let (mut a, mut b) = pair();
    a.memory.write(CODE, NOP_RET);
    decoded(&mut b.cpu, CODE);
    b.cpu.store::<u16>(DS, CODE + 0x1000, NOP_RET).unwrap();
    drop(b);
    decoded(&mut a.cpu, CODE + 0x1000);
    boundary(&mut a.cpu);
    a.memory.write(CODE + 0x1000, 0x9066u16);
    assert_eq!(decoded(&mut a.cpu, CODE + 0x1000), 1, "stable at once: nobody else can write");
    for _ in 0..2 {
        a.cpu.store::<u8>(DS, CODE, 0).unwrap();
    }
    assert!(a.cpu.mmu.tlb.write_hit(CODE, 1).is_some());
}

#[test]
fn more_cpus_than_bits() {
    let memory = Arc::new(Memory::new(0x10_0000));
    let ept = Arc::new(Ept::new());
    ept.set_regions(vec![memory.region()]);
    let mut all: Vec<Machine> = (0..66).map(|_| Machine::with(ept.clone(), memory.clone())).collect();
    memory.write(CODE, NOP_RET);
    for i in [0, 63, 65] {
        all[i].cpu.store::<u8>(DS, CODE + 0x800, 1).unwrap();
    }
    assert_eq!(decoded(&mut all[64].cpu, CODE), 1);
    for i in [65, 63, 0] {
        for (value, length) in [(0x9066, 2), (NOP_RET, 1)] {
            all[i].cpu.store::<u16>(DS, CODE, value).unwrap();
            boundary(&mut all[64].cpu);
            assert_eq!(decoded(&mut all[64].cpu, CODE), length);
        }
        boundary(&mut all[i].cpu);
        assert!(all[i].cpu.mmu.tlb.write_hit(CODE, 1).is_none());
        for (value, length) in [(0x9066, 2), (NOP_RET, 1)] {
            all[i].cpu.store::<u16>(DS, CODE, value).unwrap();
            boundary(&mut all[64].cpu);
            assert_eq!(decoded(&mut all[64].cpu, CODE), length);
        }
    }
}

/// Runs `work` in guest mode on a thread of its own.
fn spawn<R: Send + 'static>(
    mut machine: Machine,
    work: impl FnOnce(&mut Cpu) -> R + Send + 'static,
) -> thread::JoinHandle<(Machine, R)> {
    thread::spawn(move || {
        machine.cpu.mmu_enter();
        let result = work(&mut machine.cpu);
        machine.cpu.mmu_leave();
        (machine, result)
    })
}

#[test]
fn cross_modified_code_is_executed_once_its_flag_is_seen() {
    const ROUNDS: u64 = 3000;
    const FLAG: u64 = 0x8000;
    const ACK: u64 = 0x9000;
    // An instruction of 1 to 7 bytes, different from one round to the next.
    let length = |round: u64| (round % 7 + 1) as u8;
    let bytes = move |round: u64| {
        let nop = 8 * (u64::from(length(round)) - 1);
        (0x0066_6666_6666_6666 & !(u64::MAX << nop)) | 0xc390 << nop
    };
    let (a, b) = pair();
    let reader = spawn(a, move |cpu| {
        for round in 1..=ROUNDS {
            while cpu.load::<u64>(DS, FLAG) != Ok(round) {
                boundary(cpu);
                thread::yield_now();
            }
            boundary(cpu);
            assert_eq!(decoded(cpu, CODE), length(round), "round {round}");
            cpu.store::<u64>(DS, ACK, round).unwrap();
        }
    });
    let writer = spawn(b, move |cpu| {
        for round in 1..=ROUNDS {
            cpu.store::<u64>(DS, CODE, bytes(round)).unwrap();
            cpu.store::<u64>(DS, FLAG, round).unwrap();
            while cpu.load::<u64>(DS, ACK) != Ok(round) {
                // Mail is read late now and then, as by a CPU in a long block.
                if round % 3 != 0 {
                    boundary(cpu);
                }
                thread::yield_now();
            }
        }
    });
    reader.join().unwrap();
    writer.join().unwrap();
}

#[test]
fn locked_operations_are_atomic_between_cpus() {
    const ROUNDS: u64 = 2000;
    // Within a line, across lines, across pages; the page at 0x6000 holds code.
    let places = [0x5008u64, 0x503e, 0x5ffd, 0x6ff8];
    let (mut a, b) = pair();
    a.memory.write(0x6100, NOP_RET);
    decoded(&mut a.cpu, 0x6100);
    let memory = a.memory.clone();
    let threads = [a, b].map(|machine| {
        spawn(machine, move |cpu| {
            for _ in 0..ROUNDS {
                for lin in places {
                    while let Err(abort) = cpu.locked::<u32>(DS, lin, |v| Some(v.wrapping_add(1))) {
                        assert_eq!(cpu.pending, Pending::Retry, "{abort:?}");
                        boundary(cpu);
                    }
                }
                boundary(cpu);
            }
        })
    });
    let _keep: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    for lin in places {
        assert_eq!(memory.read::<u32>(lin), 2 * ROUNDS as u32, "{lin:#x}");
    }
}

#[test]
fn sixteen_bytes_are_swapped_atomically() {
    const ROUNDS: u32 = 5000;
    let (a, b) = pair();
    let memory = a.memory.clone();
    let threads = [a, b].map(|machine| {
        spawn(machine, move |cpu| {
            let mut expected = 0;
            for _ in 0..ROUNDS {
                loop {
                    let new = expected + (1 | 1 << 64);
                    let old = cpu.locked_compare_exchange_16(DS, 0x5010, expected, new).unwrap();
                    if old == expected {
                        break;
                    }
                    expected = old;
                }
                boundary(cpu);
            }
        })
    });
    let _keep: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    assert_eq!(memory.read::<u64>(0x5010), u64::from(2 * ROUNDS));
    assert_eq!(memory.read::<u64>(0x5018), u64::from(2 * ROUNDS));
}

#[test]
fn a_removed_region_is_used_no_more() {
    let (a, b) = pair();
    let ept = a.cpu.ept.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let memories = [Memory::new(0x1000), Memory::new(0x1000)];
    let region = |memory: &Memory| crate::mmu::ept::Region { gpa: 0x20_0000, ..memory.region() };
    let whole = a.memory.region();
    ept.set_regions(vec![whole, region(&memories[0])]);
    let threads = [a, b].map(|machine| {
        let stop = stop.clone();
        spawn(machine, move |cpu| {
            let mut seen = 0u64;
            while !stop.load(Ordering::Relaxed) {
                seen += u64::from(cpu.load::<u32>(DS, 0x20_0010) == Ok(0xdead));
                boundary(cpu);
                // Out and in again.
                if seen == u64::MAX {
                    cpu.mmu_leave();
                    cpu.mmu_enter();
                }
            }
            seen
        })
    });
    for round in 0..300 {
        let (old, new) = (&memories[round % 2], &memories[(round + 1) % 2]);
        new.write(0x10, 0u32);
        ept.set_regions(vec![whole, region(new)]);
        old.write(0x10, 0xdeadu32);
    }
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        assert_eq!(thread.join().unwrap().1, 0);
    }
}

#[test]
fn no_logged_write_is_lost() {
    const ROUNDS: u64 = 20_000;
    let (a, b) = pair();
    let (ept, memory) = (a.cpu.ept.clone(), a.memory.clone());
    assert!(ept.set_dirty_log(0, true));
    let threads = [(a, 0x8000u64), (b, 0x8008)].map(|(machine, lin)| {
        spawn(machine, move |cpu| {
            for round in 1..=ROUNDS {
                cpu.store::<u64>(DS, lin, round).unwrap();
                boundary(cpu);
            }
        })
    });
    // A copy that is renewed whenever the log says so is up to date in the end.
    let mut copy = (0, 0);
    loop {
        let finished = threads.iter().all(|t| t.is_finished());
        if ept.take_dirty(0).unwrap()[0] & (1 << 8) != 0 {
            copy = (memory.read::<u64>(0x8000), memory.read::<u64>(0x8008));
        }
        if finished {
            break;
        }
    }
    assert_eq!(copy, (ROUNDS, ROUNDS));
}

#[test]
fn an_exclusive_section_has_everybody_else_at_a_boundary() {
    const ROUNDS: u64 = 300;
    let (a, b) = pair();
    let ept = a.cpu.ept.clone();
    let memory = a.memory.clone();
    let threads = [a, b].map(|machine| {
        spawn(machine, move |cpu| {
            let mut done = 0;
            while done < ROUNDS {
                let result = cpu.exclusive(|cpu| {
                    let value = cpu.load::<u64>(DS, 0x8000)?;
                    thread::yield_now();
                    cpu.store::<u64>(DS, 0x8000, value + 1)
                });
                done += u64::from(result.is_ok());
                boundary(cpu);
            }
        })
    });
    // A thread that is no CPU takes part.
    for _ in 0..ROUNDS {
        ept.world.stop(|_| {
            let value = memory.read::<u64>(0x8000);
            thread::yield_now();
            memory.write(0x8000, value + 1);
        });
    }
    let _keep: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    assert_eq!(memory.read::<u64>(0x8000), 3 * ROUNDS);
}

#[test]
fn a_new_mapping_of_a_page_revalidates_its_code() {
    let mut m = Machine::long_mode();
    m.memory.write(CODE, NOP_RET);
    assert_eq!(decoded(&mut m.cpu, CODE), 1);
    // A device writes the page, and then the guest maps it somewhere else.
    m.memory.write(CODE, 0x9066u16);
    m.memory.write(PT + 0x50 * 8, CODE | PWU);
    assert_eq!(decoded(&mut m.cpu, 0x5_0000), 2);
}

#[test]
fn a_flushed_code_page_is_looked_up_again() {
    let mut m = Machine::long_mode();
    m.memory.write(CODE, NOP_RET);
    m.memory.write(0x6000, 0x9066u16);
    assert_eq!(decoded(&mut m.cpu, CODE), 1);
    m.memory.write(PT + 5 * 8, 0x6000 | PWU);
    assert_eq!(decoded(&mut m.cpu, CODE), 1, "not flushed yet");
    m.cpu.flush_page(CODE);
    assert_eq!(decoded(&mut m.cpu, CODE), 2);
}
