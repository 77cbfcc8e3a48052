//! FNSTENV, FLDENV, FNSAVE and FRSTOR: the x87 environment in memory, in its four formats
//! (SDM vol. 1, figures 8-9 to 8-12).

use iced_x86::Mnemonic;

use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::exec::fpu::admitted_nowait;
use crate::hostexec::class;
use crate::mmu::tlb::Class;
use crate::state::X87;

/// The longest image: 28 bytes of environment, eight registers.
const LONGEST: usize = 108;

pub(crate) fn handler(mnemonic: Mnemonic) -> Option<Handler> {
    match mnemonic {
        Mnemonic::Fnstenv => Some(store_environment),
        Mnemonic::Fldenv => Some(load_environment),
        Mnemonic::Fnsave => Some(save),
        Mnemonic::Frstor => Some(restore),
        _ => None,
    }
}

/// Layout of an environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Format {
    /// 28 bytes (32-bit operand size) instead of 14.
    wide: bool,
    /// Pointers are linear addresses (real-address and virtual-8086 mode).
    linear: bool,
}

impl Format {
    fn of(cpu: &Cpu, op: &Op) -> Format {
        let wide = matches!(op.size, 28 | 108);
        Format { wide, linear: cpu.state.real_mode() || cpu.state.v8086() }
    }

    fn bytes(self) -> usize {
        if self.wide { 28 } else { 14 }
    }
}

/// The full tag word: two bits for each physical register.
fn full_tags(x87: &X87) -> u16 {
    let top = usize::from(x87.fsw >> 11) & 7;
    (0..8usize).fold(0, |tags, physical| {
        let tag = if x87.ftw & (1 << physical) == 0 {
            3
        } else {
            classify(&x87.st[physical.wrapping_sub(top) & 7])
        };
        tags | tag << (2 * physical)
    })
}

/// 0 valid, 1 zero, 2 special (SDM vol. 1, 8.1.7).
fn classify(register: &[u8; 16]) -> u16 {
    let exponent = u16::from_le_bytes([register[8], register[9]]) & 0x7fff;
    let mut significand = [0; 8];
    significand.copy_from_slice(&register[..8]);
    match (exponent, u64::from_le_bytes(significand)) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        (_, significand) if significand >> 63 == 0 => 2,
        _ => 0,
    }
}

fn abridge(tags: u16) -> u8 {
    (0..8).fold(0, |bits, i| bits | u8::from((tags >> (2 * i)) & 3 != 3) << i)
}

/// The seven fields as 32-bit words.
fn encode(x87: &X87, format: Format) -> [u32; 7] {
    let (ip, dp, fop) = (x87.fip as u32, x87.fdp as u32, u32::from(x87.fop & 0x7ff));
    let [cw, sw, tw] = [x87.fcw, x87.fsw, full_tags(x87)].map(|word| 0xffff_0000 | u32::from(word));
    if format.linear {
        let ip = ip.wrapping_add(u32::from(x87.fcs) << 4);
        let dp = dp.wrapping_add(u32::from(x87.fds) << 4);
        let high = if format.wide { |p: u32| (p >> 16) << 12 } else { |p: u32| ((p >> 16) & 15) << 12 };
        return [cw, sw, tw, ip & 0xffff, high(ip) | fop, dp & 0xffff, high(dp)];
    }
    [cw, sw, tw, ip, u32::from(x87.fcs) | fop << 16, dp, 0xffff_0000 | u32::from(x87.fds)]
}

fn decode(words: [u32; 7], format: Format, x87: &mut X87) {
    let [cw, sw, tw, ip, ip_high, dp, dp_high] = words;
    x87.fcw = cw as u16;
    x87.fsw = sw as u16;
    x87.ftw = abridge(tw as u16);
    if format.linear {
        x87.fip = u64::from(ip & 0xffff | ((ip_high >> 12) & 0xffff) << 16);
        x87.fdp = u64::from(dp & 0xffff | ((dp_high >> 12) & 0xffff) << 16);
        x87.fop = ip_high as u16 & 0x7ff;
        (x87.fcs, x87.fds) = (0, 0);
        return;
    }
    (x87.fip, x87.fdp) = (u64::from(ip), u64::from(dp));
    // The narrow format has no opcode.
    x87.fop = if format.wide { (ip_high >> 16) as u16 & 0x7ff } else { 0 };
    (x87.fcs, x87.fds) = (ip_high as u16, dp_high as u16);
}

fn write_environment(x87: &X87, format: Format, image: &mut [u8]) {
    let step = if format.wide { 4 } else { 2 };
    for (field, word) in image.chunks_exact_mut(step).zip(encode(x87, format)) {
        field.copy_from_slice(&word.to_le_bytes()[..step]);
    }
}

fn read_environment(image: &[u8], format: Format, selectors: bool, x87: &mut X87) {
    let step = if format.wide { 4 } else { 2 };
    let mut words = [0; 7];
    for (word, field) in words.iter_mut().zip(image.chunks_exact(step)) {
        let mut bytes = [0; 4];
        bytes[..step].copy_from_slice(field);
        *word = u32::from_le_bytes(bytes);
    }
    decode(words, format, x87);
    if !selectors {
        (x87.fcs, x87.fds) = (0, 0);
    }
}

/// Address of the image. Its first field and its last byte are looked at first, as the silicon does.
fn image_address(cpu: &mut Cpu, op: &Op, format: Format, length: usize, write: bool) -> Result<u64, Abort> {
    let lin = cpu.ea(op, length, write)?;
    let alignment = if format.wide { 4 } else { 2 };
    if lin & (alignment - 1) != 0 && cpu.mmu.tlb.class() == Class::Checked {
        cpu.checked(cpu.op_seg(op), lin)?;
        return Err(cpu.raise(Exception::AC));
    }
    cpu.probe(cpu.op_seg(op), lin, alignment as usize, write)?;
    cpu.probe(cpu.op_seg(op), lin.wrapping_add(length as u64 - 1), 1, write)?;
    Ok(lin)
}

fn store_environment(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted_nowait(cpu)?;
    let format = Format::of(cpu, op);
    let lin = image_address(cpu, op, format, format.bytes(), true)?;
    cpu.sync_x87();
    let mut image = [0; 28];
    write_environment(&cpu.state.x87, format, &mut image[..format.bytes()]);
    cpu.write_bytes(cpu.op_seg(op), lin, &image[..format.bytes()])?;
    let masked = X87 { fcw: cpu.state.x87.fcw | 0x3f, ..cpu.state.x87 };
    cpu.set_x87(masked);
    Ok(Flow::Next)
}

fn load_environment(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.admit(class::X87)?;
    let format = Format::of(cpu, op);
    let lin = image_address(cpu, op, format, format.bytes(), false)?;
    let mut image = [0; 28];
    cpu.read_bytes(cpu.op_seg(op), lin, &mut image[..format.bytes()])?;
    cpu.sync_x87();
    let mut x87 = cpu.state.x87;
    // The stack is held relative to TOP, which changes: the physical registers keep their contents.
    let old_top = usize::from(x87.fsw >> 11) & 7;
    read_environment(&image[..format.bytes()], format, cpu.hostexec.x87_selectors, &mut x87);
    let new_top = usize::from(x87.fsw >> 11) & 7;
    x87.st.rotate_left((new_top + 8 - old_top) & 7);
    cpu.set_x87(x87);
    Ok(Flow::Next)
}

fn save(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted_nowait(cpu)?;
    let format = Format::of(cpu, op);
    let (environment, length) = (format.bytes(), format.bytes() + 80);
    let lin = image_address(cpu, op, format, length, true)?;
    cpu.sync_x87();
    let mut image = [0; LONGEST];
    write_environment(&cpu.state.x87, format, &mut image[..environment]);
    for (slot, register) in image[environment..].chunks_exact_mut(10).zip(&cpu.state.x87.st) {
        slot.copy_from_slice(&register[..10]);
    }
    cpu.write_bytes(cpu.op_seg(op), lin, &image[..length])?;
    // As FNINIT, which leaves the physical registers alone.
    let top = usize::from(cpu.state.x87.fsw >> 11) & 7;
    let mut st = cpu.state.x87.st;
    st.rotate_right(top);
    cpu.set_x87(X87 { st, ..X87::INIT });
    Ok(Flow::Next)
}

fn restore(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.admit(class::X87)?;
    let format = Format::of(cpu, op);
    let (environment, length) = (format.bytes(), format.bytes() + 80);
    let lin = image_address(cpu, op, format, length, false)?;
    let mut image = [0; LONGEST];
    cpu.read_bytes(cpu.op_seg(op), lin, &mut image[..length])?;
    cpu.sync_x87();
    let mut x87 = cpu.state.x87;
    read_environment(&image[..environment], format, cpu.hostexec.x87_selectors, &mut x87);
    for (register, slot) in x87.st.iter_mut().zip(image[environment..].chunks_exact(10)) {
        *register = [0; 16];
        register[..10].copy_from_slice(slot);
    }
    cpu.set_x87(x87);
    Ok(Flow::Next)
}
