//! arch_prctl(2)'s calls about dynamically enabled XSAVE components, which VMMs make before they offer AMX to a guest
//! (kernel: `fpu_xstate_prctl` in arch/x86/kernel/fpu/xstate.c). They are no ioctls, but belong to the same API: what
//! they answer is about the processor that guests get.

use hypervisor::System;
use hypervisor::permissions::Beneficiary;

use crate::error::Errno;
use crate::user::Argument;

/// ARCH_GET_XCOMP_SUPP: what there is.
pub const ARCH_GET_XCOMP_SUPP: u64 = 0x1021;
/// ARCH_GET_XCOMP_PERM: what the process may use.
pub const ARCH_GET_XCOMP_PERM: u64 = 0x1022;
/// ARCH_REQ_XCOMP_PERM: asks for one component.
pub const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
/// ARCH_GET_XCOMP_GUEST_PERM: what its guests may use.
pub const ARCH_GET_XCOMP_GUEST_PERM: u64 = 0x1024;
/// ARCH_REQ_XCOMP_GUEST_PERM: asks for one component for guests.
pub const ARCH_REQ_XCOMP_GUEST_PERM: u64 = 0x1025;

/// Answers an arch_prctl call on `system`'s processor; `None` for calls about something else.
///
/// # Errors
///
/// EFAULT for an argument that cannot be written; [`PermissionError`](hypervisor::permissions::PermissionError)'s.
pub fn arch_prctl(system: &System, code: u64, argument: Argument) -> Option<Result<i32, Errno>> {
    let permissions = system.permissions();
    let get = |value: u64| argument.write(&value).map(|()| 0);
    let request = |of| permissions.request(of, argument.0).map(|()| 0).map_err(|error| Errno(error.errno()));
    Some(match code {
        ARCH_GET_XCOMP_SUPP => get(permissions.supported()),
        ARCH_GET_XCOMP_PERM => get(permissions.permitted(Beneficiary::Process)),
        ARCH_GET_XCOMP_GUEST_PERM => get(permissions.permitted(Beneficiary::Guests)),
        ARCH_REQ_XCOMP_PERM => request(Beneficiary::Process),
        ARCH_REQ_XCOMP_GUEST_PERM => request(Beneficiary::Guests),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypervisor::HostParams;
    use silicon::model::CpuModel;

    fn get(system: &System, code: u64) -> Option<Result<u64, Errno>> {
        let mut value = 0u64;
        let argument = Argument(&raw mut value as u64);
        arch_prctl(system, code, argument).map(|result| result.map(|_| value))
    }

    fn request(system: &System, component: u64) -> Option<Result<i32, Errno>> {
        arch_prctl(system, ARCH_REQ_XCOMP_GUEST_PERM, Argument(component))
    }

    #[test]
    fn a_processor_without_amx_has_nothing_to_permit() {
        let system = System::new(CpuModel::parse("haswell").unwrap(), HostParams::default());
        for code in [ARCH_GET_XCOMP_SUPP, ARCH_GET_XCOMP_PERM, ARCH_GET_XCOMP_GUEST_PERM] {
            assert_eq!(get(&system, code), Some(Ok(7)), "{code:#x}: x87, SSE, AVX");
        }
        assert_eq!(request(&system, 18), Some(Err(Errno(libc::EOPNOTSUPP))));
        assert_eq!(request(&system, 2), Some(Err(Errno(libc::EOPNOTSUPP))));
        assert_eq!(request(&system, 19), Some(Err(Errno::INVALID)));
        assert_eq!(arch_prctl(&system, ARCH_GET_XCOMP_SUPP, Argument(0)), Some(Err(Errno::FAULT)));
        // ARCH_SET_FS
        assert_eq!(get(&system, 0x1002), None);
    }

    #[test]
    fn amx_p1_requests() {
        let system = System::new(CpuModel::parse("sapphire-rapids").unwrap(), HostParams::default());
        let supported = system.model().features().xcr0_mask();
        assert_eq!(get(&system, ARCH_GET_XCOMP_SUPP), Some(Ok(supported)));
        assert_eq!(get(&system, ARCH_GET_XCOMP_GUEST_PERM), Some(Ok(supported & !(1 << 18))));
        for (component, errno) in
            [(0, libc::EOPNOTSUPP), (17, libc::EOPNOTSUPP), (19, libc::EINVAL), (u64::MAX, libc::EINVAL)]
        {
            assert_eq!(request(&system, component), Some(Err(Errno(errno))), "{component}");
        }
        assert_eq!(request(&system, 18), Some(Ok(0)));
        assert_eq!(get(&system, ARCH_GET_XCOMP_GUEST_PERM), Some(Ok(supported)));
        assert_eq!(get(&system, ARCH_GET_XCOMP_PERM), Some(Ok(supported & !(1 << 18))), "its own is another");
        let vm = system.create_vm().unwrap();
        let _vcpu = vm.create_vcpu(0).unwrap();
        assert_eq!(request(&system, 18), Some(Ok(0)), "granted already");
        let late = System::new(CpuModel::parse("sapphire-rapids").unwrap(), HostParams::default());
        let vm = late.create_vm().unwrap();
        let _vcpu = vm.create_vcpu(0).unwrap();
        assert_eq!(request(&late, 18), Some(Err(Errno(libc::EBUSY))));
        assert_eq!(
            arch_prctl(&late, ARCH_REQ_XCOMP_PERM, Argument(18)),
            Some(Ok(0)),
            "only guests' is frozen"
        );
    }
}
