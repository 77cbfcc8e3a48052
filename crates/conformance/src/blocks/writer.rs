//! Writes programs: draws instructions, and puts branches between them.
//!
//! All programs end. Branches lead forwards, but for those of loops, whose counts nothing else in the program writes, and into
//! which no branch leads; functions call only those behind them.

use iced_x86::{Code, Encoder, Instruction, InstructionInfoFactory, Mnemonic, Register};

use super::forms::Forms;
use super::operands::{CONSTANTS, RSP, gpr32, gpr64};
use super::program::{Item, Label, Program};
use super::undefined::{self, Kind};
use crate::capabilities::Capabilities;
use crate::generate::{Case, Generator};
use crate::layout::{CODE, CODE_SIZE, DATA, PAGE, WRITABLE};
use crate::rng::{Rng, mix};

/// Base registers of a program.
pub(super) const BASE_COUNT: usize = 2;
/// Random instructions of a program at most.
const LONGEST: u64 = 40;
/// Bytes of a program at most, about.
const ITEMS: usize = 220;
/// Runs of a program, and those of them that go well, mostly.
const RUNS: usize = 5;
const CALM_RUNS: usize = 2;
/// Attempts to find an instruction that suits.
const ATTEMPTS: usize = 12;

/// RFLAGS.AF.
const AF: u64 = 1 << 4;

/// Makes programs.
#[derive(Debug)]
pub struct Programs {
    generator: Generator,
    forms: Forms,
}

impl Programs {
    /// Programs of these forms that start from what `host` has.
    pub fn new(host: Capabilities, forms: Forms) -> Programs {
        Programs { generator: Generator::new(host), forms }
    }

    /// Program `number` under `seed`: always the same.
    pub fn program(&mut self, seed: u64, number: u64) -> Program {
        (0..)
            .find_map(|attempt| self.attempt(mix(mix(seed ^ 0x62_6c6f_636b) ^ number << 8 ^ attempt)))
            .unwrap_or_else(|| unreachable!())
    }

    fn attempt(&mut self, seed: u64) -> Option<Program> {
        let mut rng = Rng::new(seed);
        let mut writer = Writer::new(&mut rng, &mut self.generator, &self.forms);
        writer.write();
        let mut program = writer.finish();
        let room = CODE_SIZE - program.assemble()?.bytes.len().min(0x1fff) as u64;
        program.start = match rng.below(4) {
            // On two pages.
            0 => CODE + PAGE - rng.below(200),
            _ => CODE + rng.below(room),
        };
        // A byte of filler at the very end: processors differ in whether they fetch beyond it.
        (program.assemble()?.end() <= CODE + CODE_SIZE - 8).then_some(())?;
        undefined::Undefined::of(&program)?;
        Some(program)
    }
}

/// A program in the making.
pub(super) struct Writer<'a> {
    pub(super) rng: &'a mut Rng,
    generator: &'a mut Generator,
    forms: &'a Forms,
    mixture: Vec<usize>,
    pub(super) info: InstructionInfoFactory,
    encoder: Encoder,
    pub(super) program: Program,
    /// Registers that point to memory, with the bits that they have in all runs, and where their operands gather.
    pub(super) bases: Vec<usize>,
    pub(super) low_bits: Vec<u64>,
    pub(super) clusters: Vec<i64>,
    /// FS and GS bases.
    pub(super) segment_bases: [u64; 2],
    /// Registers that drawn instructions do not write, as a bit mask: bases and counters of loops.
    pub(super) protected: u16,
    counters: Vec<usize>,
    /// There are calls: but for pushes, only they and returns write RSP.
    pub(super) calls: bool,
    /// The stack has to be what it was: no drawn instruction writes RSP.
    pub(super) balanced: bool,
    /// Flags that are undefined here, and x87 condition codes that are anywhere.
    flags: u64,
    /// By label: flags that are undefined by the branches that lead there.
    flags_at: Vec<u64>,
    conditions: u16,
    reads_conditions: bool,
    /// Where the program's next constant goes.
    pub(super) constants: u64,
    functions: Vec<Label>,
    /// Labels of enclosing scopes, to which branches out of them may lead.
    outer: Vec<Label>,
    left: u64,
}

impl<'a> Writer<'a> {
    fn new(rng: &'a mut Rng, generator: &'a mut Generator, forms: &'a Forms) -> Writer<'a> {
        let mixture = forms.mixture(rng);
        let mut free: Vec<usize> = (0..16).filter(|number| *number != RSP).collect();
        let mut take = |rng: &mut Rng| free.swap_remove(rng.below(free.len() as u64) as usize);
        let bases: Vec<usize> = (0..BASE_COUNT).map(|_| take(rng)).collect();
        let counters: Vec<usize> = (0..2).map(|_| take(rng)).collect();
        let low_bits = bases.iter().map(|_| low_bits(rng)).collect();
        let clusters = bases.iter().map(|_| rng.below(512) as i64 - 256).collect();
        let protected = bases.iter().chain(&counters).fold(0, |all, number| all | 1 << number);
        let program = Program {
            start: CODE,
            items: Vec::new(),
            labels: Vec::new(),
            tables: Vec::new(),
            patches: Vec::new(),
            machines: Vec::new(),
        };
        let left = rng.range(1, LONGEST + 1);
        let calls = rng.percent(50);
        Writer {
            segment_bases: [rng.below(64) * 8, rng.below(0x1000)],
            rng,
            generator,
            forms,
            mixture,
            info: InstructionInfoFactory::new(),
            encoder: Encoder::new(64),
            program,
            bases,
            low_bits,
            clusters,
            protected,
            counters,
            calls,
            balanced: false,
            flags: 0,
            flags_at: Vec::new(),
            conditions: 0,
            reads_conditions: false,
            constants: CONSTANTS,
            functions: Vec::new(),
            outer: Vec::new(),
            left,
        }
    }

    /// The whole program: a loop, or not; then its functions.
    fn write(&mut self) {
        let length = self.left;
        let end = self.label();
        self.outer.push(end);
        if self.rng.percent(70) {
            let count = self.rng.range(2, 7);
            self.repeat(count, length, 0);
        } else {
            self.scope(length, 0);
        }
        if !self.functions.is_empty() {
            self.push(Item::to(branch(Code::Jmp_rel32_64), end));
        }
        let mut next = 0;
        while let Some(function) = self.functions.get(next).copied() {
            next += 1;
            self.function(function);
        }
        self.place(end);
    }

    fn function(&mut self, label: Label) {
        self.place(label);
        let outer = std::mem::take(&mut self.outer);
        self.balanced = true;
        let length = self.rng.range(1, 8);
        self.scope(length, 2);
        self.balanced = false;
        self.outer = outer;
        self.push(Item::plain(Instruction::with(Code::Retnq)));
    }

    fn finish(mut self) -> Program {
        for run in 0..RUNS {
            let machine = self.machine(run < CALM_RUNS);
            self.program.machines.push(machine);
        }
        self.program
    }

    /// So many random instructions, with branches between them.
    pub(super) fn scope(&mut self, length: u64, depth: usize) {
        let mut ahead: Vec<(Label, u64)> = Vec::new();
        let mut written = 0;
        while written < length && self.program.items.len() < ITEMS {
            written += 1;
            match self.rng.below(100) {
                0..14 => self.branch_ahead(&mut ahead),
                14..19 if depth < 2 && length - written > 1 => {
                    let inner = self.rng.range(1, (length - written).min(12) + 1);
                    let count = self.rng.range(1, 9);
                    self.repeat(count, inner, depth + 1);
                    written += inner;
                }
                19..25 if self.calls && (depth < 2 || self.functions.len() < 3) => self.call(),
                25..28 => self.indirect(&mut ahead),
                28..33 => self.move_base(),
                33..36 => self.pointer(),
                36..38 => self.set_flags(),
                38..39 => self.set_control(),
                _ => self.draw(),
            }
            for (label, left) in &mut ahead {
                *left = left.saturating_sub(1);
                if *left == 0 {
                    self.place(*label);
                }
            }
            ahead.retain(|(_, left)| *left != 0);
        }
        for (label, _) in ahead {
            self.place(label);
        }
    }

    /// One instruction of a random form.
    pub(super) fn draw(&mut self) {
        for _ in 0..ATTEMPTS {
            let code = self.forms.draw(self.rng, &self.mixture);
            let (seed, number) = (self.rng.next(), self.rng.next());
            let Some(case) = self.generator.case(code, seed, number) else { continue };
            if self.adapt(&case).is_some() {
                return;
            }
        }
    }

    /// Another label, not placed yet.
    pub(super) fn label(&mut self) -> Label {
        self.flags_at.push(0);
        self.program.labels.push(usize::MAX);
        self.program.labels.len() - 1
    }

    /// The label is here.
    pub(super) fn place(&mut self, label: Label) {
        self.flags |= self.flags_at[label];
        self.program.labels[label] = self.program.items.len();
    }

    /// The label, to which branches lead back, is here. All flags but AF are defined then.
    pub(super) fn place_top(&mut self, label: Label) {
        self.define_flags();
        self.place(label);
        self.flags = AF;
    }

    /// Adds an instruction. Undefined flags that it would see are defined before it.
    pub(super) fn push(&mut self, item: Item) {
        let ins = item.instruction;
        let kind = undefined::kind(&ins);
        if kind == Kind::Elsewhere || undefined::reads(&ins) & self.flags != 0 {
            self.define_flags();
        }
        self.flags = undefined::after(self.flags, &ins);
        if let Some(label) = item.target.filter(|_| kind != Kind::Next) {
            self.flags_at[label] |= self.flags;
        }
        self.conditions |= undefined::conditions(&ins);
        self.reads_conditions |= undefined::reads_conditions(&ins);
        self.program.items.push(item);
    }

    /// Adds an instruction made here.
    pub(super) fn add(&mut self, instruction: Result<Instruction, iced_x86::IcedError>) {
        if let Ok(instruction) = instruction {
            self.push(Item::plain(instruction));
        }
    }

    pub(super) fn define_flags(&mut self) {
        if self.flags == 0 {
            return;
        }
        self.flags = 0;
        let [one, other] = [0, 1].map(|_| self.rng.below(16) as usize);
        let comparison = match self.rng.below(3) {
            0 => Instruction::with2(Code::Cmp_r64_rm64, gpr64(one), gpr64(other)),
            1 => Instruction::with2(Code::Cmp_rm32_imm8, gpr32(one), self.rng.below(16) as i32),
            _ => Instruction::with2(Code::Cmp_r8_rm8, Register::AL, Register::CL),
        };
        self.add(comparison);
    }

    /// Whether the program would see x87 condition codes that are undefined.
    pub(super) fn sees_conditions(&self, ins: &Instruction) -> bool {
        let reads = self.reads_conditions || undefined::reads_conditions(ins);
        let leaves = self.conditions | undefined::conditions(ins);
        reads && leaves != 0
    }

    pub(super) fn decodes(&mut self, item: &Item) -> bool {
        item.decodes_to_itself(&mut self.encoder)
    }

    /// Whether an instruction may write these registers.
    pub(super) fn may_write(&self, ins: &Instruction, written: u16) -> bool {
        use Mnemonic::*;
        let pushes = matches!(ins.mnemonic(), Push | Pushfq | Pushf);
        let stack = pushes || !self.calls && matches!(ins.mnemonic(), Pop | Enter | Leave);
        let into_rsp = ins.op0_register().full_register() == Register::RSP && ins.mnemonic() != Push;
        let rsp = written & 1 << RSP == 0 || stack && !self.balanced && !into_rsp;
        rsp && written & !(1 << RSP) & self.protected == 0
    }

    /// `mov register, value`.
    pub(super) fn load(&mut self, register: usize, value: u64) {
        let load = match u32::try_from(value) {
            Ok(value) => Instruction::with2(Code::Mov_r32_imm32, gpr32(register), value),
            Err(_) => Instruction::with2(Code::Mov_r64_imm64, gpr64(register), value),
        };
        self.add(load);
    }

    /// The value of a base register in the first run.
    pub(super) fn first_base(&self, number: usize) -> u64 {
        let at = self.bases.iter().position(|base| *base == number);
        at.map_or(WRITABLE.start, |at| WRITABLE.start + PAGE + self.low_bits[at])
    }

    /// A register that may be written, not RSP.
    pub(super) fn free(&mut self) -> usize {
        loop {
            let number = self.rng.below(16) as usize;
            if number != RSP && self.protected & 1 << number == 0 {
                return number;
            }
        }
    }

    pub(super) fn counter(&self, depth: usize) -> Option<usize> {
        self.counters.get(depth).copied()
    }

    pub(super) fn outer_label(&mut self) -> Option<Label> {
        let outer = (!self.outer.is_empty()).then(|| self.rng.below(self.outer.len() as u64) as usize)?;
        Some(self.outer[outer])
    }

    pub(super) fn enter_scope(&mut self, label: Label) {
        self.outer.push(label);
    }

    pub(super) fn leave_scope(&mut self) -> Option<Label> {
        self.outer.pop()
    }

    /// A function to call, perhaps a new one.
    pub(super) fn callee(&mut self, in_function: bool) -> Label {
        let old = self.functions.len() as u64;
        if !in_function && old > 0 && (old > 2 || self.rng.percent(50)) {
            return self.functions[self.rng.below(old) as usize];
        }
        let label = self.label();
        self.functions.push(label);
        label
    }

    /// A case whose state is that of a run.
    pub(super) fn any_case(&mut self) -> Case {
        loop {
            let code = self.forms.draw(self.rng, &self.mixture);
            let (seed, number) = (self.rng.next(), self.rng.next());
            if let Some(case) = self.generator.case(code, seed, number) {
                return case;
            }
        }
    }
}

/// A branch without its target.
pub(super) fn branch(code: Code) -> Instruction {
    Instruction::with_branch(code, 0).unwrap_or_default()
}

/// Where in its page a base register points: mostly aligned as vectors are, often near an edge.
fn low_bits(rng: &mut Rng) -> u64 {
    let at = match rng.below(10) {
        0..=4 => rng.below(PAGE),
        5..=6 => PAGE - rng.below(128) - 1,
        _ => rng.below(128),
    };
    if rng.percent(80) { at & !63 } else { at }
}

/// Pages that base registers point to, by how often.
pub(super) fn base_page(rng: &mut Rng) -> u64 {
    match rng.below(20) {
        0..=9 => WRITABLE.start + PAGE * rng.below(3),
        10..=12 => WRITABLE.end - PAGE,
        13..=14 => WRITABLE.start,
        15..=16 => DATA + 5 * PAGE,
        _ => DATA + PAGE * rng.below(6),
    }
}
