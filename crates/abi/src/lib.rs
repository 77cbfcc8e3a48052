//! The KVM API as data: which ioctl belongs to which object, what it carries, what a capability answers.
//!
//! Clients come in through one entry, [`ioctl()`]`(object, number, argument)`, which looks the number up in
//! [`ioctl::IOCTLS`] and makes the [`hypervisor`] call of that row. This layer copies structures and gives errnos;
//! it holds no policy.

pub mod capability;
mod coalesced;
mod dirty_ring;
pub mod error;
pub mod ioctl;
pub mod object;
pub mod ring3;
pub mod run;
pub mod user;
pub mod xcomp;

mod exit;
mod shared;
mod system;
mod vcpu;
mod vm;

pub use error::Errno;
pub use ioctl::ioctl;
pub use object::{Created, Object, Reply, VcpuObject};
pub use user::Argument;
