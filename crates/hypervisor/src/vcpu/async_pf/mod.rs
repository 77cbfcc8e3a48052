//! A guest touches a page that is elsewhere, or lost. It is told, and does something else, by the kernel's interface ([`kvm`]) or by the
//! page-not-present protocol ([`page_not_present`]), or the vCPU is held until the page comes, and takes interrupts meanwhile.

mod kvm;
mod page_not_present;
#[cfg(test)]
mod storm;
#[cfg(test)]
mod tests;

use std::time::Instant;

use silicon::vmx::Exit;

use super::{Vcpu, VcpuExit};
use crate::async_pf::{Outcome, Request, why_absent};
use crate::error::Error;

pub use page_not_present::{Crash, CrashReason};

/// Pages that a guest is told of at most before they have come (kernel: ASYNC_PF_PER_VCPU), and pages that a vCPU waits for in all: those
/// that it is held for come on top.
const TOLD_MAX: usize = 64;
const WANTED_MAX: usize = 2 * TOLD_MAX;
/// What no token is.
const BROADCAST: u32 = !0;
const PAGE_MASK: u64 = 0xfff;

/// An access that was not made.
#[derive(Clone, Copy, Debug)]
struct Absence {
    /// In the guest-physical map.
    address: u64,
    host: u64,
    /// The linear address, if it is known.
    lin: Option<u64>,
    write: bool,
}

impl Absence {
    fn page(&self) -> u64 {
        self.address & !PAGE_MASK
    }
}

/// How the guest has been told of a page that is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// Not at all: the vCPU is held.
    No,
    /// #PF with a token.
    PageFault,
    /// The protocol's event, or its answer to a request.
    NotPresent,
}

/// A page that is on its way.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    page: u64,
    token: u32,
    told: Told,
    since: Instant,
}

/// What a vCPU waits for.
#[derive(Debug, Default)]
pub(super) struct AsyncPf {
    wanted: Vec<Wanted>,
    tokens: u32,
    /// The vCPU is held until something comes. The guest cannot tell, and neither can the client (kernel: `apf.halted`).
    pub(super) held: bool,
    kvm: kvm::Ready,
    protocol: page_not_present::Ring,
}

impl AsyncPf {
    /// Never zero nor [`BROADCAST`], and other than those of the VM's other vCPUs (kernel: `alloc_apf_token`), as far as there are not more
    /// than 4096.
    fn token(&mut self, vcpu: u32) -> u32 {
        loop {
            self.tokens = self.tokens.wrapping_add(1);
            let token = self.tokens << 12 | vcpu & 0xfff;
            let used = self.wanted.iter().any(|wanted| wanted.token == token);
            if self.tokens << 12 != 0 && token != BROADCAST && !used {
                return token;
            }
        }
    }

    /// Nobody wants to hear of what is on its way.
    pub(super) fn clear(&mut self) {
        self.forget(Told::PageFault);
        self.forget(Told::NotPresent);
        self.held = false;
        self.kvm = kvm::Ready::default();
        self.protocol = page_not_present::Ring::default();
    }

    /// Whoever was told so does not want to hear of it any more.
    fn forget(&mut self, told: Told) {
        self.wanted.iter_mut().filter(|wanted| wanted.told == told).for_each(|wanted| wanted.told = Told::No);
    }

    fn told(&self) -> usize {
        self.wanted.iter().filter(|wanted| wanted.told != Told::No).count()
    }
}

impl Vcpu {
    /// The guest has touched a page that is elsewhere, or that the host has no memory for.
    ///
    /// # Errors
    ///
    /// [`Error::MemoryAbsent`] and [`Error::MemoryFailed`], if it is the client's affair.
    pub(super) fn page_absent(&mut self, exit: Exit) -> Result<Option<VcpuExit>, Error> {
        match exit {
            Exit::MemoryElsewhere { address, host, lin, write } => {
                self.requeue_vectored();
                // A locked access that was about to be executed after all is refused again, and decided on again, when the page is there.
                self.locks.forget_step();
                self.page_elsewhere(&Absence { address, host, lin, write });
            }
            Exit::MemoryAbsent { gpa, host, failed } => match self.msrs.page_not_present() {
                Some(setup) if !self.cpu.state.smm && (failed || why_absent(host) == Outcome::Failed) => {
                    self.requeue_vectored();
                    self.locks.forget_step();
                    self.handle.stats.async_pf_failed.count();
                    let absence = Absence { address: gpa, host, lin: None, write: false };
                    self.tell_failed(&setup, &absence);
                }
                _ => return Err(self.memory_absent(gpa, failed.then_some(host))),
            },
            _ => {}
        }
        Ok(None)
    }

    fn page_elsewhere(&mut self, absence: &Absence) {
        let (stats, page) = (&self.handle.stats, absence.page());
        stats.async_pf_faults.count();
        if absence.lin.is_none() {
            stats.async_pf_walk_faults.count();
        }
        if self.async_pf.wanted.iter().any(|wanted| wanted.page == page) {
            self.hold();
        } else if !self.vm.page_ins().has_failed(page) {
            self.want_page(absence);
        } else if let Some(setup) = self.msrs.page_not_present() {
            self.tell_failed(&setup, absence);
        } else {
            // The access finds out, and the client.
            self.vm.memory().ept().mark_present(page);
        }
    }

    /// Has the page brought, and tells the guest if it can be told.
    fn want_page(&mut self, absence: &Absence) {
        if !self.request_page(absence) {
            return;
        }
        let token = self.async_pf.token(self.handle.id());
        let told = match self.msrs.page_not_present() {
            _ if self.async_pf.told() >= TOLD_MAX => Told::No,
            Some(setup) if self.tell_not_present(&setup, token, absence) => Told::NotPresent,
            None if self.tell_page_fault(token) => Told::PageFault,
            _ => Told::No,
        };
        self.add_wanted(absence.page(), token, told);
        if told == Told::No {
            self.hold();
        }
    }

    fn add_wanted(&mut self, page: u64, token: u32, told: Told) {
        self.async_pf.wanted.push(Wanted { page, token, told, since: Instant::now() });
    }

    /// Has the page brought. False: the access itself is to wait for it.
    fn request_page(&mut self, absence: &Absence) -> bool {
        let Absence { host, .. } = *absence;
        let page = absence.page();
        let request = Request { page, host: host & !PAGE_MASK, vcpu: self.handle.clone() };
        let asked = self.async_pf.wanted.len() < WANTED_MAX
            && self
                .vm
                .page_ins()
                .request(request)
                .inspect_err(|error| {
                    tracing::warn!("a page of the guest's cannot be brought in its absence: {error}");
                })
                .is_ok();
        if !asked {
            self.handle.stats.async_pf_waits.count();
            self.vm.memory().ept().mark_present(page);
        }
        asked
    }

    fn hold(&mut self) {
        self.handle.stats.async_pf_holds.count();
        self.async_pf.held = true;
    }

    /// Whether the vCPU can take an event now (kernel: `kvm_can_do_async_pf`).
    fn takes_event(&self) -> bool {
        let free = !self.events.reinjects() && !self.events.has_exception();
        self.lapic.is_some() && free && !self.cpu.state.smm && self.cpu.interrupt_allowed()
    }

    /// Pages have come: the guest hears of them, and goes on.
    pub(super) fn take_pages(&mut self) {
        if self.handle.has_pages() {
            if let Some(chip) = self.vm.irqchip() {
                chip.bus().note_outside();
            }
            for (page, outcome) in self.handle.take_pages() {
                let found = self.async_pf.wanted.iter().position(|wanted| wanted.page == page);
                if let Some(index) = found {
                    let wanted = self.async_pf.wanted.swap_remove(index);
                    self.page_came(&wanted, outcome);
                }
            }
        }
        self.tell_restored();
        self.tell_ready();
    }

    fn page_came(&mut self, wanted: &Wanted, outcome: Outcome) {
        let (stats, failed) = (&self.handle.stats, outcome == Outcome::Failed);
        stats.async_pf_latency.add(u64::try_from(wanted.since.elapsed().as_nanos()).unwrap_or(u64::MAX));
        if failed {
            stats.async_pf_failed.count();
        }
        self.async_pf.held = false;
        if failed && self.msrs.page_not_present().is_none() {
            // There is nothing to tell a guest with the kernel's interface: it tries again, and the client hears of it.
            self.vm.memory().ept().mark_present(wanted.page);
        }
        match wanted.told {
            Told::No => {}
            Told::PageFault => self.async_pf.kvm.came(wanted.token),
            Told::NotPresent => self.resolve(wanted.token, failed),
        }
    }

    /// Whether the vCPU has nothing to do until something comes.
    pub(super) fn awaits_page(&self) -> bool {
        self.async_pf.held && !self.handle.has_pages()
    }

    /// Whether an event that waits must not end that: its delivery needs the page.
    pub(super) fn delivery_awaits_page(&self) -> bool {
        self.async_pf.held && (self.events.reinjects() || self.events.has_exception())
    }

    /// The vCPU cannot run any more.
    pub(super) fn crashed(&self) -> Option<VcpuExit> {
        self.async_pf.protocol.crash.map(VcpuExit::Crash)
    }
}
