//! Everything that reads what others wrote: boot files, model names, host parameters. Whatever they contain, there
//! is an answer or an error, never a panic.

use std::io::Cursor;

use conformance::rng::Rng;
use hypervisor::HostParams;
use silicon::model::CpuModel;
use vmm::loader::{self, BootSource, Image};
use vmm::memory;

/// A file of `length` random bytes with the marks of a Linux image, an ELF file or a multiboot image.
fn boot_file(rng: &mut Rng, length: usize) -> Vec<u8> {
    let mut file = vec![0; length];
    if rng.percent(50) {
        rng.fill(&mut file);
    }
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    match rng.below(3) {
        0 => {
            put(0x200, &[0xeb, 0x6a]);
            put(0x1fe, b"\x55\xaa");
            put(0x202, b"HdrS");
            put(0x206, &[rng.below(16) as u8, 2]);
            put(0x211, &[1]);
            put(0x236, &[1]);
            put(0x1f1, &[rng.below(8) as u8]);
            put(0x22c, &0x7fff_ffffu32.to_le_bytes());
            put(0x230, &(1u32 << rng.below(32)).to_le_bytes());
            put(0x238, &2047u32.to_le_bytes());
            put(0x258, &(rng.range(1, 8) << 20).to_le_bytes());
            put(0x260, &(rng.below(1 << 22) as u32).to_le_bytes());
            if rng.percent(60) {
                put(0x258, &(rng.next() >> rng.range(30, 60)).to_le_bytes());
                put(0x260, &((rng.next() as u32) >> rng.below(32)).to_le_bytes());
            }
        }
        1 => {
            let class = 1 + rng.below(2) as u8;
            put(0, &[0x7f, b'E', b'L', b'F', class, 1, 1]);
            put(16, &[2, 0, if class == 1 { 3 } else { 62 }, 0, 1, 0, 0, 0]);
            // The program headers: offset, entry size and number.
            let (offset, sizes, entry) = if class == 1 { (28, 42, 32u16) } else { (32, 54, 56u16) };
            put(offset, &(rng.below(length as u64) as u32).to_le_bytes());
            put(sizes, &entry.to_le_bytes());
            put(sizes + 2, &(rng.below(9) as u16).to_le_bytes());
            for at in (0x40..length - 8).step_by(entry.into()) {
                put(at, &(rng.pick(&[1u32, 4, 4, 0, 6])).to_le_bytes());
            }
        }
        _ => {
            let (at, flags) =
                (rng.below(64) as usize * 4, rng.pick(&[0u32, 1, 3, 0x1_0000, 0x1_0003, 0xffff]));
            let sum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
            put(at, &0x1bad_b002u32.to_le_bytes());
            put(at + 4, &flags.to_le_bytes());
            put(at + 8, &sum.to_le_bytes());
            for field in 3..8 {
                put(at + field * 4, &((rng.next() as u32) >> rng.below(32)).to_le_bytes());
            }
        }
    }
    file
}

#[test]
fn random_boot_files_are_loaded_or_refused() {
    let ram = memory::allocate(16 << 20).unwrap();
    let rng = &mut Rng::new(11);
    let mut loaded = 0;
    for _ in 0..6000 {
        let length = rng.range(0x400, 0x1400) as usize;
        let mut file = boot_file(rng, length);
        file.truncate(if rng.percent(20) { rng.below(length as u64) as usize } else { length });
        let mut kernel = Image::new(Cursor::new(&file[..]), "random").unwrap();
        let mut initrd = Image::new(Cursor::new(&[7u8; 100][..]), "initrd").unwrap();
        let source = BootSource { command_line: "console=ttyS0", rsdp: 0xe_0000, rng_seed: None };
        let initrd = rng.percent(50).then_some(&mut initrd);
        loaded += usize::from(loader::load(&ram, &mut kernel, initrd, &source).is_ok());
    }
    assert!(loaded > 20, "only {loaded} were loaded: the files are too bad to test anything");
}

/// A text of pieces that mean something, in an order that means nothing.
fn text(rng: &mut Rng, pieces: &[&str]) -> String {
    let mut text = String::new();
    for _ in 0..rng.below(8) {
        match rng.below(5) {
            0 => text.extend(char::from_u32(rng.next() as u32 >> rng.below(32))),
            _ => text.push_str(rng.pick(pieces)),
        }
    }
    text
}

#[test]
fn random_cpu_models_are_read_or_refused() {
    const PIECES: [&str; 15] = [
        "max",
        "nehalem",
        "haswell",
        "skylake",
        "sapphire-rapids",
        ",",
        ",+",
        ",-",
        "+",
        "-",
        "avx",
        "sse2",
        "pcid",
        "\u{e9}",
        " ",
    ];
    let rng = &mut Rng::new(12);
    let good = (0..20_000).filter(|_| CpuModel::parse(&text(rng, &PIECES)).is_ok()).count();
    assert!(good > 100, "{good}");
}

#[test]
fn random_host_parameters_are_read_or_refused() {
    const PIECES: [&str; 14] = [
        "smt=",
        "on",
        "off",
        "split_lock_detect=",
        "warn",
        "fatal",
        "kvm.ignore_msrs=",
        "0",
        "1",
        " ",
        " ",
        "=",
        "kvm.report_ignored_msrs=",
        "\u{130}",
    ];
    let rng = &mut Rng::new(13);
    let good = (0..20_000).filter(|_| text(rng, &PIECES).parse::<HostParams>().is_ok()).count();
    assert!(good > 100, "{good}");
}
