//! What machine is wanted.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use hypervisor::HostParams;
use silicon::model::CpuModel;

/// Most virtual CPUs of a machine.
pub const MAX_CPUS: u8 = 8;
/// Most disks of a machine.
pub const MAX_DISKS: usize = 24;
/// Command line of a Linux kernel that is given none: its console is the serial port.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0";

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// Raw image or block device.
    pub path: PathBuf,
    /// The guest cannot write it.
    pub read_only: bool,
}

/// Where a guest's console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// Standard output, and input from standard input.
    Stdio,
    /// A file, which is created or truncated; no input.
    File(PathBuf),
    /// Nowhere; no input.
    None,
}

/// Pages of guest memory that can be elsewhere ([`crate::paging`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagingConfig {
    /// How many of a hundred pages go when the guest asks for a part.
    pub percent: u8,
    /// How long it takes until a page is back.
    pub delay: Duration,
}

/// A machine to build.
#[derive(Clone, Debug)]
pub struct Config {
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial RAM disk, or module.
    pub initrd: Option<PathBuf>,
    /// Kernel command line; `None` for the default.
    pub command_line: Option<String>,
    /// Bytes of RAM.
    pub memory: u64,
    /// Pages of it can be elsewhere.
    pub paging: Option<PagingConfig>,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Their model.
    pub cpu_model: CpuModel,
    /// The host kernel that we stand in for.
    pub host: HostParams,
    /// Disks, in the order of the guest's names for them.
    pub disks: Vec<DiskConfig>,
    /// The serial port.
    pub serial: ConsoleTarget,
    /// The virtio console; never standard output.
    pub console: Option<PathBuf>,
    /// The debug-exit port exists.
    pub exit_port: bool,
    /// Seed for the guest's random number generator; `None` takes one from the host.
    pub rng_seed: Option<[u8; 32]>,
    /// How often each virtual CPU's state is saved and restored, for tests of that.
    pub move_every: Option<Duration>,
    /// When the process started, for the figures.
    pub started: Instant,
}
