//! The one place where port and MMIO ranges map to devices.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device with registers. Nothing that a guest writes may panic or block for long.
pub trait Device: Send {
    /// Reads `size` (1, 2, 4 or 8) bytes at `offset` into the device's range; bits above are ignored.
    fn read(&mut self, offset: u64, size: u8) -> u64;
    /// Writes `size` bytes at `offset`; bits of `value` above are zero.
    fn write(&mut self, offset: u64, size: u8, value: u64);
}

/// A device that several ranges, or other threads, share.
pub type SharedDevice = Arc<Mutex<dyn Device>>;

/// How wide the accesses are that a device takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// One byte: wider accesses are split, as the ISA bus does for 8-bit devices.
    Byte,
    /// Any: the device sees the access as it was made.
    Any,
}

/// Two devices claim the same address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the range {base:#x}..{end:#x} overlaps that of another device, or is empty")]
pub struct Overlap {
    base: u64,
    end: u64,
}

struct Range {
    end: u64,
    width: Width,
    device: SharedDevice,
}

/// An address space of devices. Reading where there is none gives all ones; writing has no effect.
#[derive(Default)]
pub struct Bus {
    ranges: BTreeMap<u64, Range>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ranges.iter().map(|(base, range)| *base..range.end)).finish()
    }
}

/// Locks a device. A panic of another thread in a device leaves plain register state behind, which is safe to use.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The value of `size` bytes that all read as ones.
fn all_ones(size: u8) -> u64 {
    if size >= 8 { u64::MAX } else { (1 << (u32::from(size) * 8)) - 1 }
}

impl Bus {
    /// Attaches `device` to `length` addresses from `base` on.
    pub fn attach(
        &mut self,
        base: u64,
        length: u64,
        width: Width,
        device: SharedDevice,
    ) -> Result<(), Overlap> {
        let end = base.saturating_add(length);
        let before = self.ranges.range(..end).next_back();
        if length == 0 || before.is_some_and(|(_, range)| range.end > base) {
            return Err(Overlap { base, end });
        }
        self.ranges.insert(base, Range { end, width, device });
        Ok(())
    }

    /// The range that contains `address`, and the offset into it.
    fn find(&self, address: u64) -> Option<(u64, &Range)> {
        let (base, range) = self.ranges.range(..=address).next_back()?;
        (address < range.end).then(|| (address - base, range))
    }

    /// Whether the access is one that the device takes whole.
    fn whole(range: &Range, address: u64, size: u8) -> bool {
        size == 1 || (range.width == Width::Any && u64::from(size) <= range.end - address)
    }

    /// Reads `size` bytes at `address`.
    pub fn read(&self, address: u64, size: u8) -> u64 {
        match self.find(address) {
            None if size == 1 => 0xff,
            Some((offset, range)) if Bus::whole(range, address, size) => {
                lock(&range.device).read(offset, size) & all_ones(size)
            }
            _ => (0..u64::from(size.min(8)))
                .map(|i| self.read(address.wrapping_add(i), 1) << (i * 8))
                .fold(0, |value, byte| value | byte),
        }
    }

    /// Writes `size` bytes at `address`.
    pub fn write(&self, address: u64, size: u8, value: u64) {
        match self.find(address) {
            None if size == 1 => {}
            Some((offset, range)) if Bus::whole(range, address, size) => {
                lock(&range.device).write(offset, size, value & all_ones(size));
            }
            _ => {
                for i in 0..u64::from(size.min(8)) {
                    self.write(address.wrapping_add(i), 1, value >> (i * 8) & 0xff);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers accesses; reads give the offset.
    #[derive(Default)]
    struct Recorder(Vec<(u64, u8, u64)>);

    impl Device for Recorder {
        fn read(&mut self, offset: u64, _size: u8) -> u64 {
            offset | 0xffff_ff00
        }
        fn write(&mut self, offset: u64, size: u8, value: u64) {
            self.0.push((offset, size, value));
        }
    }

    #[test]
    fn accesses_reach_their_device() {
        let (bytes, words) =
            (Arc::new(Mutex::new(Recorder::default())), Arc::new(Mutex::new(Recorder::default())));
        let mut bus = Bus::default();
        bus.attach(0x70, 2, Width::Byte, bytes.clone()).unwrap();
        bus.attach(0x100, 8, Width::Any, words.clone()).unwrap();
        for (base, length) in [(0x71, 1), (0x6f, 2), (0x60, 0x20), (0x107, 4), (0x200, 0)] {
            assert!(bus.attach(base, length, Width::Any, words.clone()).is_err(), "{base:#x} {length}");
        }

        // (address, size, value)
        let table = [
            (0x70, 1, 0x00),
            (0x71, 1, 0x01),
            (0x70, 2, 0x0100),
            (0x70, 4, 0xffff_0100),
            (0x6f, 2, 0x00ff),
            (0x104, 4, 0xffff_ff04),
            (0x106, 4, 0xffff_0706),
            (0x300, 4, 0xffff_ffff),
            (0x300, 8, u64::MAX),
        ];
        for (address, size, value) in table {
            assert_eq!(bus.read(address, size), value, "{address:#x} {size}");
        }
        bus.write(0x70, 2, 0x1234);
        bus.write(0x102, 4, 0xdead_beef);
        bus.write(0x106, 4, 0x0102_0304);
        bus.write(u64::MAX, 8, 0);
        assert_eq!(lock(&bytes).0, [(0, 1, 0x34), (1, 1, 0x12)]);
        assert_eq!(lock(&words).0, [(2, 4, 0xdead_beef), (6, 1, 4), (7, 1, 3)]);
    }
}
