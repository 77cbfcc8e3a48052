//! Instructions and the local APIC.

use core::arch::asm;

/// The local APIC's registers (SDM vol. 3A, table 11-1).
const APIC: usize = 0xfee0_0000;
const EOI: usize = 0xb0;
const SPURIOUS: usize = 0xf0;
const TIMER: usize = 0x320;
const TIMER_COUNT: usize = 0x380;
const TIMER_DIVIDE: usize = 0x3e0;
const SOFTWARE_ENABLE: u32 = 1 << 8;
const PERIODIC: u32 = 1 << 17;
const DIVIDE_BY_1: u32 = 0b1011;

fn apic_write(register: usize, value: u32) {
    // SAFETY: the register page is mapped one to one, and none of these registers changes memory.
    unsafe { ((APIC + register) as *mut u32).write_volatile(value) };
}

/// Lets interrupts in.
pub fn apic_enable(spurious: u32) {
    apic_write(SPURIOUS, SOFTWARE_ENABLE | spurious);
}

/// Ends the interrupt in service.
pub fn apic_eoi() {
    apic_write(EOI, 0);
}

/// An interrupt every `count` ticks.
pub fn apic_timer(vector: u32, count: u32) {
    apic_write(TIMER_DIVIDE, DIVIDE_BY_1);
    apic_write(TIMER, PERIODIC | vector);
    apic_write(TIMER_COUNT, count);
}

pub fn wrmsr(index: u32, value: u64) {
    // SAFETY: the registers that this kernel writes change nothing that the compiler relies on.
    unsafe { asm!("wrmsr", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32) };
}

pub fn rdmsr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading changes nothing.
    unsafe { asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high) };
    u64::from(high) << 32 | u64::from(low)
}

pub fn cpuid(leaf: u32) -> [u32; 4] {
    let row = core::arch::x86_64::__cpuid(leaf);
    [row.eax, row.ebx, row.ecx, row.edx]
}

pub fn rdtsc() -> u64 {
    // SAFETY: reading changes nothing.
    unsafe { core::arch::x86_64::_rdtsc() }
}

pub fn cr2() -> u64 {
    let value: u64;
    // SAFETY: reading changes nothing.
    unsafe { asm!("mov {}, cr2", out(reg) value) };
    value
}

pub fn out8(port: u16, value: u8) {
    // SAFETY: the machine's devices do not write memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value) };
}

pub fn out32(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value) };
}

/// Waits for an interrupt, with interrupts on.
pub fn halt() {
    // SAFETY: handlers keep what the compiler relies on.
    unsafe { asm!("sti; hlt") };
}

/// For what interrupts must not come between, from a task.
pub fn without_interrupts(change: impl FnOnce()) {
    // SAFETY: the flag alone changes.
    unsafe { asm!("cli") };
    change();
    // SAFETY: as above.
    unsafe { asm!("sti") };
}

pub fn read<T: Copy>(at: u64) -> T {
    // SAFETY: callers give addresses of memory, which is mapped one to one.
    unsafe { (at as *const T).read_volatile() }
}

pub fn write<T: Copy>(at: u64, value: T) {
    // SAFETY: as above; it is memory that nothing of this program lies in.
    unsafe { (at as *mut T).write_volatile(value) };
}
