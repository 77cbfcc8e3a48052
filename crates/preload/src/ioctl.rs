//! ioctl: KVM's to [`abi::ioctl()`], all others on their way.
#![expect(unsafe_code, reason = "functions of the C library's")]

use std::ffi::CStr;
use std::os::fd::{IntoRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use abi::ioctl::KVMIO;
use abi::{Argument, Created, Errno, Object, Reply, VcpuObject};
use libc::{c_char, c_int, c_ulong, c_void};

use crate::mask::SET_SIGNAL_MASK;
use crate::table::Entry;
use crate::thread::{Inside, Open, Running};
use crate::{cancel, interpose, mask, next, process, raw, signal, table};

/// UFFDIO_REGISTER (include/uapi/linux/userfaultfd.h): its structure begins with address and size.
const REGISTER: c_ulong = 0xc020_aa00;
/// KVM_RUN.
const RUN: u32 = (KVMIO as u32) << 8 | 0x80;

interpose! {
    fn ioctl(fd: c_int, number: c_ulong, argument: *mut c_void) -> c_int {
        if (number >> 8) as u8 == KVMIO
            && let Some(result) = kvm(fd, number as u32, Argument(argument as u64))
        {
            return result;
        }
        // SAFETY: the client's arguments, as it gave them.
        let result = unsafe { next::ioctl(fd, number, argument) };
        if number == REGISTER && result == 0 {
            // SAFETY: the kernel has just read the structure.
            let [address, size] = unsafe { argument.cast::<[u64; 2]>().read_unaligned() };
            registered(address, size);
        }
        result
    }
}

/// Memory has been registered with a userfaultfd: slots that are there may have pages now that somebody has to bring.
fn registered(address: u64, size: u64) {
    let inside = Inside::enter();
    let open = Open::begin();
    let tell = || {
        for entry in table::all() {
            if let Object::Vm(vm) = &entry.object
                && entry.is_usable()
            {
                vm.registered(address, size);
            }
        }
    };
    // The registration itself is made. If this went wrong vCPUs wait for the pages in their accesses, as for any other memory.
    let _ = catch_unwind(AssertUnwindSafe(tell));
    drop(open);
    inside.leave();
}

/// What became of an ioctl.
enum Outcome {
    /// It is made.
    Done(Result<c_int, Errno>),
    /// It is made, and SIGBUS comes with it.
    AlignmentError,
    /// The descriptor is none of ours.
    NotOurs,
    /// It is not made yet; the thread is to come outside once before.
    Again,
}

/// An ioctl of KVM's type; `None` if the descriptor is none of ours.
fn kvm(fd: RawFd, number: u32, argument: Argument) -> Option<c_int> {
    loop {
        let inside = Inside::enter();
        // Whatever the engine does wrong, it must not unwind into the client.
        let open = Open::begin();
        let call = || call(&inside, fd, number, argument);
        let outcome = catch_unwind(AssertUnwindSafe(call)).unwrap_or(Outcome::Done(Err(Errno::IO)));
        drop(open);
        inside.leave();
        match outcome {
            Outcome::Done(Ok(value)) => return Some(value),
            Outcome::Done(Err(errno)) => {
                raw::set_errno(errno.0);
                return Some(-1);
            }
            Outcome::AlignmentError => {
                signal::force_alignment_error();
                return Some(0);
            }
            Outcome::NotOurs => return None,
            Outcome::Again => {}
        }
    }
}

fn call(inside: &Inside, fd: RawFd, number: u32, argument: Argument) -> Outcome {
    if number == RUN
        && let Some(entry) = table::find(fd).as_ref()
        && let Object::Vcpu(vcpu) = &entry.object
        && entry.is_usable()
    {
        return run(inside, entry, vcpu, argument);
    }
    let entry = match table::verify(fd).map_or_else(|| inherited(fd), |entry| Some(Ok(entry))) {
        Some(Ok(entry)) => entry,
        Some(Err(errno)) => return Outcome::Done(Err(errno)),
        None => return Outcome::NotOurs,
    };
    if !entry.is_usable() {
        return Outcome::Done(Err(Errno::IO));
    }
    match (number, &entry.object) {
        (RUN, Object::Vcpu(vcpu)) => run(inside, &entry, vcpu, argument),
        (_, Object::Vcpu(vcpu)) if number != SET_SIGNAL_MASK => {
            let reply = abi::ioctl(&entry.object, number, argument);
            tell_of_failure(vcpu);
            finish(reply)
        }
        (SET_SIGNAL_MASK, Object::Vcpu(_)) => finish(entry.run_mask.set(argument)),
        _ => finish(abi::ioctl(&entry.object, number, argument)),
    }
}

/// A thread whose guest needs memory that has failed gets a signal.
#[inline]
fn tell_of_failure(vcpu: &VcpuObject) {
    if let Some(host) = vcpu.take_failed_memory() {
        signal::send_memory_failure(host);
    }
}

/// A reply as the client gets it.
fn finish(reply: Result<Reply, Errno>) -> Outcome {
    Outcome::Done(match reply {
        Ok(Reply::AlignmentError) => return Outcome::AlignmentError,
        Ok(Reply::Value(value)) => Ok(value),
        Ok(Reply::Created(created)) => {
            signal::guard();
            table::adopt(created)
        }
        Ok(Reply::File(fd)) => Ok(fd.into_raw_fd()),
        Err(errno) => Err(errno),
    })
}

/// KVM_RUN on `entry`, which is `vcpu`, and its way out when a signal comes.
fn run(inside: &Inside, entry: &Entry, vcpu: &VcpuObject, argument: Argument) -> Outcome {
    if cancel::note_vcpu(&vcpu.handle) {
        return Outcome::Again;
    }
    entry.runners.fetch_add(1, Ordering::SeqCst);
    let running = Running::begin(vcpu);
    if inside.deferred() {
        // It came after we had entered and before there was anything to interrupt.
        vcpu.interrupt();
    }
    let enter = || abi::ioctl(&entry.object, RUN, argument);
    let reply = match entry.run_mask.get() {
        None => enter(),
        Some(mask) => mask::run(inside, vcpu, mask, enter),
    };
    drop(running);
    if matches!(reply, Err(Errno::INTERRUPTED)) || inside.deferred() {
        vcpu.settle();
        if entry.runners.load(Ordering::SeqCst) > 1 {
            // Another thread waits for the vCPU, and the interruption may have been meant for it.
            vcpu.interrupt();
        }
    }
    entry.runners.fetch_sub(1, Ordering::SeqCst);
    tell_of_failure(vcpu);
    finish(reply)
}

/// A descriptor of ours that this process has no object for: it has come from another process, by exec(2) or SCM_RIGHTS.
/// `/dev/kvm` is open to all; VMs and vCPUs belong to the process that made them. `None`: not ours.
fn inherited(fd: RawFd) -> Option<Result<Arc<Entry>, Errno>> {
    let mut target = [0; 32];
    let path = format!("/proc/self/fd/{fd}\0");
    let path = CStr::from_bytes_with_nul(path.as_bytes()).ok()?;
    // SAFETY: the path ends with a zero byte, and the buffer has the length that is said.
    let length = unsafe {
        let target: *mut c_char = target.as_mut_ptr();
        libc::readlink(path.as_ptr(), target, 32)
    };
    let name = target.get(..usize::try_from(length).ok()?)?;
    let name: Vec<u8> = name.iter().map(|&c| c as u8).collect();
    match name.strip_prefix(b"/memfd:kvm")? {
        b" (deleted)" => {
            let system = || {
                let Created { object, .. } = Created::system(process::system()?)?;
                table::enter(fd, object)
            };
            Some(system())
        }
        rest if rest.starts_with(b"-") => Some(Err(Errno::IO)),
        _ => None,
    }
}
