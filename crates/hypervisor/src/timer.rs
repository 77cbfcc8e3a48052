//! Timers of a VM: one host thread that sleeps in a timerfd until the earliest deadline.
//!
//! A device registers once as a [`TimerClient`] and gets a [`Timer`], which is armed with an absolute deadline and
//! fires once; a periodic device arms it anew when called. Arming costs one `timerfd_settime` and wakes nobody. Time
//! is a value behind [`TimeSource`]: tests and deterministic runs use [`VirtualTime`] without a thread.
//!
//! Locks: the queue's lock is a leaf. No lock is held while a client is called.

#![expect(unsafe_code, reason = "clock_gettime has no safe wrapper that gives the absolute value")]

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

/// How long the thread sleeps without looking around, in milliseconds. Its descriptors are the client's, too: one that
/// closes those that it does not know makes its guests' timers late, but VMs still end.
const LOOK_AROUND: i32 = 500;

/// A clock in nanoseconds that never goes back, as the kernel's `ktime_get()`.
pub trait TimeSource: Send + Sync + fmt::Debug {
    /// The present time in nanoseconds.
    fn now(&self) -> u64;
}

/// The host's CLOCK_MONOTONIC.
#[derive(Debug, Default)]
pub struct MonotonicTime;

impl TimeSource for MonotonicTime {
    fn now(&self) -> u64 {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid place for the result; CLOCK_MONOTONIC always exists.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    }
}

/// A clock that moves only when told to.
#[derive(Debug, Default)]
pub struct VirtualTime(AtomicU64);

impl VirtualTime {
    /// Moves the clock on by `nanoseconds`.
    pub fn advance(&self, nanoseconds: u64) {
        self.0.fetch_add(nanoseconds, Ordering::SeqCst);
    }
}

impl TimeSource for VirtualTime {
    fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// What a timer calls when it fires; the callee may arm its timers again.
pub trait TimerClient: Send + Sync {
    /// The deadline has passed. A call can be late: the client checks its own state against the clock.
    fn timer_expired(&self);
}

/// One armed or idle timer of a client; gone with its owner.
pub struct Timer {
    shared: Arc<Shared>,
    slot: usize,
}

/// The timers of one VM. Dropping it ends the thread.
pub struct Timers {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    clock: Arc<dyn TimeSource>,
    queue: Mutex<Queue>,
    stopping: AtomicBool,
}

#[derive(Default)]
struct Queue {
    slots: Vec<Option<Slot>>,
    /// Armed slots by deadline; bounded by the number of slots, whatever a guest programs.
    order: BTreeSet<(u64, usize)>,
    alarm: Option<Alarm>,
}

struct Slot {
    client: Weak<dyn TimerClient>,
    deadline: Option<u64>,
}

/// The timerfd and the deadline that it is set to.
struct Alarm {
    descriptor: TimerFd,
    set_to: Option<u64>,
    /// The thread is being told to end: nothing may put the ring off.
    ending: bool,
}

impl Timers {
    /// Timers on the host's clock, with their thread.
    pub fn start() -> io::Result<Self> {
        let descriptor = TimerFd::new().map_err(io::Error::from)?;
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, descriptor.as_raw_fd(), event)?;
        let mut timers = Self::manual(Arc::new(MonotonicTime));
        timers.shared.queue().alarm = Some(Alarm { descriptor, set_to: None, ending: false });
        let shared = Arc::clone(&timers.shared);
        let thread = thread::Builder::new().name("timers".into()).spawn(move || shared.serve(&epoll))?;
        timers.thread = Some(thread);
        Ok(timers)
    }

    /// Timers on `clock` without a thread: whoever moves the clock calls [`Timers::fire_due`].
    pub fn manual(clock: Arc<dyn TimeSource>) -> Self {
        let shared = Shared { clock, queue: Mutex::default(), stopping: AtomicBool::new(false) };
        Self { shared: Arc::new(shared), thread: None }
    }

    /// The clock that the deadlines are told in.
    pub fn clock(&self) -> &Arc<dyn TimeSource> {
        &self.shared.clock
    }

    /// A new idle timer that calls `client`.
    pub fn register(&self, client: Weak<dyn TimerClient>) -> Timer {
        let mut queue = self.shared.queue();
        let entry = Some(Slot { client, deadline: None });
        let slot = match queue.slots.iter().position(Option::is_none) {
            Some(free) => {
                queue.slots[free] = entry;
                free
            }
            None => {
                queue.slots.push(entry);
                queue.slots.len() - 1
            }
        };
        Timer { shared: Arc::clone(&self.shared), slot }
    }

    /// Calls every client whose deadline has passed; gives the number of calls.
    pub fn fire_due(&self) -> usize {
        self.shared.fire_due()
    }

    /// The earliest armed deadline.
    pub fn next_deadline(&self) -> Option<u64> {
        self.shared.queue().order.first().map(|&(deadline, _)| deadline)
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.shared.stopping.store(true, Ordering::SeqCst);
        if let Some(alarm) = &mut self.shared.queue().alarm {
            alarm.ring_at_once();
        }
        // A client called by the thread may have held the last reference to us.
        if thread.thread().id() != thread::current().id() && thread.join().is_err() {
            tracing::error!("the timer thread has panicked");
        }
    }
}

impl fmt::Debug for Timers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timers").field("next_deadline", &self.next_deadline()).finish_non_exhaustive()
    }
}

impl Timer {
    /// Arms the timer for `deadline`, in place of an earlier one.
    pub fn arm(&self, deadline: u64) {
        self.set(Some(deadline));
    }

    /// Disarms the timer. A call that is already under way may still come.
    pub fn disarm(&self) {
        self.set(None);
    }

    /// The deadline that the timer is armed for.
    pub fn deadline(&self) -> Option<u64> {
        self.shared.queue().slots.get(self.slot)?.as_ref()?.deadline
    }

    fn set(&self, deadline: Option<u64>) {
        let mut queue = self.shared.queue();
        queue.schedule(self.slot, deadline);
        queue.set_alarm(&*self.shared.clock);
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let mut queue = self.shared.queue();
        queue.schedule(self.slot, None);
        if let Some(slot) = queue.slots.get_mut(self.slot) {
            *slot = None;
        }
    }
}

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timer").field("deadline", &self.deadline()).finish_non_exhaustive()
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fire_due(&self) -> usize {
        let mut fired = 0;
        loop {
            let client = {
                let mut queue = self.queue();
                match queue.take_due(self.clock.now()) {
                    Some(client) => client,
                    None => {
                        queue.set_alarm(&*self.clock);
                        return fired;
                    }
                }
            };
            if let Some(client) = client.upgrade() {
                client.timer_expired();
                fired += 1;
            }
        }
    }

    /// The thread: sleeps until the timerfd rings, serves what is due, and sets it again.
    fn serve(&self, epoll: &Epoll) {
        let mut events = [EpollEvent::default()];
        while !self.stopping.load(Ordering::SeqCst) {
            match epoll.wait(LOOK_AROUND, &mut events) {
                Ok(_) => {
                    self.fire_due();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::error!(%error, "the timer thread cannot wait");
                    return;
                }
            }
        }
    }
}

impl Queue {
    fn schedule(&mut self, slot: usize, deadline: Option<u64>) {
        let Some(Some(entry)) = self.slots.get_mut(slot) else { return };
        if let Some(old) = entry.deadline.take() {
            self.order.remove(&(old, slot));
        }
        entry.deadline = deadline;
        if let Some(new) = deadline {
            self.order.insert((new, slot));
        }
    }

    fn take_due(&mut self, now: u64) -> Option<Weak<dyn TimerClient>> {
        let &(_, slot) = self.order.first().filter(|&&(deadline, _)| deadline <= now)?;
        self.schedule(slot, None);
        self.slots.get(slot)?.as_ref().map(|entry| Weak::clone(&entry.client))
    }

    fn set_alarm(&mut self, clock: &dyn TimeSource) {
        let first = self.order.first().map(|&(deadline, _)| deadline);
        if let Some(alarm) = &mut self.alarm {
            alarm.set(first, clock);
        }
    }
}

impl Alarm {
    /// Sets the timerfd; this also takes back a ring that is still unread. A deadline put off is not worth a system
    /// call: the thread then wakes once for nothing and sets the true one.
    fn set(&mut self, deadline: Option<u64>, clock: &dyn TimeSource) {
        let now = clock.now();
        let rung = self.set_to.is_some_and(|set_to| set_to <= now);
        let later = match (self.set_to, deadline) {
            (None, None) => true,
            (Some(old), Some(new)) => new >= old,
            (Some(_), None) => true,
            (None, Some(_)) => false,
        };
        if self.ending || (later && !rung) {
            return;
        }
        self.set_to = deadline;
        let result = match deadline {
            Some(deadline) => {
                let wait = Duration::from_nanos(deadline.saturating_sub(now).max(1));
                self.descriptor.reset(wait, None)
            }
            None => self.descriptor.clear(),
        };
        if let Err(error) = result {
            tracing::error!(%error, "cannot set the timer descriptor");
        }
    }

    fn ring_at_once(&mut self) {
        self.ending = true;
        if let Err(error) = self.descriptor.reset(Duration::from_nanos(1), None) {
            tracing::error!(%error, "cannot wake the timer thread");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Remembers when it was called; re-arms itself as often as told.
    struct Client {
        timer: Timer,
        clock: Arc<dyn TimeSource>,
        calls: Mutex<Vec<u64>>,
        again: Mutex<Vec<u64>>,
        told: Mutex<Option<mpsc::Sender<()>>>,
    }

    impl Client {
        fn new(timers: &Timers) -> Arc<Self> {
            Arc::new_cyclic(|me: &Weak<Self>| Self {
                timer: timers.register(Weak::clone(me) as Weak<dyn TimerClient>),
                clock: Arc::clone(timers.clock()),
                calls: Mutex::default(),
                again: Mutex::default(),
                told: Mutex::default(),
            })
        }

        fn calls(&self) -> Vec<u64> {
            std::mem::take(&mut self.calls.lock().expect("no panic"))
        }
    }

    impl TimerClient for Client {
        fn timer_expired(&self) {
            self.calls.lock().expect("no panic").push(self.clock.now());
            if let Some(deadline) = self.again.lock().expect("no panic").pop() {
                self.timer.arm(deadline);
            }
            if let Some(told) = &*self.told.lock().expect("no panic") {
                told.send(()).expect("the test waits");
            }
        }
    }

    #[test]
    fn deadlines_fire_in_order_and_once() {
        let clock = Arc::new(VirtualTime::default());
        let timers = Timers::manual(Arc::clone(&clock) as Arc<dyn TimeSource>);
        let (early, late, idle) = (Client::new(&timers), Client::new(&timers), Client::new(&timers));
        late.timer.arm(20);
        early.timer.arm(30);
        early.timer.arm(10);
        idle.timer.arm(5);
        idle.timer.disarm();
        assert_eq!((timers.next_deadline(), timers.fire_due()), (Some(10), 0));
        clock.advance(15);
        assert_eq!((timers.fire_due(), early.calls(), late.calls()), (1, vec![15], vec![]));
        clock.advance(100);
        assert_eq!((timers.fire_due(), early.calls(), late.calls()), (1, vec![], vec![115]));
        assert_eq!((timers.next_deadline(), idle.calls()), (None, vec![]));
    }

    #[test]
    fn a_client_can_arm_again_and_go_away() {
        let clock = Arc::new(VirtualTime::default());
        let timers = Timers::manual(Arc::clone(&clock) as Arc<dyn TimeSource>);
        let client = Client::new(&timers);
        *client.again.lock().expect("no panic") = vec![50, 30, 20];
        client.timer.arm(10);
        clock.advance(40);
        assert_eq!((timers.fire_due(), client.timer.deadline()), (3, Some(50)));
        drop(client);
        assert_eq!(timers.next_deadline(), None);
        let next = Client::new(&timers);
        next.timer.arm(1);
        assert_eq!((timers.fire_due(), timers.shared.queue().slots.len()), (1, 1), "slots are used again");
    }

    #[test]
    fn arming_again_and_again_takes_no_memory() {
        let timers = Timers::manual(Arc::new(VirtualTime::default()));
        let client = Client::new(&timers);
        (0..10_000).for_each(|deadline| client.timer.arm(deadline));
        assert_eq!(timers.shared.queue().order.len(), 1);
    }

    #[test]
    fn a_client_that_closes_our_descriptors_can_still_drop_its_vm() {
        let timers = Timers::start().expect("a thread");
        let client = Client::new(&timers);
        let (sender, told) = mpsc::channel();
        *client.told.lock().expect("no panic") = Some(sender);
        let number = timers.shared.queue().alarm.as_ref().map(|alarm| alarm.descriptor.as_raw_fd());
        let other = std::fs::File::open("/dev/null").expect("a file");
        // SAFETY: another file takes the number, which stays open.
        unsafe { libc::dup2(other.as_raw_fd(), number.expect("an alarm")) };
        client.timer.arm(1);
        told.recv_timeout(Duration::from_secs(60)).expect("late, but it fires");
        drop(timers);
    }

    #[test]
    fn the_thread_serves_and_ends() {
        let timers = Timers::start().expect("a thread");
        let client = Client::new(&timers);
        let (sender, told) = mpsc::channel();
        *client.told.lock().expect("no panic") = Some(sender);
        // Each is armed after the former has fired, one of them in place of a later one.
        for delay in [0, 2_000_000, 1] {
            let deadline = timers.clock().now() + delay;
            client.timer.arm(deadline + 3_600_000_000_000);
            client.timer.arm(deadline);
            told.recv_timeout(Duration::from_secs(60)).expect("it fires");
            assert!(client.calls().iter().all(|&call| call >= deadline), "never early");
        }
        client.timer.arm(timers.clock().now() + 3_600_000_000_000);
        drop(timers);
        client.timer.arm(0);
    }
}
