//! Small batches of every kind of image, in this process.

use robustness::batch::{self, Event, Plan, reproducer};
use robustness::kinds::Kind;

fn survives(kind: Kind, images: u64) {
    let plan = Plan { seed: 500_000, images, kind: Some(kind), stride: 1 };
    let mut failures = Vec::new();
    let summary = batch::run(&plan, None, |event| match event {
        Event::Failed(kind, seed, text) => failures.push(format!("{text}: {}", reproducer(kind, seed))),
        // Other tests run in this process: what it holds says nothing.
        Event::Begins(..) | Event::Grew(_) => {}
    });
    assert!(failures.is_empty(), "{failures:#?}");
    let totals = summary.unwrap().kinds[kind.name()];
    assert_eq!(totals.images, images);
    assert!(totals.instructions > images, "{totals:?}");
}

macro_rules! batches {
    ($($name:ident: $kind:ident, $images:literal;)*) => {
        $(#[test]
        fn $name() {
            survives(Kind::$kind, $images);
        })*
    };
}

batches! {
    random_bytes_from_reset: Bytes, 60;
    random_instructions_in_every_mode: Instructions, 60;
    spoiled_tables: Tables, 60;
    string_instructions_with_huge_counts: Strings, 30;
    self_modifying_code: Selfmod, 40;
    msrs_and_xsave_images: State, 40;
    two_vcpus_on_the_same_memory: Smp, 30;
    random_kvm_structures: Setters, 60;
}
