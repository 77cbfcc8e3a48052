//! Address translation and memory access.
//!
//! Every access takes the same way: effective address → linear address → software TLB → host pointer, or the
//! slow path (page walk, code page, dirty logging, MMIO, access that crosses a page).

use crate::cpu::{Cpu, Requests};

pub mod access;
pub mod ept;

/// Translation state of one CPU.
#[derive(Debug, Default)]
pub struct Mmu {}

impl Mmu {
    /// A number that stands for the current linear-to-physical mapping of code: as long as it is the same, so
    /// are the translations.
    #[inline(always)]
    pub fn address_space(&self) -> u64 {
        0
    }

    /// DR6 bits of the data breakpoints that the last instruction hit; forgets them.
    pub(crate) fn take_debug_hits(&mut self) -> u64 {
        0
    }
}

impl Cpu {
    /// Serves the requests that concern translation: [`Requests::FLUSH`], [`Requests::MAIL`] and
    /// [`Requests::EXCLUSIVE`].
    pub(crate) fn mmu_requests(&mut self, bits: u32) {
        if bits & Requests::FLUSH != 0 {
            self.code.clear();
        }
    }
}

/// An unsigned integer that guest memory holds: `u8`, `u16`, `u32` or `u64`.
pub trait Word: Copy + Eq + Default + std::fmt::Debug + 'static {
    /// Size in bytes.
    const SIZE: usize;
    /// Truncates.
    fn from_u64(value: u64) -> Self;
    /// Zero-extends.
    fn to_u64(self) -> u64;
}

macro_rules! words {
    ($($t:ty)*) => {$(
        impl Word for $t {
            const SIZE: usize = size_of::<$t>();
            #[inline(always)]
            fn from_u64(value: u64) -> $t { value as $t }
            #[inline(always)]
            fn to_u64(self) -> u64 { u64::from(self) }
        }
    )*};
}
words!(u8 u16 u32 u64);
