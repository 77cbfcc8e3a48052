//! Tasks: each has a stack, on which its registers are while it does not run.

use core::cell::UnsafeCell;

use crate::{cpu, work};

/// Tasks at most; the first is the one that runs when no other can.
pub const TASKS: usize = 18;
const IDLE: usize = 0;
const STACK: usize = 16 << 10;
const KERNEL_CS: u64 = 0x08;
const KERNEL_DS: u64 = 0x10;
const RFLAGS_IF: u64 = 1 << 9;
/// Resolutions that came before their events.
const EARLY: usize = 64;

/// What `boot.S` has on the stack of a task that does not run, from the lowest address on.
#[repr(C, align(16))]
pub struct Frame {
    fxsave: [u8; 512],
    registers: [u64; 15],
    /// What interrupted it.
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

impl Frame {
    /// Whether interrupts were on.
    pub fn takes_interrupts(&self) -> bool {
        self.rflags & RFLAGS_IF != 0
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    None,
    Runnable,
    /// Until the token is resolved.
    Waits(u32),
    /// It has ended, or was killed.
    Dead,
}

#[repr(C, align(16))]
struct Stack([u8; STACK]);

struct Tasks {
    stacks: [Stack; TASKS],
    frames: [*mut Frame; TASKS],
    states: [State; TASKS],
    current: usize,
    /// Tokens and results.
    early: [(u32, u32); EARLY],
}

struct Global(UnsafeCell<Tasks>);

// SAFETY: there is one processor, and whoever reaches in has interrupts off (`tasks`).
unsafe impl Sync for Global {}

static ALL: Global = Global(UnsafeCell::new(Tasks {
    stacks: [const { Stack([0; STACK]) }; TASKS],
    frames: [core::ptr::null_mut(); TASKS],
    states: [State::None; TASKS],
    current: IDLE,
    early: [(0, 0); EARLY],
}));

/// With interrupts off, and not while another reference is used.
fn tasks() -> &'static mut Tasks {
    // SAFETY: the callers are the handlers of interrupts, and `add` and `begin` before there are any; none calls another while it uses this.
    unsafe { &mut *ALL.0.get() }
}

unsafe extern "C" {
    fn resume_task(frame: *mut Frame) -> !;
}

/// Makes a task that begins at `entry` with `argument`.
pub fn add(index: usize, entry: extern "C" fn(u64) -> !, argument: u64) {
    let tasks = tasks();
    let stack = &raw mut tasks.stacks[index];
    // As if it had been called: 8 more than a multiple of 16.
    let top = stack as u64 + STACK as u64;
    let frame = (top - 64 - size_of::<Frame>() as u64) as *mut Frame;
    // SAFETY: aligned, and inside the task's stack, which nobody uses yet.
    let frame = unsafe {
        frame.write_bytes(0, 1);
        &mut *frame
    };
    // FCW and MXCSR as after FINIT and reset.
    frame.fxsave[..2].copy_from_slice(&[0x7f, 0x03]);
    frame.fxsave[24..28].copy_from_slice(&[0x80, 0x1f, 0, 0]);
    // RDI, the sixth of fifteen that are pushed.
    frame.registers[14 - 5] = argument;
    (frame.rip, frame.cs, frame.rflags) = (entry as u64, KERNEL_CS, RFLAGS_IF | 2);
    (frame.rsp, frame.ss) = (top - 8, KERNEL_DS);
    tasks.frames[index] = frame;
    tasks.states[index] = State::Runnable;
}

extern "C" fn idle(_: u64) -> ! {
    loop {
        cpu::halt();
    }
}

/// Runs the tasks that there are.
pub fn begin() -> ! {
    add(IDLE, idle, 0);
    let tasks = tasks();
    tasks.current = tasks.next(IDLE);
    let frame = tasks.frames[tasks.current];
    // SAFETY: a frame that `add` has made.
    unsafe { resume_task(frame) }
}

impl Tasks {
    /// The next runnable task after `from`, in turn.
    fn next(&self, from: usize) -> usize {
        let others = (1..=TASKS).map(|step| (from + step) % TASKS);
        others.filter(|&task| task != IDLE).find(|&task| self.states[task] == State::Runnable).unwrap_or(IDLE)
    }

    fn switch(&mut self, frame: &mut Frame, next: usize) -> *mut Frame {
        self.frames[self.current] = frame;
        self.current = next;
        self.frames[next]
    }
}

/// The time of the task that runs is over.
pub fn preempt(frame: &mut Frame) -> *mut Frame {
    let tasks = tasks();
    let next = tasks.next(tasks.current);
    tasks.switch(frame, next)
}

/// The task that runs waits for the token, unless it has been resolved already.
pub fn wait(frame: &mut Frame, token: u32) -> *mut Frame {
    let tasks = tasks();
    if tasks.current == IDLE {
        work::fail("the idle task waits", token.into());
    }
    if let Some(early) = tasks.early.iter_mut().find(|early| early.0 == token) {
        let (_, result) = core::mem::take(early);
        return if result == 0 { frame } else { kill(frame) };
    }
    tasks.states[tasks.current] = State::Waits(token);
    let next = tasks.next(tasks.current);
    tasks.switch(frame, next)
}

/// Whether a task waits for the token.
pub fn is_awaited(token: u32) -> bool {
    tasks().states.contains(&State::Waits(token))
}

/// A token is resolved: who waits for it goes on, or ends if the page has failed. Gives the task, if there is one already.
pub fn wake(token: u32, result: u32) -> Option<usize> {
    let tasks = tasks();
    let mut woken = None;
    for task in 0..TASKS {
        if tasks.states[task] == State::Waits(token) {
            tasks.states[task] = if result == 0 { State::Runnable } else { State::Dead };
            woken = Some(task);
        }
    }
    if woken.is_none() {
        match tasks.early.iter_mut().find(|early| early.0 == 0) {
            Some(early) => *early = (token, result),
            None => work::fail("tokens that nobody waits for", token.into()),
        }
    }
    woken
}

/// All that wait go on.
pub fn wake_all() {
    let waits = |state: &&mut State| matches!(state, State::Waits(_));
    tasks().states.iter_mut().filter(waits).for_each(|state| *state = State::Runnable);
}

/// Goes on with `task` if it can run, rather than with the one that was interrupted.
pub fn prefer(frame: &mut Frame, task: Option<usize>) -> *mut Frame {
    let tasks = tasks();
    match task {
        Some(task) if task != tasks.current && tasks.states[task] == State::Runnable => {
            tasks.switch(frame, task)
        }
        _ if tasks.current == IDLE => {
            let next = tasks.next(IDLE);
            tasks.switch(frame, next)
        }
        _ => frame,
    }
}

/// The task that runs ends.
pub fn kill(frame: &mut Frame) -> *mut Frame {
    let tasks = tasks();
    tasks.states[tasks.current] = State::Dead;
    work::died(tasks.current);
    let next = tasks.next(tasks.current);
    tasks.switch(frame, next)
}

/// The task that calls it ends: it is not resumed any more.
pub fn exit() -> ! {
    // With interrupts off nobody else is in the tasks.
    // SAFETY: the flag alone changes.
    unsafe { core::arch::asm!("cli") };
    {
        let tasks = tasks();
        tasks.states[tasks.current] = State::Dead;
    }
    loop {
        cpu::halt();
    }
}

/// Whether a task has not ended. It may be asked by another task, which an interrupt can come between.
pub fn alive(task: usize) -> bool {
    // SAFETY: a state of the list, whatever it is by now.
    let state = unsafe { (&raw const (*ALL.0.get()).states[task]).read_volatile() };
    !matches!(state, State::Dead | State::None)
}
