//! How soon KVM_RUN returns to a thread that gets a signal.
#![expect(unsafe_code, reason = "signals a thread")]

use std::error::Error;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::register_signal_handler;

/// Nanoseconds from a signal to the return of KVM_RUN, `times` times, with a guest that never leaves by itself.
pub fn latencies(vcpu: &mut VcpuFd, times: usize) -> Result<Vec<f64>, Box<dyn Error>> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(libc::SIGUSR1, nothing)?;
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
        match vcpu.run() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => return Err(format!("unexpected exit: {other:?}").into()),
        }
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
