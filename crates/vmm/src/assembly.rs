//! Putting the devices together: which ones the machine has, where they sit, and what they are connected to.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use hypervisor::Vm;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::acpi::{virtio_base, virtio_gsi};
use crate::config::{Config, ConsoleTarget};
use crate::devices::EndSink;
use crate::devices::bus::{Bus, Device, SharedDevice, Width};
use crate::devices::cmos::Cmos;
use crate::devices::irq::{InterruptLines, InterruptSink};
use crate::devices::memory::{self as memory_device, Effects, MemoryDevice};
use crate::devices::power::{DebugExit, I8042, I8042Port, PciConfigPorts, PowerManagement};
use crate::devices::serial::{SerialInput, SerialPort};
use crate::devices::virtio::block::{Block, Disk};
use crate::devices::virtio::console::Console;
use crate::devices::virtio::entropy::Entropy;
use crate::devices::virtio::{MmioTransport, VirtioDevice};
use crate::host::console::OutputHandle;
use crate::host::events::Input;
use crate::host::sys;
use crate::machine::{StartError, duplicate};
use crate::machine_check::MachineChecks;
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::paging::Paging;
use crate::{layout, memory};

/// The two address spaces of devices.
#[derive(Debug, Default)]
pub(crate) struct Buses {
    /// I/O ports.
    pub ports: Bus,
    /// Guest-physical addresses.
    pub memory: Bus,
}

/// All devices, and their ends on the host's side.
pub(crate) struct Assembly {
    pub(crate) buses: Buses,
    pub(crate) outputs: Vec<OutputHandle>,
    /// Signalled when a rest of output begins to wait.
    pub(crate) pending: Arc<EventFd>,
    pub(crate) input: Option<Input>,
    pub(crate) virtio_devices: usize,
}

/// The interrupt controllers in the hypervisor.
struct Controllers(Arc<Vm>);

impl InterruptSink for Controllers {
    fn set_line(&self, gsi: u32, level: bool) {
        if let Err(error) = self.0.irq_line(gsi, level) {
            tracing::error!("interrupt line {gsi}: {error}");
        }
    }
}

/// What the memory device has the hypervisor do.
struct MemoryEffects {
    vm: Arc<Vm>,
    machine_checks: Arc<MachineChecks>,
}

impl Effects for MemoryEffects {
    fn gone(&mut self) {
        self.vm.find_gone();
    }

    fn failed(&mut self, page: u64) {
        self.machine_checks.found(page * PAGE_SIZE);
    }
}

fn shared(device: impl Device + 'static) -> SharedDevice {
    Arc::new(Mutex::new(device))
}

/// Creates or truncates a file for output.
fn create(what: &'static str, path: &Path) -> Result<File, StartError> {
    File::create(path).map_err(|error| StartError::Open { what, path: path.into(), error })
}

impl Assembly {
    /// Builds the devices that `config` asks for.
    pub(crate) fn new(
        config: &Config,
        vm: &Arc<Vm>,
        memory: &GuestMemory,
        stop: &EventFd,
        end: EndSink,
    ) -> Result<Self, StartError> {
        let mut assembly = Assembly {
            buses: Buses::default(),
            outputs: Vec::new(),
            pending: Arc::new(EventFd::new(libc::EFD_NONBLOCK)?),
            input: None,
            virtio_devices: 0,
        };
        let lines = InterruptLines::new(Arc::new(Controllers(vm.clone())));
        assembly.attach_platform(config, memory, end)?;
        assembly.attach_serial(config, &lines, stop)?;
        assembly.attach_virtio(config, &lines, memory, stop)?;
        Ok(assembly)
    }

    /// Clock, power management, and the ways to end the machine.
    fn attach_platform(
        &mut self,
        config: &Config,
        memory: &GuestMemory,
        end: EndSink,
    ) -> Result<(), StartError> {
        let high = memory.iter().filter(|region| region.start_addr().0 >= layout::HIGH_RAM_START);
        let cmos = Cmos::new(
            Box::new(seconds_since_epoch),
            memory::low_ram_end(memory),
            high.map(GuestMemoryRegion::len).sum(),
        );
        let keyboard = |port| shared(I8042::new(port, end.clone()));
        let ports = &mut self.buses.ports;
        let mut attach =
            |port: u16, length: u64, width, device| ports.attach(port.into(), length, width, device);
        attach(layout::PORT_CMOS, 2, Width::Byte, shared(cmos))?;
        attach(layout::PORT_I8042, 1, Width::Byte, keyboard(I8042Port::Data))?;
        attach(layout::PORT_I8042 + 4, 1, Width::Byte, keyboard(I8042Port::Command))?;
        let power = PowerManagement::new(Arc::new(sys::monotonic_nanoseconds), end.clone());
        attach(layout::PORT_PM1_EVENT, layout::PM_BLOCK_SIZE.into(), Width::Any, shared(power))?;
        attach(layout::PORT_PCI_CONFIG, 8, Width::Any, shared(PciConfigPorts::new(end.clone())))?;
        if config.exit_port {
            attach(layout::PORT_DEBUG_EXIT, DebugExit::LENGTH, Width::Any, shared(DebugExit::new(end)))?;
        }
        Ok(())
    }

    /// The device that says which pages are elsewhere; the guest hears of what it makes fail.
    pub(crate) fn attach_memory(
        &mut self,
        vm: &Arc<Vm>,
        paging: &Arc<Paging>,
        machine_checks: &Arc<MachineChecks>,
    ) -> Result<(), StartError> {
        let effects = MemoryEffects { vm: vm.clone(), machine_checks: machine_checks.clone() };
        let device = shared(MemoryDevice::new(paging.clone(), effects));
        self.buses.ports.attach(layout::PORT_MEMORY.into(), memory_device::LENGTH, Width::Any, device)?;
        Ok(())
    }

    /// A new output to `target`.
    fn output(&mut self, target: File, stop: &EventFd) -> io::Result<OutputHandle> {
        let output = OutputHandle::new(target, self.pending.clone(), stop)?;
        self.outputs.push(output.clone());
        Ok(output)
    }

    fn attach_serial(
        &mut self,
        config: &Config,
        lines: &Arc<InterruptLines>,
        stop: &EventFd,
    ) -> Result<(), StartError> {
        let output: Box<dyn Write + Send> = match &config.serial {
            ConsoleTarget::Stdio => Box::new(self.output(duplicate(io::stdout())?, stop)?),
            ConsoleTarget::File(path) => Box::new(self.output(create("serial output", path)?, stop)?),
            ConsoleTarget::None => Box::new(io::sink()),
        };
        let room = Arc::new(EventFd::new(libc::EFD_NONBLOCK)?);
        let on_room = {
            let room = room.clone();
            Arc::new(move || {
                if let Err(error) = room.write(1) {
                    tracing::error!("serial input: {error}");
                }
            })
        };
        let port = SerialPort::new(lines.line(layout::GSI_COM1), output, on_room);
        let port = Arc::new(Mutex::new(port));
        self.buses.ports.attach(layout::PORT_COM1.into(), 8, Width::Byte, port.clone())?;
        if config.serial == ConsoleTarget::Stdio {
            let typed = io::stdin().is_terminal();
            let source = Some(duplicate(io::stdin())?);
            self.input = Some(Input { source, typed, port: SerialInput::new(port), room });
        }
        Ok(())
    }

    /// Disks first, so that their names do not depend on the rest, then entropy and console.
    fn attach_virtio(
        &mut self,
        config: &Config,
        lines: &Arc<InterruptLines>,
        memory: &GuestMemory,
        stop: &EventFd,
    ) -> Result<(), StartError> {
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
        for disk in &config.disks {
            devices.push(Box::new(Block::new(Disk::open(&disk.path, disk.read_only)?)));
        }
        devices.push(Box::new(Entropy::new(Box::new(File::open("/dev/urandom")?))));
        let console: Box<dyn Write + Send> = match &config.console {
            Some(path) => Box::new(self.output(create("console output", path)?, stop)?),
            None => Box::new(io::sink()),
        };
        devices.push(Box::new(Console::new(console)));
        self.virtio_devices = devices.len();
        for (index, device) in devices.into_iter().enumerate() {
            let transport = MmioTransport::new(device, memory.clone(), lines.line(virtio_gsi(index)))?;
            self.buses.memory.attach(
                virtio_base(index),
                layout::VIRTIO_MMIO_SIZE,
                Width::Any,
                shared(transport),
            )?;
        }
        Ok(())
    }
}

fn seconds_since_epoch() -> i64 {
    let seconds = |time: std::time::Duration| i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    match SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => seconds(since),
        Err(before) => -seconds(before.duration()),
    }
}
