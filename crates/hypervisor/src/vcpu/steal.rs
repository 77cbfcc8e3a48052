//! Stolen time: how long a vCPU's thread was ready and did not run, in a structure that the guest has named with
//! MSR_KVM_STEAL_TIME (Documentation/virt/kvm/x86/msr.rst; kernel: `record_steal_time` in arch/x86/kvm/x86.c).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use super::Vcpu;

/// MSR_KVM_STEAL_TIME: enable bit, address.
const ENABLED: u64 = 1 << 0;
const ADDRESS: u64 = !0x3f;
/// `struct kvm_steal_time`: nanoseconds, version, preempted.
const VERSION: u64 = 8;
const PREEMPTED: u64 = 16;
/// KVM_VCPU_PREEMPTED.
const VCPU_PREEMPTED: u8 = 1 << 0;
/// The scheduler is asked at most this often.
const INTERVAL: Duration = Duration::from_micros(100);

/// Where the scheduler tells how long a thread has waited for a processor.
#[derive(Debug)]
struct Waited {
    thread: ThreadId,
    file: File,
}

impl Waited {
    fn of_this_thread() -> io::Result<Waited> {
        Ok(Waited { thread: thread::current().id(), file: File::open("/proc/thread-self/schedstat")? })
    }

    /// Nanoseconds: the second number of the file (Documentation/scheduler/sched-stats.rst).
    fn nanoseconds(&self) -> Option<u64> {
        let mut text = [0; 64];
        let length = self.file.read_at(&mut text, 0).ok()?;
        std::str::from_utf8(text.get(..length)?).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
    }
}

/// What has been told to the guest.
#[derive(Debug, Default)]
pub(super) struct StealTime {
    waited: Option<Waited>,
    /// When the scheduler was asked last, and what it said.
    asked: Option<Instant>,
    last: u64,
}

impl StealTime {
    /// Nanoseconds that this thread has waited since the last call.
    fn more(&mut self) -> u64 {
        if self.asked.is_some_and(|asked| asked.elapsed() < INTERVAL) {
            return 0;
        }
        self.asked = Some(Instant::now());
        let this_thread = thread::current().id();
        if self.waited.as_ref().is_none_or(|waited| waited.thread != this_thread) {
            self.waited = Waited::of_this_thread().ok();
            self.last = 0;
        }
        let Some(now) = self.waited.as_ref().and_then(Waited::nanoseconds) else { return 0 };
        now.saturating_sub(std::mem::replace(&mut self.last, now))
    }
}

impl Vcpu {
    fn steal_time_address(&self) -> Option<u64> {
        let value = self.msrs.steal_time();
        (value & ENABLED != 0).then_some(value & ADDRESS)
    }

    /// The vCPU is about to run: adds what was stolen since it did last.
    pub(super) fn record_steal_time(&mut self) {
        let Some(gpa) = self.steal_time_address() else { return };
        let memory = self.vm.memory();
        let (mut steal, mut version) = ([0; 8], [0; 4]);
        if !memory.read(gpa, &mut steal) || !memory.read(gpa + VERSION, &mut version) {
            return;
        }
        let more = self.steal.more();
        // Odd while the structure changes, as the guest's read protocol demands.
        let version = u32::from_le_bytes(version).wrapping_add(1) | 1;
        memory.write(gpa + VERSION, &version.to_le_bytes());
        memory.write(gpa + PREEMPTED, &[0]);
        memory.write(gpa, &u64::from_le_bytes(steal).wrapping_add(more).to_le_bytes());
        memory.write(gpa + VERSION, &version.wrapping_add(1).to_le_bytes());
    }

    /// The vCPU does not run any more: others need not wait for it.
    pub(super) fn note_preemption(&self) {
        if let Some(gpa) = self.steal_time_address() {
            self.vm.memory().write(gpa + PREEMPTED, &[VCPU_PREEMPTED]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Program;

    const MSR_KVM_STEAL_TIME: u32 = 0x4b56_4d03;

    #[test]
    fn the_structure_is_kept_up_to_date() {
        let mut program = Program::new(&[0xf4, 0xf4]);
        let vcpu = &mut program.vcpu;
        assert!(vcpu.write_msr(MSR_KVM_STEAL_TIME, 0x3003, true).is_err(), "a reserved bit");
        vcpu.write_msr(MSR_KVM_STEAL_TIME, 0x3001, true).unwrap();
        let mut versions = [0; 2];
        for version in &mut versions {
            vcpu.run().unwrap();
            let mut structure = [0; 20];
            vcpu.vm.memory().read(0x3000, &mut structure);
            *version = structure[8];
            assert_eq!((structure[8] & 1, structure[16]), (0, 1), "complete; not running now");
        }
        assert!(versions[1] > versions[0]);
    }
}
