//! How fast the matrix unit is: a guest that multiplies tiles in a loop, against the same product written with the best
//! vector instructions that the host has, data in the first-level cache for both.
//! `cargo run --release -p silicon --example tmul [ROUNDS]`.
#![expect(unsafe_code, reason = "guest memory by its host pointer, the CPU clock, vector intrinsics")]

use std::arch::x86_64::*;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use silicon::Cpu;
use silicon::mmu::ept::{Ept, Region};
use silicon::model::Features;
use silicon::state::{Segment, cr0, cr4, efer, reg};
use silicon::tiles::TileConfig;
use silicon::vmx::Exit;

const CODE: u64 = 0x10_0000;
const TABLES: u64 = 0x1000;
const MEMORY: usize = 4 << 20;
/// Products in the guest's loop.
const UNROLLED: usize = 8;
/// Multiplications in a product of whole tiles: of bytes; of BF16 half of that.
const BYTE_PRODUCTS: f64 = 16384.0;

#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; 4096]);

fn put(memory: &mut [Page], gpa: u64, bytes: &[u8]) {
    assert!(gpa as usize + bytes.len() <= memory.len() * 4096);
    let base = memory.as_mut_ptr().cast::<u8>();
    // SAFETY: within the slice, as asserted.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), base.add(gpa as usize), bytes.len()) };
}

/// A CPU in 64-bit mode with the first GiB identity-mapped, and eight whole tiles.
fn cpu(memory: &mut [Page]) -> Cpu {
    put(memory, TABLES, &(TABLES + 0x1003).to_le_bytes());
    put(memory, TABLES + 0x1000, &(TABLES + 0x2003).to_le_bytes());
    for page in 0..512u64 {
        put(memory, TABLES + 0x2000 + page * 8, &((page << 21) | 0x83).to_le_bytes());
    }
    let ept = Arc::new(Ept::new());
    let host = memory.as_ptr() as u64;
    ept.set_regions(vec![Region { gpa: 0, size: MEMORY as u64, host, readonly: false }]);
    let mut cpu = Cpu::new(Features::default(), ept);
    let segment = |selector, attributes| Segment { base: 0, limit: !0, attributes, selector };
    cpu.state.segs = [segment(16, 0xc093); 6];
    cpu.state.segs[1] = segment(8, 0xa09b);
    cpu.state.cr0 |= cr0::PE | cr0::PG | cr0::NE;
    cpu.state.cr3 = TABLES;
    cpu.state.cr4 = cr4::PAE | cr4::OSXSAVE | cr4::OSFXSR;
    cpu.state.efer = efer::LME | efer::LMA;
    cpu.state.xcr0 = 0x6_0007;
    cpu.state.tile_config = TileConfig { palette: 1, start_row: 0, bytes_per_row: [64; 8], rows: [16; 8] };
    cpu.reserve_tile_data().expect("8 KiB");
    cpu.refresh_mode();
    cpu
}

/// CPU time of this thread.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills in the structure that it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Products a second of a guest that executes `product` over and over.
fn guest(product: &[u8], rounds: u64) -> f64 {
    let mut memory = vec![Page([0; 4096]); MEMORY / 4096];
    let mut cpu = cpu(&mut memory);
    // 1: the products; dec ecx; jnz 1b; out 0xf4, al
    let mut code = product.repeat(UNROLLED);
    code.extend([0xff, 0xc9, 0x0f, 0x85]);
    code.extend((-(code.len() as i32 + 4)).to_le_bytes());
    code.extend([0xe6, 0xf4]);
    put(&mut memory, CODE, &code);
    cpu.state.rip = CODE;
    cpu.state.regs[usize::from(reg::RCX)] = rounds;
    let begin = cpu_time();
    let exit = cpu.run();
    let seconds = (cpu_time() - begin).as_secs_f64();
    assert!(matches!(exit, Exit::Io(_)), "{exit:?}");
    rounds as f64 * UNROLLED as f64 / seconds
}

/// 16 × 16 sums of 64 signed bytes each, both operands in the layout of tiles: bytes widened in registers, as exact
/// arithmetic without VNNI has to; then pairs by VPMADDWD.
#[target_feature(enable = "avx2")]
fn bytes_avx2(c: &mut [[i32; 16]; 16], a: &[[u8; 64]; 16], b: &[[u8; 64]; 16]) {
    for (c, a) in c.as_chunks_mut::<8>().0.iter_mut().zip(a.as_chunks::<8>().0) {
        for half in 0..2 {
            let mut sums = [_mm256_setzero_si256(); 8];
            for (k, b) in b.iter().enumerate() {
                // SAFETY: half of a row of 64 bytes.
                let b = unsafe { _mm256_loadu_si256(b.as_ptr().add(32 * half).cast()) };
                let even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(b));
                let odd = _mm256_srai_epi16::<8>(b);
                for (sum, a) in sums.iter_mut().zip(a) {
                    let a = i32::from_le_bytes([a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3]]);
                    let a = _mm256_set1_epi32(a);
                    let a_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(a));
                    let a_odd = _mm256_srai_epi16::<8>(a);
                    let pairs =
                        _mm256_add_epi32(_mm256_madd_epi16(a_even, even), _mm256_madd_epi16(a_odd, odd));
                    *sum = _mm256_add_epi32(*sum, pairs);
                }
            }
            for (c, sum) in c.iter_mut().zip(sums) {
                let c = &mut c.as_chunks_mut::<8>().0[half];
                // SAFETY: eight integers.
                unsafe {
                    let old = _mm256_loadu_si256(c.as_ptr().cast());
                    _mm256_storeu_si256(c.as_mut_ptr().cast(), _mm256_add_epi32(old, sum));
                }
            }
        }
    }
}

/// The same of pairs of BF16 numbers, a multiplication and addition for each.
#[target_feature(enable = "avx2,fma")]
fn bf16_avx2(c: &mut [[f32; 16]; 16], a: &[[u32; 16]; 16], b: &[[u32; 16]; 16]) {
    let upper = _mm256_set1_epi32(-0x1_0000);
    for (c, a) in c.as_chunks_mut::<8>().0.iter_mut().zip(a.as_chunks::<8>().0) {
        for half in 0..2 {
            let mut sums = [_mm256_setzero_ps(); 8];
            for (k, b) in b.iter().enumerate() {
                // SAFETY: half of a row of 64 bytes.
                let b = unsafe { _mm256_loadu_si256(b.as_ptr().add(8 * half).cast()) };
                let even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b));
                let odd = _mm256_castsi256_ps(_mm256_and_si256(b, upper));
                for (sum, a) in sums.iter_mut().zip(a) {
                    let a = _mm256_set1_epi32(a[k] as i32);
                    let first = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a));
                    let second = _mm256_castsi256_ps(_mm256_and_si256(a, upper));
                    *sum = _mm256_fmadd_ps(second, odd, _mm256_fmadd_ps(first, even, *sum));
                }
            }
            for (c, sum) in c.iter_mut().zip(sums) {
                let c = &mut c.as_chunks_mut::<8>().0[half];
                // SAFETY: eight numbers.
                unsafe {
                    let old = _mm256_loadu_ps(c.as_ptr());
                    _mm256_storeu_ps(c.as_mut_ptr(), _mm256_add_ps(old, sum));
                }
            }
        }
    }
}

/// VPDPBUSD takes unsigned by signed bytes: the signs of the first source are moved, which is made good by as many times
/// the sum of the second.
#[target_feature(enable = "avx512f,avx512vnni")]
fn bytes_avx512(c: &mut [[i32; 16]; 16], a: &[[u8; 64]; 16], b: &[[u8; 64]; 16]) {
    // SAFETY: rows of 64 bytes.
    let row = |row: &[u8; 64]| unsafe { _mm512_loadu_si512(row.as_ptr().cast()) };
    let shift = _mm512_set1_epi8(-128);
    let mut excess = _mm512_setzero_si512();
    for b in b {
        excess = _mm512_dpbusd_epi32(excess, shift, row(b));
    }
    for (c, a) in c.as_chunks_mut::<8>().0.iter_mut().zip(a.as_chunks::<8>().0) {
        let mut sums = [_mm512_sub_epi32(_mm512_setzero_si512(), excess); 8];
        for (k, b) in b.iter().enumerate() {
            let b = row(b);
            for (sum, a) in sums.iter_mut().zip(a) {
                let a = i32::from_le_bytes([a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3]]);
                *sum = _mm512_dpbusd_epi32(*sum, _mm512_xor_si512(_mm512_set1_epi32(a), shift), b);
            }
        }
        for (c, sum) in c.iter_mut().zip(sums) {
            // SAFETY: sixteen integers.
            unsafe {
                let old = _mm512_loadu_si512(c.as_ptr().cast());
                _mm512_storeu_si512(c.as_mut_ptr().cast(), _mm512_add_epi32(old, sum));
            }
        }
    }
}

/// Products a second of `compute`.
fn host(rounds: u64, mut compute: impl FnMut()) -> f64 {
    let begin = cpu_time();
    (0..rounds).for_each(|_| compute());
    rounds as f64 / (cpu_time() - begin).as_secs_f64()
}

fn report(name: &str, products: f64, guest: f64, host: f64) {
    let giga = |rate: f64| rate * products / 1e9;
    println!(
        "{name:10} guest {:8.2} host {:8.2} G products/s  ratio {:.2}",
        giga(guest),
        giga(host),
        guest / host
    );
}

/// Pairs of BF16 numbers by VDPBF16PS, which adds both products of a pair to one sum: not bit for bit what AMX gives, but what a program
/// without AMX would use.
#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_avx512(c: &mut [[f32; 16]; 16], a: &[[u32; 16]; 16], b: &[[u32; 16]; 16]) {
    for (c, a) in c.as_chunks_mut::<8>().0.iter_mut().zip(a.as_chunks::<8>().0) {
        let mut sums = [_mm512_setzero_ps(); 8];
        for (k, b) in b.iter().enumerate() {
            // SAFETY: a row of 64 bytes, and 64 bytes are 32 numbers.
            let b =
                unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.as_ptr().cast())) };
            for (sum, a) in sums.iter_mut().zip(a) {
                // SAFETY: as above.
                let a = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(a[k] as i32)) };
                *sum = _mm512_dpbf16_ps(*sum, a, b);
            }
        }
        for (c, sum) in c.iter_mut().zip(sums) {
            // SAFETY: sixteen numbers.
            unsafe { _mm512_storeu_ps(c.as_mut_ptr(), _mm512_add_ps(_mm512_loadu_ps(c.as_ptr()), sum)) };
        }
    }
}

/// Products of bytes a second, by the host's best instructions for it.
fn host_bytes(products: u64) -> f64 {
    let vnni = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni");
    let (mut c, a, b) = ([[0i32; 16]; 16], [[3u8; 64]; 16], [[254u8; 64]; 16]);
    host(products, || {
        // SAFETY: the CPU has what the functions need; `main` has seen to AVX2.
        unsafe {
            if vnni {
                bytes_avx512(black_box(&mut c), black_box(&a), black_box(&b));
            } else {
                bytes_avx2(black_box(&mut c), black_box(&a), black_box(&b));
            }
        }
    })
}

/// The same of BF16 numbers.
fn host_bf16(products: u64) -> f64 {
    let native = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
    let (mut c, a, b) = ([[0f32; 16]; 16], [[0x3fc0_3fc0u32; 16]; 16], [[0xc000_c000u32; 16]; 16]);
    host(products, || {
        // SAFETY: the CPU has what the functions need; `main` has seen to AVX2 and FMA.
        unsafe {
            if native {
                bf16_avx512(black_box(&mut c), black_box(&a), black_box(&b));
            } else {
                bf16_avx2(black_box(&mut c), black_box(&a), black_box(&b));
            }
        }
    })
}

/// Runs of each that are made in turn.
const RUNS: usize = 7;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let rounds: u64 = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(20_000);
    let products = rounds * UNROLLED as u64;
    if !is_x86_feature_detected!("avx2") || !is_x86_feature_detected!("fma") {
        println!("the host has no AVX2: nothing to compare with");
        return;
    }
    let [mut bytes, mut bf16] = [(); 2].map(|()| (Vec::new(), Vec::new()));
    for _ in 0..RUNS {
        bytes.0.push(guest(&[0xc4, 0xe2, 0x63, 0x5e, 0xca], rounds));
        bytes.1.push(host_bytes(products));
        bf16.0.push(guest(&[0xc4, 0xe2, 0x62, 0x5c, 0xca], rounds));
        bf16.1.push(host_bf16(products));
    }
    println!("medians of {RUNS} runs in turn");
    report("TDPBSSD", BYTE_PRODUCTS, median(bytes.0), median(bytes.1));
    report("TDPBF16PS", BYTE_PRODUCTS / 2.0, median(bf16.0), median(bf16.1));
}
