//! What a guest hypervisor's VM-execution controls become when its guest runs (kernel: `prepare_vmcs02_early` and
//! `prepare_vmcs02_constant_state` in arch/x86/kvm/vmx/nested.c). There are no nested guests yet; this is the one place where
//! their controls will be made.

use silicon::vmx::Controls;

/// The controls of an L2: everything that L1 or the host wants to exit on exits; time is L1's view of it. `host` is what L1
/// itself runs with, `l1` what it asks for its guest.
///
/// The notify VM exit is the host's alone: enabled *and disabled* as for L1, with the same window, whatever L1 has put into
/// its controls (the control is not offered to it). Else L1 would hang the host's processor from within L2.
pub fn merge(host: &Controls, l1: &Controls) -> Controls {
    Controls {
        exception_bitmap: host.exception_bitmap | l1.exception_bitmap,
        // Windows are asked for anew at each entry, for the level that events are for.
        interrupt_window_exiting: host.interrupt_window_exiting || l1.interrupt_window_exiting,
        nmi_window_exiting: host.nmi_window_exiting || l1.nmi_window_exiting,
        hlt_exiting: host.hlt_exiting || l1.hlt_exiting,
        pause_exiting: host.pause_exiting || l1.pause_exiting,
        mwait_exiting: host.mwait_exiting || l1.mwait_exiting,
        rdtsc_exiting: host.rdtsc_exiting || l1.rdtsc_exiting,
        rdpmc_exiting: host.rdpmc_exiting || l1.rdpmc_exiting,
        mov_dr_exiting: host.mov_dr_exiting || l1.mov_dr_exiting,
        cr8_exiting: host.cr8_exiting || l1.cr8_exiting,
        msr_exiting: host.msr_exiting || l1.msr_exiting,
        monitor_trap_flag: host.monitor_trap_flag || l1.monitor_trap_flag,
        tsc_multiplier: scale(host.tsc_multiplier, l1.tsc_multiplier),
        tsc_offset: scale_signed(host.tsc_offset, l1.tsc_multiplier).wrapping_add(l1.tsc_offset),
        ..host.clone()
    }
}

/// `value` times a 16.48 fixed-point number.
fn scale(value: u64, multiplier: u64) -> u64 {
    ((u128::from(value) * u128::from(multiplier)) >> 48) as u64
}

/// The same of a signed value.
fn scale_signed(value: u64, multiplier: u64) -> u64 {
    let scaled = scale((value as i64).unsigned_abs(), multiplier);
    if (value as i64) < 0 { scaled.wrapping_neg() } else { scaled }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notify(exiting: bool, window: u32) -> Controls {
        Controls { notify_exiting: exiting, notify_window: window, ..Controls::default() }
    }

    #[test]
    fn an_l1_neither_widens_nor_drops_the_hosts_window() {
        for l1 in [notify(false, 0), notify(true, u32::MAX), notify(true, 0)] {
            for host in [notify(true, 2500), notify(false, 7)] {
                let merged = merge(&host, &l1);
                assert_eq!(
                    (merged.notify_exiting, merged.notify_window),
                    (host.notify_exiting, host.notify_window)
                );
            }
        }
    }

    #[test]
    fn what_either_wants_to_exit_on_exits() {
        let host = Controls { exception_bitmap: 1 << 17, hlt_exiting: false, ..Controls::default() };
        let l1 =
            Controls { exception_bitmap: 1 << 14, hlt_exiting: true, rdtsc_exiting: true, ..host.clone() };
        let merged = merge(&host, &l1);
        assert_eq!(merged.exception_bitmap, 1 << 14 | 1 << 17);
        assert!(merged.hlt_exiting && merged.rdtsc_exiting && !merged.pause_exiting);
    }

    #[test]
    fn time_is_l1s_view_of_the_hosts() {
        let host =
            Controls { tsc_offset: 1000u64.wrapping_neg(), tsc_multiplier: 1 << 47, ..Controls::default() };
        let l1 = Controls { tsc_offset: 5, tsc_multiplier: 1 << 49, ..Controls::default() };
        let merged = merge(&host, &l1);
        assert_eq!((merged.tsc_multiplier, merged.tsc_offset as i64), (1 << 48, -1995));
    }
}
