//! The machine's connections to the host: console, terminal, signals, resource figures.

pub mod console;
pub mod escape;
pub mod events;
pub mod sys;
pub mod terminal;
pub mod userfaultfd;
