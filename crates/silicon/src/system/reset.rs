//! INIT and start-up IPIs.

use crate::cpu::{Cpu, Pending};
use crate::state::{Activity, CpuState, Seg, cr0};

impl Cpu {
    /// INIT (SDM vol. 3A, table 10-1): like RESET, but x87, SSE, AVX and AMX state, MSRs, XCR0, PKRU and CR0.CD
    /// and NW stay. The processor then waits for a start-up IPI; the bootstrap processor's owner makes it
    /// active instead.
    pub fn init_reset(&mut self) {
        let old = &self.state;
        let mut state = CpuState::reset(self.features.signature());
        state.cr0 = cr0::ET | (old.cr0 & (cr0::CD | cr0::NW));
        state.activity = Activity::WaitForSipi;
        state.xcr0 = old.xcr0;
        state.xss = old.xss;
        state.pkru = old.pkru;
        state.mxcsr = old.mxcsr;
        state.star = old.star;
        state.lstar = old.lstar;
        state.cstar = old.cstar;
        state.sfmask = old.sfmask;
        state.kernel_gs_base = old.kernel_gs_base;
        state.sysenter_cs = old.sysenter_cs;
        state.sysenter_esp = old.sysenter_esp;
        state.sysenter_eip = old.sysenter_eip;
        state.tsc_aux = old.tsc_aux;
        state.pat = old.pat;
        state.x87 = old.x87;
        state.k = old.k;
        state.zmm = old.zmm;
        state.xfd = old.xfd;
        state.xfd_err = old.xfd_err;
        state.tile_config = old.tile_config;
        state.tile_data_used = old.tile_data_used;
        self.state = state;
        self.pending = Pending::None;
        self.pending_debug = 0;
        self.deferred = None;
        self.end_lock_permission();
        self.injection = None;
        self.replay = Default::default();
        self.refresh_mode();
        self.refresh_local();
    }

    /// Start-up IPI: real-address mode at `vector` × 4 KiB (SDM vol. 3A, 9.4.4).
    pub fn startup(&mut self, vector: u8) {
        let selector = u16::from(vector) << 8;
        let cs = &mut self.state.segs[Seg::Cs as usize];
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        self.state.rip = 0;
        self.state.activity = Activity::Active;
        self.refresh_mode();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Features;
    use crate::state::reg;
    use std::sync::Arc;

    #[test]
    fn init_keeps_what_table_10_1_says() {
        let mut cpu = Cpu::new(Features::default(), Arc::default());
        cpu.state.cr0 = cr0::PE | cr0::PG | cr0::CD | cr0::ET | cr0::WP;
        cpu.state.efer = 0x500;
        cpu.state.lstar = 0x1234;
        cpu.state.mxcsr = 0x1fa0;
        cpu.state.regs[usize::from(reg::RAX)] = 7;
        cpu.state.cpl = 3;
        cpu.init_reset();
        assert_eq!(cpu.state.cr0, cr0::CD | cr0::ET);
        assert_eq!((cpu.state.efer, cpu.state.lstar, cpu.state.mxcsr), (0, 0x1234, 0x1fa0));
        assert_eq!((cpu.state.regs[usize::from(reg::RAX)], cpu.state.cpl), (0, 0));
        assert_eq!(cpu.state.activity, Activity::WaitForSipi);
        cpu.startup(0x9a);
        assert_eq!(cpu.state.segs[Seg::Cs as usize].base, 0x9a000);
        assert_eq!((cpu.state.rip, cpu.state.activity), (0, Activity::Active));
    }
}
