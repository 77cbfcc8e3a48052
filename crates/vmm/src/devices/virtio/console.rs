//! Console device (virtio 1.2, section 5.3): one port, output only. The serial port is the machine's console;
//! this one serves guests that want a second channel (`hvc0`).

use std::io::{Read, Write};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::{Chain, QueueError, VirtioDevice};
use crate::memory::GuestMemory;

/// Queue of buffers to the device.
const TRANSMIT: usize = 1;
/// Bytes copied at a time.
const CHUNK: usize = 4096;
/// Bytes taken of one buffer, at most; what a driver sends beyond is dropped.
const MAX_BUFFER: usize = 1 << 20;

/// The device.
pub struct Console {
    output: Box<dyn Write + Send>,
}

impl Console {
    /// A console that writes to `output`.
    pub fn new(output: Box<dyn Write + Send>) -> Self {
        Self { output }
    }
}

impl VirtioDevice for Console {
    fn id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queues(&self) -> usize {
        2
    }

    fn config(&self) -> &[u8] {
        // Columns, rows, ports, emergency write: none of them is offered.
        &[0; 12]
    }

    fn wants(&self, queue: usize) -> bool {
        queue == TRANSMIT
    }

    fn handle(&mut self, _queue: usize, memory: &GuestMemory, chain: Chain<'_>) -> Result<u32, QueueError> {
        let input = chain.reader(memory)?;
        let mut input = input.take(MAX_BUFFER as u64);
        let mut buffer = [0; CHUNK];
        loop {
            let length = input.read(&mut buffer)?;
            if length == 0 {
                break;
            }
            if let Err(error) = self.output.write_all(&buffer[..length]) {
                tracing::debug!("virtio console: {error}");
            }
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::bus::lock;
    use crate::devices::virtio::mmio::tests::{Bench, descriptor};
    use std::sync::{Arc, Mutex};

    struct Output(Arc<Mutex<Vec<u8>>>);

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_guest_writes_and_its_receive_buffers_wait() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut bench = Bench::new(Box::new(Console::new(Box::new(Output(seen.clone())))));
        bench.start(1);
        bench.fill(0x20_0000, b"hello ");
        bench.fill(0x20_1000, b"world");
        bench.submit(1, &[descriptor(0x20_0000, 6, 1, 1), descriptor(0x20_1000, 5, 0, 0)]);
        assert_eq!(*lock(&seen), b"hello world");
        bench.start(0);
        let before = bench.used_index();
        assert_eq!(bench.submit(0, &[descriptor(0x20_0000, 64, 2, 0)]), before);
        assert!(!bench.needs_reset());
    }
}
