//! The KVM API as data: which ioctl belongs to which object, what it carries, what a capability answers.
//!
//! Foreign clients will come in through one entry, `ioctl(object, number, argument)`, which looks the number up
//! here and makes the [`hypervisor`] call of that row. This layer holds no policy.

pub mod capability;
pub mod ioctl;

pub use capability::check_extension;
pub use ioctl::{Direction, Ioctl, Object, lookup};
