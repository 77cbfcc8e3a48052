//! Guest memory whose pages can be elsewhere: a store that pages go to when the guest says so ([`crate::devices::memory`]), and a
//! thread that brings them back, after a delay, when somebody touches them.
//!
//! Memory that was never touched is not elsewhere.
#![expect(unsafe_code, reason = "drops pages of guest memory")]

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::config::PagingConfig;
use crate::devices::bus::lock;
use crate::host::sys::{self, Waiter};
use crate::host::userfaultfd::{self, UserFaults};
use crate::memory::{GuestMemory, PAGE_SIZE};

/// Pages that go at a time.
const BATCH: u64 = 64;
/// How long a page is held back at most.
const HOLD_LONGEST: Duration = Duration::from_secs(10);

/// Why pages cannot come and go.
#[derive(Debug, thiserror::Error)]
pub enum PagingError {
    /// The kernel gives no userfaultfd, or one that cannot do what it has to.
    #[error(
        "--page-out needs a userfaultfd that can protect pages (Linux 5.7 or later), and the host gives none ({0}): run as root, or \
         allow it by `sysctl vm.unprivileged_userfaultfd=1`"
    )]
    NoUserFaults(io::Error),
    /// Guest memory is not fit for it.
    #[error("guest memory cannot be paged: {0} (it takes Linux 5.14 or later on the host)")]
    Memory(io::Error),
    /// The host refused something.
    #[error("guest memory is paged no more: {0}")]
    Host(#[from] io::Error),
    /// The host cannot have memory fail.
    #[error("memory cannot be made to fail: UFFDIO_POISON needs Linux 6.6 or later on the host")]
    NoPoison,
    /// It is not the guest's.
    #[error("there is no guest memory at page {0:#x}")]
    NoMemory(u64),
}

#[derive(Debug, Default)]
struct State {
    /// Pages by host address; those of zeroes are left out.
    store: HashMap<u64, Box<[u8]>>,
    poisoned: HashSet<u64>,
    /// Pages that somebody waits for, and since when.
    wanted: VecDeque<(Instant, u64)>,
    held: bool,
    /// The machine ends: nobody is to wait.
    ending: bool,
    brought: u64,
}

/// The pages of a machine's memory.
#[derive(Debug)]
pub struct Paging {
    faults: UserFaults,
    memory: GuestMemory,
    config: PagingConfig,
    state: Mutex<State>,
    /// The state has changed.
    changed: EventFd,
}

impl Paging {
    /// Registers `memory`; slots are made of it only then.
    pub fn new(memory: &GuestMemory, config: PagingConfig) -> Result<Arc<Paging>, PagingError> {
        let faults = UserFaults::new().map_err(PagingError::NoUserFaults)?;
        if !faults.serves_kernel() {
            tracing::warn!(
                "system calls cannot wait for pages of the guest's that are out, so its disks will fail: run as root, or open \
                 /dev/userfaultfd to this user"
            );
        }
        for region in memory.iter() {
            let (start, length) = (region.as_ptr() as u64, region.len());
            let ready = userfaultfd::populate(start, length).and_then(|()| faults.register(start, length));
            ready.map_err(PagingError::Memory)?;
        }
        let changed = EventFd::new(libc::EFD_NONBLOCK)?;
        Ok(Arc::new(Paging { faults, memory: memory.clone(), config, state: Mutex::default(), changed }))
    }

    /// Starts the thread that brings pages. It ends when `quit` can be read, or, with `failed`, when it cannot go on; the guest has lost
    /// memory then.
    pub fn start(
        self: &Arc<Self>,
        quit: EventFd,
        failed: impl FnOnce(io::Error) + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let paging = self.clone();
        thread::Builder::new().name("pager".into()).spawn(move || {
            if let Err(error) = paging.serve(&quit) {
                failed(error);
                paging.give_up();
            }
        })
    }

    /// Lets whoever waits for a page go on without it.
    fn give_up(&self) {
        for region in self.memory.iter() {
            if let Err(error) = self.faults.unregister(region.as_ptr() as u64, region.len()) {
                tracing::error!("the guest waits for pages that nobody brings: {error}");
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn serve(&self, quit: &EventFd) -> io::Result<()> {
        loop {
            let next = self.bring_due()?;
            let mut waiters = [Waiter::read(&self.faults), Waiter::read(&self.changed), Waiter::read(quit)];
            sys::poll(&mut waiters, next)?;
            let [_, changed, quit] = waiters;
            if quit.ready {
                return Ok(());
            }
            if changed.ready {
                let _ = self.changed.read();
            }
            while let Some(page) = self.faults.next()? {
                self.state().wanted.push_back((Instant::now(), page));
            }
        }
    }

    /// Brings the pages whose time has come; when the next is to come.
    fn bring_due(&self) -> io::Result<Option<Duration>> {
        let mut state = self.state();
        let delay = match (state.ending, state.held) {
            (true, _) => Duration::ZERO,
            (false, true) => HOLD_LONGEST,
            (false, false) => self.config.delay,
        };
        while let Some(&(since, page)) = state.wanted.front() {
            let waited = since.elapsed();
            if waited < delay {
                return Ok(Some(delay - waited));
            }
            state.wanted.pop_front();
            // With the lock: nobody drops the page between our taking it from the store and its being there.
            let content = state.store.remove(&page);
            self.faults.bring(page, content.as_deref())?;
            state.brought += 1;
        }
        Ok(None)
    }

    /// The state has changed in a way that the thread has to know.
    fn tell(&self) {
        if let Err(error) = self.changed.write(1) {
            tracing::error!("the pager cannot be woken: {error}");
        }
    }

    /// Holds pages back, each until [`Paging::release`] or for ten seconds.
    pub fn hold(&self) {
        self.state().held = true;
    }

    /// Pages come after their delay again.
    pub fn release(&self) {
        self.state().held = false;
        self.tell();
    }

    /// From now on pages come at once, because nobody must wait for ever.
    pub fn end(&self) {
        self.state().ending = true;
        self.tell();
    }

    /// How many pages somebody waits for.
    pub fn wanted(&self) -> u64 {
        self.state().wanted.len() as u64
    }

    /// How many have been brought.
    pub fn brought(&self) -> u64 {
        self.state().brought
    }

    /// Pages by their host addresses: those of `count` pages from the guest's page `first` on that are memory.
    fn hosts(&self, first: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
        let end = first.saturating_add(count);
        self.memory.iter().filter_map(move |region| {
            let start = region.start_addr().0 / PAGE_SIZE;
            let (from, to) = (first.max(start), end.min(start + region.len() / PAGE_SIZE));
            let host = region.as_ptr() as u64 + (from.saturating_sub(start)) * PAGE_SIZE;
            (from < to).then(|| (host, to - from))
        })
    }

    /// Sends pages to the store: of `count` pages from the guest's page `first` on those that are there, or, of those, the
    /// part that the machine was started with. How many have gone. What is held comes.
    ///
    /// Other virtual CPUs may run; what they write while their page goes they write when it is back.
    pub fn evict(&self, first: u64, count: u64, part: bool) -> Result<u64, PagingError> {
        self.release();
        let percent = if part { u64::from(self.config.percent) } else { 100 };
        let mut gone = 0;
        for (start, pages) in self.hosts(first, count) {
            let there = userfaultfd::resident(start, pages * PAGE_SIZE)?;
            let chosen = |page: u64| (page + 1) * percent / 100 != page * percent / 100;
            let goes = |page: u64| there[page as usize] & 1 != 0 && chosen(page);
            let mut page = 0;
            while page < pages {
                let run = (page..pages).take(BATCH as usize).take_while(|&page| goes(page)).count() as u64;
                if run != 0 {
                    gone += self.evict_run(start + page * PAGE_SIZE, run)?;
                }
                page += run.max(1);
            }
        }
        Ok(gone)
    }

    /// The same for pages next to each other.
    fn evict_run(&self, start: u64, pages: u64) -> Result<u64, PagingError> {
        let mut state = self.state();
        let addresses = (0..pages).map(|page| start + page * PAGE_SIZE);
        if addresses.clone().any(|page| state.poisoned.contains(&page)) {
            // One of them cannot be read. Each for itself, if there are others.
            drop(state);
            let each = |page| self.evict_run(page, 1);
            return if pages == 1 { Ok(0) } else { addresses.map(each).sum() };
        }
        let length = pages * PAGE_SIZE;
        // It may have gone since somebody looked.
        if userfaultfd::resident(start, length)?.iter().any(|there| there & 1 == 0) {
            return Ok(0);
        }
        self.faults.protect(start, length)?;
        for page in addresses {
            let mut content = vec![0; PAGE_SIZE as usize];
            self.read(page, &mut content)?;
            if content.iter().any(|&byte| byte != 0) {
                state.store.insert(page, content.into());
            }
        }
        // SAFETY: guest memory.
        unsafe { userfaultfd::discard(start, length)? };
        self.faults.unprotect(start, length)?;
        Ok(pages)
    }

    /// Reads a page of guest memory by its host address.
    fn read(&self, host: u64, content: &mut [u8]) -> Result<(), PagingError> {
        let region = self.memory.iter().find(|r| host.wrapping_sub(r.as_ptr() as u64) < r.len());
        let gpa = region.map(|r| r.start_addr().0 + (host - r.as_ptr() as u64));
        let read = gpa.map(|gpa| self.memory.read_slice(content, GuestAddress(gpa)));
        match read {
            Some(Ok(())) => Ok(()),
            _ => Err(PagingError::Memory(io::ErrorKind::InvalidInput.into())),
        }
    }

    /// Has the memory of the guest's page `page` fail. What is held comes.
    pub fn poison(&self, page: u64) -> Result<(), PagingError> {
        if !self.faults.poisons() {
            return Err(PagingError::NoPoison);
        }
        let (host, _) = self.hosts(page, 1).next().ok_or(PagingError::NoMemory(page))?;
        self.release();
        let mut state = self.state();
        if !state.poisoned.insert(host) {
            return Ok(());
        }
        state.store.remove(&host);
        // SAFETY: guest memory.
        unsafe { userfaultfd::discard(host, PAGE_SIZE)? };
        Ok(self.faults.poison(host)?)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::memory;

    /// Four MiB in which each page begins with its number, and the thread that brings its pages. `None`, and the reason is
    /// told, where nobody may have a userfaultfd.
    struct Paged {
        memory: GuestMemory,
        paging: Arc<Paging>,
        quit: EventFd,
        pager: Option<JoinHandle<()>>,
    }

    const PAGES: u64 = 1024;

    impl Paged {
        fn new(percent: u8) -> Option<Paged> {
            let memory = memory::allocate(PAGES * PAGE_SIZE).unwrap();
            let paging = match Paging::new(&memory, PagingConfig { percent, delay: Duration::ZERO }) {
                Ok(paging) => paging,
                Err(error) => {
                    eprintln!("{error}");
                    return None;
                }
            };
            let quit = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            let pager = Some(paging.start(quit.try_clone().unwrap(), |error| panic!("{error}")).unwrap());
            let paged = Paged { memory, paging, quit, pager };
            (1..PAGES).for_each(|page| paged.write(page, page));
            Some(paged)
        }

        fn write(&self, page: u64, value: u64) {
            self.memory.write_obj(value, GuestAddress(page * PAGE_SIZE)).unwrap();
        }

        fn read(&self, page: u64) -> u64 {
            self.memory.read_obj(GuestAddress(page * PAGE_SIZE)).unwrap()
        }
    }

    impl Drop for Paged {
        fn drop(&mut self) {
            self.quit.write(1).unwrap();
            self.pager.take().unwrap().join().unwrap();
        }
    }

    #[test]
    fn pages_go_and_come_back_as_they_were() {
        let Some(paged) = Paged::new(25) else { return };
        assert_eq!(paged.paging.evict(10, 4, true).unwrap(), 1, "a quarter");
        assert_eq!(paged.paging.evict(0, u64::MAX, false).unwrap(), PAGES - 1);
        assert_eq!(paged.paging.evict(0, u64::MAX, false).unwrap(), 0, "they have gone");
        assert_eq!((paged.paging.evict(PAGES, 1, false).unwrap(), paged.paging.brought()), (0, 0));
        assert!((0..PAGES).all(|page| paged.read(page) == page));
        assert_eq!(paged.paging.brought(), PAGES);
    }

    #[test]
    fn a_page_that_is_held_comes_when_it_is_released() {
        let Some(paged) = Paged::new(50) else { return };
        assert_eq!(paged.paging.evict(7, 1, false).unwrap(), 1);
        paged.paging.hold();
        thread::scope(|scope| {
            let reader = scope.spawn(|| paged.read(7));
            while paged.paging.wanted() == 0 {
                thread::yield_now();
            }
            assert_eq!((reader.is_finished(), paged.paging.brought()), (false, 0));
            paged.paging.release();
            assert_eq!(reader.join().unwrap(), 7);
        });
        // Nobody is held once the machine ends.
        assert_eq!(paged.paging.evict(8, 1, false).unwrap(), 1);
        paged.paging.hold();
        paged.paging.end();
        assert_eq!(paged.read(8), 8);
    }

    /// Somebody writes to pages while they go.
    #[test]
    fn no_write_is_lost() {
        let Some(paged) = Paged::new(50) else { return };
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut rounds = 0;
                while !stop.load(Ordering::Relaxed) {
                    (1..9).for_each(|page| paged.write(page, paged.read(page) + 1));
                    rounds += 1;
                }
                rounds
            });
            for _ in 0..300 {
                paged.paging.evict(1, 8, false).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            let rounds: u64 = writer.join().unwrap();
            assert!((1..9).all(|page| paged.read(page) == page + rounds));
        });
    }

    /// What has failed stays so, and does not go; its neighbours do.
    #[test]
    fn failed_pages_do_not_go() {
        let Some(paged) = Paged::new(50) else { return };
        match paged.paging.poison(20) {
            Err(error @ PagingError::NoPoison) => return eprintln!("{error}"),
            other => other.unwrap(),
        }
        paged.paging.poison(20).unwrap();
        assert!(matches!(paged.paging.poison(PAGES), Err(PagingError::NoMemory(PAGES))));
        assert_eq!(paged.paging.evict(19, 3, false).unwrap(), 2);
        assert_eq!((paged.read(19), paged.read(21)), (19, 21));
    }
}
