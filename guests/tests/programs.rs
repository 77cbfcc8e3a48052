//! Each guest program passes on the default processor, those of one vCPU on all models.

use std::time::Duration;

use guests::{Program, machine};
use silicon::model::CpuModel;

/// Far more than any program takes on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(300);

fn check(program: Program, model: &str) {
    let model = CpuModel::parse(model).expect(model);
    let report = machine::run(program.image, program.cpus, model, PATIENCE).unwrap();
    let good = report.status == Some(0) && (report.console == "PASS\n" || report.console.starts_with("SKIP"));
    assert!(good, "asm/{}.S: {} {}", program.name, report.console, report.stopped.unwrap_or_default());
}

fn passes(program: Program) {
    check(program, "sapphire-rapids");
    check(program, "nehalem");
}

#[test]
fn exceptions_and_their_error_codes() {
    passes(guests::EXCEPTIONS);
}

#[test]
fn page_table_bits_and_page_fault_error_codes() {
    passes(guests::PAGES);
}

#[test]
fn smep_smap_umip_and_protection_keys() {
    passes(guests::PROTECTION);
}

#[test]
fn debug_traps_and_breakpoints() {
    passes(guests::DEBUG);
}

#[test]
fn string_instructions_that_fault_midway() {
    passes(guests::STRINGS);
}

#[test]
fn self_modifying_code() {
    passes(guests::SELF_MODIFY);
}

#[test]
fn cross_modifying_code_on_two_vcpus() {
    passes(guests::CROSS_MODIFY);
}

#[test]
fn system_calls_and_call_gates() {
    passes(guests::SYSCALLS);
}

#[test]
fn task_switches() {
    passes(guests::TASKS);
}

#[test]
fn mode_switches() {
    passes(guests::MODES);
}

#[test]
fn virtual_8086_mode() {
    passes(guests::VIRTUAL_8086);
}

#[test]
fn apic_timer_modes_and_priorities() {
    passes(guests::APIC_TIMER);
}

#[test]
fn interprocessor_interrupts_init_and_sipi() {
    passes(guests::IPI);
}

#[test]
fn nmi_windows_and_interrupt_shadows() {
    passes(guests::NMI);
}

#[test]
fn atomics_between_four_vcpus() {
    passes(guests::ATOMICS);
}

#[test]
fn x2apic_start_and_interrupts() {
    passes(guests::X2APIC);
}

#[test]
fn huge_pages_pcids_and_five_levels() {
    passes(guests::PAGES_64);
}

#[test]
fn breakpoints_on_ports_and_of_each_length_and_shadows() {
    passes(guests::WATCH);
}

#[test]
fn exceptions_limits_and_gates_in_32_bit_protected_mode() {
    passes(guests::EXCEPTIONS_32);
}

#[test]
fn paging_of_32_bits_and_pae() {
    passes(guests::PAGES_32);
}

#[test]
fn interrupts_within_repeated_string_instructions() {
    passes(guests::REPEAT);
}

#[test]
fn every_program_has_a_test() {
    let here = include_str!("programs.rs").matches("passes(guests::").count() - 2;
    let devices = include_str!("devices.rs").matches("passes(guests::").count();
    assert_eq!(here + devices, guests::PROGRAMS.len());
}
