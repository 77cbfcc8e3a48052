//! Instruction forms, from iced-x86's tables: which of them the model offers in 64-bit mode, and which of those
//! can be compared with the host at CPL 3. What cannot says why.

use std::arch::x86_64::__cpuid_count;

use iced_x86::{Code, CpuidFeature, FlowControl, Instruction, Mnemonic, OpCodeInfo, OpCodeOperandKind};
use silicon::model::Features;

/// What is done with a form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Not an instruction of 64-bit mode.
    OtherMode,
    /// The model does not offer it.
    NotOffered,
    /// Run on the host and in the guest, and compared.
    Compared,
    /// Needs CPL 0: here only its fault at CPL 3 is compared; the rest is covered by the guest programs.
    FaultCompared,
    /// Cannot be run on this host at CPL 3, for this reason; covered by the guest programs.
    Guests(&'static str),
}

/// One instruction form.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// iced-x86's number for it.
    pub code: Code,
    /// What is done with it.
    pub class: Class,
}

impl Form {
    /// The extension group that the coverage table lists it under.
    pub fn group(&self) -> String {
        let names: Vec<String> = self.code.cpuid_features().iter().map(|f| format!("{f:?}")).collect();
        names.join(" and ")
    }
}

type Rule = (&'static str, fn(Code, &OpCodeInfo) -> bool);

/// Forms that user code of a normal process cannot run, or not with a result that could be compared.
const COVERED_BY_GUESTS: &[Rule] = &[
    ("leaves to the operating system", |code, _| {
        use Mnemonic::*;
        let flow = matches!(code.flow_control(), FlowControl::Interrupt);
        let call = matches!(code.mnemonic(), Syscall | Sysenter | Sysexit | Sysret | Sysexitq | Sysretq);
        (flow || call) && !matches!(code.mnemonic(), Ud0 | Ud1 | Ud2)
    }),
    ("far control transfer: needs the operating system's descriptor tables", |code, _| {
        use Mnemonic::*;
        code.is_jmp_far()
            || code.is_jmp_far_indirect()
            || code.is_call_far()
            || code.is_call_far_indirect()
            || matches!(code.mnemonic(), Retf | Iret | Iretd | Iretq)
    }),
    ("loads a segment register from the operating system's descriptor tables", |code, op| {
        use Mnemonic::*;
        let segment = |kind: &OpCodeOperandKind| {
            use OpCodeOperandKind::*;
            matches!(kind, seg_reg | es | cs | ss | ds | fs | gs)
        };
        let first = op.op_kinds().first().is_some_and(segment);
        (first && matches!(code.mnemonic(), Mov | Pop))
            || matches!(code.mnemonic(), Lds | Les | Lfs | Lgs | Lss)
    }),
    ("reads the operating system's descriptor tables", |code, _| {
        use Mnemonic::*;
        matches!(code.mnemonic(), Lar | Lsl | Verr | Verw)
    }),
    ("emulated by the operating system where UMIP forbids it", |code, _| {
        use Mnemonic::*;
        matches!(code.mnemonic(), Sgdt | Sidt | Sldt | Str | Smsw)
    }),
    ("answered by the hypervisor", |code, _| {
        use Mnemonic::*;
        matches!(code.mnemonic(), Cpuid | Vmcall | Vmmcall | Vmfunc | Getsec | Encls | Enclu | Enclv)
    }),
    ("virtualization instructions need VMX or SVM operation", |code, _| {
        code.cpuid_features().iter().any(|f| matches!(f, CpuidFeature::VMX | CpuidFeature::SVM))
    }),
    ("transactional memory: not repeatable", |code, _| {
        let transactional = |f: &CpuidFeature| {
            matches!(
                f,
                CpuidFeature::RTM | CpuidFeature::HLE | CpuidFeature::HLE_or_RTM | CpuidFeature::TSXLDTRK
            )
        };
        code.cpuid_features().iter().any(transactional)
    }),
    ("tiles are compared with a reference model of them in silicon's own tests", |code, _| {
        code.cpuid_features().iter().any(|feature| TILES.contains(feature))
    }),
];

/// AMX's instruction groups: processes need the kernel's permission for tiles, and few hosts have any.
const TILES: &[CpuidFeature] = &[
    CpuidFeature::AMX_TILE,
    CpuidFeature::AMX_INT8,
    CpuidFeature::AMX_BF16,
    CpuidFeature::AMX_FP16,
    CpuidFeature::AMX_COMPLEX,
];

/// Features that the model can offer on a host that lacks them, with the host's own CPUID bit
/// (leaf 7 subleaf 0: register 1 = EBX, 2 = ECX, 3 = EDX).
const HOST_MAY_LACK: &[(CpuidFeature, u32, u32)] = &[
    (CpuidFeature::PKU, 2, 4),
    (CpuidFeature::WAITPKG, 2, 5),
    (CpuidFeature::CLDEMOTE, 2, 25),
    (CpuidFeature::MOVDIRI, 2, 27),
    (CpuidFeature::MOVDIR64B, 2, 28),
    (CpuidFeature::RDPID, 2, 22),
    (CpuidFeature::SERIALIZE, 3, 14),
    (CpuidFeature::FSGSBASE, 1, 0),
    (CpuidFeature::RDSEED, 1, 18),
    (CpuidFeature::ADX, 1, 19),
    (CpuidFeature::CLFLUSHOPT, 1, 23),
    (CpuidFeature::CLWB, 1, 24),
];

fn host_lacks(code: Code) -> bool {
    let leaf = __cpuid_count(7, 0);
    let registers = [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx];
    HOST_MAY_LACK.iter().any(|(feature, register, bit)| {
        code.cpuid_features().contains(feature) && registers[*register as usize] & (1 << bit) == 0
    })
}

/// At CPL 3 with IOPL 0, these fault before they do anything.
fn faults_at_cpl3(code: Code, op: &OpCodeInfo) -> bool {
    use Mnemonic::*;
    op.must_be_cpl0() || op.is_input_output() || matches!(code.mnemonic(), Cli | Sti | Rdpmc)
}

/// Classifies one form.
pub fn classify(code: Code, features: &Features) -> Class {
    let op = code.op_code();
    // FSTENV and its like are FWAIT and FNSTENV: two instructions, which have their own forms.
    if !op.is_instruction() || op.fwait() || !op.mode64() || !op.intel_decoder64() {
        return Class::OtherMode;
    }
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    if !features.offers(&instruction) {
        return Class::NotOffered;
    }
    if let Some((reason, _)) = COVERED_BY_GUESTS.iter().find(|(_, rule)| rule(code, op)) {
        return Class::Guests(reason);
    }
    if host_lacks(code) {
        return Class::Guests("this host lacks the feature");
    }
    if faults_at_cpl3(code, op) { Class::FaultCompared } else { Class::Compared }
}

/// All forms of iced-x86's table with their classes.
pub fn all(features: &Features) -> Vec<Form> {
    Code::values().map(|code| Form { code, class: classify(code, features) }).collect()
}

/// Registers and flags that may differ, with the reason.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tolerance {
    /// General registers by encoding number, as a bit mask.
    pub gpr: u16,
    /// The destination register of operand 0 as well.
    pub destination: bool,
    /// RFLAGS bits.
    pub flags: u64,
}

/// What may differ between two executions of the same instruction on the same processor.
pub fn tolerance(mnemonic: Mnemonic) -> Tolerance {
    use Mnemonic::*;
    match mnemonic {
        // Time passes.
        Rdtsc => Tolerance { gpr: 0b101, ..Tolerance::default() },
        Rdtscp => Tolerance { gpr: 0b111, ..Tolerance::default() },
        // The operating system's IA32_TSC_AUX.
        Rdpid => Tolerance { destination: true, ..Tolerance::default() },
        // Random numbers, and whether there was one in time.
        Rdrand | Rdseed => Tolerance { destination: true, flags: 1, ..Tolerance::default() },
        _ => Tolerance::default(),
    }
}

#[cfg(test)]
mod tests {
    use silicon::model::CpuModel;

    use super::*;

    fn class(code: Code) -> Class {
        classify(code, &CpuModel::default().features())
    }

    #[test]
    fn forms_have_the_class_that_their_privilege_asks_for() {
        assert_eq!(class(Code::Add_rm32_r32), Class::Compared);
        assert_eq!(class(Code::Hlt), Class::FaultCompared);
        assert_eq!(class(Code::In_AL_imm8), Class::FaultCompared);
        assert_eq!(class(Code::Pushd_imm32), Class::OtherMode);
        assert_eq!(class(Code::Fstcw_m2byte), Class::OtherMode);
        assert_eq!(class(Code::XOP_Vprotb_xmm_xmmm128_imm8), Class::NotOffered);
        assert!(matches!(class(Code::Syscall), Class::Guests(_)));
        assert!(matches!(class(Code::Int3), Class::Guests(_)));
        assert!(matches!(class(Code::Mov_Sreg_rm16), Class::Guests(_)));
        assert_eq!(class(Code::Mov_rm16_Sreg), Class::Compared);
        assert_eq!(class(Code::Ud2), Class::Compared);
    }

    #[test]
    fn few_forms_are_left_to_the_guest_programs() {
        let left = all(&CpuModel::default().features());
        let left = left.iter().filter(|form| matches!(form.class, Class::Guests(_))).count();
        assert!(left < 120, "{left}");
    }
}
