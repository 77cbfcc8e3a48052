//! Stubs: host machine code that executes one guest instruction on the guest's registers.
//!
//! A stub is `extern "sysv64" fn(state: *mut CpuState, mem: *mut u8)`. It loads the registers that the
//! instruction reads from `CpuState` into the same-numbered host registers (general registers: into scratch
//! registers), executes the very instruction with its memory operand redirected to `[mem]`, stores what it
//! wrote. It uses no stack, and only the instruction itself may fault: where guest memory is absent the stub is left there
//! ([`crate::mmu::host`]). x87 and MMX registers are not touched: they live in the host's FPU ([`super::x87`]).

use std::cell::RefCell;
use std::collections::HashMap;
use std::mem::offset_of;
use std::ops::Range;

use iced_x86::{
    Code, CodeSize, Encoder, EncodingKind, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic,
    OpAccess, OpKind, Register, RflagsBits,
};

use super::arena::Arena;
use crate::code::lower::gpr;
use crate::state::CpuState;

/// Host registers that stand in for explicit general-register operands.
const SCRATCH: [Register; 4] = [Register::R8, Register::R9, Register::R10, Register::R11];
/// The argument registers of the stub.
const STATE: Register = Register::RDI;
const MEM: Register = Register::RSI;
/// The six status flags.
pub(crate) const STATUS: u32 =
    RflagsBits::CF | RflagsBits::PF | RflagsBits::AF | RflagsBits::ZF | RflagsBits::SF | RflagsBits::OF;

/// `movzx eax, word [rdi+status]` is followed by this: OF from bit 0 of AL (1 + 0x7f overflows), the rest by SAHF.
const STATUS_TO_FLAGS: [u8; 5] = [0x24, 0x01, 0x04, 0x7f, 0x9e]; // and al, 1; add al, 0x7f; sahf
/// `lahf; seto al`, the layout of [`crate::flags::Status`].
const FLAGS_TO_STATUS: [u8; 4] = [0x9f, 0x0f, 0x90, 0xc0];
const RET: [u8; 1] = [0xc3];
const VZEROUPPER: [u8; 3] = [0xc5, 0xf8, 0x77];

/// What lowering learns when it asks for a stub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stub {
    /// Address of the stub, to be called with [`crate::Cpu::call_stub`].
    At(u64),
    /// No room is left: everything has to be dropped first.
    Full,
    /// The host cannot encode this instruction, or gives us no executable memory.
    Impossible,
}

/// The stubs of one CPU, keyed by what they execute.
pub(crate) struct Stubs(RefCell<Inner>);

struct Inner {
    arena: Option<Arena>,
    known: HashMap<Key, u64>,
    /// What each stub executes, by its address.
    instructions: HashMap<u64, Instruction>,
    factory: InstructionInfoFactory,
}

/// Bytes of stubs at most, some 60 000 of them.
const ARENA: usize = 4 << 20;

impl Default for Stubs {
    fn default() -> Stubs {
        Stubs::with_room(ARENA)
    }
}

impl Stubs {
    /// No stubs yet, and room for `bytes` of them.
    pub(crate) fn with_room(bytes: usize) -> Stubs {
        let arena = Arena::new(bytes);
        if let Err(error) = &arena {
            tracing::error!("no executable memory, vector and x87 instructions will raise #UD: {error}");
        }
        let factory = InstructionInfoFactory::new();
        Stubs(RefCell::new(Inner {
            arena: arena.ok(),
            known: HashMap::new(),
            instructions: HashMap::new(),
            factory,
        }))
    }
}

/// The redirected instruction's bytes, and which guest registers the scratch registers stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    bytes: [u8; 15],
    length: u8,
    guest: [u8; 4],
}

impl Stubs {
    /// The stub for `ins`, built if it is new.
    pub(crate) fn get(&self, ins: &Instruction) -> Stub {
        let Ok(mut inner) = self.0.try_borrow_mut() else { return Stub::Impossible };
        inner.get(ins)
    }

    /// The instruction that the stub at `address` executes.
    pub(super) fn instruction(&self, address: u64) -> Option<Instruction> {
        self.0.try_borrow().ok()?.instructions.get(&address).copied()
    }

    /// Where stubs lie.
    pub(super) fn range(&self) -> Range<u64> {
        self.0.try_borrow().ok().and_then(|inner| Some(inner.arena.as_ref()?.range())).unwrap_or(0..0)
    }

    /// Forgets all stubs. No block may hold one any more.
    pub(crate) fn clear(&self) {
        if let Ok(mut inner) = self.0.try_borrow_mut() {
            inner.known.clear();
            inner.instructions.clear();
            if let Some(arena) = &mut inner.arena {
                arena.clear();
            }
        }
    }
}

impl Inner {
    fn get(&mut self, ins: &Instruction) -> Stub {
        let Some((host, guest)) = redirect(ins) else { return Stub::Impossible };
        let mut code = Emitter::new();
        let Some(()) = code.put(&host) else { return Stub::Impossible };
        let body = code.take();
        let mut key = Key { bytes: [0; 15], length: body.len() as u8, guest };
        let Some(bytes) = key.bytes.get_mut(..body.len()) else { return Stub::Impossible };
        bytes.copy_from_slice(&body);
        if let Some(&at) = self.known.get(&key) {
            return Stub::At(at);
        }
        let uses = Uses::of(&host, &mut self.factory);
        let Some(stub) = uses.wrap(&body, &guest) else { return Stub::Impossible };
        let Some(arena) = &mut self.arena else { return Stub::Impossible };
        let Some(at) = arena.add(&stub) else { return Stub::Full };
        self.known.insert(key, at);
        self.instructions.insert(at, host);
        Stub::At(at)
    }
}

/// The instruction as the host executes it in 64-bit mode: memory operand at `[rsi]`, general registers in
/// scratch registers. Also the guest register that each scratch register stands for (0xff: none).
fn redirect(ins: &Instruction) -> Option<(Instruction, [u8; 4])> {
    let mut host = *ins;
    let mut guest = [0xff; 4];
    host.set_code_size(CodeSize::Code64);
    host.set_ip(0);
    host.set_has_lock_prefix(false);
    host.set_has_rep_prefix(false);
    host.set_has_repne_prefix(false);
    host.set_segment_prefix(Register::None);
    for operand in 0..ins.op_count() {
        match ins.op_kind(operand) {
            OpKind::Memory => {
                host.set_memory_base(MEM);
                host.set_memory_index(Register::None);
                host.set_memory_index_scale(1);
                host.set_memory_displ_size(0);
                host.set_memory_displacement64(0);
            }
            OpKind::Register if is_explicit_gpr(ins, operand) => {
                let register = ins.op_register(operand);
                let slot = gpr(register);
                let at = guest.iter().position(|&g| g == slot || g == 0xff)?;
                guest[at] = slot;
                host.set_op_register(operand, resize(SCRATCH[at], register)?);
            }
            _ => {}
        }
    }
    Some((host, guest))
}

/// Whether the operand is a general register that the encoding chooses (FNSTSW AX has a fixed one).
fn is_explicit_gpr(ins: &Instruction, operand: u32) -> bool {
    ins.op_register(operand).is_gpr() && ins.mnemonic() != Mnemonic::Fnstsw
}

/// `scratch` at the width of `like`.
fn resize(scratch: Register, like: Register) -> Option<Register> {
    let first = match like.size() {
        8 => return Some(scratch),
        4 => Register::R8D,
        2 => Register::R8W,
        _ => return None,
    };
    Register::values().nth(first as usize + scratch.number() - Register::R8.number())
}

/// What an instruction reads and writes.
#[derive(Default)]
struct Uses {
    /// Bytes read of each vector register.
    vector_read: [u8; 32],
    vector_written: u32,
    k_read: u8,
    k_written: u8,
    /// General registers (host numbers).
    gpr_read: u16,
    /// Bytes written of each general register.
    gpr_written: [u8; 16],
    flags_read: bool,
    flags_written: bool,
    encoding: Option<EncodingKind>,
    /// A register wider than XMM below number 16 is touched.
    wide: bool,
}

impl Uses {
    fn of(host: &Instruction, factory: &mut InstructionInfoFactory) -> Uses {
        let mut uses = Uses { encoding: Some(host.encoding()), ..Uses::default() };
        let info = factory.info(host);
        for used in info.used_registers() {
            let (register, access) = (used.register(), used.access());
            let (read, written) = (reads(access), writes(access));
            let number = register.number();
            if register.is_vector_register() {
                if read {
                    let size = &mut uses.vector_read[number & 31];
                    *size = (*size).max(register.size() as u8);
                }
                if written {
                    uses.vector_written |= 1 << (number & 31);
                }
            } else if register.is_k() {
                uses.k_read |= u8::from(read) << (number & 7);
                uses.k_written |= u8::from(written) << (number & 7);
            } else if register.is_gpr() && register.full_register() != MEM {
                // iced numbers byte registers with AH, CH, DH and BH among them.
                let number = register.full_register().number();
                uses.gpr_read |= u16::from(read) << (number & 15);
                if written {
                    uses.gpr_written[number & 15] = register.size() as u8;
                }
            }
        }
        uses.keep_what_is_merged(host);
        let modified = host.rflags_modified() & STATUS;
        uses.flags_written = modified != 0;
        uses.flags_read = host.rflags_read() & STATUS != 0 || (modified != 0 && modified != STATUS);
        uses
    }

    /// Registers that keep a part of their old value have to be loaded: destinations of legacy instructions
    /// and of masked ones.
    fn keep_what_is_merged(&mut self, host: &Instruction) {
        let merges = host.encoding() == EncodingKind::Legacy || host.has_op_mask();
        let mut widest = 0;
        for operand in 0..host.op_count() {
            let register = host.op_register(operand);
            if host.op_kind(operand) == OpKind::Register && register.is_vector_register() {
                let (number, size) = (register.number() & 31, register.size() as u8);
                if number < 16 {
                    widest = widest.max(size);
                }
                if merges && self.vector_written & (1 << number) != 0 {
                    self.vector_read[number] = self.vector_read[number].max(size);
                }
            }
        }
        if merges {
            // Implicit ones, such as XMM0 of PCMPESTRM.
            for number in 0..32 {
                if self.vector_written & (1 << number) != 0 && self.vector_read[number] == 0 {
                    self.vector_read[number] = 16;
                }
            }
            self.k_read |= self.k_written;
        }
        self.wide = widest > 16;
    }

    /// The stub around `body`.
    fn wrap(&self, body: &[u8], guest: &[u8; 4]) -> Option<Vec<u8>> {
        let mut code = Emitter::new();
        if self.flags_read {
            code.load(Code::Movzx_r32_rm16, Register::EAX, offset_of!(CpuState, status))?;
            code.bytes(&STATUS_TO_FLAGS);
        }
        for number in (0..16).filter(|n| self.gpr_read & (1 << n) != 0) {
            let slot = guest_slot(number, guest)?;
            code.load(Code::Mov_r64_rm64, nth(Register::RAX, number), gpr_offset(slot))?;
        }
        for number in (0..8).filter(|n| self.k_read & (1 << n) != 0) {
            code.load(Code::VEX_Kmovq_kr_km64, nth(Register::K0, number), k_offset(number))?;
        }
        for number in 0..32 {
            self.load_vector(&mut code, number)?;
        }
        code.bytes(body);
        for number in 0..32 {
            self.store_vector(&mut code, number)?;
        }
        for number in (0..8).filter(|n| self.k_written & (1 << n) != 0) {
            code.store(Code::VEX_Kmovq_m64_kr, nth(Register::K0, number), k_offset(number))?;
        }
        for number in 0..16 {
            let slot = || guest_slot(number, guest);
            match self.gpr_written[number] {
                0 => {}
                2 => code.store(Code::Mov_rm16_r16, nth(Register::AX, number), gpr_offset(slot()?))?,
                _ => code.store(Code::Mov_rm64_r64, nth(Register::RAX, number), gpr_offset(slot()?))?,
            }
        }
        if self.flags_written {
            code.bytes(&FLAGS_TO_STATUS);
            code.store(Code::Mov_rm16_r16, Register::AX, offset_of!(CpuState, status))?;
        }
        if self.wide {
            code.bytes(&VZEROUPPER);
        }
        code.bytes(&RET);
        Some(code.take())
    }

    fn load_vector(&self, code: &mut Emitter, number: usize) -> Option<()> {
        let (form, first) = match (self.encoding?, self.vector_read[number]) {
            (_, 0) => return Some(()),
            (EncodingKind::Legacy, _) => (Code::Movaps_xmm_xmmm128, Register::XMM0),
            (EncodingKind::VEX, 16) => (Code::VEX_Vmovups_xmm_xmmm128, Register::XMM0),
            (EncodingKind::VEX, _) => (Code::VEX_Vmovups_ymm_ymmm256, Register::YMM0),
            (EncodingKind::EVEX, 16) => (Code::EVEX_Vmovups_xmm_k1z_xmmm128, Register::XMM0),
            (EncodingKind::EVEX, 32) => (Code::EVEX_Vmovups_ymm_k1z_ymmm256, Register::YMM0),
            (EncodingKind::EVEX, _) => (Code::EVEX_Vmovups_zmm_k1z_zmmm512, Register::ZMM0),
            _ => return None,
        };
        code.load(form, nth(first, number), zmm_offset(number))
    }

    /// Legacy instructions leave everything above bit 127 alone; VEX and EVEX ones zero what they do not write.
    fn store_vector(&self, code: &mut Emitter, number: usize) -> Option<()> {
        if self.vector_written & (1 << number) == 0 {
            return Some(());
        }
        let at = zmm_offset(number);
        match self.encoding? {
            EncodingKind::Legacy => code.store(Code::Movaps_xmmm128_xmm, nth(Register::XMM0, number), at),
            EncodingKind::EVEX => {
                code.store(Code::EVEX_Vmovups_zmmm512_k1z_zmm, nth(Register::ZMM0, number), at)
            }
            EncodingKind::VEX => {
                code.store(Code::VEX_Vmovups_ymmm256_ymm, nth(Register::YMM0, number), at)?;
                // The register has been stored: it can serve to zero the upper half.
                let xmm = nth(Register::XMM0, number);
                code.put(&Instruction::with3(Code::VEX_Vpxor_xmm_xmm_xmmm128, xmm, xmm, xmm).ok()?)?;
                code.store(Code::VEX_Vmovups_ymmm256_ymm, nth(Register::YMM0, number), at + 32)
            }
            _ => None,
        }
    }
}

fn reads(access: OpAccess) -> bool {
    matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

pub(crate) fn writes(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

/// The guest register that host register `number` holds: what the table says, or itself where the instruction
/// has it fixed (EAX, ECX, EDX).
fn guest_slot(number: usize, guest: &[u8; 4]) -> Option<u8> {
    match number {
        8..=11 => Some(guest[number - 8]).filter(|&slot| slot < 16),
        0..=2 => Some(number as u8),
        _ => None,
    }
}

/// The register `number` places after `first`.
pub(crate) fn nth(first: Register, number: usize) -> Register {
    Register::values().nth(first as usize + number).unwrap_or(first)
}

fn gpr_offset(slot: u8) -> usize {
    offset_of!(CpuState, regs) + 8 * usize::from(slot)
}
fn k_offset(number: usize) -> usize {
    offset_of!(CpuState, k) + 8 * number
}
fn zmm_offset(number: usize) -> usize {
    offset_of!(CpuState, zmm) + 64 * number
}

/// Collects host machine code.
struct Emitter(Encoder);

impl Emitter {
    fn new() -> Emitter {
        Emitter(Encoder::new(64))
    }
    fn put(&mut self, ins: &Instruction) -> Option<()> {
        self.0.encode(ins, 0).ok().map(|_| ())
    }
    fn bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0.write_u8(byte);
        }
    }
    fn load(&mut self, code: Code, register: Register, offset: usize) -> Option<()> {
        self.put(&Instruction::with2(code, register, at_state(offset)).ok()?)
    }
    fn store(&mut self, code: Code, register: Register, offset: usize) -> Option<()> {
        self.put(&Instruction::with2(code, at_state(offset), register).ok()?)
    }
    fn take(&mut self) -> Vec<u8> {
        self.0.take_buffer()
    }
}

fn at_state(offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(STATE, offset as i64)
}
