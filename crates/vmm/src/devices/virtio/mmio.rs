//! The MMIO transport, version 2 (virtio 1.2, section 4.2).

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as regs;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::{QueueError, VirtioDevice};
use crate::devices::bus::Device;
use crate::devices::irq::InterruptLine;
use crate::memory::GuestMemory;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// "RNG3", an identification without meaning for drivers.
const VENDOR: u32 = 0x3347_4e52;
/// Start of the configuration space.
const CONFIG: u64 = regs::VIRTIO_MMIO_CONFIG as u64;
/// Entries of each queue, at most.
pub const QUEUE_SIZE: u16 = 256;

/// Features that the transport offers for every device.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A virtio device with its registers.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    line: InterruptLine,
    queues: Vec<Queue>,
    selected_queue: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    interrupt_status: u32,
    status: u32,
}

impl MmioTransport {
    /// Puts `device` behind a register block.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        line: InterruptLine,
    ) -> Result<Self, virtio_queue::Error> {
        let queues = (0..device.queues()).map(|_| Queue::new(QUEUE_SIZE)).collect::<Result<_, _>>()?;
        Ok(Self {
            device,
            memory,
            line,
            queues,
            selected_queue: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            interrupt_status: 0,
            status: 0,
        })
    }

    fn features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn has_status(&self, bits: u32) -> bool {
        self.status & bits != 0
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(self.selected_queue as usize)
    }

    /// Changes the selected queue, which is possible only before the driver has started the device.
    fn configure_queue(&mut self, change: impl FnOnce(&mut Queue)) {
        if !self.has_status(VIRTIO_CONFIG_S_DRIVER_OK)
            && let Some(queue) = self.queues.get_mut(self.selected_queue as usize)
        {
            change(queue);
        }
    }

    fn raise(&mut self, bits: u32) {
        self.interrupt_status |= bits;
        self.line.set(self.interrupt_status != 0);
    }

    fn acknowledge(&mut self, bits: u32) {
        self.interrupt_status &= !bits;
        self.line.set(self.interrupt_status != 0);
    }

    fn reset(&mut self) {
        for queue in &mut self.queues {
            queue.reset();
        }
        self.selected_queue = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.status = 0;
        self.acknowledge(u32::MAX);
    }

    /// The driver broke the rules: stop until it resets the device.
    fn fail(&mut self, error: &QueueError) {
        tracing::debug!(device = self.device.id(), "virtio device needs a reset: {error}");
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        if self.has_status(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.raise(regs::VIRTIO_MMIO_INT_CONFIG);
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let added = value & !self.status;
        self.status |= value & 0xff & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            let accepted = self.driver_features & !self.features() == 0
                && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0;
            if !accepted {
                self.status &= !VIRTIO_CONFIG_S_FEATURES_OK;
            }
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.start();
        }
    }

    fn start(&mut self) {
        let event_index = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let memory = &self.memory;
        for queue in self.queues.iter_mut().filter(|queue| queue.ready()) {
            if !queue.is_valid(memory) {
                return self.fail(&QueueError::Malformed("a queue lies outside of memory"));
            }
            queue.set_event_idx(event_index);
        }
    }

    /// The driver says that buffers are available.
    fn notify(&mut self, index: u32) {
        let index = index as usize;
        if !self.has_status(VIRTIO_CONFIG_S_DRIVER_OK) || self.has_status(VIRTIO_CONFIG_S_NEEDS_RESET) {
            return;
        }
        match self.drain(index) {
            Ok(true) => self.raise(regs::VIRTIO_MMIO_INT_VRING),
            Ok(false) => {}
            Err(error) => self.fail(&error),
        }
    }

    /// Handles all available buffers of a queue; says whether the driver wants an interrupt.
    fn drain(&mut self, index: usize) -> Result<bool, QueueError> {
        let memory = &self.memory;
        let Some(queue) = self.queues.get_mut(index).filter(|queue| queue.ready()) else {
            return Ok(false);
        };
        let mut used = false;
        while self.device.wants(index) {
            let Some(chain) = queue.iter(memory)?.next() else {
                // Ask to be told of the next buffer, then look again for one that came in between.
                if queue.enable_notification(memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let written = self.device.handle(index, memory, chain)?;
            queue.add_used(memory, head, written)?;
            used = true;
        }
        Ok(used && queue.needs_notification(memory)?)
    }

    fn read_register(&self, offset: u32) -> u32 {
        let select = |value: u64, half: u32| match half {
            0 => value as u32,
            1 => (value >> 32) as u32,
            _ => 0,
        };
        match offset {
            regs::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            regs::VIRTIO_MMIO_VERSION => 2,
            regs::VIRTIO_MMIO_DEVICE_ID => self.device.id(),
            regs::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            regs::VIRTIO_MMIO_DEVICE_FEATURES => select(self.features(), self.device_features_select),
            regs::VIRTIO_MMIO_QUEUE_NUM_MAX => self.queue().map_or(0, |queue| queue.max_size().into()),
            regs::VIRTIO_MMIO_QUEUE_READY => self.queue().is_some_and(QueueT::ready).into(),
            regs::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt_status,
            regs::VIRTIO_MMIO_STATUS => self.status,
            // A region that does not exist has length and base of all ones.
            regs::VIRTIO_MMIO_SHM_LEN_LOW..=regs::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        let (low, high) = (Some(value), None::<u32>);
        match offset {
            regs::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            regs::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            regs::VIRTIO_MMIO_DRIVER_FEATURES => self.write_driver_features(value),
            regs::VIRTIO_MMIO_QUEUE_SEL => self.selected_queue = value,
            regs::VIRTIO_MMIO_QUEUE_NUM => {
                // A size that is no power of two, or too large, leaves the queue as it was.
                self.configure_queue(|queue| queue.set_size(u16::try_from(value).unwrap_or(0)));
            }
            regs::VIRTIO_MMIO_QUEUE_READY => self.configure_queue(|queue| queue.set_ready(value == 1)),
            regs::VIRTIO_MMIO_QUEUE_DESC_LOW => {
                self.configure_queue(|queue| queue.set_desc_table_address(low, high));
            }
            regs::VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                self.configure_queue(|queue| queue.set_desc_table_address(high, low));
            }
            regs::VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                self.configure_queue(|queue| queue.set_avail_ring_address(low, high));
            }
            regs::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                self.configure_queue(|queue| queue.set_avail_ring_address(high, low));
            }
            regs::VIRTIO_MMIO_QUEUE_USED_LOW => {
                self.configure_queue(|queue| queue.set_used_ring_address(low, high));
            }
            regs::VIRTIO_MMIO_QUEUE_USED_HIGH => {
                self.configure_queue(|queue| queue.set_used_ring_address(high, low));
            }
            regs::VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            regs::VIRTIO_MMIO_INTERRUPT_ACK => self.acknowledge(value),
            regs::VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => {}
        }
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        let shift = match self.driver_features_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.driver_features &= !(u64::from(u32::MAX) << shift);
        self.driver_features |= u64::from(value) << shift;
    }
}

impl Device for MmioTransport {
    fn read(&mut self, offset: u64, size: u8) -> u64 {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            let config = self.device.config();
            return (0..u64::from(size))
                .filter_map(|i| Some((i, *config.get(usize::try_from(offset + i).ok()?)?)))
                .fold(0, |value, (i, byte)| value | u64::from(byte) << (i * 8));
        }
        // Registers are 32 bits wide and aligned (4.2.2.2).
        if size == 4 && offset.is_multiple_of(4) { self.read_register(offset as u32).into() } else { 0 }
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) {
        if offset < CONFIG && size == 4 && offset.is_multiple_of(4) {
            // The driver's writes to its rings come before what it tells us here.
            fence(Ordering::SeqCst);
            self.write_register(offset as u32, value as u32);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::devices::bus::lock;
    use crate::devices::irq::InterruptLines;
    use crate::devices::irq::tests::Recorder;
    use crate::devices::virtio::Chain;
    use crate::loader::tests::memory;
    use std::sync::Arc;
    use virtio_queue::desc::RawDescriptor;
    use vm_memory::{Bytes, GuestAddress};

    /// A transport, its memory, and the driver's side of queue 0 (16 entries).
    pub(crate) struct Bench {
        pub(crate) transport: MmioTransport,
        pub(crate) memory: GuestMemory,
        pub(crate) interrupts: Arc<Recorder>,
    }

    /// Where the driver's queue lies.
    const DESCRIPTORS: u64 = 0x10_0000;
    const AVAILABLE: u64 = 0x10_1000;
    const USED: u64 = 0x10_2000;

    impl Bench {
        pub(crate) fn new(device: Box<dyn VirtioDevice>) -> Self {
            let memory = memory(4 << 20);
            let interrupts = Arc::new(Recorder::default());
            let line = InterruptLines::new(interrupts.clone()).line(16);
            let transport = MmioTransport::new(device, memory.clone(), line).unwrap();
            Self { transport, memory, interrupts }
        }

        pub(crate) fn get(&mut self, register: u32) -> u32 {
            self.transport.read(register.into(), 4) as u32
        }

        pub(crate) fn set(&mut self, register: u32, value: u32) {
            self.transport.write(register.into(), 4, value.into());
        }

        /// Goes through a driver's initialization with one queue.
        pub(crate) fn start(&mut self, queue: u32) {
            self.set(regs::VIRTIO_MMIO_STATUS, 0);
            self.set(regs::VIRTIO_MMIO_STATUS, 3);
            self.set(regs::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
            self.set(regs::VIRTIO_MMIO_DRIVER_FEATURES, 1);
            self.set(regs::VIRTIO_MMIO_STATUS, 11);
            assert_eq!(self.get(regs::VIRTIO_MMIO_STATUS), 11);
            self.set(regs::VIRTIO_MMIO_QUEUE_SEL, queue);
            self.set(regs::VIRTIO_MMIO_QUEUE_NUM, 16);
            let addresses = [
                (regs::VIRTIO_MMIO_QUEUE_DESC_LOW, DESCRIPTORS),
                (regs::VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAILABLE),
                (regs::VIRTIO_MMIO_QUEUE_USED_LOW, USED),
            ];
            for (register, address) in addresses {
                self.set(register, address as u32);
                self.set(register + 4, 0);
                self.fill(address, &[0; 0x1000]);
            }
            self.set(regs::VIRTIO_MMIO_QUEUE_READY, 1);
            self.set(regs::VIRTIO_MMIO_STATUS, 15);
        }

        /// Makes descriptors available as they are and notifies; gives the used index after it.
        pub(crate) fn submit(&mut self, queue: u32, descriptors: &[RawDescriptor]) -> u16 {
            for (i, descriptor) in descriptors.iter().enumerate() {
                let at = GuestAddress(DESCRIPTORS + 16 * i as u64);
                self.memory.write_obj(*descriptor, at).unwrap();
            }
            // The available ring is all zeros: every entry is descriptor 0.
            self.set_available(self.used_index() + 1);
            self.set(regs::VIRTIO_MMIO_QUEUE_NOTIFY, queue);
            self.used_index()
        }

        pub(crate) fn set_available(&self, index: u16) {
            self.fill(AVAILABLE + 2, &index.to_le_bytes());
        }

        pub(crate) fn used_index(&self) -> u16 {
            let bytes = self.bytes(USED + 2, 2);
            u16::from_le_bytes([bytes[0], bytes[1]])
        }

        pub(crate) fn needs_reset(&mut self) -> bool {
            self.get(regs::VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET != 0
        }

        pub(crate) fn fill(&self, address: u64, bytes: &[u8]) {
            self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        }

        pub(crate) fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
            let mut bytes = vec![0; length];
            self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            bytes
        }
    }

    /// A descriptor from address, length, flags (1 next, 2 write, 4 indirect) and next.
    pub(crate) fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> RawDescriptor {
        virtio_queue::desc::split::Descriptor::new(address, length, flags, next).into()
    }

    /// Takes every buffer and writes nothing.
    struct Null;

    impl VirtioDevice for Null {
        fn id(&self) -> u32 {
            77
        }
        fn features(&self) -> u64 {
            1 << 5
        }
        fn queues(&self) -> usize {
            1
        }
        fn config(&self) -> &[u8] {
            &[1, 2, 3, 4, 5, 6]
        }
        fn handle(
            &mut self,
            _queue: usize,
            _memory: &GuestMemory,
            _chain: Chain<'_>,
        ) -> Result<u32, QueueError> {
            Ok(0)
        }
    }

    #[test]
    fn the_register_block_identifies_itself() {
        let mut bench = Bench::new(Box::new(Null));
        assert_eq!([0, 4, 8].map(|register| bench.get(register)), [MAGIC, 2, 77]);
        assert_eq!(bench.get(regs::VIRTIO_MMIO_DEVICE_FEATURES), 1 << 5 | 1 << 28 | 1 << 29);
        bench.set(regs::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        assert_eq!(bench.get(regs::VIRTIO_MMIO_DEVICE_FEATURES), 1);
        assert_eq!(bench.get(regs::VIRTIO_MMIO_QUEUE_NUM_MAX), 256);
        bench.set(regs::VIRTIO_MMIO_QUEUE_SEL, 1);
        assert_eq!(bench.get(regs::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        assert_eq!(bench.transport.read(CONFIG, 4), 0x0403_0201);
        assert_eq!(bench.transport.read(CONFIG + 4, 8), 0x0605);
        assert_eq!(bench.transport.read(u64::MAX, 1), 0);
        assert_eq!(bench.transport.read(1, 4), 0);
    }

    #[test]
    fn unknown_features_are_not_accepted() {
        let mut bench = Bench::new(Box::new(Null));
        for (low, high, accepted) in [(1 << 5, 1, true), (0, 0, false), (1, 1, false), (0, 3, false)] {
            bench.set(regs::VIRTIO_MMIO_STATUS, 0);
            for (half, bits) in [(0, low), (1, high), (2, u32::MAX)] {
                bench.set(regs::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
                bench.set(regs::VIRTIO_MMIO_DRIVER_FEATURES, bits);
            }
            bench.set(regs::VIRTIO_MMIO_STATUS, 11);
            assert_eq!(bench.get(regs::VIRTIO_MMIO_STATUS) == 11, accepted, "{low:#x} {high:#x}");
        }
    }

    #[test]
    fn a_used_buffer_raises_the_line_until_it_is_acknowledged() {
        let mut bench = Bench::new(Box::new(Null));
        bench.start(0);
        assert_eq!(bench.submit(0, &[descriptor(0x20_0000, 16, 0, 0)]), 1);
        assert_eq!(*lock(&bench.interrupts.0), [(16, true)]);
        assert_eq!(bench.get(regs::VIRTIO_MMIO_INTERRUPT_STATUS), 1);
        assert_eq!(bench.submit(0, &[descriptor(0x20_0000, 16, 0, 0)]), 2);
        bench.set(regs::VIRTIO_MMIO_INTERRUPT_ACK, 1);
        assert_eq!(*lock(&bench.interrupts.0), [(16, true), (16, false)]);
    }

    #[test]
    fn broken_queues_stop_the_device_until_reset() {
        let mut bench = Bench::new(Box::new(Null));
        bench.start(0);
        bench.set_available(100);
        bench.set(regs::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        assert!(bench.needs_reset());
        assert_eq!(bench.get(regs::VIRTIO_MMIO_INTERRUPT_STATUS), 2);
        bench.set(regs::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        bench.start(0);
        assert!(!bench.needs_reset());

        for register in [regs::VIRTIO_MMIO_QUEUE_DESC_LOW, regs::VIRTIO_MMIO_QUEUE_USED_LOW] {
            bench.start(0);
            bench.set(regs::VIRTIO_MMIO_STATUS, 0);
            bench.set(regs::VIRTIO_MMIO_QUEUE_SEL, 0);
            bench.set(register, 0xffff_fff0);
            bench.set(register + 4, u32::MAX);
            bench.set(regs::VIRTIO_MMIO_QUEUE_READY, 1);
            bench.set(regs::VIRTIO_MMIO_STATUS, 15);
            assert!(bench.needs_reset());
        }
    }

    #[test]
    fn any_register_takes_any_value() {
        let mut bench = Bench::new(Box::new(Null));
        for value in [0, 1, 2, 15, 0x7fff_ffff, u32::MAX] {
            for offset in (0..0x200).step_by(2) {
                for size in [1, 2, 4, 8] {
                    bench.transport.write(offset, size, value.into());
                    bench.transport.read(offset, size);
                }
            }
        }
    }
}
