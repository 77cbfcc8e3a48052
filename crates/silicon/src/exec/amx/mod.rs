//! AMX: tile configuration, loads and stores of tiles, and what multiplies them. (SDM vol. 1, chapter 18; vol. 2D,
//! 2.10 for the exceptions.)
//!
//! Of the instructions' conditions for #UD, the decoder and [`lower`] find those that the bytes show; what depends on
//! CR4, XCR0 and TILECFG is found when they run, before #NM, which comes before faults of memory. CR0.TS does not matter
//! to any of them.

use iced_x86::{Instruction, Mnemonic};

use super::vector_masked::{read_part, write_part};
use super::xsave_area as area;
use crate::code::lower::{LowerCtx, op_base};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::mmu::tlb::Class;
use crate::model::xstate;
use crate::state::{cr4, reg};
use crate::tiles::{CONFIG_BYTES, ROW_BYTES, TILES, TMUL_MAX, Tile, TileConfig};
use tmul::{Product, Shape};

#[cfg(test)]
mod reference;
mod simd;
mod softfloat;
#[cfg(test)]
mod tests;
mod tmul;
#[cfg(test)]
mod xsave_tests;

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    if let Some(product) = product(ins.mnemonic()) {
        return lower_product(ins, product, ctx);
    }
    let (handler, operand): (Handler, Option<u32>) = match ins.mnemonic() {
        Mnemonic::Ldtilecfg => (load_config, None),
        Mnemonic::Sttilecfg => (store_config, None),
        Mnemonic::Tilerelease => (release, None),
        Mnemonic::Tilezero => (zero, Some(0)),
        Mnemonic::Tileloadd | Mnemonic::Tileloaddt1 => (load, Some(0)),
        Mnemonic::Tilestored => (store, Some(1)),
        _ => return None,
    };
    let mut op = op_base(ins, ctx, handler);
    if let Some(operand) = operand {
        op.r0 = tile_operand(ins, operand)?;
    }
    Some(op)
}

/// Number of the tile that operand `i` is.
fn tile_operand(ins: &Instruction, i: u32) -> Option<u8> {
    let register = ins.op_register(i);
    (register.is_tmm() && register.number() < TILES).then_some(register.number() as u8)
}

fn product(mnemonic: Mnemonic) -> Option<Product> {
    Some(match mnemonic {
        Mnemonic::Tdpbssd => Product::SignedSigned,
        Mnemonic::Tdpbsud => Product::SignedUnsigned,
        Mnemonic::Tdpbusd => Product::UnsignedSigned,
        Mnemonic::Tdpbuud => Product::UnsignedUnsigned,
        Mnemonic::Tdpbf16ps => Product::Bf16,
        Mnemonic::Tdpfp16ps => Product::Fp16,
        Mnemonic::Tcmmrlfp16ps => Product::ComplexReal,
        Mnemonic::Tcmmimfp16ps => Product::ComplexImaginary,
        _ => return None,
    })
}

/// r0: destination; r1, r2: sources. No two may be the same.
fn lower_product(ins: &Instruction, product: Product, ctx: &LowerCtx) -> Option<Op> {
    let (r0, r1, r2) = (tile_operand(ins, 0)?, tile_operand(ins, 1)?, tile_operand(ins, 2)?);
    if r0 == r1 || r0 == r2 || r1 == r2 {
        return None;
    }
    Some(Op { r0, r1, r2, size: product as u8, ..op_base(ins, ctx, multiply) })
}

/// #UD unless the system has enabled AMX. (The decoder knows these instructions in 64-bit mode only.)
fn check_enabled(cpu: &mut Cpu) -> Result<(), Abort> {
    let state = &cpu.state;
    if state.cr4 & cr4::OSXSAVE != 0 && state.xcr0 & xstate::AMX == xstate::AMX {
        return Ok(());
    }
    Err(cpu.raise(Exception::UD))
}

/// What `found` has, or #UD.
fn defined<T>(cpu: &mut Cpu, found: Option<T>) -> Result<T, Abort> {
    found.ok_or_else(|| cpu.raise(Exception::UD))
}

fn load_config(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    check_enabled(cpu)?;
    let (lin, seg) = (cpu.ea(op, CONFIG_BYTES, false)?, cpu.op_seg(op));
    let mut image = [0; CONFIG_BYTES];
    read_part(cpu, seg, lin, &mut image)?;
    let Some(config) = TileConfig::from_image(&image) else {
        return Err(cpu.raise(Exception::gp(0)));
    };
    // IA32_XFD does not matter: the tiles are not used but made initial.
    cpu.state.tile_config = config;
    cpu.state.tile_data_used = false;
    Ok(Flow::Next)
}

fn store_config(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    check_enabled(cpu)?;
    let (lin, seg) = (cpu.ea(op, CONFIG_BYTES, true)?, cpu.op_seg(op));
    let image = cpu.state.tile_config.image();
    write_part(cpu, seg, lin, &image)?;
    Ok(Flow::Next)
}

fn release(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    check_enabled(cpu)?;
    cpu.state.tile_config = TileConfig::default();
    cpu.state.tile_data_used = false;
    Ok(Flow::Next)
}

fn zero(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    check_enabled(cpu)?;
    let valid = cpu.state.tile_config.valid(op.r0);
    defined(cpu, valid)?;
    cpu.check_xfd(xstate::TILEDATA)?;
    // As long as no tile is in use, they all are zero.
    if cpu.state.tile_data_used
        && let Some(tiles) = cpu.tiles_mut()
    {
        tiles[usize::from(op.r0)] = Tile::ZERO;
    }
    cpu.state.tile_config.start_row = 0;
    Ok(Flow::Next)
}

/// Checks that a load or store of a tile may run; the rows to move and the bytes of each.
fn check_access(cpu: &mut Cpu, op: &Op) -> Result<(std::ops::Range<usize>, usize), Abort> {
    check_enabled(cpu)?;
    let config = cpu.state.tile_config;
    let start = usize::from(config.start_row);
    let (rows, bytes) = defined(cpu, config.usable(op.r0).filter(|&(rows, _)| start < rows))?;
    cpu.check_xfd(xstate::TILEDATA)?;
    Ok((start..rows, bytes))
}

/// Linear address of row `row`: base and displacement, and so many times the scaled index.
fn row_address(cpu: &mut Cpu, op: &Op, row: usize, bytes: usize, write: bool) -> Result<u64, Abort> {
    let stride = match op.index {
        reg::ZERO => 0,
        index => cpu.state.regs[usize::from(index & 31)] << (op.scale & 3),
    };
    let base = cpu.state.regs[usize::from(op.base & 31)].wrapping_add(op.disp as u64);
    cpu.ea_at(op, base.wrapping_add(stride.wrapping_mul(row as u64)), bytes, write)
}

/// A fault or an exit in row `row`: what has been done stays, and the instruction goes on there.
fn interrupted(cpu: &mut Cpu, row: usize, abort: Abort) -> Abort {
    cpu.state.tile_config.start_row = row as u8;
    abort
}

fn load(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let (rows, bytes) = check_access(cpu, op)?;
    cpu.need_tile_data()?;
    let (tile, start, end) = (usize::from(op.r0), rows.start, rows.end);
    if cpu.state.tile_data_used
        && let Some(tiles) = cpu.tiles_mut()
    {
        tiles[tile].crop(start, ROW_BYTES);
    }
    for row in start..end {
        let mut copy = [0; ROW_BYTES];
        let read = row_address(cpu, op, row, bytes, false)
            .and_then(|lin| read_row(cpu, op, lin, &mut copy[..bytes]));
        if let Err(abort) = read {
            return Err(interrupted(cpu, row, abort));
        }
        if let Some(tiles) = cpu.tiles_mut() {
            tiles[tile].set_row_bytes(row, &copy);
        }
        cpu.commit_bus();
    }
    cpu.state.tile_config.start_row = 0;
    Ok(Flow::Next)
}

fn store(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let (rows, bytes) = check_access(cpu, op)?;
    for row in rows {
        let copy = cpu.tile(op.r0).map_or([0; ROW_BYTES], |tile| tile.row_bytes(row));
        let written =
            row_address(cpu, op, row, bytes, true).and_then(|lin| write_row(cpu, op, lin, &copy[..bytes]));
        if let Err(abort) = written {
            return Err(interrupted(cpu, row, abort));
        }
        cpu.commit_bus();
    }
    cpu.state.tile_config.start_row = 0;
    Ok(Flow::Next)
}

/// Reads a row. There is no alignment check.
fn read_row(cpu: &mut Cpu, op: &Op, lin: u64, row: &mut [u8]) -> Result<(), Abort> {
    let seg = cpu.op_seg(op);
    if cpu.mmu.tlb.class() != Class::Checked
        && let Some(mem) = cpu.host_pointer(seg, lin, row.len(), false)?
    {
        cpu.present(area::copy_in(mem, row))?;
        return Ok(());
    }
    read_part(cpu, seg, lin, row)
}

/// Writes a row, all of it or nothing.
fn write_row(cpu: &mut Cpu, op: &Op, lin: u64, row: &[u8]) -> Result<(), Abort> {
    let seg = cpu.op_seg(op);
    if cpu.mmu.tlb.class() != Class::Checked
        && let Some(mem) = cpu.host_pointer(seg, lin, row.len(), true)?
    {
        cpu.present(area::copy_out(row, mem))?;
        return Ok(());
    }
    write_part(cpu, seg, lin, row)
}

/// The shape of a product; `None` where the tiles do not fit each other or the matrix unit.
fn shape(config: &TileConfig, op: &Op) -> Option<Shape> {
    let (rows, bytes) = config.usable(op.r0)?;
    let (rows1, bytes1) = config.usable(op.r1)?;
    let (rows2, bytes2) = config.usable(op.r2)?;
    let fits = rows == rows1 && bytes == bytes2 && bytes1 / 4 == rows2;
    let small = rows2 <= TMUL_MAX.0 && bytes2 <= TMUL_MAX.1;
    (fits && small).then_some(Shape { m: rows, n: bytes / 4, k: rows2 })
}

fn multiply(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    check_enabled(cpu)?;
    let shape = shape(&cpu.state.tile_config, op);
    let shape = defined(cpu, shape)?;
    cpu.check_xfd(xstate::TILEDATA)?;
    cpu.need_tile_data()?;
    let tiles = [op.r0, op.r1, op.r2].map(usize::from);
    let three = cpu.tiles_mut().and_then(|all| all.get_disjoint_mut(tiles).ok());
    if let (Some([c, a, b]), Some(product)) = (three, Product::from_number(op.size)) {
        tmul::multiply(product, c, a, b, shape);
    }
    cpu.state.tile_config.start_row = 0;
    Ok(Flow::Next)
}
