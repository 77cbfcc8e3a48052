//! End-to-end tests: unmodified Debian kernels and programs on `ring3 boot`. They need the release build of the
//! command (`cargo build --release`), which `cargo xtask test` makes first.

use std::path::PathBuf;

use xtask::guest::{Boot, Outcome};
use xtask::images::Initramfs;
use xtask::{Error, guest_dir, packages};

/// Boots Debian's kernel of `series` with `script` in its initramfs.
pub fn linux(
    name: &str,
    series: &str,
    script: &str,
    adjust: impl FnOnce(&mut Boot),
) -> Result<Outcome, Error> {
    let kernel = packages::kernel(series)?;
    let initrd: PathBuf = guest_dir().join(format!("{name}-{series}.cpio"));
    Initramfs { script, ..Initramfs::default() }.build(&kernel, &initrd)?;
    let mut boot = Boot {
        kernel: kernel.image,
        initrd: Some(initrd),
        // A panic ends the guest instead of leaving it hanging.
        append: "console=ttyS0 panic=-1".into(),
        memory: 512,
        ..Boot::default()
    };
    adjust(&mut boot);
    boot.run()
}

/// Fails with the end of the console unless the guest powered off by itself and printed nothing alarming.
pub fn healthy(outcome: &Outcome) {
    let tail: Vec<&str> = outcome.console.lines().rev().take(40).collect();
    let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
    assert_eq!(outcome.status, Some(0), "exit status; stderr:\n{}\nconsole:\n{tail}", outcome.stderr);
    assert_eq!(outcome.alarms(), Vec::<&str>::new(), "console:\n{tail}");
}
