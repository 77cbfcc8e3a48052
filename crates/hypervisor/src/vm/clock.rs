//! The VM's clock and the frequency of its time-stamp counters.

use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE, kvm_clock_data};

use super::Vm;
use crate::error::Error;
use crate::irqchip::lapic::Waker;
use crate::kvmclock::ClockBase;
use crate::tsc;

/// Flags of `kvm_clock_data` (KVM_CAP_ADJUST_CLOCK).
pub const CLOCK_FLAGS: u32 = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;

/// Wall-clock time in nanoseconds since 1970, and the host's TSC at that moment.
fn realtime() -> (u64, u64) {
    // The pair with the least time between two counter reads is the least disturbed one.
    let sample = || {
        let before = tsc::rdtsc();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let after = tsc::rdtsc();
        (after.wrapping_sub(before), now.as_nanos() as u64, before)
    };
    let (_, now, tsc) = [sample(), sample(), sample()].into_iter().min().unwrap_or_default();
    (now, tsc)
}

impl Vm {
    pub(crate) fn clock(&self) -> MutexGuard<'_, ClockBase> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the changes of the clock.
    pub(crate) fn clock_changes(&self) -> u32 {
        self.clock_changes.load(Ordering::Acquire)
    }

    /// KVM_GET_CLOCK.
    pub fn get_clock(&self) -> kvm_clock_data {
        let (realtime, host_tsc) = realtime();
        let clock = self.clock().at(host_tsc);
        kvm_clock_data { clock, flags: CLOCK_FLAGS, realtime, host_tsc, ..Default::default() }
    }

    /// KVM_SET_CLOCK. With KVM_CLOCK_REALTIME the clock also gains the time since `realtime`, if that is past.
    /// EINVAL for flags that do not exist.
    pub fn set_clock(&self, data: &kvm_clock_data) -> Result<(), Error> {
        if data.flags & !CLOCK_FLAGS != 0 {
            return Err(Error::Invalid("clock flags"));
        }
        let (now, tsc) = realtime();
        let gained = match data.flags & KVM_CLOCK_REALTIME {
            0 => 0,
            _ => now.saturating_sub(data.realtime),
        };
        self.clock().set(tsc, data.clock.wrapping_add(gained));
        // Every vCPU tells its guest before that runs on.
        self.clock_changes.fetch_add(1, Ordering::Release);
        self.vcpus().iter().for_each(|vcpu| vcpu.kick());
        Ok(())
    }

    /// KVM_SET_TSC_KHZ on the VM: the frequency for vCPUs yet to be created; zero is the host's.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), Error> {
        if khz > tsc::MAX_KHZ {
            return Err(Error::Invalid("the TSC cannot be scaled so far"));
        }
        self.tsc_khz.store(if khz == 0 { tsc::host_khz() } else { khz }, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_GET_TSC_KHZ on the VM.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz.load(Ordering::Relaxed)
    }
}
