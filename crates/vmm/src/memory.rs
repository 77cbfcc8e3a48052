//! Guest RAM: how much is possible, how it is mapped, and the memory map that the guest is told.

use std::fmt;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};

use crate::host::sys;
use crate::layout;

/// Guest RAM as mapped in this process.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Least amount of RAM: the firmware area and room for a small program above it.
pub const MIN_RAM: u64 = 2 << 20;
/// Greatest amount of RAM of the machine.
pub const MAX_RAM: u64 = 1 << 40;
/// RAM comes in pages.
pub const PAGE_SIZE: u64 = 4096;

/// Why guest RAM cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Below [`MIN_RAM`].
    #[error("{} of memory is too little: the machine needs at least {}", Size(*.0), Size(MIN_RAM))]
    TooSmall(u64),
    /// Above [`MAX_RAM`].
    #[error("{} of memory is too much: the machine takes at most {}", Size(*.0), Size(MAX_RAM))]
    TooLarge(u64),
    /// Not a multiple of the page size.
    #[error("a memory size of {0} bytes is not a multiple of the page size, {PAGE_SIZE}")]
    Unaligned(u64),
    /// The host refused the mapping.
    #[error("the host cannot map {} of guest memory: {reason}", Size(*size))]
    Map {
        /// Bytes asked for.
        size: u64,
        /// The host's error.
        reason: String,
    },
}

/// A number of bytes, displayed in the largest binary unit that divides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            let whole = self.0 >> shift;
            let readable = shift > 10 || self.0 < 1 << 20;
            if whole != 0 && self.0 == whole << shift && readable {
                return write!(f, "{whole} {unit}");
            }
        }
        match self.0 {
            1 => write!(f, "1 byte"),
            n if n < 1 << 20 => write!(f, "{n} bytes"),
            n => write!(f, "{:.1} MiB", n as f64 / f64::from(1 << 20)),
        }
    }
}

/// Kind of a range of the memory map, with the numbers that e820, multiboot and PVH share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    /// Usable RAM.
    Ram = 1,
    /// Not for the operating system.
    Reserved = 2,
}

/// One range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRange {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// Checks a size of guest RAM.
pub fn check_size(size: u64) -> Result<(), MemoryError> {
    if !size.is_multiple_of(PAGE_SIZE) {
        Err(MemoryError::Unaligned(size))
    } else if size < MIN_RAM {
        Err(MemoryError::TooSmall(size))
    } else if size > MAX_RAM {
        Err(MemoryError::TooLarge(size))
    } else {
        Ok(())
    }
}

/// The RAM ranges of a machine with `size` bytes: below and above the MMIO hole.
pub fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(layout::LOW_RAM_END);
    let mut ranges = vec![(0, low)];
    if size > low {
        ranges.push((layout::HIGH_RAM_START, size - low));
    }
    ranges
}

/// Maps guest RAM. Nothing is reserved or touched: a page costs host memory once the guest uses it.
pub fn allocate(size: u64) -> Result<GuestMemory, MemoryError> {
    check_size(size)?;
    let fail = |reason: String| MemoryError::Map { size, reason };
    let regions = ram_ranges(size)
        .into_iter()
        .map(|(start, length)| {
            let length = usize::try_from(length).map_err(|e| fail(e.to_string()))?;
            let mapping = MmapRegion::new(length).map_err(|e| fail(e.to_string()))?;
            vm_memory::GuestRegionMmap::new(mapping, GuestAddress(start))
                .ok_or_else(|| fail("the address range overflows".into()))
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestMemory::from_regions(regions).map_err(|e| fail(e.to_string()))
}

/// Says that a range is about to be filled, so that the host may back it by huge pages where it holds whole ones:
/// thousands of page faults less between process start and the first guest instruction.
pub fn expect_filling(memory: &GuestMemory, start: u64, length: u64) {
    const HUGE: u64 = 2 << 20;
    let Some(region) = memory.find_region(GuestAddress(start)) else { return };
    let host = region.as_ptr() as u64 + (start - region.start_addr().0);
    let length = length.min(region.start_addr().0 + region.len() - start);
    let (first, end) = (host.next_multiple_of(HUGE), (host + length) / HUGE * HUGE);
    if first < end
        && let Err(error) = sys::advise_huge_pages(first as usize, (end - first) as usize)
    {
        tracing::debug!("no huge pages: {error}");
    }
}

/// End of RAM below the MMIO hole.
pub fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory
        .iter()
        .filter(|region| region.start_addr().0 < layout::LOW_RAM_END)
        .map(|region| region.start_addr().0 + region.len())
        .max()
        .unwrap_or(0)
}

/// The memory map that the guest is told: all RAM but the BIOS data and firmware areas.
pub fn memory_map(memory: &GuestMemory) -> Vec<MapRange> {
    use RangeKind::{Ram, Reserved};
    let range = |start, end: u64, kind| MapRange { start, length: end - start, kind };
    let mut map = vec![
        range(0, layout::EBDA, Ram),
        range(layout::EBDA, layout::EBDA_END, Reserved),
        range(layout::ACPI_TABLES, layout::FIRMWARE_END, Reserved),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::HIGH_MEMORY);
        let end = region.start_addr().0 + region.len();
        if end > start {
            map.push(range(start, end, Ram));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_displayed_in_natural_units() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1000, "1000 bytes"),
            (4096, "4 KiB"),
            (73_584 << 10, "71.9 MiB"),
            (512 << 20, "512 MiB"),
            (3 << 30, "3 GiB"),
            ((1 << 20) + 1, "1.0 MiB"),
            (u64::MAX, "17592186044416.0 MiB"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(matches!(check_size(0), Err(MemoryError::TooSmall(0))));
        assert!(matches!(check_size(4095 + (8 << 20)), Err(MemoryError::Unaligned(_))));
        assert!(matches!(check_size(MAX_RAM + PAGE_SIZE), Err(MemoryError::TooLarge(_))));
        assert!(check_size(MIN_RAM).is_ok() && check_size(MAX_RAM).is_ok());
    }

    #[test]
    fn ram_leaves_the_mmio_hole_free() {
        assert_eq!(ram_ranges(512 << 20), [(0, 512 << 20)]);
        assert_eq!(ram_ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ram_ranges(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn the_map_covers_all_ram_once() {
        let memory = allocate(5 << 30).unwrap();
        let map = memory_map(&memory);
        assert_eq!(low_ram_end(&memory), layout::LOW_RAM_END);
        assert!(map.windows(2).all(|pair| pair[0].start + pair[0].length <= pair[1].start));
        assert_eq!(map.last().unwrap(), &MapRange { start: 4 << 30, length: 2 << 30, kind: RangeKind::Ram });
    }
}
