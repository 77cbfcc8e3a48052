//! Virtio 1.2 devices behind the MMIO transport.

pub mod block;
pub mod console;
pub mod entropy;
pub mod mmio;

use std::io;

use virtio_queue::DescriptorChain;

use crate::memory::GuestMemory;

pub use mmio::MmioTransport;

/// A buffer that the driver has made available.
pub type Chain<'a> = DescriptorChain<&'a GuestMemory>;

/// Why a device stops and asks for a reset: the driver broke the rules of its queue.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The queue itself.
    #[error("queue: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// A buffer without the parts that a request needs.
    #[error("malformed request: {0}")]
    Malformed(&'static str),
    /// A buffer that cannot be read or written.
    #[error("request buffer: {0}")]
    Buffer(#[from] io::Error),
}

/// What one kind of device does; the transport does the rest.
pub trait VirtioDevice: Send {
    /// Device type (virtio 1.2, chapter 5).
    fn id(&self) -> u32;
    /// Features of the device type offered.
    fn features(&self) -> u64 {
        0
    }
    /// Number of queues.
    fn queues(&self) -> usize;
    /// Configuration space.
    fn config(&self) -> &[u8] {
        &[]
    }
    /// Whether the device takes buffers from this queue now.
    fn wants(&self, _queue: usize) -> bool {
        true
    }
    /// Handles one buffer; gives the number of bytes written to it.
    fn handle(&mut self, queue: usize, memory: &GuestMemory, chain: Chain<'_>) -> Result<u32, QueueError>;
}
