//! Entropy device (virtio 1.2, section 5.4).

use std::io::{Read, Write};

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::{Chain, QueueError, VirtioDevice};
use crate::memory::GuestMemory;

/// Bytes given for one request, at most; a driver asks again if it wants more.
const MAX_REQUEST: usize = 64 << 10;

/// The device.
pub struct Entropy {
    source: Box<dyn Read + Send>,
}

impl Entropy {
    /// A device that gives what `source` gives.
    pub fn new(source: Box<dyn Read + Send>) -> Self {
        Self { source }
    }
}

impl VirtioDevice for Entropy {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queues(&self) -> usize {
        1
    }

    fn handle(&mut self, _queue: usize, memory: &GuestMemory, chain: Chain<'_>) -> Result<u32, QueueError> {
        let mut output = chain.writer(memory)?;
        let mut bytes = vec![0; output.available_bytes().min(MAX_REQUEST)];
        self.source.read_exact(&mut bytes)?;
        output.write_all(&bytes)?;
        Ok(bytes.len() as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::mmio::tests::{Bench, descriptor};

    #[test]
    fn buffers_are_filled_up_to_a_bound() {
        let mut bench = Bench::new(Box::new(Entropy::new(Box::new(std::io::repeat(0x5a)))));
        bench.start(0);
        assert_eq!(bench.submit(0, &[descriptor(0x20_0000, 64, 2, 0)]), 1);
        assert_eq!(bench.bytes(0x20_0000, 65), [[0x5a; 64].as_slice(), &[0]].concat());
        assert_eq!(bench.submit(0, &[descriptor(0x20_0000, 1 << 20, 2, 0)]), 2);
        assert_eq!(bench.bytes(0x20_0000 + 65_535, 2), [0x5a, 0]);
        assert_eq!(bench.submit(0, &[descriptor(0x20_0000, 16, 0, 0)]), 3);
        bench.submit(0, &[descriptor(u64::MAX - 8, 16, 2, 0)]);
        assert!(bench.needs_reset());
    }
}
