//! `cargo xtask demo`: from a fresh checkout to a Debian kernel's console with one command.

use std::process::Command;

use clap::Args;
use xtask::guest::Boot;
use xtask::images::Initramfs;
use xtask::{Error, guest_dir, packages};

/// Options of `cargo xtask demo`.
#[derive(Args)]
pub(crate) struct Options {
    /// Leave you at a shell in the guest (Ctrl-A x quits).
    #[arg(long)]
    shell: bool,
    /// vCPUs, 1 to 8.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Kernel series: 6.12 or 6.1.
    #[arg(long, default_value = "6.12")]
    kernel: String,
}

const SHELL: &str = "echo; echo 'This shell runs on a processor made of software. Ctrl-A x quits.'
setsid cttyhack sh
";

const TOUR: &str = "echo; echo '--- uname'; uname -a
echo '--- cpuinfo'; grep -E 'processor|model name|MHz|flags' /proc/cpuinfo | cut -c1-100
echo '--- memory'; free -m
echo '--- a few programs'
seq 1 100000 | sha256sum
seq 1 20000 | sort -r | md5sum
awk 'BEGIN { s = 0; for (i = 1; i < 100000; i++) s += 1 / i; printf \"harmonic %.10f\\n\", s }'
dd if=/dev/zero bs=1M count=16 2>/dev/null | gzip -c | wc -c
echo '--- uptime'; cat /proc/uptime
";

pub(crate) fn run(options: &Options) -> Result<(), Error> {
    xtask::run(Command::new("cargo").args(["build", "--release", "--package", "ring3"]))?;
    let kernel = packages::kernel(&options.kernel)?;
    let initrd = guest_dir().join(if options.shell { "demo-shell.cpio" } else { "demo.cpio" });
    let script = if options.shell { SHELL } else { TOUR };
    Initramfs { script, ..Initramfs::default() }.build(&kernel, &initrd)?;
    let boot = Boot {
        kernel: kernel.image,
        initrd: Some(initrd),
        append: "console=ttyS0".into(),
        memory: 512,
        cpus: options.cpus,
        extra: vec!["--stats".into()],
        ..Boot::default()
    };
    let status = boot.command().status().map_err(|e| Error::Guest(e.to_string()))?;
    if status.success() {
        return Ok(());
    }
    Err(Error::Guest(format!("ring3 boot ended with {status}")))
}
