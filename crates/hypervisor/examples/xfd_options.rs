//! What a host kernel pays to keep a guest's AMX tiles, by how it treats IA32_XFD (`ring3.xfd`): a table.
//! `cargo run --release -p hypervisor --example xfd_options`. The guest leaves guest mode 100,000 times, by CPUID; after each hundredth
//! time its thread is preempted, after each thousandth a softirq uses the FPU.

use hypervisor::permissions::Beneficiary;
use hypervisor::{HostParams, System, VcpuExit};
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use silicon::model::CpuModel;

const CODE: u64 = 0x8000;
const TABLES: u64 = 0x1000;
const CONFIG: u64 = 0x9000;
const MEMORY: usize = 2 << 20;
const ROUNDS: u32 = 100_000;

/// XCR0 with AMX; a configuration, and one tile that is not zero.
const USE_TILES: &[u8] = &[
    0x31, 0xc9, 0xb8, 0x07, 0x00, 0x06, 0x00, 0x31, 0xd2, 0x0f, 0x01, 0xd1, // xsetbv
    0xc4, 0xe2, 0x78, 0x49, 0x04, 0x25, 0x00, 0x90, 0, 0, // ldtilecfg [CONFIG]
    0xba, 64, 0, 0, 0, 0xbe, 0x00, 0x80, 0, 0, // mov edx, 64; mov esi, CODE
    0xc4, 0xe2, 0x7b, 0x4b, 0x04, 0x16, // tileloadd tmm0, [rsi + rdx]
];
/// TILERELEASE.
const RELEASE: &[u8] = &[0xc4, 0xe2, 0x78, 0x49, 0xc0];
/// IA32_XFD := 1 << 18, as Linux has it for tasks without tiles.
const DISARM: &[u8] = &[0xb9, 0xc4, 0x01, 0, 0, 0xb8, 0, 0, 4, 0, 0x31, 0xd2, 0x0f, 0x30];
/// mov edi, ROUNDS; 1: xor eax, eax; cpuid; dec edi; jnz 1b; hlt
const EXITS: &[u8] = &[0xbf, 0xa0, 0x86, 0x01, 0x00, 0x31, 0xc0, 0x0f, 0xa2, 0xff, 0xcf, 0x75, 0xf8, 0xf4];

/// Runs a guest on a host with `option`; what the host kernel did for one exit.
fn measure(option: &str, program: &[&[u8]]) -> Result<[f64; 4], Box<dyn std::error::Error>> {
    let host =
        HostParams::parse(&format!("ring3.xfd={option} ring3.preempt_exits=100 ring3.softirq_exits=1000"))?;
    let system = System::new(CpuModel::parse("sapphire-rapids")?, host);
    system.permissions().request_all(Beneficiary::Guests);
    let vm = system.create_vm()?;
    let memory = vec![0u8; MEMORY + 4096];
    vm.set_user_memory_region(kvm_userspace_memory_region {
        memory_size: MEMORY as u64,
        userspace_addr: (memory.as_ptr() as u64).next_multiple_of(4096),
        ..Default::default()
    })?;
    let tables = [(TABLES, TABLES + 0x1003), (TABLES + 0x1000, TABLES + 0x2003), (TABLES + 0x2000, 0x83)];
    for (at, entry) in tables {
        vm.memory().write(at, &entry.to_le_bytes());
    }
    vm.memory().write(CODE, &program.concat());
    let mut config = [0u8; 64];
    (config[0], config[16], config[48]) = (1, 64, 16);
    vm.memory().write(CONFIG, &config);
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&system.supported_cpuid())?;
    let mut sregs = vcpu.sregs();
    (sregs.cs.base, sregs.cs.selector, sregs.cs.limit) = (0, 8, u32::MAX);
    (sregs.cs.l, sregs.cs.db, sregs.cs.g, sregs.cs.type_) = (1, 0, 1, 11);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0031, TABLES, 1 << 18 | 1 << 9 | 1 << 5, 0x500);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: CODE, rsp: 0x7_0000, rflags: 2, ..Default::default() });
    let exit = vcpu.run()?;
    if exit != VcpuExit::Hlt {
        return Err(format!("unexpected exit {exit:?}").into());
    }
    Ok(vcpu.host_fpu_costs().map(|(_, count)| count as f64 / f64::from(ROUNDS)))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let guests: [(&str, &[&[u8]]); 3] = [
        ("tiles in use, XFD = 0", &[USE_TILES, EXITS]),
        ("tiles in use, XFD set", &[USE_TILES, DISARM, EXITS]),
        ("tiles released, XFD set", &[USE_TILES, RELEASE, DISARM, EXITS]),
    ];
    println!("For one exit:\n");
    println!("| guest | ring3.xfd | XSAVES | XRSTORS | XFD reads | XFD writes |");
    println!("| --- | --- | ---: | ---: | ---: | ---: |");
    for (name, program) in guests {
        for option in ["native", "upstream", "option1", "option2"] {
            let [saves, restores, reads, writes] = measure(option, program)?;
            println!("| {name} | {option} | {saves:.3} | {restores:.3} | {reads:.3} | {writes:.3} |");
        }
    }
    Ok(())
}
