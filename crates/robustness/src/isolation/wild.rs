//! Guests in 64-bit mode whose code is translated nearly all, and whose pointers lead everywhere: to the process's own memory as it is
//! mapped and less the guest's place in it, to addresses that are not canonical or whose higher bits are another's, over the ends of
//! pages. They write their page tables, change address spaces, privileges and segment bases, and call, return and jump to such
//! pointers.

use conformance::rng::Rng;
use iced_x86::code_asm::*;
use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Register};
use kvm_bindings::kvm_sregs;

use super::mappings::PAGE;
use crate::image::{Contents, Image, Slot};
use crate::machine::{CODE, DATA, GDT, HANDLERS, IDT, Machine, Mode, RAM, STACK, TABLES, TSS};
use crate::memory::GuestMemory;
use crate::stream::Stream;

/// Where the pointers are, and where data ends.
const POINTERS: u64 = DATA + 0x3000;
const COUNT: u64 = 256;
/// Bytes of read-only memory, behind the RAM.
const ROM: u64 = 0x4000;
/// The slot that the pointers are in.
pub(super) const POINTERS_SLOT: usize = 4;
const END: u64 = DATA + 0x4000;
/// Bytes of code; a jump to its beginning follows.
const CODE_SIZE: usize = 0xf80;
/// What belongs together begins at a multiple of this, and exceptions go on at the next.
const PIECE: usize = 16;

type Assembled = Result<(), IcedError>;

pub(super) fn image(rng: &mut Rng) -> Image {
    let spoil = rng.pick(&[0, 0, 10, 40]);
    let mut machine = Machine::in_mode(rng, Mode::Long, spoil);
    let mut code = Vec::with_capacity(CODE_SIZE + 64);
    while code.len() < CODE_SIZE {
        let at = CODE + code.len() as u64;
        let piece = match machine.rng.below(100) {
            0..20 => Stream::new(machine.rng, 64, &[DATA, POINTERS, STACK, CODE, TABLES]).instruction(at),
            20..40 => scatter(machine.rng, at),
            _ => piece(machine.rng, at),
        };
        if code.len() + piece.len() <= CODE_SIZE + 64 {
            code.extend(piece);
            pad(&mut code);
        }
    }
    code.extend(assembled(CODE + code.len() as u64, |a| a.jmp(CODE)));
    machine.put(CODE, &code);
    let mut image = machine.finish(u64::MAX);
    let mut system = kvm_sregs::default();
    if let Some(sregs) = &mut image.cpus[0].sregs {
        // FSGSBASE, mostly, and no x87 or SSE that is not there.
        sregs.cr4 |= if rng.percent(80) { CR4_FSGSBASE } else { 0 };
        sregs.cr0 &= if rng.percent(90) { !0xc } else { !0 };
        system = **sregs;
    }
    if let Contents::Bytes(ram) = &mut image.slots[0].contents {
        steady(ram, &system);
        let pages = split(ram);
        image.slots.splice(.., pages);
        image.slots.push(Slot::rom(RAM, vec![0x90; ROM as usize]));
    }
    image
}

const CR4_LA57: u64 = 1 << 12;
const CR4_FSGSBASE: u64 = 1 << 16;

/// Has the guest go on after each exception: its handlers have a page, a stack and rights of their own, and lead back into the code.
fn steady(ram: &mut [u8], system: &kvm_sregs) {
    let mut put = |at: u64, bytes: &[u8]| ram[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    // Whoever jumps to where there is nothing is soon back, by INT3.
    for empty in [0..GDT, CODE + PAGE..STACK & !(PAGE - 1), TABLES + 6 * PAGE..DATA, END..RAM] {
        put(empty.start, &vec![0xcc; (empty.end - empty.start) as usize]);
    }
    let back = HANDLERS + PAGE;
    for vector in 0..256 {
        let has_code = matches!(vector, 8 | 10..=14 | 17 | 21);
        let enter = |a: &mut CodeAssembler| {
            if has_code {
                a.add(rsp, 8)?;
            }
            a.jmp(back)
        };
        put(HANDLERS + 16 * vector, &assembled(HANDLERS + 16 * vector, enter));
        // The first stack of the interrupt stack table.
        put(IDT + 16 * vector + 4, &[1]);
    }
    put(back, &assembled(back, go_back));
    for slot in (4..0x5c).step_by(8) {
        put(TSS + slot, &(back + PAGE - 16).to_le_bytes());
    }
    let user = if system.cs.selector & 3 == 3 { 4 } else { 0 };
    let table = TABLES + PAGE * if system.cr4 & CR4_LA57 != 0 { 4 } else { 3 };
    for page in 0..STACK / PAGE + 1 {
        let rights = if page * PAGE < CODE { 3 } else { 3 | user };
        put(table + 8 * page, &((page * PAGE) | rights).to_le_bytes());
    }
}

/// What handlers end with: on to the next [`PIECE`], or to some in the code if RIP is not there, and with a good stack.
fn go_back(a: &mut CodeAssembler) -> Assembled {
    let mut inside = a.create_label();
    let counter = HANDLERS + PAGE + 0x800;
    a.push(rax)?;
    a.mov(rax, qword_ptr(rsp + 8))?;
    a.sub(rax, CODE as i32)?;
    a.cmp(rax, CODE_SIZE as i32)?;
    a.jb(inside)?;
    a.add(dword_ptr(counter), 0x517)?;
    a.mov(eax, dword_ptr(counter))?;
    a.and(eax, 0x7ff)?;
    a.set_label(&mut inside)?;
    a.and(rax, -(PIECE as i32))?;
    a.add(rax, (CODE as usize + PIECE) as i32)?;
    a.mov(qword_ptr(rsp + 8), rax)?;
    a.mov(qword_ptr(rsp + 32), STACK as i32)?;
    a.pop(rax)?;
    a.iretq()
}

/// The pages of data are slots of their own, so that other memory of the process lies before and behind each.
fn split(ram: &[u8]) -> Vec<Slot> {
    let mut slots = vec![Slot::ram(0, ram[..DATA as usize].to_vec())];
    for page in (DATA..END).step_by(PAGE as usize) {
        slots.push(Slot::ram(page, ram[page as usize..][..PAGE as usize].to_vec()));
    }
    slots.push(Slot::ram(END, ram[END as usize..].to_vec()));
    slots
}

/// Fills the guest's table of pointers and some registers; the vCPU is at `vcpu`.
pub(super) fn aim(image: &mut Image, memory: &[GuestMemory], vcpu: u64, rng: &mut Rng) {
    let local = 0u8;
    let mut places = vec![vcpu, &raw const local as u64];
    places.extend(memory.iter().flat_map(|memory| [memory.host() - 8, memory.host() + memory.size()]));
    // Host address minus guest address.
    let addends: Vec<u64> =
        memory.iter().zip(&image.slots).map(|(memory, slot)| memory.host().wrapping_sub(slot.gpa)).collect();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for line in maps.lines() {
        let ends = line.split_ascii_whitespace().next().and_then(|word| word.split_once('-'));
        let numbers = ends.map(|(start, end)| (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)));
        if let Some((Ok(start), Ok(end))) = numbers {
            places.extend([start, end - 8, start + rng.below(end - start)]);
        }
    }
    for slot in 0..COUNT {
        let pointer = pointer(rng, &places, &addends);
        memory[POINTERS_SLOT].write(8 * slot, &pointer.to_le_bytes());
    }
    if let Some(regs) = &mut image.cpus[0].regs {
        for register in [&mut regs.rax, &mut regs.rbx, &mut regs.rdi, &mut regs.r9, &mut regs.r12] {
            *register = pointer(rng, &places, &addends);
        }
        regs.rip = CODE;
    }
}

fn pointer(rng: &mut Rng, places: &[u64], addends: &[u64]) -> u64 {
    // Near the end of a page as often as not.
    let inside = if rng.percent(50) { PAGE - 1 - rng.below(66) } else { rng.below(PAGE) };
    let good = DATA + PAGE * rng.below(4) + inside;
    match rng.below(13) {
        0..=2 | 10 | 11 => good,
        // The same page by its low bits.
        3 => good ^ 1 << (12 + rng.below(52)),
        4 => good ^ rng.next() << (12 + rng.below(52)),
        5 => rng.pick(places).wrapping_add(rng.below(PAGE)),
        // An access there would be one to the host's memory, if the guest's place in it were added.
        6 => rng.pick(places).wrapping_sub(rng.pick(addends)),
        // What the guest can only read.
        9 => RAM + rng.below(ROM),
        7 => rng.pick(&[RAM, STACK, CODE, TABLES, GDT, 0]).wrapping_add(rng.below(128)).wrapping_sub(64),
        8 => {
            let end: u64 = rng.pick(&[0, 1 << 47, 0xffff_8000_0000_0000, 1 << 56, 1 << 63, 1 << 32]);
            end.wrapping_add(rng.below(96)).wrapping_sub(48)
        }
        // The upper half's alias of the data, if there is one.
        _ => 0xffff_ff80_0000_0000 | good,
    }
}

fn assembled(at: u64, make: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Vec<u8> {
    let made = CodeAssembler::new(64).and_then(|mut a| {
        make(&mut a)?;
        a.assemble(at)
    });
    made.unwrap_or_default()
}

/// A few instructions that belong together.
fn piece(rng: &mut Rng, at: u64) -> Vec<u8> {
    let make: fn(&mut CodeAssembler, &mut Rng) -> Assembled = match rng.below(44) {
        0..=16 => accesses,
        17..=20 => stride,
        21..=23 => arithmetic,
        24..=27 => beside_the_code,
        28..=29 => calls,
        30 => wild_branch,
        31..=32 => page_tables,
        33..=34 => privileges,
        35 => segments,
        36..=37 => over_itself,
        38..=39 => windows,
        40..=41 => strings,
        _ => stack,
    };
    assembled(at, |a| make(a, rng))
}

const REGISTERS: [AsmRegister64; 15] =
    [rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];

/// One of the guest's pointers.
fn any_pointer(rng: &mut Rng) -> AsmMemoryOperand {
    qword_ptr(POINTERS + 8 * rng.below(COUNT))
}

fn displacement(rng: &mut Rng) -> i32 {
    match rng.below(4) {
        0 => 0,
        1 => rng.below(256) as i32 - 128,
        2 => rng.below(3 * PAGE) as i32 - PAGE as i32,
        _ => rng.next() as i32 >> rng.below(32),
    }
}

/// A memory operand with base and perhaps index, and perhaps a segment that has a base.
fn operand(rng: &mut Rng, base: AsmRegister64) -> AsmMemoryOperand {
    let displacement = displacement(rng);
    let operand = if rng.percent(20) {
        let index = rng.pick(&REGISTERS);
        base + index * rng.pick(&[1, 2, 4, 8]) + displacement
    } else {
        base + displacement
    };
    let operand = ptr(operand);
    match rng.below(16) {
        0 => operand.gs(),
        1 => operand.fs(),
        _ => operand,
    }
}

/// No operations up to the next multiple of [`PIECE`].
fn pad(code: &mut Vec<u8>) {
    code.resize(code.len().next_multiple_of(PIECE), 0x90);
}

/// A loop over many pointers: whether an access faults or not, the next pointer follows.
fn scatter(rng: &mut Rng, at: u64) -> Vec<u8> {
    let base = rng.pick(&[rax, rbx, rbp, rdi, r8, r11, r14]);
    let (first, count) = (rng.below(COUNT) as u32, 8 + rng.below(200) as u32);
    let mut code = assembled(at, |a| {
        a.mov(esi, first)?;
        a.mov(ecx, count)
    });
    pad(&mut code);
    let again = at + code.len() as u64;
    code.extend(assembled(again, |a| {
        a.movzx(edx, sil)?;
        a.mov(base, qword_ptr(rdx * 8 + POINTERS))?;
        if rng.percent(50) {
            let by = if rng.percent(50) { 0 } else { displacement(rng) };
            a.lea(base, qword_ptr(base + by))?;
        }
        access(a, rng, base)
    }));
    pad(&mut code);
    let end = at + code.len() as u64;
    code.extend(assembled(end, |a| {
        a.inc(esi)?;
        a.dec(ecx)?;
        a.jg(again)
    }));
    code
}

/// A pointer, and a few accesses by it.
fn accesses(a: &mut CodeAssembler, rng: &mut Rng) -> Assembled {
    let base = rng.pick(&REGISTERS);
    a.mov(base, any_pointer(rng))?;
    if rng.percent(50) {
        // What has just been loaded is looked for among many pages, the sum of something at the one accessed last.
        a.lea(base, qword_ptr(base + displacement(rng)))?;
    }
    for _ in 0..1 + rng.below(4) {
        access(a, rng, base)?;
    }
    Ok(())
}

fn access(a: &mut CodeAssembler, rng: &mut Rng, base: AsmRegister64) -> Assembled {
    let at = operand(rng, base);
    let other = rng.pick(&REGISTERS);
    let bits = |operand: AsmMemoryOperand| qword_ptr(operand);
    match rng.below(30) {
        0 | 1 => a.mov(at, other),
        2 | 3 => a.mov(other, at),
        4 => a.mov(byte_ptr(at), rng.below(256) as u32),
        5 => a.add(at, other),
        6 => a.xadd(at, other),
        7 => a.lock().xadd(at, other),
        8 => a.lock().cmpxchg(at, other),
        9 => a.lock().cmpxchg16b(xmmword_ptr(at)),
        10 => a.xchg(at, other),
        11 => a.bts(bits(at), other),
        12 => a.lock().btr(bits(at), other),
        13 => a.bt(bits(at), other),
        14 => a.movups(xmmword_ptr(at), xmm1),
        15 => a.movups(xmm2, xmmword_ptr(at)),
        16 => a.movaps(xmmword_ptr(at), xmm3),
        17 => a.vmovdqu(ymmword_ptr(at), ymm4),
        18 => a.vmovdqu(ymm5, ymmword_ptr(at)),
        19 => a.vmovdqu64(zmmword_ptr(at), zmm6),
        20 => a.fld(tbyte_ptr(at)),
        21 => a.fstp(tbyte_ptr(at)),
        22 => a.push(qword_ptr(at)),
        23 => a.pop(qword_ptr(at)),
        24 => a.movnti(at, other),
        25 => a.shl(dword_ptr(at), cl),
        26 => a.not(word_ptr(at)),
        27 => a.stmxcsr(dword_ptr(at)),
        28 => a.movbe(at, other),
        _ => a.imul_2(other, at),
    }
}

/// A loop that goes on from page to page.
fn stride(a: &mut CodeAssembler, rng: &mut Rng) -> Assembled {
    let base = rng.pick(&[rbx, rdi, r8, r11, r14]);
    let mut again = a.create_label();
    a.mov(base, any_pointer(rng))?;
    let by = rng.pick(&[1, 8, 63, 64, 4095, 4096, -4096, 1 << 20, 1 << 30, -8]);
    a.mov(esi, 1 + rng.below(300) as u32)?;
    a.set_label(&mut again)?;
    match rng.below(4) {
        0 => a.mov(qword_ptr(base), rsi)?,
        1 => a.add(rax, qword_ptr(base + displacement(rng)))?,
        2 => a.movups(xmmword_ptr(base), xmm0)?,
        _ => a.lock().inc(dword_ptr(base))?,
    }
    a.add(base, by)?;
    a.dec(esi)?;
    a.jne(again)
}

/// A loop through the pages of data and on by small steps, for longer than until requests are looked for.
fn windows(a: &mut CodeAssembler, rng: &mut Rng) -> Assembled {
    let bases = [rng.pick(&[rbx, rdi, r8]), rng.pick(&[rbp, r9, r12])];
    let mut again = a.create_label();
    for base in bases {
        a.mov(base, DATA + PAGE * rng.below(4) + rng.below(PAGE))?;
    }
    a.mov(ecx, rng.below(64) as u32)?;
    a.mov(rsi, 300 + rng.below(4000))?;
    a.set_label(&mut again)?;
    for _ in 0..1 + rng.below(4) {
        let (base, by) = (rng.pick(&bases), rng.below(160) as i32 - 80);
        match rng.below(8) {
            0 => a.mov(rax, qword_ptr(base + by))?,
            1 => a.mov(qword_ptr(base + by), rsi)?,
            2 => a.movups(xmm0, xmmword_ptr(base + by))?,
            3 => a.movups(xmmword_ptr(base + by), xmm1)?,
            4 => a.add(qword_ptr(base + rcx * 2 + by), rdx)?,
            5 => a.mov(byte_ptr(base + by), dl)?,
            6 => a.vmovdqu(ymmword_ptr(base + by), ymm2)?,
            _ => a.add(rdx, qword_ptr(base + rcx * 8 + by))?,
        }
    }
    for base in bases {
        let steps: [i32; 8] = [1, 2, 8, 16, 24, 64, -8, -1];
        a.add(base, rng.pick(&steps))?;
    }
    if rng.percent(50) {
        a.inc(rcx)?;
    }
    a.sub(rsi, 1)?;
    a.jne(again)
}

/// Repeated copies and fills, from and to anywhere, of any length.
fn strings(a: &mut CodeAssembler, rng: &mut Rng) -> Assembled {
    a.mov(rdi, any_pointer(rng))?;
    a.mov(rsi, any_pointer(rng))?;
    for _ in 0..1 + rng.below(3) {
        let most = rng.pick(&[0, 3, 64, 600, 5000]);
        a.mov(ecx, rng.below(most + 1) as u32)?;
        if rng.percent(5) {
            a.not(rcx)?;
        }
        let rep = a.rep();
        match rng.below(6) {
            0 => rep.movsb()?,
            1 => rep.movsd()?,
            2 => rep.movsq()?,
            3 => rep.stosb()?,
            4 => rep.stosw()?,
            _ => rep.stosq()?,
        }
    }
    Ok(())
}

/// Makes something else of a pointer.
fn arithmetic(a: &mut CodeAssembler, rng: &mut Rng) -> Assembled {
    let base = rng.pick(&REGISTERS);
    a.mov(base, any_pointer(rng))?;
    match rng.below(6) {
        0 => a.bts(base, rng.below(64) as u32)?,
        1 => a.btr(base, rng.below(64) as u32)?,
        2 => a.xor(base, any_pointer(rng))?,
        3 => a.add(base, any_pointer(rng))?,
        4 => a.ror(base, rng.below(64) as u32)?,
        _ => a.sub(base, 1 << rng.below(31))?,
    }
    access(a, rng, base)
}

/// Accesses relative to RIP, a few times: within a page, over its end, in others.
fn beside_the_code(a: &mut CodeAssembler, rng: &mut Rng) -> Assembled {
    let page = rng.pick(&[DATA, DATA + PAGE, DATA + 2 * PAGE, POINTERS, RAM - PAGE, RAM, 0x7000_0000]);
    let mut again = a.create_label();
    a.mov(ebx, 3)?;
    a.set_label(&mut again)?;
    for _ in 0..2 + rng.below(3) {
        let at = page + if rng.percent(70) { rng.below(PAGE) } else { PAGE - rng.below(64) };
        let other = rng.pick(&[rax, rcx, rdx, rsi, r9, r13, r15]);
        let there = MemoryOperand::with_base_displ(Register::RIP, at as i64);
        let other: Register = other.into();
        a.add_instruction(match rng.below(5) {
            0 => Instruction::with2(Code::Mov_rm64_r64, there, other)?,
            1 => Instruction::with2(Code::Mov_r64_rm64, other, there)?,
            2 => Instruction::with2(Code::Movups_xmmm128_xmm, there, Register::XMM0)?,
            3 => Instruction::with2(Code::VEX_Vmovdqu_ymm_ymmm256, Register::YMM1, there)?,
            _ => Instruction::with2(Code::Add_rm64_r64, there, other)?,
        })?;
    }
    a.dec(ebx)?;
    a.jg(again)
}

/// Calls, as deep as there is room for return addresses and deeper; returns to others than the last caller.
fn calls(a: &mut CodeAssembler, rng: &mut Rng) -> Assembled {
    let (mut function, mut last, mut end) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(rsp, STACK)?;
    a.mov(ecx, rng.pick(&[1, 3, 100, 254, 255, 256, 257, 700]))?;
    a.call(function)?;
    a.jmp(end)?;
    a.set_label(&mut function)?;
    a.dec(ecx)?;
    a.jle(last)?;
    a.call(function)?;
    match rng.below(5) {
        0 => a.add(rsp, 8 * rng.below(3) as i32)?,
        1 => a.push(any_pointer(rng))?,
        2 => a.xchg(qword_ptr(rsp), rdx)?,
        _ => a.nop()?,
    }
    a.set_label(&mut last)?;
    a.ret()?;
    a.set_label(&mut end)?;
    a.nop()
}

fn wild_branch(a: &mut CodeAssembler, rng: &mut Rng) -> Assembled {
    match rng.below(5) {
        0 => {
            a.push(any_pointer(rng))?;
            a.ret()
        }
        1 => a.jmp(any_pointer(rng)),
        2 => a.call(any_pointer(rng)),
        3 => {
            a.mov(rdx, any_pointer(rng))?;
            a.jmp(rdx)
        }
        _ => {
            a.mov(eax, CODE as u32 + rng.below(CODE_SIZE as u64) as u32)?;
            a.jmp(rax)
        }
    }
}

/// Changes an entry of the page tables, and perhaps says so.
fn page_tables(a: &mut CodeAssembler, rng: &mut Rng) -> Assembled {
    let page = (DATA >> 12) + rng.below(5);
    let table = TABLES + PAGE * (3 + rng.below(2));
    let entry = match rng.below(6) {
        0 => 0,
        1 => rng.next() << 12 | 7,
        2 => (RAM + PAGE * rng.below(8)) | 7,
        3 => (DATA + PAGE * rng.below(4)) | rng.below(8),
        4 => (TABLES + PAGE * rng.below(5)) | 7,
        _ => DATA | 7 | 1 << 63,
    };
    a.mov(rax, entry)?;
    a.mov(qword_ptr(table + 8 * page), rax)?;
    match rng.below(5) {
        0 | 1 => a.invlpg(byte_ptr(page << 12)),
        2 | 3 => {
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)
        }
        _ => a.nop(),
    }
}

fn privileges(a: &mut CodeAssembler, rng: &mut Rng) -> Assembled {
    match rng.below(10) {
        0 => a.syscall(),
        1 => {
            a.mov(ecx, CODE as u32 + rng.below(CODE_SIZE as u64) as u32)?;
            a.sysretq()
        }
        2 => a.swapgs(),
        3 => a.stac(),
        4 => a.clac(),
        5 => a.cli(),
        6 => {
            a.mov(rax, cr0)?;
            a.btc(rax, 16)?;
            a.mov(cr0, rax)
        }
        7 => {
            a.mov(rax, cr4)?;
            a.btc(rax, rng.pick(&[7, 16, 20, 21]))?;
            a.mov(cr4, rax)
        }
        8 => a.int(rng.below(256) as i32),
        _ => a.popfq(),
    }
}

fn segments(a: &mut CodeAssembler, rng: &mut Rng) -> Assembled {
    a.mov(rax, any_pointer(rng))?;
    match rng.below(3) {
        0 => a.wrgsbase(rax)?,
        1 => a.wrfsbase(rax)?,
        _ => a.swapgs()?,
    }
    a.mov(qword_ptr(rcx).gs(), rdx)
}

/// Writes its own code.
fn over_itself(a: &mut CodeAssembler, rng: &mut Rng) -> Assembled {
    let at = CODE + rng.below(CODE_SIZE as u64);
    a.mov(eax, rng.next() as u32)?;
    match rng.below(3) {
        0 => a.mov(byte_ptr(at), al),
        1 => a.mov(dword_ptr(at), eax),
        _ => a.lock().xor(byte_ptr(at), rng.below(256) as u32),
    }
}

/// Other stacks.
fn stack(a: &mut CodeAssembler, rng: &mut Rng) -> Assembled {
    if rng.percent(40) {
        a.mov(rsp, any_pointer(rng))?;
        for _ in 0..rng.below(6) {
            let register = rng.pick(&REGISTERS);
            if rng.percent(50) { a.push(register)? } else { a.pop(register)? }
        }
        a.pushfq()?;
    }
    a.mov(rsp, STACK - 8 * rng.below(64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_can_be_assembled() {
        let mut rng = Rng::new(5);
        for _ in 0..20_000 {
            assert!(!piece(&mut rng, CODE).is_empty());
            assert!(scatter(&mut rng, CODE).len() >= 2 * PIECE + 6);
        }
    }
}
