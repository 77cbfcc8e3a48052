//! AMX as clients see it, by the numbers of its test plan: permission (A1, A2), IA32_XFD (A3), room for tiles (A4, A5, A9), what the host
//! kernel does with them (A7, A8, T8), what is saved and restored (P6), and the rest of P2 to P5.
#![expect(unsafe_code, reason = "addresses of fields of kvm_run")]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hypervisor::permissions::Beneficiary;
use hypervisor::{HostParams, System, Vm};
use kvm_bindings::*;
use silicon::model::CpuModel;

use crate::capability::{check_extension, enable};
use crate::ioctl::{IOCTLS, ioctl};
use crate::ring3::RING3_CAP_LIVE_XSTATE;
use crate::run::field;
use crate::{Argument, Created, Errno, Object, Reply};

/// Where things are in the guest's memory, which is one page of 2 MiB that is mapped to itself.
const TABLES: u64 = 0x1000;
const IDT: u64 = 0x4000;
const HANDLER: u64 = 0x7000;
const CODE: u64 = 0x8000;
const CONFIG: u64 = 0x9000;
const TILE: u64 = 0xa000;
const STORED: u64 = 0xb000;
const MEMORY: usize = 2 << 20;
/// IA32_XFD, and XTILEDATA.
const XFD: u32 = 0x1c4;
const TILEDATA: u64 = 1 << 18;
/// KVM_CAP_XSAVE2 with tiles.
const AREA: usize = 11008;

/// `xor ecx, ecx; mov eax, 0x60007; xor edx, edx; xsetbv`
const ENABLE: &[u8] = &[0x31, 0xc9, 0xb8, 0x07, 0x00, 0x06, 0x00, 0x31, 0xd2, 0x0f, 0x01, 0xd1];
/// `mov ecx, 0x1c4; mov eax, 1 << 18; xor edx, edx; wrmsr`
const DISARM: &[u8] = &[0xb9, 0xc4, 0x01, 0, 0, 0xb8, 0, 0, 4, 0, 0x31, 0xd2, 0x0f, 0x30];
/// The same with 0.
const ARM: &[u8] = &[0xb9, 0xc4, 0x01, 0, 0, 0xb8, 0, 0, 0, 0, 0x31, 0xd2, 0x0f, 0x30];
/// `ldtilecfg [CONFIG]; mov edx, 64; mov esi, TILE; tileloadd tmm0, [rsi + rdx]`
const LOAD: &[u8] = &[
    0xc4, 0xe2, 0x78, 0x49, 0x04, 0x25, 0x00, 0x90, 0, 0, 0xba, 64, 0, 0, 0, 0xbe, 0x00, 0xa0, 0, 0, 0xc4,
    0xe2, 0x7b, 0x4b, 0x04, 0x16,
];
/// `mov edx, 64; mov edi, STORED; tilestored [rdi + rdx], tmm0`
const STORE: &[u8] = &[0xba, 64, 0, 0, 0, 0xbf, 0x00, 0xb0, 0, 0, 0xc4, 0xe2, 0x7a, 0x4b, 0x04, 0x17];
/// `out 0x10, al`
const OUT: &[u8] = &[0xe6, 0x10];
const HLT: &[u8] = &[0xf4];

fn system() -> Arc<System> {
    System::new(CpuModel::parse("sapphire-rapids").unwrap(), HostParams::default())
}

/// A process that has asked for tiles for its guests.
fn permitted() -> Arc<System> {
    permitted_on("")
}

/// The same on a host kernel with these parameters.
fn permitted_on(host: &str) -> Arc<System> {
    let host = HostParams::parse(host).unwrap();
    let system = System::new(CpuModel::parse("sapphire-rapids").unwrap(), host);
    system.permissions().request(Beneficiary::Guests, 18).unwrap();
    system
}

/// A vCPU in 64-bit mode.
struct Guest {
    vcpu: Object,
    vm: Arc<Vm>,
    memory: Vec<u8>,
}

impl Guest {
    /// On `system`, with all that its guests may have.
    fn new(system: &Arc<System>, program: &[&[u8]]) -> Guest {
        let guest = Guest::without_cpuid(system, program);
        guest.set_cpuid(&system.supported_cpuid()).unwrap();
        guest
    }

    fn without_cpuid(system: &Arc<System>, program: &[&[u8]]) -> Guest {
        let vm = system.create_vm().unwrap();
        let memory = vec![0u8; MEMORY + 4096];
        let userspace_addr = (memory.as_ptr() as u64 + 4095) & !4095;
        let memory_size = MEMORY as u64;
        let slot = kvm_userspace_memory_region { memory_size, userspace_addr, ..Default::default() };
        vm.set_user_memory_region(slot).unwrap();
        let write = |at: u64, bytes: &[u8]| assert!(vm.memory().write(at, bytes));
        write(TABLES, &(TABLES + 0x1003).to_le_bytes());
        write(TABLES + 0x1000, &(TABLES + 0x2003).to_le_bytes());
        write(TABLES + 0x2000, &0x83u64.to_le_bytes());
        // #GP: a 64-bit interrupt gate. Its handler writes to another port.
        write(IDT + 13 * 16, &(0x8e00_0008_0000 | HANDLER).to_le_bytes());
        write(HANDLER, &[0xe6, 0x11]);
        write(CODE, &program.concat());
        // Palette 1, tile 0 of 16 rows of 64 bytes.
        let mut config = [0u8; 64];
        (config[0], config[16], config[48]) = (1, 64, 16);
        write(CONFIG, &config);
        write(TILE, &pattern());
        let Created { object: vcpu, .. } = Created::vcpu(vm.create_vcpu(0).unwrap()).unwrap();
        let guest = Guest { vcpu, vm, memory };
        guest.enter_long_mode();
        guest
    }

    fn enter_long_mode(&self) {
        let mut sregs = kvm_sregs::default();
        self.call("KVM_GET_SREGS", &mut sregs).unwrap();
        (sregs.cs.base, sregs.cs.selector, sregs.cs.limit) = (0, 8, u32::MAX);
        (sregs.cs.l, sregs.cs.db, sregs.cs.g, sregs.cs.type_) = (1, 0, 1, 11);
        (sregs.idt.base, sregs.idt.limit) = (IDT, 14 * 16 - 1);
        (sregs.gdt.base, sregs.gdt.limit) = (0x800, 15);
        assert!(self.vm.memory().write(0x808, &0x00af_9b00_0000_ffffu64.to_le_bytes()));
        // PE, NE, ET, PG; PAE, OSXSAVE; LME, LMA.
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) =
            (0x8000_0031, TABLES, 1 << 18 | 1 << 9 | 1 << 5, 0x500);
        self.call("KVM_SET_SREGS", &mut sregs).unwrap();
        let mut regs = kvm_regs { rip: CODE, rsp: 0x7_0000, rflags: 2, ..Default::default() };
        self.call("KVM_SET_REGS", &mut regs).unwrap();
    }

    fn value(&self, name: &str, argument: u64) -> Result<(), Errno> {
        let row = IOCTLS.iter().find(|row| row.name == name && row.handler.takes(&self.vcpu)).unwrap();
        ioctl(&self.vcpu, row.number(), Argument(argument))
            .map(|reply| assert!(matches!(reply, Reply::Value(0))))
    }

    fn call<T: ?Sized>(&self, name: &str, argument: &mut T) -> Result<(), Errno> {
        self.value(name, std::ptr::from_mut(argument).cast::<u8>() as u64)
    }

    fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<(), Errno> {
        let mut table = vec![0u32; 2 + 10 * entries.len()];
        table[0] = entries.len() as u32;
        for (place, e) in table[2..].chunks_exact_mut(10).zip(entries) {
            place.copy_from_slice(&[e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx, 0, 0, 0]);
        }
        self.call("KVM_SET_CPUID2", table.as_mut_slice())
    }

    /// KVM_RUN; the exit reason.
    fn run(&self) -> Result<u32, Errno> {
        self.value("KVM_RUN", 0)?;
        let Object::Vcpu(vcpu) = &self.vcpu else { unreachable!() };
        Ok(vcpu.run.get(field!(vcpu.run, exit_reason)))
    }

    /// The port of KVM_EXIT_IO.
    fn port(&self) -> u16 {
        let Object::Vcpu(vcpu) = &self.vcpu else { unreachable!() };
        vcpu.run.get(field!(vcpu.run, __bindgen_anon_1.io.port))
    }

    fn rip(&self) -> u64 {
        let mut regs = kvm_regs::default();
        self.call("KVM_GET_REGS", &mut regs).unwrap();
        regs.rip
    }

    fn xcr0(&self) -> u64 {
        let mut xcrs = kvm_xcrs::default();
        self.call("KVM_GET_XCRS", &mut xcrs).unwrap();
        xcrs.xcrs[0].value
    }

    fn refuse_tiles(&self, refused: bool) {
        let Object::Vcpu(vcpu) = &self.vcpu else { unreachable!() };
        vcpu.lock().cpu_mut().refuse_tile_data(refused);
    }

    /// Exits for IA32_XFD, and bytes of memory that tiles take.
    fn stats(&self) -> (u64, u64) {
        let Object::Vcpu(vcpu) = &self.vcpu else { unreachable!() };
        let stats = &vcpu.handle.stats;
        (stats.xfd_exits.load(Ordering::Relaxed), stats.tile_bytes.load(Ordering::Relaxed))
    }

    fn xsave2(&self) -> Vec<u8> {
        let mut area = vec![0; AREA];
        self.call("KVM_GET_XSAVE2", area.as_mut_slice()).unwrap();
        area
    }

    fn stored(&self) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        assert!(self.vm.memory().read(STORED, &mut bytes));
        bytes
    }
}

fn pattern() -> Vec<u8> {
    (0..1024u32).map(|i| (i * 7 + i / 256) as u8 | 1).collect()
}

fn xstate_bv(area: &[u8]) -> u64 {
    u64::from_le_bytes(area[512..520].try_into().unwrap())
}

/// The CPUID table of a process that has permission.
fn table_with_tiles() -> Vec<kvm_cpuid_entry2> {
    permitted().supported_cpuid()
}

fn leaf_0d(table: &[kvm_cpuid_entry2], subleaf: u32) -> Option<&kvm_cpuid_entry2> {
    table.iter().find(|e| (e.function, e.index) == (0xd, subleaf))
}

#[test]
fn amx_a1_what_may_be_offered_follows_the_permission() {
    let system = system();
    let before = system.supported_cpuid();
    let table = table_with_tiles();
    let sizes = |table: &[kvm_cpuid_entry2]| leaf_0d(table, 0).map(|e| (e.eax >> 17, e.ecx));
    assert_eq!((sizes(&before), sizes(&table)), (Some((0, 2696)), Some((3, 11008))));
    for subleaf in [17, 18] {
        assert!(leaf_0d(&before, subleaf).is_none() && leaf_0d(&table, subleaf).is_some());
    }
    // The kernel tells of the rest in any case.
    for table in [&before, &table] {
        let bits = table.iter().find(|e| (e.function, e.index) == (7, 0)).unwrap().edx;
        assert_eq!(bits >> 24 & 1, 1);
        assert_eq!(leaf_0d(table, 1).unwrap().eax >> 4 & 1, 1, "XFD");
    }
    let vm = system.create_vm().unwrap();
    assert!(system.msr_index_list().contains(&XFD));
    drop(vm);
}

#[test]
fn amx_p2_a_table_without_permission_is_refused_and_changes_nothing() {
    let system = system();
    let guest = Guest::without_cpuid(&system, &[ENABLE, OUT, HLT]);
    let allowed = system.supported_cpuid();
    assert_eq!(guest.set_cpuid(&allowed), Ok(()));
    assert_eq!(guest.set_cpuid(&table_with_tiles()), Err(Errno(libc::EPERM)));
    let mut table = vec![0u32; 2 + 10 * 256];
    table[0] = 256;
    guest.call("KVM_GET_CPUID2", table.as_mut_slice()).unwrap();
    assert_eq!(table[0] as usize, allowed.len(), "what was set before");
    assert_eq!(
        system.permissions().request(Beneficiary::Guests, 18).map_err(|e| e.errno()),
        Err(libc::EBUSY)
    );
    assert_eq!(guest.set_cpuid(&allowed), Ok(()));
    assert_eq!(guest.run(), Ok(KVM_EXIT_IO));
    assert_eq!((guest.port(), guest.xcr0()), (0x11, 1), "XSETBV is #GP");
}

/// Leaf 7 alone, which the kernel gives without permission, does not bring tiles.
#[test]
fn amx_a2_tiles_need_their_components() {
    let guest = Guest::new(&system(), &[ENABLE, OUT, HLT]);
    assert_eq!(guest.run(), Ok(KVM_EXIT_IO));
    assert_eq!((guest.port(), guest.xcr0()), (0x11, 1));
    let guest = Guest::new(&permitted(), &[ENABLE, LOAD, STORE, OUT, HLT]);
    assert_eq!(guest.run(), Ok(KVM_EXIT_IO));
    assert_eq!((guest.port(), guest.stored()), (0x10, pattern()));
}

#[test]
fn amx_p3_the_size_follows_the_permission() {
    let system = system();
    let check = || check_extension(&system, None, KVM_CAP_XSAVE2.into());
    assert_eq!(check(), 4096);
    system.permissions().request(Beneficiary::Guests, 18).unwrap();
    assert_eq!(check(), AREA as i32);
    let vm = system.create_vm().unwrap();
    assert_eq!(check_extension(&system, Some(&vm), KVM_CAP_XSAVE2.into()), AREA as i32);
}

#[test]
fn amx_p4_the_old_call_is_refused_once_a_vcpu_has_more() {
    let system = permitted();
    let guest = Guest::without_cpuid(&system, &[HLT]);
    let mut area = vec![0u8; AREA];
    assert_eq!(guest.call("KVM_GET_XSAVE", area.as_mut_slice()), Ok(()));
    // Tiles that the vCPU does not have.
    area[512 + 2] = 4;
    assert_eq!(guest.call("KVM_SET_XSAVE", area.as_mut_slice()), Err(Errno::INVALID));
    guest.set_cpuid(&system.supported_cpuid()).unwrap();
    assert_eq!(guest.call("KVM_GET_XSAVE", area.as_mut_slice()), Err(Errno::INVALID));
    assert_eq!(guest.call("KVM_GET_XSAVE2", area.as_mut_slice()), Ok(()));
    // For good, as in the kernel.
    let table: Vec<_> = system.supported_cpuid().into_iter().filter(|e| e.function != 0xd).collect();
    guest.set_cpuid(&table).unwrap();
    assert_eq!(guest.call("KVM_GET_XSAVE", area.as_mut_slice()), Err(Errno::INVALID));
}

/// A4: whichever of both comes last needs the room; and A9: a vCPU without a use for tiles has no memory for them.
#[test]
fn amx_a4_room_is_made_when_both_registers_let_tiles_be_used() {
    let system = permitted();
    let guest = Guest::new(&system, &[DISARM, ENABLE, OUT, ARM, OUT, LOAD, STORE, HLT]);
    assert_eq!((guest.run(), guest.stats()), (Ok(KVM_EXIT_IO), (1, 0)));
    assert_eq!((guest.run(), guest.stats()), (Ok(KVM_EXIT_IO), (2, 8192)));
    assert_eq!((guest.run(), guest.stored()), (Ok(KVM_EXIT_HLT), pattern()));
    // A6: after reset IA32_XFD is 0, and XSETBV is what comes last.
    let guest = Guest::new(&system, &[ENABLE, OUT, LOAD, STORE, HLT]);
    assert_eq!((guest.run(), guest.stats()), (Ok(KVM_EXIT_IO), (0, 8192)));
    assert_eq!((guest.run(), guest.stored()), (Ok(KVM_EXIT_HLT), pattern()));
}

/// A3, T13: from then on IA32_XFD is the guest's.
#[test]
fn amx_a3_there_are_no_exits_for_the_register_once_it_is_needed() {
    // mov ebx, 50000; 1: (DISARM, rdmsr, ARM, rdmsr); dec ebx; jnz 1b
    let body = [DISARM, &[0x0f, 0x32], ARM, &[0x0f, 0x32]].concat();
    let back = -(body.len() as i64 + 4) as u8;
    let rounds = [&[0xbb, 0x50, 0xc3, 0, 0], &body[..], &[0xff, 0xcb, 0x75, back]].concat();
    let guest = Guest::new(&permitted(), &[&rounds[..], OUT, ENABLE, &rounds, OUT]);
    assert_eq!((guest.run(), guest.stats()), (Ok(KVM_EXIT_IO), (200_000, 0)), "virtual");
    assert_eq!((guest.run(), guest.stats()), (Ok(KVM_EXIT_IO), (200_000, 8192)), "the guest's");
}

#[test]
fn amx_p5_a_lack_of_memory_is_told_and_the_guest_goes_on() {
    // Whichever instruction it is that needs it.
    for (program, at) in [([ENABLE, OUT, HLT], 9), ([DISARM, ENABLE, ARM], 14 + 12 + 12)] {
        let guest = Guest::new(&permitted(), &program);
        assert!(guest.memory.len() > MEMORY);
        guest.refuse_tiles(true);
        for _ in 0..3 {
            assert_eq!(guest.run(), Err(Errno(libc::ENOMEM)));
            assert_eq!((guest.rip(), guest.stats().1), (CODE + at, 0), "at the instruction");
        }
        if at == 9 {
            assert_eq!(guest.xcr0(), 1, "nothing has changed");
        }
        // A client that has no memory to give refuses the instruction: the guest has a #GP, and lives.
        let mut events = kvm_vcpu_events::default();
        guest.call("KVM_GET_VCPU_EVENTS", &mut events).unwrap();
        (events.exception.injected, events.exception.nr, events.exception.has_error_code) = (1, 13, 1);
        guest.call("KVM_SET_VCPU_EVENTS", &mut events).unwrap();
        assert_eq!((guest.run(), guest.port()), (Ok(KVM_EXIT_IO), 0x11));
    }
    // Once there is memory it is as if nothing had been.
    let guest = Guest::new(&permitted(), &[ENABLE, LOAD, STORE, HLT]);
    guest.refuse_tiles(true);
    assert_eq!(guest.run(), Err(Errno(libc::ENOMEM)));
    guest.refuse_tiles(false);
    assert_eq!((guest.run(), guest.stored()), (Ok(KVM_EXIT_HLT), pattern()));
}

/// P6: a guest with a tile, saved where it writes to the port and restored in another process's VM.
fn migrate(live: bool, program: &[&[u8]], state_first: bool) -> (u64, Vec<u8>) {
    let prepare = |program: &[&[u8]]| {
        let guest = Guest::new(&permitted(), program);
        let request =
            kvm_enable_cap { cap: RING3_CAP_LIVE_XSTATE, args: [live.into(), 0, 0, 0], ..Default::default() };
        enable(&guest.vm, &request).unwrap();
        guest
    };
    let from = prepare(program);
    assert_eq!(from.run(), Ok(KVM_EXIT_IO));
    // The access is completed before anything is saved.
    let Object::Vcpu(vcpu) = &from.vcpu else { unreachable!() };
    vcpu.run.set(field!(vcpu.run, immediate_exit), 1u8);
    assert_eq!(from.run(), Err(Errno(libc::EINTR)));
    let mut area = from.xsave2();
    let saved = xstate_bv(&area);
    let to = prepare(program);
    let mut regs = kvm_regs::default();
    from.call("KVM_GET_REGS", &mut regs).unwrap();
    to.call("KVM_SET_REGS", &mut regs).unwrap();
    let mut xcrs = kvm_xcrs::default();
    from.call("KVM_GET_XCRS", &mut xcrs).unwrap();
    to.call("KVM_SET_XCRS", &mut xcrs).unwrap();
    let mut msrs = [1u64, u64::from(XFD), 0];
    let restore_msrs = |msrs: &mut [u64; 3]| {
        let row = IOCTLS.iter().find(|row| row.name == "KVM_SET_MSRS").unwrap();
        let result = ioctl(&to.vcpu, row.number(), Argument(std::ptr::from_mut(msrs) as u64));
        assert!(matches!(result, Ok(Reply::Value(1))));
    };
    let row = IOCTLS.iter().find(|row| row.name == "KVM_GET_MSRS" && row.handler.takes(&from.vcpu)).unwrap();
    let result = ioctl(&from.vcpu, row.number(), Argument(std::ptr::from_mut(&mut msrs) as u64));
    assert!(matches!(result, Ok(Reply::Value(1))));
    if state_first {
        to.call("KVM_SET_XSAVE", area.as_mut_slice()).unwrap();
        restore_msrs(&mut msrs);
    } else {
        restore_msrs(&mut msrs);
        to.call("KVM_SET_XSAVE", area.as_mut_slice()).unwrap();
    }
    assert_eq!(to.run(), Ok(KVM_EXIT_HLT));
    (saved & TILEDATA, to.stored())
}

#[test]
fn amx_p6_tiles_in_use_move() {
    for (live, state_first) in [(false, false), (false, true), (true, false), (true, true)] {
        let moved = migrate(live, &[ENABLE, LOAD, OUT, STORE, HLT], state_first);
        assert_eq!(moved, (TILEDATA, pattern()), "{live} {state_first}");
    }
}

/// G1 to G3: the kernel's calls lose tiles that IA32_XFD disables; ours do not if they are asked to.
#[test]
fn amx_p6_tiles_that_are_disabled_move_if_asked() {
    let program = [ENABLE, LOAD, DISARM, OUT, ARM, STORE, HLT];
    for state_first in [false, true] {
        assert_eq!(migrate(false, &program, state_first), (0, vec![0; 1024]), "{state_first}");
        assert_eq!(migrate(true, &program, state_first), (TILEDATA, pattern()), "{state_first}");
    }
}

/// A loop of 1000 writes to a port with live tiles that IA32_XFD disables. In each round the guest looks whether IA32_XFD is what it wrote,
/// IA32_XFD_ERR zero, and TILEDATA in use.
fn live_tiles() -> Vec<u8> {
    // mov ebx, 1000
    let begin = [0xbb, 0xe8, 0x03, 0, 0];
    // out 0x10, al; mov ecx, 0x1c4; rdmsr; cmp eax, 1 << 18; jne bad
    let xfd = [0xe6, 0x10, 0xb9, 0xc4, 0x01, 0, 0, 0x0f, 0x32, 0x3d, 0, 0, 4, 0, 0x75, 24];
    // inc ecx; rdmsr; test eax, eax; jne bad
    let error = [0xff, 0xc1, 0x0f, 0x32, 0x85, 0xc0, 0x75, 16];
    // mov ecx, 1; xgetbv; bt eax, 18; jnc bad
    let in_use = [0xb9, 1, 0, 0, 0, 0x0f, 0x01, 0xd0, 0x0f, 0xba, 0xe0, 18, 0x73, 2];
    // jmp +2; bad: out 0x12, al; dec ebx; jnz to the out
    let end = [0xeb, 2, 0xe6, 0x12, 0xff, 0xcb, 0x75, 210];
    [ENABLE, LOAD, DISARM, &begin, &xfd, &error, &in_use, &end, ARM, STORE, HLT].concat()
}

/// Runs it on a host; whether all was well in every round, what is in the tile at the end, and what it cost the host.
fn on_host(host: &str) -> (bool, Vec<u8>, [u64; 4]) {
    let guest = Guest::new(&permitted_on(host), &[&live_tiles()]);
    let mut well = true;
    let mut rounds = 0;
    loop {
        match guest.run() {
            Ok(KVM_EXIT_IO) if guest.port() == 0x10 => rounds += 1,
            Ok(KVM_EXIT_IO) => well = false,
            exit => break assert_eq!(exit, Ok(KVM_EXIT_HLT)),
        }
    }
    assert_eq!(rounds, 1000);
    let Object::Vcpu(vcpu) = &guest.vcpu else { unreachable!() };
    let costs = vcpu.lock().host_fpu_costs().map(|(_, count)| count);
    (well, guest.stored(), costs)
}

const EVENTS: &str = "ring3.preempt_exits=3 ring3.softirq_exits=7";

/// Hazards (a), preemption and the return of KVM_RUN, and (b), a softirq that uses the FPU, are real.
#[test]
fn amx_a7_a_host_that_saves_under_the_guests_register_loses_tiles() {
    for events in ["", "ring3.preempt_exits=1", "ring3.softirq_exits=1", EVENTS] {
        let (well, stored, costs) = on_host(&format!("ring3.xfd=upstream {events}"));
        assert_eq!((well, stored), (false, vec![0; 1024]), "{events}");
        assert!(costs[0] >= 1000 && costs[2] >= 1000, "{costs:?}");
    }
}

/// A7, A8, T8: with either option no tile is lost and the guest sees its registers as it wrote them.
#[test]
fn amx_a7_a8_both_options_keep_tiles_and_hide_what_they_do() {
    for host in ["ring3.xfd=native", "ring3.xfd=option1", "ring3.xfd=option2"] {
        let (well, stored, costs) = on_host(&format!("{host} {EVENTS}"));
        assert_eq!((well, stored), (true, pattern()), "{host}");
        match host {
            "ring3.xfd=native" => assert_eq!(costs, [0; 4]),
            // One write at each exit and one at each entry.
            "ring3.xfd=option1" => assert!(costs[3] >= 2 * costs[2] - 10 && costs[2] >= 1000, "{costs:?}"),
            // Two writes for each use of the registers by somebody else, of which every exit to the client is one.
            _ => assert!(costs[3] >= 2 * 1000 && costs[3] <= 2 * costs[0], "{costs:?}"),
        }
    }
}

/// T8: the client saves and restores the state all the while.
#[test]
fn amx_t8_live_tiles_outlive_saving_and_restoring() {
    let guest = Guest::new(&permitted_on("ring3.xfd=option1"), &[&live_tiles()]);
    let request = kvm_enable_cap { cap: RING3_CAP_LIVE_XSTATE, args: [1, 0, 0, 0], ..Default::default() };
    enable(&guest.vm, &request).unwrap();
    loop {
        match guest.run() {
            Ok(KVM_EXIT_IO) => {
                assert_eq!(guest.port(), 0x10);
                let mut area = guest.xsave2();
                assert_ne!(xstate_bv(&area) & TILEDATA, 0);
                guest.call("KVM_SET_XSAVE", vec![0u8; AREA].as_mut_slice()).unwrap();
                guest.call("KVM_SET_XSAVE", area.as_mut_slice()).unwrap();
            }
            exit => break assert_eq!(exit, Ok(KVM_EXIT_HLT)),
        }
    }
    assert_eq!(guest.stored(), pattern());
}

/// T8: a million exits that stay in KVM_RUN, with preemption and softirqs among them.
#[test]
fn amx_t8_live_tiles_outlive_a_million_exits() {
    // mov edi, 1000000; 1: xor eax, eax; cpuid; dec edi; jnz 1b
    let exits: &[u8] = &[0xbf, 0x40, 0x42, 0x0f, 0x00, 0x31, 0xc0, 0x0f, 0xa2, 0xff, 0xcf, 0x75, 0xf8];
    for option in ["native", "option1", "option2"] {
        let host = format!("ring3.xfd={option} ring3.preempt_exits=1000 ring3.softirq_exits=777");
        let guest = Guest::new(&permitted_on(&host), &[ENABLE, LOAD, DISARM, exits, ARM, STORE, HLT]);
        assert_eq!((guest.run(), guest.stored()), (Ok(KVM_EXIT_HLT), pattern()), "{option}");
    }
}
