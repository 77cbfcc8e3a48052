//! The watchdog: kicks vCPUs that run for too long, and ends the process if one does not come back.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use hypervisor::VcpuHandle;

/// How often it looks.
const TICK: Duration = Duration::from_millis(2);
/// Exit status of a process whose guest did not come back.
pub const HUNG: i32 = 86;

/// One guest under watch.
#[derive(Debug)]
struct Watched {
    handles: Vec<Arc<VcpuHandle>>,
    label: String,
    deadline: Instant,
    kicked: Option<Instant>,
}

#[derive(Debug, Default)]
struct Shared {
    watched: Mutex<Option<Watched>>,
    stopping: AtomicBool,
    /// The longest time that a guest took to come back, and which it was.
    slowest: Mutex<(Duration, String)>,
    kicks: AtomicU64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread that watches one guest at a time.
#[derive(Debug)]
pub struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// A guest that has not come back `grace` after it was kicked is a failure: a message goes to standard error and
    /// the process ends with status [`HUNG`].
    pub fn start(grace: Duration) -> Watchdog {
        let shared = Arc::new(Shared::default());
        let thread = {
            let shared = shared.clone();
            thread::spawn(move || {
                while !shared.stopping.load(Ordering::Relaxed) {
                    thread::sleep(TICK);
                    look(&shared, grace);
                }
            })
        };
        Watchdog { shared, thread: Some(thread) }
    }

    /// Watches a guest until [`Watchdog::done`], and kicks it after `patience`.
    pub fn watch(&self, label: &str, handles: Vec<Arc<VcpuHandle>>, patience: Duration) {
        let deadline = Instant::now() + patience;
        let watched = Watched { handles, label: label.into(), deadline, kicked: None };
        *self.shared.lock() = Some(watched);
    }

    /// The guest has come back.
    pub fn done(&self) {
        let Some(watched) = self.shared.lock().take() else { return };
        let Some(kicked) = watched.kicked else { return };
        let mut slowest = self.shared.slowest.lock().unwrap_or_else(PoisonError::into_inner);
        if kicked.elapsed() > slowest.0 {
            *slowest = (kicked.elapsed(), watched.label);
        }
    }

    /// Guests kicked so far, the longest time that one took to come back, and which it was.
    pub fn kicks(&self) -> (u64, (Duration, String)) {
        let slowest = self.shared.slowest.lock().unwrap_or_else(PoisonError::into_inner).clone();
        (self.shared.kicks.load(Ordering::Relaxed), slowest)
    }
}

fn look(shared: &Shared, grace: Duration) {
    let mut guard = shared.lock();
    let Some(watched) = guard.as_mut() else { return };
    match watched.kicked {
        None if Instant::now() > watched.deadline => {
            watched.handles.iter().for_each(|handle| handle.interrupt());
            watched.kicked = Some(Instant::now());
            shared.kicks.fetch_add(1, Ordering::Relaxed);
        }
        Some(kicked) if kicked.elapsed() > grace => {
            eprintln!("the guest {} did not come back within {grace:?} of a kick", watched.label);
            std::process::exit(HUNG);
        }
        _ => {}
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has already been reported by the panic hook.
            let _ = thread.join();
        }
    }
}
