use super::*;

impl Memory {
    fn set(&self, region: kvm_userspace_memory_region) -> Result<(), Error> {
        self.set_region(region, false)
    }

    fn take(&self, slot: u32) -> Result<Vec<u64>, Error> {
        self.dirty_log(slot, true)
    }
}

fn region(slot: u32, gpa: u64, size: u64, host: u64) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: gpa,
        memory_size: size,
        userspace_addr: host,
    }
}

#[test]
fn slots_are_checked_as_kvm_checks_them() {
    let memory = Memory::default();
    let cases = [
        (region(SLOTS_MAX, 0, 4096, 0x1000), libc::EINVAL),
        (region(0, 1, 4096, 0x1000), libc::EINVAL),
        (region(0, 0, 4095, 0x1000), libc::EINVAL),
        (region(0, 0, 4096, 0x1001), libc::EINVAL),
        (region(0, u64::MAX - 4095, 8192, 0x1000), libc::EINVAL),
        (region(0, 0, 0, 0), libc::EINVAL),
        (region(0, 0, 1 << 43, 0x1000), libc::EINVAL),
    ];
    for (bad, errno) in cases {
        assert_eq!(memory.set(bad).map_err(|e| e.errno()), Err(errno), "{bad:?}");
    }
    memory.set(region(0, 0, 0x2000, 0x10_0000)).unwrap();
    let overlap = memory.set(region(1, 0x1000, 0x1000, 0x20_0000));
    assert_eq!(overlap.map_err(|e| e.errno()), Err(libc::EEXIST));
    memory.set(region(0, 0x4000, 0x2000, 0x10_0000)).unwrap();
    assert!(memory.ept().find(0).is_none() && memory.ept().find(0x5000).is_some());
    memory.set(region(0, 0, 0, 0)).unwrap();
    assert!(memory.ept().find(0x4000).is_none());
}

#[test]
fn reads_and_writes_cross_slots() {
    let (mut a, mut b) = (vec![0u8; 8192], vec![0u8; 8192]);
    let align = |v: &mut Vec<u8>| (v.as_mut_ptr() as u64 + 4095) & !4095;
    let memory = Memory::default();
    memory.set(region(0, 0, 4096, align(&mut a))).unwrap();
    memory.set(region(1, 4096, 4096, align(&mut b))).unwrap();
    assert!(memory.write(4094, b"abcd"));
    let mut out = [0; 4];
    assert!(memory.read(4094, &mut out) && &out == b"abcd");
    assert!(!memory.write(8190, b"abcd"));
    let readonly = KVM_MEM_READONLY;
    let rom = kvm_userspace_memory_region { flags: readonly, ..region(2, 0x10_0000, 4096, align(&mut b)) };
    memory.set(rom).unwrap();
    assert!(!memory.write(0x10_0000, b"a") && memory.read(0x10_0000, &mut out));
}

#[test]
fn slots_log_writes_while_they_are_told_to() {
    let mut bytes = vec![0u8; 12288];
    let host = (bytes.as_mut_ptr() as u64 + 4095) & !4095;
    let memory = Memory::default();
    let plain = region(3, 0x10_0000, 8192, host);
    memory.set(plain).unwrap();
    assert_eq!(memory.take(3).map_err(|e| e.errno()), Err(libc::ENOENT));
    memory.set(kvm_userspace_memory_region { flags: KVM_MEM_LOG_DIRTY_PAGES, ..plain }).unwrap();
    assert!(memory.write(0x10_1000, b"a"));
    assert_eq!(memory.take(3).unwrap(), [2]);
    assert_eq!(memory.take(3).unwrap(), [0]);
    memory.set(plain).unwrap();
    assert!(memory.take(3).is_err() && memory.take(4).is_err());
}

fn logged(region: kvm_userspace_memory_region) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region { flags: region.flags | KVM_MEM_LOG_DIRTY_PAGES, ..region }
}

fn errno<T>(result: Result<T, Error>) -> Result<T, i32> {
    result.map_err(|e| e.errno())
}

#[test]
fn existing_slots_change_as_kvm_lets_them() {
    let memory = Memory::new(40);
    let slot = region(1, 0x1_0000, 0x4000, 0x10_0000);
    let rom =
        kvm_userspace_memory_region { flags: KVM_MEM_READONLY, ..region(2, 0x2_0000, 0x1000, 0x20_0000) };
    memory.set(slot).unwrap();
    memory.set(rom).unwrap();
    let cases = [
        ("the same again", slot, Ok(())),
        ("another size", region(1, 0x1_0000, 0x2000, 0x10_0000), Err(libc::EINVAL)),
        ("another host address", region(1, 0x1_0000, 0x4000, 0x11_0000), Err(libc::EINVAL)),
        ("read-only", kvm_userspace_memory_region { flags: KVM_MEM_READONLY, ..slot }, Err(libc::EINVAL)),
        ("writable", kvm_userspace_memory_region { flags: 0, ..rom }, Err(libc::EINVAL)),
        ("unknown flag", kvm_userspace_memory_region { flags: 4, ..slot }, Err(libc::EINVAL)),
        ("over its own range", region(1, 0x1_2000, 0x4000, 0x10_0000), Ok(())),
        ("over another", region(1, 0x1_d000, 0x4000, 0x10_0000), Err(libc::EEXIST)),
        ("beside another", region(1, 0x1_c000, 0x4000, 0x10_0000), Ok(())),
        ("around another", region(3, 0x1_0000, 0x20_0000, 0x10_0000), Err(libc::EEXIST)),
        ("inside another", region(3, 0x1_d000, 0x1000, 0x10_0000), Err(libc::EEXIST)),
        ("SMRAM beside them", region(1 << 16, 0x1_c000, 0x1000, 0x10_0000), Ok(())),
        ("over SMRAM", region(1 << 16 | 7, 0x1_b000, 0x2000, 0x10_0000), Err(libc::EEXIST)),
        ("a slot too many of SMRAM", region(1 << 16 | SLOTS_MAX, 0, 0x1000, 0x10_0000), Err(libc::EINVAL)),
        ("a third address space", region(2 << 16, 0, 0x1000, 0x10_0000), Err(libc::EINVAL)),
        (
            "SMRAM beyond the address width",
            region(1 << 16 | 1, 1 << 40, 0x1000, 0x10_0000),
            Err(libc::EINVAL),
        ),
        (
            "SMRAM at the other space's bit",
            region(1 << 16 | 1, 1 << 52, 0x1000, 0x10_0000),
            Err(libc::EINVAL),
        ),
        ("beyond the address width", region(3, (1 << 40) - 0x1000, 0x2000, 0x10_0000), Err(libc::EINVAL)),
        ("up to the address width", region(3, (1 << 40) - 0x2000, 0x2000, 0x10_0000), Ok(())),
        ("of the kernel", region(4, 0, 0x1000, 1 << 47), Err(libc::EINVAL)),
    ];
    for (name, region, expected) in cases {
        assert_eq!(errno(memory.set(region)), expected, "{name}");
    }
    assert!(memory.ept().find(0x1_0000).is_none() && memory.ept().find(0x1_c000).is_some());
}

#[test]
fn as_many_slots_as_there_can_be() {
    let memory = Memory::default();
    for slot in 0..SLOTS_MAX {
        memory.set(region(slot, u64::from(slot) << 21, 0x1000, 0x1000)).unwrap();
    }
    assert_eq!(errno(memory.set(region(SLOTS_MAX, 1 << 40, 0x1000, 0x1000))), Err(libc::EINVAL));
    assert!(memory.ept().find(u64::from(SLOTS_MAX - 1) << 21).is_some());
}

#[test]
fn a_log_that_starts_full_is_cleared_by_hand() {
    let mut bytes = vec![0u8; 101 << 12];
    let host = (bytes.as_mut_ptr() as u64 + 4095) & !4095;
    let memory = Memory::default();
    let slot = logged(region(3, 0, 100 << 12, host));
    memory.set_region(slot, true).unwrap();
    assert_eq!(memory.dirty_log(3, false).unwrap(), [u64::MAX, (1 << 36) - 1]);
    let clear = |slot, first_page, pages, mask: &[u64]| {
        let range = DirtyRange { slot, first_page, pages };
        errno(memory.clear_dirty_log(range, |words| {
            assert_eq!(words, mask.len());
            Ok::<_, Error>(mask.to_vec())
        }))
    };
    assert_eq!(clear(3, 64, 36, &[u64::MAX]), Ok(()));
    assert_eq!(clear(3, 0, 64, &[3]), Ok(()));
    assert_eq!(memory.dirty_log(3, false).unwrap(), [!3, 0]);
    assert!(memory.write(99 << 12, b"a"));
    assert_eq!(memory.dirty_log(3, false).unwrap(), [!3, 1 << 35]);
    let cases = [
        (3, 1, 36, libc::EINVAL),
        (3, 0, 63, libc::EINVAL),
        (3, 64, 37, libc::EINVAL),
        (3, 128, 0, libc::EINVAL),
        (SLOTS_MAX, 0, 64, libc::EINVAL),
        (4, 0, 64, libc::ENOENT),
        (4, 1, 64, libc::EINVAL),
    ];
    for (slot, first, pages, expected) in cases {
        assert_eq!(clear(slot, first, pages, &[0]), Err(expected), "{slot} {first} {pages}");
    }
    // A move takes the log along; when logging ends it is gone.
    memory.set(logged(region(3, 0x100_0000, 100 << 12, host))).unwrap();
    assert_eq!(memory.dirty_log(3, true).unwrap(), [!3, 1 << 35]);
    memory.set(region(3, 0x100_0000, 100 << 12, host)).unwrap();
    assert_eq!(errno(memory.dirty_log(3, true)), Err(libc::ENOENT));
}

#[test]
fn each_address_space_has_its_memory_and_log() {
    let (mut a, mut b) = (vec![0u8; 8192], vec![0u8; 8192]);
    let align = |v: &mut Vec<u8>| (v.as_mut_ptr() as u64 + 4095) & !4095;
    let memory = Memory::default();
    memory.set(logged(region(1, 0x3_0000, 4096, align(&mut a)))).unwrap();
    memory.set(logged(region(1 << 16 | 1, 0x3_0000, 4096, align(&mut b)))).unwrap();
    assert!(memory.write(0x3_0000, b"a") && memory.write_in(Space::Smm, 0x3_0001, b"b"));
    let mut bytes = [0; 2];
    assert!(memory.read(0x3_0000, &mut bytes) && &bytes == b"a\0");
    assert!(memory.read_in(Space::Smm, 0x3_0000, &mut bytes) && &bytes == b"\0b");
    assert_eq!((memory.take(1).unwrap(), memory.take(1 << 16 | 1).unwrap()), (vec![1], vec![1]));
    assert!(memory.write_in(Space::Smm, 0x3_0000, b"b"));
    assert_eq!((memory.take(1).unwrap(), memory.take(1 << 16 | 1).unwrap()), (vec![0], vec![1]));
    // The bit that tells them apart is no address.
    assert!(!memory.read(1 << 52 | 0x3_0000, &mut bytes) && !memory.write(1 << 52 | 0x3_0000, b"c"));
    assert!(!memory.read((1 << 52) - 1, &mut bytes));
    assert_eq!(memory.slot_count(), 2);
    memory.set(region(1 << 16 | 1, 0, 0, 0)).unwrap();
    assert!(!memory.read_in(Space::Smm, 0x3_0000, &mut bytes) && memory.read(0x3_0000, &mut bytes));
    assert_eq!(errno(memory.take(1 << 16 | 1)), Err(libc::ENOENT));
    assert_eq!(errno(memory.take(2 << 16)), Err(libc::EINVAL));
}
