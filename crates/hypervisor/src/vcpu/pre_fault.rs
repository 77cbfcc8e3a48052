//! KVM_PRE_FAULT_MEMORY (kernel: `kvm_vcpu_pre_fault_memory` in virt/kvm/kvm_main.c).

use kvm_bindings::kvm_pre_fault_memory;

use super::Vcpu;
use crate::error::Error;

/// Bytes that are populated between two looks at whether the call is to return.
const STEP: u64 = 2 << 20;

impl Vcpu {
    /// KVM_PRE_FAULT_MEMORY: has the host populate the memory behind guest-physical addresses, as a read of each page
    /// would. `range` is moved on past what has been done.
    ///
    /// # Errors
    ///
    /// EINVAL for flags, and for a range that is empty, wraps or is not of whole pages. If nothing at all was done:
    /// ENOENT for an address that no slot has, EINTR if the vCPU has been interrupted, EFAULT where the client has no
    /// memory.
    pub fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> Result<(), Error> {
        let whole_pages = (range.gpa | range.size).is_multiple_of(4096);
        if range.flags != 0 || !whole_pages || range.gpa.wrapping_add(range.size) <= range.gpa {
            return Err(Error::Invalid("the range to populate"));
        }
        let before = range.size;
        while range.size != 0 {
            let step = STEP - range.gpa % STEP;
            let done = match self.handle.interrupted() {
                true => Err(Error::Interrupted),
                false => self.vm.memory().populate(self.space(), range.gpa, range.size.min(step)),
            };
            match done {
                Ok(done) => {
                    range.gpa += done;
                    range.size -= done;
                }
                Err(_) if range.size != before => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::testing::vm;
    use kvm_bindings::kvm_userspace_memory_region;

    #[test]
    fn ranges_are_populated_as_far_as_slots_go() {
        let vm = vm();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let memory = vec![0u8; 5 * 4096];
        let region = kvm_userspace_memory_region {
            guest_phys_addr: 0x10_0000,
            memory_size: 4 * 4096,
            userspace_addr: memory.as_ptr().addr().next_multiple_of(4096) as u64,
            ..Default::default()
        };
        vm.set_user_memory_region(region).unwrap();
        let mut call = |gpa, size, flags| {
            let mut range = kvm_pre_fault_memory { gpa, size, flags, ..Default::default() };
            let result = vcpu.pre_fault_memory(&mut range).map_err(|e| e.errno());
            (result, range.gpa, range.size)
        };
        let end = 0x10_4000;
        assert_eq!(call(0x10_0000, 0x4000, 0), (Ok(()), end, 0));
        assert_eq!(call(0x10_3000, 0x2000, 0), (Ok(()), end, 0x1000));
        assert_eq!(call(end, 0x1000, 0), (Err(libc::ENOENT), end, 0x1000));
        for (gpa, size, flags) in [
            (0, 0, 0),
            (1, 0x1000, 0),
            (0, 1, 0),
            (0x10_0000, 0x1000, 1),
            (0, u64::MAX - 4095, 8),
            (u64::MAX - 4095, 0x2000, 0),
        ] {
            assert_eq!(call(gpa, size, flags), (Err(libc::EINVAL), gpa, size), "{gpa:#x}");
        }
    }
}
