//! Models as people write them: `sapphire-rapids,+feature,-feature`.

use crate::model::feature::FEATURES;
use crate::model::models::{self, CpuModel, Why, why};
use crate::model::msrs::Scope;
use crate::model::{Feature, FeatureSet, Host};

/// What is wrong with a written model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// No such model.
    #[error("unknown CPU model '{name}'{}; known models: {known}", suggestion(.nearest))]
    UnknownModel {
        /// What was asked for.
        name: String,
        /// The known name nearest to it, if one is near.
        nearest: Option<&'static str>,
        /// All of them.
        known: String,
    },
    /// No such feature.
    #[error("unknown CPU feature '{name}'{}; known features: {known}", suggestion(.nearest))]
    UnknownFeature {
        /// What was asked for.
        name: String,
        /// The known name nearest to it, if one is near.
        nearest: Option<&'static str>,
        /// All of them.
        known: String,
    },
    /// Neither `+feature` nor `-feature`, nor an option.
    #[error("'{0}' in the CPU model: expected +feature, -feature, {OPTIONS}")]
    NoSign(String),
    /// Asked for, but not to be had here.
    #[error("CPU feature '{feature}' cannot be offered: {}", reason(.why))]
    NotHere {
        /// The feature.
        feature: Feature,
        /// Why.
        why: Why,
    },
}

/// The options, for messages.
const OPTIONS: &str =
    "model=0..255, stepping=0..15, arch-cap=BITS (0x8000 and the like), test-ctrl=core or test-ctrl=thread";

fn suggestion(nearest: &Option<&'static str>) -> String {
    nearest.map_or(String::new(), |name| format!(" (did you mean '{name}'?)"))
}

fn reason(why: &Why) -> String {
    match why {
        Why::Host => "this machine's CPU does not have it".into(),
        Why::NotExecuted => "ring3 does not execute it".into(),
        Why::OnRequest => "it is there if asked for with '+'".into(),
        Why::Needs(other) => format!("it needs '{other}', which this machine cannot offer"),
    }
}

impl CpuModel {
    /// Reads `model[,+feature|,-feature|,option]…`. What a feature needs comes with it; what needs it goes with it. Options:
    /// `model=N` and `stepping=N` are the numbers in CPUID.1:EAX, of family 6; `arch-cap=BITS` is the value of
    /// IA32_ARCH_CAPABILITIES, which comes with it; `test-ctrl=core|thread` is what MSR_TEST_CTRL, which holds split-lock detection, exists once per.
    pub fn parse(text: &str) -> Result<CpuModel, ModelError> {
        let mut items = text.split(',').map(str::trim);
        let name = items.next().unwrap_or_default();
        let row = models::rows().iter().find(|row| plain(row.name) == plain(name));
        let row = row.ok_or_else(|| ModelError::UnknownModel {
            name: name.into(),
            nearest: nearest(name, models::names()),
            known: models::names().collect::<Vec<_>>().join(", "),
        })?;
        let host = Host::get();
        let (mut plus, mut minus) = (FeatureSet::EMPTY, FeatureSet::EMPTY);
        let mut options = Options::default();
        for item in items {
            if let Some(name) = item.strip_prefix('+') {
                let feature = feature(name)?;
                if !host.offered.has(feature) {
                    return Err(ModelError::NotHere { feature, why: why(feature, host.offered) });
                }
                let wanted = FeatureSet::of(&[feature]).with_needs();
                (plus, minus) = (plus.union(wanted), minus.minus(wanted));
            } else if let Some(name) = item.strip_prefix('-') {
                let feature = feature(name)?;
                minus.insert(feature);
                plus.remove(feature);
            } else {
                options.read(item).ok_or_else(|| ModelError::NoSign(item.into()))?;
            }
        }
        if options.arch_capabilities.is_some() {
            plus.insert(Feature::ArchCapabilities);
        }
        Ok(options.apply(CpuModel::new(row, plus, minus, host)))
    }
}

/// What options say.
#[derive(Default)]
struct Options {
    model: Option<u8>,
    stepping: Option<u8>,
    arch_capabilities: Option<u64>,
    test_ctrl: Option<Scope>,
}

impl Options {
    /// Takes `name=value`; `None`: it is no option.
    fn read(&mut self, item: &str) -> Option<()> {
        match item.split_once('=')? {
            ("model", value) => self.model = Some(u8::try_from(number(value)?).ok()?),
            ("stepping", value) => {
                self.stepping = Some(u8::try_from(number(value)?).ok().filter(|&stepping| stepping < 16)?);
            }
            ("arch-cap", value) => self.arch_capabilities = Some(number(value)?),
            ("test-ctrl", "core") => self.test_ctrl = Some(Scope::Core),
            ("test-ctrl", "thread") => self.test_ctrl = Some(Scope::Thread),
            _ => return None,
        }
        Some(())
    }

    fn apply(self, model: CpuModel) -> CpuModel {
        let (number, stepping) = model.numbers();
        model
            .numbered(self.model.unwrap_or(number), self.stepping.unwrap_or(stepping))
            .with_arch_capabilities(self.arch_capabilities)
            .with_test_ctrl_scope(self.test_ctrl.unwrap_or(Scope::Core))
    }
}

/// A number, hexadecimal after `0x`.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn feature(name: &str) -> Result<Feature, ModelError> {
    Feature::from_name(name).ok_or_else(|| {
        let names = || FEATURES.iter().map(|row| row.name);
        ModelError::UnknownFeature {
            name: name.into(),
            nearest: nearest(name, names()),
            known: names().collect::<Vec<_>>().join(" "),
        }
    })
}

/// A model name as it is compared: QEMU writes `SapphireRapids`.
fn plain(name: &str) -> String {
    name.chars().filter(|c| !matches!(c, '-' | '_')).flat_map(char::to_lowercase).collect()
}

/// The name nearest to `name`, if a third of it at most would have to change.
fn nearest(name: &str, known: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    let name = name.to_lowercase();
    let (distance, best) = known.map(|k| (distance(&name, k), k)).min_by_key(|(d, _)| *d)?;
    (distance <= name.len().max(3) / 3).then_some(best)
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_changes() {
        let model = CpuModel::parse("nehalem,+smep,-popcnt").unwrap();
        assert!(model.has(Feature::Smep) && !model.has(Feature::Popcnt));
        assert_eq!(CpuModel::parse("SapphireRapids").unwrap().name(), "sapphire-rapids");
        let bare = CpuModel::parse("sapphire-rapids,-sse2").unwrap();
        assert!(bare.has(Feature::Sse) && !bare.has(Feature::Aes) && !bare.has(Feature::Avx));
        let last_wins = CpuModel::parse("haswell,-smep,+smep").unwrap();
        assert!(last_wins.has(Feature::Smep));
    }

    #[test]
    fn ac_numbers_and_capabilities_of_choice() {
        let model = CpuModel::parse("skylake,model=0x9e,stepping=12,arch-cap=0x20,+rtm").unwrap();
        assert_eq!((model.signature(), model.features().signature()), (0x906ec, 0x906ec));
        assert_eq!((model.chosen_arch_capabilities(), model.has(Feature::Rtm)), (Some(0x20), true));
        let plain = CpuModel::parse("skylake").unwrap();
        assert_eq!((plain.signature(), plain.chosen_arch_capabilities()), (0x50654, None));
        assert!(!plain.has(Feature::Rtm) && !CpuModel::parse("haswell").unwrap().has(Feature::Rtm));
        for wrong in ["model=256", "model=", "stepping=16", "arch-cap=0xx", "arch-cap=-1", "family=15"] {
            assert!(CpuModel::parse(&format!("max,{wrong}")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn errors_say_what_would_do() {
        let message = |text| CpuModel::parse(text).unwrap_err().to_string();
        assert_eq!(
            message("skylak"),
            "unknown CPU model 'skylak' (did you mean 'skylake'?); known models: sapphire-rapids, skylake, \
             haswell, nehalem, max"
        );
        assert!(message("zen4").starts_with("unknown CPU model 'zen4'; known models"));
        assert!(message("").starts_with("unknown CPU model ''"));
        assert!(message("max,+avx512vmbi").contains("did you mean 'avx512vbmi'?"));
        assert_eq!(
            message("max,avx"),
            "'avx' in the CPU model: expected +feature, -feature, model=0..255, stepping=0..15, arch-cap=BITS (0x8000 \
             and the like), test-ctrl=core or test-ctrl=thread"
        );
        assert_eq!(message("max,+vmx"), "CPU feature 'vmx' cannot be offered: ring3 does not execute it");
    }
}
