//! Interrupt lines between devices and the interrupt controllers.

use std::fmt;
use std::sync::{Arc, Mutex};

use super::bus::lock;
use crate::layout::GSI_COUNT;

/// The interrupt controllers as seen from a device.
pub trait InterruptSink: Send + Sync {
    /// Drives the input `gsi` high or low.
    fn set_line(&self, gsi: u32, level: bool);
}

/// All lines of the machine. Several devices may share one: it is high as long as one of them holds it.
pub struct InterruptLines {
    sink: Arc<dyn InterruptSink>,
    holders: Mutex<[u32; GSI_COUNT as usize]>,
}

impl fmt::Debug for InterruptLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InterruptLines").field("holders", &self.holders).finish_non_exhaustive()
    }
}

impl InterruptLines {
    /// Lines that end at `sink`.
    pub fn new(sink: Arc<dyn InterruptSink>) -> Arc<Self> {
        Arc::new(Self { sink, holders: Mutex::default() })
    }

    /// A device's end of the line `gsi`.
    pub fn line(self: &Arc<Self>, gsi: u32) -> InterruptLine {
        InterruptLine { lines: self.clone(), gsi, held: Mutex::new(false) }
    }

    fn change(&self, gsi: u32, hold: bool) {
        let mut holders = lock(&self.holders);
        let Some(count) = holders.get_mut(gsi as usize) else { return };
        let before = *count != 0;
        *count = if hold { *count + 1 } else { count.saturating_sub(1) };
        let after = *count != 0;
        if before != after {
            // Under the lock, so that edges arrive in the order in which they were made.
            self.sink.set_line(gsi, after);
        }
    }
}

/// One device's end of an interrupt line.
#[derive(Debug)]
pub struct InterruptLine {
    lines: Arc<InterruptLines>,
    gsi: u32,
    held: Mutex<bool>,
}

impl InterruptLine {
    /// Holds the line high, or lets it go.
    pub fn set(&self, level: bool) {
        let mut held = lock(&self.held);
        if *held != level {
            *held = level;
            self.lines.change(self.gsi, level);
        }
    }

    /// A rising edge and a falling one.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

impl vm_superio::Trigger for InterruptLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.pulse();
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Remembers every change of a line.
    #[derive(Debug, Default)]
    pub(crate) struct Recorder(pub(crate) Mutex<Vec<(u32, bool)>>);

    impl InterruptSink for Recorder {
        fn set_line(&self, gsi: u32, level: bool) {
            lock(&self.0).push((gsi, level));
        }
    }

    #[test]
    fn a_shared_line_is_high_while_one_device_holds_it() {
        let recorder = Arc::new(Recorder::default());
        let lines = InterruptLines::new(recorder.clone());
        let (a, b) = (lines.line(16), lines.line(16));
        a.set(true);
        a.set(true);
        b.set(true);
        a.set(false);
        assert_eq!(*lock(&recorder.0), [(16, true)]);
        b.set(false);
        b.pulse();
        lines.line(99).pulse();
        assert_eq!(*lock(&recorder.0), [(16, true), (16, false), (16, true), (16, false)]);
    }
}
