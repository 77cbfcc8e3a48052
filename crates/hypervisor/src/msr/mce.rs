//! Machine-check registers (SDM vol. 3B, 16.3; kernel: `get_msr_mce`, `set_msr_mce` in arch/x86/kvm/x86.c). No
//! machine check ever happens by itself; a client may inject one.

use kvm_bindings::kvm_x86_mce;

/// Banks at most (KVM_CAP_MCE).
pub const BANKS: usize = 32;
const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
const MCG_CTL: u32 = 0x17b;
const MC0_CTL2: u32 = 0x280;
const MC0_CTL: u32 = 0x400;
const MCG_EXT_CTL: u32 = 0x4d0;

/// MCG_CAP bits.
const CTL_P: u64 = 1 << 8;
const CMCI_P: u64 = 1 << 10;
const SER_P: u64 = 1 << 24;
const LMCE_P: u64 = 1 << 27;
/// What KVM_X86_SETUP_MCE takes besides the number of banks and the extended-state count.
pub const SUPPORTED: u64 = CTL_P | CMCI_P | SER_P | LMCE_P;
/// IA32_MCi_CTL2: CMCI enable and threshold.
const CTL2_VALID: u64 = 1 << 30 | 0x7fff;

/// IA32_MCi_CTL2.CMCI_EN.
const CTL2_CMCI: u64 = 1 << 30;
/// IA32_MCi_STATUS bits (SDM vol. 3B, 16.3.2.2).
mod status {
    pub(super) const AR: u64 = 1 << 55;
    pub(super) const S: u64 = 1 << 56;
    pub(super) const PCC: u64 = 1 << 57;
    pub(super) const UC: u64 = 1 << 61;
    pub(super) const OVER: u64 = 1 << 62;
    pub(super) const VAL: u64 = 1 << 63;
}
/// IA32_MCG_STATUS.MCIP.
const MCIP: u64 = 1 << 2;

/// What an injected machine check leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injected {
    /// Nothing more.
    Recorded,
    /// A corrected-machine-check interrupt.
    Cmci,
    /// #MC.
    Exception,
    /// Shutdown: the processor cannot take #MC now.
    Shutdown,
}

/// The registers of one vCPU.
#[derive(Clone, Debug)]
pub(super) struct MachineCheck {
    capabilities: u64,
    status: u64,
    control: u64,
    extended_control: u64,
    /// CTL, STATUS, ADDR, MISC of each bank.
    banks: Box<[u64; 4 * BANKS]>,
    control2: [u64; BANKS],
}

impl Default for MachineCheck {
    fn default() -> MachineCheck {
        MachineCheck {
            capabilities: BANKS as u64,
            status: 0,
            control: 0,
            extended_control: 0,
            banks: Box::new([0; 4 * BANKS]),
            control2: [0; BANKS],
        }
    }
}

impl MachineCheck {
    /// KVM_X86_SETUP_MCE.
    pub(super) fn setup(&mut self, capabilities: u64) -> bool {
        let count = (capabilities & 0xff) as usize;
        if count == 0 || count > BANKS || capabilities & !(SUPPORTED | 0xff_00ff) != 0 {
            return false;
        }
        self.capabilities = capabilities;
        if self.has(CTL_P) {
            self.control = u64::MAX;
        }
        for bank in 0..count {
            self.banks[4 * bank] = u64::MAX;
            if self.has(CMCI_P) {
                self.control2[bank] = 0;
            }
        }
        true
    }

    /// KVM_X86_SET_MCE. `takes_exceptions`: CR4.MCE. `None`: no such bank, or no valid status. (Kernel:
    /// `kvm_vcpu_ioctl_x86_set_mce`.)
    pub(super) fn inject(&mut self, mce: &kvm_x86_mce, takes_exceptions: bool) -> Option<Injected> {
        let bank = usize::from(mce.bank);
        if bank >= self.count() || mce.status & status::VAL == 0 {
            return None;
        }
        let old = self.banks[4 * bank + 1];
        let uncorrected = mce.status & status::UC != 0;
        let needs_no_action = mce.mcg_status == 0 && mce.status & (status::PCC | status::S | status::AR) == 0;
        if uncorrected && needs_no_action {
            self.record(mce, 0);
            self.status = mce.mcg_status;
            let signalled = self.has(CMCI_P) && self.control2[bank] & CTL2_CMCI != 0;
            return Some(if signalled { Injected::Cmci } else { Injected::Recorded });
        }
        let overflow = if old & status::VAL != 0 { status::OVER } else { 0 };
        if !uncorrected {
            if old & (status::VAL | status::UC) == status::VAL | status::UC {
                self.banks[4 * bank + 1] |= status::OVER;
            } else {
                self.record(mce, overflow);
            }
            return Some(Injected::Recorded);
        }
        // Reporting of uncorrected errors is off.
        if self.has(CTL_P) && self.control != u64::MAX || self.banks[4 * bank] != u64::MAX {
            return Some(Injected::Recorded);
        }
        if self.status & MCIP != 0 || !takes_exceptions {
            return Some(Injected::Shutdown);
        }
        self.record(mce, overflow);
        self.status = mce.mcg_status;
        Some(Injected::Exception)
    }

    fn record(&mut self, mce: &kvm_x86_mce, overflow: u64) {
        let at = 4 * usize::from(mce.bank);
        self.banks[at + 1..at + 4].copy_from_slice(&[mce.status | overflow, mce.addr, mce.misc]);
    }

    /// MCG_LMCE_P: machine checks can be local to a processor.
    pub(super) fn has_lmce(&self) -> bool {
        self.has(LMCE_P)
    }

    /// MCG_SER_P: software can recover from uncorrected errors.
    pub(super) fn has_recovery(&self) -> bool {
        self.has(SER_P)
    }

    /// MCG_CMCI_P: corrected errors can be signalled.
    pub(super) fn has_cmci(&self) -> bool {
        self.has(CMCI_P)
    }

    fn has(&self, bit: u64) -> bool {
        self.capabilities & bit != 0
    }

    fn count(&self) -> usize {
        (self.capabilities & 0xff) as usize
    }

    /// Which bank's CTL2 `index` is, if there are so many banks.
    fn control2_index(&self, index: u32) -> Option<usize> {
        let bank = index.checked_sub(MC0_CTL2)? as usize;
        (bank < self.count().min(BANKS)).then_some(bank)
    }

    fn bank_index(&self, index: u32) -> Option<usize> {
        let offset = index.checked_sub(MC0_CTL)? as usize;
        (offset < 4 * self.count().min(BANKS)).then_some(offset)
    }

    pub(super) fn read(&self, index: u32, host: bool) -> Option<u64> {
        match index {
            MCG_CAP => Some(self.capabilities),
            MCG_STATUS => Some(self.status),
            MCG_CTL => (self.has(CTL_P) || host).then_some(self.control),
            MCG_EXT_CTL => host.then_some(self.extended_control),
            _ if index < MC0_CTL => {
                self.control2_index(index).filter(|_| self.has(CMCI_P) || host).map(|i| self.control2[i])
            }
            _ => self.bank_index(index).map(|i| self.banks[i]),
        }
    }

    pub(super) fn write(&mut self, index: u32, value: u64, host: bool) -> bool {
        match index {
            MCG_STATUS => {
                self.status = value;
                true
            }
            MCG_CTL => {
                let there = self.has(CTL_P) || host && value == 0;
                let valid = there && matches!(value, 0 | u64::MAX);
                if valid {
                    self.control = value;
                }
                valid
            }
            MCG_EXT_CTL => {
                // The caller has seen to it that a guest with IA32_FEATURE_CONTROL.LMCE counts as the host.
                let valid = host && value & !1 == 0;
                if valid {
                    self.extended_control = value;
                }
                valid
            }
            _ if index < MC0_CTL => self.write_control2(index, value, host),
            _ => self.write_bank(index, value, host),
        }
    }

    fn write_control2(&mut self, index: u32, value: u64, host: bool) -> bool {
        let there = self.has(CMCI_P) || host && value == 0;
        match self.control2_index(index) {
            Some(bank) if there && value & !CTL2_VALID == 0 => {
                self.control2[bank] = value;
                true
            }
            _ => false,
        }
    }

    /// CTL takes all zeros or all ones (bits 0 and 10 apart, which kernels clear), STATUS zero from a guest.
    fn write_bank(&mut self, index: u32, value: u64, host: bool) -> bool {
        let Some(at) = self.bank_index(index) else { return false };
        let valid = match at & 3 {
            0 => value == 0 || value | 1 << 10 | 1 == u64::MAX,
            1 => host || value == 0,
            _ => true,
        };
        if valid {
            self.banks[at] = value;
        }
        valid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALID: u64 = status::VAL;
    const FATAL: u64 = status::VAL | status::UC | status::PCC;

    fn mce(bank: u8, status: u64, mcg_status: u64) -> kvm_x86_mce {
        kvm_x86_mce { status, addr: 0x1000, misc: 7, mcg_status, bank, ..Default::default() }
    }

    #[test]
    fn what_errors_lead_to() {
        let with = |capabilities| {
            let mut registers = MachineCheck::default();
            assert!(registers.setup(capabilities));
            registers
        };
        let mut registers = with(CTL_P | CMCI_P | SER_P | 4);
        assert_eq!(registers.inject(&mce(4, VALID, 0), true), None, "no such bank");
        assert_eq!(registers.inject(&mce(0, 0, 0), true), None, "no valid status");
        assert_eq!(registers.inject(&mce(0, FATAL, 5), false), Some(Injected::Shutdown));
        assert_eq!(registers.inject(&mce(0, FATAL, 5), true), Some(Injected::Exception));
        assert_eq!(registers.read(0x401, true), Some(FATAL));
        assert_eq!(registers.inject(&mce(1, FATAL, 5), true), Some(Injected::Shutdown), "one is in progress");
        assert_eq!(registers.inject(&mce(0, VALID, 0), true), Some(Injected::Recorded));
        assert_eq!(registers.read(0x401, true), Some(FATAL | status::OVER), "the worse error stays");
        registers.control = 0;
        registers.status = 0;
        assert_eq!(registers.inject(&mce(2, FATAL, 5), true), Some(Injected::Recorded));
        assert_eq!(registers.read(0x409, true), Some(0), "reporting is off");
    }

    #[test]
    fn errors_without_action_are_signalled_where_asked_for() {
        let mut registers = MachineCheck::default();
        assert!(registers.setup(CMCI_P | 4));
        let ucna = mce(3, VALID | status::UC, 0);
        assert_eq!(registers.inject(&ucna, true), Some(Injected::Recorded));
        assert!(registers.write(0x283, CTL2_CMCI, false));
        assert_eq!(registers.inject(&ucna, true), Some(Injected::Cmci));
        assert_eq!(registers.read(0x40e, true), Some(0x1000));
    }
}
