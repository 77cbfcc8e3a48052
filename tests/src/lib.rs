//! End-to-end tests: unmodified Debian kernels and programs on `ring3 boot`, KVM clients under `ring3 run`. They need the
//! release build of the command (`cargo build --release --workspace`), which `cargo xtask test` makes first.

pub mod gdb;
pub mod kick;
pub mod qemu;

use std::path::{Path, PathBuf};

use xtask::guest::{Boot, Outcome};
use xtask::images::Initramfs;
use xtask::{Error, guest_dir, packages};

/// A kernel with an initramfs for it.
#[derive(Debug)]
pub struct Guest {
    /// Debian's kernel image.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

/// Debian's kernel of `series`, and an initramfs that runs `script`.
pub fn guest(name: &str, series: &str, script: &str) -> Result<Guest, Error> {
    let kernel = packages::kernel(series)?;
    let initrd = guest_dir().join(format!("{name}-{series}.cpio"));
    Initramfs { script, ..Initramfs::default() }.build(&kernel, &initrd)?;
    Ok(Guest { kernel: kernel.image, initrd })
}

/// Boots Debian's kernel of `series` with `script` in its initramfs.
pub fn linux(
    name: &str,
    series: &str,
    script: &str,
    adjust: impl FnOnce(&mut Boot),
) -> Result<Outcome, Error> {
    let Guest { kernel, initrd } = guest(name, series, script)?;
    let mut boot = Boot {
        kernel,
        initrd: Some(initrd),
        // A panic ends the guest instead of leaving it hanging.
        append: "console=ttyS0 panic=-1".into(),
        memory: 512,
        ..Boot::default()
    };
    adjust(&mut boot);
    boot.run()
}

/// A file that `write` makes. Other runs of the tests, which may be going on, see it whole or not at all.
pub fn in_one_piece(name: &str, write: impl FnOnce(&Path)) -> PathBuf {
    std::fs::create_dir_all(guest_dir()).unwrap();
    let (path, own) = (guest_dir().join(name), guest_dir().join(format!("{name}.{}", std::process::id())));
    write(&own);
    std::fs::rename(own, &path).unwrap();
    path
}

/// What the guest printed between BEGIN and END of `name`; fails if it did not come so far.
pub fn section<'a>(outcome: &'a Outcome, name: &str) -> &'a str {
    outcome.section(name).unwrap_or_else(|| panic!("no {name}: {}", outcome.console))
}

/// Fails with the end of the console unless the guest powered off by itself and printed nothing alarming.
pub fn healthy(outcome: &Outcome) {
    let tail: Vec<&str> = outcome.console.lines().rev().take(40).collect();
    let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
    assert_eq!(outcome.status, Some(0), "exit status; stderr:\n{}\nconsole:\n{tail}", outcome.stderr);
    assert_eq!(outcome.alarms(), Vec::<&str>::new(), "console:\n{tail}");
}
