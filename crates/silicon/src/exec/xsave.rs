//! FXSAVE, FXRSTOR and the XSAVE family (SDM vol. 1, chapter 13), driven by one table of components.

use iced_x86::{Code, Instruction, Mnemonic};

use crate::code::lower::{LowerCtx, op_base};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::exec::xsave_area::{self as area, Legacy};
use crate::hostexec::{MXCSR_DEFINED, MXCSR_RESET};
use crate::mmu::Word;
use crate::mmu::tlb::Class;
use crate::model::xstate::{self, COMPONENTS, Component};
use crate::state::{CodeSize, Seg, X87, cr0, cr4, reg};
use crate::tiles::{TILE_BYTES, TILES};

/// Component bits of x87, SSE and AVX.
const FPU: u64 = xstate::X87;
const SSE: u64 = xstate::SSE;
const AVX: u64 = xstate::AVX;
/// XCOMP_BV: compacted format.
const COMPACTED: u64 = 1 << 63;
/// Where the header is.
const HEADER: usize = 512;
/// Where the components begin in the compacted format.
const EXTENDED: usize = 576;
/// Longest component that [`CpuState`](crate::state::CpuState) holds; also a tile.
const LONGEST: usize = 1024;
const _: () = assert!(LONGEST == TILE_BYTES);

/// Which member of the family; in [`Op::r0`].
mod form {
    pub(super) const XSAVE: u8 = 0;
    pub(super) const XSAVEOPT: u8 = 1;
    pub(super) const XSAVEC: u8 = 2;
    pub(super) const XSAVES: u8 = 3;
}

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let base = |handler: Handler, form: u8| {
        let wide = matches!(
            ins.code(),
            Code::Fxsave64_m512byte | Code::Fxrstor64_m512byte | Code::Xsave64_mem | Code::Xrstor64_mem
        ) || matches!(ins.code(), Code::Xsaveopt64_mem | Code::Xsavec64_mem | Code::Xsaves64_mem)
            || ins.code() == Code::Xrstors64_mem;
        Some(Op { r0: form, r1: u8::from(wide), ..op_base(ins, ctx, handler) })
    };
    match ins.mnemonic() {
        Mnemonic::Fxsave | Mnemonic::Fxsave64 => base(fxsave, 0),
        Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => base(fxrstor, 0),
        Mnemonic::Xsave | Mnemonic::Xsave64 => base(xsave, form::XSAVE),
        Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => base(xsave, form::XSAVEOPT),
        Mnemonic::Xsavec | Mnemonic::Xsavec64 => base(xsave, form::XSAVEC),
        Mnemonic::Xsaves | Mnemonic::Xsaves64 => base(xsave, form::XSAVES),
        Mnemonic::Xrstor | Mnemonic::Xrstor64 => base(xrstor, 0),
        Mnemonic::Xrstors | Mnemonic::Xrstors64 => base(xrstors, 0),
        _ => None,
    }
}

impl Cpu {
    /// XINUSE: the components that are not in their initial configuration. Found by looking, which SDM vol. 1,
    /// 13.6 allows.
    pub(super) fn xinuse(&mut self, of: u64) -> u64 {
        self.sync_x87();
        let count = self.visible_registers();
        let mut used = 0;
        if of & FPU != 0 && area::x87_in_use(&self.state) {
            used |= FPU;
        }
        if of & SSE != 0 && area::rows_in_use(&self.state, 0..count, 0..16) {
            used |= SSE;
        }
        for row in COMPONENTS.iter().filter(|row| of & (1 << row.bit) != 0) {
            if area::in_use(&self.state, row.bit, count) {
                used |= 1 << row.bit;
            }
        }
        used
    }

    /// XMM, YMM and ZMM registers below 16 that exist in the present mode.
    fn visible_registers(&self) -> usize {
        if self.state.code_size == CodeSize::Bits64 { 16 } else { 8 }
    }

    /// EDX:EAX.
    fn edx_eax(&self) -> u64 {
        self.get::<u32>(reg::RDX).to_u64() << 32 | self.get::<u32>(reg::RAX).to_u64()
    }

    /// #UD and #NM of the XSAVE family, and #GP for the privileged ones.
    fn check_xsave(&mut self, privileged: bool) -> Result<(), Abort> {
        if self.state.cr4 & cr4::OSXSAVE == 0 {
            return Err(self.raise(Exception::UD));
        }
        if privileged && self.state.cpl != 0 {
            return Err(self.raise(Exception::gp(0)));
        }
        if self.state.cr0 & cr0::TS != 0 {
            return Err(self.raise(Exception::NM));
        }
        Ok(())
    }

    /// Address of an area that has to be aligned.
    fn area_address(&mut self, op: &Op, alignment: u64, write: bool) -> Result<u64, Abort> {
        let lin = self.ea(op, HEADER, write)?;
        if lin & (alignment - 1) != 0 {
            self.checked(self.op_seg(op), lin)?;
            // Where #AC takes the place of #GP is the implementation's choice.
            let checked = lin & 3 != 0 && self.mmu.tlb.class() == Class::Checked;
            return Err(self.raise(if checked { Exception::AC } else { Exception::gp(0) }));
        }
        Ok(lin)
    }

    /// Checks that an area can be written: its last byte first, as the silicon does.
    fn probe_area(&mut self, seg: Seg, lin: u64, length: usize) -> Result<(), Abort> {
        self.probe(seg, lin.wrapping_add(length as u64 - 1), 1, true)?;
        self.probe(seg, lin, length, true)
    }

    fn write_area(&mut self, seg: Seg, lin: u64, bytes: &[u8]) -> Result<(), Abort> {
        // Registers 8 to 31 do not exist outside 64-bit mode, so a component may have nothing to write.
        if bytes.is_empty() {
            return Ok(());
        }
        match self.host_pointer(seg, lin, bytes.len(), true)? {
            Some(mem) => self.present(area::copy_out(bytes, mem)),
            None => self.write_bytes(seg, lin, bytes),
        }
    }

    /// TILEDATA's place in an area, tile by tile: `disabled` by IA32_XFD it is written as if it were initial.
    fn write_tiles(&mut self, seg: Seg, lin: u64, disabled: bool) -> Result<(), Abort> {
        for tile in 0..TILES {
            let found = self.tile(tile as u8).filter(|_| !disabled);
            let bytes = found.map_or([0; TILE_BYTES], |tile| tile.to_bytes());
            self.write_area(seg, lin.wrapping_add((tile * TILE_BYTES) as u64), &bytes)?;
        }
        Ok(())
    }

    fn read_tiles(&mut self, seg: Seg, lin: u64) -> Result<(), Abort> {
        let mut bytes = [0; TILE_BYTES];
        for tile in 0..TILES {
            self.read_area(seg, lin.wrapping_add((tile * TILE_BYTES) as u64), &mut bytes)?;
            self.load_tile(tile, &bytes);
        }
        Ok(())
    }

    fn read_area(&mut self, seg: Seg, lin: u64, bytes: &mut [u8]) -> Result<(), Abort> {
        match self.host_pointer(seg, lin, bytes.len(), false)? {
            Some(mem) => self.present(area::copy_in(mem, bytes)),
            None => self.read_bytes(seg, lin, bytes),
        }
    }
}

/// Offset of each component of `layout` (XCOMP_BV without bit 63) in the compacted format, or in the standard one.
fn placed(layout: u64, compacted: bool) -> impl Iterator<Item = (&'static Component, usize)> {
    let mut next = EXTENDED;
    COMPONENTS.iter().filter(move |row| layout & (1 << row.bit) != 0).map(move |row| {
        if !compacted {
            return (row, row.offset as usize);
        }
        let at = if row.aligned { next.next_multiple_of(64) } else { next };
        next = at + row.size as usize;
        (row, at)
    })
}

fn xsave(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let form = op.r0;
    let supervisor = form == form::XSAVES;
    cpu.check_xsave(supervisor)?;
    let (lin, seg) = (cpu.area_address(op, 64, true)?, cpu.op_seg(op));
    let enabled = cpu.state.xcr0 | if supervisor { cpu.state.xss } else { 0 };
    let requested = enabled & cpu.edx_eax();
    let compacted = matches!(form, form::XSAVEC | form::XSAVES);
    // What IA32_XFD disables is saved as if it were in its initial configuration, whatever it is in.
    let disabled = cpu.state.xfd_disabled();
    let mut used = cpu.xinuse(requested & !disabled);
    let mxcsr = cpu.mxcsr();
    if compacted && requested & SSE != 0 && mxcsr != MXCSR_RESET {
        used |= SSE;
    }
    // XSAVE writes every requested component, the others leave out what is in its initial configuration.
    let written = if form == form::XSAVE { requested } else { used };
    let end = placed(requested, compacted).map(|(row, at)| at + row.size as usize).max().unwrap_or(EXTENDED);
    cpu.probe_area(seg, lin, end)?;
    let legacy = Legacy {
        x87: written & FPU != 0,
        sse: written & SSE != 0,
        mxcsr: if compacted { written & SSE != 0 } else { requested & (SSE | AVX) != 0 },
        wide: op.r1 != 0,
    };
    save_legacy(cpu, seg, lin, &legacy, mxcsr)?;
    let count = cpu.visible_registers();
    let mut buffer = [0; LONGEST];
    for (row, at) in placed(requested, compacted) {
        if written & (1 << row.bit) == 0 {
            continue;
        }
        if 1 << row.bit == xstate::TILEDATA {
            cpu.write_tiles(seg, lin + at as u64, disabled & xstate::TILEDATA != 0)?;
            continue;
        }
        let length = area::save(&cpu.state, row.bit, count, &mut buffer[..(row.size as usize).min(LONGEST)]);
        cpu.write_area(seg, lin + at as u64, &buffer[..length])?;
    }
    if compacted {
        cpu.write_area(seg, lin + 512, &used.to_le_bytes())?;
        cpu.write_area(seg, lin + 520, &(requested | COMPACTED).to_le_bytes())?;
    } else {
        let old = cpu.load::<u64>(seg, lin + 512)?;
        cpu.store::<u64>(seg, lin + 512, old & !requested | used)?;
    }
    Ok(Flow::Next)
}

/// The 512-byte legacy region: what `legacy` selects of it.
fn save_legacy(cpu: &mut Cpu, seg: Seg, lin: u64, legacy: &Legacy, mxcsr: u32) -> Result<(), Abort> {
    let count = cpu.visible_registers();
    let image = area::legacy_image(&cpu.state, mxcsr, legacy.wide);
    if legacy.x87 {
        cpu.write_area(seg, lin, &image[..24])?;
        cpu.write_area(seg, lin + 32, &image[32..160])?;
    }
    if legacy.mxcsr {
        cpu.write_area(seg, lin + 24, &image[24..32])?;
    }
    if legacy.sse {
        cpu.write_area(seg, lin + 160, &image[160..160 + 16 * count])?;
    }
    Ok(())
}

fn xrstor(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.check_xsave(false)?;
    let lin = cpu.area_address(op, 64, false)?;
    let enabled = cpu.state.xcr0;
    let requested = enabled & cpu.edx_eax();
    let header = read_header(cpu, op, lin, requested, enabled)?;
    let [used, layout, ..] = header;
    let valid = if layout & COMPACTED != 0 {
        used & !layout == 0 && header[2..].iter().all(|&word| word == 0)
    } else {
        used & !enabled == 0 && layout == 0 && header[2] == 0
    };
    if !valid || used & COMPACTED != 0 {
        return Err(cpu.raise(Exception::gp(0)));
    }
    restore(cpu, op, lin, requested, used, layout)
}

fn xrstors(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.check_xsave(true)?;
    let lin = cpu.area_address(op, 64, false)?;
    let enabled = cpu.state.xcr0 | cpu.state.xss;
    let requested = enabled & cpu.edx_eax();
    let header = read_header(cpu, op, lin, requested, enabled)?;
    let [used, layout, ..] = header;
    let valid = layout & COMPACTED != 0
        && used & !(layout & !COMPACTED) == 0
        && header[2..].iter().all(|&word| word == 0);
    if !valid {
        return Err(cpu.raise(Exception::gp(0)));
    }
    restore(cpu, op, lin, requested, used, layout)
}

/// Reads the header, and checks that the last and first bytes of the area can be read: its format and the
/// `requested` components say where it ends. The silicon does so before it judges what the header holds, but for
/// components of the compacted format that are not `enabled`.
fn read_header(cpu: &mut Cpu, op: &Op, lin: u64, requested: u64, enabled: u64) -> Result<[u64; 8], Abort> {
    let (mut bytes, seg) = ([0; 64], cpu.op_seg(op));
    cpu.read_area(seg, lin + HEADER as u64, &mut bytes)?;
    let mut words = [0; 8];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    let compacted = words[1] & COMPACTED != 0;
    let places = if compacted { words[1] & !COMPACTED } else { requested };
    if compacted && places & !enabled != 0 {
        return Err(cpu.raise(Exception::gp(0)));
    }
    let ends = placed(places, compacted).filter(|(row, _)| requested & (1 << row.bit) != 0);
    let end = ends.map(|(row, at)| at + row.size as usize).max().unwrap_or(EXTENDED);
    cpu.probe(seg, lin.wrapping_add(end as u64 - 1), 1, false)?;
    cpu.probe(seg, lin, 1, false)?;
    Ok(words)
}

/// Restores, unless IA32_XFD disables what is to be loaded, in the order of the silicon, which shows where a fault or a bad MXCSR ends it: what gets its
/// initial configuration, x87 and SSE, MXCSR (checked here in the compacted format, first in the standard one),
/// the other components. What has been restored by then stays, and is restored again on a restart.
fn restore(cpu: &mut Cpu, op: &Op, lin: u64, requested: u64, used: u64, layout: u64) -> Result<Flow, Abort> {
    let (seg, compacted, count) = (cpu.op_seg(op), layout & COMPACTED != 0, cpu.visible_registers());
    let (loaded, initial) = (requested & used, requested & !used);
    cpu.check_xfd(loaded)?;
    if loaded & xstate::TILEDATA != 0 {
        cpu.need_tile_data()?;
    }
    let mut image = [0; 416];
    let load_mxcsr = if compacted { loaded & SSE != 0 } else { requested & (SSE | AVX) != 0 };
    if loaded & FPU != 0 || load_mxcsr {
        cpu.read_area(seg, lin, &mut image[..160])?;
    }
    let mxcsr = area::mxcsr(&image);
    let bad_mxcsr = load_mxcsr && mxcsr & !MXCSR_DEFINED != 0;
    if bad_mxcsr && !compacted {
        return Err(cpu.raise(Exception::gp(0)));
    }
    initialize(cpu, initial, count);
    if loaded & FPU != 0 {
        let (selectors, bits) = (cpu.hostexec.x87_selectors, cpu.features.linear_bits());
        cpu.set_x87(area::x87(&image, op.r1 != 0, selectors, bits));
    }
    if loaded & SSE != 0 {
        cpu.read_area(seg, lin + 160, &mut image[160..160 + 16 * count])?;
        area::load_rows(&mut cpu.state, 0..count, 0..16, &image[160..]);
    }
    if bad_mxcsr {
        return Err(cpu.raise(Exception::gp(0)));
    }
    if load_mxcsr {
        cpu.set_mxcsr(mxcsr);
    } else if compacted && initial & SSE != 0 {
        cpu.set_mxcsr(MXCSR_RESET);
    }
    let places = if compacted { layout & !COMPACTED } else { requested };
    let mut buffer = [0; LONGEST];
    for (row, at) in placed(places, compacted).filter(|(row, _)| loaded & (1 << row.bit) != 0) {
        if 1 << row.bit == xstate::TILEDATA {
            cpu.read_tiles(seg, lin + at as u64)?;
            continue;
        }
        let bytes = &mut buffer[..(row.size as usize).min(LONGEST)];
        cpu.read_area(seg, lin + at as u64, bytes)?;
        area::load(&mut cpu.state, row.bit, count, bytes);
    }
    if requested & xstate::PKRU != 0 {
        cpu.pkru_changed();
    }
    Ok(Flow::Next)
}

/// Gives `components` their initial configurations, which but for x87 are all zeroes.
fn initialize(cpu: &mut Cpu, components: u64, count: usize) {
    const ZEROES: [u8; LONGEST] = [0; LONGEST];
    if components & FPU != 0 {
        cpu.set_x87(X87::INIT);
    }
    if components & SSE != 0 {
        area::load_rows(&mut cpu.state, 0..count, 0..16, &ZEROES);
    }
    for row in COMPONENTS.iter().filter(|row| components & (1 << row.bit) != 0) {
        area::load(&mut cpu.state, row.bit, count, &ZEROES[..(row.size as usize).min(LONGEST)]);
    }
}

fn check_fxsave(cpu: &mut Cpu) -> Result<(), Abort> {
    if cpu.state.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(cpu.raise(Exception::NM));
    }
    Ok(())
}

fn fxsave(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    check_fxsave(cpu)?;
    let (lin, seg) = (cpu.area_address(op, 16, true)?, cpu.op_seg(op));
    cpu.probe_area(seg, lin, HEADER)?;
    cpu.sync_x87();
    let sse = cpu.state.cr4 & cr4::OSFXSR != 0;
    let legacy = Legacy { x87: true, sse, mxcsr: true, wide: op.r1 != 0 };
    let mxcsr = cpu.mxcsr();
    save_legacy(cpu, seg, lin, &legacy, mxcsr)?;
    Ok(Flow::Next)
}

fn fxrstor(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    check_fxsave(cpu)?;
    let (lin, seg) = (cpu.area_address(op, 16, false)?, cpu.op_seg(op));
    let mut image = [0; 512];
    cpu.read_area(seg, lin, &mut image)?;
    let (mxcsr, sse) = (area::mxcsr(&image), cpu.state.cr4 & cr4::OSFXSR != 0);
    if sse && mxcsr & !MXCSR_DEFINED != 0 {
        return Err(cpu.raise(Exception::gp(0)));
    }
    let selectors = cpu.hostexec.x87_selectors;
    cpu.set_x87(area::x87(&image, op.r1 != 0, selectors, cpu.features.linear_bits()));
    if sse {
        let count = cpu.visible_registers();
        area::load_rows(&mut cpu.state, 0..count, 0..16, &image[160..]);
        cpu.set_mxcsr(mxcsr);
    }
    Ok(Flow::Next)
}

#[cfg(test)]
mod tests {
    use crate::exec::testing::{DATA, Guest};
    use crate::state::{CodeSize, cr4, reg};

    /// Found by random guests: the address calculation overflowed.
    #[test]
    fn a_component_without_registers_outside_64_bit_mode_is_saved_as_nothing() {
        let mut guest = Guest::new(CodeSize::Bits32);
        guest.cpu.state.cr4 |= cr4::OSXSAVE | cr4::OSFXSR;
        guest.cpu.state.xcr0 = 0xe7;
        guest.cpu.refresh_mode();
        guest.put(DATA, &[0x55; 0x1000]);
        guest.set(reg::RAX, 1 << 7).set(reg::RDX, 0).set(reg::RBX, DATA);
        guest.finish(&[0x0f, 0xae, 0x23]); // xsave [ebx]
        assert_eq!(guest.word(DATA + 1664, 8), 0x5555_5555_5555_5555);
    }
}
