//! What there is once in a process: the processor that we model, the log, and what fork(2) does to us.
#![expect(unsafe_code, reason = "pthread_atfork, and values that live as long as the process")]

use std::env::VarError;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, Ordering};

use abi::Errno;
use hypervisor::{HostParams, System};
use once_cell::race::OnceBox;
use silicon::model::{CpuModel, xstate};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::raw::{self, Identity};
use crate::{cancel, mask, signal, table};

/// Environment variables that configure us; `ring3 run` sets them.
mod variable {
    /// The CPU model, as `ring3 boot --cpu` takes it.
    pub(super) const CPU: &str = "RING3_CPU";
    /// Host parameters, as `ring3 boot --host` takes them.
    pub(super) const HOST: &str = "RING3_HOST";
    /// Log filter.
    pub(super) const LOG: &str = "RING3_LOG";
    /// Where the log goes instead of stderr.
    pub(super) const LOG_FILE: &str = "RING3_LOG_FILE";
}

/// Warnings of ours; the client's stderr is the client's.
const DEFAULT_LOG: &str = "warn";

static GENERATION: AtomicU32 = AtomicU32::new(0);

/// Another number in a forked child than in its parent.
#[inline]
pub(crate) fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

/// The process that this memory belongs to; 0 until we are loaded, while other libraries start.
static PID: AtomicI32 = AtomicI32::new(0);

/// Called when the library is loaded, before the client has threads.
#[used]
// SAFETY: a function without arguments, as the loader calls it; it needs nothing but the C library.
#[unsafe(link_section = ".init_array")]
static LOADED: extern "C" fn() = watch_forks;

extern "C" fn watch_forks() {
    PID.store(raw::pid(), Ordering::Relaxed);
    // SAFETY: the handlers live as long as the process, which is as long as this library is loaded.
    unsafe { libc::pthread_atfork(Some(begin_start), Some(end_start), Some(forked)) };
}

/// Somebody makes what there is once in a process, or forks. A child that is forked from the midst of it would wait for
/// ever for a thread that it does not have; tables of the libraries that we use are made once, too.
static STARTING: AtomicBool = AtomicBool::new(false);

/// Nobody else starts or forks.
struct Starting;

impl Starting {
    fn begin() -> Starting {
        begin_start();
        Starting
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        end_start();
    }
}

extern "C" fn begin_start() {
    while STARTING.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
        std::thread::yield_now();
    }
}

extern "C" fn end_start() {
    STARTING.store(false, Ordering::Release);
}

/// Whether this is a vfork(2) child, which has its parent's memory but nothing else of it.
pub(crate) fn is_guest_in_memory() -> bool {
    let owner = PID.load(Ordering::Relaxed);
    owner != 0 && owner != raw::pid()
}

/// A value that is made when it is first asked for and then stays for ever.
pub(crate) fn leaked<T: Default>(place: &AtomicPtr<T>) -> &'static T {
    let mut value = place.load(Ordering::Acquire);
    if value.is_null() {
        let new = Box::into_raw(Box::<T>::default());
        match place.compare_exchange(ptr::null_mut(), new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => value = new,
            Err(other) => {
                // SAFETY: nobody else has seen it.
                drop(unsafe { Box::from_raw(new) });
                value = other;
            }
        }
    }
    // SAFETY: made by `Box::into_raw` here or by another thread, and never freed.
    unsafe { &*value }
}

/// The machine that VMs of this process run on. ENODEV, and a message, if it is misconfigured.
pub(crate) fn system() -> Result<Arc<System>, Errno> {
    static SYSTEM: OnceBox<Option<Arc<System>>> = OnceBox::new();
    let system = SYSTEM.get().unwrap_or_else(|| {
        let _alone = Starting::begin();
        SYSTEM.get_or_init(|| Box::new(start()))
    });
    system.clone().ok_or(Errno(libc::ENODEV))
}

fn start() -> Option<Arc<System>> {
    start_logging();
    match configured() {
        Ok(system) => Some(system),
        Err(message) => {
            tracing::error!("/dev/kvm cannot be opened: {message}");
            None
        }
    }
}

fn configured() -> Result<Arc<System>, String> {
    let get = |name| match std::env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(_)) => Err(format!("{name} is not text")),
    };
    let model = get(variable::CPU)?.unwrap_or_else(|| "sapphire-rapids".into());
    let model =
        CpuModel::parse(&as_clients_see_it(&model)).map_err(|error| format!("{}: {error}", variable::CPU))?;
    let host = get(variable::HOST)?.unwrap_or_default();
    let host = HostParams::parse(&host).map_err(|error| format!("{}: {error}", variable::HOST))?;
    Ok(System::new(model, host))
}

/// The model without the XSAVE components that the host's CPUID does not describe as ours does: clients execute CPUID
/// themselves to learn where a component lies, and would tell the guest that it lies elsewhere. Who asks for such a
/// feature (`+pku`) gets it all the same.
fn as_clients_see_it(model: &str) -> String {
    let (name, changes) = model.split_once(',').map_or((model, ""), |(name, changes)| (name, changes));
    let without = xstate::foreign_to_host().map(|feature| format!(",-{feature}")).collect::<String>();
    let comma = if changes.is_empty() { "" } else { "," };
    format!("{name}{without}{comma}{changes}")
}

/// In a forked child, before anything of the client's runs there.
extern "C" fn forked() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    PID.store(raw::pid(), Ordering::Relaxed);
    table::forget_registry();
    cancel::forget_runners();
    mask::forget_callers();
    signal::unlock();
    end_start();
}

/// Where log lines go.
enum Log {
    /// Descriptor 2, for as long as it is the file that it was at first. (We take no copy: clients close it to tell
    /// others that they are up.)
    Stderr(Option<Identity>),
    /// Opened for appending, so that lines of several threads and processes do not mix.
    File(File),
}

fn start_logging() {
    let wanted = std::env::var(variable::LOG).unwrap_or_else(|_| DEFAULT_LOG.into());
    let (filter, refused) = match EnvFilter::try_new(&wanted) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new(DEFAULT_LOG), Some(error)),
    };
    let stderr = Log::Stderr(raw::identity(libc::STDERR_FILENO));
    let (log, lost) = match std::env::var_os(variable::LOG_FILE) {
        None => (stderr, None),
        Some(path) => {
            let file = File::options().append(true).create(true).custom_flags(libc::O_CLOEXEC).open(&path);
            match file {
                Ok(file) => (Log::File(file), None),
                Err(error) => (stderr, Some(error)),
            }
        }
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false);
    // Nobody else sets a subscriber: what we are linked with is ours alone.
    let _ = builder.with_writer(log).try_init();
    if let Some(error) = refused {
        tracing::error!("{}={wanted} is no log filter ({error}); using {DEFAULT_LOG}", variable::LOG);
    }
    if let Some(error) = lost {
        tracing::error!("{}: {error}; logging to stderr", variable::LOG_FILE);
    }
    std::panic::set_hook(Box::new(|panic| tracing::error!("internal error: {panic}")));
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

/// Writes what the formatter gives it, which is a line at a time.
struct Line<'a>(&'a Log);

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0 {
            Log::Stderr(then) => {
                if then.is_some() && raw::identity(libc::STDERR_FILENO) == *then {
                    raw::write(libc::STDERR_FILENO, bytes);
                }
                Ok(bytes.len())
            }
            Log::File(file) => (&*file).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use silicon::model::Feature;

    /// QEMU told guests that PKRU lies at offset 0 where the host has no PKU; their first XRSTOR lost the x87 state.
    #[test]
    fn components_that_the_host_does_not_describe_are_left_out_unless_asked_for() {
        let offers = |text: &str, feature| CpuModel::parse(&as_clients_see_it(text)).unwrap().has(feature);
        let foreign: Vec<Feature> = xstate::foreign_to_host().collect();
        for feature in [Feature::Pku, Feature::Avx512f].into_iter().filter(|f| foreign.contains(f)) {
            assert!(!offers("sapphire-rapids", feature));
        }
        assert!(offers("sapphire-rapids,+pku", Feature::Pku));
        assert!(!offers("sapphire-rapids,-avx", Feature::Avx));
    }
}
