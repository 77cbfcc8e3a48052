//! A KVM client that measures how soon a guest that computes can be had back. Run by `cargo xtask bench notice` under
//! `ring3 run`; on a machine with hardware virtualization it runs on its own, too.
//!
//! Prints for each loop, and for the host without a guest, its name with the median time from a signal to KVM_RUN's return,
//! and with what 99 of a hundred are below, in microseconds.
#![expect(
    unsafe_code,
    reason = "guest memory is given to KVM by address; guest code lies between two symbols"
)]

use std::arch::global_asm;
use std::error::Error;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// Bytes of guest memory.
const MEMORY: usize = 0x20_0000;
/// Where guest code begins. The stack is above the page tables.
const CODE: u64 = 0x1000;
/// Page tables of each level; the last maps the first 2 MiB by one page.
const TABLES: [u64; 3] = [0x2000, 0x3000, 0x4000];
/// Signals for each loop.
const SIGNALS: usize = 1000;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Loops that never leave by themselves, in 64-bit mode. RBX points to half of the memory.
macro_rules! loops {
    ($($name:literal: $($line:literal),+;)+) => {
        $(global_asm!(
            concat!(".globl notice_", $name),
            concat!("notice_", $name, ":"),
            $($line,)+
            concat!(".globl notice_end_", $name),
            concat!("notice_end_", $name, ":"),
        );)+

        /// Names and code.
        fn loops() -> Vec<(&'static str, &'static [u8])> {
            vec![$({
                unsafe extern "C" {
                    #[link_name = concat!("notice_", $name)]
                    static START: u8;
                    #[link_name = concat!("notice_end_", $name)]
                    static END: u8;
                }
                // SAFETY: both symbols are of the assembly above, which is never written.
                let code = unsafe {
                    let (start, end) = (&raw const START, &raw const END);
                    std::slice::from_raw_parts(start, end.offset_from_unsigned(start))
                };
                ($name, code)
            },)+]
        }
    };
}

loops! {
    "jump": "2: jmp 2b";
    "count": "2: dec rcx", "jnz 2b", "jmp 2b";
    "calls": "2: call 3f", "jmp 2b", "3: ret";
    "stores": "2: mov [rbx + rcx], rcx", "add ecx, 4160", "and ecx, 0xffff8", "jmp 2b";
    "copies": "2: lea rsi, [rbx]", "lea rdi, [rbx + 0x40000]", "mov ecx, 0x40000", "rep movsb", "jmp 2b";
    "divisions": "2: .rept 64", "mov rax, -1", "xor edx, edx", "mov ecx, 3", "div rcx", ".endr", "jmp 2b";
    "sines": "fldpi", "2: .rept 64", "fsin", ".endr", "jmp 2b";
    "fences": "2: mfence", "jmp 2b";
    "locked": "2: lock inc qword ptr [rbx]", "jmp 2b";
}

/// A VM that begins with `code` in 64-bit mode. Its memory is never freed.
fn machine(kvm: &Kvm, code: &[u8]) -> Outcome<(VmFd, VcpuFd)> {
    let vm = kvm.create_vm()?;
    let memory = vmm_memory()?;
    memory[CODE as usize..][..code.len()].copy_from_slice(code);
    let entries = [TABLES[1] | 3, TABLES[2] | 3, 0x83];
    for (table, entry) in TABLES.into_iter().zip(entries) {
        memory[table as usize..][..8].copy_from_slice(&entry.to_le_bytes());
    }
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY as u64,
        userspace_addr: memory.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the memory is never freed.
    unsafe { vm.set_user_memory_region(region)? };
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = vcpu.get_sregs()?;
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 8, type_: 11, l: 1, ..flat };
    let data = kvm_segment { selector: 16, type_: 3, db: 1, ..flat };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    // PE, MP, NE, PG; PAE, OSFXSR, OSXMMEXCPT; LME, LMA.
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0023, TABLES[0], 0x620, 0x500);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rsp, regs.rbx, regs.rflags) = (CODE, 0x8000, MEMORY as u64 / 2, 2);
    vcpu.set_regs(&regs)?;
    Ok((vm, vcpu))
}

/// Zeroed memory for as long as the program runs.
fn vmm_memory() -> Outcome<&'static mut [u8]> {
    let layout = std::alloc::Layout::from_size_align(MEMORY, 4096)?;
    // SAFETY: the size is not zero; the bytes are zero, and nobody else has them.
    unsafe {
        let start = std::alloc::alloc_zeroed(layout);
        if start.is_null() {
            return Err("no memory".into());
        }
        Ok(std::slice::from_raw_parts_mut(start, MEMORY))
    }
}

fn main() -> Outcome<()> {
    let kvm = Kvm::new()?;
    show("a-host", e2e::kick::host_latencies(SIGNALS)?);
    for (name, code) in loops() {
        let (_vm, mut vcpu) = machine(&kvm, code)?;
        show(name, e2e::kick::latencies(&mut vcpu, SIGNALS)?);
    }
    Ok(())
}

fn show(name: &str, mut times: Vec<f64>) {
    times.sort_by(f64::total_cmp);
    println!("{name} {:.1}", times[SIGNALS / 2] / 1e3);
    println!("{name}-99 {:.1}", times[SIGNALS * 99 / 100] / 1e3);
}
