//! Makes a generated case part of a program: what its operands need is set up before it, or its memory operand is one like
//! others of the program, by the same base register.

use iced_x86::{
    Code, Instruction, InstructionInfoFactory, MemoryOperand, MemorySize, Mnemonic, OpAccess, OpKind,
    Register,
};

use super::program::Item;
use super::writer::{BASE_COUNT, Writer};
use crate::generate::Case;
use crate::layout::{CODE, CODE_SIZE, DATA, PAGE};

/// A page of the data window that is the program's own: counters, tables, vectors. Generated operands do not go there.
pub(super) const OWN: u64 = DATA + 7 * PAGE;
/// Where constants for the program are put in it, up to the counters of loops. The stack of programs with calls is below.
pub(super) const CONSTANTS: u64 = OWN + 0x200;
/// Where the counters of loops are.
pub(super) const COUNTERS: u64 = OWN + 0xf00;

/// RSP's number.
pub(super) const RSP: usize = 4;

/// Whether an access here would change the program or what it needs.
fn is_own(address: u64) -> bool {
    (OWN - 64..OWN + PAGE).contains(&address) || (CODE - 64..CODE + CODE_SIZE).contains(&address)
}

/// 64-bit general register by number.
pub(super) fn gpr64(number: usize) -> Register {
    Register::RAX + number as u32
}

/// 32-bit general register by number.
pub(super) fn gpr32(number: usize) -> Register {
    Register::EAX + number as u32
}

/// Numbers of general registers that an instruction reads and writes, each as a bit mask, and those that address memory.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Uses {
    pub(super) read: u16,
    pub(super) written: u16,
    pub(super) addressing: u16,
}

impl Uses {
    pub(super) fn of(factory: &mut InstructionInfoFactory, instruction: &Instruction) -> Uses {
        let mut uses = Uses::default();
        let bit = |register: Register| match register.full_register() {
            full if full.is_gpr() => 1 << full.number(),
            _ => 0,
        };
        let info = factory.info(instruction);
        for used in info.used_registers() {
            let access = used.access();
            if !matches!(
                access,
                OpAccess::Write | OpAccess::CondWrite | OpAccess::NoMemAccess | OpAccess::None
            ) {
                uses.read |= bit(used.register());
            }
            if !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess | OpAccess::None)
            {
                uses.written |= bit(used.register());
            }
        }
        for memory in info.used_memory() {
            uses.addressing |= bit(memory.base()) | bit(memory.index());
        }
        uses
    }
}

impl Writer<'_> {
    /// The case's instruction, with what goes before it; `None` if it does not fit into the program.
    pub(super) fn adapt(&mut self, case: &Case) -> Option<()> {
        let mut item = Item::plain(case.instruction);
        item.open = self.rng.below(16) as u8;
        if self.rng.percent(8) {
            item.prefix = Some(self.rng.pick(&[0x26, 0x2e, 0x36, 0x3e]));
        }
        let mut setups = 0;
        let own = case.target.is_some_and(is_own);
        let ins = &case.instruction;
        let addressed = ins.op_kinds().any(|kind| kind == OpKind::Memory);
        let plain = addressed && !ins.is_vsib() && ins.memory_index() != Register::AL;
        let unnamed = ins.memory_base() == Register::None && ins.memory_index() == Register::None;
        let by_stack =
            [ins.memory_base(), ins.memory_index()].iter().any(|r| r.full_register() == Register::RSP);
        let fixed = plain && (ins.is_ip_rel_memory_operand() || unnamed);
        if plain && (self.rng.percent(92) || own) && has_base(ins) {
            self.share(&mut item.instruction, case);
        } else if own || self.calls && by_stack || matches!(ins.segment_prefix(), Register::FS | Register::GS)
        {
            return None;
        } else {
            let uses = Uses::of(&mut self.info, ins);
            setups |= if fixed { 0 } else { uses.addressing & !(1 << RSP) };
            self.patches(case, 0)?;
        }
        setups |= self.wanted_values(case) & !(1 << RSP);
        let uses = Uses::of(&mut self.info, &item.instruction);
        if !self.may_write(&item.instruction, uses.written)
            || setups & self.protected != 0
            || !self.decodes(&item)
            || self.sees_conditions(&item.instruction)
        {
            return None;
        }
        if ins.is_vsib() {
            self.load_index(case)?;
        }
        for register in (0..16).filter(|i| setups & 1 << i != 0) {
            if ins.is_string_instruction() && is_own(case.machine.gpr[register] & !(PAGE - 1)) {
                return None;
            }
            self.load(register, case.machine.gpr[register]);
        }
        self.push(item);
        Some(())
    }

    /// Registers whose values make the instruction do something.
    fn wanted_values(&mut self, case: &Case) -> u16 {
        use Mnemonic::*;
        let ins = &case.instruction;
        let uses = Uses::of(&mut self.info, ins);
        let percent = match ins.mnemonic() {
            Div | Idiv => 95,
            Xgetbv | Wrfsbase | Wrgsbase => 100,
            Bt | Bts | Btr | Btc if ins.op0_kind() == OpKind::Memory => 100,
            Enter | Leave => 100,
            _ if ins.has_rep_prefix() || ins.has_repne_prefix() => 100,
            Cmpxchg | Cmpxchg8b | Cmpxchg16b => 50,
            _ => 10,
        };
        if self.rng.percent(percent) { uses.read & !uses.addressing & !self.protected } else { 0 }
    }

    /// Makes the memory operand one by a base register of the program.
    fn share(&mut self, ins: &mut Instruction, case: &Case) {
        let base = self.rng.below(BASE_COUNT as u64 + 1) as usize;
        let size = match ins.memory_size() {
            MemorySize::Unknown | MemorySize::Xsave | MemorySize::Xsave64 => 64,
            size => size.size().max(1) as u64,
        };
        let (number, displacement) = match self.bases.get(base) {
            Some(&number) => (number, self.displacement(base, size)),
            None if !self.calls && self.rng.percent(40) => (RSP, self.rng.below(64) as i64 * 8),
            None => (self.bases[0], self.displacement(0, size)),
        };
        let mut displacement = displacement;
        ins.set_memory_index(Register::None);
        ins.set_memory_index_scale(1);
        let segment = matches!(ins.segment_prefix(), Register::FS | Register::GS);
        if !segment && self.rng.percent(8) {
            // As many constants of one page lie: at the same distance from the code in all runs.
            let displacement = self.displacement(0, size);
            let to = self.first_base(self.bases[0]).wrapping_add_signed(displacement);
            ins.set_memory_base(Register::RIP);
            ins.set_memory_displacement64(to);
            ins.set_memory_displ_size(8);
            let _ = self.patches(case, to.wrapping_sub(case.target.unwrap_or_default()));
            return;
        }
        match ins.segment_prefix() {
            Register::FS => displacement -= self.segment_bases[0] as i64,
            Register::GS => displacement -= self.segment_bases[1] as i64,
            _ => {}
        }
        let narrow = self.rng.percent(3) && number != RSP && displacement >= 0;
        ins.set_memory_base(if narrow { gpr32(number) } else { gpr64(number) });
        if self.rng.percent(10) && !narrow {
            self.index(ins, number);
        }
        ins.set_memory_displacement64(displacement as u64);
        ins.set_memory_displ_size(u32::from(displacement != 0));
        let from = case.target.unwrap_or_default();
        let to = self.first_base(number).wrapping_add_signed(displacement);
        // What it is to find there, it finds the first time.
        let _ = self.patches(case, to.wrapping_sub(from));
    }

    /// An index register with a small value.
    fn index(&mut self, ins: &mut Instruction, base: usize) {
        let register = self.rng.below(16) as usize;
        if register == base || register == RSP || self.protected & 1 << register != 0 {
            return;
        }
        let used = (0..ins.op_count()).any(|i| ins.op_register(i).full_register() == gpr64(register));
        if used {
            return;
        }
        let value = self.rng.below(32);
        self.load(register, value);
        ins.set_memory_index(gpr64(register));
        ins.set_memory_index_scale(1 << self.rng.below(4));
    }

    /// A displacement near others by the same base register, sometimes such that the access is on two pages, or beside the page.
    fn displacement(&mut self, base: usize, size: u64) -> i64 {
        let low = (self.low_bits[base] & (PAGE - 1)) as i64;
        let page = PAGE as i64;
        let cluster = self.clusters[base];
        let rng = &mut *self.rng;
        let displacement = match rng.below(100) {
            0..55 => cluster + rng.below(96) as i64,
            55..75 => rng.below(256) as i64 - 128,
            75..82 => page - low - rng.below(size + 1) as i64,
            82..86 => -low - rng.below(size + 1) as i64,
            86..95 => rng.below(PAGE) as i64 - low,
            _ => rng.below(2 * PAGE) as i64 - page,
        };
        let align = if size.is_power_of_two() && size <= 64 { size as i64 } else { 16 };
        // Vectors mostly where all instructions take them.
        if rng.percent(if size >= 16 { 85 } else { 40 }) {
            return ((low + displacement) & -align) - low;
        }
        displacement
    }

    /// Memory contents of a case, moved.
    fn patches(&mut self, case: &Case, by: u64) -> Option<()> {
        for (address, bytes) in &case.patches {
            let address = address.wrapping_add(by);
            if is_own(address) || is_own(address.wrapping_add(bytes.len() as u64)) {
                return None;
            }
            self.program.patches.push((address, bytes.clone()));
        }
        Some(())
    }

    /// Loads the vector that a gather or scatter takes its addresses from.
    fn load_index(&mut self, case: &Case) -> Option<()> {
        let index = case.instruction.memory_index();
        let value = case.machine.vectors.zmm[index.number()];
        let at = self.constant(&value)?;
        let memory = MemoryOperand::with_displ(at, 8);
        let ins = if case.instruction.encoding() == iced_x86::EncodingKind::EVEX {
            let register = Register::ZMM0 + index.number() as u32;
            Instruction::with2(Code::EVEX_Vmovdqu64_zmm_k1z_zmmm512, register, memory)
        } else {
            let register = Register::YMM0 + index.number() as u32;
            Instruction::with2(Code::VEX_Vmovdqu_ymm_ymmm256, register, memory)
        };
        self.push(Item::plain(ins.ok()?));
        Some(())
    }

    /// Puts bytes into the program's own page.
    pub(super) fn constant(&mut self, bytes: &[u8]) -> Option<u64> {
        let at = self.constants;
        self.constants += (bytes.len() as u64).next_multiple_of(8);
        if self.constants > COUNTERS {
            return None;
        }
        self.program.patches.push((at, bytes.to_vec()));
        Some(at)
    }
}

/// Whether its memory operand may as well have a base register alone: those of MOV with an absolute address have none.
fn has_base(ins: &Instruction) -> bool {
    !matches!(
        ins.code(),
        Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_RAX_moffs64
            | Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
            | Code::Mov_moffs64_RAX
    )
}
