//! Programs: instructions with labels, and their bytes.

use iced_x86::{Decoder, DecoderOptions, Encoder, Formatter, Instruction, IntelFormatter, OpKind};

use crate::layout::{CODE, CODE_SIZE};
use crate::machine::Machine;

/// Index into [`Program::labels`].
pub type Label = usize;

/// One instruction of a program.
#[derive(Clone, Debug)]
pub struct Item {
    /// The instruction. What it has relative to RIP it has as an address.
    pub instruction: Instruction,
    /// A prefix that it does not need.
    pub prefix: Option<u8>,
    /// Bits that an encoding leaves open.
    pub open: u8,
    /// The label whose address is the target of the branch, the address of LEA, or the immediate.
    pub target: Option<Label>,
    /// The branch has a displacement of one byte, if that reaches.
    pub short: bool,
}

impl Item {
    /// An instruction as it stands.
    pub fn plain(instruction: Instruction) -> Item {
        Item { instruction, prefix: None, open: 0, target: None, short: false }
    }

    /// An instruction that leads, or refers, to a label.
    pub fn to(instruction: Instruction, target: Label) -> Item {
        Item { target: Some(target), ..Item::plain(instruction) }
    }

    /// The bytes at `address`, with the label at `target`.
    fn encode(&self, encoder: &mut Encoder, address: u64, target: u64) -> Option<Vec<u8>> {
        let mut instruction = self.instruction;
        if self.target.is_some() {
            point(&mut instruction, target);
            if self.short {
                instruction.as_short_branch();
            }
        }
        encoder.set_vex_wig(u32::from(self.open & 1));
        encoder.set_evex_wig(u32::from(self.open & 1));
        encoder.set_vex_lig(u32::from(self.open >> 1 & 1));
        encoder.set_evex_lig(u32::from(self.open >> 1 & 3));
        encoder.set_prevent_vex2(self.open & 8 != 0);
        let prefix = u64::from(self.prefix.is_some());
        let encoded = encoder.encode(&instruction, address + prefix);
        let bytes: Vec<u8> = self.prefix.into_iter().chain(encoder.take_buffer()).collect();
        (encoded.is_ok() && bytes.len() <= 15).then_some(bytes)
    }

    /// Whether its bytes are this instruction and nothing else.
    pub fn decodes_to_itself(&self, encoder: &mut Encoder) -> bool {
        let Some(bytes) = self.encode(encoder, CODE, CODE) else { return false };
        let decoded = Decoder::with_ip(64, &bytes, CODE, DecoderOptions::NONE).decode();
        decoded.code() == self.instruction.code() && decoded.len() == bytes.len()
    }
}

/// Bytes of an instruction at most.
const LONGEST: u64 = 15;

/// Sets the address that the instruction leads or refers to.
fn point(instruction: &mut Instruction, target: u64) {
    if instruction.op0_kind() == OpKind::NearBranch64 {
        instruction.set_near_branch64(target);
    } else if instruction.is_ip_rel_memory_operand() {
        instruction.set_memory_displacement64(target);
    } else {
        instruction.set_immediate64(target);
    }
}

/// A program, and the states that it starts from, one for each of its runs.
#[derive(Clone, Debug)]
pub struct Program {
    /// Where it lies.
    pub start: u64,
    /// Its instructions. It ends behind the last.
    pub items: Vec<Item>,
    /// By label: the item that it is before.
    pub labels: Vec<usize>,
    /// Memory that holds addresses of labels.
    pub tables: Vec<(u64, Label)>,
    /// Other memory that differs from the initial contents.
    pub patches: Vec<(u64, Vec<u8>)>,
    /// Where its runs start from.
    pub machines: Vec<Machine>,
}

/// The bytes of a program.
#[derive(Clone, Debug)]
pub struct Assembled {
    /// All of them.
    pub bytes: Vec<u8>,
    /// Addresses of the items, and of the end.
    pub addresses: Vec<u64>,
}

impl Assembled {
    /// The item at this address; the number of items for the end.
    pub fn item_at(&self, address: u64) -> Option<usize> {
        self.addresses.iter().position(|at| *at == address)
    }

    /// Where the program ends.
    pub fn end(&self) -> u64 {
        self.addresses.last().copied().unwrap_or_default()
    }
}

impl Program {
    /// The program's bytes; `None` if a label cannot be reached, or there is no room.
    pub fn assemble(&mut self) -> Option<Assembled> {
        let mut encoder = Encoder::new(64);
        loop {
            let lengths = self.lengths(&mut encoder)?;
            let mut addresses = vec![self.start];
            for length in lengths {
                addresses.push(addresses[addresses.len() - 1] + length);
            }
            let mut bytes = Vec::new();
            let mut unreached = None;
            for (i, item) in self.items.iter().enumerate() {
                let target = item.target.map_or(0, |label| addresses[self.labels[label]]);
                match item.encode(&mut encoder, addresses[i], target) {
                    Some(encoded) => bytes.extend(encoded),
                    None => unreached = unreached.or(Some(i)),
                }
            }
            let assembled = Assembled { bytes, addresses };
            let Some(unreached) = unreached else {
                // What is behind it is fetched before the program is found to have ended.
                return (assembled.end() + LONGEST <= CODE + CODE_SIZE).then_some(assembled);
            };
            // A jump or a conditional branch has a longer form; LOOP has none.
            let item = &mut self.items[unreached];
            if !std::mem::take(&mut item.short) {
                return None;
            }
        }
    }

    /// How long each item is, wherever its label is.
    fn lengths(&self, encoder: &mut Encoder) -> Option<Vec<u64>> {
        let length = |item: &Item| Some(item.encode(encoder, self.start, self.start)?.len() as u64);
        self.items.iter().map(length).collect()
    }

    /// Takes an item out; labels before it are then before the next.
    pub fn remove(&mut self, item: usize) {
        self.items.remove(item);
        for label in self.labels.iter_mut().filter(|label| **label > item) {
            *label -= 1;
        }
    }

    /// One line for each instruction: address, bytes, and Intel's syntax.
    pub fn disassemble(&mut self) -> Vec<String> {
        let Some(assembled) = self.assemble() else { return vec!["cannot be encoded".into()] };
        let mut formatter = IntelFormatter::new();
        let decoder = Decoder::with_ip(64, &assembled.bytes, self.start, DecoderOptions::NONE);
        let line = |instruction: Instruction| {
            let mut text = String::new();
            formatter.format(&instruction, &mut text);
            let from = (instruction.ip() - self.start) as usize;
            let bytes = &assembled.bytes[from..from + instruction.len()];
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{:#x} {hex:<30} {text}", instruction.ip())
        };
        decoder.into_iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Code, Register};

    use super::*;

    fn program(items: Vec<Item>, labels: Vec<usize>) -> Program {
        let (tables, patches, machines) = (Vec::new(), Vec::new(), Vec::new());
        Program { start: CODE, items, labels, tables, patches, machines }
    }

    fn jump(code: Code, label: Label) -> Item {
        let instruction = Instruction::with_branch(code, 0).expect("a branch");
        Item { short: true, ..Item::to(instruction, label) }
    }

    fn nops(count: usize) -> Vec<Item> {
        vec![Item::plain(Instruction::with(Code::Nopd)); count]
    }

    #[test]
    fn branches_that_do_not_reach_get_longer() {
        let near = [vec![jump(Code::Jmp_rel32_64, 0)], nops(100)].concat();
        assert_eq!(program(near, vec![101]).assemble().expect("bytes").bytes[..2], [0xeb, 100]);
        let far = [vec![jump(Code::Jmp_rel32_64, 0)], nops(200)].concat();
        assert_eq!(program(far, vec![201]).assemble().expect("bytes").bytes[..5], [0xe9, 200, 0, 0, 0]);
        let none = [vec![jump(Code::Loop_rel8_64_RCX, 0)], nops(200)].concat();
        assert!(program(none, vec![201]).assemble().is_none());
    }

    #[test]
    fn what_is_taken_out_leaves_its_labels_to_the_next() {
        let load = Instruction::with2(Code::Mov_r32_imm32, Register::EAX, 1).expect("encodable");
        let mut program = program(vec![jump(Code::Jmp_rel32_64, 0), Item::plain(load)], vec![1]);
        program.remove(0);
        assert_eq!(program.labels, [0]);
        program.remove(0);
        assert_eq!((program.labels[0], program.items.len()), (0, 0));
    }
}
