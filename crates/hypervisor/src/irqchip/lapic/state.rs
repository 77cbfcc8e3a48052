//! The registers of one local APIC and what writing them does, without any concurrency: the shell in `mod.rs` locks,
//! calls, publishes the outcome and carries out the [`Effects`] after it has let go of the lock.

use kvm_bindings::kvm_lapic_state;

use super::super::bus::{Address, DeliveryMode, Message, Shorthand};
use super::registers::*;
use super::timer::{ApicTimer, Mode};
use super::{ApicError, ApicFeatures, Eoi};

/// IA32_APIC_BASE: this is the bootstrap processor.
pub(super) const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub(super) const BASE_X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE: the APIC is enabled.
pub(super) const BASE_ENABLED: u64 = 1 << 11;
/// Where the register page is after reset.
const BASE_DEFAULT: u64 = 0xfee0_0000;

/// What is left to do once the lock is released.
#[derive(Debug, Default)]
pub(super) struct Effects {
    /// An IPI to send.
    pub(super) message: Option<Message>,
    /// An EOI to tell the IOAPIC.
    pub(super) eoi: Option<Eoi>,
    /// The timer's interrupt is to be delivered.
    pub(super) timer_fired: bool,
}

/// One local APIC.
pub(super) struct State {
    regs: Registers,
    id: u32,
    bsp: bool,
    base: u64,
    features: ApicFeatures,
    /// No IOAPIC of ours: the guest may ask to suppress EOI broadcasts.
    directed_eoi: bool,
    pub(super) timer: ApicTimer,
    /// What the host's timer was last set to.
    pub(super) programmed: Option<u64>,
}

impl State {
    pub(super) fn new(id: u32, bsp: bool, directed_eoi: bool, bus_cycle_ns: u64) -> Self {
        Self {
            regs: Registers::new(),
            id,
            bsp,
            base: 0,
            features: ApicFeatures::default(),
            directed_eoi,
            timer: ApicTimer::new(bus_cycle_ns),
            programmed: None,
        }
    }

    /// The state after reset, or after INIT, which keeps IA32_APIC_BASE and the ID (SDM 11.4.7). `lint0_extint`: KVM
    /// lets the BSP's LINT0 take interrupts of the 8259 although the SDM has it masked.
    pub(super) fn reset(&mut self, init: bool, lint0_extint: bool) {
        if !init {
            self.change_base(BASE_DEFAULT | BASE_ENABLED | if self.bsp { BASE_BSP } else { 0 });
            self.regs.set(ID, self.id << 24);
        }
        self.timer.stop();
        self.set_version();
        for &(register, _) in &LVT[..self.lvt_entries()] {
            self.regs.set(register, LVT_MASKED);
        }
        self.timer.set_mode(Mode::OneShot);
        if self.bsp && lint0_extint {
            self.regs.set(LVT_LINT0, LVT_MODE);
        }
        self.regs.set(DFR, DFR_FLAT);
        self.regs.set(SVR, 0xff);
        if !self.x2apic() {
            self.regs.set(LDR, 0);
        }
        for register in [TPR, ESR, ICR, ICR2, TIMER_DIVIDE, TIMER_INITIAL] {
            self.regs.set(register, 0);
        }
        for index in 0..8 {
            for base in [IRR, ISR, TMR] {
                self.regs.set(base + 0x10 * index, 0);
            }
        }
        self.timer.set_divide(0, 0, None);
    }

    pub(super) fn set_features(&mut self, features: ApicFeatures) {
        let before = self.lvt_entries();
        self.features = features;
        for &(register, _) in LVT.get(before..self.lvt_entries()).unwrap_or_default() {
            self.regs.set(register, LVT_MASKED);
        }
        self.set_version();
    }

    pub(super) fn base(&self) -> u64 {
        self.base
    }

    pub(super) fn hardware_enabled(&self) -> bool {
        self.base & BASE_ENABLED != 0
    }

    pub(super) fn x2apic(&self) -> bool {
        self.base & (BASE_ENABLED | BASE_X2APIC) == BASE_ENABLED | BASE_X2APIC
    }

    fn software_enabled(&self) -> bool {
        self.regs.get(SVR) & SVR_ENABLED != 0
    }

    pub(super) fn tpr(&self) -> u8 {
        self.regs.get(TPR) as u8
    }

    /// LVT entries that the version register reports.
    fn lvt_entries(&self) -> usize {
        if self.features.cmci { LVT.len() } else { LVT.len() - 1 }
    }

    fn set_version(&mut self) {
        let directed = self.directed_eoi && self.features.x2apic;
        let entries = (self.lvt_entries() as u32 - 1) << 16;
        self.regs.set(VERSION, VERSION_NUMBER | entries | if directed { VERSION_DIRECTED_EOI } else { 0 });
    }

    /// Where others find this APIC.
    pub(super) fn address(&self) -> Address {
        let lint0 = self.regs.get(LVT_LINT0);
        let lint0_mode = (lint0 & LVT_MASKED == 0).then(|| DeliveryMode::from_bits(lint0 >> 8));
        let dfr = self.regs.get(DFR);
        Address::new(self.regs.get(LDR), (self.regs.get(ID) >> 24) as u8)
            .present(self.hardware_enabled())
            .x2apic(self.x2apic())
            .software_enabled(self.software_enabled())
            .flat(dfr == DFR_FLAT)
            .cluster(dfr == DFR_CLUSTER)
            .accepts_pic(!self.hardware_enabled() || lint0_mode == Some(DeliveryMode::ExtInt))
            .lint0_nmi(lint0_mode == Some(DeliveryMode::Nmi))
    }

    // ---- interrupts

    /// Puts `vector` into the IRR; false if the APIC does not take interrupts.
    pub(super) fn accept(&mut self, vector: u8, level: bool) -> bool {
        if !self.hardware_enabled() || !self.software_enabled() {
            return false;
        }
        self.regs.assign(TMR, vector, level);
        self.regs.assign(IRR, vector, true);
        true
    }

    /// The highest requested vector whose class is above the processor priority (SDM 11.8.3.1); updates the PPR.
    pub(super) fn deliverable(&mut self) -> Option<u8> {
        let tpr = self.regs.get(TPR);
        let in_service = u32::from(self.regs.highest(ISR).unwrap_or(0));
        let ppr = if tpr & 0xf0 >= in_service & 0xf0 { tpr & 0xff } else { in_service & 0xf0 };
        self.regs.set(PPR, ppr);
        if !self.hardware_enabled() {
            return None;
        }
        self.regs.highest(IRR).filter(|&vector| u32::from(vector & 0xf0) > ppr)
    }

    /// The vector that the timer sends, unless that is masked.
    pub(super) fn timer_vector(&self) -> Option<u8> {
        let lvt = self.regs.get(LVT_TIMER);
        (lvt & LVT_MASKED == 0).then_some(lvt as u8)
    }

    /// Takes the deliverable vector into service.
    pub(super) fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.deliverable()?;
        self.regs.assign(IRR, vector, false);
        self.regs.assign(ISR, vector, true);
        Some(vector)
    }

    /// Takes `vector` into service at once, if its class is above the processor priority and the APIC takes interrupts. It need not have been
    /// requested.
    pub(super) fn take(&mut self, vector: u8) -> bool {
        // For the PPR.
        self.deliverable();
        let above = u32::from(vector & 0xf0) > self.regs.get(PPR) & 0xf0;
        let taken = above && self.hardware_enabled() && self.software_enabled();
        if taken {
            self.regs.assign(TMR, vector, false);
            self.regs.assign(ISR, vector, true);
        }
        taken
    }

    /// Ends the interrupt in service with the highest priority.
    pub(super) fn end_of_interrupt(&mut self, effects: &mut Effects) {
        let Some(vector) = self.regs.highest(ISR) else { return };
        self.regs.assign(ISR, vector, false);
        effects.eoi = Some(Eoi {
            vector,
            level: self.regs.test(TMR, vector),
            suppressed: self.regs.get(SVR) & SVR_SUPPRESS_EOI_BROADCAST != 0,
        });
    }

    /// The vector whose EOI could be left to shared memory: alone in service and nothing waits behind it.
    pub(super) fn lone_in_service(&self) -> Option<u8> {
        if self.regs.highest(IRR).is_some() {
            return None;
        }
        self.regs.highest(ISR)
    }

    /// See [`Lapic::vapic_word`](super::Lapic::vapic_word).
    pub(super) fn vapic_word(&self) -> u32 {
        let highest = |base| u32::from(self.regs.highest(base).unwrap_or(0));
        self.regs.get(TPR) & 0xff | (highest(ISR) & 0xf0) << 8 | highest(IRR) << 24
    }

    /// Whether `vector` still waits for its EOI here.
    pub(super) fn awaits_eoi(&self, vector: u8) -> bool {
        self.regs.test(ISR, vector) || self.regs.test(IRR, vector)
    }

    /// The message that an LVT entry gives; the performance entry masks itself (SDM 11.5.1).
    pub(super) fn local_interrupt(&mut self, register: usize) -> Option<Message> {
        let entry = self.regs.get(register);
        if !self.hardware_enabled() || entry & LVT_MASKED != 0 {
            return None;
        }
        if register == LVT_PERFORMANCE {
            self.regs.set(register, entry | LVT_MASKED);
        }
        Some(Message {
            vector: entry as u8,
            mode: DeliveryMode::from_bits(entry >> 8),
            logical: false,
            level: entry & LVT_LEVEL != 0,
            assert: true,
            shorthand: Shorthand::Itself,
            destination: 0,
            redirection_hint: false,
        })
    }

    // ---- registers

    /// Whether `offset` is a register that can be read in the present mode.
    pub(super) fn readable(&self, offset: usize) -> bool {
        readable(offset, self.x2apic(), self.lvt_entries())
    }

    pub(super) fn read(&mut self, offset: usize, now: u64) -> u32 {
        match offset & 0x3f0 {
            APR => 0,
            TIMER_CURRENT => self.timer.current_count(now),
            PPR => {
                self.deliverable();
                self.regs.get(PPR)
            }
            register => self.regs.get(register),
        }
    }

    /// Writes a register, as KVM's `kvm_lapic_reg_write`. An error is #GP for an MSR and nothing for MMIO.
    pub(super) fn write(
        &mut self,
        offset: usize,
        value: u32,
        now: u64,
        effects: &mut Effects,
    ) -> Result<(), ApicError> {
        let x2apic = self.x2apic();
        match offset {
            ID if !x2apic => self.regs.set(ID, value & 0xff00_0000),
            TPR if !x2apic || value <= 0xff => self.regs.set(TPR, value & 0xff),
            EOI if !x2apic || value == 0 => self.end_of_interrupt(effects),
            LDR if !x2apic => self.regs.set(LDR, value & LDR_MASK),
            DFR if !x2apic => self.regs.set(DFR, value | 0x0fff_ffff),
            SVR => self.write_svr(value),
            // An ESR write only shows the errors gathered since the last one; no error is ever gathered.
            ESR if !x2apic || value == 0 => {}
            ICR if !x2apic => {
                let value = value & !ICR_BUSY;
                self.regs.set(ICR, value);
                effects.message = Some(Message::from_icr(value, self.regs.get(ICR2) >> 24));
            }
            ICR2 if !x2apic => self.regs.set(ICR2, value & 0xff00_0000),
            LVT_TIMER | LVT_THERMAL | LVT_PERFORMANCE | LVT_LINT0 | LVT_LINT1 | LVT_ERROR | LVT_CMCI => {
                return self.write_lvt(offset, value);
            }
            TIMER_INITIAL => {
                if self.timer.mode() != Mode::TscDeadline {
                    self.regs.set(TIMER_INITIAL, value);
                    self.timer.start(value, now);
                }
            }
            TIMER_DIVIDE => {
                self.regs.set(TIMER_DIVIDE, value & 0xb);
                self.timer.set_divide(value, self.regs.get(TIMER_INITIAL), Some(now));
            }
            SELF_IPI if x2apic && value <= 0xff => {
                effects.message = Some(Message::from_icr(1 << 18 | value, 0));
            }
            _ => return Err(ApicError::Reserved),
        }
        Ok(())
    }

    /// Software-disabling masks every LVT entry (SDM 11.4.7.2).
    fn write_svr(&mut self, value: u32) {
        let directed = self.regs.get(VERSION) & VERSION_DIRECTED_EOI != 0;
        let mask = 0x3ff | if directed { SVR_SUPPRESS_EOI_BROADCAST } else { 0 };
        self.regs.set(SVR, value & mask);
        if value & SVR_ENABLED == 0 {
            for &(register, _) in &LVT[..self.lvt_entries()] {
                self.regs.set(register, self.regs.get(register) | LVT_MASKED);
            }
        }
    }

    fn write_lvt(&mut self, register: usize, value: u32) -> Result<(), ApicError> {
        let supported = &LVT[..self.lvt_entries()];
        let Some(&(_, mut mask)) = supported.iter().find(|&&(offset, _)| offset == register) else {
            return Err(ApicError::Reserved);
        };
        if register == LVT_TIMER {
            mask |= self.timer_mode_mask();
        }
        let disabled = if self.software_enabled() { 0 } else { LVT_MASKED };
        self.regs.set(register, (value | disabled) & mask);
        if register == LVT_TIMER {
            self.update_timer_mode();
        }
        Ok(())
    }

    fn timer_mode_mask(&self) -> u32 {
        LVT_TIMER_PERIODIC | if self.features.tsc_deadline { LVT_TIMER_TSC_DEADLINE } else { 0 }
    }

    fn update_timer_mode(&mut self) {
        let mode = Mode::from_lvt(self.regs.get(LVT_TIMER) & self.timer_mode_mask());
        if self.timer.set_mode(mode) {
            self.regs.set(TIMER_INITIAL, 0);
        }
    }

    // ---- x2APIC

    pub(super) fn read_msr(&mut self, offset: usize, now: u64) -> Result<u64, ApicError> {
        if !self.x2apic() || !self.readable(offset) {
            return Err(ApicError::Reserved);
        }
        if offset == ICR {
            return Ok(u64::from(self.regs.get(ICR)) | u64::from(self.regs.get(ICR2)) << 32);
        }
        Ok(u64::from(self.read(offset, now)))
    }

    pub(super) fn write_msr(
        &mut self,
        offset: usize,
        value: u64,
        now: u64,
        effects: &mut Effects,
    ) -> Result<(), ApicError> {
        if !self.x2apic() {
            return Err(ApicError::Reserved);
        }
        if offset != ICR {
            let value = u32::try_from(value).map_err(|_| ApicError::Reserved)?;
            return self.write(offset, value, now, effects);
        }
        if value & X2APIC_ICR_RESERVED != 0 {
            return Err(ApicError::Reserved);
        }
        let low = value as u32 & !ICR_BUSY;
        let high = (value >> 32) as u32;
        self.regs.set(ICR, low);
        self.regs.set(ICR2, high);
        effects.message = Some(Message::from_icr(low, high));
        Ok(())
    }

    // ---- IA32_APIC_BASE

    /// A write of IA32_APIC_BASE (SDM 11.4.4 and figure 11-27); the host may make any transition.
    pub(super) fn set_base(&mut self, value: u64, host_initiated: bool) -> Result<(), ApicError> {
        let address_bits = u32::from(self.features.physical_address_bits).clamp(12, 52);
        let reserved = u64::MAX << address_bits | 0x2ff | if self.features.x2apic { 0 } else { BASE_X2APIC };
        let mode = |base: u64| (base & BASE_ENABLED != 0, base & BASE_X2APIC != 0);
        let legal = match (mode(self.base), mode(value)) {
            (_, (false, true)) => false,
            _ if host_initiated => true,
            ((true, true), (true, false)) | ((false, _), (true, true)) => false,
            _ => true,
        };
        if value & reserved != 0 || !legal {
            return Err(ApicError::Reserved);
        }
        self.change_base(value);
        Ok(())
    }

    fn change_base(&mut self, value: u64) {
        let changed = self.base ^ value;
        self.base = value;
        if changed & BASE_ENABLED != 0 && value & BASE_ENABLED != 0 {
            self.regs.set(ID, self.id << 24);
        }
        if changed & BASE_X2APIC != 0 && value & BASE_ENABLED != 0 {
            if value & BASE_X2APIC != 0 {
                self.regs.set(ID, self.id);
                self.regs.set(LDR, x2apic_ldr(self.id));
            } else {
                self.regs.set(ID, self.id << 24);
            }
        }
    }

    // ---- KVM_GET_LAPIC, KVM_SET_LAPIC

    pub(super) fn image(&mut self, now: u64, extended_ids: bool) -> kvm_lapic_state {
        let mut regs = self.regs.clone();
        regs.set(TIMER_CURRENT, self.read(TIMER_CURRENT, now));
        if self.x2apic() && !extended_ids {
            regs.set(ID, self.id << 24);
        }
        regs.to_image()
    }

    pub(super) fn set_image(
        &mut self,
        image: &kvm_lapic_state,
        now: u64,
        extended_ids: bool,
    ) -> Result<(), ApicError> {
        let mut regs = Registers::from_image(image);
        if self.x2apic() {
            if extended_ids && regs.get(ID) != self.id {
                return Err(ApicError::WrongId);
            }
            regs.set(ID, self.id);
            regs.set(LDR, x2apic_ldr(self.id));
        }
        self.regs = regs;
        self.set_version();
        let initial = self.regs.get(TIMER_INITIAL);
        self.update_timer_mode();
        self.timer.set_divide(self.regs.get(TIMER_DIVIDE), initial, None);
        self.timer.resume(self.regs.get(TIMER_INITIAL), self.regs.get(TIMER_CURRENT), now);
        self.regs.set(TIMER_CURRENT, 0);
        Ok(())
    }
}

/// The logical ID in x2APIC mode: cluster in bits 31:16, one of 16 in bits 15:0 (SDM 11.12.10.2).
fn x2apic_ldr(id: u32) -> u32 {
    id >> 4 << 16 | 1 << (id & 0xf)
}
