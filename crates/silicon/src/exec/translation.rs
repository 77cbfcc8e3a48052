//! What the MMU is told of by the instructions of this module. The MMU's own methods of the same names, once
//! there, take precedence over this trait's.

use crate::cpu::Cpu;
use crate::exception::Abort;

/// Changes that translation must hear of.
pub(super) trait Translation {
    fn paging_changed(&mut self);
    fn mode_changed(&mut self);
    fn pkru_changed(&mut self);
    fn cr3_loaded(&mut self, preserve: bool);
    fn flush_page(&mut self, lin: u64);
    fn flush_page_in(&mut self, pcid: u16, lin: u64);
    fn flush_context(&mut self, pcid: u16);
    fn flush_all(&mut self, keep_global: bool);
    fn load_pdptrs(&mut self, cr3: u64) -> Result<(), Abort>;
}

impl Translation for Cpu {
    fn paging_changed(&mut self) {
        self.code.clear();
    }
    fn mode_changed(&mut self) {}
    fn pkru_changed(&mut self) {}
    fn cr3_loaded(&mut self, _: bool) {
        self.code.clear();
    }
    fn flush_page(&mut self, _: u64) {
        self.code.clear();
    }
    fn flush_page_in(&mut self, _: u16, _: u64) {
        self.code.clear();
    }
    fn flush_context(&mut self, _: u16) {
        self.code.clear();
    }
    fn flush_all(&mut self, _: bool) {
        self.code.clear();
    }
    fn load_pdptrs(&mut self, _: u64) -> Result<(), Abort> {
        Ok(())
    }
}
