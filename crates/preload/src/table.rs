//! Which object a descriptor stands for.
//!
//! [`find`] is on the way of every KVM_RUN: two loads and what arc-swap needs to keep the entry alive. Descriptors that
//! we have not seen being made (duplicates by system calls of the client's own, SCM_RIGHTS) are found by the identity of
//! their file, and so are descriptors that were closed behind our back and mean something else now ([`verify`]). KVM_RUN
//! alone takes the table's word.

use std::collections::BTreeMap;
use std::os::fd::{IntoRawFd, RawFd};
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use abi::{Created, Errno, Object};
use arc_swap::{ArcSwapOption, Guard};
use once_cell::race::OnceBox;

use crate::mask::RunMask;
use crate::process;
use crate::raw::{self, Identity};

/// Slots in a chunk.
const CHUNK: usize = 1024;
/// Chunks: as many descriptors as a process may have unless the administrator allows more (`fs.nr_open`).
const CHUNKS: usize = 1024;

type Slot = ArcSwapOption<Entry>;

static TABLE: [OnceBox<[Slot; CHUNK]>; CHUNKS] = [const { OnceBox::new() }; CHUNKS];

/// An object with descriptors.
#[derive(Debug)]
pub(crate) struct Entry {
    /// The object.
    pub(crate) object: Object,
    /// Signals during KVM_RUN, if it is a vCPU.
    pub(crate) run_mask: RunMask,
    /// Threads in KVM_RUN, if it is a vCPU: one that runs it, and others that wait for that.
    pub(crate) runners: AtomicU32,
    identity: Identity,
    /// [`process::generation`] of the process that it belongs to.
    generation: u32,
    /// That process.
    pid: i32,
}

impl Entry {
    /// Whether this process may use it: VMs belong to the process that made them (kernel: `kvm->mm != current->mm`).
    #[inline]
    pub(crate) fn is_usable(&self) -> bool {
        self.generation == process::generation() || matches!(self.object, Object::System(_))
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // Another file may have the number by now, with an entry of its own.
        let mut registry = registry();
        if registry.by_identity.get(&self.identity).is_some_and(|entry| entry.strong_count() == 0) {
            registry.by_identity.remove(&self.identity);
        }
    }
}

/// All objects.
#[derive(Default)]
struct Registry {
    by_identity: BTreeMap<Identity, Weak<Entry>>,
    /// Those that descriptors in flight may stand for, which nobody can count.
    sent: Vec<Arc<Entry>>,
}

static REGISTRY: AtomicPtr<Mutex<Registry>> = AtomicPtr::new(std::ptr::null_mut());

fn registry() -> MutexGuard<'static, Registry> {
    process::leaked(&REGISTRY).lock().unwrap_or_else(PoisonError::into_inner)
}

/// In a forked child: the old registry may be locked for ever by a thread that is not there.
pub(crate) fn forget_registry() {
    REGISTRY.store(std::ptr::null_mut(), Ordering::Release);
}

fn slot(fd: RawFd) -> Option<&'static Slot> {
    let fd = usize::try_from(fd).ok()?;
    TABLE.get(fd / CHUNK)?.get()?.get(fd % CHUNK)
}

fn slot_or_new(fd: RawFd) -> Option<&'static Slot> {
    let fd = usize::try_from(fd).ok()?;
    let chunk = TABLE.get(fd / CHUNK)?;
    chunk.get_or_init(|| Box::new([const { Slot::const_empty() }; CHUNK])).get(fd % CHUNK)
}

/// What the table says of a descriptor.
#[inline]
pub(crate) fn find(fd: RawFd) -> Guard<Option<Arc<Entry>>> {
    match slot(fd) {
        Some(slot) => slot.load(),
        None => Guard::from_inner(None),
    }
}

/// The object of a descriptor by its file, whatever the table says; corrects the table.
pub(crate) fn verify(fd: RawFd) -> Option<Arc<Entry>> {
    let identity = raw::identity(fd);
    if let Some(entry) = find(fd).as_ref()
        && identity == Some(entry.identity)
    {
        return Some(entry.clone());
    }
    let entry = identity.and_then(|identity| registry().by_identity.get(&identity)?.upgrade());
    // The new entry's slot may be beyond the table: then it is looked for each time.
    let slot = if entry.is_some() { slot_or_new(fd) } else { slot(fd) };
    if let Some(slot) = slot {
        discard(slot.swap(entry.clone()));
    }
    entry
}

/// All objects that there are.
pub(crate) fn all() -> Vec<Arc<Entry>> {
    registry().by_identity.values().filter_map(Weak::upgrade).collect()
}

/// Enters a new object; gives its descriptor, which from now on belongs to the client.
pub(crate) fn adopt(created: Created) -> Result<RawFd, Errno> {
    let Created { object, fd } = created;
    if matches!(object, Object::Vm(_)) {
        sweep();
    }
    let fd = fd.into_raw_fd();
    enter(fd, object)?;
    Ok(fd)
}

/// Enters the object of a descriptor.
pub(crate) fn enter(fd: RawFd, object: Object) -> Result<Arc<Entry>, Errno> {
    let identity = raw::identity(fd).ok_or(Errno(libc::EBADF))?;
    let (generation, pid) = (process::generation(), raw::pid());
    let entry = Arc::new(Entry {
        object,
        run_mask: RunMask::default(),
        runners: AtomicU32::new(0),
        identity,
        generation,
        pid,
    });
    registry().by_identity.insert(identity, Arc::downgrade(&entry));
    set(fd, Some(entry.clone()));
    Ok(entry)
}

/// Says what a descriptor stands for from now on.
pub(crate) fn set(fd: RawFd, entry: Option<Arc<Entry>>) {
    let slot = if entry.is_some() { slot_or_new(fd) } else { slot(fd) };
    if let Some(slot) = slot {
        discard(slot.swap(entry));
    }
}

/// Whether the table has an object for the descriptor.
#[inline]
pub(crate) fn is_ours(fd: RawFd) -> bool {
    slot(fd).is_some_and(|slot| slot.load().is_some())
}

/// Takes a descriptor out that is about to be closed. Whoever gets the entry drops it after that.
pub(crate) fn take(fd: RawFd) -> Option<Arc<Entry>> {
    let slot = slot(fd)?;
    let entry = slot.load_full()?;
    // A vfork(2) child closes its own descriptors but has its parent's memory.
    if entry.generation == process::generation() && entry.pid != raw::pid() {
        return None;
    }
    slot.swap(None)
}

/// Drops an entry. A child keeps what it has inherited: the threads that belong to it are its parent's.
pub(crate) fn discard(entry: Option<Arc<Entry>>) {
    let Some(entry) = entry else { return };
    if !entry.is_usable() {
        std::mem::forget(entry);
        return;
    }
    // The last that we know of: are there duplicates that we have not seen being made?
    if Arc::strong_count(&entry) == 1 && !matches!(entry.object, Object::System(_)) {
        let unseen = open_descriptors().filter(|&fd| raw::identity(fd) == Some(entry.identity));
        for fd in unseen.collect::<Vec<_>>() {
            if let Some(slot) = slot_or_new(fd) {
                slot.store(Some(entry.clone()));
            }
        }
    }
}

/// Drops what descriptors stood for that were closed behind our back.
pub(crate) fn sweep() {
    for (chunk, slots) in TABLE.iter().enumerate() {
        let Some(slots) = slots.get() else { continue };
        for (index, slot) in slots.iter().enumerate() {
            let fd = (chunk * CHUNK + index) as RawFd;
            let stale = slot.load().as_ref().is_some_and(|entry| raw::identity(fd) != Some(entry.identity));
            if stale {
                discard(slot.swap(None));
            }
        }
    }
}

/// The table's descriptors from `first` to `last`.
pub(crate) fn between(first: RawFd, last: RawFd) -> Vec<RawFd> {
    let chunks = TABLE.iter().enumerate().filter_map(|(chunk, slots)| Some((chunk, slots.get()?)));
    let all = chunks.flat_map(|(chunk, slots)| {
        slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.load().is_some())
            .map(move |(i, _)| chunk * CHUNK + i)
    });
    all.map(|fd| fd as RawFd).filter(|fd| (first..=last).contains(fd)).collect()
}

/// Keeps the object of a descriptor that is sent to somebody: nobody can tell when the last copy goes.
pub(crate) fn keep(fd: RawFd) {
    let Some(entry) = verify(fd) else { return };
    let mut registry = registry();
    if !registry.sent.iter().any(|sent| Arc::ptr_eq(sent, &entry)) {
        registry.sent.push(entry);
    }
}

fn open_descriptors() -> impl Iterator<Item = RawFd> {
    let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raw::close;

    /// Numbers of descriptors are the process's: one test at a time.
    fn alone() -> MutexGuard<'static, ()> {
        static ALONE: Mutex<()> = Mutex::new(());
        ALONE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vm() -> RawFd {
        let system = process::system().unwrap();
        adopt(Created::vm(system.create_vm().unwrap()).unwrap()).unwrap()
    }

    fn duplicate(fd: RawFd) -> RawFd {
        // The C library's own, which the table does not see.
        let file = std::fs::File::open(format!("/proc/self/fd/{fd}")).unwrap();
        file.into_raw_fd()
    }

    #[test]
    fn an_object_goes_with_its_last_descriptor() {
        let _alone = alone();
        let (fd, other) = (vm(), duplicate(0));
        let object = Arc::downgrade(&find(fd).clone().unwrap());
        set(other, find(fd).clone());
        let entry = take(fd);
        close(fd);
        discard(entry);
        assert!(!is_ours(fd) && is_ours(other) && object.strong_count() != 0);
        let entry = take(other);
        close(other);
        discard(entry);
        assert_eq!(object.strong_count(), 0);
    }

    #[test]
    fn a_duplicate_that_nobody_saw_keeps_the_object() {
        let _alone = alone();
        let fd = vm();
        let copy = duplicate(fd);
        let entry = take(fd);
        close(fd);
        discard(entry);
        assert!(is_ours(copy), "found when the last that was known was closed");
        set(copy, None);
        close(copy);
    }

    #[test]
    fn a_number_that_was_used_again_is_noticed() {
        let _alone = alone();
        let fd = vm();
        let object = Arc::downgrade(&verify(fd).unwrap());
        close(fd);
        assert!(verify(fd).is_none() && !is_ours(fd));
        assert_eq!(object.strong_count(), 0);
        let (fd, object) = {
            let fd = vm();
            (fd, Arc::downgrade(&verify(fd).unwrap()))
        };
        close(fd);
        sweep();
        assert_eq!(object.strong_count(), 0);
    }

    #[test]
    fn numbers_beyond_the_table_are_nobodys() {
        for fd in [-1, RawFd::MAX, (CHUNK * CHUNKS) as RawFd] {
            assert!(find(fd).is_none() && take(fd).is_none() && verify(fd).is_none());
            set(fd, None);
        }
    }
}
