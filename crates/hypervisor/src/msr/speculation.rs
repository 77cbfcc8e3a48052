//! Registers by which a guest controls what its processor clears and speculates on: which of them it has, by what
//! IA32_ARCH_CAPABILITIES and CPUID tell it. Each vCPU has its own, so what one guest writes is seen by no other.

use silicon::buffers::{Cleared, Enumeration};
use silicon::model::speculation::arch_cap::{self, *};
use silicon::model::{Feature, msrs};

use super::table::Slot;
use super::{MsrEnv, MsrState};

/// Bits of IA32_ARCH_CAPABILITIES that a client may set. Those that enumerate a register which there is not are missing: their
/// guest would get #GP for what it has been told it can do.
pub const SETTABLE: u64 = RDCL_NO
    | IBRS_ALL
    | RSBA
    | SKIP_L1DFL_VMENTRY
    | SSB_NO
    | MDS_NO
    | IF_PSCHANGE_MC_NO
    | arch_cap::TSX_CTRL
    | TAA_NO
    | MMIO_IMMUNE
    | FB_CLEAR
    | FB_CLEAR_CTRL
    | RRSBA
    | BHI_NO
    | PBRSB_NO
    | GDS_CTRL
    | GDS_NO
    | RFDS_NO
    | RFDS_CLEAR
    | ITS_NO;

impl MsrState {
    /// IA32_ARCH_CAPABILITIES as the guest sees it: nothing without the CPUID bit.
    pub(crate) fn told(&self, env: &dyn MsrEnv) -> u64 {
        if env.features().has(Feature::ArchCapabilities) { self.get(Slot::ArchCapabilities) } else { 0 }
    }

    /// IA32_TSX_CTRL.
    pub(super) fn tsx_ctrl(&self) -> u64 {
        self.get(Slot::TsxControl)
    }

    /// Whether the guest (or the client, which may restore it before it sets CPUID) has IA32_TSX_CTRL.
    pub(super) fn tsx_ctrl_exists(&self, host: bool, env: &dyn MsrEnv) -> bool {
        host || self.told(env) & arch_cap::TSX_CTRL != 0
    }

    /// Whether IA32_TSX_CTRL takes RTM and HLE out of CPUID (kernel: `kvm_cpuid`).
    pub fn hides_tsx(&self) -> bool {
        self.tsx_ctrl() & msrs::tsx_ctrl::CPUID_CLEAR != 0
    }

    /// IA32_MCU_OPT_CTRL.
    pub(super) fn mcu_opt_ctrl(&self) -> u64 {
        self.get(Slot::McuOptControl)
    }

    /// Bits of IA32_MCU_OPT_CTRL that can be written; without any there is no such register.
    pub(super) fn mcu_opt_ctrl_bits(&self, host: bool, env: &dyn MsrEnv) -> u64 {
        if host {
            msrs::defined_bits(msrs::MCU_OPT_CTRL)
        } else {
            msrs::enumerated_bits(msrs::MCU_OPT_CTRL, env.features(), self.told(env))
        }
    }

    /// What VERW with a memory operand clears for the guest.
    pub fn verw_clears(&self, env: &dyn MsrEnv) -> Cleared {
        Enumeration {
            md_clear: env.features().has(Feature::MdClear),
            arch_capabilities: self.told(env),
            mcu_opt_ctrl: self.mcu_opt_ctrl() & self.mcu_opt_ctrl_bits(false, env),
        }
        .verw_clears()
    }
}

#[cfg(test)]
mod tests;
