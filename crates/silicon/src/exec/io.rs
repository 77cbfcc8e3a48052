//! IN, OUT, INS, OUTS, and who may use which port.

use iced_x86::{Instruction, Mnemonic};

use crate::code::lower::{LowerCtx, op_base, undefined};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::exec::operand::{by_size, is_immediate};
use crate::exec::string::{Progress, string_op};
use crate::flags::Rflags;
use crate::mmu::Word;
use crate::mmu::tlb::PAGE_MASK;
use crate::state::{Seg, reg};
use crate::system::segment::kind;
use crate::vmx::{BusAccess, Space};

/// Offset of the I/O map base address in a 32-bit or 64-bit TSS (SDM vol. 3A, figures 8-2 and 8-11).
const IO_MAP_BASE: u64 = 0x66;

impl Cpu {
    /// Whether ports `port..port + size` may be used: by privilege, or by the I/O permission bit map in the TSS
    /// (SDM vol. 1, 19.5.2).
    pub(crate) fn check_io_permission(&mut self, port: u16, size: usize) -> Result<(), Abort> {
        let free = !self.state.v8086() && self.state.cpl <= self.state.iopl();
        if self.state.real_mode() || free {
            return Ok(());
        }
        let tr = self.state.tr;
        let limit = u64::from(tr.limit);
        if tr.unusable() || !matches!(tr.kind(), kind::TSS | kind::TSS_BUSY) || limit < IO_MAP_BASE + 1 {
            return Err(self.raise(Exception::gp(0)));
        }
        let map = self.system_load::<u16>(tr.base.wrapping_add(IO_MAP_BASE))?;
        // Two bytes are read whatever the width, so both must be there.
        let at = u64::from(map) + u64::from(port / 8);
        if at + 1 > limit {
            return Err(self.raise(Exception::gp(0)));
        }
        let bits = self.system_load::<u16>(tr.base.wrapping_add(at))?;
        if (bits >> (port & 7)) & ((1 << size) - 1) != 0 {
            return Err(self.raise(Exception::gp(0)));
        }
        Ok(())
    }

    /// `reads`: see [`Cpu::port_reads`].
    fn port_access<T: Word>(&mut self, port: u16, write: Option<T>, reads: u64) -> Result<T, Abort> {
        self.port_reads = u32::try_from(reads).unwrap_or(u32::MAX);
        let write = write.map(T::to_u64);
        let access = BusAccess { space: Space::Port, address: u64::from(port), size: T::SIZE as u8, write };
        self.bus(access).map(T::from_u64)
    }
}

/// The port of IN and OUT: DX, or the immediate.
fn port<const DX: bool>(cpu: &Cpu, op: &Op) -> u16 {
    if DX { cpu.get(reg::RDX) } else { op.imm as u16 }
}

fn input<T: Word, const DX: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let port = port::<DX>(cpu, op);
    cpu.check_io_permission(port, T::SIZE)?;
    let value: T = cpu.port_access(port, None, 1)?;
    cpu.set(reg::RAX, value);
    Ok(Flow::Next)
}

fn output<T: Word, const DX: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let port = port::<DX>(cpu, op);
    cpu.check_io_permission(port, T::SIZE)?;
    let value: T = cpu.get(reg::RAX);
    cpu.port_access(port, Some(value), 0)?;
    Ok(Flow::Next)
}

/// INS: the destination is known to be writable before the port is read. The permission is looked at even for a
/// count of zero.
fn ins<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let port = cpu.get(reg::RDX);
    cpu.check_io_permission(port, T::SIZE)?;
    cpu.repeat(op, &[], |cpu, op, left| {
        let to = cpu.string_offset(reg::RDI, op);
        let lin = cpu.string_linear(Seg::Es, to, T::SIZE, true)?;
        cpu.probe(Seg::Es, lin, T::SIZE, true)?;
        let offset = lin & PAGE_MASK;
        let room = if cpu.state.flag(Rflags::DF) { offset + T::SIZE as u64 } else { PAGE_MASK + 1 - offset };
        let in_page = room / T::SIZE as u64;
        let value: T = cpu.port_access(port, None, left.min(in_page).max(1))?;
        cpu.store(Seg::Es, lin, value)?;
        cpu.step_index::<T>(reg::RDI, op, 1);
        Ok(Progress::of(1))
    })
}

fn outs<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let port = cpu.get(reg::RDX);
    cpu.check_io_permission(port, T::SIZE)?;
    cpu.repeat(op, &[], |cpu, op, _| {
        let (seg, from) = (cpu.op_seg(op), cpu.string_offset(reg::RSI, op));
        let lin = cpu.string_linear(seg, from, T::SIZE, false)?;
        let value: T = cpu.load(seg, lin)?;
        cpu.port_access(port, Some(value), 0)?;
        cpu.step_index::<T>(reg::RSI, op, 1);
        Ok(Progress::of(1))
    })
}

/// IN, OUT: `port` is the operand that names the port, `data` the accumulator.
fn lower_simple(ins: &Instruction, ctx: &LowerCtx, port: u32, data: u32) -> Option<Op> {
    let mut op = op_base(ins, ctx, undefined);
    let size = ins.op_register(data).size();
    let immediate = is_immediate(ins, port);
    if immediate {
        op.imm = u64::from(ins.immediate8());
    }
    op.handler.set(match (ins.mnemonic(), immediate) {
        (Mnemonic::In, true) => by_size!(size, T in [u8 u16 u32] => input::<T, false>),
        (Mnemonic::In, false) => by_size!(size, T in [u8 u16 u32] => input::<T, true>),
        (_, true) => by_size!(size, T in [u8 u16 u32] => output::<T, false>),
        (_, false) => by_size!(size, T in [u8 u16 u32] => output::<T, true>),
    });
    Some(op)
}

/// Lowers this file's instructions.
pub(crate) fn lower(instruction: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let handler: Handler = match instruction.mnemonic() {
        Mnemonic::In => return lower_simple(instruction, ctx, 1, 0),
        Mnemonic::Out => return lower_simple(instruction, ctx, 0, 1),
        Mnemonic::Insb => ins::<u8>,
        Mnemonic::Insw => ins::<u16>,
        Mnemonic::Insd => ins::<u32>,
        Mnemonic::Outsb => outs::<u8>,
        Mnemonic::Outsw => outs::<u16>,
        Mnemonic::Outsd => outs::<u32>,
        _ => return None,
    };
    let op = string_op(instruction, ctx);
    op.handler.set(handler);
    Some(op)
}

#[cfg(test)]
mod tests {
    use crate::exception::Exception;
    use crate::exec::testing::{CODE, DATA, GP0, Guest, PF_WRITE, UNMAPPED};
    use crate::state::{CodeSize, reg};
    use crate::vmx::{BusAccess, Exit, Space};

    fn access(address: u64, size: u8, write: Option<u64>) -> Exit {
        Exit::Io(BusAccess { space: Space::Port, address, size, write })
    }

    /// Answers the last exit and goes on.
    fn answer(guest: &mut Guest, value: u64) -> Exit {
        guest.cpu.complete_read(value);
        guest.cpu.run()
    }

    const END: Exit = Exit::Exception(Exception::UD);

    #[test]
    fn single_accesses() {
        let mut guest = Guest::new(CodeSize::Bits64);
        guest.set(reg::RAX, 0x1122_3344).set(reg::RDX, 0x1_03f8);
        assert_eq!(guest.run(&[0xee]), access(0x3f8, 1, Some(0x44)));
        assert_eq!(answer(&mut guest, 0), END);
        assert_eq!(guest.run(&[0x66, 0xe5, 0x70]), access(0x70, 2, None));
        assert_eq!(answer(&mut guest, 0xabcd), END);
        assert_eq!(guest.reg(reg::RAX), 0x1122_abcd);
        assert_eq!(guest.run(&[0xed]), access(0x3f8, 4, None));
        assert_eq!(answer(&mut guest, 7), END);
        assert_eq!(guest.reg(reg::RAX), 7);
    }

    #[test]
    fn repeated_accesses() {
        let mut guest = Guest::new(CodeSize::Bits64);
        guest.set(reg::RDX, 0x1f0).set(reg::RDI, DATA).set(reg::RCX, 2);
        assert_eq!(guest.run(&[0xf3, 0x66, 0x6d]), access(0x1f0, 2, None));
        assert_eq!((guest.cpu.state.rip, guest.reg(reg::RCX), guest.cpu.port_reads), (CODE, 2, 2));
        assert_eq!(answer(&mut guest, 0x1111), access(0x1f0, 2, None));
        assert_eq!(guest.reg(reg::RCX), 1);
        assert_eq!(answer(&mut guest, 0x2222), END);
        assert_eq!((guest.word(DATA, 4), guest.reg(reg::RDI)), (0x2222_1111, DATA + 4));
        guest.set(reg::RSI, DATA).set(reg::RCX, 2);
        assert_eq!(guest.run(&[0xf3, 0x6e]), access(0x1f0, 1, Some(0x11)));
        assert_eq!(answer(&mut guest, 0), access(0x1f0, 1, Some(0x11)));
        assert_eq!(answer(&mut guest, 0), END);
        // The port is not read if the destination cannot be written.
        guest.set(reg::RDI, UNMAPPED).set(reg::RCX, 1);
        assert_eq!(guest.fault(&[0xf3, 0x6c]), PF_WRITE);
    }

    #[test]
    fn the_bit_map_decides_for_user_code() {
        let mut guest = Guest::new(CodeSize::Bits32);
        guest.cpu.state.cpl = 3;
        guest.cpu.refresh_mode();
        guest.cpu.state.tr.attributes = 0x8b;
        guest.cpu.state.tr.base = DATA;
        guest.cpu.state.tr.limit = 0x77;
        guest.put(DATA + 0x66, &0x70u16.to_le_bytes());
        guest.put(DATA + 0x70, &[0xff; 8]);
        // Port 8 is allowed, 9 is not; 0x38 lies beyond the limit.
        guest.put(DATA + 0x71, &[0xfe]);
        assert_eq!(guest.run(&[0xe4, 8]), access(8, 1, None));
        assert_eq!(answer(&mut guest, 1), END);
        assert_eq!(guest.fault(&[0x66, 0xe5, 8]), GP0);
        assert_eq!(guest.fault(&[0xe4, 0x38]), GP0);
        guest.cpu.state.tr.attributes = 0x83;
        assert_eq!(guest.fault(&[0xe4, 8]), GP0);
        // IOPL 3 overrides it.
        guest.cpu.state.rflags_system |= 3 << 12;
        assert_eq!(guest.run(&[0xe4, 9]), access(9, 1, None));
    }
}
