//! What runs the workloads.

use std::path::PathBuf;
use std::process::Command;

use clap::ValueEnum;
use xtask::guest::Boot;
use xtask::packages::Kernel;

use super::workloads::Image;

/// Kernel command line of all guests, before what the workloads take from it.
const APPEND: &str = "console=ttyS0 quiet nokaslr panic=-1";

/// Memory of all guests, in MiB.
const MEMORY: u32 = 512;

/// What can run the workloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum Launcher {
    /// This machine, without a guest: what all are compared with.
    Native,
    /// QEMU's TCG.
    Tcg,
    /// TCG without two features that it is slow with: protection keys and fast REP strings.
    TcgTuned,
    /// ring3.
    Ring3,
    /// QEMU with the host's KVM.
    Kvm,
}

/// How a launcher is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Host,
    Qemu { accelerator: &'static str, cpu: &'static str },
    Ring3,
}

struct Facts {
    name: &'static str,
    title: &'static str,
    /// Amount of work in a run, per mille, so that a run takes a minute.
    scale: u32,
    how: How,
}

const TCG: &str = "tcg";
const KVM: &str = "kvm";

/// In the order of [`Launcher`].
const LAUNCHERS: &[Facts] = &[
    Facts { name: "native", title: "native", scale: 300, how: How::Host },
    Facts { name: "tcg", title: "TCG", scale: 60, how: How::Qemu { accelerator: TCG, cpu: "max" } },
    Facts {
        name: "tcg-tuned",
        title: "tuned TCG",
        scale: 60,
        how: How::Qemu { accelerator: TCG, cpu: "max,-pku,-erms" },
    },
    Facts { name: "ring3", title: "ring3", scale: 300, how: How::Ring3 },
    Facts {
        name: "kvm",
        title: "KVM",
        scale: 300,
        how: How::Qemu { accelerator: KVM, cpu: "max,-arch-capabilities" },
    },
];

impl Launcher {
    fn facts(self) -> &'static Facts {
        &LAUNCHERS[self as usize]
    }

    /// The name on the command line.
    pub(super) fn name(self) -> &'static str {
        self.facts().name
    }

    /// The name in tables.
    pub(super) fn title(self) -> &'static str {
        self.facts().title
    }

    /// Amount of work in a run by default, per mille.
    pub(super) fn scale(self) -> u32 {
        self.facts().scale
    }

    /// Whether it takes QEMU.
    pub(super) fn is_qemu(self) -> bool {
        matches!(self.facts().how, How::Qemu { .. })
    }

    /// Whether it is QEMU's TCG, in one setting or another.
    pub(super) fn is_tcg(self) -> bool {
        matches!(self.facts().how, How::Qemu { accelerator: TCG, .. })
    }
}

/// What the guests are made of, and how the host runs the workloads.
#[derive(Debug, Default)]
pub(super) struct Machine {
    /// The kernel's image.
    pub(super) kernel: PathBuf,
    /// Initramfs archives by image.
    pub(super) images: Vec<(Image, PathBuf)>,
    /// Processors of a guest.
    pub(super) cpus: u32,
    /// The workloads as a program.
    pub(super) program: PathBuf,
    /// A userland to change the root to; without it the host runs the program where it is.
    pub(super) root: Option<PathBuf>,
}

impl Machine {
    /// What the guests are made of, with the kernel given.
    pub(super) fn new(kernel: &Kernel, cpus: u32, program: PathBuf) -> Machine {
        Machine { kernel: kernel.image.clone(), cpus, program, ..Machine::default() }
    }

    /// The command that runs the workloads `list` on the host.
    pub(super) fn native(&self, list: &str, scale: u32) -> Command {
        let mut command = match &self.root {
            Some(root) => {
                let mut chroot = Command::new("/usr/sbin/chroot");
                chroot.arg(root).arg("/init");
                chroot
            }
            None => Command::new(&self.program),
        };
        command.arg("-s").arg(scale.to_string()).arg(list);
        command.env_clear().env("PATH", "/bin:/usr/bin");
        command
    }

    /// The command that boots a guest with the workloads `list`; of the host, see [`Machine::native`].
    pub(super) fn guest(&self, launcher: Launcher, image: Image, list: &str, scale: u32) -> Command {
        let append = format!("{APPEND} bench={list} scale={scale} exit=reboot");
        let initrd = self.images.iter().find(|(i, _)| *i == image).map(|(_, path)| path.clone());
        match launcher.facts().how {
            How::Host => self.native(list, scale),
            How::Qemu { accelerator, cpu } => {
                let threads = if self.cpus == 1 { "single" } else { "multi" };
                let mut command = Command::new("qemu-system-x86_64");
                command.arg("-accel").arg(match accelerator {
                    TCG => format!("tcg,thread={threads}"),
                    other => other.to_string(),
                });
                command.args(["-M", "q35", "-cpu", cpu, "-m", &MEMORY.to_string()]);
                command.args(["-smp", &self.cpus.to_string(), "-nodefaults", "-no-reboot"]);
                command.args(["-display", "none", "-serial", "stdio", "-append", &append]);
                command.arg("-kernel").arg(&self.kernel);
                command.arg("-initrd").arg(initrd.unwrap_or_default());
                command
            }
            How::Ring3 => {
                let (kernel, memory, cpus) = (self.kernel.clone(), MEMORY, self.cpus);
                Boot { kernel, initrd, append, memory, cpus, ..Boot::default() }.command()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_the_launchers_in_their_order() {
        for launcher in Launcher::value_variants() {
            let name = launcher.to_possible_value().map(|value| value.get_name().to_string());
            assert_eq!(name.as_deref(), Some(launcher.name()));
        }
    }

    #[test]
    fn two_processors_get_two_threads() {
        let machine = Machine { cpus: 2, ..Machine::default() };
        let command = format!("{:?}", machine.guest(Launcher::Tcg, Image::Min, "smp.indep2", 60));
        assert!(command.contains("thread=multi") && command.contains("scale=60"), "{command}");
    }
}
