//! Reads of ports that the client answers together: those of a REP INS (kernel: `pio_in_emulated` and its read-ahead
//! buffer in arch/x86/kvm/emulate.c).

use silicon::vmx::BusAccess;

use super::Vcpu;

/// Bytes that are asked for at once, as KVM does.
const BYTES: u32 = 1024;

/// Values that a client gave before the guest asked for them.
#[derive(Clone, Debug, Default)]
pub(super) struct ReadAhead {
    /// The instruction, by the number of those completed before it, and its port and width.
    of: Option<(u64, u64, u8)>,
    /// The last one first.
    values: Vec<u64>,
}

impl ReadAhead {
    /// The next value, if `access` is what the values were given for.
    fn next(&mut self, instruction: u64, access: &BusAccess) -> Option<u64> {
        if self.of == Some((instruction, access.address, access.size)) && access.write.is_none() {
            return self.values.pop();
        }
        self.values.clear();
        None
    }

    /// How many values are left.
    pub(super) fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether values are left for the instruction that follows `instruction` completed ones.
    pub(super) fn is_for(&self, instruction: u64) -> bool {
        !self.values.is_empty() && self.of.is_some_and(|(of, ..)| of == instruction)
    }
}

impl Vcpu {
    /// How many reads the last exit of a port read asks for: more than one for a string instruction. The client may
    /// answer with [`Vcpu::complete_port_reads`].
    pub fn port_reads(&self) -> u32 {
        let size = self.read_ahead.of.map_or(1, |(.., size)| u32::from(size.max(1)));
        self.cpu.port_reads.clamp(1, BYTES / size)
    }

    /// Answers the port reads that the last exit asked for, in their order; fewer will do.
    pub fn complete_port_reads(&mut self, values: &[u64]) {
        let Some((first, others)) = values.split_first() else { return };
        if self.user_access {
            self.read_ahead.values = others.iter().rev().copied().collect();
        }
        self.complete(*first);
    }

    /// A value for a port read, if the client has given it already; else the read becomes an exit.
    pub(super) fn read_ahead(&mut self, access: &BusAccess) -> Option<u64> {
        let instruction = self.cpu.instructions();
        let value = self.read_ahead.next(instruction, access);
        self.read_ahead.of = Some((instruction, access.address, access.size));
        value
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Program;
    use crate::VcpuExit;

    #[test]
    fn string_reads_are_answered_together() {
        // rep insw; hlt
        let mut program = Program::new(&[0xf3, 0x6d, 0xf4]);
        let vcpu = &mut program.vcpu;
        let mut regs = vcpu.regs();
        (regs.rcx, regs.rdx, regs.rdi) = (3, 0x1f0, 0x2ffc);
        vcpu.set_regs(&regs);
        let read = VcpuExit::Io { port: 0x1f0, size: 2, write: None };
        assert_eq!((vcpu.run().unwrap(), vcpu.port_reads()), (read, 2));
        vcpu.complete_port_reads(&[0x1111, 0x2222]);
        assert_eq!((vcpu.run().unwrap(), vcpu.port_reads()), (read, 1));
        vcpu.complete_port_reads(&[0x3333]);
        assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
        let mut data = [0; 6];
        vcpu.vm.memory().read(0x2ffc, &mut data);
        assert_eq!(data, [0x11, 0x11, 0x22, 0x22, 0x33, 0x33]);
    }

    #[test]
    fn what_an_instruction_leaves_is_not_the_next_ones() {
        // rep insb; jmp back
        let mut program = Program::new(&[0xf3, 0x6c, 0xeb, 0xfc]);
        let vcpu = &mut program.vcpu;
        let mut regs = vcpu.regs();
        (regs.rcx, regs.rdx, regs.rdi) = (2, 0x80, 0x2000);
        vcpu.set_regs(&regs);
        vcpu.run().unwrap();
        // The client changes the count of the instruction that it answers.
        regs.rcx = 1;
        vcpu.set_regs(&regs);
        vcpu.complete_port_reads(&[1, 2]);
        vcpu.cpu_mut().controls.instruction_limit = vcpu.cpu_mut().instructions() + 2;
        assert_eq!(vcpu.run().unwrap(), VcpuExit::Budget);
        regs.rcx = 5;
        vcpu.set_regs(&regs);
        vcpu.cpu_mut().controls.instruction_limit = u64::MAX;
        assert!(matches!(vcpu.run().unwrap(), VcpuExit::Io { .. }));
        assert_eq!(vcpu.regs().rcx, 5);
    }

    /// Values that were left over had the instructions behind theirs run for ever, with no way out of KVM_RUN.
    #[test]
    fn an_immediate_exit_does_not_run_on_for_values_that_are_left_over() {
        // rep insb; dec ecx; a32 rep movsb
        let mut program = Program::new(&[0xf3, 0x6c, 0x66, 0x49, 0x67, 0xf3, 0xa4]);
        let vcpu = &mut program.vcpu;
        let mut regs = vcpu.regs();
        (regs.rcx, regs.rdx, regs.rdi) = (2, 0x80, 0x2000);
        vcpu.set_regs(&regs);
        vcpu.run().unwrap();
        regs.rcx = 1;
        vcpu.set_regs(&regs);
        vcpu.complete_port_reads(&[1, 2]);
        let request = super::super::RunRequest { immediate_exit: true, ..Default::default() };
        assert!(matches!(vcpu.run_request(request), Err(crate::Error::Interrupted)));
        assert_eq!((vcpu.regs().rcx, vcpu.regs().rip), (0, Program::CODE + 2));
    }

    #[test]
    fn an_immediate_exit_leaves_nothing_behind() {
        let mut program = Program::new(&[0xf3, 0x6c, 0xf4]);
        let vcpu = &mut program.vcpu;
        let mut regs = vcpu.regs();
        (regs.rcx, regs.rdx, regs.rdi) = (4, 0x80, 0x2000);
        vcpu.set_regs(&regs);
        vcpu.run().unwrap();
        assert_eq!(vcpu.port_reads(), 4);
        vcpu.complete_port_reads(&[1, 2, 3]);
        let request = super::super::RunRequest { immediate_exit: true, ..Default::default() };
        assert!(matches!(
            vcpu.run_request(request),
            Err(crate::Error::Interrupted) | Ok(VcpuExit::Io { .. })
        ));
        assert_eq!((vcpu.regs().rcx, vcpu.regs().rip), (1, Program::CODE));
    }
}
