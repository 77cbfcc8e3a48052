//! From instructions to bytes. As iced-x86's `BlockEncoder`, which allocates something for each instruction: translating would
//! take half as long again.

use iced_x86::code_asm::CodeAssembler;
use iced_x86::{Code, Encoder, FlowControl, IcedError, Instruction};

use super::Failure;
use super::frame::Frame;
use crate::hostexec::arena::Arena;

/// Code in its final form, at a known address.
pub(super) struct Layout {
    /// Where it has to be.
    pub(super) at: u64,
    pub(super) bytes: Vec<u8>,
    /// What of it seldom runs, behind [`Arena::next_far`].
    pub(super) far: Vec<u8>,
    /// Where each instruction of the assembler's is.
    pub(super) addresses: Vec<u64>,
}

/// A branch to a label that has not been met when it was encoded: where its displacement ends, among the bytes and as an address.
struct Forward {
    end: usize,
    address: u64,
    label: usize,
}

impl Layout {
    /// Lays out what has been assembled for the next place in the arena; the instructions from number `often` on seldom run. With a frame,
    /// fields that are kept there are used there.
    pub(super) fn new(
        a: &mut CodeAssembler,
        arena: &Arena,
        frame: Option<Frame>,
        often: usize,
    ) -> Result<Layout, Failure> {
        let mut instructions = a.take_instructions();
        if let Some(frame) = frame {
            frame.place(&mut instructions);
        }
        let at = arena.next();
        let mut encoder = Encoder::try_with_capacity(64, 16 * instructions.len())?;
        let mut addresses = Vec::with_capacity(instructions.len());
        // Labels are numbered from one, and those that are met are in `ip`.
        let mut labels: Vec<Option<u64>> = vec![None; 2 * instructions.len() + 2];
        let mut forward = Vec::new();
        let (mut ip, mut near_end, mut position) = (at, None, 0);
        for (number, ins) in instructions.iter().enumerate() {
            if number == often {
                near_end = Some(position);
                ip = arena.next_far();
            }
            addresses.push(ip);
            if let Some(label) = labels.get_mut(ins.ip() as usize).filter(|_| ins.ip() != 0) {
                *label = Some(ip);
            }
            if ins.code() == Code::Zero_bytes {
                continue;
            }
            let label = branches_to(ins).and_then(|target| usize::try_from(target).ok());
            let length = match label.filter(|&label| label < labels.len()) {
                None => encoder.encode(&near(*ins), ip)?,
                Some(label) => match labels[label] {
                    Some(target) => encode_backward(&mut encoder, *ins, target, ip)?,
                    None => {
                        let mut ins = near(*ins);
                        ins.set_near_branch64(ip);
                        let length = encoder.encode(&ins, ip)?;
                        forward.push(Forward { end: position + length, address: ip + length as u64, label });
                        length
                    }
                },
            };
            ip += length as u64;
            position += length;
        }
        let mut bytes = encoder.take_buffer();
        for Forward { end, address, label } in forward {
            let target = labels[label].ok_or(Failure::Unsuited)?;
            let distance = target.wrapping_sub(address) as i64;
            bytes[end - 4..end].copy_from_slice(&(distance as i32).to_le_bytes());
        }
        let far = bytes.split_off(near_end.unwrap_or(bytes.len()));
        Ok(Layout { at, bytes, far, addresses })
    }
}

/// The target of a direct branch: a label, or an address.
fn branches_to(ins: &Instruction) -> Option<u64> {
    use FlowControl::{Call, ConditionalBranch, UnconditionalBranch};
    let direct = matches!(ins.flow_control(), Call | ConditionalBranch | UnconditionalBranch);
    direct.then(|| ins.near_branch_target())
}

/// The long form of a branch.
fn near(mut ins: Instruction) -> Instruction {
    if branches_to(&ins).is_some() {
        ins.as_near_branch();
    }
    ins
}

/// A branch to what has been laid out already: in its short form, if that reaches.
fn encode_backward(
    encoder: &mut Encoder,
    ins: Instruction,
    target: u64,
    ip: u64,
) -> Result<usize, IcedError> {
    let mut ins = near(ins);
    // Two bytes long, and it goes by the end.
    if ip + 2 - target <= 128 {
        ins.as_short_branch();
    }
    ins.set_near_branch64(target);
    encoder.encode(&ins, ip)
}
