//! Each behaviour that a guest program shows is a test of its own. A program runs once on each model that it can run
//! on; all its tests look at that run. It is stopped by its first failure, so what comes after one is not shown either.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use guests::Program;
use guests::machine::{self, Access, Devices, Report, Space};
use hypervisor::Vm;
use silicon::model::CpuModel;

/// Far more than any program takes on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(300);
/// The model that shows everything.
const FULL: &str = "sapphire-rapids";
/// One that lacks much: what it does not offer, a program passes over.
const OLD: &str = "nehalem";

type Run = Arc<OnceLock<Report>>;

/// Port 0x500 moves interrupt lines: the line in the low byte, its level in bit 8.
struct Lines;

impl Devices for Lines {
    fn access(&self, vm: &Vm, access: Access) -> u64 {
        if let Access { space: Space::Port, address: 0x500, write: Some(value), .. } = access {
            vm.irq_line(value as u32 & 0xff, value & 0x100 != 0)
                .expect("the machine has interrupt controllers");
        }
        0
    }
}

/// The run of `program` on `model`, made by the first test that asks.
fn run(program: Program, model: &'static str) -> Run {
    static RUNS: LazyLock<Mutex<HashMap<(&str, &str), Run>>> = LazyLock::new(Mutex::default);
    let run = {
        let mut runs = RUNS.lock().unwrap_or_else(PoisonError::into_inner);
        runs.entry((program.name, model)).or_default().clone()
    };
    run.get_or_init(|| {
        let model = CpuModel::parse(model).expect("a model");
        machine::run_with(program.image, program.cpus, model, PATIENCE, &Lines).expect("a machine")
    });
    run
}

/// Checks that `program` came to the behaviour, and past it.
fn shows(program: Program, behaviour: &str) {
    let line = program.behaviours().find(|(_, name)| *name == behaviour).map(|(line, _)| line);
    let line = line.unwrap_or_else(|| panic!("asm/{}.S has no BEHAVIOUR({behaviour})", program.name));
    for model in [FULL, OLD] {
        let run = run(program, model);
        let report = run.get().expect("it has been run");
        let passed = report.status == Some(0)
            && (report.console == "PASS\n" || model == OLD && report.console.starts_with("SKIP"));
        let reached = report.behaviours.contains(&line);
        let failed_here = !passed && report.behaviours.last() == Some(&line);
        let shown = if passed { reached || model == OLD } else { reached && !failed_here };
        let what = if failed_here { "failed" } else { "was not reached" };
        assert!(
            shown,
            "{behaviour} {what} on {model}: {} {}",
            report.console,
            report.stopped.as_deref().unwrap_or_default()
        );
    }
}

macro_rules! behaviours {
    ($($module:ident $program:ident { $($name:ident)* })*) => {
        $(mod $module {
            $(#[test]
            fn $name() {
                super::shows(guests::$program, stringify!($name));
            })*

            #[test]
            fn the_program_ends_well() {
                super::ends_well(guests::$program);
            }
        })*

        /// Program and behaviours, as above.
        const TESTED: &[(Program, &[&str])] = &[$((guests::$program, &[$(stringify!($name)),*])),*];
    };
}

fn ends_well(program: Program) {
    for model in [FULL, OLD] {
        let run = run(program, model);
        let report = run.get().expect("it has been run");
        let skipped = model == OLD && report.console.starts_with("SKIP");
        assert!(report.status == Some(0) && (report.console == "PASS\n" || skipped), "{model}: {report:?}");
    }
}

behaviours! {
    exceptions EXCEPTIONS {
        a_divide_error_reports_the_division
        breakpoint_traps_report_the_next_instruction
        undefined_opcodes
        device_not_available_and_emulation
        segment_loads_fault_with_their_selector
        addresses_that_are_not_canonical
        bad_gates_fault_with_their_idt_error_code
        privileged_instructions_and_gates_at_cpl_3
        alignment_checks_at_cpl_3
        floating_point_exceptions_are_reported_where_they_belong
        a_fault_while_a_fault_is_delivered_is_a_double_fault
    }
    pages PAGES {
        pages_that_are_not_present
        page_faults_at_cpl_3_have_the_user_bit
        read_only_pages_and_write_protect
        supervisor_pages_are_closed_to_the_user
        a_right_must_be_given_at_every_level
        execute_disable_forbids_fetches_alone
        reserved_bits_of_an_entry
        accessed_and_dirty_are_set_by_use
        large_pages_have_accessed_dirty_and_reserved_bits
        cached_translations_are_dropped_when_asked
        an_entry_that_is_rewritten_is_walked_anew
    }
    amx AMX {
        amx_t1_cpuid_tells_of_tiles_and_of_the_sizes_that_xcr0_makes
        amx_t12_tiles_are_undefined_before_xcr0_enables_them
        amx_t2_xcr0_takes_both_tile_components_or_none
        amx_t3_xfd_is_zero_at_reset_and_takes_one_bit
        amx_t9_configurations_are_checked_before_anything_changes
        amx_t4_xfd_makes_the_use_of_tiles_fault
        amx_t5_xfd_err_is_sticky_and_a_task_switched_fault_leaves_it_alone
        amx_t10_a_load_that_faults_goes_on_where_it_stopped
        amx_t8_live_tiles_outlast_xfd
        amx_t6_saves_leave_out_what_xfd_disables
        amx_t7_restores_of_what_xfd_disables_fault
        amx_t11_products_of_small_matrices
    }
    protection PROTECTION {
        smep_forbids_fetches_from_user_pages
        smap_forbids_accesses_to_user_pages
        umip_forbids_reading_the_tables_at_cpl_3
        protection_keys_limit_accesses_to_user_pages
    }
    debug DEBUG {
        a_single_step_traps_behind_the_next_instruction
        each_iteration_of_a_repeated_move_is_a_step
        mov_ss_holds_a_step_back
        instruction_breakpoints_are_faults_that_rf_suppresses
        data_breakpoints_are_traps
        a_repeated_move_stops_at_a_data_breakpoint
        general_detect
        debug_register_aliases_and_privileges
    }
    strings STRINGS {
        a_move_stops_where_its_destination_is_missing_and_goes_on
        an_element_across_the_edge_is_not_moved_in_part
        a_downward_move_stops_where_its_destination_is_missing
        a_move_stops_where_its_source_is_missing
        stores_loads_scans_and_comparisons_stop_at_a_missing_page
        a_count_of_zero_touches_nothing
        a_move_goes_on_when_the_handler_has_mapped_the_page
        overlapping_moves_propagate_byte_by_byte
    }
    smc SELF_MODIFY {
        an_instruction_of_the_same_block_is_changed
        the_very_next_instruction_is_changed
        a_function_is_written_anew
        code_is_replaced_by_a_repeated_move
        code_is_changed_through_another_mapping
        the_page_of_an_address_is_exchanged
        an_instruction_across_two_pages_is_changed
        a_push_writes_over_the_instruction_behind_it
    }
    cross_modify CROSS_MODIFY {
        announced_changes_are_executed_by_the_other_processor
        unannounced_changes_are_seen_whole
    }
    syscalls SYSCALLS {
        system_calls_and_their_return
        sysret_to_an_address_that_is_not_canonical
        sysenter_and_sysexit
        a_call_gate_switches_to_the_stack_of_the_tss
        a_bad_call_gate_faults_with_its_selector
        compatibility_mode_by_far_returns
    }
    tasks TASKS {
        a_call_nests_and_iret_comes_back
        a_task_goes_on_where_it_left
        a_task_gate_switches_tasks
        a_jump_leaves_the_old_task_available
        an_interrupt_through_a_task_gate
        busy_absent_and_short_tasks_fault
        a_nested_return_to_what_is_no_busy_task_faults
        a_bad_segment_faults_in_the_new_task
    }
    modes MODES {
        compatibility_mode_has_32_bit_operands
        long_mode_is_left_for_protected_mode
        protected_mode_of_16_bits_is_left_for_real_mode
        real_mode_segments_are_paragraphs
        real_mode_interrupts_use_the_vector_table
        real_mode_addresses_wrap
        a_real_mode_divide_error_reports_the_division
        ac_m4_verw_is_undefined_in_real_mode
        real_mode_far_calls_return
        a_limit_loaded_in_protected_mode_stays_in_real_mode
        protected_and_long_mode_again
        control_register_combinations_that_are_refused
    }
    virtual8086 VIRTUAL_8086 {
        segments_are_paragraph_numbers
        the_monitor_gets_null_data_segments
        sensitive_instructions_need_iopl_3
        limits_and_instructions_of_protected_mode_alone
        ac_m4_verw_is_undefined_in_virtual_8086_mode
    }
    apic_timer APIC_TIMER {
        one_shot_fires_once
        a_masked_timer_counts_and_fires_nothing
        an_initial_count_of_zero_stops_the_timer
        periodic_fires_again_and_again
        the_task_priority_holds_an_interrupt_back
        the_higher_of_two_waiting_vectors_comes_first
        tsc_deadline_fires_once_and_disarms
    }
    ipi IPI {
        fixed_interrupts_reach_one_self_all_and_others
        logical_destinations
        interrupts_in_a_row_are_all_delivered
        an_nmi_wakes_a_halted_processor
        init_stops_and_sipi_starts_a_processor
    }
    nmi NMI {
        an_nmi_is_delivered_once
        nmis_do_not_nest_and_merge
        an_iret_within_the_handler_opens_the_window
        sti_holds_interrupts_for_one_instruction
        an_interrupt_that_cannot_be_delivered_becomes_the_fault_alone
        an_nmi_that_cannot_be_delivered_becomes_the_fault_alone
    }
    atomics ATOMICS {
        each_processor_owns_its_bit_of_a_shared_word
        locked_increments_are_atomic
        locked_additions_are_atomic
        exchange_and_add_is_atomic
        compare_and_exchange_is_atomic
        operations_across_cache_lines_are_atomic
        operations_across_pages_are_atomic
        compare_and_exchange_of_16_bytes_is_atomic
        compare_and_exchange_of_8_bytes_is_atomic
        locked_decrements_and_subtractions_are_atomic
        locked_logic_is_atomic
        a_lock_by_exchange_excludes
        locked_bytes_and_words_are_atomic
        each_ticket_is_handed_out_once
    }
    pages64 PAGES_64 {
        pages_of_1_gib
        process_context_identifiers_need_a_clean_cr3
        translations_belong_to_their_pcid
        cr3_refuses_bits_beyond_the_physical_width
        paging_cannot_be_left_with_pcids_on
        invpcid_drops_what_it_names
        invlpg_drops_global_pages
        five_levels_are_turned_on_with_paging_off
    }
    watch WATCH {
        data_breakpoints_of_each_length
        a_breakpoint_address_is_aligned_to_its_length
        implicit_accesses_are_watched
        port_breakpoints
        a_data_breakpoint_of_mov_ss_waits_for_the_next_instruction
        an_instruction_breakpoint_in_a_shadow_is_lost
        rf_lets_an_instruction_run_once
        two_breakpoints_at_once
        a_step_over_a_branch_reports_its_target
        a_fault_comes_without_its_step
        int_n_is_no_step
        repeats_of_nothing_and_exits_are_steps
        popf_and_iret_change_tf_after_their_step
        a_step_and_a_watched_write_are_one_exception
    }
    exceptions32 EXCEPTIONS_32 {
        faults_report_the_instruction_traps_the_next
        floating_point_exceptions_of_32_bit_code
        segment_registers_fault_with_the_selector
        segment_limits
        segment_types
        the_limit_of_the_code_segment
        bad_gates_of_32_bits
        an_outer_level_gets_the_stack_of_the_tss
        the_io_permission_bitmap
        stack_limits_and_alignment_at_cpl_3
        a_bad_stack_in_the_tss
        a_call_gate_copies_parameters
        a_conforming_segment_runs_at_the_callers_level
        lar_lsl_verr_and_verw
    }
    pages32 PAGES_32 {
        error_codes_without_execute_disable
        accessed_and_dirty_of_32_bit_entries
        pages_of_4_mib
        the_page_size_bit_needs_cr4_pse
        pae_refuses_reserved_bits_of_its_four_entries
        pae_keeps_its_four_entries_until_cr3_is_loaded
        pae_pages_of_2_mib
        pae_execute_disable
    }
    notify_legal NOTIFY_LEGAL {
        a_megabyte_moved_by_one_instruction
        wbinvd
        a_loop_of_cpuid
        xsave_and_fxsave
        a_spin_with_interrupts_off
        a_spin_with_nmis_blocked
        a_halt_with_interrupts_off
        walks_of_cold_page_tables
        many_faults_of_faults
    }
    repeat REPEAT {
        interrupts_within_a_repeated_store
        interrupts_within_a_repeated_move
        interrupts_within_a_repeated_comparison
        a_repeated_store_writes_over_the_code_behind_it
        a_routine_writes_its_own_continuation
    }
    interrupts INTERRUPTS {
        an_edge_interrupts_once_for_each_rise
        a_masked_line_waits
        a_waiting_interrupt_wakes_hlt
        the_lower_line_comes_first
        a_line_in_service_holds_lower_ones_back
        interrupts_of_the_second_8259
        a_level_interrupts_until_its_line_is_low
        counter_0_of_the_8254
        the_io_apic_begins_masked
        an_edge_at_the_io_apic
        a_level_at_the_io_apic_and_its_remote_irr
        a_pin_unmasked_with_its_line_high_interrupts
        the_task_priority_holds_its_class_back
        delivery_mode_nmi_ignores_if
    }
    split_lock SPLIT_LOCK {
        sl_b1_the_registers_read_back_what_was_written
        sl_b2_split_words_are_refused_at_cpl_0
        sl_b2_split_words_are_refused_at_cpl_3
        sl_b2_alignment_checks_refuse_more_at_cpl_3
        sl_b3_every_locked_operation_is_refused
        sl_b3_bit_strings_are_looked_at_where_the_bit_is
        sl_b4_accesses_without_a_lock_are_let_through
        sl_b5_bus_locks_trap_at_cpl_3_alone
        sl_b6_a_trap_has_all_its_causes
        sl_b7_dr6_has_a_bit_for_bus_locks_where_they_are_detected
        sl_b8_descriptor_updates_are_refused
        sl_b9_locks_on_uncacheable_memory_are_bus_locks
        sl_b9_locks_on_uncacheable_memory_can_be_refused
        sl_b10_page_walks_and_cmpxchg16b_never_split
    }
    speculation SPECULATION {
        ac_m1_capabilities_are_read_where_they_are_enumerated_and_never_written
        ac_m2_each_capability_has_its_register
        ac_m3_commands_and_prediction_controls_by_their_enumeration
        ac_m4_verw_says_at_cpl_0_what_can_be_written
        ac_m4_verw_says_at_cpl_3_what_can_be_written
        ac_m4_verw_clears_by_its_memory_form_alone
        ac_m6_tsx_ctrl_takes_transactions_out_of_cpuid
    }
    x2apic X2APIC {
        fixed_interrupts_reach_one_self_all_and_others
        logical_destinations
        interrupts_in_a_row_are_all_delivered
        an_nmi_wakes_a_halted_processor
        init_stops_and_sipi_starts_a_processor
        x2apic_registers_and_what_they_refuse
        x2apic_is_left_through_the_disabled_state
    }
}

/// Those of tests/notify.rs and tests/async_pf.rs.
const LOOPS: &[&str] = &["notify32", "notify64", "async_pf"];

#[test]
fn every_behaviour_of_every_program_has_a_test() {
    // Programs that need their monitor have tests that look at all their behaviours.
    let alone = |program: &&Program| !LOOPS.contains(&program.name);
    for program in guests::PROGRAMS.iter().filter(alone) {
        // Programs from one source, such as ipi and x2apic, share its behaviours.
        let source: Vec<&str> = program.behaviours().map(|(_, name)| name).collect();
        let tested = |name: &&str| TESTED.iter().any(|(_, names)| names.contains(name));
        assert_eq!(source.iter().find(|name| !tested(name)), None, "asm/{}.S", program.name);
    }
    let with_devices = include_str!("devices.rs").matches("passes(guests::").count();
    assert_eq!(TESTED.len() + with_devices + LOOPS.len(), guests::PROGRAMS.len());
}
