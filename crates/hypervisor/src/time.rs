//! The host kernel's time, as far as it makes vCPUs wait.

use std::fmt;
use std::time::{Duration, Instant};

use crate::vcpu::VcpuHandle;

/// Where time comes from. Tests have one that passes when somebody waits for it.
pub trait HostTime: fmt::Debug + Send + Sync {
    /// Nanoseconds since some moment.
    fn now(&self) -> u64;

    /// Waits until `deadline`, or until KVM_RUN of this vCPU has to return. It may come back early for any reason.
    fn wait(&self, deadline: u64, vcpu: &VcpuHandle);
}

/// The host's own monotonic clock.
#[derive(Debug)]
pub struct Monotonic(Instant);

impl Default for Monotonic {
    fn default() -> Monotonic {
        Monotonic(Instant::now())
    }
}

impl HostTime for Monotonic {
    fn now(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn wait(&self, deadline: u64, vcpu: &VcpuHandle) {
        vcpu.pause(Duration::from_nanos(deadline.saturating_sub(self.now())));
    }
}
