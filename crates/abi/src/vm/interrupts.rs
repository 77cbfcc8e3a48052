//! Interrupt controllers, routing and event descriptors.

use std::sync::Arc;

use hypervisor::Vm;
use hypervisor::routing::MAX_ROUTES;
use kvm_bindings::{
    KVM_PIT_SPEAKER_DUMMY, kvm_ioeventfd, kvm_irq_level, kvm_irqchip, kvm_irqfd, kvm_msi, kvm_pit_config,
    kvm_pit_state, kvm_pit_state2, kvm_reinject_control,
};

use super::DONE;
use crate::error::Errno;
use crate::object::Reply;
use crate::user::Argument;

/// Where the entries of a `kvm_irq_routing` begin.
const ROUTING_ENTRIES: u64 = 8;

pub(crate) fn create_irqchip(vm: &Arc<Vm>, _: Argument) -> Result<Reply, Errno> {
    vm.create_irqchip()?;
    DONE
}

pub(crate) fn get_irqchip(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    let request: kvm_irqchip = argument.read()?;
    argument.write(&vm.irqchip_state(request.chip_id)?)?;
    DONE
}

pub(crate) fn set_irqchip(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.set_irqchip_state(&argument.read::<kvm_irqchip>()?)?;
    DONE
}

pub(crate) fn create_pit(vm: &Arc<Vm>, _: Argument) -> Result<Reply, Errno> {
    vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })?;
    DONE
}

pub(crate) fn create_pit2(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.create_pit2(argument.read::<kvm_pit_config>()?)?;
    DONE
}

pub(crate) fn get_pit(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    argument.write(&vm.pit()?)?;
    DONE
}

pub(crate) fn set_pit(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.set_pit(&argument.read::<kvm_pit_state>()?)?;
    DONE
}

pub(crate) fn get_pit2(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    argument.write(&vm.pit2()?)?;
    DONE
}

pub(crate) fn set_pit2(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.set_pit2(&argument.read::<kvm_pit_state2>()?)?;
    DONE
}

pub(crate) fn reinject_control(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.set_pit_reinject(argument.read::<kvm_reinject_control>()?.pit_reinject != 0)?;
    DONE
}

/// The GSI and the level of a `kvm_irq_level`, whose first member is the number, or the status on return.
fn line(argument: Argument) -> Result<(u32, bool), Errno> {
    let request: kvm_irq_level = argument.read()?;
    Ok((argument.read()?, request.level != 0))
}

pub(crate) fn irq_line(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    let (gsi, level) = line(argument)?;
    vm.irq_line(gsi, level)?;
    DONE
}

pub(crate) fn irq_line_status(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    let (gsi, level) = line(argument)?;
    argument.write(&vm.irq_line_status(gsi, level)?)?;
    DONE
}

pub(crate) fn signal_msi(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    Ok(Reply::Value(vm.signal_msi(&argument.read::<kvm_msi>()?)?.into()))
}

pub(crate) fn set_gsi_routing(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    let [count, flags] = [argument.read::<u32>()?, argument.read_at::<u32>(4)?];
    if vm.irqchip().is_none() || count > MAX_ROUTES || flags != 0 {
        return Err(Errno::INVALID);
    }
    vm.set_gsi_routing(&argument.read_slice(ROUTING_ENTRIES, count as usize)?)?;
    DONE
}

pub(crate) fn irqfd(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.irqfd(&argument.read::<kvm_irqfd>()?)?;
    DONE
}

pub(crate) fn ioeventfd(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.ioeventfd(&argument.read::<kvm_ioeventfd>()?)?;
    DONE
}
