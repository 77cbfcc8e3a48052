//! Programs in place of single instructions: blocks of random length with random branches between them.
//!
//! The [generator](crate::generate) of cases gives instructions with their operands, prefixes and values; [`writer`] puts them into
//! programs, with loops, branches, calls and computed jumps ([`flow`]), most memory operands by few base registers and near each
//! other ([`operands`]). All programs end. Each runs several times from different states, on the interpreter, on translators, and on the host
//! ([`bench`]), and after each run registers, memory, defined flags ([`undefined`]), MXCSR, x87 state, faults and, of the engines, counts
//! of instructions must be equal. A program that differs is made as small as it can be ([`shrink`]).

pub mod bench;
mod flow;
pub mod forms;
pub mod native;
mod operands;
pub mod program;
pub mod run;
pub mod shrink;
#[cfg(test)]
mod tests;
pub mod undefined;
pub mod writer;
