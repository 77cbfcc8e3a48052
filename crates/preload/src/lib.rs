//! `libring3.so`: the KVM API for unmodified programs, by way of `LD_PRELOAD`.
//!
//! The library puts itself in front of the C library's functions that a KVM client uses. An open of `/dev/kvm` makes an
//! object of [`abi`]; an ioctl of KVM's type on a descriptor of ours goes to [`abi::ioctl()`]; everything else goes on
//! to the next function of that name, unchanged. Descriptors are the kernel's own, so what we do not see (poll, mmap,
//! SCM_RIGHTS, close-on-exec) works by itself.
//!
//! There is nothing here but descriptors, and what the kernel does around an ioctl for any device: signals
//! ([`signal`]), cancellation ([`cancel`]) and fork ([`process`]). What the KVM API means is `abi`'s affair.
//!
//! A thread is *inside* from the moment that it enters one of our calls until it leaves ([`thread::Inside`]). Meanwhile no
//! handler of the client's runs on it and no cancellation takes effect, so that neither can find the engine half-way.

mod cancel;
mod descriptor;
mod ioctl;
mod map;
mod mask;
mod next;
mod open;
mod path;
mod process;
mod raw;
mod signal;
mod stat;
mod syscall;
mod table;
mod thread;

/// A function of the C library's that we put ourselves in front of. Tests keep the C library's own.
macro_rules! interpose {
    ($($(#[$attribute:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $result:ty $body:block)*) => {$(
        $(#[$attribute])*
        #[cfg_attr(not(test), unsafe(no_mangle))]
        #[cfg_attr(test, allow(dead_code, reason = "the C library's callers come here, tests call some"))]
        pub(crate) unsafe extern "C-unwind" fn $name($($argument: $type),*) -> $result $body
    )*};
}
pub(crate) use interpose;
