//! System management mode (SDM vol. 3C, chapter 31): what the processor does of it. The state-save area is the
//! hypervisor's, which writes it when an SMI is taken and loads it when [`Exit::Rsm`](crate::vmx::Exit::Rsm) comes.

use crate::cpu::Cpu;
use crate::flags::Rflags;
use crate::state::{Activity, Seg, Segment, TableRegister, cr0, interruptibility};

/// Where the handler begins, in the code segment that begins at SMBASE (SDM vol. 3C, 31.4).
const ENTRY: u64 = 0x8000;
/// DR7 after reset.
const DR7_FIXED: u64 = 0x400;

impl Cpu {
    /// Whether an SMI could be taken before the next instruction: it may not be in SMM, nor in the middle of what the
    /// last instruction still has to deliver.
    pub fn smi_allowed(&self) -> bool {
        !self.state.smm
            && self.pending_debug == 0
            && self.deferred.is_none()
            && self.replay.done.is_empty()
            && self.replay.waiting.is_none()
    }

    /// Switches system management mode on or off, and with it the address space that accesses are made in; nothing
    /// else. Code may have been written in the other space unseen.
    pub fn set_smm(&mut self, on: bool) {
        if self.state.smm != on {
            self.state.smm = on;
            self.ept.code_may_have_changed();
        }
    }

    /// The state that an SMI handler begins in (SDM vol. 3C, table 31-4). The general registers stay, as do LDTR, TR and
    /// GDTR; the limit of the IDT is zero, which the SDM does not say.
    pub fn enter_smm(&mut self, smbase: u64) {
        self.set_smm(true);
        let state = &mut self.state;
        state.set_rflags(Rflags::FIXED.bits());
        state.rip = ENTRY;
        state.interruptibility = interruptibility::NMI;
        state.activity = Activity::Active;
        state.cr0 &= !(cr0::PE | cr0::EM | cr0::TS | cr0::PG);
        state.cr4 = 0;
        state.efer = 0;
        state.dr7 = DR7_FIXED;
        state.idtr = TableRegister { base: 0, limit: 0 };
        state.cpl = 0;
        // Read/write data of 4 GiB, also where code is.
        let flat = Segment { base: 0, limit: u32::MAX, attributes: 0x8093, selector: 0 };
        state.segs = [flat; 6];
        let selector = (smbase >> 4) as u16;
        state.segs[Seg::Cs as usize] = Segment { base: smbase, selector, ..flat };
        self.refresh_mode();
        self.paging_changed();
        self.debug_changed();
        self.refresh_local();
    }
}
