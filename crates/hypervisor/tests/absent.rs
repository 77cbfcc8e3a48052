//! Memory of a slot that the client takes away, and gives back.
#![expect(unsafe_code, reason = "maps and unmaps the memory of slots")]

mod guest;

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use guest::system;
use hypervisor::memory::catch_absence;
use hypervisor::{Error, Vcpu, VcpuExit, Vm};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, kvm_msr_entry, kvm_pre_fault_memory, kvm_regs,
    kvm_userspace_memory_region,
};

const PAGE: u64 = 4096;
const CODE: u64 = 0x1000;
/// The page that comes and goes, of a slot of 16.
const GONE: u64 = 0x8000;
const SIZE: u64 = 0x10_000;
/// mov bx, GONE >> 4; mov ds, bx; inc word [0]; hlt
const PROGRAM: &[u8] = &[0xbb, 0x00, 0x08, 0x8e, 0xdb, 0xff, 0x06, 0x00, 0x00, 0xf4];
/// Where it accesses memory.
const ACCESS: u64 = CODE + 5;

/// A file of the slot's size, mapped, and a VM with it.
struct Guest {
    vm: Arc<Vm>,
    /// What is unmapped leaves a hole that another test's mapping may take, and repairing it would then take that away:
    /// one guest at a time.
    _alone: MutexGuard<'static, ()>,
    host: u64,
    file: File,
}

impl Guest {
    fn new(program: &[u8]) -> Guest {
        static ALONE: Mutex<()> = Mutex::new(());
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        catch_absence();
        // SAFETY: the name ends with a zero byte, and the descriptor is nobody else's.
        let mut file = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), 0)) };
        file.set_len(SIZE).unwrap();
        file.write_all(&vec![0; CODE as usize]).unwrap();
        file.write_all(program).unwrap();
        let (rw, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping.
        let host = unsafe {
            libc::mmap(std::ptr::null_mut(), SIZE as usize, rw, shared, file.as_raw_fd(), 0) as u64
        };
        let vm = system().create_vm().unwrap();
        let region =
            kvm_userspace_memory_region { memory_size: SIZE, userspace_addr: host, ..Default::default() };
        vm.set_user_memory_region(region).unwrap();
        Guest { vm, _alone, host, file }
    }

    fn vcpu(&self) -> Vcpu {
        let mut vcpu = self.vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.sregs();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.set_regs(&kvm_regs { rip: CODE, rsp: 0x7000, rflags: 2, ..Default::default() });
        vcpu
    }

    fn unmap(&self, gpa: u64, size: u64) {
        // SAFETY: guest memory, which is reached through the engine alone.
        unsafe { libc::munmap((self.host + gpa) as *mut libc::c_void, size as usize) };
    }

    fn protect(&self, protection: libc::c_int) {
        // SAFETY: as above.
        let result =
            unsafe { libc::mprotect((self.host + GONE) as *mut libc::c_void, PAGE as usize, protection) };
        assert_eq!(result, 0);
    }

    /// Maps all of the file again.
    fn repair(&self) {
        self.file.set_len(SIZE).unwrap();
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: as above.
        let at = unsafe {
            libc::mmap(
                self.host as *mut libc::c_void,
                SIZE as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                self.file.as_raw_fd(),
                0,
            )
        };
        assert_eq!(at as u64, self.host);
    }

    fn word(&self, gpa: u64) -> u16 {
        let mut word = [0; 2];
        assert!(self.vm.memory().read(gpa, &mut word));
        u16::from_le_bytes(word)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.vm.set_user_memory_region(kvm_userspace_memory_region::default());
        self.unmap(0, SIZE);
    }
}

/// Runs into memory that is absent, twice.
#[track_caller]
fn is_absent(vcpu: &mut Vcpu, gpa: u64) {
    for _ in 0..2 {
        match vcpu.run() {
            Err(error @ Error::MemoryAbsent { .. }) => {
                assert!(matches!(error, Error::MemoryAbsent { gpa: at } if at == gpa), "{error}");
                assert_eq!(error.errno(), libc::EFAULT);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn memory_that_was_unmapped_protected_or_cut_off_is_absent_until_it_is_repaired() {
    let guest = Guest::new(PROGRAM);
    let mut vcpu = guest.vcpu();
    let take: [(&str, &dyn Fn()); 5] = [
        ("unmapped", &|| guest.unmap(GONE, PAGE)),
        ("not to be read", &|| guest.protect(libc::PROT_NONE)),
        ("not to be written", &|| guest.protect(libc::PROT_READ)),
        ("beyond the end of the file", &|| guest.file.set_len(GONE).unwrap()),
        ("all of it", &|| guest.unmap(0, SIZE)),
    ];
    for (count, (how, take)) in take.into_iter().enumerate() {
        let all = how == "all of it";
        take();
        is_absent(&mut vcpu, if all { CODE } else { GONE });
        assert_eq!(vcpu.regs().rip, if all { CODE } else { ACCESS }, "{how}");
        guest.repair();
        assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt, "{how}");
        // What was cut off is zero when it comes back.
        let done = [1, 2, 3, 1, 2];
        assert_eq!(guest.word(GONE), done[count], "{how}");
        vcpu.set_regs(&kvm_regs { rip: CODE, ..vcpu.regs() });
    }
}

#[test]
fn memory_goes_while_the_guest_runs() {
    // mov bx, GONE >> 4; mov ds, bx; inc word [0]; jmp back
    let guest = Guest::new(&[0xbb, 0x00, 0x08, 0x8e, 0xdb, 0xff, 0x06, 0x00, 0x00, 0xeb, 0xfa]);
    let mut vcpu = guest.vcpu();
    for _ in 0..20 {
        let handle = vcpu.handle();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let before = guest.word(GONE);
                while guest.word(GONE) == before {
                    std::hint::spin_loop();
                }
                guest.unmap(GONE, PAGE);
            });
            is_absent(&mut vcpu, GONE);
        });
        assert_eq!(vcpu.regs().rip, ACCESS);
        guest.repair();
        let before = guest.word(GONE);
        handle.interrupt();
        assert!(matches!(vcpu.run(), Err(Error::Interrupted)));
        handle.settle();
        assert_eq!(guest.word(GONE), before);
    }
}

#[test]
fn an_interrupt_whose_stack_is_absent_stays_injected() {
    let guest = Guest::new(&[0xf4]);
    let mut vcpu = guest.vcpu();
    // The handler: iret.
    assert!(guest.vm.memory().write(0x40 * 4, &[0, 6, 0, 0]) && guest.vm.memory().write(0x600, &[0xcf]));
    vcpu.set_regs(&kvm_regs { rip: CODE, rsp: GONE + 0x100, rflags: 0x202, ..Default::default() });
    guest.unmap(GONE, PAGE);
    vcpu.interrupt(0x40).unwrap();
    is_absent(&mut vcpu, GONE);
    let events = vcpu.vcpu_events();
    assert_eq!((events.interrupt.injected, events.interrupt.nr), (1, 0x40));
    assert_eq!((vcpu.regs().rip, vcpu.regs().rsp), (CODE, GONE + 0x100));
    guest.repair();
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
    assert_eq!((vcpu.regs().rip, vcpu.regs().rsp), (CODE + 1, GONE + 0x100));
    assert_eq!(guest.word(GONE + 0xfa), CODE as u16, "the handler was entered");
}

#[test]
fn an_nmi_whose_stack_is_absent_stays_injected() {
    let guest = Guest::new(&[0xf4]);
    let mut vcpu = guest.vcpu();
    assert!(guest.vm.memory().write(2 * 4, &[0, 6, 0, 0]) && guest.vm.memory().write(0x600, &[0xcf]));
    vcpu.set_regs(&kvm_regs { rip: CODE, rsp: GONE + 0x100, rflags: 2, ..Default::default() });
    guest.unmap(GONE, PAGE);
    vcpu.nmi();
    is_absent(&mut vcpu, GONE);
    let events = vcpu.vcpu_events();
    assert_eq!((events.nmi.injected, events.nmi.pending), (1, 0));
    assert_ne!(events.flags & KVM_VCPUEVENT_VALID_NMI_PENDING, 0);
    guest.repair();
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
    assert_eq!((vcpu.regs().rip, guest.word(GONE + 0xfa)), (CODE + 1, CODE as u16));
}

#[test]
fn an_access_that_the_client_has_answered_is_not_made_again() {
    // mov bx, GONE >> 4; mov es, bx; xor di, di; mov dx, 0x10; insb; hlt
    let guest = Guest::new(&[0xbb, 0x00, 0x08, 0x8e, 0xc3, 0x31, 0xff, 0xba, 0x10, 0x00, 0x6c, 0xf4]);
    let mut vcpu = guest.vcpu();
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Io { port: 0x10, write: None, .. }));
    vcpu.complete(0x5a);
    guest.unmap(GONE, PAGE);
    is_absent(&mut vcpu, GONE);
    guest.repair();
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
    assert_eq!(guest.word(GONE), 0x5a);
}

#[test]
fn what_the_hypervisor_reads_and_writes_may_be_absent() {
    let guest = Guest::new(PROGRAM);
    let mut vcpu = guest.vcpu();
    let clock = kvm_msr_entry { index: 0x4b56_4d01, data: GONE | 1, ..Default::default() };
    assert_eq!(vcpu.set_msrs(&[clock]), 1);
    guest.unmap(GONE, PAGE);
    let memory = guest.vm.memory();
    assert!(!memory.read(GONE, &mut [0; 8]) && !memory.write(GONE, &[1; 8]));
    assert!(!memory.read(GONE - 4, &mut [0; 8]) && memory.read(GONE - 8, &mut [0; 8]));
    // The clock page is not written, and nothing comes of it but that.
    is_absent(&mut vcpu, GONE);
    guest.repair();
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
}

#[test]
fn what_cannot_be_populated_is_told() {
    let guest = Guest::new(PROGRAM);
    let mut vcpu = guest.vcpu();
    let mut populate = |gpa, size| {
        let mut range = kvm_pre_fault_memory { gpa, size, ..Default::default() };
        (vcpu.pre_fault_memory(&mut range).map_err(|e| e.errno()), range.gpa)
    };
    let take: [&dyn Fn(); 3] = [&|| guest.unmap(GONE, PAGE), &|| guest.protect(libc::PROT_NONE), &|| {
        guest.file.set_len(GONE).unwrap()
    }];
    for take in take {
        take();
        assert_eq!(populate(GONE, PAGE), (Err(libc::EFAULT), GONE));
        assert_eq!(populate(GONE - PAGE, 2 * PAGE), (Ok(()), GONE), "as far as it goes");
        guest.repair();
        assert_eq!(populate(GONE, PAGE), (Ok(()), GONE + PAGE));
    }
}

#[test]
fn a_page_that_has_failed_is_told_with_its_address() {
    let guest = Guest::new(PROGRAM);
    let mut vcpu = guest.vcpu();
    let Some(_userfaultfd) = poison(&guest) else {
        eprintln!("the host has no UFFDIO_POISON for us");
        return;
    };
    for _ in 0..2 {
        let error = vcpu.run().unwrap_err();
        let expected = (GONE, guest.host + GONE);
        assert!(matches!(error, Error::MemoryFailed { gpa, host } if (gpa, host) == expected), "{error}");
        assert_eq!(error.errno(), libc::EINTR);
    }
    assert_eq!(vcpu.regs().rip, ACCESS);
    let mut range = kvm_pre_fault_memory { gpa: GONE, size: PAGE, ..Default::default() };
    assert!(matches!(vcpu.pre_fault_memory(&mut range), Err(Error::MemoryFailed { .. })));
    guest.unmap(GONE, PAGE);
    guest.repair();
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
    assert_eq!(guest.word(GONE), 1);
}

/// Has accesses to the page fail as if its memory had failed, while the file is open (Linux 6.6,
/// include/uapi/linux/userfaultfd.h).
fn poison(guest: &Guest) -> Option<File> {
    const USER_MODE_ONLY: libc::c_int = 1;
    const API: libc::c_ulong = 0xc018_aa3f;
    const REGISTER: libc::c_ulong = 0xc020_aa00;
    const POISON: libc::c_ulong = 0xc020_aa08;
    const FEATURE_POISON: u64 = 1 << 14;
    const MODE_MISSING: u64 = 1;
    // SAFETY: the descriptor is nobody else's.
    let file = unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, USER_MODE_ONLY | libc::O_CLOEXEC) as libc::c_int;
        (fd >= 0).then(|| File::from_raw_fd(fd))?
    };
    let call = |number, structure: &mut [u64]| {
        // SAFETY: each structure has the length that its number says.
        unsafe { libc::ioctl(file.as_raw_fd(), number, structure.as_mut_ptr()) == 0 }
    };
    let page = guest.host + GONE;
    // Anonymous memory that nobody has touched.
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: guest memory, which is reached through the engine alone.
    unsafe {
        libc::mmap(page as *mut libc::c_void, PAGE as usize, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    let done = call(API, &mut [0xaa, FEATURE_POISON, 0])
        && call(REGISTER, &mut [page, PAGE, MODE_MISSING, 0])
        && call(POISON, &mut [page, PAGE, 0, 0]);
    done.then_some(file)
}
