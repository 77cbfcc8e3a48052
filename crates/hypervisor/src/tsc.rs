//! The host's time-stamp counter: how fast it runs.
#![expect(unsafe_code, reason = "RDTSC and CPUID are intrinsics")]

use std::arch::x86_64::{__cpuid, _rdtsc};
use std::time::{Duration, Instant};

use once_cell::race::OnceBox;

/// How long the counter is compared with the monotonic clock where CPUID does not tell. Reading both costs about
/// 50 ns, so this gives some 20 parts per million.
const CALIBRATION: Duration = Duration::from_millis(4);

/// The fastest TSC that a guest can have, in kHz (kernel: `kvm_caps.max_guest_tsc_khz`).
pub const MAX_KHZ: u32 = i32::MAX as u32;

/// The host's TSC now.
pub fn rdtsc() -> u64 {
    // SAFETY: RDTSC has no preconditions in user mode with CR4.TSD clear, which Linux keeps by default.
    unsafe { _rdtsc() }
}

/// Frequency of the host's TSC in kHz: from CPUID leaf 0x15 or the hypervisor's timing leaf, else measured once.
pub fn host_khz() -> u32 {
    // Nobody waits for another thread's measurement: a fork may have left that thread behind.
    static KHZ: OnceBox<u32> = OnceBox::new();
    *KHZ.get_or_init(|| Box::new(from_cpuid().unwrap_or_else(measured)))
}

fn from_cpuid() -> Option<u32> {
    let basic = __cpuid(0).eax;
    if basic >= 0x15 {
        let leaf = __cpuid(0x15);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            let hz = u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax);
            return u32::try_from(hz / 1000).ok();
        }
    }
    if __cpuid(1).ecx & (1 << 31) != 0 && __cpuid(0x4000_0000).eax >= 0x4000_0010 {
        let khz = __cpuid(0x4000_0010).eax;
        return (khz != 0).then_some(khz);
    }
    None
}

fn measured() -> u32 {
    let sample = || {
        // The pair with the least time between two counter reads is the least disturbed one.
        (0..8)
            .map(|_| {
                let before = rdtsc();
                let now = Instant::now();
                let after = rdtsc();
                (after - before, before / 2 + after / 2, now)
            })
            .min_by_key(|&(spread, ..)| spread)
    };
    let Some((_, tsc0, time0)) = sample() else { return 1_000_000 };
    while time0.elapsed() < CALIBRATION {
        std::hint::spin_loop();
    }
    let Some((_, tsc1, time1)) = sample() else { return 1_000_000 };
    let nanos = time1.duration_since(time0).as_nanos().max(1);
    u32::try_from(u128::from(tsc1 - tsc0) * 1_000_000 / nanos).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequency_is_plausible() {
        let khz = host_khz();
        assert!((500_000..10_000_000).contains(&khz), "{khz} kHz");
    }
}
