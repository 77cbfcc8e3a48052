//! How soon KVM_RUN returns to a thread that gets a signal.
#![expect(unsafe_code, reason = "signals a thread")]

use std::error::Error;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::register_signal_handler;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Signals that have come.
static SIGNALS: AtomicU32 = AtomicU32::new(0);

extern "C" fn note(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    SIGNALS.fetch_add(1, Ordering::SeqCst);
}

/// Nanoseconds from a signal to the return of KVM_RUN, `times` times, with a guest that never leaves by itself.
pub fn latencies(vcpu: &mut VcpuFd, times: usize) -> Outcome<Vec<f64>> {
    measure(times, || match vcpu.run() {
        Err(error) if error.errno() == libc::EINTR => Ok(()),
        other => Err(format!("unexpected exit: {other:?}").into()),
    })
}

/// The same to the handler of the signal, without a guest: what the host takes.
pub fn host_latencies(times: usize) -> Outcome<Vec<f64>> {
    measure(times, || {
        let before = SIGNALS.load(Ordering::SeqCst);
        while SIGNALS.load(Ordering::SeqCst) == before {
            std::hint::spin_loop();
        }
        Ok(())
    })
}

/// Nanoseconds from a signal to this thread to the end of `run`, which ends when there is one.
fn measure(times: usize, mut run: impl FnMut() -> Outcome<()>) -> Outcome<Vec<f64>> {
    register_signal_handler(libc::SIGUSR1, note)?;
    // SAFETY: no preconditions.
    let runner = unsafe { libc::pthread_self() };
    let ((ask, asked), (tell, told)) = (mpsc::channel::<()>(), mpsc::channel());
    let (tell_left, has_left) = mpsc::channel::<()>();
    let kicker = std::thread::spawn(move || {
        while asked.recv().is_ok() {
            loop {
                // Long enough for the guest to run; how long does not enter the measurement.
                std::thread::sleep(Duration::from_micros(200));
                let now = Instant::now();
                // SAFETY: the thread that asks lives until this one has ended.
                let sent = unsafe { libc::pthread_kill(runner, libc::SIGUSR1) } == 0;
                if !sent || tell.send(now).is_err() {
                    return;
                }
                // On a busy machine a signal may come before KVM_RUN has begun, and then it ends nothing.
                match has_left.recv_timeout(Duration::from_millis(100)) {
                    Ok(()) => break,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        }
    });
    let mut latencies = Vec::new();
    for _ in 0..times {
        ask.send(())?;
        run()?;
        let left = Instant::now();
        tell_left.send(())?;
        let first = told.recv()?;
        let sent = told.try_iter().last().unwrap_or(first);
        latencies.push(left.saturating_duration_since(sent).as_nanos() as f64);
    }
    drop((ask, tell_left));
    let _ = kicker.join();
    Ok(latencies)
}
