//! Makes test cases: an encodable instruction of a given form with random operands, and the state it starts from.

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, Instruction, MemorySize, Mnemonic, OpCodeInfo,
    OpCodeOperandKind as Kind, OpKind, Register, RoundingControl,
};

use crate::address;
use crate::capabilities::Capabilities;
use crate::host::SETTABLE_FLAGS;
use crate::layout::{CODE, CODE_SIZE, PAGE};
use crate::machine::Machine;
use crate::rng::{Rng, mix};
use crate::special;
use crate::values;

/// A test case.
#[derive(Clone, Debug)]
pub struct Case {
    /// The decoded instruction.
    pub instruction: Instruction,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The state it starts from.
    pub machine: Machine,
    /// Memory contents that differ from the initial contents.
    pub patches: Vec<(u64, Vec<u8>)>,
    /// Linear address of the memory operand, if there is one.
    pub target: Option<u64>,
    /// The guest steps instead of running a block.
    pub stepping: bool,
    /// On the host, the way back lies behind the instruction (else only filler does).
    pub direct_return: bool,
}

impl Case {
    /// Whether the instruction has one of these legacy prefixes.
    pub fn has_prefix(&self, wanted: &[u8]) -> bool {
        const PREFIXES: [u8; 11] = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3];
        self.bytes.iter().take_while(|byte| PREFIXES.contains(byte)).any(|byte| wanted.contains(byte))
    }
}

/// A case in the making.
pub(crate) struct Draft<'a> {
    pub(crate) rng: &'a mut Rng,
    pub(crate) op: &'static OpCodeInfo,
    pub(crate) ins: Instruction,
    pub(crate) machine: Machine,
    pub(crate) patches: Vec<(u64, Vec<u8>)>,
    /// What vector elements are taken for.
    pub(crate) kind: values::Kind,
    /// General registers whose value the memory operand needs, as a bit mask.
    pub(crate) address_registers: u16,
    /// What it is for.
    pub(crate) host: Capabilities,
    /// Linear address of the memory operand, if there is one.
    pub(crate) target: Option<u64>,
    /// It cannot be compared on this host: another one is to be made.
    pub(crate) unsuited: bool,
}

/// Makes cases.
pub struct Generator {
    encoder: Encoder,
    host: Capabilities,
}

impl std::fmt::Debug for Generator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator").field("host", &self.host).finish_non_exhaustive()
    }
}

/// Attempts to encode a form with random operands before it counts as not encodable.
const ATTEMPTS: usize = 60;

impl Generator {
    /// A generator of cases that start from what `host` has.
    pub fn new(host: Capabilities) -> Generator {
        Generator { encoder: Encoder::new(64), host }
    }

    /// Case `number` of `code` under `seed`: always the same. `None` if the form cannot be encoded such that it
    /// decodes to itself.
    pub fn case(&mut self, code: Code, seed: u64, number: u64) -> Option<Case> {
        let mut rng = Rng::new(mix(mix(seed) ^ (code as u64) << 40 ^ number));
        (0..ATTEMPTS).find_map(|_| self.attempt(code, &mut rng))
    }

    fn attempt(&mut self, code: Code, rng: &mut Rng) -> Option<Case> {
        let mut draft = Draft::new(code, rng, self.host);
        draft.machine.rip = start_address(draft.rng, draft.branches());
        draft.prefixes();
        draft.operands();
        special::fix_up(&mut draft);
        let Draft { ins, mut machine, patches, target, rng, unsuited, .. } = draft;
        if unsuited {
            return None;
        }
        self.host.limit(&mut machine);

        self.encoder.set_vex_wig(rng.below(2) as u32);
        self.encoder.set_evex_wig(rng.below(2) as u32);
        self.encoder.set_vex_lig(rng.below(2) as u32);
        self.encoder.set_evex_lig(rng.below(4) as u32);
        self.encoder.set_prevent_vex2(rng.percent(20));
        self.encoder.encode(&ins, machine.rip).ok()?;
        let plain = self.encoder.take_buffer();
        let plain_length = plain.len();
        let mut bytes = plain.clone();
        if rng.percent(12) {
            bytes.insert(0, redundant_prefix(rng, &ins));
        }
        let instruction = decode(&bytes, machine.rip, code).or_else(|| {
            bytes = plain;
            decode(&bytes, machine.rip, code)
        })?;
        // A single byte of filler at the very end: decoders differ in whether they fetch beyond it.
        let last_byte = machine.rip + bytes.len() as u64 == CODE + CODE_SIZE - 1;
        if bytes.len() > 15 || last_byte || !lands_outside(&instruction, machine.rip) {
            return None;
        }
        // What is relative to the next instruction moves with it.
        let moved = if instruction.is_ip_rel_memory_operand() { bytes.len() - plain_length } else { 0 };
        let target = target.map(|target| target + moved as u64);
        let direct_return = rng.percent(90);
        let stepping = rng.percent(10);
        Some(Case { instruction, bytes, machine, patches, target, stepping, direct_return })
    }
}

/// Decodes `bytes`, if they are an instruction of form `code` and nothing else.
fn decode(bytes: &[u8], rip: u64, code: Code) -> Option<Instruction> {
    let mut decoder = Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (instruction.code() == code && instruction.len() == bytes.len()).then_some(instruction)
}

/// A near branch must not land in the instruction itself or in the way back behind it.
fn lands_outside(instruction: &Instruction, rip: u64) -> bool {
    if !instruction.op_kinds().any(|k| k == OpKind::NearBranch64) {
        return true;
    }
    let target = instruction.near_branch64();
    !(rip..instruction.next_ip() + 8).contains(&target)
}

/// A prefix that the instruction does not need.
fn redundant_prefix(rng: &mut Rng, ins: &Instruction) -> u8 {
    // F2 and F3 would start lock elision on a processor that has it.
    let elision = ins.has_lock_prefix() || matches!(ins.mnemonic(), Mnemonic::Xchg | Mnemonic::Mov);
    let choice: &[u8] =
        if elision { &[0x26, 0x2e, 0x36, 0x3e, 0x66] } else { &[0x26, 0x2e, 0x36, 0x3e, 0x66, 0xf2, 0xf3] };
    rng.pick(choice)
}

fn start_address(rng: &mut Rng, branches: bool) -> u64 {
    match rng.below(100) {
        _ if branches => CODE + rng.range(0x400, CODE_SIZE - 0x400),
        0..8 => CODE + PAGE - rng.range(1, 15),
        8..13 => CODE + CODE_SIZE - rng.range(1, 20),
        _ => CODE + rng.range(0, CODE_SIZE - 32),
    }
}

impl<'a> Draft<'a> {
    fn new(code: Code, rng: &'a mut Rng, host: Capabilities) -> Draft<'a> {
        let op = code.op_code();
        let mut ins = Instruction::default();
        ins.set_code(code);
        let kind = element_kind(rng, op);
        let machine = initial_state(rng, kind, op, host.fsgsbase);
        Draft {
            rng,
            op,
            ins,
            machine,
            patches: Vec::new(),
            kind,
            address_registers: 0,
            host,
            unsuited: false,
            target: None,
        }
    }

    fn branches(&self) -> bool {
        self.op.op_kinds().iter().any(|k| matches!(k, Kind::br64_1 | Kind::br64_4))
    }

    /// LOCK, REP, masking: what is not an operand.
    fn prefixes(&mut self) {
        let op = self.op;
        if op.can_use_rep_prefix() && self.rng.percent(50) {
            self.ins.set_has_rep_prefix(true);
        } else if op.can_use_repne_prefix() && self.rng.percent(60) {
            self.ins.set_has_repne_prefix(true);
        }
        if op.can_use_op_mask_register() && (op.require_op_mask_register() || self.rng.percent(60)) {
            self.ins.set_op_mask(Register::K1 + self.rng.below(7) as u32);
            if op.can_use_zeroing_masking() && self.rng.percent(40) {
                self.ins.set_zeroing_masking(true);
            }
        }
    }

    fn operands(&mut self) {
        for (i, kind) in (0..).zip(self.op.op_kinds()) {
            self.operand(i, *kind);
        }
        let memory = self.ins.op_kinds().any(|k| k == OpKind::Memory);
        let registers_only = !memory;
        if registers_only && self.op.can_use_rounding_control() && self.rng.percent(40) {
            let modes = [
                RoundingControl::RoundToNearest,
                RoundingControl::RoundDown,
                RoundingControl::RoundUp,
                RoundingControl::RoundTowardZero,
            ];
            self.ins.set_rounding_control(self.rng.pick(&modes));
        } else if registers_only && self.op.can_suppress_all_exceptions() && self.rng.percent(40) {
            self.ins.set_suppress_all_exceptions(true);
        }
    }

    fn operand(&mut self, i: u32, kind: Kind) {
        use Kind::*;
        let or_memory = self.rng.percent(60);
        match kind {
            mem | mem_mib | mem_mpx | sibmem => address::memory(self, i),
            mem_offs => address::absolute(self, i),
            mem_vsib32x | mem_vsib64x => address::vector_indexed(self, i, Register::XMM0),
            mem_vsib32y | mem_vsib64y => address::vector_indexed(self, i, Register::YMM0),
            mem_vsib32z | mem_vsib64z => address::vector_indexed(self, i, Register::ZMM0),
            r8_or_mem | r16_or_mem | r32_or_mem | r32_or_mem_mpx | r64_or_mem | r64_or_mem_mpx
            | mm_or_mem | xmm_or_mem | ymm_or_mem | zmm_or_mem | bnd_or_mem_mpx | k_or_mem
                if or_memory =>
            {
                address::memory(self, i);
            }
            seg_rSI | es_rDI | seg_rDI => address::string(self, i, kind),
            seg_rBX_al => address::table_lookup(self, i),
            imm4_m2z | imm8 | imm8_const_1 | imm8sex16 | imm8sex32 | imm8sex64 | imm16 | imm32
            | imm32sex64 | imm64 => self.immediate(i, kind),
            br16_1 | br32_1 | br64_1 | br16_2 | br32_4 | br64_4 => self.branch(i, kind),
            _ => self.register(i, kind),
        }
    }

    fn register(&mut self, i: u32, kind: Kind) {
        use Kind::*;
        let vector_count = if self.op.encoding() == iced_x86::EncodingKind::EVEX { 32 } else { 16 };
        let (first, count) = match kind {
            r8_or_mem | r8_reg | r8_opcode => (Register::AL, 20),
            r16_or_mem | r16_reg | r16_reg_mem | r16_rm | r16_opcode => (Register::AX, 16),
            r32_or_mem | r32_or_mem_mpx | r32_reg | r32_reg_mem | r32_rm | r32_opcode | r32_vvvv => {
                (Register::EAX, 16)
            }
            r64_or_mem | r64_or_mem_mpx | r64_reg | r64_reg_mem | r64_rm | r64_opcode | r64_vvvv => {
                (Register::RAX, 16)
            }
            seg_reg => (Register::ES, 6),
            k_or_mem | k_reg | k_rm | k_vvvv => (Register::K0, 8),
            kp1_reg => (Register::K0, 8),
            mm_or_mem | mm_reg | mm_rm => (Register::MM0, 8),
            xmm_or_mem | xmm_reg | xmm_rm | xmm_vvvv | xmm_is4 | xmm_is5 | xmmp3_vvvv => {
                (Register::XMM0, vector_count)
            }
            ymm_or_mem | ymm_reg | ymm_rm | ymm_vvvv | ymm_is4 | ymm_is5 => (Register::YMM0, vector_count),
            zmm_or_mem | zmm_reg | zmm_rm | zmm_vvvv | zmmp3_vvvv => (Register::ZMM0, vector_count),
            tmm_reg | tmm_rm | tmm_vvvv => (Register::TMM0, 8),
            bnd_reg | bnd_or_mem_mpx => (Register::BND0, 4),
            cr_reg => (Register::CR0, 16),
            dr_reg => (Register::DR0, 8),
            tr_reg => (Register::TR0, 8),
            sti_opcode => (Register::ST0, 8),
            st0 => (Register::ST0, 1),
            es => (Register::ES, 1),
            cs => (Register::CS, 1),
            ss => (Register::SS, 1),
            ds => (Register::DS, 1),
            fs => (Register::FS, 1),
            gs => (Register::GS, 1),
            al => (Register::AL, 1),
            cl => (Register::CL, 1),
            ax => (Register::AX, 1),
            dx => (Register::DX, 1),
            eax => (Register::EAX, 1),
            rax => (Register::RAX, 1),
            _ => (Register::None, 1),
        };
        self.ins.set_op_kind(i, OpKind::Register);
        self.ins.set_op_register(i, first + self.rng.below(count) as u32);
    }

    fn immediate(&mut self, i: u32, kind: Kind) {
        let value = values::integer(self.rng);
        let second = i > 0 && matches!(self.op.op_kind(i - 1), Kind::imm16 | Kind::imm8);
        let (kind, value) = match kind {
            Kind::imm8 if second => (OpKind::Immediate8_2nd, value & 0xff),
            Kind::imm4_m2z => (OpKind::Immediate8, value & 3),
            Kind::imm8_const_1 => (OpKind::Immediate8, 1),
            Kind::imm8 => (OpKind::Immediate8, value & 0xff),
            Kind::imm8sex16 => (OpKind::Immediate8to16, value as i8 as i64 as u64),
            Kind::imm8sex32 => (OpKind::Immediate8to32, value as i8 as i64 as u64),
            Kind::imm8sex64 => (OpKind::Immediate8to64, value as i8 as i64 as u64),
            Kind::imm16 => (OpKind::Immediate16, value & 0xffff),
            Kind::imm32 => (OpKind::Immediate32, value & 0xffff_ffff),
            Kind::imm32sex64 => (OpKind::Immediate32to64, value as i32 as i64 as u64),
            _ => (OpKind::Immediate64, value),
        };
        self.ins.set_op_kind(i, kind);
        self.ins.set_immediate_u64(i, value);
    }

    fn branch(&mut self, i: u32, kind: Kind) {
        let rip = self.machine.rip;
        let near = match self.rng.below(2) {
            0 => rip + self.rng.range(28, 120),
            _ => rip - self.rng.range(1, 110),
        };
        let target = match kind {
            Kind::br64_4 => match self.rng.below(10) {
                0 => rip.wrapping_add(self.rng.range(0, 0x8000) << 12).wrapping_sub(self.rng.below(1 << 24)),
                1 => CODE + CODE_SIZE + self.rng.below(PAGE),
                2..=4 => near,
                _ => self.branch_target(),
            },
            _ => near,
        };
        self.ins.set_op_kind(i, OpKind::NearBranch64);
        self.ins.set_near_branch64(target);
    }

    /// An address of filler in the code window, not in or right behind the instruction.
    pub(crate) fn branch_target(&mut self) -> u64 {
        let rip = self.machine.rip;
        loop {
            let target = CODE + self.rng.below(CODE_SIZE - 1);
            if !(rip..rip + 32).contains(&target) {
                return target;
            }
        }
    }

    /// As [`Draft::branch_target`], or sometimes an address where nothing is mapped or that is not canonical.
    pub(crate) fn indirect_target(&mut self) -> u64 {
        match self.rng.below(20) {
            0 => CODE + CODE_SIZE + self.rng.below(PAGE),
            1 => self.branch_target() | 1 << self.rng.range(47, 63),
            _ => self.branch_target(),
        }
    }

    /// Size and element kind of the memory operand.
    pub(crate) fn memory_size(&self) -> MemorySize {
        if self.ins.is_broadcast() { self.op.broadcast_memory_size() } else { self.op.memory_size() }
    }

    /// Sets memory contents.
    pub(crate) fn patch(&mut self, address: u64, bytes: &[u8]) {
        self.patches.push((address, bytes.to_vec()));
    }

    /// Whether the memory operand depends on general register `number`.
    pub(crate) fn addresses_with(&self, number: usize) -> bool {
        self.address_registers & (1 << number) != 0
    }

    /// Sets a general register unless the memory operand depends on it.
    pub(crate) fn set_free(&mut self, number: usize, value: u64) {
        if !self.addresses_with(number) {
            self.machine.gpr[number] = value;
        }
    }
}

/// What the elements of this form's vector operands are.
fn element_kind(rng: &mut Rng, op: &OpCodeInfo) -> values::Kind {
    use values::Kind;
    if rng.percent(10) {
        return rng.pick(&[Kind::Integer, Kind::Float32, Kind::Float64, Kind::Float16]);
    }
    let by_memory = Kind::of(op.memory_size()).filter(|k| *k != Kind::Integer);
    let name = op.instruction_string();
    let mnemonic = name.split(' ').next().unwrap_or("");
    by_memory.unwrap_or(match mnemonic {
        m if m.starts_with('F') => Kind::Float80,
        m if m.ends_with("PS") || m.ends_with("SS") || m.contains("PS2") || m.contains("SS2") => {
            Kind::Float32
        }
        m if m.ends_with("PD") || m.ends_with("SD") || m.contains("PD2") || m.contains("SD2") => {
            Kind::Float64
        }
        m if m.contains("PH") => Kind::Float16,
        _ => Kind::Integer,
    })
}

fn initial_state(rng: &mut Rng, kind: values::Kind, op: &OpCodeInfo, fsgsbase: bool) -> Machine {
    let mut m = Machine::default();
    for value in &mut m.gpr {
        *value = values::integer(rng);
    }
    if rng.percent(20) {
        m.gpr[rng.below(16) as usize] = m.gpr[rng.below(16) as usize];
    }
    m.gpr[4] = address::stack_pointer(rng);
    m.rflags = (rng.next() & 0x8d5) | 2;
    for (percent, bit) in [(15, 1 << 10), (3, 1 << 18), (5, 1 << 21), (2, 1 << 14)] {
        if rng.percent(percent) {
            m.rflags |= bit & SETTABLE_FLAGS;
        }
    }
    if fsgsbase {
        m.fs_base = rng.next() >> 17;
        m.gs_base = rng.below(1 << 28);
    }
    vectors(rng, kind, &mut m);
    x87(rng, op, &mut m);
    m
}

fn vectors(rng: &mut Rng, kind: values::Kind, m: &mut Machine) {
    let v = &mut m.vectors;
    for i in 0..32 {
        let mut register = [0; 64];
        if i > 0 && rng.percent(10) {
            register = v.zmm[rng.below(i) as usize];
        } else {
            values::fill(rng, kind, &mut register);
        }
        v.zmm[i as usize] = register;
    }
    for k in &mut v.k {
        *k = match rng.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => rng.next() & rng.next() & rng.next(),
            _ => rng.next(),
        };
    }
    v.mxcsr = 0x1f80;
    if rng.percent(50) {
        v.mxcsr |= (rng.below(4) << 13) as u32; // RC
    }
    if rng.percent(20) {
        v.mxcsr |= rng.pick(&[1 << 15, 1 << 6, 1 << 15 | 1 << 6]); // FTZ, DAZ
    }
    if rng.percent(15) {
        v.mxcsr |= rng.below(64) as u32; // sticky flags
    }
    // Unmasked exceptions: often one alone, so that those of higher priority do not hide it.
    let floating = matches!(kind, values::Kind::Float16 | values::Kind::Float32 | values::Kind::Float64);
    if rng.percent(if floating { 45 } else { 10 }) {
        let unmasked = if rng.percent(50) { 1 << rng.below(6) } else { rng.below(64) as u32 };
        v.mxcsr &= !(unmasked << 7);
    }
}

fn x87(rng: &mut Rng, op: &OpCodeInfo, m: &mut Machine) {
    let v = &mut m.vectors;
    let fpu = op.code().cpuid_features().iter().any(|f| format!("{f:?}").starts_with("FPU"));
    v.fcw = 0x37f;
    if rng.percent(50) {
        v.fcw = (v.fcw & !0xf00) | (rng.pick(&[0, 2, 3, 3]) << 8) | (rng.below(4) as u16) << 10;
    }
    if fpu && rng.percent(15) {
        v.fcw &= !(rng.below(64) as u16);
    }
    let top = if rng.percent(50) { 0 } else { rng.below(8) as u16 };
    v.fsw = (rng.next() as u16 & 0x4700) | top << 11;
    if rng.percent(if fpu { 15 } else { 4 }) {
        v.fsw |= rng.below(64) as u16 | if rng.percent(30) { 0x41 } else { 0 };
    }
    if rng.percent(2) {
        v.fcw &= !1;
        v.fsw |= 1;
    }
    if v.fsw & !v.fcw & 0x3f != 0 {
        v.fsw |= 0x8080;
    }
    v.ftw = match rng.below(10) {
        0..=4 => 0xff,
        5 => 0,
        _ => rng.next() as u8,
    };
    v.fop = rng.next() as u16 & 0x7ff;
    (v.fip, v.fdp) = (rng.next() >> 17, rng.next() >> 17);
    // No number of its own, so that cases are the same on hosts without protection keys. Key 0 is everything's.
    v.pkru = v.fip as u32 & !3;
    for st in &mut v.st {
        *st = values::float80(rng);
    }
}

#[cfg(test)]
mod tests {
    use silicon::model::CpuModel;

    use super::*;
    use crate::forms::{self, Class};

    #[test]
    fn every_form_that_is_compared_can_be_made() {
        let mut generator = Generator::new(Capabilities::all());
        for form in forms::all(&CpuModel::parse("max").expect("a model").features()) {
            if matches!(form.class, Class::Compared | Class::FaultCompared) {
                let case = generator.case(form.code, 1, 0).unwrap_or_else(|| panic!("{:?}", form.code));
                assert_eq!(case.instruction.code(), form.code);
            }
        }
    }

    #[test]
    fn a_case_is_a_function_of_its_numbers() {
        let code = Code::VEX_Vaddps_ymm_ymm_ymmm256;
        let case =
            |seed, number| Generator::new(Capabilities::all()).case(code, seed, number).expect("encodable");
        let (first, again) = (case(5, 9), case(5, 9));
        assert_eq!((&first.bytes, &first.machine), (&again.bytes, &again.machine));
        assert_ne!(first.machine, case(5, 10).machine);
        assert_ne!(first.machine, case(6, 9).machine);
    }

    #[test]
    fn branches_land_on_filler() {
        let mut generator = Generator::new(Capabilities::all());
        for number in 0..500 {
            let case = generator.case(Code::Jne_rel8_64, 1, number).expect("encodable");
            let end = case.machine.rip + case.bytes.len() as u64;
            let target = case.instruction.near_branch64();
            assert!(!(case.machine.rip..end).contains(&target));
        }
    }
}
