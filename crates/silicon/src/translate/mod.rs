//! The same-ISA translator: guest code of 64-bit mode as host code.
//!
//! Guest and host are both x86-64, so most instructions are copied: [`instruction`] redirects their registers
//! ([`registers`]) and checks their memory accesses, [`vector`] does that for vector and x87 instructions, [`branch`] ends
//! blocks. What is not translated is the interpreter's.
//!
//! # Where it meets the interpreter
//!
//! What is translated are blocks of decoded code ([`crate::code`]), once they have run often enough. A block is cut into
//! *runs* of instructions that can be translated; the first operation of each gets the handler [`enter`]. So the interpreter,
//! which goes from operation to operation by handlers, comes into host code by itself; and host code gives an operation
//! that it cannot do, or whose access needs a closer look (a page not at hand, a page with code, no memory at all),
//! back to the interpreter, which executes it and goes on. Whatever invalidates a block replaces its handlers, and so this one.
//!
//! # How blocks follow each other
//!
//! Within a [`region`] by branches ([`edges`]); to other regions by [`link`]s, or by the cache of [`link::Jump`]s where the target is
//! computed; back from calls by the host's own returns. Whenever a region is left or goes backwards, instructions are counted, and
//! after every [`SLICE`] requests of other threads are looked for.
//!
//! # Flags
//!
//! Checks change the host's flags. Before one the guest's are saved in RAX, unless they can be computed again ([`flags`]), and loaded again
//! where an instruction reads them, so that they are exact whenever the interpreter takes over.
//!
//! # What keeps the guest out of host memory
//!
//! Every access is to a page of a [`Recent`](crate::mmu::tlb::Recent) or a [`Found`](crate::mmu::tlb::Found), with `lin ^ page` not above the
//! last place in the page where the access fits, checked right before it ([`memory`]); or it is one of a group, the first of which was checked
//! for the bytes of all ([`groups`]); or to a constant beside the code, at a displacement within the page that one of the same run was
//! checked for; or of a repeated instruction whose elements lie in the page of the first ([`string`]); or of a loop that moves by constants,
//! for as many iterations as stay in the pages found before ([`steady`]). Pages get there from the TLB alone, and leave when
//! anything about them changes ([`crate::mmu::tlb`]); user mode and the others have pages of their own, and code that is entered in
//! one of them alone. Besides that, code writes only its own [`Cpu`] and [`frame`], at offsets that are
//! constants, and the host's stack, within bounds that calls check. It jumps only to what the translator has emitted: links and
//! jumps are written by it alone, and a return goes where a call of the same stay came from.
#![expect(unsafe_code, reason = "sets the GS base")]

mod branch;
mod check;
#[cfg(test)]
mod check_tests;
mod choice;
mod difference;
mod edges;
mod emit;
mod flags;
mod frame;
mod groups;
mod instruction;
mod layout;
mod link;
mod memory;
mod operands;
mod region;
mod registers;
mod routines;
mod run;
mod shared;
#[cfg(test)]
mod shared_tests;
mod steady;
#[cfg(test)]
mod steady_tests;
mod string;
#[cfg(test)]
mod string_tests;
#[cfg(test)]
mod tests;
mod trial;
mod vector;
mod watch;

use std::arch::asm;
use std::sync::Arc;

use iced_x86::Instruction;

use self::check::Checks;
pub use self::choice::Engine;
use self::choice::has_fsgsbase;
use self::emit::Emitter;
use self::link::Jump;
use self::region::Member;
use self::routines::Routines;
pub(crate) use self::run::count;
use self::run::enter;
pub use self::watch::{Stay, Watcher, Written};
use crate::code::lower::LowerCtx;
use crate::code::op::{Handler, Op};
use crate::code::thread::interpreted;
use crate::code::{BlockRef, CodeCache};
use crate::cpu::{Cpu, Requests};
use crate::hostexec::arena::Arena;
use crate::mmu::host::{self, Recovery};
use crate::mmu::tlb::PAGE_SHIFT;
use crate::model::Features;
use crate::state::{CodeSize, reg};

/// Runs of fewer instructions are not worth the way in and out, unless they are whole blocks.
const SHORTEST: usize = 4;
/// Blocks that a CPU may have translated whatever it has executed so far.
const FREE_BLOCKS: u64 = 20_000;
/// Instructions that it must have executed for each further block. Translating a block takes about as long as interpreting
/// half as many.
const INSTRUCTIONS_PER_BLOCK: u64 = 10_000;
/// Instructions that host code executes before it looks for requests: a few microseconds.
const SLICE: u32 = 4096;
/// Bytes of host code, and links, of one CPU at most.
const ARENA: usize = 64 << 20;

/// Host code leaves with a link's address and this bit, if the link does not hold.
const LEAVE_LINK: u64 = 1;
/// Host code leaves with this, if there is no code at hand for RIP.
const LEAVE_INDIRECT: u64 = 2;
/// What a pointer can be; there is other information above it.
const POINTER: u64 = (1 << 48) - 1;

/// Why a block is not translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// It is the interpreter's.
    Unsuited,
    /// Its page is not at hand: another time, perhaps.
    Later,
    /// There is no room: all translations have to go first.
    Full,
}

/// What a validity number stands for: see [`Translator::validity`].
type Conditions = [u64; 3];

/// Host code of one CPU.
pub(crate) struct Translator {
    /// The requests of the CPU, for host code to look at.
    requests: *const Requests,
    /// Links hold if they have this number: it stands for the current epoch, block generation and context of fetches.
    validity: u64,
    /// The same for links that [stay in their page](link::Link::stays_in_page), which hold in all contexts.
    validity_within: u64,
    /// Where computed branches have led to: [`Jump::ENTRIES`] entries of `code`'s.
    jumps: *const Jump,
    /// What an instruction has loaded, while it looks at where it stores something.
    kept: u64,
    /// The count of instructions at which host code looks for requests next.
    stop: u64,
    /// While host code runs: where its stack is, and where there is no more room for return addresses.
    stack: u64,
    stack_limit: u64,
    /// How often a block runs before it is translated.
    after: u32,
    /// After how many instructions host code that has been entered looks for requests first: [`SLICE`], but for tests.
    slice: u32,
    /// Blocks that could not be translated although their instructions can: none, but for mistakes here.
    unsuited: u64,
    /// What of the guest's vector registers is in the host's: a [`vector::Live`]. Nothing, when host code does not run.
    vectors: u32,
    code: Option<Code>,
    /// Where both engines run.
    checks: Option<Checks>,
    /// Who is called around stays in host code.
    watcher: Option<Watcher>,
    /// There are checks, or a watcher: host code is not just called.
    observed: bool,
    /// Conditions that were in force lately, with their numbers, and the number given out last.
    known: [(Conditions, u64); 8],
    last: u64,
    /// The epoch and generation that `validity_within` stands for.
    within: [u64; 2],
    /// The GS base is the CPU's, not the host's.
    has_gs: bool,
    /// The GS base of the host.
    host_gs: u64,
}

struct Code {
    arena: Arena,
    routines: Routines,
    recovery: Box<Recovery>,
    jumps: Box<[Jump]>,
}

// SAFETY: the pointers are to requests that the CPU shares and to what `code` owns, set anew whenever it enters guest mode; and a
// watcher's, who has promised to be content with any thread.
unsafe impl Send for Translator {}

impl Translator {
    /// For a CPU with this engine.
    pub(crate) fn new(engine: Engine) -> Translator {
        Translator::with_room(engine, ARENA)
    }

    /// With room for so many bytes of code and links.
    fn with_room(engine: Engine, bytes: usize) -> Translator {
        let (code, after) = match engine {
            Engine::Interpret => (None, 0),
            Engine::Translate(after) => (Code::new(bytes), after),
            Engine::Check => (Code::new(bytes), 0),
        };
        let checks = (engine == Engine::Check).then(Checks::default);
        Translator {
            requests: std::ptr::null(),
            validity: 0,
            validity_within: 0,
            jumps: std::ptr::null(),
            kept: 0,
            stop: 0,
            stack: 0,
            stack_limit: 0,
            after,
            slice: SLICE,
            unsuited: 0,
            vectors: 0,
            code,
            observed: checks.is_some(),
            checks,
            watcher: None,
            known: [([0; 3], 0); 8],
            last: 0,
            within: [0; 2],
            has_gs: false,
            host_gs: 0,
        }
    }

    /// The number that stands for these conditions. Going back to some brings their number back.
    #[inline(always)]
    fn number(&mut self, conditions: Conditions) -> u64 {
        let (last, number) = self.known[0];
        if last == conditions && number != 0 { number } else { self.number_again(conditions) }
    }

    #[inline(never)]
    fn number_again(&mut self, conditions: Conditions) -> u64 {
        if let Some(at) = self.known.iter().position(|(known, number)| *known == conditions && *number != 0) {
            self.known[..=at].rotate_right(1);
            return self.known[0].1;
        }
        self.last += 1;
        self.known.rotate_right(1);
        self.known[0] = (conditions, self.last);
        self.last
    }
}

impl Code {
    /// `None` where the host's kernel or its memory does not allow it.
    fn new(bytes: usize) -> Option<Code> {
        if !has_fsgsbase() {
            return None;
        }
        // More than half of all code seldom runs; links take the rest.
        let arena = Arena::with_far_code(bytes, bytes / 8 * 3).inspect_err(|error| {
            tracing::error!("no executable memory, guest code is interpreted: {error}");
        });
        let mut arena = arena.ok()?;
        let routines = Code::routines(&mut arena)?;
        Some(Code { arena, routines, recovery: Box::default(), jumps: Jump::cache() })
    }

    /// Forgets all translations.
    fn clear(&mut self) -> Option<()> {
        self.arena.clear();
        self.recovery.clear();
        self.routines = Code::routines(&mut self.arena)?;
        Some(())
    }

    fn routines(arena: &mut Arena) -> Option<Routines> {
        let routines = Routines::new(arena, is_x86_feature_detected!("avx512f"));
        if routines.is_none() {
            tracing::error!("no room for what translations share: guest code is interpreted from now on");
        }
        routines
    }
}

impl Cpu {
    /// Host code is about to run for the first time since the entry to guest mode: GS belongs to it.
    #[cold]
    fn prepare_host(&mut self) {
        self.translator.has_gs = true;
        if let Some(code) = &self.translator.code {
            // SAFETY: the table is changed by `translate_block` alone, which no translated code calls.
            unsafe { host::translated_code_lies_at(code.arena.range(), &raw const *code.recovery) };
            self.translator.requests = Arc::as_ptr(&self.requests);
            self.translator.jumps = code.jumps.as_ptr();
            // SAFETY: `Code::new` has found that programs may use the instructions; libraries do not use GS.
            unsafe {
                asm!("rdgsbase {}", out(reg) self.translator.host_gs, options(nomem, nostack, preserves_flags));
                asm!("wrgsbase {}", in(reg) &raw mut *self, options(nostack, preserves_flags));
            }
        }
    }

    /// Exit from guest mode.
    pub(crate) fn translator_leave(&mut self) {
        if std::mem::take(&mut self.translator.has_gs) {
            // SAFETY: as above.
            unsafe {
                asm!("wrgsbase {}", in(reg) self.translator.host_gs, options(nomem, nostack, preserves_flags));
            }
        }
    }

    /// A block with these operations is about to be made: has it counted how often it runs, if it may be translated.
    pub(crate) fn watch_block(&self, ops: &[Op]) {
        if self.translator.code.is_some() && self.state.code_size == CodeSize::Bits64 {
            ops[0].handler.set(count);
        }
    }

    /// Translates the block that begins with `first`, and those of its page that it leads to, and has them run as translated
    /// from now on.
    fn translate_block(&mut self, first: &Op) -> Result<(), Failure> {
        if !self.page_at_hand(self.ip_of(first)) {
            return Err(Failure::Later);
        }
        let (root, within_page) = self.block_of(first).ok_or(Failure::Unsuited)?;
        first.handler.set(interpreted(first));
        let members = region::gather(self.member(root), |offset| {
            let block =
                self.block_in_page_of(first, offset).filter(|block| within_page && block.may_join())?;
            Some(self.member(block)).filter(Member::begins)
        });
        match self.translate_region(&members) {
            Err(Failure::Unsuited) if members.len() > 1 => {
                let alone = region::gather(self.member(root), |_| None);
                self.translate_region(&alone)
            }
            result => result,
        }
    }

    fn member(&self, block: BlockRef) -> Member {
        // Whoever does not want to wait wants to see everything translated.
        let shortest = if self.translator.after == 0 { 1 } else { SHORTEST };
        Member::new(block, self.decode_again(block), &self.features, shortest)
    }

    /// Translates a region.
    fn translate_region(&mut self, members: &[Member]) -> Result<(), Failure> {
        let place = (self.state.regs[usize::from(reg::IP_BASE)] >> PAGE_SHIFT, self.is_user());
        let code = self.translator.code.as_mut().ok_or(Failure::Unsuited)?;
        self.counters.blocks_translated += members.len() as u64;
        let mut emitter = Emitter::new(&mut code.arena, code.routines, members, place, &self.features)?;
        for (number, member) in members.iter().enumerate() {
            let follower = members.get(number + 1).map(Member::offset);
            for run in &member.runs {
                let follower = follower.filter(|_| run.end == member.instructions.len());
                emitter.begin(member.block.ops(), number, run.start, follower)?;
                emitter.run(&member.instructions, run.clone())?;
            }
        }
        let entries = emitter.finish(&mut code.recovery)?;
        CodeCache::join(members.iter().map(|member| member.block));
        if let ([alone], Some(_)) = (members, &self.translator.checks) {
            alone.block.has_not_joined();
        }
        for (number, index, at) in entries {
            let block = members[number].block;
            let op = &block.ops()[index];
            op.translation.set(at);
            op.handler.set(self.enter());
            if index == 0 {
                block.set_translation(at | self.mark());
            }
        }
        Ok(())
    }

    /// Whether the guest is at privilege level 3: host code is for that or for the others.
    #[inline(always)]
    fn is_user(&self) -> bool {
        self.state.cpl == 3
    }

    /// The handler of translated operations.
    fn enter(&self) -> Handler {
        if self.is_user() { enter::<true> } else { enter::<false> }
    }

    /// What there is above the pointer in translations of blocks for the current privilege level.
    #[inline(always)]
    fn mark(&self) -> u64 {
        u64::from(self.is_user()) << 63
    }

    /// Whether translating one more block leaves most of the time to the guest, however its code changes.
    fn affords_translation(&self) -> bool {
        let earned = FREE_BLOCKS + self.counters.instructions / INSTRUCTIONS_PER_BLOCK;
        self.translator.after == 0 || self.counters.blocks_translated < earned
    }

    /// The instructions of a block.
    fn decode_again(&self, block: BlockRef) -> Vec<Instruction> {
        let ctx = LowerCtx {
            code_size: self.state.code_size,
            features: &self.features,
            stubs: &self.hostexec.stubs,
        };
        let (ops, source) = (block.ops(), block.source());
        let start = usize::from(ops[0].page_offset);
        ops[..ops.len() - 1]
            .iter()
            .map(|op| {
                let at = usize::from(op.page_offset);
                let (ins, _) = crate::code::decode_one(&source[at - start..], at, &ctx);
                if self.features.offers(&ins) { ins } else { Instruction::default() }
            })
            .collect()
    }

    /// What host code goes by is up to date for code in RIP's half of the address space.
    #[inline(always)]
    fn prepare(&mut self, rip: u64) {
        let (epoch, generation) = (self.code.epoch, self.code.generation);
        self.translator.validity = self.translator.number([epoch, generation, self.fetch_context(rip)]);
        if self.translator.within != [epoch, generation] {
            self.translator.within = [epoch, generation];
            self.translator.last += 1;
            self.translator.validity_within = self.translator.last;
        }
    }

    /// The block ends: RIP is where the guest goes on, and all that it has done is counted. `at` is any operation.
    fn end_at_rip(&mut self, at: &Op) {
        self.enter_block(at);
        // The engine counts one more.
        self.counters.instructions = self.counters.instructions.wrapping_sub(1);
    }
}

/// What translates an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Integer,
    Vector,
    Branch,
    String,
}

impl Family {
    /// `None`: nothing does.
    fn of(ins: &Instruction, features: &Features) -> Option<Family> {
        match () {
            () if instruction::suits(ins) => Some(Family::Integer),
            () if branch::suits(ins) => Some(Family::Branch),
            () if string::suits(ins) => Some(Family::String),
            () if vector::suits(ins, features) => Some(Family::Vector),
            () => None,
        }
    }
}
