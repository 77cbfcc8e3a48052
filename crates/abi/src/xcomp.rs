//! arch_prctl(2)'s calls about dynamically enabled XSAVE components, which VMMs make before they offer AMX to a guest
//! (kernel: `fpu_xstate_prctl` in arch/x86/kernel/fpu/xstate.c). They are no ioctls, but belong to the same API: what
//! they answer is about the processor that guests get.

use std::sync::atomic::{AtomicU64, Ordering};

use hypervisor::System;

use crate::error::Errno;
use crate::user::Argument;

/// ARCH_GET_XCOMP_SUPP: what there is.
const GET_SUPPORTED: u64 = 0x1021;
/// ARCH_GET_XCOMP_PERM: what the process may use.
const GET_PERMITTED: u64 = 0x1022;
/// ARCH_REQ_XCOMP_PERM: asks for one component.
const REQUEST: u64 = 0x1023;
/// ARCH_GET_XCOMP_GUEST_PERM: what its guests may use.
const GET_GUEST_PERMITTED: u64 = 0x1024;
/// ARCH_REQ_XCOMP_GUEST_PERM: asks for one component for guests.
const REQUEST_FOR_GUESTS: u64 = 0x1025;

/// Components that must be asked for: AMX's tile data.
const DYNAMIC: u64 = 1 << 18;
/// Components whose number is higher than that of any dynamic one do not exist.
const HIGHEST_DYNAMIC: u64 = 18;

/// What a process has been permitted of [`DYNAMIC`].
#[derive(Debug, Default)]
pub struct Permissions {
    own: AtomicU64,
    guests: AtomicU64,
}

impl Permissions {
    /// Nothing yet.
    pub const fn new() -> Permissions {
        Permissions { own: AtomicU64::new(0), guests: AtomicU64::new(0) }
    }

    /// Answers an arch_prctl call on `system`'s processor; `None` for calls about something else.
    pub fn arch_prctl(&self, system: &System, code: u64, argument: Argument) -> Option<Result<i32, Errno>> {
        let supported = system.guest_xcr0();
        let get = |value: u64| argument.write(&value).map(|()| 0);
        let permitted = |of: &AtomicU64| supported & (!DYNAMIC | of.load(Ordering::Relaxed));
        let request = |of: &AtomicU64| {
            let component = argument.0;
            if component > HIGHEST_DYNAMIC {
                return Err(Errno::INVALID);
            }
            let wanted = 1 << component & DYNAMIC;
            if wanted & supported == 0 {
                return Err(Errno(libc::EOPNOTSUPP));
            }
            of.fetch_or(wanted, Ordering::Relaxed);
            Ok(0)
        };
        Some(match code {
            GET_SUPPORTED => get(supported),
            GET_PERMITTED => get(permitted(&self.own)),
            GET_GUEST_PERMITTED => get(permitted(&self.guests)),
            REQUEST => request(&self.own),
            REQUEST_FOR_GUESTS => request(&self.guests),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypervisor::HostParams;
    use silicon::model::CpuModel;

    #[test]
    fn a_processor_without_amx_has_nothing_to_permit() {
        let system = System::new(CpuModel::parse("haswell").unwrap(), HostParams::default());
        let permissions = Permissions::new();
        let get = |code| {
            let mut value = 0u64;
            let argument = Argument(&raw mut value as u64);
            permissions.arch_prctl(&system, code, argument).map(|result| result.map(|_| value))
        };
        for code in [GET_SUPPORTED, GET_PERMITTED, GET_GUEST_PERMITTED] {
            assert_eq!(get(code), Some(Ok(7)), "{code:#x}: x87, SSE, AVX");
        }
        let request = |component| permissions.arch_prctl(&system, REQUEST_FOR_GUESTS, Argument(component));
        assert_eq!(request(18), Some(Err(Errno(libc::EOPNOTSUPP))));
        assert_eq!(request(2), Some(Err(Errno(libc::EOPNOTSUPP))));
        assert_eq!(request(19), Some(Err(Errno::INVALID)));
        assert_eq!(permissions.arch_prctl(&system, GET_SUPPORTED, Argument(0)), Some(Err(Errno::FAULT)));
        // ARCH_SET_FS
        assert_eq!(get(0x1002), None);
    }
}
