//! Memory-type range registers: state only, with the checks of their values (SDM vol. 3A, 12.11; kernel:
//! arch/x86/kvm/mtrr.c).

/// Variable ranges.
const VARIABLE: usize = 8;
const PHYSBASE0: u32 = 0x200;
const FIX64K: u32 = 0x250;
const FIX16K: u32 = 0x258;
const FIX4K: u32 = 0x268;
const DEF_TYPE: u32 = 0x2ff;
const MTRRCAP: u32 = 0xfe;
/// Write-combining, fixed ranges, and the number of variable ones.
const CAP: u64 = 0x500 | VARIABLE as u64;

/// The registers of one vCPU.
#[derive(Clone, Debug, Default)]
pub(super) struct Mtrrs {
    variable: [u64; 2 * VARIABLE],
    fixed: [u64; 11],
    default: u64,
}

fn valid_type(kind: u8) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}

impl Mtrrs {
    fn fixed_index(index: u32) -> Option<usize> {
        match index {
            FIX64K => Some(0),
            FIX16K | 0x259 => Some((index - FIX16K) as usize + 1),
            FIX4K..=0x26f => Some((index - FIX4K) as usize + 3),
            _ => None,
        }
    }

    fn variable_index(index: u32) -> Option<usize> {
        let i = index.checked_sub(PHYSBASE0)? as usize;
        (i < 2 * VARIABLE).then_some(i)
    }

    pub(super) fn read(&self, index: u32) -> Option<u64> {
        match index {
            MTRRCAP => Some(CAP),
            DEF_TYPE => Some(self.default),
            _ => Mtrrs::variable_index(index)
                .map(|i| self.variable[i])
                .or_else(|| Mtrrs::fixed_index(index).map(|i| self.fixed[i])),
        }
    }

    /// False: no such register, or it cannot have the value. `physical`: the bits of a physical address.
    pub(super) fn write(&mut self, index: u32, value: u64, physical: u64) -> bool {
        let place = if index == DEF_TYPE {
            let valid = value & !0xcff == 0 && valid_type(value as u8);
            valid.then_some(&mut self.default)
        } else if let Some(i) = Mtrrs::variable_index(index) {
            let valid = if index & 1 == 0 {
                value & (!physical | 0xf00) == 0 && valid_type(value as u8)
            } else {
                value & (!physical | 0x7ff) == 0
            };
            valid.then_some(&mut self.variable[i])
        } else {
            let valid = value.to_le_bytes().into_iter().all(valid_type);
            Mtrrs::fixed_index(index).filter(|_| valid).map(|i| &mut self.fixed[i])
        };
        place.map(|place| *place = value).is_some()
    }
}
