//! Machine words in guest memory.
//!
//! Guest memory is shared with other CPUs, devices and the host kernel, so every access is exactly one host
//! instruction, written in assembly: the compiler can neither split, repeat nor drop it, and the host's memory
//! ordering is the guest's.
#![expect(unsafe_code, reason = "guest memory is reached through raw host pointers")]

use std::arch::asm;

/// An unsigned integer that guest memory holds: `u8`, `u16`, `u32` or `u64`.
pub trait Word: Copy + Eq + Default + std::fmt::Debug + 'static {
    /// Size in bytes.
    const SIZE: usize;
    /// Truncates.
    fn from_u64(value: u64) -> Self;
    /// Zero-extends.
    fn to_u64(self) -> u64;
    /// Reads with one host load. The pointer need not be aligned.
    ///
    /// # Safety
    /// `SIZE` bytes at `pointer` are mapped and readable.
    unsafe fn read(pointer: *const Self) -> Self;
    /// Writes with one host store. The pointer need not be aligned.
    ///
    /// # Safety
    /// `SIZE` bytes at `pointer` are mapped, writable, and no Rust reference covers them.
    unsafe fn write(pointer: *mut Self, value: Self);
    /// LOCK CMPXCHG: stores `new` if memory holds `expected`; returns what it held. The pointer need not be
    /// aligned, but a split lock is for the caller to avoid.
    ///
    /// # Safety
    /// As [`Word::write`].
    unsafe fn compare_exchange(pointer: *mut Self, expected: Self, new: Self) -> Self;
}

macro_rules! word {
    ($t:ty, $wide:ty, $class:ident, $acc:tt, $load:literal, $store:literal, $cmpxchg:literal) => {
        impl Word for $t {
            const SIZE: usize = size_of::<$t>();
            #[inline(always)]
            fn from_u64(value: u64) -> $t {
                value as $t
            }
            #[inline(always)]
            fn to_u64(self) -> u64 {
                u64::from(self)
            }
            #[inline(always)]
            unsafe fn read(pointer: *const $t) -> $t {
                let value: $wide;
                // SAFETY: the caller vouches for the memory; the instruction only loads.
                unsafe {
                    asm!($load, v = lateout(reg) value, p = in(reg) pointer,
                        options(nostack, preserves_flags, readonly));
                }
                value as $t
            }
            #[inline(always)]
            unsafe fn write(pointer: *mut $t, value: $t) {
                // SAFETY: the caller vouches for the memory; the instruction only stores.
                unsafe {
                    asm!($store, v = in($class) value, p = in(reg) pointer, options(nostack, preserves_flags));
                }
            }
            #[inline(always)]
            unsafe fn compare_exchange(pointer: *mut $t, expected: $t, new: $t) -> $t {
                let old: $t;
                // SAFETY: the caller vouches for the memory.
                unsafe {
                    asm!($cmpxchg, n = in($class) new, p = in(reg) pointer,
                        inout($acc) expected => old, options(nostack));
                }
                old
            }
        }
    };
}

word!(
    u8,
    u32,
    reg_byte,
    "al",
    "movzx {v:e}, byte ptr [{p}]",
    "mov byte ptr [{p}], {v}",
    "lock cmpxchg byte ptr [{p}], {n}"
);
word!(
    u16,
    u32,
    reg,
    "ax",
    "movzx {v:e}, word ptr [{p}]",
    "mov word ptr [{p}], {v:x}",
    "lock cmpxchg word ptr [{p}], {n:x}"
);
word!(
    u32,
    u32,
    reg,
    "eax",
    "mov {v:e}, dword ptr [{p}]",
    "mov dword ptr [{p}], {v:e}",
    "lock cmpxchg dword ptr [{p}], {n:e}"
);
word!(
    u64,
    u64,
    reg,
    "rax",
    "mov {v}, qword ptr [{p}]",
    "mov qword ptr [{p}], {v}",
    "lock cmpxchg qword ptr [{p}], {n}"
);

/// CMPXCHG16B on host memory: stores `new` if memory holds `expected`; returns what it held.
///
/// # Safety
/// 16 bytes at `pointer`, which is 16-byte aligned, are mapped and writable.
pub(crate) unsafe fn compare_exchange_16(pointer: *mut u128, expected: u128, new: u128) -> u128 {
    let (low, high): (u64, u64);
    // SAFETY: the caller vouches for the memory. RBX, which the compiler keeps for itself, is saved around the
    // instruction; `p` is pinned to RDI so that it cannot be RBX.
    unsafe {
        asm!(
            "xchg rbx, {n}", "lock cmpxchg16b xmmword ptr [rdi]", "mov rbx, {n}",
            n = inout(reg) new as u64 => _, in("rdi") pointer, in("rcx") (new >> 64) as u64,
            inout("rax") expected as u64 => low, inout("rdx") (expected >> 64) as u64 => high,
            options(nostack)
        );
    }
    u128::from(low) | u128::from(high) << 64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_read_write_and_exchange() {
        let mut memory = [0x11u8, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99];
        let p = memory.as_mut_ptr();
        // SAFETY: all accesses are within `memory`.
        unsafe {
            assert_eq!(u8::read(p.add(1)), 0x22);
            assert_eq!(u16::read(p.add(1).cast()), 0x3322);
            assert_eq!(u32::read(p.add(1).cast()), 0x5544_3322);
            assert_eq!(u64::read(p.add(1).cast()), 0x9988_7766_5544_3322);
            assert_eq!(u8::compare_exchange(p, 0x11, 0xaa), 0x11);
            assert_eq!(u16::compare_exchange(p.cast(), 0x1111, 0), 0x22aa);
            assert_eq!(u32::compare_exchange(p.cast(), 0x4433_22aa, 1), 0x4433_22aa);
            assert_eq!(u64::compare_exchange(p.cast(), 0, 1), 0x8877_6655_0000_0001);
            u16::write(p.cast(), 0xbeef);
        }
        assert_eq!(memory, [0xef, 0xbe, 0, 0, 0x55, 0x66, 0x77, 0x88, 0x99]);
    }

    #[test]
    fn sixteen_bytes_exchange() {
        let mut memory: u128 = 5;
        // SAFETY: `memory` is a live, aligned u128.
        unsafe {
            assert_eq!(compare_exchange_16(&mut memory, 4, 7), 5);
            assert_eq!(compare_exchange_16(&mut memory, 5, (9 << 100) | 1), 5);
        }
        assert_eq!(memory, (9 << 100) | 1);
    }
}
