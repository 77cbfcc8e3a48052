//! Instruction conformance: the software processor against the host's own.
//!
//! A generator ([`generate`]) takes every instruction form of iced-x86's tables that the CPU model offers
//! ([`forms`]), gives it random operands and state, and both processors run the same bytes at the same linear
//! addresses ([`host`], [`guest`]). Registers, memory, defined flags, MXCSR, x87 state and faults must be equal
//! ([`compare`]). A case is a function of seed, form and number, so that a report is a reproducer. Whole programs of such
//! instructions are compared as well, on both engines ([`blocks`]).

pub mod address;
pub mod bench;
pub mod blocks;
pub mod capabilities;
pub mod compare;
pub mod forms;
pub mod generate;
pub mod guest;
pub mod host;
pub mod layout;
pub mod machine;
pub mod report;
pub mod rng;
pub mod run;
pub mod special;
pub mod values;
pub mod vendor;
