//! The first serial port, a 16550A, with the guest's console behind it.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex};

use vm_superio::Serial;
use vm_superio::serial::SerialEvents;

use super::bus::{Device, lock};
use super::irq::InterruptLine;

/// Called when the guest has emptied the receive FIFO.
pub type RoomCallback = Arc<dyn Fn() + Send + Sync>;

/// Tells the input side that there is room again.
struct Events(RoomCallback);

impl SerialEvents for Events {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        (self.0)();
    }
}

type Uart = Serial<InterruptLine, Events, Box<dyn Write + Send>>;

/// The serial port as a device on the bus.
pub struct SerialPort {
    uart: Uart,
}

impl SerialPort {
    /// A port that sends to `output` and calls `on_room` when it can take input again.
    pub fn new(line: InterruptLine, output: Box<dyn Write + Send>, on_room: RoomCallback) -> Self {
        Self { uart: Serial::with_events(line, Events(on_room), output) }
    }

    /// Gives the guest as much of `input` as its FIFO takes.
    pub fn receive(&mut self, input: &mut VecDeque<u8>) {
        let room = self.uart.fifo_capacity().min(input.len());
        if room == 0 {
            return;
        }
        let bytes: Vec<u8> = input.iter().take(room).copied().collect();
        // In loopback mode the port takes nothing; the bytes wait.
        if let Ok(taken) = self.uart.enqueue_raw_bytes(&bytes) {
            input.drain(..taken);
        }
    }
}

impl Device for SerialPort {
    fn read(&mut self, offset: u64, _size: u8) -> u64 {
        self.uart.read(offset as u8).into()
    }

    fn write(&mut self, offset: u64, _size: u8, value: u64) {
        if let Err(error) = self.uart.write(offset as u8, value as u8) {
            tracing::debug!("serial port: {error}");
        }
    }
}

/// The way from the person's input to the port: bytes wait here until the FIFO has room.
pub struct SerialInput {
    port: Arc<Mutex<SerialPort>>,
    waiting: VecDeque<u8>,
}

impl SerialInput {
    /// Bytes that may wait before the input side has to stop reading.
    pub const CAPACITY: usize = 4096;

    /// Input for `port`.
    pub fn new(port: Arc<Mutex<SerialPort>>) -> Self {
        Self { port, waiting: VecDeque::new() }
    }

    /// Adds bytes and hands over what the port takes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.waiting.extend(bytes);
        self.pump();
    }

    /// Hands over what the port takes now.
    pub fn pump(&mut self) {
        if !self.waiting.is_empty() {
            lock(&self.port).receive(&mut self.waiting);
        }
    }

    /// How many more bytes may be pushed.
    pub fn room(&self) -> usize {
        SerialInput::CAPACITY.saturating_sub(self.waiting.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::irq::InterruptLines;
    use crate::devices::irq::tests::Recorder;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const DATA: u64 = 0;
    const IER: u64 = 1;
    const IIR: u64 = 2;
    const LSR: u64 = 5;

    #[derive(Clone, Default)]
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
    fn the_guest_sends_and_receives() {
        let recorder = Arc::new(Recorder::default());
        let line = InterruptLines::new(recorder.clone()).line(4);
        let (output, rooms) = (Output::default(), Arc::new(AtomicUsize::new(0)));
        let counter = rooms.clone();
        let on_room = Arc::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        let port = Arc::new(Mutex::new(SerialPort::new(line, Box::new(output.clone()), on_room)));
        for byte in b"hello" {
            lock(&port).write(DATA, 1, u64::from(*byte));
        }
        assert_eq!(*lock(&output.0), b"hello");

        lock(&port).write(IER, 1, 1);
        let mut input = SerialInput::new(port.clone());
        input.push(&[b'x'; 100]);
        assert_eq!(*lock(&recorder.0), [(4, true), (4, false)]);
        assert_eq!(lock(&port).read(IIR, 1) & 0xf, 4);
        let mut received = 0;
        while lock(&port).read(LSR, 1) & 1 != 0 {
            assert_eq!(lock(&port).read(DATA, 1), u64::from(b'x'));
            received += 1;
            if received == 64 {
                assert_eq!(rooms.load(Ordering::Relaxed), 1);
                input.pump();
            }
        }
        assert_eq!((received, input.room()), (100, SerialInput::CAPACITY));
    }

    #[test]
    fn the_port_is_found_as_a_16550a() {
        let line = InterruptLines::new(Arc::new(Recorder::default())).line(4);
        let mut port = SerialPort::new(line, Box::new(std::io::sink()), Arc::new(|| ()));
        assert_eq!(port.read(IIR, 1) & 0xc0, 0xc0);
        assert_eq!(port.read(LSR, 1), 0x60);
    }
}
