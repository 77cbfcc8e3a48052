//! What the CPUs of a VM do together: mail between them, and sections that run while all others stand still.
//!
//! A CPU is *inside* while it is in guest mode. [`World::stop`] waits until nobody is inside and keeps everybody
//! out while it works. A CPU inside notices [`Requests::EXCLUSIVE`] at the next block boundary and steps aside.
//! Whoever wants to stop the world must be outside; a CPU that wants it while inside steps out for the time, and
//! gives up if somebody else is first, so that two can never wait for one another.

use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock};

use crate::cpu::Requests;

/// Written ranges that wait for one CPU before they are replaced by "any code may have changed".
const WRITTEN_MAX: usize = 256;

/// A message to a CPU. It is read between blocks, before the CPU executes anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Mail {
    /// Forget all cached translations and decoded code.
    Flush,
    /// Give up all permissions to store without looking.
    DropWrites,
    /// Give up the permissions to store to page `gfn` without looking, because CPU `asker` has code of it.
    DropWritesTo {
        /// Guest frame number.
        gfn: u64,
        /// Number of the CPU to tell.
        asker: usize,
    },
    /// Another CPU has given up its permissions to store to page `gfn`.
    WritesDropped {
        /// Guest frame number.
        gfn: u64,
    },
    /// Bytes `from..to` of page `gfn` were written.
    Written {
        /// Guest frame number.
        gfn: u64,
        /// First byte.
        from: usize,
        /// After the last byte.
        to: usize,
    },
    /// Any code may have been written.
    AllWritten,
    /// Any code may have been written, though hardly: compare it.
    CompareCode,
}

/// The CPUs of one VM.
#[derive(Debug, Default)]
pub(crate) struct World {
    /// By number. A number is never given out twice.
    members: RwLock<Vec<Option<Arc<Member>>>>,
    gate: Mutex<Gate>,
    changed: Condvar,
}

/// A CPU as the others see it.
#[derive(Debug)]
pub(crate) struct Member {
    requests: Arc<Requests>,
    /// Order does not matter, and twice the same is once.
    mail: Mutex<HashSet<Mail>>,
}

#[derive(Debug, Default)]
struct Gate {
    /// CPUs in guest mode.
    inside: usize,
    /// Somebody stops the world, or waits until it stands.
    stopping: bool,
}

impl Member {
    /// Takes all mail.
    pub(crate) fn take_mail(&self) -> HashSet<Mail> {
        std::mem::take(&mut *self.mail.lock().unwrap_or_else(|e| e.into_inner()))
    }

    fn send(&self, mail: Mail) {
        let mut waiting = self.mail.lock().unwrap_or_else(|e| e.into_inner());
        let overflow = matches!(mail, Mail::Written { .. }) && waiting.len() >= WRITTEN_MAX;
        waiting.insert(if overflow { Mail::AllWritten } else { mail });
        drop(waiting);
        self.requests.post(Requests::MAIL);
    }
}

impl World {
    /// Adds a CPU; its number.
    pub(crate) fn join(&self, requests: Arc<Requests>) -> (usize, Arc<Member>) {
        let member = Arc::new(Member { requests, mail: Mutex::default() });
        let mut members = self.members.write().unwrap_or_else(|e| e.into_inner());
        members.push(Some(member.clone()));
        (members.len() - 1, member)
    }

    /// Removes a CPU.
    pub(crate) fn part(&self, number: usize) {
        if let Some(slot) = self.members.write().unwrap_or_else(|e| e.into_inner()).get_mut(number) {
            *slot = None;
        }
    }

    /// Sends mail to all CPUs.
    pub(crate) fn send_all(&self, mail: Mail) {
        self.send_where(|_| true, mail);
    }

    /// Sends mail to the CPUs that `wanted` selects; how many there were.
    pub(crate) fn send_where(&self, wanted: impl Fn(usize) -> bool, mail: Mail) -> usize {
        let members = self.members.read().unwrap_or_else(|e| e.into_inner());
        let selected = members.iter().enumerate().filter(|(number, _)| wanted(*number));
        selected.filter_map(|(_, m)| m.as_ref()).map(|m| m.send(mail)).count()
    }

    fn post_all(&self, bits: u32) {
        let members = self.members.read().unwrap_or_else(|e| e.into_inner());
        members.iter().flatten().for_each(|m| m.requests.post(bits));
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait<'a>(&self, gate: MutexGuard<'a, Gate>) -> MutexGuard<'a, Gate> {
        self.changed.wait(gate).unwrap_or_else(|e| e.into_inner())
    }

    /// A CPU enters guest mode; waits while the world is stopped.
    pub(crate) fn enter(&self) {
        let mut gate = self.gate();
        while gate.stopping {
            gate = self.wait(gate);
        }
        gate.inside += 1;
    }

    /// A CPU leaves guest mode.
    pub(crate) fn leave(&self) {
        let mut gate = self.gate();
        gate.inside -= 1;
        if gate.stopping {
            self.changed.notify_all();
        }
    }

    /// A CPU inside has come to a block boundary and lets whoever stops the world pass.
    pub(crate) fn step_aside(&self) {
        self.leave();
        self.enter();
    }

    /// Runs `work` while no CPU is in guest mode. The caller is outside.
    pub(crate) fn stop<R>(&self, work: impl FnOnce(&World) -> R) -> R {
        let mut gate = self.gate();
        while gate.stopping {
            gate = self.wait(gate);
        }
        self.stopped(gate, 0, work)
    }

    /// Runs `work` while no other CPU is in guest mode, for a CPU that is inside. `None` if somebody else is
    /// stopping the world: the caller must go on to its next block boundary and may try again then.
    pub(crate) fn stop_from_inside<R>(&self, work: impl FnOnce(&World) -> R) -> Option<R> {
        let mut gate = self.gate();
        if gate.stopping {
            return None;
        }
        gate.inside -= 1;
        Some(self.stopped(gate, 1, work))
    }

    /// Waits until nobody is inside, works, and opens the gate with `inside` CPUs inside.
    fn stopped<R>(&self, mut gate: MutexGuard<'_, Gate>, inside: usize, work: impl FnOnce(&World) -> R) -> R {
        gate.stopping = true;
        if gate.inside != 0 {
            self.post_all(Requests::EXCLUSIVE);
        }
        while gate.inside != 0 {
            gate = self.wait(gate);
        }
        drop(gate);
        let opener = Opener { world: self, inside };
        let result = work(self);
        drop(opener);
        result
    }
}

/// Lets the CPUs in again, also if the work under way panics.
struct Opener<'a> {
    world: &'a World,
    inside: usize,
}

impl Drop for Opener<'_> {
    fn drop(&mut self) {
        let mut gate = self.world.gate();
        gate.stopping = false;
        gate.inside += self.inside;
        self.world.changed.notify_all();
    }
}
