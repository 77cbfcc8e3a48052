//! The page-not-present protocol (docs/features/page-not-present.md; Andy Lutomirski, 8 April 2020, thread "x86/kvm: Disable
//! KVM_ASYNC_PF_SEND_ALWAYS"): an event with the semantics of an interrupt, a ring of resolutions, and pages that come back as failed.

use kvm_bindings::kvm_x86_mce;
use silicon::exception::{Exception, vector};
use silicon::mmu::ept::SMM_SPACE;
use silicon::state::cr4;

use super::super::events::Acknowledged;
use super::{Absence, BROADCAST, PAGE_MASK, Told, Vcpu};
use crate::irqchip::bus::Message;
use crate::msr::page_not_present::{DATA, Setup};
use crate::msr::{Injected, MsrError};

/// `struct page_not_present_data`: in use, and its size.
const IN_USE: u64 = 0;
const DATA_SIZE: usize = 32;
/// Its flags.
const GVA_KNOWN: u32 = 1 << 0;
const WRITE: u32 = 1 << 1;
/// Bytes of an entry of the ring; after N of them `head`, then `tail`.
const ENTRY: u64 = 8;
/// The answer to PNP_REQUEST: the token will be resolved, or why there is none.
const NO_TOKEN: u64 = 1 << 32;
const THERE: u64 = 2 << 32;
const FAILED: u64 = 3 << 32;
const NO_MEMORY: u64 = 4 << 32;

/// #MC for an action-required memory error (SDM vol. 3B, 16.9.3.2; what QEMU has KVM inject): VAL, UC, EN, MISCV, ADDRV, S, AR, a data load;
/// the address is physical and one of a page; MCIP, EIPV, RIPV.
const MC_STATUS: u64 = 0xbd80_0000_0000_0134;
const MC_MISC: u64 = 2 << 6 | 12;
const MC_GLOBAL: u64 = 0b111;

/// Why a guest cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum CrashReason {
    /// It has touched a page whose contents are lost, and cannot be told.
    Failed = 1,
    /// It has broken the ring of resolutions.
    Ring = 2,
    /// Its data or its ring is not in memory any more.
    Memory = 3,
}

/// KVM_SYSTEM_EVENT_CRASH: the words of `kvm_run.system_event.data`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crash {
    /// Why.
    pub reason: CrashReason,
    /// Guest-physical address of the page, or of the structure.
    pub gpa: u64,
    /// Where the guest is.
    pub rip: u64,
}

/// What the host knows of the ring.
#[derive(Debug, Default)]
pub(super) struct Ring {
    /// Entries written: nobody else changes it.
    head: u32,
    /// Tokens that are not resolved.
    outstanding: u32,
    /// The client has restored the registers: whoever waits is to try again.
    restored: bool,
    pub(super) crash: Option<Crash>,
}

/// What there is in the ring is not what can be.
struct Broken(CrashReason);

impl Vcpu {
    /// PNP_DATA has been written.
    ///
    /// # Errors
    ///
    /// #GP, with the protocol off, if the data or the ring is not in memory or the ring's indices cannot be.
    pub(in crate::vcpu) fn page_not_present_written(&mut self, host: bool) -> Result<(), MsrError> {
        self.async_pf.forget(Told::NotPresent);
        self.async_pf.protocol = Ring::default();
        let setup = self.msrs.page_not_present();
        self.update_ve(setup.as_ref());
        let Some(setup) = setup else { return Ok(()) };
        if host {
            // The other registers may not be there yet.
            self.async_pf.protocol.restored = true;
            return Ok(());
        }
        self.begin(&setup).map_err(|_| {
            self.msrs.clear_page_not_present();
            self.update_ve(None);
            MsrError::Refused(DATA)
        })
    }

    /// The ring begins with what is in memory.
    fn begin(&mut self, setup: &Setup) -> Result<(), Broken> {
        let mut data = [0; DATA_SIZE];
        let readable = self.vm.memory().read(setup.data, &mut data);
        self.async_pf.protocol.head = self.indices(setup)?[0];
        self.unread(setup)?;
        if readable { Ok(()) } else { Err(Broken(CrashReason::Memory)) }
    }

    /// The client has restored the registers: the guest hears that whoever waits is to try again.
    pub(super) fn tell_restored(&mut self) {
        if !std::mem::take(&mut self.async_pf.protocol.restored) {
            return;
        }
        let Some(setup) = self.msrs.page_not_present() else { return };
        let result = self.begin(&setup).and_then(|()| {
            // If the ring is full nothing was on its way.
            if self.unread(&setup)? < setup.tokens {
                self.write_resolution(&setup, BROADCAST, false)
            } else {
                Ok(())
            }
        });
        self.survive(result, setup.ring);
    }

    /// `head` and `tail`.
    fn indices(&self, setup: &Setup) -> Result<[u32; 2], Broken> {
        let mut words = [0; 8];
        if !self.vm.memory().read(setup.ring + ENTRY * u64::from(setup.tokens), &mut words) {
            return Err(Broken(CrashReason::Memory));
        }
        let [head, tail] = words.as_chunks().0 else { return Err(Broken(CrashReason::Memory)) };
        Ok([head, tail].map(|word| u32::from_le_bytes(*word)))
    }

    /// How many resolutions the guest has not read.
    fn unread(&self, setup: &Setup) -> Result<u32, Broken> {
        let [head, tail] = self.indices(setup)?;
        let unread = head.wrapping_sub(tail);
        if head != self.async_pf.protocol.head || unread > setup.tokens {
            return Err(Broken(CrashReason::Ring));
        }
        Ok(unread)
    }

    /// Whether a token can be handed out.
    fn has_token(&self, setup: &Setup) -> Result<bool, Broken> {
        Ok(self.unread(setup)? + self.async_pf.protocol.outstanding < setup.tokens)
    }

    fn write_resolution(&mut self, setup: &Setup, token: u32, failed: bool) -> Result<(), Broken> {
        if self.unread(setup)? >= setup.tokens {
            return Err(Broken(CrashReason::Ring));
        }
        let head = self.async_pf.protocol.head;
        let at = setup.ring + ENTRY * u64::from(head & (setup.tokens - 1));
        let entry = u64::from(token) << 32 | u64::from(failed);
        let next = head.wrapping_add(1);
        let memory = self.vm.memory();
        let written = memory.write(at, &entry.to_le_bytes())
            && memory.write(setup.ring + ENTRY * u64::from(setup.tokens), &next.to_le_bytes());
        if !written {
            return Err(Broken(CrashReason::Memory));
        }
        self.async_pf.protocol.head = next;
        self.handle.stats.pnp_resolutions.count();
        if let Some(lapic) = &self.lapic {
            lapic.accept(&Message::from_icr(setup.interrupt.into(), 0));
        }
        Ok(())
    }

    /// Tells the guest that the page of `token` is not present, if it takes that now (P3).
    pub(super) fn tell_not_present(&mut self, setup: &Setup, token: u32, absence: &Absence) -> bool {
        let told = self.deliver(setup, token, absence, false);
        self.async_pf.protocol.outstanding += u32::from(told);
        told
    }

    /// Delivers the event, if the guest can take it; with `failed` its resolution comes before it (P10).
    fn deliver(&mut self, setup: &Setup, token: u32, absence: &Absence, failed: bool) -> bool {
        let ready = !setup.ve && self.takes_event() && self.async_pf.protocol.crash.is_none();
        let Some(lapic) = self.lapic.clone().filter(|_| ready) else { return false };
        let mut in_use = [0; 4];
        if !self.vm.memory().read(setup.data + IN_USE, &mut in_use) {
            self.crash(CrashReason::Memory, setup.data);
            return false;
        }
        let has_token = self.has_token(setup);
        if in_use != [0; 4]
            || !self.survive(has_token, setup.ring).unwrap_or(false)
            || !lapic.take(setup.event)
        {
            return false;
        }
        if failed {
            let written = self.write_resolution(setup, token, true);
            if self.survive(written, setup.ring).is_none() {
                return false;
            }
        }
        let known = if absence.lin.is_some() { GVA_KNOWN } else { 0 };
        let flags = known | if absence.write { WRITE } else { 0 };
        let mut data = [0; DATA_SIZE];
        data[4..8].copy_from_slice(&token.to_le_bytes());
        data[8..16].copy_from_slice(&(absence.address & !SMM_SPACE).to_le_bytes());
        data[16..24].copy_from_slice(&absence.lin.unwrap_or(0).to_le_bytes());
        data[24..28].copy_from_slice(&flags.to_le_bytes());
        // P4: what is in use is complete.
        let memory = self.vm.memory();
        if !memory.write(setup.data + 4, &data[4..])
            || !memory.write(setup.data + IN_USE, &1u32.to_le_bytes())
        {
            self.crash(CrashReason::Memory, setup.data);
            return false;
        }
        self.events.interrupt = Some(Acknowledged { vector: setup.event, software: None });
        self.handle.stats.pnp_events.count();
        true
    }

    /// The page of a token has come, or not (P8, P11).
    pub(super) fn resolve(&mut self, token: u32, failed: bool) {
        let Some(setup) = self.msrs.page_not_present() else { return };
        self.async_pf.protocol.outstanding -= 1;
        let written = self.write_resolution(&setup, token, failed);
        self.survive(written, setup.ring);
    }

    /// The guest has touched a page that is known to have failed: it is told, or gets #MC if it wants that, or cannot go on (P6, P7).
    pub(super) fn tell_failed(&mut self, setup: &Setup, absence: &Absence) {
        let page = absence.page();
        let token = self.async_pf.token(self.handle.id());
        if self.deliver(setup, token, absence, true) {
            self.vm.page_ins().forget_failure(page);
        } else if self.async_pf.protocol.crash.is_none() && !(setup.mc && self.machine_check(page)) {
            self.crash(CrashReason::Failed, page);
        }
    }

    /// #MC for the page, if the vCPU can take one.
    fn machine_check(&mut self, page: u64) -> bool {
        let takes = self.cpu.state.cr4 & cr4::MCE != 0 && self.msrs.has_recovery();
        let mce = kvm_x86_mce {
            status: MC_STATUS,
            addr: page,
            misc: MC_MISC,
            mcg_status: MC_GLOBAL,
            bank: 0,
            ..kvm_x86_mce::default()
        };
        let raised = takes && self.msrs.inject_mce(&mce, true) == Some(Injected::Exception);
        if raised {
            self.handle.stats.pnp_machine_checks.count();
            self.events.raise(Exception { vector: vector::MC, error_code: None, payload: 0 });
        }
        raised
    }

    /// PNP_REQUEST has been written: the guest's handler of #VE wants a token for a page.
    pub(in crate::vcpu) fn page_requested(&mut self) {
        let gpa = self.msrs.pnp_request();
        let answer = self.answer_request(gpa & !PAGE_MASK);
        self.msrs.answer_pnp_request(answer);
    }

    fn answer_request(&mut self, page: u64) -> u64 {
        let Some(setup) = self.msrs.page_not_present() else { return NO_TOKEN };
        let ept = self.vm.memory().ept().clone();
        // (Above that is system management mode's own.)
        let Some(region) = ept.find(page).filter(|_| page < SMM_SPACE) else { return NO_MEMORY };
        if let Some(wanted) =
            self.async_pf.wanted.iter().find(|wanted| wanted.page == page && wanted.told == Told::NotPresent)
        {
            return wanted.token.into();
        }
        if !ept.is_elsewhere(page) {
            return THERE;
        }
        if self.vm.page_ins().has_failed(page) {
            self.vm.page_ins().forget_failure(page);
            return FAILED;
        }
        let has_token = self.has_token(&setup);
        if !self.survive(has_token, setup.ring).unwrap_or(false) {
            return NO_TOKEN;
        }
        let absence =
            Absence { address: page, host: region.host + (page - region.gpa), lin: None, write: false };
        if !self.request_page(&absence) {
            return THERE;
        }
        let token = self.async_pf.token(self.handle.id());
        match self.async_pf.wanted.iter_mut().find(|wanted| wanted.page == page) {
            Some(wanted) => (wanted.token, wanted.told) = (token, Told::NotPresent),
            None => self.add_wanted(page, token, Told::NotPresent),
        }
        self.async_pf.protocol.outstanding += 1;
        self.handle.stats.pnp_requests.count();
        token.into()
    }

    /// What a broken ring means: the guest cannot go on.
    fn survive<T>(&mut self, result: Result<T, Broken>, gpa: u64) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(Broken(reason)) => {
                self.crash(reason, gpa);
                None
            }
        }
    }

    fn crash(&mut self, reason: CrashReason, gpa: u64) {
        let (id, rip) = (self.handle.id(), self.cpu.state.rip);
        let why = match reason {
            CrashReason::Failed => {
                "touched a page whose contents are lost, and can neither be told nor recover"
            }
            CrashReason::Ring => "has broken the ring of page-not-present resolutions",
            CrashReason::Memory => "has no memory where its page-not-present structures are",
        };
        tracing::error!(
            "vCPU {id} {why}: guest-physical address {gpa:#x}, RIP {rip:#x}. The guest cannot go on"
        );
        self.handle.stats.pnp_killed.count();
        self.async_pf.protocol.crash = Some(Crash { reason, gpa, rip });
    }

    /// Whether the processor delivers not-present events itself: pages that may be elsewhere convert, all others do not.
    fn update_ve(&mut self, setup: Option<&Setup>) {
        let ve = setup.filter(|setup| setup.ve);
        self.cpu.controls.ept_violation_ve = ve.is_some();
        self.cpu.controls.ve_information = ve.map_or(0, |setup| setup.data);
        if ve.is_some() {
            let ept = self.vm.memory().ept();
            for (gpa, size) in ept.lazy_regions() {
                ept.set_suppress_ve(gpa, size, false);
            }
        }
    }
}
