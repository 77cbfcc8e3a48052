//! Regions: blocks of one page that lead to each other, translated together.
//!
//! Within a region a branch is a branch: nothing is looked up and no link checked, because whoever enters a region anywhere
//! has compared all of it (`others` of its blocks). Only branches backwards look for requests.
//!
//! What holds where a block of the region begins is decided before anything is emitted: where the flags are, how many instructions
//! have been executed but not counted, and which vector registers are live. Branches within the region see to it; whoever comes from
//! elsewhere finds flags in RAX, everything counted and nothing live, and goes through an entry that makes up the difference.

use std::collections::HashMap;
use std::ops::Range;

use iced_x86::{FlowControl, Instruction};

use super::flags::{Recipe, Wanted};
use super::vector::{Known, needs};
use super::{Family, branch, instruction};
use crate::code::BlockRef;
use crate::model::Features;

/// Instructions of a region at most; a single block may have more.
pub(super) const LONGEST: usize = 256;
/// Bytes in a page.
const PAGE: i64 = 4096;

/// A block of a region.
pub(super) struct Member {
    pub(super) block: BlockRef,
    pub(super) instructions: Vec<Instruction>,
    /// Runs of instructions that can be translated.
    pub(super) runs: Vec<Range<usize>>,
    /// What holds where it begins.
    pub(super) start: Start,
}

/// What holds where a block of a region begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Start {
    /// Where the flags are; `None`: anywhere, for they are lost before anything can see them.
    pub(super) flags: Option<Wanted>,
    /// Instructions executed since the last were counted.
    pub(super) owed: i32,
    /// What is known of vector registers.
    pub(super) known: Known,
    /// It is a loop by itself: its instructions are counted, and requests looked for, before anything else, so that the branch back has
    /// nothing to do. (Counts close to each other would wait for each other.)
    pub(super) is_loop: bool,
}

impl Start {
    /// Where code of other regions and the interpreter come in.
    pub(super) const ENTRY: Start =
        Start { flags: Some(Wanted::Saved), owed: 0, known: Known::NOTHING, is_loop: false };

    /// Whoever comes in from elsewhere has nothing to make up for.
    pub(super) fn is_like_entry(&self) -> bool {
        self.flags != Some(Wanted::Host) && self.owed == 0 && self.known == Known::NOTHING
    }
}

/// A way from one block of a region to another.
struct Edge {
    from: usize,
    to: usize,
    /// The end is a conditional branch: the flags are in RFLAGS.
    conditional: bool,
    /// It is no return from a call: the flags are those at the end of the block.
    passes_flags: bool,
    /// What holds at the end of the block.
    owed: Owed,
    known: Known,
}

/// Instructions not counted at the end of a block: since its start, or so many.
#[derive(Clone, Copy)]
enum Owed {
    SinceStart(i32),
    Exactly(i32),
}

impl Member {
    /// A block with these instructions. Runs that begin within it are worth the way in and out if they have `shortest` instructions.
    pub(super) fn new(
        block: BlockRef,
        instructions: Vec<Instruction>,
        features: &Features,
        shortest: usize,
    ) -> Member {
        let mut runs = runs(&instructions, features);
        runs.retain(|run| run.start == 0 || run.len() >= shortest);
        Member { block, instructions, runs, start: Start::ENTRY }
    }

    /// Its first instruction can be translated.
    pub(super) fn begins(&self) -> bool {
        self.runs.first().is_some_and(|run| run.start == 0)
    }

    /// Where it begins in the page.
    pub(super) fn offset(&self) -> i64 {
        i64::from(self.block.first().page_offset)
    }

    /// Where it may go on within the page, by the branches that end it.
    pub(super) fn successors(&self) -> impl Iterator<Item = i64> + use<> {
        let ends = self.ends();
        ends.into_iter().flatten().map(|(target, _)| target).filter(|target| (0..PAGE).contains(target))
    }

    /// Targets of its end, each with what kind of end it is.
    fn ends(&self) -> [Option<(i64, End)>; 2] {
        let Some(last) = self.instructions.last() else { return [None; 2] };
        let next = Some(last.next_ip() as i64);
        match last.flow_control() {
            FlowControl::Next => [next.map(|next| (next, End::Plain)), None],
            _ if !branch::suits(last) => [None; 2],
            FlowControl::UnconditionalBranch => [Some((last.near_branch_target() as i64, End::Plain)), None],
            FlowControl::ConditionalBranch => [next, Some(last.near_branch_target() as i64)]
                .map(|target| target.map(|target| (target, End::Conditional))),
            FlowControl::Call | FlowControl::IndirectCall => [next.map(|next| (next, End::Return)), None],
            _ => [None; 2],
        }
    }

    /// What the last run needs of vector registers, and whether it is the whole block.
    fn last_run(&self) -> Option<(Known, bool)> {
        let run = self.runs.last().filter(|run| run.end == self.instructions.len())?;
        Some((self.needs(run), run.start == 0))
    }

    fn needs(&self, run: &Range<usize>) -> Known {
        let needs = self.instructions[run.clone()].iter().filter_map(needs);
        needs.fold(Known::NOTHING, |all, needs| all.and(needs))
    }
}

/// How one block leads to the next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Plain,
    Conditional,
    /// By a call that returns.
    Return,
}

/// The runs of instructions that can be translated.
fn runs(instructions: &[Instruction], features: &Features) -> Vec<Range<usize>> {
    let suits = |ins: &Instruction| Family::of(ins, features).is_some();
    let mut runs = Vec::new();
    let mut start = 0;
    while start < instructions.len() {
        let length = instructions[start..].iter().take_while(|ins| suits(ins)).count();
        if length != 0 {
            runs.push(start..start + length);
        }
        start += length + 1;
    }
    runs
}

/// The region of the blocks that `root` leads to, in the order of their addresses: `beside` finds the block at an offset of the page,
/// if there is one that may be translated with others.
pub(super) fn gather(root: Member, beside: impl Fn(u16) -> Option<Member>) -> Vec<Member> {
    let mut length = root.instructions.len();
    let mut asked: Vec<i64> = vec![root.offset()];
    let mut members = vec![root];
    let mut next = 0;
    while next < members.len() {
        for target in members[next].successors() {
            if asked.contains(&target) {
                continue;
            }
            asked.push(target);
            let Some(member) = u16::try_from(target).ok().and_then(&beside) else { continue };
            if length + member.instructions.len() <= LONGEST {
                length += member.instructions.len();
                members.push(member);
            }
        }
        next += 1;
    }
    members.sort_by_key(Member::offset);
    plan(&mut members);
    members
}

/// Decides what holds where each block begins.
fn plan(members: &mut [Member]) {
    let begin = members.iter().enumerate().filter(|(_, member)| member.begins());
    let places: HashMap<i64, usize> = begin.map(|(at, member)| (member.offset(), at)).collect();
    let mut edges = Vec::new();
    for (from, member) in members.iter().enumerate() {
        let Some((needs, whole)) = member.last_run() else { continue };
        let length = member.instructions.len() as i32;
        for (target, end) in member.ends().into_iter().flatten() {
            let Some(&to) = places.get(&target) else { continue };
            let (owed, known) = match (end, whole) {
                (End::Return, _) => (Owed::Exactly(0), Known::NOTHING),
                (_, true) => (Owed::SinceStart(length), needs),
                (_, false) => (Owed::Exactly(length), needs),
            };
            let (conditional, passes_flags) = (end == End::Conditional, end != End::Return);
            edges.push(Edge { from, to, conditional, passes_flags, owed, known });
        }
    }
    plan_flags(members, &edges);
    plan_counts(members, &edges);
    plan_vectors(members, &edges);
}

/// Where loops go on, flags may stay where a recipe finds them.
fn plan_flags(members: &mut [Member], edges: &[Edge]) {
    for edge in edges.iter().filter(|edge| edge.conditional) {
        members[edge.to].start.flags = Some(Wanted::Host);
    }
    // The ways backwards come last: these decide.
    let (forwards, backwards): (Vec<&Edge>, Vec<&Edge>) = edges.iter().partition(|edge| edge.to > edge.from);
    for edge in forwards.into_iter().chain(backwards) {
        let recipe = Recipe::after(&members[edge.from].instructions);
        let to = &mut members[edge.to];
        if let Some(recipe) = recipe.filter(|recipe| edge.passes_flags && recipe.lasts(&to.instructions)) {
            to.start.flags = Some(Wanted::Marked(recipe));
        }
    }
    for edge in edges.iter().filter(|edge| edge.to == edge.from) {
        let start = &mut members[edge.to].start;
        start.is_loop = matches!(start.flags, Some(Wanted::Marked(_)));
    }
    let loses_flags = |member: &&mut Member| instruction::lose_flags(&member.instructions);
    for member in members.iter_mut().filter(|member| !member.start.is_loop).filter(loses_flags) {
        member.start.flags = None;
    }
}

/// The first way forwards to a block costs no counting; the others make up for the difference.
fn plan_counts(members: &mut [Member], edges: &[Edge]) {
    let owed_after = |members: &[Member], edge: &Edge| match (edge.owed, members[edge.from].start) {
        (Owed::SinceStart(_), Start { is_loop: true, .. }) => 0,
        (Owed::SinceStart(length), start) => start.owed + length,
        (Owed::Exactly(length), _) => length,
    };
    let mut decided = vec![false; members.len()];
    for edge in edges {
        if edge.to > edge.from && !decided[edge.to] {
            decided[edge.to] = true;
            members[edge.to].start.owed = owed_after(members, edge);
        }
    }
    // Loops have nothing to make up for where they go on.
    for member in members.iter_mut().filter(|member| member.start.is_loop) {
        member.start.owed = 0;
    }
}

/// Live is what is so by all ways within the region: entries see to it. Of blocks that only lead to each other everything may be
/// assumed: what is needed anywhere, if most blocks need something, so that loops do not ask each time.
fn plan_vectors(members: &mut [Member], edges: &[Edge]) {
    let mut starts: Vec<Option<Known>> = vec![None; members.len()];
    let mut entered = vec![false; members.len()];
    edges.iter().for_each(|edge| entered[edge.to] = true);
    for (start, entered) in starts.iter_mut().zip(&entered) {
        *start = (!entered).then_some(Known::NOTHING);
    }
    loop {
        let mut changed = false;
        for edge in edges {
            let whole = matches!(edge.owed, Owed::SinceStart(_));
            let before = if whole { starts[edge.from] } else { Some(Known::NOTHING) };
            // What nothing is known of yet may be anything.
            let Some(before) = before else { continue };
            let known = before.and(edge.known);
            let start = starts[edge.to].map_or(known, |start| start.or(known));
            changed |= starts[edge.to] != Some(start);
            starts[edge.to] = Some(start);
        }
        if !changed {
            break;
        }
    }
    let needs = members.iter().map(|member| member.needs(&(0..member.instructions.len())));
    let needs: Vec<Known> = needs.filter(|needs| *needs != Known::NOTHING).collect();
    let assumed = match 2 * needs.len() >= members.len() {
        true => needs.into_iter().fold(Known::NOTHING, Known::and),
        false => Known::NOTHING,
    };
    for (member, start) in members.iter_mut().zip(starts) {
        member.start.known = start.unwrap_or(assumed);
    }
}
