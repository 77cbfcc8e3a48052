//! A Linux kernel at its 64-bit entry with some bytes of its early code, of the zero page or of its page tables
//! changed.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use conformance::rng::Rng;
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm::loader::{self, BootSource, Image as BootImage, LoadError};
use vmm::{boot, layout, memory};

use crate::image::{Contents, Image, Slot, Start};
use crate::memory::Snapshot;

/// Guest memory: what the decompressor needs and little more.
const MEMORY: u64 = 160 << 20;

/// Why there are no kernels to mutate.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file or the snapshot.
    #[error("the kernel to mutate: {0}")]
    Io(#[from] io::Error),
    /// It is no kernel.
    #[error("the kernel to mutate: {0}")]
    Load(#[from] LoadError),
    /// No memory.
    #[error("the kernel to mutate: {0}")]
    Memory(#[from] memory::MemoryError),
    /// Loading wrote outside memory.
    #[error("the kernel to mutate: {0}")]
    Guest(#[from] GuestMemoryError),
}

/// A kernel as it is loaded.
#[derive(Debug)]
pub struct Kernel {
    snapshot: Arc<Snapshot>,
    regs: kvm_regs,
    sregs: kvm_sregs,
}

impl Kernel {
    /// Loads the bzImage at `path`.
    pub fn open(path: &Path) -> Result<Kernel, KernelError> {
        let ram = memory::allocate(MEMORY)?;
        let mut kernel = BootImage::new(File::open(path)?, path.display().to_string())?;
        let source = BootSource { command_line: "console=ttyS0", rsdp: 0, rng_seed: None };
        let length = kernel.length();
        let entry = loader::load(&ram, &mut kernel, None::<&mut BootImage<File>>, &source)?;
        let (regs, sregs) = boot::registers(&ram, entry, kvm_sregs::default())?;
        let mut low = vec![0; layout::HIGH_MEMORY as usize];
        ram.read_slice(&mut low, GuestAddress(0))?;
        let start = regs.rip & !0xf_ffff;
        let mut image = vec![0; length.min(MEMORY - start) as usize];
        ram.read_slice(&mut image, GuestAddress(start))?;
        let snapshot = Snapshot::new(MEMORY as usize, &[(0, &low), (start, &image)])?;
        Ok(Kernel { snapshot: Arc::new(snapshot), regs, sregs })
    }

    /// The kernel with random changes.
    pub(super) fn image(&self, rng: &mut Rng) -> Image {
        let mut changes = Vec::new();
        for _ in 0..1 + rng.below(12) {
            let at = match rng.below(10) {
                0 => layout::ZERO_PAGE + rng.below(0x1000),
                1 => layout::BOOT_PAGE_TABLES + rng.below(0x6000),
                2 => layout::BOOT_GDT + rng.below(0x30),
                3 => self.regs.rip + rng.below(1 << 20),
                _ => self.regs.rip + rng.below(0x600),
            };
            let mut bytes = vec![0; 1 + rng.below(4) as usize];
            rng.fill(&mut bytes);
            changes.push((at, bytes));
        }
        let slot =
            Slot { gpa: 0, contents: Contents::Changed(self.snapshot.clone(), changes), readonly: false };
        let start = Start { regs: Some(self.regs), sregs: Some(Box::new(self.sregs)), ..Start::default() };
        let limit = rng.range(100_000, 300_000);
        let mut image = Image::new(vec![slot], start, limit);
        image.irqchip = rng.percent(50);
        image
    }
}
