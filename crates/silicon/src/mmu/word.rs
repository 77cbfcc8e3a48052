//! Machine words in guest memory.
//!
//! Guest memory is shared with other CPUs, devices and the host kernel, so every access is exactly one host
//! instruction, written in assembly: the compiler can neither split, repeat nor drop it, and the host's memory
//! ordering is the guest's. Host memory may be absent; an access then fails ([`super::host`] has the mechanism). On
//! the way that succeeds it costs one compare of a pointer with zero for a read, and nothing for a write.
#![expect(unsafe_code, reason = "guest memory is reached through raw host pointers")]

use std::arch::asm;

use crate::mmu::host::{Absent, on_fault, on_fault_zero};

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
    /// `SIZE` bytes at `pointer`, which is not null, are readable or guest memory, which may be absent.
    unsafe fn read(pointer: *const Self) -> Result<Self, Absent>;
    /// Writes with one host store. The pointer need not be aligned.
    ///
    /// # Safety
    /// `SIZE` bytes at `pointer`, which is not null, are writable or guest memory, which may be absent, and no Rust
    /// reference covers them.
    unsafe fn write(pointer: *mut Self, value: Self) -> Result<(), Absent>;
    /// LOCK CMPXCHG: stores `new` if memory holds `expected`; returns what it held. The pointer need not be
    /// aligned, but a split lock is for the caller to avoid.
    ///
    /// # Safety
    /// As [`Word::write`].
    unsafe fn compare_exchange(pointer: *mut Self, expected: Self, new: Self) -> Result<Self, Absent>;
    /// REP MOVS: copies `count` elements one after the other, upwards, as far as memory is there. Returns how many
    /// are left.
    ///
    /// # Safety
    /// So many elements are readable at `from` and writable at `to`, or guest memory, which may be absent.
    unsafe fn copy_up(from: *const u8, to: *mut u8, count: usize) -> usize;
    /// REP STOS: stores `value` in `count` elements, upwards, as far as memory is there. Returns how many are left.
    ///
    /// # Safety
    /// So many elements at `to` are writable or guest memory, which may be absent.
    unsafe fn fill_up(to: *mut u8, value: Self, count: usize) -> usize;
}

macro_rules! word {
    ($t:ty, $wide:ty, $class:ident, $acc:tt, $load:literal, $store:literal, $cmpxchg:literal, $suffix:literal) => {
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
            unsafe fn read(pointer: *const $t) -> Result<$t, Absent> {
                let value: $wide;
                let after: *const $t;
                // SAFETY: the caller vouches for the memory; the instruction only loads. If it faults, it goes
                // on behind itself with `after` null.
                unsafe {
                    asm!(
                        concat!("2: ", $load), "3:", on_fault_zero!("{p:e}"),
                        v = out(reg) value, p = inout(reg) pointer => after,
                        options(nostack, preserves_flags, readonly)
                    );
                }
                if after.is_null() { Err(Absent) } else { Ok(value as $t) }
            }
            #[inline(always)]
            unsafe fn write(pointer: *mut $t, value: $t) -> Result<(), Absent> {
                // SAFETY: the caller vouches for the memory; the instruction only stores. If it faults, it goes
                // on at the label.
                unsafe {
                    asm!(
                        concat!("2: ", $store), on_fault!("2b" => "{absent}"),
                        v = in($class) value, p = in(reg) pointer, absent = label { return Err(Absent) },
                        options(nostack, preserves_flags)
                    );
                }
                Ok(())
            }
            #[inline(always)]
            unsafe fn compare_exchange(pointer: *mut $t, expected: $t, new: $t) -> Result<$t, Absent> {
                let old: $t;
                let after: *mut $t;
                // SAFETY: the caller vouches for the memory. If it faults, it goes on behind itself with `after`
                // null.
                unsafe {
                    asm!(
                        concat!("2: ", $cmpxchg), "3:", on_fault_zero!("{p:e}"),
                        n = in($class) new, p = inout(reg) pointer => after, inout($acc) expected => old,
                        options(nostack)
                    );
                }
                if after.is_null() { Err(Absent) } else { Ok(old) }
            }
            #[inline]
            unsafe fn copy_up(from: *const u8, to: *mut u8, count: usize) -> usize {
                let left;
                // SAFETY: the caller vouches for the memory, and the direction flag is clear. If it faults, it goes on
                // behind itself, and RCX says how much is left.
                unsafe {
                    asm!(
                        concat!("2: rep movs", $suffix), "3:", on_fault!("2b" => "3b"),
                        inout("rcx") count => left, inout("rsi") from => _, inout("rdi") to => _,
                        options(nostack, preserves_flags)
                    );
                }
                left
            }
            #[inline]
            unsafe fn fill_up(to: *mut u8, value: $t, count: usize) -> usize {
                let left;
                // SAFETY: as in `copy_up`.
                unsafe {
                    asm!(
                        concat!("2: rep stos", $suffix), "3:", on_fault!("2b" => "3b"),
                        inout("rcx") count => left, inout("rdi") to => _, in("rax") u64::from(value),
                        options(nostack, preserves_flags)
                    );
                }
                left
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
    "lock cmpxchg byte ptr [{p}], {n}",
    "b"
);
word!(
    u16,
    u32,
    reg,
    "ax",
    "movzx {v:e}, word ptr [{p}]",
    "mov word ptr [{p}], {v:x}",
    "lock cmpxchg word ptr [{p}], {n:x}",
    "w"
);
word!(
    u32,
    u32,
    reg,
    "eax",
    "mov {v:e}, dword ptr [{p}]",
    "mov dword ptr [{p}], {v:e}",
    "lock cmpxchg dword ptr [{p}], {n:e}",
    "d"
);
word!(
    u64,
    u64,
    reg,
    "rax",
    "mov {v}, qword ptr [{p}]",
    "mov qword ptr [{p}], {v}",
    "lock cmpxchg qword ptr [{p}], {n}",
    "q"
);

/// CMPXCHG16B on host memory: stores `new` if memory holds `expected`; returns what it held.
///
/// # Safety
/// 16 bytes at `pointer`, which is 16-byte aligned, are writable or guest memory, which may be absent.
pub(crate) unsafe fn compare_exchange_16(
    pointer: *mut u128,
    expected: u128,
    new: u128,
) -> Result<u128, Absent> {
    let (low, high): (u64, u64);
    let after: *mut u128;
    // SAFETY: the caller vouches for the memory. RBX, which the compiler keeps for itself, is saved around the
    // instruction, also if it faults; `p` is pinned to RDI so that it cannot be RBX.
    unsafe {
        asm!(
            "xchg rbx, {n}", "2: lock cmpxchg16b xmmword ptr [rdi]", "3: mov rbx, {n}", on_fault_zero!("edi"),
            n = inout(reg) new as u64 => _, inout("rdi") pointer => after, in("rcx") (new >> 64) as u64,
            inout("rax") expected as u64 => low, inout("rdx") (expected >> 64) as u64 => high,
            options(nostack)
        );
    }
    if after.is_null() { Err(Absent) } else { Ok(u128::from(low) | u128::from(high) << 64) }
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
            assert_eq!(u8::read(p.add(1)), Ok(0x22));
            assert_eq!(u16::read(p.add(1).cast()), Ok(0x3322));
            assert_eq!(u32::read(p.add(1).cast()), Ok(0x5544_3322));
            assert_eq!(u64::read(p.add(1).cast()), Ok(0x9988_7766_5544_3322));
            assert_eq!(u8::compare_exchange(p, 0x11, 0xaa), Ok(0x11));
            assert_eq!(u16::compare_exchange(p.cast(), 0x1111, 0), Ok(0x22aa));
            assert_eq!(u32::compare_exchange(p.cast(), 0x4433_22aa, 1), Ok(0x4433_22aa));
            assert_eq!(u64::compare_exchange(p.cast(), 0, 1), Ok(0x8877_6655_0000_0001));
            assert_eq!(u16::write(p.cast(), 0xbeef), Ok(()));
        }
        assert_eq!(memory, [0xef, 0xbe, 0, 0, 0x55, 0x66, 0x77, 0x88, 0x99]);
    }

    #[test]
    fn sixteen_bytes_exchange() {
        let mut memory: u128 = 5;
        // SAFETY: `memory` is a live, aligned u128.
        unsafe {
            assert_eq!(compare_exchange_16(&mut memory, 4, 7), Ok(5));
            assert_eq!(compare_exchange_16(&mut memory, 5, (9 << 100) | 1), Ok(5));
        }
        assert_eq!(memory, (9 << 100) | 1);
    }
}
