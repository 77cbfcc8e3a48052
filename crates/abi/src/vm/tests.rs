//! The calls as a client makes them, with its structures in memory.
#![expect(unsafe_code, reason = "takes over descriptors that calls return")]

use std::os::fd::IntoRawFd;

use std::sync::Arc;

use hypervisor::{HostParams, System};
use kvm_bindings::*;

use crate::ioctl::{IOCTLS, ioctl};
use crate::{Argument, Errno, Object, Reply};

struct Client {
    system: Object,
    vm: Object,
}

impl Client {
    fn new() -> Client {
        let system = System::new(silicon::model::CpuModel::default(), HostParams::default());
        let vm = Object::Vm(system.create_vm().unwrap());
        Client { system: Object::System(system), vm }
    }

    fn call(object: &Object, name: &str, argument: u64) -> Result<i32, Errno> {
        let row = IOCTLS.iter().find(|row| row.name == name && row.handler.takes(object)).unwrap();
        match ioctl(object, row.number(), Argument(argument))? {
            Reply::Value(value) => Ok(value),
            Reply::AlignmentError | Reply::Created(_) => Ok(0),
            Reply::File(fd) => Ok(fd.into_raw_fd()),
        }
    }

    fn vm<T>(&self, name: &str, argument: &mut T) -> Result<i32, Errno> {
        Client::call(&self.vm, name, std::ptr::from_mut(argument) as u64)
    }

    fn value(&self, name: &str, argument: u64) -> Result<i32, Errno> {
        Client::call(&self.vm, name, argument)
    }

    fn sys<T: ?Sized>(&self, name: &str, argument: &mut T) -> Result<i32, Errno> {
        Client::call(&self.system, name, std::ptr::from_mut(argument).cast::<u8>() as u64)
    }

    fn enable(&self, cap: u32, argument: u64) -> Result<i32, Errno> {
        self.vm(
            "KVM_ENABLE_CAP",
            &mut kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() },
        )
    }
}

#[test]
fn lists_of_msrs_tell_how_much_room_they_need() {
    let client = Client::new();
    for name in ["KVM_GET_MSR_INDEX_LIST", "KVM_GET_MSR_FEATURE_INDEX_LIST"] {
        let mut list = [0u32; 512];
        assert_eq!(client.sys(name, &mut list), Err(Errno::TOO_BIG));
        let count = list[0] as usize;
        assert!(count > 0 && list[1] == 0, "{name}");
        assert_eq!(client.sys(name, &mut list), Ok(0));
        assert!(
            list[0] as usize == count
                && list[1..=count].iter().all(|&index| index != 0)
                && list[count + 1] == 0
        );
        let mut one = [count as u32 - 1, 0];
        assert_eq!(client.sys(name, &mut one), Err(Errno::TOO_BIG));
        assert_eq!(one, [count as u32, 0]);
    }
}

#[test]
fn every_feature_msr_can_be_read() {
    let client = Client::new();
    let mut list = [64u32; 65];
    client.sys("KVM_GET_MSR_FEATURE_INDEX_LIST", &mut list).unwrap();
    for &index in &list[1..=list[0] as usize] {
        let mut msrs = [1u32, 0, index, 0, 7, 7];
        assert_eq!(client.sys("KVM_GET_MSRS", &mut msrs), Ok(1), "{index:#x}");
        assert_ne!(msrs[4..], [7, 7], "{index:#x}");
    }
    assert_eq!(client.sys("KVM_GET_MSRS", &mut [1u32, 0, 0x10, 0, 0, 0]), Ok(0));
}

#[test]
fn the_system_has_attributes() {
    let client = Client::new();
    let mut value = 0u64;
    let mut attr = kvm_device_attr { addr: (&raw mut value) as u64, ..Default::default() };
    assert_eq!(client.sys("KVM_HAS_DEVICE_ATTR", &mut attr), Ok(0));
    assert_eq!(client.sys("KVM_GET_DEVICE_ATTR", &mut attr), Ok(0));
    assert_eq!(value & 3, 3);
    attr.addr = 8;
    assert_eq!(client.sys("KVM_GET_DEVICE_ATTR", &mut attr), Err(Errno::FAULT));
    attr.attr = 1;
    assert_eq!(client.sys("KVM_HAS_DEVICE_ATTR", &mut attr), Err(Errno::NXIO));
    let mut mce = 0u64;
    client.sys("KVM_X86_GET_MCE_CAP_SUPPORTED", &mut mce).unwrap();
    assert_ne!(mce, 0);
}

#[test]
fn addresses_of_helper_pages() {
    let client = Client::new();
    assert_eq!(client.value("KVM_SET_TSS_ADDR", 0xfffb_d000), Ok(0));
    assert_eq!(client.value("KVM_SET_TSS_ADDR", 0xffff_d001), Err(Errno::INVALID));
    assert_eq!(client.value("KVM_SET_TSS_ADDR", 1 << 32), Err(Errno::INVALID));
    assert_eq!(client.vm("KVM_SET_IDENTITY_MAP_ADDR", &mut 0xfffb_c000u64), Ok(0));
    assert_eq!(client.value("KVM_SET_NR_MMU_PAGES", 63), Err(Errno::INVALID));
    assert_eq!(client.value("KVM_SET_NR_MMU_PAGES", 64), Ok(0));
    client.value("KVM_CREATE_VCPU", 0).unwrap();
    assert_eq!(client.vm("KVM_SET_IDENTITY_MAP_ADDR", &mut 0u64), Err(Errno::INVALID));
}

#[test]
fn irqchip_and_pit_states_go_in_and_out() {
    let client = Client::new();
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    assert_eq!(client.vm("KVM_GET_IRQCHIP", &mut chip), Err(Errno::NXIO));
    assert_eq!(client.vm("KVM_GET_PIT2", &mut kvm_pit_state2::default()), Err(Errno::NXIO));
    assert_eq!(client.vm("KVM_CREATE_PIT2", &mut kvm_pit_config::default()), Err(Errno::NOENT));
    client.value("KVM_CREATE_IRQCHIP", 0).unwrap();
    assert_eq!(client.value("KVM_CREATE_IRQCHIP", 0), Err(Errno::EXISTS));
    client.vm("KVM_CREATE_PIT2", &mut kvm_pit_config::default()).unwrap();
    assert_eq!(client.value("KVM_CREATE_PIT", 0), Err(Errno::EXISTS));
    for id in 0..3 {
        chip.chip_id = id;
        assert_eq!(client.vm("KVM_GET_IRQCHIP", &mut chip), Ok(0));
        assert_eq!(client.vm("KVM_SET_IRQCHIP", &mut chip), Ok(0));
    }
    chip.chip_id = 3;
    assert_eq!(client.vm("KVM_GET_IRQCHIP", &mut chip), Err(Errno::INVALID));
    assert_eq!(client.vm("KVM_SET_IRQCHIP", &mut chip), Err(Errno::INVALID));
    let mut pit = kvm_pit_state2::default();
    client.vm("KVM_GET_PIT2", &mut pit).unwrap();
    pit.channels[2].count = 1234;
    client.vm("KVM_SET_PIT2", &mut pit).unwrap();
    let mut channels = kvm_pit_state::default();
    client.vm("KVM_GET_PIT", &mut channels).unwrap();
    assert_eq!(channels.channels[2].count, 1234);
    client.vm("KVM_REINJECT_CONTROL", &mut kvm_reinject_control::default()).unwrap();
}

#[test]
fn line_status_is_written_back() {
    let client = Client::new();
    assert_eq!(client.vm("KVM_IRQ_LINE_STATUS", &mut [3u32, 1]), Err(Errno::NXIO));
    client.value("KVM_CREATE_IRQCHIP", 0).unwrap();
    let mut line = [5i32, 1];
    client.vm("KVM_IRQ_LINE_STATUS", &mut line).unwrap();
    assert_eq!(line[1], 1);
    assert_ne!(line[0], 5);
    line = [4000, 1];
    client.vm("KVM_IRQ_LINE_STATUS", &mut line).unwrap();
    assert_eq!(line[0], -1, "a GSI that goes nowhere");
}

#[test]
fn bootstrap_processor_and_ids_are_set_before_vcpus() {
    let client = Client::new();
    assert_eq!(client.value("KVM_SET_BOOT_CPU_ID", 4097), Err(Errno::INVALID));
    assert_eq!(client.value("KVM_SET_BOOT_CPU_ID", 3), Ok(0));
    assert_eq!(client.enable(KVM_CAP_MAX_VCPU_ID, 4097), Err(Errno::INVALID));
    assert_eq!(client.enable(KVM_CAP_MAX_VCPU_ID, 2), Err(Errno::INVALID), "the BSP is above it");
    assert_eq!(client.enable(KVM_CAP_MAX_VCPU_ID, 5), Ok(0));
    assert_eq!(client.enable(KVM_CAP_MAX_VCPU_ID, 5), Ok(0));
    assert_eq!(client.enable(KVM_CAP_MAX_VCPU_ID, 6), Err(Errno::INVALID));
    assert_eq!(client.value("KVM_SET_BOOT_CPU_ID", 6), Err(Errno::INVALID));
    assert_eq!(client.value("KVM_CREATE_VCPU", 5), Err(Errno::INVALID));
    assert_eq!(client.value("KVM_CREATE_VCPU", 1 << 32), Err(Errno::INVALID));
    client.value("KVM_CREATE_VCPU", 4).unwrap();
    assert_eq!(client.value("KVM_CREATE_VCPU", 4), Err(Errno::EXISTS));
    assert_eq!(client.value("KVM_SET_BOOT_CPU_ID", 0), Err(Errno(libc::EBUSY)));
}

#[test]
fn the_clock_is_set_and_goes_on() {
    let client = Client::new();
    let mut clock = kvm_clock_data::default();
    client.vm("KVM_GET_CLOCK", &mut clock).unwrap();
    assert_eq!(clock.flags, KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC);
    assert!(clock.realtime != 0 && clock.host_tsc != 0);
    let hour = 3_600_000_000_000;
    // What was read may be given back; the time since then counts.
    client
        .vm(
            "KVM_SET_CLOCK",
            &mut kvm_clock_data { clock: 5 * hour, realtime: clock.realtime - hour, ..clock },
        )
        .unwrap();
    let mut later = kvm_clock_data::default();
    client.vm("KVM_GET_CLOCK", &mut later).unwrap();
    assert!(later.clock >= 6 * hour, "{}", later.clock);
    client.vm("KVM_SET_CLOCK", &mut kvm_clock_data { clock: 5 * hour, ..Default::default() }).unwrap();
    client.vm("KVM_GET_CLOCK", &mut later).unwrap();
    assert!(later.clock >= 5 * hour && later.clock < 6 * hour);
    assert_eq!(client.vm("KVM_SET_CLOCK", &mut kvm_clock_data { flags: 1, ..clock }), Err(Errno::INVALID));
}

#[test]
fn the_tsc_frequency_of_later_vcpus() {
    let client = Client::new();
    let host = client.value("KVM_GET_TSC_KHZ", 0).unwrap();
    assert!(host > 0);
    client.value("KVM_SET_TSC_KHZ", 1_000_000).unwrap();
    assert_eq!(client.value("KVM_GET_TSC_KHZ", 0), Ok(1_000_000));
    client.value("KVM_SET_TSC_KHZ", 0).unwrap();
    assert_eq!(client.value("KVM_GET_TSC_KHZ", 0), Ok(host));
    assert_eq!(client.value("KVM_SET_TSC_KHZ", 1 << 31), Err(Errno::INVALID));
}

#[test]
fn msr_filters_bring_bitmaps() {
    let client = Client::new();
    let mut bitmap = [0u64; 2];
    let mut filter = kvm_msr_filter { flags: KVM_MSR_FILTER_DEFAULT_ALLOW, ..Default::default() };
    filter.ranges[15] = kvm_msr_filter_range {
        flags: KVM_MSR_FILTER_READ,
        nmsrs: 65,
        base: 0x35,
        bitmap: bitmap.as_mut_ptr().cast(),
    };
    assert_eq!(client.vm("KVM_X86_SET_MSR_FILTER", &mut filter), Ok(0));
    let Object::Vm(vm) = &client.vm else { unreachable!() };
    use hypervisor::msr::filter::MsrAccess;
    assert!(
        !vm.msr_filters().allows(0x35, MsrAccess::Read) && vm.msr_filters().allows(0x35, MsrAccess::Write)
    );
    filter.ranges[15].bitmap = std::ptr::without_provenance_mut(8);
    assert_eq!(client.vm("KVM_X86_SET_MSR_FILTER", &mut filter), Err(Errno::FAULT));
    filter.ranges[15].nmsrs = 0x3001;
    assert_eq!(client.vm("KVM_X86_SET_MSR_FILTER", &mut filter), Err(Errno::INVALID));
    let mut nothing = kvm_msr_filter { flags: KVM_MSR_FILTER_DEFAULT_DENY, ..Default::default() };
    assert_eq!(client.vm("KVM_X86_SET_MSR_FILTER", &mut nothing), Err(Errno::INVALID));
}

#[test]
fn dirty_logs_are_copied_out_and_masks_in() {
    let client = Client::new();
    let mut memory = vec![0u8; 71 << 12];
    let host = (memory.as_mut_ptr() as u64 + 4095) & !4095;
    client.enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 3).unwrap();
    let mut region = kvm_userspace_memory_region2 {
        slot: 2,
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        memory_size: 70 << 12,
        userspace_addr: host,
        ..Default::default()
    };
    client.vm("KVM_SET_USER_MEMORY_REGION2", &mut region).unwrap();
    let mut bitmap = [0u64; 3];
    let mut get = kvm_dirty_log { slot: 2, ..Default::default() };
    get.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    client.vm("KVM_GET_DIRTY_LOG", &mut get).unwrap();
    assert_eq!(bitmap, [u64::MAX, 0x3f, 0]);
    let mut mask = [1u64, 2];
    let mut clear = kvm_clear_dirty_log { slot: 2, num_pages: 70, ..Default::default() };
    clear.__bindgen_anon_1.dirty_bitmap = mask.as_mut_ptr().cast();
    client.vm("KVM_CLEAR_DIRTY_LOG", &mut clear).unwrap();
    client.vm("KVM_GET_DIRTY_LOG", &mut get).unwrap();
    assert_eq!(bitmap, [!1, 0x3d, 0]);
    clear.__bindgen_anon_1.dirty_bitmap = std::ptr::without_provenance_mut(8);
    assert_eq!(client.vm("KVM_CLEAR_DIRTY_LOG", &mut clear), Err(Errno::FAULT));
    get.slot = 3;
    assert_eq!(client.vm("KVM_GET_DIRTY_LOG", &mut get), Err(Errno::NOENT));
}

#[test]
fn coalesced_zones_are_of_memory_or_ports() {
    let client = Client::new();
    let mut zone = [0xcf8u32, 0, 4, 1];
    assert_eq!(client.vm("KVM_REGISTER_COALESCED_MMIO", &mut zone), Ok(0));
    zone[3] = 2;
    assert_eq!(client.vm("KVM_REGISTER_COALESCED_MMIO", &mut zone), Err(Errno::INVALID));
    assert_eq!(client.vm("KVM_UNREGISTER_COALESCED_MMIO", &mut zone), Err(Errno::INVALID));
    zone[3] = 1;
    assert_eq!(client.vm("KVM_UNREGISTER_COALESCED_MMIO", &mut zone), Ok(0));
    client.value("KVM_CREATE_VCPU", 0).unwrap();
    client.value("KVM_CREATE_VCPU", 1).unwrap();
    let Object::Vm(vm) = &client.vm else { unreachable!() };
    assert!(Arc::strong_count(vm) >= 1);
}

#[test]
fn there_are_no_devices() {
    let client = Client::new();
    for type_ in [0, 4, u32::MAX] {
        let mut device = kvm_create_device { type_, flags: KVM_CREATE_DEVICE_TEST, ..Default::default() };
        assert_eq!(client.vm("KVM_CREATE_DEVICE", &mut device), Err(Errno(libc::ENODEV)));
    }
}

#[test]
fn statistics_outlive_the_vm() {
    use std::io::Read;
    use std::os::fd::FromRawFd;
    let client = Client::new();
    client.value("KVM_CREATE_VCPU", 0).unwrap();
    let fd = client.value("KVM_GET_STATS_FD", 0).unwrap();
    drop(client);
    // SAFETY: the call has just made it for us.
    let mut file = unsafe { std::fs::File::from_raw_fd(fd) };
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    let field = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let (count, data) = (field(8), field(20));
    let vcpus = (0..count).find(|n| bytes[72 + 64 * n + 16..].starts_with(b"vcpus\0")).unwrap();
    assert_eq!(bytes[data + field(72 + 64 * vcpus + 8)], 1);
}
