//! Permission to use dynamically enabled XSAVE components (AMX's tiles): a process asks for it, for itself and for its guests,
//! before it offers them to one (kernel: `fpu_xstate_prctl`, `xstate_request_perm` and `fpu_init_guest_permissions` in
//! arch/x86/kernel/fpu; Documentation/arch/x86/xstate.rst).
//!
//! The kernel keeps this for each process. Here a [`System`](crate::System) stands for the process: a forked child has a copy, a
//! program that is executed begins anew.

use std::sync::atomic::{AtomicU64, Ordering};

use silicon::model::xstate::{TILECFG, TILEDATA};

/// Components that must be asked for.
pub const DYNAMIC: u64 = TILEDATA;
/// Components of this number and above do not exist (kernel: XFEATURE_MAX).
const COMPONENTS_END: u64 = 19;
/// In the word of what guests may use: the first vCPU has been created, nothing more is granted (kernel:
/// FPU_GUEST_PERM_LOCKED).
const FROZEN: u64 = 1 << 63;

/// Whose permission it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beneficiary {
    /// The process itself.
    Process,
    /// The vCPUs that it creates.
    Guests,
}

/// Why permission is not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PermissionError {
    /// EINVAL.
    #[error("there is no XSAVE component {0}")]
    NoComponent(u64),
    /// EOPNOTSUPP.
    #[error(
        "XSAVE component {0} is not one that has to be asked for, or the processor lacks it: see `ring3 doctor`"
    )]
    NotDynamic(u64),
    /// EBUSY.
    #[error(
        "XSAVE component {0} was asked for too late: ask before the first vCPU of the process is created"
    )]
    TooLate(u64),
}

impl PermissionError {
    /// The errno of arch_prctl(2).
    pub fn errno(self) -> i32 {
        match self {
            PermissionError::NoComponent(_) => libc::EINVAL,
            PermissionError::NotDynamic(_) => libc::EOPNOTSUPP,
            PermissionError::TooLate(_) => libc::EBUSY,
        }
    }
}

/// What a process has been permitted of [`DYNAMIC`].
#[derive(Debug)]
pub struct Permissions {
    /// What the processor has, as in XCR0.
    supported: u64,
    own: AtomicU64,
    guests: AtomicU64,
}

impl Permissions {
    /// Nothing yet, on a processor with these components.
    pub fn new(supported: u64) -> Permissions {
        Permissions { supported, own: AtomicU64::new(0), guests: AtomicU64::new(0) }
    }

    fn word(&self, of: Beneficiary) -> &AtomicU64 {
        match of {
            Beneficiary::Process => &self.own,
            Beneficiary::Guests => &self.guests,
        }
    }

    /// Components that the processor has (ARCH_GET_XCOMP_SUPP).
    pub fn supported(&self) -> u64 {
        self.supported
    }

    /// Components that may be used (ARCH_GET_XCOMP_PERM, ARCH_GET_XCOMP_GUEST_PERM).
    pub fn permitted(&self, of: Beneficiary) -> u64 {
        self.supported & (!DYNAMIC | self.word(of).load(Ordering::Relaxed))
    }

    /// What guests can be given now: without the configuration of tiles where there may be no tiles, since XCR0 has both or
    /// neither (kernel: `kvm_get_filtered_xcr0`).
    pub fn guest_xcr0(&self) -> u64 {
        let permitted = self.permitted(Beneficiary::Guests);
        if permitted & TILEDATA == 0 { permitted & !TILECFG } else { permitted }
    }

    /// Asks for a component by its number (ARCH_REQ_XCOMP_PERM, ARCH_REQ_XCOMP_GUEST_PERM). To ask again is no error.
    pub fn request(&self, of: Beneficiary, component: u64) -> Result<(), PermissionError> {
        if component >= COMPONENTS_END {
            return Err(PermissionError::NoComponent(component));
        }
        let wanted = 1 << component & DYNAMIC & self.supported;
        if wanted == 0 {
            return Err(PermissionError::NotDynamic(component));
        }
        let granted = |now: u64| (now & FROZEN == 0 || now & wanted != 0).then_some(now | wanted);
        match self.word(of).fetch_update(Ordering::Relaxed, Ordering::Relaxed, granted) {
            Ok(_) => Ok(()),
            Err(_) => Err(PermissionError::TooLate(component)),
        }
    }

    /// Asks for all that there is, as whoever has a machine of his own does. After the first vCPU it comes too late.
    pub fn request_all(&self, of: Beneficiary) {
        for component in 0..COMPONENTS_END {
            // Most are none that has to be asked for.
            let _ = self.request(of, component);
        }
    }

    /// A vCPU is created: what guests may use stays as it is.
    pub(crate) fn freeze(&self) {
        self.guests.fetch_or(FROZEN, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use silicon::model::xstate::AMX;

    #[test]
    fn guests_and_the_process_ask_for_themselves() {
        let permissions = Permissions::new(0x2e7 | AMX);
        assert_eq!(permissions.permitted(Beneficiary::Guests), 0x2e7 | TILECFG);
        assert_eq!(permissions.guest_xcr0(), 0x2e7);
        permissions.request(Beneficiary::Process, 18).unwrap();
        assert_eq!(
            (permissions.permitted(Beneficiary::Process), permissions.guest_xcr0()),
            (0x2e7 | AMX, 0x2e7)
        );
        permissions.request(Beneficiary::Guests, 18).unwrap();
        assert_eq!(permissions.guest_xcr0(), 0x2e7 | AMX);
    }

    #[test]
    fn the_first_vcpu_freezes_what_guests_may_use() {
        let permissions = Permissions::new(0x2e7 | AMX);
        permissions.freeze();
        assert_eq!(permissions.request(Beneficiary::Guests, 18), Err(PermissionError::TooLate(18)));
        assert_eq!(permissions.guest_xcr0(), 0x2e7);
        permissions.request(Beneficiary::Process, 18).unwrap();
        let permissions = Permissions::new(AMX);
        permissions.request(Beneficiary::Guests, 18).unwrap();
        permissions.freeze();
        permissions.request(Beneficiary::Guests, 18).unwrap();
        assert_eq!(permissions.guest_xcr0(), AMX);
    }

    #[test]
    fn what_cannot_be_asked_for() {
        let permissions = Permissions::new(0x2e7);
        for (component, error) in [
            (2, PermissionError::NotDynamic(2)),
            (17, PermissionError::NotDynamic(17)),
            (18, PermissionError::NotDynamic(18)),
            (19, PermissionError::NoComponent(19)),
            (u64::MAX, PermissionError::NoComponent(u64::MAX)),
        ] {
            assert_eq!(permissions.request(Beneficiary::Guests, component), Err(error));
        }
    }
}
