//! Makes a program that differs smaller, as long as it differs.

use super::program::Program;

/// The smallest program found of which `differs` is true, by leaving out instructions and runs.
pub fn shrink(program: &Program, mut differs: impl FnMut(&mut Program) -> bool) -> Program {
    let mut smallest = program.clone();
    loop {
        let before = (smallest.items.len(), smallest.machines.len());
        runs(&mut smallest, &mut differs);
        items(&mut smallest, &mut differs);
        if (smallest.items.len(), smallest.machines.len()) == before {
            return smallest;
        }
    }
}

fn runs(smallest: &mut Program, differs: &mut impl FnMut(&mut Program) -> bool) {
    for run in (0..smallest.machines.len()).rev() {
        let mut candidate = smallest.clone();
        candidate.machines.remove(run);
        if !candidate.machines.is_empty() && differs(&mut candidate) {
            *smallest = candidate;
        }
    }
}

/// Half of the instructions at once, then quarters, and so on.
fn items(smallest: &mut Program, differs: &mut impl FnMut(&mut Program) -> bool) {
    let mut size = smallest.items.len() / 2;
    while size > 0 {
        let mut end = smallest.items.len();
        while end > 0 {
            let start = end.saturating_sub(size);
            let mut candidate = smallest.clone();
            (start..end).rev().for_each(|item| candidate.remove(item));
            if !candidate.items.is_empty() && differs(&mut candidate) {
                *smallest = candidate;
            }
            end = start.min(smallest.items.len());
        }
        size /= 2;
    }
}
