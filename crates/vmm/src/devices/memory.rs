//! The memory device of `--page-out`: a guest, or a test program in it, says which of its pages are to be elsewhere.
//!
//! Registers, 32 bits each, at [`layout::PORT_MEMORY`](crate::layout::PORT_MEMORY):
//!
//! | offset | write | read |
//! |---|---|---|
//! | 0 | PAGE: a guest-physical page number | the same |
//! | 4 | COUNT: how many pages from there on | the same |
//! | 8 | COMMAND: see below | result of the last: pages concerned, or all ones: it failed |
//! | 12 | | WANTED: pages that somebody waits for now |
//! | 16 | | BROUGHT: pages that have been brought, modulo 2^32 |
//!
//! A Linux program finds its pages' numbers in `/proc/self/pagemap`, and reaches the ports after ioperm(2).

use std::sync::Arc;

use super::bus::Device;
use crate::paging::{Paging, PagingError};

/// Number of ports.
pub const LENGTH: u64 = 20;

const PAGE: u64 = 0;
const COUNT: u64 = 4;
const COMMAND: u64 = 8;
const WANTED: u64 = 12;
const BROUGHT: u64 = 16;

/// Result of a command that failed.
const FAILED: u32 = u32::MAX;

/// Values of COMMAND.
mod command {
    /// COUNT pages from PAGE on go to the store.
    pub(super) const EVICT: u32 = 1;
    /// Of these the part that `--page-out` says goes.
    pub(super) const EVICT_PART: u32 = 2;
    /// The memory of the one page fails; who touches it finds out.
    pub(super) const POISON: u32 = 3;
    /// The memory of the one page fails, and the guest is told at once: an action-optional machine check.
    pub(super) const POISON_TOLD: u32 = 4;
    /// Pages are held back, each for ten seconds at most, until RELEASE, or an EVICT or POISON.
    pub(super) const HOLD: u32 = 5;
    /// Pages come after their delay.
    pub(super) const RELEASE: u32 = 6;
}

/// What the device has others do.
pub trait Effects: Send {
    /// Pages have gone: no virtual CPU may take them to be there.
    fn gone(&mut self);
    /// The guest is to hear that the page's memory has failed.
    fn failed(&mut self, page: u64);
}

/// The device.
pub struct MemoryDevice<E> {
    paging: Arc<Paging>,
    effects: E,
    page: u32,
    count: u32,
    result: u32,
}

impl<E: Effects> MemoryDevice<E> {
    /// A device for the pages of `paging`.
    pub fn new(paging: Arc<Paging>, effects: E) -> Self {
        Self { paging, effects, page: 0, count: 1, result: 0 }
    }

    fn command(&mut self, command: u32) -> Result<u64, PagingError> {
        let (page, count) = (self.page.into(), self.count.into());
        let done = match command {
            command::EVICT | command::EVICT_PART => {
                self.paging.evict(page, count, command == command::EVICT_PART)?
            }
            command::POISON | command::POISON_TOLD => self.paging.poison(page).map(|()| 1)?,
            command::HOLD => {
                self.paging.hold();
                return Ok(0);
            }
            command::RELEASE => {
                self.paging.release();
                return Ok(0);
            }
            _ => return Ok(FAILED.into()),
        };
        self.effects.gone();
        if command == command::POISON_TOLD {
            self.effects.failed(page);
        }
        Ok(done)
    }
}

impl<E: Effects> Device for MemoryDevice<E> {
    fn read(&mut self, offset: u64, size: u8) -> u64 {
        match (offset, size) {
            (PAGE, 4) => self.page.into(),
            (COUNT, 4) => self.count.into(),
            (COMMAND, 4) => self.result.into(),
            (WANTED, 4) => self.paging.wanted(),
            (BROUGHT, 4) => self.paging.brought(),
            _ => u64::MAX,
        }
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) {
        match (offset, size) {
            (PAGE, 4) => self.page = value as u32,
            (COUNT, 4) => self.count = value as u32,
            (COMMAND, 4) => {
                let done = self.command(value as u32).unwrap_or_else(|error| {
                    tracing::warn!("memory device: {error}");
                    FAILED.into()
                });
                self.result = u32::try_from(done).unwrap_or(FAILED);
            }
            _ => {}
        }
    }
}
