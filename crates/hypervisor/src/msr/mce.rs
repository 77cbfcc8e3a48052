//! Machine-check registers (SDM vol. 3B, 16.3; kernel: `get_msr_mce`, `set_msr_mce` in arch/x86/kvm/x86.c). No
//! machine check ever happens by itself; a client may inject one.

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
                // The guest would need IA32_FEATURE_CONTROL.LMCE, which it cannot set.
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
