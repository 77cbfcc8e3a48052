//! A program on the host, the interpreter and the translator, side by side.

use std::panic::{AssertUnwindSafe, catch_unwind};

use iced_x86::Code;
use silicon::model::Features;
use silicon::translate::Engine;

use super::native;
use super::program::{Assembled, Program};
use super::undefined::Undefined;
use crate::capabilities::Capabilities;
use crate::compare::{self, Loose};
use crate::guest::Guest;
use crate::host::{self, Host, HostError};
use crate::layout::{self, Access, CODE, CODE_SIZE, Contents, PAGE};
use crate::machine::{Event, Machine};

/// How often a block runs before it is translated. At once, blocks are translated alone; later, together with those that they lead to.
pub const TRANSLATORS: [u32; 2] = [0, 2];

/// Programs after which guests are made anew: how much a CPU may translate depends on how much it has executed.
const PROGRAMS_PER_GUEST: u64 = 400;

/// Whom the interpreter is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Other {
    /// The host's processor.
    Host,
    /// Translation of what has run so often.
    Translator(u32),
}

impl std::fmt::Display for Other {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Other::Host => f.write_str("host"),
            Other::Translator(after) => write!(f, "translate:{after}"),
        }
    }
}

/// A difference, in one run of a program.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Number of the run.
    pub run: usize,
    /// Who differs from the interpreter.
    pub other: Other,
    /// What differs: `name other / interpreter`.
    pub items: Vec<String>,
}

/// What came of a program.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Runs, and those that the host was the reference of.
    pub runs: u64,
    /// As it says.
    pub native: u64,
    /// Runs that ended in a fault.
    pub faults: u64,
    /// Instructions that the interpreter executed.
    pub instructions: u64,
    /// A run did not end.
    pub endless: bool,
    /// The first difference.
    pub difference: Option<Difference>,
}

/// Host and guests, ready for programs.
#[derive(Debug)]
pub struct Bench {
    host: Host,
    interpreter: Guest,
    translators: Vec<(u32, Guest)>,
    contents: Contents,
    features: Features,
    capabilities: Capabilities,
    programs: u64,
    planted: Option<Code>,
}

/// All pages with their addresses.
type Image = [(u64, Box<[u8]>)];

/// How one of them ended a run.
type End = (Event, Machine);

impl Bench {
    /// Sets all up; memory is filled from `seed`.
    pub fn new(features: Features, seed: u64) -> Result<Bench, HostError> {
        let contents = Contents::new(seed);
        let capabilities = Capabilities::of_host()?;
        let mut host = Host::new()?;
        host.prepare(&contents)?;
        silicon::mmu::host::announce_recovery();
        let (interpreter, translators) = guests(&features, &capabilities, &contents);
        Ok(Bench {
            host,
            interpreter,
            translators,
            contents,
            features,
            capabilities,
            programs: 0,
            planted: None,
        })
    }

    /// Has translators do nothing in place of instructions of this form, to see that it is found.
    pub fn plant(&mut self, form: Option<Code>) {
        self.planted = form;
    }

    /// Makes the guests anew, so that nothing of earlier programs has a part in what follows.
    pub fn renew(&mut self) {
        (self.interpreter, self.translators) = guests(&self.features, &self.capabilities, &self.contents);
        self.programs = 0;
    }

    /// Runs a program from each of its states, and compares each time.
    pub fn run(&mut self, program: &mut Program) -> Outcome {
        let mut outcome = Outcome::default();
        let (Some(assembled), Some(undefined)) = (program.assemble(), Undefined::of(program)) else {
            return outcome;
        };
        self.programs += 1;
        if self.programs > PROGRAMS_PER_GUEST {
            self.renew();
        }
        let image = image(&self.contents, program, &assembled);
        let planted = self.planted.map(|form| self::planted(&image, program, &assembled, form));
        let translated = planted.as_ref().unwrap_or(&image);
        let run = Run { program, assembled: &assembled, undefined: &undefined, image: &image, translated };
        let native = run.native(&self.capabilities);
        for number in 0..program.machines.len() {
            self.once(&run, number, native, &mut outcome);
            if outcome.endless || outcome.difference.is_some() {
                break;
            }
        }
        outcome
    }

    fn once(&mut self, run: &Run<'_>, number: usize, native: bool, outcome: &mut Outcome) {
        let machine = Machine { rip: run.program.start, ..run.program.machines[number].clone() };
        outcome.runs += 1;
        install(&mut self.interpreter, run.image);
        let before = self.interpreter.instructions();
        let Some(end) = catch(|| self.interpreter.run(&machine, false)) else {
            let (other, items) = (Other::Translator(0), vec!["the interpreter panicked".into()]);
            outcome.difference = Some(Difference { run: number, other, items });
            return self.renew();
        };
        let count = self.interpreter.instructions() - before;
        outcome.instructions += count;
        outcome.faults += u64::from(end.0 != Event::Completed);
        outcome.endless = matches!(end.0, Event::Endless | Event::Exit(_));
        if outcome.endless {
            return;
        }
        let differ = |other, items: Vec<String>| {
            (!items.is_empty()).then_some(Difference { run: number, other, items })
        };
        for (after, guest) in &mut self.translators {
            let items = translated(guest, &self.interpreter, run, &machine, &end, count);
            outcome.difference = differ(Other::Translator(*after), items);
            if outcome.difference.is_some() {
                return self.renew();
            }
        }
        if native && native::stays_in_windows(&end.0) {
            outcome.native += 1;
            let items = self.natively(run, &machine, &end);
            outcome.difference = differ(Other::Host, items);
        }
    }

    fn natively(&mut self, run: &Run<'_>, machine: &Machine, end: &End) -> Vec<String> {
        for (address, bytes) in run.image {
            if layout::access(*address) == Access::Write
                && self.host.bytes(*address, PAGE as usize) != &bytes[..]
            {
                self.host.bytes_mut(*address, PAGE as usize).copy_from_slice(bytes);
            }
        }
        let next = run.assembled.end();
        let returns = self.host.put_return(next);
        let host = self.host.run(machine, next);
        if returns {
            self.host.remove_return(next);
        }
        let pointers = !self.capabilities.knows_pointers(&host.1.vectors);
        let mut items = run.compare(&host, end, pointers);
        for (address, _) in run.image {
            let (one, other) =
                (self.host.bytes(*address, PAGE as usize), self.interpreter.bytes(*address, PAGE as usize));
            memory(&mut items, *address, one, other);
        }
        items
    }
}

/// A program with what is known of it.
struct Run<'a> {
    program: &'a Program,
    assembled: &'a Assembled,
    undefined: &'a Undefined,
    image: &'a Image,
    /// What translators get for it.
    translated: &'a Image,
}

impl Run<'_> {
    /// Whether the host can be the reference, as far as instructions say.
    fn native(&self, host: &Capabilities) -> bool {
        self.program.items.iter().all(|item| native::compares(&item.instruction, host))
            && self.program.machines.iter().all(|machine| native::compares_flags(machine.rflags, host))
    }

    /// What differs between two ends of it, but for memory.
    fn compare(&self, one: &End, other: &End, pointers: bool) -> Vec<String> {
        let mut items = Vec::new();
        let at = self.assembled.item_at(other.1.rip);
        let instruction = at.and_then(|at| self.program.items.get(at)).map(|item| item.instruction);
        let instruction = instruction.unwrap_or_default();
        if compare::comparable(&one.0, &instruction) != compare::comparable(&other.0, &instruction) {
            items.push(format!("end {} / {}", one.0, other.0));
        }
        let flags = self.undefined.at(self.program, at);
        let loose = Loose { flags, conditions: self.undefined.conditions, registers: 0, pointers };
        compare::states(&mut items, &one.1, &other.1, &loose);
        items
    }
}

fn guests(features: &Features, host: &Capabilities, contents: &Contents) -> (Guest, Vec<(u32, Guest)>) {
    let guest = |engine| {
        let mut guest = Guest::with_engine(features.clone(), host::selectors(), host.components, engine);
        guest.prepare(contents);
        guest
    };
    (guest(Engine::Interpret), TRANSLATORS.map(|after| (after, guest(Engine::Translate(after)))).into())
}

/// What a translator does otherwise than the interpreter did.
fn translated(
    guest: &mut Guest,
    interpreter: &Guest,
    run: &Run<'_>,
    machine: &Machine,
    end: &End,
    count: u64,
) -> Vec<String> {
    install(guest, run.translated);
    let before = guest.instructions();
    let Some(other) = catch(|| guest.run_freely(machine)) else {
        return vec!["the translator panicked".into()];
    };
    let mut items = run.compare(&other, end, false);
    if other.0 != end.0 && items.is_empty() {
        items.push(format!("end {} / {}", other.0, end.0));
    }
    let planted = !std::ptr::eq(run.image, run.translated);
    let counted = guest.instructions() - before;
    if counted != count {
        items.push(format!("instructions {counted} / {count}"));
    }
    let is_code = |address: u64| (CODE..CODE + CODE_SIZE).contains(&address);
    for (address, _) in run.image.iter().filter(|page| !(planted && is_code(page.0))) {
        memory(
            &mut items,
            *address,
            guest.bytes(*address, PAGE as usize),
            interpreter.bytes(*address, PAGE as usize),
        );
    }
    items
}

fn catch(run: impl FnOnce() -> End) -> Option<End> {
    catch_unwind(AssertUnwindSafe(run)).ok()
}

/// Tells the first difference between two pages.
fn memory(items: &mut Vec<String>, address: u64, one: &[u8], other: &[u8]) {
    if one != other {
        let first = one.iter().zip(other).position(|(one, other)| one != other).unwrap_or_default();
        let name = format!("memory at {:#x}+", address + first as u64);
        compare::bytes(items, &name, &one[first..], &other[first..]);
    }
}

/// All pages, with the program in them.
fn image(contents: &Contents, program: &Program, assembled: &Assembled) -> Vec<(u64, Box<[u8]>)> {
    let mut pages = contents.pages().to_vec();
    let mut write = |address: u64, bytes: &[u8]| {
        for (at, byte) in (0..bytes.len() as u64).map(|i| address.wrapping_add(i)).zip(bytes) {
            let page = pages.iter_mut().find(|page| page.0 == at & !(PAGE - 1));
            if let Some((_, page)) = page.filter(|_| layout::access(at) == Access::Write) {
                page[(at % PAGE) as usize] = *byte;
            }
        }
    };
    for (address, bytes) in &program.patches {
        write(*address, bytes);
    }
    for (address, label) in &program.tables {
        write(*address, &assembled.addresses[program.labels[*label]].to_le_bytes());
    }
    write(program.start, &assembled.bytes);
    pages
}

/// The same pages with NOPs of the same length in place of one form.
fn planted(image: &Image, program: &Program, assembled: &Assembled, form: Code) -> Vec<(u64, Box<[u8]>)> {
    let mut pages = image.to_vec();
    let there = |at: &usize| program.items[*at].instruction.code() == form;
    for at in (0..program.items.len()).filter(there) {
        let bytes = assembled.addresses[at]..assembled.addresses[at + 1];
        for address in bytes.clone() {
            let byte = if address + 1 == bytes.end { 0x90 } else { 0x66 };
            if let Some((_, page)) = pages.iter_mut().find(|page| page.0 == address & !(PAGE - 1)) {
                page[(address % PAGE) as usize] = byte;
            }
        }
    }
    pages
}

/// Puts the pages into a guest's memory, where they are not what they should be.
fn install(guest: &mut Guest, image: &Image) {
    for (address, bytes) in image {
        if guest.bytes(*address, PAGE as usize) != &bytes[..] {
            guest.bytes_mut(*address, PAGE as usize).copy_from_slice(bytes);
        }
    }
}
