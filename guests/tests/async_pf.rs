//! Asynchronous page faults on bare metal, by the numbers of their test plan. `asm/async_pf.S` touches pages that a userfaultfd of
//! ours serves: some when the program asks for them, and the others at once.
#![expect(unsafe_code, reason = "maps memory, and serves its faults")]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use guests::ASYNC_PF;
use guests::machine;
use hypervisor::{HostParams, VcpuExit};
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use silicon::model::CpuModel;

const PAGE: usize = 4096;
/// The slot: where, and its bytes.
const LAZY: u64 = 0x1000_0000;
const SIZE: usize = 2 << 20;
/// Pages that come only when the program asks.
const ASKED: [u64; 2] = [1, 6];

/// Memory whose pages somebody has to bring (include/uapi/linux/userfaultfd.h).
struct Lazy {
    host: u64,
    faults: File,
}

impl Lazy {
    /// `None` where nobody may have a userfaultfd.
    fn new() -> Option<Lazy> {
        const USER_MODE_ONLY: libc::c_int = 1;
        let (rw, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, and a descriptor that is nobody else's.
        let (host, faults) = unsafe {
            let host = libc::mmap(std::ptr::null_mut(), SIZE, rw, flags, -1, 0) as u64;
            let fd = libc::syscall(libc::SYS_userfaultfd, USER_MODE_ONLY | libc::O_CLOEXEC) as libc::c_int;
            if fd < 0 {
                eprintln!("no userfaultfd: {}", std::io::Error::last_os_error());
                return None;
            }
            (host, File::from_raw_fd(fd))
        };
        let lazy = Lazy { host, faults };
        lazy.call(0xc018_aa3f, &mut [0xaa, 0, 0]);
        lazy.call(0xc020_aa00, &mut [host, SIZE as u64, 1, 0]);
        Some(lazy)
    }

    fn call(&self, number: libc::c_ulong, structure: &mut [u64]) {
        // SAFETY: each structure has the length that its number says.
        let result = unsafe { libc::ioctl(self.faults.as_raw_fd(), number, structure.as_mut_ptr()) };
        assert_eq!(result, 0, "{number:#x}: {}", std::io::Error::last_os_error());
    }

    /// The number of the next page that somebody waits for.
    fn next(&self) -> Option<u64> {
        let mut message = [0; 32];
        (&self.faults).read_exact(&mut message).ok()?;
        let address = u64::from_le_bytes(message[16..24].try_into().unwrap());
        Some((address - self.host) / PAGE as u64)
    }

    /// Brings it: each word is the page's number.
    fn bring(&self, page: u64) {
        let data: Vec<u8> = (page as u32).to_le_bytes().repeat(PAGE / 4);
        let to = self.host + page * PAGE as u64;
        self.call(0xc028_aa03, &mut [to, data.as_ptr() as u64, PAGE as u64, 0, 0]);
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which the VM is done with.
        unsafe { libc::munmap(self.host as *mut libc::c_void, SIZE) };
    }
}

/// What the program has asked for.
#[derive(Default)]
struct Asked {
    pages: Mutex<Vec<u64>>,
    changed: Condvar,
}

impl Asked {
    fn wait_for(&self, page: u64) {
        let mut pages = self.pages.lock().unwrap();
        while !pages.contains(&page) {
            pages = self.changed.wait(pages).unwrap();
        }
    }

    fn ask(&self, page: u64) {
        self.pages.lock().unwrap().push(page);
        self.changed.notify_all();
    }
}

/// The slot of pages that somebody has to bring.
fn slot(lazy: &Lazy) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region {
        slot: 1,
        flags: 0,
        guest_phys_addr: LAZY,
        memory_size: SIZE as u64,
        userspace_addr: lazy.host,
    }
}

/// A split lock on a page that is elsewhere, of a host that emulates it: the vCPU is held, and hears that it is wanted; when the page
/// has come the lock is made, once.
#[test]
fn apf_a_split_lock_waits_for_its_page_and_can_be_interrupted() {
    hypervisor::memory::catch_absence();
    let Some(lazy) = Lazy::new() else { return };
    let host = HostParams::parse("split_lock_detect=fatal ring3.split_lock_policy=emulate").unwrap();
    let mut machine = machine::build(ASYNC_PF.image, 1, CpuModel::default(), host).unwrap();
    machine.vm.set_user_memory_region(slot(&lazy)).unwrap();
    // lock inc dword [LAZY + 0x3e]; out 0xf4, al
    let code = [0xf0, 0xff, 0x05, 0x3e, 0x00, 0x00, 0x10, 0xe6, 0xf4];
    assert!(machine.vm.memory().write(0x1000, &code));
    let vcpu = &mut machine.vcpus[0];
    let regs = vcpu.regs();
    vcpu.set_regs(&kvm_regs { rip: 0x1000, rflags: 0x202, ..regs });
    let handle = vcpu.handle();
    thread::scope(|scope| {
        let running = scope.spawn(|| {
            let interrupted = matches!(vcpu.run(), Err(hypervisor::Error::Interrupted));
            (interrupted, vcpu)
        });
        assert_eq!(lazy.next(), Some(0), "a worker wants the page");
        handle.interrupt();
        let (interrupted, vcpu) = running.join().unwrap();
        assert!(interrupted);
        lazy.bring(0);
        handle.settle();
        assert!(matches!(vcpu.run(), Ok(VcpuExit::Io { port: 0xf4, .. })));
    });
    let mut word = [0; 4];
    assert!(machine.vm.memory().read(LAZY + 0x3e, &mut word));
    assert_eq!(u32::from_le_bytes(word), 1);
    let emulated = handle.stats.split_locks_emulated.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(emulated, 1);
}

#[test]
fn apf_events_of_pages_that_are_elsewhere() {
    hypervisor::memory::catch_absence();
    let Some(lazy) = Lazy::new().map(Arc::new) else { return };
    let mut machine = machine::build(ASYNC_PF.image, 1, CpuModel::default(), HostParams::default()).unwrap();
    machine.vm.set_user_memory_region(slot(&lazy)).unwrap();
    let asked = Arc::new(Asked::default());
    let server = {
        let (lazy, asked) = (lazy.clone(), asked.clone());
        move || {
            // Six pages; the program touches no other.
            for _ in 0..6 {
                let Some(page) = lazy.next() else { return };
                if ASKED.contains(&page) {
                    asked.wait_for(page);
                }
                lazy.bring(page);
            }
        }
    };
    let server = thread::spawn(server);
    let vcpu = &mut machine.vcpus[0];
    let (mut console, mut behaviours) = (String::new(), Vec::new());
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::Io { port: 0xec, write: Some(page), .. } => asked.ask(page.into()),
            VcpuExit::Io { port: 0xea, write: Some(line), .. } => behaviours.push(line as u16),
            VcpuExit::Io { port: 0x3f8, write: Some(value), .. } => console.push(char::from(value as u8)),
            VcpuExit::Io { port: 0xf4, .. } => break,
            other => panic!("{other:?} at {:#x}", vcpu.state().rip),
        }
    }
    assert_eq!(console, "PASS\n");
    let expected: Vec<u16> = ASYNC_PF.behaviours().map(|(line, _)| line).collect();
    assert_eq!(behaviours, expected);
    let handle = vcpu.handle();
    let counted = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    let stats = &handle.stats;
    assert_eq!(counted(&stats.async_pf_not_present), 2, "pages 1 and 6");
    assert_eq!(counted(&stats.async_pf_ready), 4, "those, and twice everybody");
    assert_eq!(counted(&stats.async_pf_waits), 0);
    assert!(counted(&stats.async_pf_holds) >= 4, "pages 2 to 5");
    server.join().unwrap();
}
