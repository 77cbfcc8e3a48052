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
    #[error("'{0}' in the CPU model: expected +feature, -feature, test-ctrl=core or test-ctrl=thread")]
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

fn suggestion(nearest: &Option<&'static str>) -> String {
    nearest.map_or(String::new(), |name| format!(" (did you mean '{name}'?)"))
}

fn reason(why: &Why) -> String {
    match why {
        Why::Host => "this machine's CPU does not have it".into(),
        Why::NotExecuted => "ring3 does not execute it".into(),
        Why::Needs(other) => format!("it needs '{other}', which this machine cannot offer"),
    }
}

impl CpuModel {
    /// Reads `model[,+feature|,-feature|,test-ctrl=core|,test-ctrl=thread]…`. What a feature needs comes with it; what
    /// needs it goes with it. `test-ctrl` is what MSR_TEST_CTRL, which holds split-lock detection, exists once per.
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
        let mut test_ctrl = Scope::Core;
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
            } else if let Some(scope) = option(item) {
                test_ctrl = scope;
            } else {
                return Err(ModelError::NoSign(item.into()));
            }
        }
        Ok(CpuModel::new(row, plus, minus, host).with_test_ctrl_scope(test_ctrl))
    }
}

/// The scope that the option `test-ctrl=…` gives MSR_TEST_CTRL.
fn option(item: &str) -> Option<Scope> {
    match item.strip_prefix("test-ctrl=")? {
        "core" => Some(Scope::Core),
        "thread" => Some(Scope::Thread),
        _ => None,
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
            "'avx' in the CPU model: expected +feature, -feature, test-ctrl=core or test-ctrl=thread"
        );
        assert_eq!(message("max,+vmx"), "CPU feature 'vmx' cannot be offered: ring3 does not execute it");
    }
}
