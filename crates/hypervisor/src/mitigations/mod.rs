//! Mitigations of speculation bugs: what the host's command line asks for, what its kernel makes of it, what KVM tells guests, what
//! it does at each entry of theirs, and what a Linux guest then says of itself.
//!
//! ```text
//!   command_line ─► selected ─► (supported value, flush)   pure functions, once per parameter change
//!                      │
//!                      └──────► entry                      per hardware thread, at load, entry, exit, put
//!   linux                                                  what a guest makes of what it is told
//! ```

pub mod command_line;
pub mod entry;
pub mod linux;
pub mod measured;
pub mod report;

pub mod selected;

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use silicon::model::CpuModel;

use crate::error::Error;
use crate::msr::SETTABLE_ARCH_CAPABILITIES;
use command_line::{CommandLine, FbClearDis, L1dFlush, Promise};
use selected::{Flush, Hardware, Selected};

/// The host's mitigations while it runs.
#[derive(Debug)]
pub struct Mitigations {
    hardware: Hardware,
    selected: Selected,
    fb_clear_dis: FbClearDis,
    promise: Promise,
    /// What guests are told instead of what is supported, if somebody has chosen it.
    chosen: Option<u64>,
    /// The host has a part's bugs, so that there is something to do.
    active: bool,
    state: Mutex<State>,
    /// What entries do ([`Flush`] as its bits): a copy of the state's, for them to read.
    flush: AtomicU8,
}

/// What changes with `kvm_intel.vmentry_l1d_flush`.
#[derive(Debug)]
struct State {
    parameter: L1dFlush,
    /// IA32_ARCH_CAPABILITIES as new guests may have it.
    supported: u64,
    /// VMs that have been told SKIP_L1DFL_VMENTRY on a host that has to flush.
    promises: u32,
}

impl Mitigations {
    /// Those of a host of `model`, booted with `line`.
    pub fn new(model: &CpuModel, line: &CommandLine) -> Mitigations {
        let hardware = Hardware::of(model, line);
        let selected = Selected::of(&hardware, line);
        let flush = selected.flush(&hardware, line.l1d_flush);
        let supported = selected.supported(&hardware, flush);
        Mitigations {
            hardware,
            selected,
            fb_clear_dis: line.fb_clear_dis,
            promise: line.promise,
            chosen: model.chosen_arch_capabilities().map(|chosen| chosen & SETTABLE_ARCH_CAPABILITIES),
            active: line.part.is_some(),
            state: Mutex::new(State { parameter: line.l1d_flush, supported, promises: 0 }),
            flush: AtomicU8::new(flush as u8),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The processor.
    pub fn hardware(&self) -> &Hardware {
        &self.hardware
    }

    /// What the host does.
    pub fn selected(&self) -> &Selected {
        &self.selected
    }

    /// When FB_CLEAR_DIS is written.
    pub fn fb_clear_dis(&self) -> FbClearDis {
        self.fb_clear_dis
    }

    /// Whether there is anything to do at entries and exits.
    pub fn active(&self) -> bool {
        self.active
    }

    /// What entries do about L1 terminal fault.
    pub fn flush(&self) -> Flush {
        Flush::from_bits(self.flush.load(Ordering::Relaxed))
    }

    /// `kvm_intel.vmentry_l1d_flush` as it was set last.
    pub fn parameter(&self) -> L1dFlush {
        self.state().parameter
    }

    /// IA32_ARCH_CAPABILITIES as the guests of new VMs may have it. It was worked out when the parameter was set last (B1, B2).
    pub fn supported(&self) -> u64 {
        self.chosen.unwrap_or_else(|| self.state().supported)
    }

    /// Writes `kvm_intel.vmentry_l1d_flush`.
    ///
    /// # Errors
    ///
    /// EBUSY, and nothing changes, if guests have been told SKIP_L1DFL_VMENTRY and the host is to stop flushing, where
    /// `ring3.l1d_flush_promise=refuse`.
    pub fn set_parameter(&self, parameter: L1dFlush) -> Result<(), Error> {
        let mut state = self.state();
        let flush = self.selected.flush(&self.hardware, parameter);
        if flush == Flush::Never && self.promise == Promise::Refuse && state.promises != 0 {
            return Err(Error::Busy("guests have been told that they need not flush the L1 data cache"));
        }
        state.parameter = parameter;
        state.supported = self.selected.supported(&self.hardware, flush);
        self.flush.store(flush as u8, Ordering::Relaxed);
        Ok(())
    }

    /// A VM is told SKIP_L1DFL_VMENTRY: what its entries do at least from now on.
    ///
    /// # Errors
    ///
    /// EINVAL if the host does not flush and makes no promises of its own (`ring3.l1d_flush_promise=refuse`).
    pub(crate) fn promise(&self) -> Result<Flush, Error> {
        let mut state = self.state();
        let granted = match self.selected.flush(&self.hardware, state.parameter) {
            Flush::NotRequired => return Ok(Flush::NotRequired),
            Flush::Never if self.promise == Promise::Refuse => {
                return Err(Error::Invalid("SKIP_L1DFL_VMENTRY on a host with vmentry_l1d_flush=never"));
            }
            Flush::Never => Flush::Cond,
            flush => flush,
        };
        state.promises += 1;
        Ok(granted)
    }

    /// A VM that had a promise is no more.
    pub(crate) fn release(&self) {
        let mut state = self.state();
        state.promises = state.promises.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::HostParams;
    use silicon::model::speculation::arch_cap::SKIP_L1DFL_VMENTRY;

    fn mitigations(line: &str) -> Mitigations {
        Mitigations::new(&CpuModel::default(), &HostParams::parse(line).unwrap().mitigations)
    }

    /// B2: what is reported follows the parameter at once.
    #[test]
    fn ac_b2_the_supported_value_follows_the_parameter() {
        let host = mitigations("ring3.part=skylake-sp");
        let skips = || host.supported() & SKIP_L1DFL_VMENTRY != 0;
        assert!(skips() && host.flush() == Flush::Cond);
        host.set_parameter(L1dFlush::Never).unwrap();
        assert!(!skips() && host.flush() == Flush::Never);
        host.set_parameter(L1dFlush::Always).unwrap();
        assert!(skips() && host.flush() == Flush::Always);
        let immune = mitigations("ring3.part=ice-lake-sp");
        immune.set_parameter(L1dFlush::Never).unwrap();
        assert_eq!(immune.flush(), Flush::NotRequired, "writes do nothing where there is no L1TF");
        assert!(immune.supported() & SKIP_L1DFL_VMENTRY != 0);
    }

    /// B4, the policy that refuses.
    #[test]
    fn ac_b4_the_parameter_is_refused_while_guests_rely_on_it() {
        let host = mitigations("ring3.part=skylake-sp ring3.l1d_flush_promise=refuse");
        assert_eq!(host.promise().unwrap(), Flush::Cond);
        host.set_parameter(L1dFlush::Always).unwrap();
        let error = host.set_parameter(L1dFlush::Never).unwrap_err();
        assert_eq!(error.errno(), libc::EBUSY);
        assert_eq!(
            (host.parameter(), host.flush()),
            (L1dFlush::Always, Flush::Always),
            "nothing has changed"
        );
        host.release();
        host.set_parameter(L1dFlush::Never).unwrap();
        assert_eq!(host.promise().unwrap_err().errno(), libc::EINVAL, "nobody is told what is not so");
    }

    #[test]
    fn ac_b4_a_promise_can_be_given_by_a_host_that_does_not_flush() {
        let host = mitigations("ring3.part=skylake-sp kvm_intel.vmentry_l1d_flush=never");
        assert_eq!(host.promise().unwrap(), Flush::Cond, "from now on it does, for this VM");
        assert_eq!(mitigations("").promise().unwrap(), Flush::NotRequired);
    }
}
