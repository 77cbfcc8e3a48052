//! Parameters of the kernel's KVM modules, as `/sys/module/kvm*/parameters` shows them (kernel: `module_param` in
//! arch/x86/kvm and virt/kvm). They say how the KVM works that we are: what we do not have is off, and what only tunes
//! the hardware's virtualization has the kernel's default.

use crate::host::HostParams;

/// A module of the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Module {
    /// `kvm`.
    Kvm,
    /// `kvm_intel`.
    KvmIntel,
}

/// Value of a parameter.
enum Value {
    /// A bool.
    Switch(bool),
    /// A number.
    Number(i64),
    /// A string.
    Text(&'static str),
    /// One that can be set.
    Of(fn(&HostParams) -> bool),
    /// A number that can be set.
    NumberOf(fn(&HostParams) -> i64),
    /// A string that can be set.
    TextOf(fn(&HostParams) -> &'static str),
}

use Module::{Kvm, KvmIntel};
use Value::{Number, NumberOf, Of, Switch, Text, TextOf};

static PARAMETERS: &[(Module, &str, Value)] = &[
    (Kvm, "eager_page_split", Switch(false)),
    (Kvm, "enable_pmu", Switch(false)),
    (Kvm, "enable_vmware_backdoor", Switch(false)),
    (Kvm, "force_emulation_prefix", Number(0)),
    (Kvm, "halt_poll_ns", Number(0)),
    (Kvm, "halt_poll_ns_grow", Number(2)),
    (Kvm, "halt_poll_ns_grow_start", Number(10_000)),
    (Kvm, "halt_poll_ns_shrink", Number(0)),
    (Kvm, "ignore_msrs", Of(|host| host.ignore_msrs)),
    (Kvm, "kvmclock_periodic_sync", Switch(false)),
    (Kvm, "lapic_timer_advance", Switch(false)),
    (Kvm, "min_timer_period_us", Number(200)),
    (Kvm, "mitigate_smt_rsb", Switch(false)),
    (Kvm, "mmio_caching", Switch(true)),
    (Kvm, "nx_huge_pages", Text("N")),
    (Kvm, "nx_huge_pages_recovery_period_ms", Number(0)),
    (Kvm, "nx_huge_pages_recovery_ratio", Number(0)),
    (Kvm, "pi_inject_timer", Number(0)),
    (Kvm, "report_ignored_msrs", Of(|host| host.report_ignored_msrs)),
    (Kvm, "tdp_mmu", Switch(false)),
    (Kvm, "tsc_tolerance_ppm", Number(250)),
    (Kvm, "vector_hashing", Switch(false)),
    (KvmIntel, "allow_smaller_maxphyaddr", Switch(false)),
    (KvmIntel, "dump_invalid_vmcs", Switch(false)),
    (KvmIntel, "emulate_invalid_guest_state", Switch(true)),
    (KvmIntel, "enable_apicv", Switch(false)),
    (KvmIntel, "enable_ipiv", Switch(false)),
    (KvmIntel, "enable_shadow_vmcs", Switch(false)),
    (KvmIntel, "ept", Switch(true)),
    (KvmIntel, "eptad", Switch(true)),
    (KvmIntel, "fasteoi", Switch(true)),
    (KvmIntel, "flexpriority", Switch(true)),
    (KvmIntel, "nested", Switch(false)),
    (KvmIntel, "notify_throttle_ms", NumberOf(|host| host.notify_throttle_ms.into())),
    (KvmIntel, "notify_window_us", NumberOf(|host| host.notify_window_us.map_or(-1, i64::from))),
    (KvmIntel, "pml", Switch(false)),
    (KvmIntel, "preemption_timer", Switch(false)),
    (KvmIntel, "pt_mode", Number(0)),
    (KvmIntel, "sgx", Switch(false)),
    (KvmIntel, "unrestricted_guest", Switch(true)),
    (KvmIntel, "vmentry_l1d_flush", TextOf(|host| host.mitigations.flush().name())),
    (KvmIntel, "vnmi", Switch(true)),
    (KvmIntel, "vpid", Switch(true)),
];

/// The contents of a parameter's file; `None` if the module has no such parameter.
pub fn parameter(host: &HostParams, module: Module, name: &str) -> Option<String> {
    let (_, _, value) = PARAMETERS.iter().find(|row| (row.0, row.1) == (module, name))?;
    let switch = |on: bool| if on { "Y\n" } else { "N\n" }.to_string();
    Some(match *value {
        Switch(on) => switch(on),
        Number(number) => format!("{number}\n"),
        Text(text) => format!("{text}\n"),
        Of(get) => switch(get(host)),
        NumberOf(get) => format!("{}\n", get(host)),
        TextOf(get) => format!("{}\n", get(host)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_look_as_in_sysfs() {
        let host = HostParams::parse("kvm.ignore_msrs=1").unwrap();
        for (module, name, text) in [
            (Kvm, "force_emulation_prefix", Some("0\n")),
            (Kvm, "ignore_msrs", Some("Y\n")),
            (Kvm, "tdp_mmu", Some("N\n")),
            (KvmIntel, "ept", Some("Y\n")),
            (KvmIntel, "notify_window_us", Some("100\n")),
            (KvmIntel, "vmentry_l1d_flush", Some("not required\n")),
            (KvmIntel, "tdp_mmu", None),
            (Kvm, "", None),
        ] {
            assert_eq!(parameter(&host, module, name).as_deref(), text, "{name}");
        }
        let affected = HostParams::parse("ring3.part=skylake-sp kvm_intel.vmentry_l1d_flush=always").unwrap();
        assert_eq!(parameter(&affected, KvmIntel, "vmentry_l1d_flush").as_deref(), Some("always\n"));
    }

    #[test]
    fn each_parameter_stands_once() {
        for (i, row) in PARAMETERS.iter().enumerate() {
            assert!(
                !PARAMETERS[i + 1..].iter().any(|other| (other.0, other.1) == (row.0, row.1)),
                "{}",
                row.1
            );
        }
    }
}
