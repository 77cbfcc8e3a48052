//! The architectural state of one logical processor, in one structure with fixed offsets, so that an
//! interpreter and a translator can share it.

use crate::flags::{Rflags, Status};
use crate::tiles::TileConfig;

/// Indices into [`CpuState::regs`]: the sixteen general registers in encoding order, then two slots that make
/// every effective address one formula (`base + (index << scale) + disp + segment base`).
pub mod reg {
    #![allow(missing_docs, reason = "the names are the SDM's register names")]
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    pub const R8: u8 = 8;
    pub const R9: u8 = 9;
    pub const R10: u8 = 10;
    pub const R11: u8 = 11;
    pub const R12: u8 = 12;
    pub const R13: u8 = 13;
    pub const R14: u8 = 14;
    pub const R15: u8 = 15;
    /// Always zero: an absent base or index.
    pub const ZERO: u8 = 16;
    /// The instruction pointer at offset 0 of the page that the running block lies in (`rip - (lin & 0xfff)`).
    pub const IP_BASE: u8 = 17;
}

/// Segment registers in encoding order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Seg {
    /// ES.
    Es = 0,
    /// CS.
    Cs = 1,
    /// SS.
    Ss = 2,
    /// DS.
    Ds = 3,
    /// FS.
    Fs = 4,
    /// GS.
    Gs = 5,
}

impl Seg {
    /// All six, in encoding order.
    pub const ALL: [Seg; 6] = [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs];

    /// From the encoding; values above 5 give GS (decoders never produce them).
    #[inline(always)]
    pub fn from_index(index: u8) -> Seg {
        match index {
            0 => Seg::Es,
            1 => Seg::Cs,
            2 => Seg::Ss,
            3 => Seg::Ds,
            4 => Seg::Fs,
            _ => Seg::Gs,
        }
    }
}

/// A segment register with its hidden part (SDM vol. 3A, 3.4.3). Access rights use the VMX layout
/// (SDM vol. 3C, table 25-2): bits 3:0 type, 4 S, 6:5 DPL, 7 P, 12 AVL, 13 L, 14 D/B, 15 G, 16 unusable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    /// Linear address of the segment's first byte.
    pub base: u64,
    /// Last valid offset in bytes (granularity already applied).
    pub limit: u32,
    /// Access rights, VMX layout.
    pub attributes: u32,
    /// The visible selector.
    pub selector: u16,
}

impl Segment {
    /// Attribute bit: the segment register holds a null selector.
    pub const UNUSABLE: u32 = 1 << 16;

    /// Descriptor type, bits 3:0.
    pub fn kind(&self) -> u8 {
        (self.attributes & 15) as u8
    }
    /// S bit: code or data (true), system (false).
    pub fn is_code_or_data(&self) -> bool {
        self.attributes & (1 << 4) != 0
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        ((self.attributes >> 5) & 3) as u8
    }
    /// Present bit.
    pub fn present(&self) -> bool {
        self.attributes & (1 << 7) != 0
    }
    /// L bit: 64-bit code.
    pub fn long(&self) -> bool {
        self.attributes & (1 << 13) != 0
    }
    /// D/B bit: 32-bit default size, 32-bit stack pointer, or 4 GiB upper bound of an expand-down segment.
    pub fn big(&self) -> bool {
        self.attributes & (1 << 14) != 0
    }
    /// Null selector loaded, or never loaded.
    pub fn unusable(&self) -> bool {
        self.attributes & Segment::UNUSABLE != 0
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TableRegister {
    /// Linear base address.
    pub base: u64,
    /// Last valid byte offset.
    pub limit: u16,
}

/// How instruction bytes are decoded and linear addresses formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum CodeSize {
    /// 16-bit default operand and address size (real, virtual-8086, 16-bit protected, 16-bit compatibility).
    #[default]
    Bits16 = 0,
    /// 32-bit default sizes.
    Bits32 = 1,
    /// 64-bit mode.
    Bits64 = 2,
}

impl CodeSize {
    /// 16, 32 or 64.
    pub fn bits(self) -> u32 {
        16 << self as u32
    }
}

/// One 512-bit vector register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Zmm(pub [u8; 64]);

/// x87 state as FXSAVE64 lays it out, bytes 0 to 159 (SDM vol. 1, table 10-2), and MXCSR.
///
/// While guest code runs the x87 registers may live in the host's FPU instead; `hostexec` owns that rule and
/// brings this image up to date before anyone outside looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct X87 {
    /// Control word.
    pub fcw: u16,
    /// Status word.
    pub fsw: u16,
    /// Abridged tag word: bit i set = physical register i is not empty.
    pub ftw: u8,
    /// Reserved.
    pub reserved: u8,
    /// Last opcode, 11 bits.
    pub fop: u16,
    /// Last instruction pointer (64-bit form).
    pub fip: u64,
    /// Last data pointer (64-bit form).
    pub fdp: u64,
    /// Kept here only for the layout: the live MXCSR is [`CpuState::mxcsr`].
    pub mxcsr_slot: u32,
    /// Kept here only for the layout.
    pub mxcsr_mask_slot: u32,
    /// ST(0) to ST(7), 80 bits each in 16 bytes; MM0 to MM7 are their low 64 bits.
    pub st: [[u8; 16]; 8],
    /// FCS and FDS, for the 32-bit image formats.
    pub fcs: u16,
    /// Data segment selector of the last operand.
    pub fds: u16,
}

impl X87 {
    /// State after FNINIT.
    pub const INIT: X87 = X87 {
        fcw: 0x37f,
        fsw: 0,
        ftw: 0,
        reserved: 0,
        fop: 0,
        fip: 0,
        fdp: 0,
        mxcsr_slot: 0,
        mxcsr_mask_slot: 0,
        st: [[0; 16]; 8],
        fcs: 0,
        fds: 0,
    };
}

/// Interrupt-delivery blocking, in the layout of the VMCS's guest interruptibility state (SDM vol. 3C, table 25-3).
pub mod interruptibility {
    /// The instruction after STI runs first.
    pub const STI: u32 = 1 << 0;
    /// The instruction after MOV SS or POP SS runs first.
    pub const MOV_SS: u32 = 1 << 1;
    /// NMIs are blocked until IRET.
    pub const NMI: u32 = 1 << 3;
}

/// What the logical processor is doing (SDM vol. 3C, 25.4.2, activity state).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(u32)]
pub enum Activity {
    /// Executing instructions.
    #[default]
    Active = 0,
    /// HLT: waits for an event.
    Halted = 1,
    /// After a triple fault.
    Shutdown = 2,
    /// After INIT: waits for a start-up IPI.
    WaitForSipi = 3,
}

/// Everything that software can see of one logical processor except the MSRs that the hypervisor keeps.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct CpuState {
    /// General registers and the address-formula slots; see [`reg`].
    pub regs: [u64; 32],
    /// Base added for each segment in address formation: 0 where 64-bit mode ignores it. Kept by
    /// `Cpu::refresh_mode` and segment loads; index 6 is always zero.
    pub ea_base: [u64; 8],
    /// Instruction pointer (offset in CS). Valid between blocks; inside a block it is IP_BASE plus the
    /// operation's page offset.
    pub rip: u64,
    /// RFLAGS without the six status flags; bit 1 is set.
    pub rflags_system: u64,
    /// The six status flags.
    pub status: Status,
    /// Decoding mode, from CR0.PE, EFER.LMA, CS.L and CS.D.
    pub code_size: CodeSize,
    /// Current privilege level.
    pub cpl: u8,
    /// SS.B (32-bit stack pointer) outside 64-bit mode.
    pub stack32: bool,
    /// In system management mode (SDM vol. 3C, chapter 31); see `Cpu::set_smm`.
    pub smm: bool,
    /// [`interruptibility`] bits.
    pub interruptibility: u32,
    /// Activity state.
    pub activity: Activity,
    /// ES, CS, SS, DS, FS, GS.
    pub segs: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table register.
    pub idtr: TableRegister,
    /// Control register 0.
    pub cr0: u64,
    /// Page-fault linear address.
    pub cr2: u64,
    /// Page-table base, PCID.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Task priority as seen by MOV CR8 (bits 3:0).
    pub cr8: u64,
    /// Extended feature enables.
    pub efer: u64,
    /// PDPTEs loaded by MOV CR3 under PAE paging.
    pub pdptr: [u64; 4],
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
    /// IA32_DEBUGCTL. The hypervisor keeps RDMSR and WRMSR; silicon acts on BLD alone
    /// ([`debugctl`](crate::bus_lock::debugctl)).
    pub debugctl: u64,
    /// XSAVE feature enables.
    pub xcr0: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// Protection-key rights, user pages.
    pub pkru: u32,
    /// SSE control and status.
    pub mxcsr: u32,
    /// SYSCALL: IA32_STAR.
    pub star: u64,
    /// SYSCALL target, 64-bit mode.
    pub lstar: u64,
    /// SYSCALL target, compatibility mode.
    pub cstar: u64,
    /// SYSCALL flag mask.
    pub sfmask: u64,
    /// SWAPGS counterpart of GS.base.
    pub kernel_gs_base: u64,
    /// SYSENTER CS.
    pub sysenter_cs: u64,
    /// SYSENTER RSP.
    pub sysenter_esp: u64,
    /// SYSENTER RIP.
    pub sysenter_eip: u64,
    /// RDTSCP and RDPID value.
    pub tsc_aux: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// x87 and MMX.
    pub x87: X87,
    /// AVX-512 mask registers.
    pub k: [u64; 8],
    /// Vector registers.
    pub zmm: [Zmm; 32],
    /// IA32_XFD: XSAVE components whose use is #NM.
    pub xfd: u64,
    /// IA32_XFD_ERR: the components that the last such #NM was for. Only software clears it.
    pub xfd_err: u64,
    /// TILECFG.
    pub tile_config: TileConfig,
    /// XINUSE\[18\]: TILEDATA is not in its initial configuration. The tiles themselves are the CPU's
    /// ([`Cpu::reserve_tile_data`](crate::Cpu::reserve_tile_data)): few CPUs ever need them.
    pub tile_data_used: bool,
}

impl CpuState {
    /// State after power-up or RESET (SDM vol. 3A, table 10-1). `family_model` is what RDX holds then.
    pub fn reset(family_model: u32) -> CpuState {
        let real =
            |selector: u16, base: u64, attributes: u32| Segment { base, limit: 0xffff, attributes, selector };
        let data = real(0, 0, 0x93);
        let mut regs = [0; 32];
        regs[reg::RDX as usize] = u64::from(family_model);
        CpuState {
            regs,
            ea_base: [0; 8],
            rip: 0xfff0,
            rflags_system: Rflags::FIXED.bits(),
            status: Status::default(),
            code_size: CodeSize::Bits16,
            cpl: 0,
            stack32: false,
            smm: false,
            interruptibility: 0,
            activity: Activity::Active,
            segs: [data, real(0xf000, 0xffff_0000, 0x9b), data, data, data, data],
            ldtr: real(0, 0, 0x82),
            tr: real(0, 0, 0x8b),
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: 0,
            pdptr: [0; 4],
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            debugctl: 0,
            xcr0: 1,
            xss: 0,
            pkru: 0,
            mxcsr: 0x1f80,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            pat: 0x0007_0406_0007_0406,
            x87: X87 { fcw: 0x40, ftw: 0xff, ..X87::INIT },
            k: [0; 8],
            zmm: [Zmm([0; 64]); 32],
            xfd: 0,
            xfd_err: 0,
            tile_config: TileConfig::default(),
            tile_data_used: false,
        }
    }

    /// RFLAGS as PUSHF would read it.
    pub fn rflags(&self) -> u64 {
        self.rflags_system | self.status.to_rflags()
    }

    /// Replaces all of RFLAGS; reserved bits are fixed up.
    pub fn set_rflags(&mut self, value: u64) {
        let value = value & Rflags::DEFINED;
        self.status = Status::from_rflags(value);
        self.rflags_system = (value & !Rflags::STATUS.bits()) | Rflags::FIXED.bits();
    }

    /// Whether any of `bits` is set in the system part of RFLAGS (not for the status flags).
    #[inline(always)]
    pub fn flag(&self, bits: Rflags) -> bool {
        self.rflags_system & bits.bits() != 0
    }

    /// The enabled XSAVE components that IA32_XFD disables. It has no effect on those that XCR0 does not enable.
    #[inline(always)]
    pub fn xfd_disabled(&self) -> u64 {
        self.xfd & self.xcr0
    }

    /// I/O privilege level.
    pub fn iopl(&self) -> u8 {
        ((self.rflags_system >> 12) & 3) as u8
    }

    /// CR0.PE is clear.
    pub fn real_mode(&self) -> bool {
        self.cr0 & cr0::PE == 0
    }

    /// Virtual-8086 mode.
    pub fn v8086(&self) -> bool {
        self.flag(Rflags::VM)
    }

    /// EFER.LMA: IA-32e mode (64-bit or compatibility).
    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// The mask that the instruction pointer wraps at as execution goes on: that of RIP or EIP. 16-bit code that
    /// runs past 64 KiB does not wrap but meets the limit of CS.
    #[inline(always)]
    pub fn eip_mask(&self) -> u64 {
        if self.code_size == CodeSize::Bits64 { u64::MAX } else { 0xffff_ffff }
    }
}

/// CR0 bits.
pub mod cr0 {
    #![allow(missing_docs, reason = "the names are the SDM's")]
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits.
pub mod cr4 {
    #![allow(missing_docs, reason = "the names are the SDM's")]
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const VMXE: u64 = 1 << 13;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
    pub const CET: u64 = 1 << 23;
    pub const PKS: u64 = 1 << 24;
}

/// IA32_EFER bits.
pub mod efer {
    #![allow(missing_docs, reason = "the names are the SDM's")]
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}
