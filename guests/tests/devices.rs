//! A guest program that talks with devices: each access is reported exactly once, in order, in its own size.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use guests::machine::{self, Access, Devices, Space};
use guests::{Program, machine::Report};
use hypervisor::Vm;
use silicon::model::CpuModel;

/// Far more than any program takes on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(300);
/// Where the registers of `asm/bus.S` are.
const REGISTERS: u64 = 0xd000_0000;

fn passes(program: Program, devices: &dyn Devices) {
    let model = CpuModel::parse("sapphire-rapids").expect("a model");
    let report = machine::run_with(program.image, program.cpus, model, PATIENCE, devices).unwrap();
    let Report { console, status, stopped, .. } = report;
    let good = status == Some(0) && console == "PASS\n";
    assert!(good, "asm/{}.S: {console} {}", program.name, stopped.unwrap_or_default());
}

/// A page of registers that keep what is written, a port that counts its reads, and a log of it all.
#[derive(Default)]
struct Recorder(Mutex<Recording>);

#[derive(Default)]
struct Recording {
    registers: Vec<u8>,
    port_reads: u64,
    log: Vec<Access>,
}

impl Devices for Recorder {
    fn access(&self, _: &Vm, access: Access) -> u64 {
        let mut recording = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        recording.registers.resize(4096 + 8, 0);
        recording.log.push(access);
        let size = usize::from(access.size);
        match (access.space, access.write) {
            (Space::Port, Some(_)) => 0,
            (Space::Port, None) => {
                recording.port_reads += 1;
                0x4030_2010 + recording.port_reads
            }
            (Space::Memory, write) => {
                let at = (access.address & 0xfff) as usize;
                let register = &mut recording.registers[at..at + size];
                if let Some(value) = write {
                    register.copy_from_slice(&value.to_le_bytes()[..size]);
                }
                let mut value = [0; 8];
                value[..size].copy_from_slice(register);
                u64::from_le_bytes(value)
            }
        }
    }
}

fn port(size: u8, write: Option<u64>) -> Access {
    Access { space: Space::Port, address: 0x500, size, write }
}

fn read(offset: u64, size: u8) -> Access {
    Access { space: Space::Memory, address: REGISTERS + offset, size, write: None }
}

fn write(offset: u64, size: u8, value: u64) -> Access {
    Access { write: Some(value), ..read(offset, size) }
}

/// What `asm/bus.S` does to its ports, in its order.
fn expected_ports() -> Vec<Access> {
    let mut log = Vec::new();
    for (size, value) in [(1, 0x78), (2, 0x5678), (4, 0x1234_5678)] {
        log.extend([port(size, Some(value)), port(size, None)]);
    }
    log.extend([0x11, 0x22, 0x33].map(|value| port(1, Some(value))));
    log.extend([0x2211, 0x4433].map(|value| port(2, Some(value))));
    log.extend([0x4433_2211, 0x8877_6655].map(|value| port(4, Some(value))));
    // Downwards.
    log.extend([0x33, 0x22, 0x11].map(|value| port(1, Some(value))));
    log.extend([port(1, None); 3]);
    log.extend([port(2, None); 2]);
    log.extend([port(4, None); 2]);
    // INS and OUTS at the end of what is mapped: the fault comes before the access of the element that does not fit.
    log.extend([port(4, None); 2]);
    log.extend([port(1, Some(0xa1)), port(1, Some(0xa2))]);
    log
}

/// What `asm/bus.S` does to its registers, in its order.
fn expected_registers() -> Vec<Access> {
    vec![
        write(0, 1, 0x88),
        write(2, 2, 0x7788),
        write(4, 4, 0x5566_7788),
        write(8, 8, 0x1122_3344_5566_7788),
        read(0, 1),
        read(2, 2),
        read(4, 4),
        read(8, 8),
        read(8, 1),
        read(8, 2),
        // Read-modify-write: LOCK INC, ADD, XCHG, XADD, CMPXCHG that exchanges, BTS.
        read(4, 4),
        write(4, 4, 0x5566_7789),
        read(4, 4),
        write(4, 4, 0x5566_7799),
        read(4, 4),
        write(4, 4, 1),
        read(4, 4),
        write(4, 4, 6),
        read(4, 4),
        write(4, 4, 9),
        read(4, 4),
        write(4, 4, 0x10_0009),
        // CMP and TEST only read.
        read(4, 4),
        read(4, 4),
        // POP to and PUSH from a register.
        write(16, 8, 0x77),
        read(16, 8),
        // REP STOSD, REP LODSW, REP MOVSD between registers, MOVSQ to memory.
        write(32, 4, 0xabcd_ef01),
        write(36, 4, 0xabcd_ef01),
        read(32, 2),
        read(34, 2),
        read(32, 4),
        write(64, 4, 0xabcd_ef01),
        read(36, 4),
        write(68, 4, 0xabcd_ef01),
        read(64, 8),
    ]
}

#[test]
fn every_access_is_reported_once_and_in_order() {
    let recorder = Recorder::default();
    passes(guests::BUS, &recorder);
    let log = recorder.0.into_inner().unwrap_or_else(PoisonError::into_inner).log;
    let (ports, registers): (Vec<_>, Vec<_>) =
        log.into_iter().partition(|access| access.space == Space::Port);
    assert_eq!(ports, expected_ports());
    assert_eq!(registers, expected_registers());
}
