//! Robustness: random guests that must not harm the processor that runs them.
//!
//! Every generator makes guest images of one kind from a seed; the runner gives each a bounded number of
//! instructions. Whatever the guest does, there is no panic, no hang, no growth of memory and no write outside
//! guest memory.

pub mod batch;
pub mod calls;
pub mod image;
pub mod isolation;
pub mod kinds;
pub mod machine;
pub mod memory;
pub mod process;
pub mod run;
pub mod stream;
pub mod watch;
