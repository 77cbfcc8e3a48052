//! The command line: options, what their values mean, and the help that explains them.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use hypervisor::HostParams;
use hypervisor::host::HostParamError;
use hypervisor::mitigations::command_line::Part;
use hypervisor::msr::SETTABLE_ARCH_CAPABILITIES;
use silicon::model::speculation::{PARTS, arch_cap, part};
use silicon::model::{CpuModel, ModelError};
use vmm::config::{Config, ConsoleTarget, DiskConfig, MAX_CPUS, PagingConfig};
use vmm::memory;

const ABOUT: &str = "Runs virtual machines on an x86 processor made of software";

const LONG_ABOUT: &str = "\
Runs virtual machines on an x86 processor made of software.

No hardware virtualization is needed: ring3 is KVM in user space over its own processor.";

const BOOT_LONG_ABOUT: &str = "\
Boots a guest. Its console (the first serial port, 0x3f8) is stdin and stdout, and nothing else is printed there; \
messages go to stderr, more of them with RING3_LOG=info (or debug, or a tracing filter such as \
hypervisor=trace). RING3_ENGINE=interp has guest code interpreted, never translated to host code.

At the console Ctrl-A x quits, Ctrl-A h helps, and Ctrl-A Ctrl-A sends Ctrl-A to the guest.";

const EXAMPLES: &str = "\
Examples:
  Debian's kernel with an initramfs, to an interactive shell:
    ring3 boot --kernel /boot/vmlinuz-6.12-cloud-amd64 --initrd initrd.cpio.gz \\
               --append 'console=ttyS0 rdinit=/bin/sh'

  Four virtual CPUs, 2 GiB of memory, a disk that the guest writes and one that it only reads:
    ring3 boot --kernel vmlinuz --cpus 4 --memory 2G --disk root.img --disk data.img,ro \\
               --append 'console=ttyS0 root=/dev/vda'

  An older processor without SMAP:
    ring3 boot --kernel vmlinuz --cpu haswell,-smap

  A bare-metal test program whose result is the exit status:
    ring3 boot --kernel test.elf --exit-port; echo $?

Exit status:
  0    the guest powered off or rebooted, or Ctrl-A x was typed
  odd  with --exit-port, the value that the guest wrote: (value << 1) | 1
  2    bad arguments, or a file that cannot be used
  4    triple fault; registers are on stderr
  6    internal error
  128+ a signal ended the machine (130 SIGINT, 143 SIGTERM)";

const DOCTOR_LONG_ABOUT: &str = "\
Says what will work on this machine: kernel, processor and which CPU models it allows, limits, and whether a given program \
can be run. What will not work is marked '!!', with what to do about it.

Exit status: 0 if all is well, 1 if something will not work.";

const MITIGATIONS_LONG_ABOUT: &str = "\
Says, for a host with the speculation bugs of some part and a command line of its kernel's, what guests are told in \
IA32_ARCH_CAPABILITIES, what a Linux guest will therefore say of itself, and what each VM entry does and costs. The machine need \
not be at hand. Without arguments: the parts that can be asked about.

Values of registers are those of silicon's table of parts; cycles are modelled, with round numbers.";

const MITIGATIONS_EXAMPLES: &str = "\
Examples:
  ring3 mitigations skylake-sp
  ring3 mitigations ice-lake-sp --host 'mmio_stale_data=off'
  ring3 mitigations skylake-sp --host 'l1tf=full kvm_intel.vmentry_l1d_flush=never' --cpu haswell

The same host for a guest that runs: ring3 boot --host 'ring3.part=skylake-sp mds=off' --kernel vmlinuz";

const RUN_LONG_ABOUT: &str = "\
Runs a program that uses KVM. Its opens of /dev/kvm and its ioctls go to ring3; everything else that it does is its own \
affair. It has to be dynamically linked with the GNU C library, which any distribution's QEMU is.

The program's process is this one: its exit status and its signals are as without ring3.";

const RUN_EXAMPLES: &str = "\
Examples:
  ring3 run -- qemu-system-x86_64 -accel kvm -nographic -kernel vmlinuz -append console=ttyS0
  ring3 run --cpu skylake --host split_lock_detect=fatal -- ./my-vmm --config vm.json

Exit status: the program's; 2 if it cannot be run, with the reason on stderr.";

/// `ring3 …`
#[derive(Debug, Parser)]
#[command(name = "ring3", version, about = ABOUT, long_about = LONG_ABOUT)]
pub(crate) struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What `ring3` can do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a guest: a Linux kernel or a bare-metal program
    #[command(long_about = BOOT_LONG_ABOUT, after_long_help = EXAMPLES)]
    Boot(Box<BootArguments>),
    /// Run a KVM client, such as QEMU, with ring3 in place of /dev/kvm
    #[command(long_about = RUN_LONG_ABOUT, after_long_help = RUN_EXAMPLES)]
    Run(RunArguments),
    /// Say what a guest will be told of speculation bugs, and what it will cost, on a machine that need not be at hand
    #[command(long_about = MITIGATIONS_LONG_ABOUT, after_long_help = MITIGATIONS_EXAMPLES)]
    Mitigations(Box<MitigationsArguments>),
    /// Say what will work on this machine, and what to do about what will not
    #[command(long_about = DOCTOR_LONG_ABOUT)]
    Doctor {
        /// A KVM client that is to be run with ring3: whether it can be
        #[arg(value_name = "BINARY")]
        program: Option<OsString>,
    },
}

/// `ring3 run …`
#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    #[arg(long, value_name = "MODEL[,+feat,-feat…]", value_parser = checked_cpu, help = cpu_help(),
          allow_hyphen_values = true)]
    pub(crate) cpu: Option<String>,

    /// Parameters of the host kernel that ring3 stands in for, as on its command line
    #[arg(long, value_name = "PARAMS", value_parser = checked_host)]
    pub(crate) host: Option<String>,

    /// What ring3 says on stderr: warn, info, debug or a tracing filter such as abi=trace
    #[arg(long, value_name = "FILTER")]
    pub(crate) log: Option<String>,

    /// The program and its arguments
    #[arg(value_name = "CMD", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<OsString>,
}

/// `ring3 mitigations …`
#[derive(Debug, Args)]
pub(crate) struct MitigationsArguments {
    /// The part whose bugs the host has
    #[arg(value_name = "PART", value_parser = parse_part)]
    pub(crate) part: Option<Part>,

    /// The host kernel's command line: mds=, l1tf=, mmio_stale_data=, mitigations=, kvm_intel.vmentry_l1d_flush= and so on
    #[arg(long, value_name = "PARAMS", default_value = "", hide_default_value = true,
          value_parser = HostParams::parse)]
    pub(crate) host: HostParams,

    #[arg(long, value_name = "MODEL[,+feat,-feat…]", value_parser = parse_cpu, help = mitigations_cpu_help(),
          allow_hyphen_values = true)]
    pub(crate) cpu: Option<CpuModel>,
}

fn mitigations_cpu_help() -> String {
    format!("The guest's {} [default: the host's own]", cpu_help())
}

fn parse_part(name: &str) -> Result<Part, String> {
    let known = || PARTS.iter().map(|row| row.name).collect::<Vec<_>>().join(", ");
    part(name).map(Part).ok_or_else(|| format!("unknown part; known parts: {}", known()))
}

/// A model that can be had, as it was written: the client's process reads it again.
fn checked_cpu(text: &str) -> Result<String, CpuError> {
    parse_cpu(text).map(|_| text.into())
}

/// Host parameters that exist, as they were written.
fn checked_host(text: &str) -> Result<String, HostParamError> {
    HostParams::parse(text).map(|_| text.into())
}

/// `ring3 boot …`
#[derive(Debug, Args)]
pub(crate) struct BootArguments {
    /// Kernel: a Linux bzImage, an ELF file with a PVH note, or a multiboot-1 image
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,

    /// Initial RAM disk (for a multiboot image: its first module)
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// Kernel command line [default for Linux: console=ttyS0]
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    append: Option<String>,

    /// Memory, with a unit: 512M, 2G
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_memory)]
    memory: u64,

    /// Pages of memory can be elsewhere: the guest says which, by a device at ports 0x700 to 0x713, and what part of them (half, or
    /// a percentage) when it asks for a part
    #[arg(long, value_name = "PART", value_parser = parse_share)]
    page_out: Option<u8>,

    /// How long it takes until a page is back that the guest touches, in microseconds
    #[arg(
        long,
        value_name = "MICROSECONDS",
        default_value_t = 0,
        hide_default_value = true,
        requires = "page_out"
    )]
    page_delay: u32,

    /// Virtual CPUs, 1 to 8
    #[arg(long, value_name = "N", default_value = "1", value_parser = parse_cpus)]
    cpus: u8,

    #[arg(long, value_name = "MODEL[,+feat,-feat…]", default_value = "sapphire-rapids",
          value_parser = parse_cpu, help = cpu_help(), allow_hyphen_values = true)]
    pub(crate) cpu: CpuModel,

    /// Disk: a raw image or a block device; `,ro` makes it read-only. Repeat for more
    #[arg(long = "disk", value_name = "FILE[,ro]", value_parser = parse_disk)]
    disks: Vec<DiskConfig>,

    /// Parameters of the host kernel that ring3 stands in for, as on its command line
    #[arg(long, value_name = "PARAMS", default_value = "", hide_default_value = true,
          value_parser = HostParams::parse)]
    host: HostParams,

    /// The serial console: stdio, file:PATH or none
    #[arg(long, value_name = "TARGET", default_value = "stdio", value_parser = parse_serial)]
    serial: ConsoleTarget,

    /// Write what the guest sends to its virtio console (hvc0) to this file
    #[arg(long, value_name = "FILE")]
    virtio_console: Option<PathBuf>,

    /// Print figures on stderr at the end: time, instructions, exits by reason
    #[arg(long)]
    pub(crate) stats: bool,

    /// Offer the debug-exit port 0xf4: a value written there ends the machine with status (value << 1) | 1
    #[arg(long)]
    exit_port: bool,

    /// Save, overwrite and restore the state of each virtual CPU so many times a minute, to test that nothing of it is lost
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=6000))]
    moves_per_minute: Option<u32>,
}

fn cpu_help() -> String {
    let names: Vec<_> = silicon::model::models::names().collect();
    format!(
        "CPU model ({}), with features added and taken away; also model=N, stepping=N (numbers of family 6 that CPUID \
         tells), arch-cap=BITS (IA32_ARCH_CAPABILITIES), test-ctrl=core|thread",
        names.join(", ")
    )
}

/// What is wrong with a CPU model for guests.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CpuError {
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Their registers do not exist.
    #[error("arch-cap: guests cannot have {0}; bits that can be set: {SETTABLE_ARCH_CAPABILITIES:#x}")]
    Capabilities(String),
}

fn parse_cpu(text: &str) -> Result<CpuModel, CpuError> {
    let model = CpuModel::parse(text)?;
    match model.chosen_arch_capabilities().unwrap_or(0) & !SETTABLE_ARCH_CAPABILITIES {
        0 => Ok(model),
        unknown => Err(CpuError::Capabilities(arch_cap::names(unknown).join(" "))),
    }
}

impl BootArguments {
    /// The machine that the arguments ask for.
    pub(crate) fn into_config(self, started: Instant) -> Config {
        Config {
            kernel: self.kernel,
            initrd: self.initrd,
            command_line: self.append,
            memory: self.memory,
            paging: self.page_out.map(|percent| PagingConfig {
                percent,
                delay: Duration::from_micros(self.page_delay.into()),
            }),
            cpus: self.cpus,
            cpu_model: self.cpu,
            host: self.host,
            disks: self.disks,
            serial: self.serial,
            console: self.virtio_console,
            exit_port: self.exit_port,
            rng_seed: None,
            move_every: self.moves_per_minute.map(|moves| Duration::from_secs(60) / moves),
            started,
        }
    }
}

/// Reads a size with a unit: `512M`, `2G`, also `2GiB`.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let wrong = || format!("'{text}' is not a size; write a whole number and a unit, such as 512M or 2G");
    let shift = match unit.to_ascii_lowercase().trim_end_matches('b').trim_end_matches('i') {
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "" if number == "0" => 0,
        "" if unit.is_empty() && !number.is_empty() => {
            return Err(format!("{number} has no unit: did you mean {number}M?"));
        }
        _ => return Err(wrong()),
    };
    if number.is_empty() {
        return Err(wrong());
    }
    let number: u64 = number.parse().map_err(|_| format!("{text} is more than there can be"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is more than there can be"))
}

fn parse_memory(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    memory::check_size(size).map_err(|error| error.to_string())?;
    Ok(size)
}

fn parse_cpus(text: &str) -> Result<u8, String> {
    match text.parse() {
        Ok(count @ 1..=MAX_CPUS) => Ok(count),
        _ => Err(format!("'{text}' is not possible: a machine has 1 to {MAX_CPUS} virtual CPUs")),
    }
}

fn parse_share(text: &str) -> Result<u8, String> {
    match text.trim_end_matches('%').parse() {
        Ok(percent @ 1..=100) => Ok(percent),
        _ if text == "half" => Ok(50),
        _ => Err(format!("'{text}' is no part of memory; write half, or a percentage from 1 to 100")),
    }
}

fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    if let Some(path) = text.strip_suffix(",ro") {
        return Ok(DiskConfig { path: path.into(), read_only: true });
    }
    let path = PathBuf::from(text);
    match text.rsplit_once(',') {
        Some((_, option)) if !path.exists() => {
            Err(format!("'{option}' is not a disk option; the only one is 'ro', for read-only"))
        }
        _ => Ok(DiskConfig { path, read_only: false }),
    }
}

fn parse_serial(text: &str) -> Result<ConsoleTarget, String> {
    match text {
        "stdio" => Ok(ConsoleTarget::Stdio),
        "none" => Ok(ConsoleTarget::None),
        _ => match text.strip_prefix("file:") {
            Some("") => Err("'file:' needs a path, such as file:console.log".into()),
            Some(path) => Ok(ConsoleTarget::File(path.into())),
            None => Err(format!("'{text}' is not a console target: stdio, file:PATH or none")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn ac_capabilities_without_a_register_are_refused() {
        let told = |text| parse_cpu(text).map(|_| ()).map_err(|error| error.to_string());
        assert_eq!(told("skylake,arch-cap=0x8000000"), Ok(()));
        let error = told("skylake,arch-cap=0x1400").unwrap_err();
        assert!(error.contains("MISC_PACKAGE_CTLS DOITM"), "{error}");
    }

    #[test]
    fn sizes() {
        for (text, size) in [
            ("512M", Some(512 << 20)),
            ("2g", Some(2 << 30)),
            ("2GiB", Some(2 << 30)),
            ("4MB", Some(4 << 20)),
            ("1T", Some(1 << 40)),
            ("0", Some(0)),
            ("512", None),
            ("", None),
            ("M", None),
            ("1.5G", None),
            ("-1M", None),
            ("99999999999999999999G", None),
            ("18446744073709551615T", None),
        ] {
            assert_eq!(parse_size(text).ok(), size, "{text:?}");
        }
    }

    #[test]
    fn targets_and_disks() {
        assert_eq!(parse_serial("file:a:b"), Ok(ConsoleTarget::File("a:b".into())));
        assert!(parse_serial("file:").is_err() && parse_serial("pty").is_err());
        assert_eq!((parse_share("half"), parse_share("25%"), parse_share("100")), (Ok(50), Ok(25), Ok(100)));
        assert!(parse_share("0").is_err() && parse_share("101").is_err() && parse_share("all").is_err());
        assert_eq!(parse_disk("a,b,ro"), Ok(DiskConfig { path: "a,b".into(), read_only: true }));
        assert!(parse_disk("a,rw").unwrap_err().contains("'rw'"));
    }
}
