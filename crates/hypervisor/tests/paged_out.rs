//! Slots whose pages the host takes away while the guest runs, and those that become lazy after they were made.
#![expect(unsafe_code, reason = "maps memory, and has the host page it out")]

mod guest;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use guest::system;
use hypervisor::memory::catch_absence;
use hypervisor::{Vcpu, VcpuExit, Vm};
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};

const PAGE: u64 = 4096;
const CODE: u64 = 0x1000;
/// A slot below this is not lazy by itself.
const SIZE: u64 = 4 << 20;
/// What the program reads, by its DS.
const FAR: u64 = 0x20_0000;
/// mov al, [0]; hlt
const PROGRAM: &[u8] = &[0xa0, 0, 0, 0xf4];

/// Maps `size` bytes of a file, or nobody's.
fn map(file: Option<&File>) -> u64 {
    let (flags, fd) = match file {
        Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
    };
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), SIZE as usize, rw, flags, fd, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at as u64
}

fn vm(host: u64) -> (Arc<Vm>, Vcpu) {
    catch_absence();
    let vm = system().create_vm().unwrap();
    let region =
        kvm_userspace_memory_region { memory_size: SIZE, userspace_addr: host, ..Default::default() };
    vm.set_user_memory_region(region).unwrap();
    assert!(vm.memory().write(CODE, PROGRAM));
    let vcpu = vm.create_vcpu(0).unwrap();
    (vm, vcpu)
}

/// Runs the program; what it read, and how many pages it has met so far that were elsewhere.
fn run(vcpu: &mut Vcpu) -> (u8, u64) {
    let mut sregs = vcpu.sregs();
    (sregs.cs.base, sregs.cs.selector, sregs.ds.base) = (0, 0, FAR);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&kvm_regs { rip: CODE, rsp: 0x7000, rflags: 2, ..Default::default() });
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
    let faults = vcpu.handle().stats.async_pf_faults.load(Ordering::Relaxed);
    (vcpu.regs().rax as u8, faults)
}

/// What was found to be there once was never asked about again, so that the vCPU itself waited for the disk.
#[test]
fn apf_a_file_that_the_host_pages_out_is_found_to_be_gone() {
    let path = format!("{}/paged_out.{}", env!("CARGO_TARGET_TMPDIR"), std::process::id());
    fs::write(&path, vec![0x5a; SIZE as usize]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let host = map(Some(&file));
    let (vm, mut vcpu) = vm(host);
    if !vm.memory().ept().is_lazy() {
        return eprintln!("the build directory is in memory: nothing of it is ever paged out");
    }
    let (value, before) = run(&mut vcpu);
    assert_eq!(value, 0x5a);
    assert_eq!(run(&mut vcpu), (0x5a, before), "it is there");
    // SAFETY: the mapping; nobody relies on its being in memory.
    let paged_out = unsafe {
        libc::msync(host as *mut libc::c_void, SIZE as usize, libc::MS_SYNC);
        libc::madvise(host as *mut libc::c_void, SIZE as usize, libc::MADV_PAGEOUT)
    };
    assert_eq!(paged_out, 0);
    if vm.find_gone() == 0 {
        return eprintln!("the host pages nothing out");
    }
    let (value, after) = run(&mut vcpu);
    assert!(value == 0x5a && after > before, "{after} after {before}");
    drop((vcpu, vm));
    // SAFETY: our own mapping.
    unsafe { libc::munmap(host as *mut libc::c_void, SIZE as usize) };
    fs::remove_file(path).unwrap();
}

/// Post-copy migration: memory is registered when there are slots already. Before, their vCPUs waited.
#[test]
fn apf_memory_that_is_registered_later_is_lazy() {
    const USER_MODE_ONLY: libc::c_int = 1;
    let host = map(None);
    let (vm, mut vcpu) = vm(host);
    // SAFETY: a new descriptor, and structures as their numbers say.
    let faults = unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, USER_MODE_ONLY | libc::O_CLOEXEC) as libc::c_int;
        if fd < 0 {
            return eprintln!("no userfaultfd: {}", std::io::Error::last_os_error());
        }
        assert_eq!(libc::ioctl(fd, 0xc018_aa3f, [0xaa_u64, 0, 0].as_mut_ptr()), 0);
        assert_eq!(libc::ioctl(fd, 0xc020_aa00, [host, SIZE, 1, 0].as_mut_ptr()), 0);
        fd
    };
    vm.registered(host + PAGE, PAGE);
    let server = std::thread::spawn(move || {
        let content = [0x77u8; PAGE as usize];
        let mut message = [0u64; 4];
        // SAFETY: as above.
        unsafe {
            assert_eq!(libc::read(faults, message.as_mut_ptr().cast(), 32), 32);
            assert_eq!(message[2] & !(PAGE - 1), host + FAR);
            let mut copy = [host + FAR, content.as_ptr() as u64, PAGE, 0, 0];
            assert_eq!(libc::ioctl(faults, 0xc028_aa03, copy.as_mut_ptr()), 0);
        }
    });
    assert_eq!(run(&mut vcpu), (0x77, 1));
    server.join().unwrap();
    drop((vcpu, vm));
    // SAFETY: our own mapping and descriptor.
    unsafe {
        libc::munmap(host as *mut libc::c_void, SIZE as usize);
        libc::close(faults);
    }
}
