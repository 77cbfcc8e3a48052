//! The dirty ring of a vCPU.

use std::sync::Arc;

use super::Vcpu;
use crate::dirty_ring::{DirtyRing, Entries};

impl Vcpu {
    /// Gives the vCPU its dirty ring.
    pub fn attach_dirty_ring(&mut self, entries: Box<dyn Entries>) {
        let ring = Arc::new(DirtyRing::new(entries));
        self.vm.add_dirty_ring(ring.clone());
        self.dirty_ring = Some(ring);
        self.cpu.controls.page_modification_logging = true;
    }

    /// Moves what the processor's page-modification log has to the dirty ring; whether that is nearly full.
    pub(super) fn list_modified_pages(&mut self) -> bool {
        let Some(ring) = &self.dirty_ring else { return false };
        self.vm.memory().list_modified(&mut self.cpu.modified_pages, ring);
        ring.is_nearly_full()
    }
}
