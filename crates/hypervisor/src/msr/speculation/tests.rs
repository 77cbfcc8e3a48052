use silicon::model::Host;

use super::super::MsrError;
use super::super::tests::{CLIENT, Fake, GUEST, state};
use silicon::buffers::mcu_opt_ctrl::{FB_CLEAR_DIS, GDS_MITG_DIS, RNGDS_MITG_DIS};

use super::*;
use silicon::model::Features;

/// A guest with all that there is, without `left_out`.
fn env(left_out: &[Feature]) -> Fake {
    let mut features = Host::get().offered;
    features.insert(Feature::ArchCapabilities);
    left_out.iter().for_each(|&feature| features.remove(feature));
    let mut env = Fake::default();
    env.features = Features::new(features, 46);
    env
}

/// Spec M1.
#[test]
fn ac_m1_the_register_is_read_by_who_has_it_and_written_by_no_guest() {
    let mut msrs = state();
    assert!(msrs.read(0x10a, GUEST, &mut env(&[])).is_ok_and(|value| value & RDCL_NO != 0));
    let mut without = env(&[Feature::ArchCapabilities]);
    assert_eq!(msrs.read(0x10a, GUEST, &mut without), Err(MsrError::Refused(0x10a)));
    for value in [0, 1, u64::MAX] {
        assert_eq!(msrs.write(0x10a, value, GUEST, &mut env(&[])), Err(MsrError::Refused(0x10a)));
    }
}

/// Spec M2 and H2: no bit promises a register that there is not.
#[test]
fn ac_m2_every_settable_bit_has_its_register() {
    for (bit, index, value) in [
        (arch_cap::TSX_CTRL, 0x122, 0b11),
        (FB_CLEAR_CTRL, 0x123, FB_CLEAR_DIS),
        (GDS_CTRL, 0x123, GDS_MITG_DIS),
    ] {
        let (mut msrs, mut env) = (state(), env(&[Feature::SrbdsCtrl]));
        msrs.write(0x10a, 0, CLIENT, &mut env).unwrap();
        assert_eq!(msrs.read(index, GUEST, &mut env), Err(MsrError::Refused(index)), "{bit:#x}");
        assert_eq!(msrs.write(index, 0, GUEST, &mut env), Err(MsrError::Refused(index)), "{bit:#x}");
        msrs.write(0x10a, bit, CLIENT, &mut env).unwrap();
        assert_eq!(msrs.write(index, value, GUEST, &mut env), Ok(()), "{bit:#x}");
        assert_eq!(msrs.read(index, GUEST, &mut env), Ok(value), "{bit:#x}");
        assert_eq!(msrs.write(index, 1 << 7, GUEST, &mut env), Err(MsrError::Refused(index)));
    }
    for bit in [
        MCU_CONTROL,
        MISC_PACKAGE_CTLS,
        ENERGY_FILTERING_CTL,
        DOITM,
        XAPIC_DISABLE_STATUS,
        OVERCLOCKING_STATUS,
        1 << 16,
        1 << 63,
    ] {
        assert_eq!(
            state().write(0x10a, bit, CLIENT, &mut env(&[])),
            Err(MsrError::Refused(0x10a)),
            "{bit:#x}"
        );
    }
}

/// H8: without SRBDS_CTRL or GDS_CTRL the guest has no such bits.
#[test]
fn ac_h8_srbds_and_gds_controls_by_their_enumeration() {
    let (mut msrs, mut env) = (state(), env(&[]));
    assert_eq!(msrs.write(0x123, RNGDS_MITG_DIS, GUEST, &mut env), Ok(()));
    for bit in [1 << 1, FB_CLEAR_DIS, GDS_MITG_DIS, 1 << 5] {
        assert_eq!(msrs.write(0x123, bit, GUEST, &mut env), Err(MsrError::Refused(0x123)), "{bit:#x}");
    }
}

/// Spec M3 and H7: each bit of IA32_SPEC_CTRL needs its own CPUID bit; the commands are written, not read.
#[test]
fn ac_m3_prediction_controls_and_commands_by_cpuid() {
    for (bits, feature) in [
        (0b01, Feature::SpecCtrl),
        (0b10, Feature::Stibp),
        (0b100, Feature::Ssbd),
        (0b1_1000, Feature::IpredCtrl),
        (0b110_0000, Feature::RrsbaCtrl),
        (1 << 7, Feature::Psfd),
        (1 << 8, Feature::DdpdU),
        (1 << 10, Feature::BhiCtrl),
    ] {
        let mut msrs = state();
        assert_eq!(msrs.write(0x48, bits, GUEST, &mut env(&[])), Ok(()), "{feature}");
        assert_eq!(msrs.read(0x48, GUEST, &mut env(&[])), Ok(bits), "{feature}");
        let refused = msrs.write(0x48, bits, GUEST, &mut env(&[feature]));
        assert_eq!(refused, Err(MsrError::Refused(0x48)), "{feature}");
        assert_eq!(msrs.write(0x48, bits, CLIENT, &mut env(&[feature])), Ok(()), "{feature}");
    }
    assert_eq!(state().write(0x48, 1 << 9, CLIENT, &mut env(&[])), Err(MsrError::Refused(0x48)));
    for (index, feature) in [(0x49, Feature::SpecCtrl), (0x10b, Feature::FlushL1d)] {
        let write = |value, env: &mut Fake| state().write(index, value, GUEST, env).is_ok();
        assert!(write(1, &mut env(&[])) && write(0, &mut env(&[])), "{index:#x}");
        assert!(!write(2, &mut env(&[])) && !write(1 << 63, &mut env(&[])), "{index:#x}");
        assert!(!write(1, &mut env(&[feature])), "{index:#x}");
        assert!(state().read(index, GUEST, &mut env(&[])).is_err(), "{index:#x}");
    }
}

/// Spec M3: IA32_SPEC_CTRL is there if any of its bits is, and only then (SDM vol. 4, table 2-2).
#[test]
fn ac_m3_any_prediction_control_enumerates_the_register() {
    let all = [
        (Feature::SpecCtrl, 0b01),
        (Feature::Stibp, 0b10),
        (Feature::Ssbd, 0b100),
        (Feature::IpredCtrl, 1 << 3),
        (Feature::RrsbaCtrl, 1 << 5),
        (Feature::Psfd, 1 << 7),
        (Feature::DdpdU, 1 << 8),
        (Feature::BhiCtrl, 1 << 10),
    ];
    for (feature, bit) in all {
        let others: Vec<Feature> = all.iter().map(|row| row.0).filter(|&other| other != feature).collect();
        let (mut msrs, mut env) = (state(), env(&others));
        assert_eq!(msrs.write(0x48, bit, GUEST, &mut env), Ok(()), "{feature}");
        assert_eq!(msrs.read(0x48, GUEST, &mut env), Ok(bit), "{feature}");
        let more = if bit == 1 { 0b10 } else { 1 };
        assert_eq!(msrs.write(0x48, more, GUEST, &mut env), Err(MsrError::Refused(0x48)), "{feature}");
    }
    let mut without = env(&all.map(|row| row.0));
    assert_eq!(state().read(0x48, GUEST, &mut without), Err(MsrError::Refused(0x48)));
    assert_eq!(state().write(0x48, 0, GUEST, &mut without), Err(MsrError::Refused(0x48)));
    assert_eq!(state().read(0x48, CLIENT, &mut without), Ok(0));
}
