//! Calls on the interrupt controllers of a VM.

use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQFD_FLAG_DEASSIGN, KVM_MSI_VALID_DEVID, KVM_PIT_SPEAKER_DUMMY, kvm_ioeventfd,
    kvm_irq_routing_entry, kvm_irqchip, kvm_irqfd, kvm_msi, kvm_pit_config, kvm_pit_state, kvm_pit_state2,
};

use super::Vm;
use crate::error::Error;
use crate::eventfd::{IoEventFds, IoSpace, IrqFds, check_eventfd};
use crate::irqchip::bus::{Delivery, Msi};
use crate::irqchip::pit::Pit;
use crate::irqchip::{IrqChip, IrqChipKind};
use crate::routing::IOAPIC_PINS;
use crate::timer::Timers;

impl Vm {
    /// The in-kernel interrupt controllers, if they were created.
    pub fn irqchip(&self) -> Option<&Arc<IrqChip>> {
        self.irqchip.get()
    }

    fn require_irqchip(&self) -> Result<&Arc<IrqChip>, Error> {
        self.irqchip().ok_or(Error::Missing("the interrupt controller (KVM_CREATE_IRQCHIP)"))
    }

    fn require_pit(&self) -> Result<&Arc<Pit>, Error> {
        self.irqchip().and_then(|chip| chip.pit()).ok_or(Error::Missing("the PIT (KVM_CREATE_PIT2)"))
    }

    /// KVM_CREATE_IRQCHIP. Comes before the first vCPU.
    pub fn create_irqchip(&self) -> Result<(), Error> {
        let setup = self.setup();
        if self.irqchip().is_some() {
            return Err(Error::Exists("the interrupt controller"));
        }
        if !setup.vcpus.is_empty() {
            return Err(Error::Invalid("vCPUs exist already"));
        }
        self.install_irqchip(IrqChipKind::Full)
    }

    /// KVM_CAP_SPLIT_IRQCHIP: local APICs here, all else in the client; `pins` GSIs stand for its IOAPIC's pins.
    pub fn split_irqchip(&self, pins: u64) -> Result<(), Error> {
        let reserved_pins = match usize::try_from(pins) {
            Ok(pins) if pins <= IOAPIC_PINS => pins,
            _ => return Err(Error::Invalid("too many pins")),
        };
        let setup = self.setup();
        if self.irqchip().is_some() {
            return Err(Error::Exists("the interrupt controller"));
        }
        if !setup.vcpus.is_empty() {
            return Err(Error::Exists("a vCPU"));
        }
        self.install_irqchip(IrqChipKind::Split { reserved_pins })
    }

    fn install_irqchip(&self, kind: IrqChipKind) -> Result<(), Error> {
        let chip = IrqChip::new(kind, self.apic_settings().clone(), Arc::new(Timers::start()?));
        self.irqchip.set(chip).map_err(|_| Error::Exists("the interrupt controller"))
    }

    /// KVM_GET_IRQCHIP: the image of an 8259 (0, 1) or the IOAPIC (2).
    pub fn irqchip_state(&self, chip_id: u32) -> Result<kvm_irqchip, Error> {
        Ok(self.require_irqchip()?.chip_state(chip_id)?)
    }

    /// KVM_SET_IRQCHIP.
    pub fn set_irqchip_state(&self, image: &kvm_irqchip) -> Result<(), Error> {
        Ok(self.require_irqchip()?.set_chip_state(image)?)
    }

    /// KVM_CREATE_PIT2 (KVM_CREATE_PIT: with the speaker). ENOENT without 8259s.
    pub fn create_pit2(&self, config: kvm_pit_config) -> Result<(), Error> {
        let _setup = self.setup();
        match self.irqchip() {
            Some(chip) if chip.pit().is_some() => Err(Error::Exists("the PIT")),
            Some(chip) if !chip.is_split() => {
                chip.create_pit(config.flags & KVM_PIT_SPEAKER_DUMMY != 0)?;
                Ok(())
            }
            _ => Err(Error::NotFound("an 8259 (KVM_CREATE_IRQCHIP)")),
        }
    }

    /// KVM_GET_PIT2.
    pub fn pit2(&self) -> Result<kvm_pit_state2, Error> {
        Ok(self.require_pit()?.state())
    }

    /// KVM_SET_PIT2.
    pub fn set_pit2(&self, image: &kvm_pit_state2) -> Result<(), Error> {
        self.require_pit()?.set_state(image);
        Ok(())
    }

    /// KVM_GET_PIT: without the flags.
    pub fn pit(&self) -> Result<kvm_pit_state, Error> {
        Ok(self.require_pit()?.channels())
    }

    /// KVM_SET_PIT.
    pub fn set_pit(&self, image: &kvm_pit_state) -> Result<(), Error> {
        self.require_pit()?.set_channels(image);
        Ok(())
    }

    /// KVM_REINJECT_CONTROL: whether ticks that the guest missed are made up for.
    pub fn set_pit_reinject(&self, reinject: bool) -> Result<(), Error> {
        self.require_pit()?.set_reinject(reinject);
        Ok(())
    }

    /// KVM_IRQ_LINE.
    pub fn irq_line(&self, gsi: u32, level: bool) -> Result<(), Error> {
        self.require_irqchip()?.irq_line(gsi, level);
        Ok(())
    }

    /// KVM_IRQ_LINE_STATUS: below zero if ignored, zero if one was pending already, else how many took it.
    pub fn irq_line_status(&self, gsi: u32, level: bool) -> Result<i32, Error> {
        Ok(self.require_irqchip()?.irq_line_status(gsi, level).status())
    }

    /// KVM_SIGNAL_MSI: whether any LAPIC took it. EINVAL for flags that do not exist.
    pub fn signal_msi(&self, msi: &kvm_msi) -> Result<bool, Error> {
        let chip = match self.irqchip() {
            Some(chip) if msi.flags & !KVM_MSI_VALID_DEVID == 0 => chip,
            _ => return Err(Error::Invalid("MSI flags, or no local APICs")),
        };
        Ok(matches!(chip.send_msi(Msi::from(msi))?, Delivery::Delivered(_)))
    }

    /// KVM_SET_GSI_ROUTING. EINVAL without in-kernel interrupt controllers.
    pub fn set_gsi_routing(&self, entries: &[kvm_irq_routing_entry]) -> Result<(), Error> {
        let chip = self.irqchip().ok_or(Error::Invalid("there is nothing to route to"))?;
        Ok(chip.set_gsi_routing(entries)?)
    }

    /// KVM_IRQFD. EINVAL without in-kernel interrupt controllers, except that there is nothing to undo then.
    pub fn irqfd(&self, request: &kvm_irqfd) -> Result<(), Error> {
        if self.irqchip().is_none() && request.flags & KVM_IRQFD_FLAG_DEASSIGN != 0 {
            return Ok(check_eventfd(request.fd as i32)?);
        }
        let chip = self.irqchip().ok_or(Error::Invalid("there are no interrupt controllers"))?;
        let _setup = self.setup();
        let irqfds = match self.irqfds.get() {
            Some(irqfds) => irqfds,
            None => {
                let fresh = IrqFds::new(chip)?;
                self.irqfds.get_or_init(|| fresh)
            }
        };
        Ok(irqfds.request(request)?)
    }

    /// KVM_IOEVENTFD.
    pub fn ioeventfd(&self, request: &kvm_ioeventfd) -> Result<(), Error> {
        Ok(self.ioeventfds.request(request)?)
    }

    /// The table of ioeventfds.
    pub fn ioeventfds(&self) -> &IoEventFds {
        &self.ioeventfds
    }

    /// Whether a write of the guest's is done with without its client: it signals an ioeventfd, or is put off.
    pub(crate) fn absorbs_write(&self, space: IoSpace, address: u64, data: &[u8]) -> bool {
        self.ioeventfds.signal(space, address, data) || self.coalesced.write(space, address, data)
    }
}
