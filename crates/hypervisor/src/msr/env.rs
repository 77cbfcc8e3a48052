//! The processor and local APIC of a vCPU as MSRs act on them.

use silicon::Cpu;
use silicon::buffers::Cleared;
use silicon::model::msrs::StateMsr;
use silicon::model::{Feature, Features};

use super::MsrEnv;
use crate::irqchip::lapic::Lapic;

/// IA32_APIC_BASE: x2APIC mode, enabled, and the bits that are reserved whatever the processor has.
const APIC_BASE_X2APIC: u64 = 1 << 10;
const APIC_BASE_ENABLED: u64 = 1 << 11;
const APIC_BASE_RESERVED: u64 = 0x2ff;

/// A vCPU's parts, borrowed for one access.
pub struct CpuEnv<'a> {
    /// The processor.
    pub cpu: &'a mut Cpu,
    /// Its local APIC, if the VM has them in the kernel.
    pub lapic: Option<&'a Lapic>,
    /// IA32_APIC_BASE if it has not.
    pub apic_base: &'a mut u64,
    /// Paravirtual features that the guest is told of.
    pub pv_features: u32,
    /// Features of ring3's own.
    pub own_features: u32,
    /// The guest's TSC frequency.
    pub tsc_khz: u32,
}

/// An address with its high bits made copies of the highest that counts.
fn canonical(address: u64, bits: u8) -> u64 {
    let shift = 64 - bits;
    ((address << shift) as i64 >> shift) as u64
}

impl MsrEnv for CpuEnv<'_> {
    fn features(&self) -> &Features {
        &self.cpu.features
    }

    fn pv_features(&self) -> u32 {
        self.pv_features
    }

    fn own_features(&self) -> u32 {
        self.own_features
    }

    fn has_lapic(&self) -> bool {
        self.lapic.is_some()
    }

    fn debugctl(&mut self) -> &mut u64 {
        &mut self.cpu.state.debugctl
    }

    fn clear_buffers(&mut self, what: Cleared) {
        self.cpu.clear_buffers(what);
    }

    fn state_msr(&self, msr: StateMsr) -> u64 {
        self.cpu.read_state_msr(msr)
    }

    /// The client may set EFER whatever the paging mode, and SYSENTER addresses are made canonical (kernel:
    /// `set_efer`, `__kvm_set_msr`).
    fn set_state_msr(&mut self, msr: StateMsr, value: u64, host: bool) -> bool {
        let value = match msr {
            StateMsr::SysenterEsp | StateMsr::SysenterEip => {
                canonical(value, self.cpu.features.linear_bits())
            }
            _ => value,
        };
        let valid = match msr {
            StateMsr::Efer if host => value & !(Cpu::EFER_DEFINED) == 0,
            _ => self.cpu.valid_state_msr(msr, value),
        };
        if valid {
            self.cpu.put_state_msr(msr, value);
        }
        valid
    }

    fn shift_tsc(&mut self, by: u64) {
        let offset = &mut self.cpu.controls.tsc_offset;
        *offset = offset.wrapping_add(by);
        // The deadline is a value of the counter, so it is nearer or farther now.
        let deadline = self.tsc_deadline();
        if deadline != 0 {
            self.set_tsc_deadline(deadline);
        }
    }

    fn apic_base(&self) -> u64 {
        self.lapic.map_or(*self.apic_base, Lapic::apic_base)
    }

    fn set_apic_base(&mut self, value: u64, host: bool) -> bool {
        match self.lapic {
            Some(lapic) => lapic.set_apic_base(value, host).is_ok(),
            // The client's APIC follows; only what no APIC can be is refused.
            None => {
                let x2apic = if self.cpu.features.has(Feature::X2apic) { 0 } else { APIC_BASE_X2APIC };
                let reserved = APIC_BASE_RESERVED | x2apic | !self.cpu.features.physical_mask();
                let mode = value & (APIC_BASE_X2APIC | APIC_BASE_ENABLED);
                let valid = value & reserved == 0 && mode != APIC_BASE_X2APIC;
                if valid {
                    *self.apic_base = value;
                }
                valid
            }
        }
    }

    fn x2apic(&mut self, index: u32) -> Option<u64> {
        self.lapic?.read_msr(index).ok()
    }

    fn set_x2apic(&mut self, index: u32, value: u64) -> bool {
        self.lapic.is_some_and(|lapic| lapic.write_msr(index, value).is_ok())
    }

    fn tsc_deadline(&self) -> u64 {
        self.lapic.map_or(0, Lapic::tsc_deadline)
    }

    fn set_tsc_deadline(&mut self, value: u64) {
        if let Some(lapic) = self.lapic {
            lapic.set_tsc_deadline(value, self.cpu.tsc(), self.tsc_khz);
        }
    }
}
