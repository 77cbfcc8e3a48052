//! Tests of irqfds and ioeventfds with real descriptors. What the worker does is waited for by its effects.

use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::irqchip::lapic::Waker;
use crate::irqchip::{IrqChipKind, lapic::Lapic};
use crate::timer::{Timers, VirtualTime};

struct Kick(Mutex<Sender<()>>);

impl Waker for Kick {
    fn kick(&self) {
        // The receiver may be gone at the end of a test.
        let _ = self.0.lock().expect("no panic").send(());
    }
}

struct Bench {
    chip: Arc<IrqChip>,
    lapic: Arc<Lapic>,
    kicks: Receiver<()>,
    irqfds: IrqFds,
}

impl Bench {
    fn new(kind: IrqChipKind) -> Self {
        let timers = Arc::new(Timers::manual(Arc::new(VirtualTime::default())));
        let chip = IrqChip::new(kind, Arc::default(), timers);
        let lapic = chip.create_lapic(0, true).expect("the first");
        let (sender, kicks) = mpsc::channel();
        lapic.set_waker(Arc::new(Kick(Mutex::new(sender))));
        lapic.mmio_write(0xf0, &0x1ffu32.to_le_bytes());
        let irqfds = IrqFds::new(&chip).expect("a worker");
        Self { chip, lapic, kicks, irqfds }
    }

    /// Pin 20 as vector 0x45, level-triggered or not.
    fn with_pin_20(level: bool) -> Self {
        let bench = Self::new(IrqChipKind::Full);
        for (index, value) in [(0x39u32, 0u32), (0x38, 0x45 | u32::from(level) << 15)] {
            assert!(bench.chip.mmio_write(&bench.lapic, 0xfec0_0000, &index.to_le_bytes()));
            assert!(bench.chip.mmio_write(&bench.lapic, 0xfec0_0010, &value.to_le_bytes()));
        }
        bench
    }

    /// Waits for an interrupt and takes it.
    fn take(&self) -> u8 {
        loop {
            if let Some(vector) = self.lapic.acknowledge() {
                return vector;
            }
            self.kicks.recv_timeout(Duration::from_secs(60)).expect("an interrupt");
        }
    }
}

fn eventfd() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd")
}

/// Waits until the worker has taken what was signalled.
fn wait_until_taken(event: &EventFd) {
    let info = format!("/proc/self/fdinfo/{}", event.as_raw_fd());
    let taken = || {
        let info = fs::read_to_string(&info).expect("an open descriptor");
        info.lines().any(|line| line.starts_with("eventfd-count:") && line.ends_with(" 0"))
    };
    while !taken() {
        thread::yield_now();
    }
}

#[test]
fn signals_become_interrupts() {
    let bench = Bench::with_pin_20(false);
    let event = eventfd();
    event.write(1).expect("room");
    bench.irqfds.assign(event.as_raw_fd(), 20, None).expect("free");
    assert_eq!(bench.take(), 0x45, "what was signalled before counts");
    for _ in 0..3 {
        bench.lapic.end_of_interrupt();
        event.write(7).expect("room");
        assert_eq!(bench.take(), 0x45);
    }
    bench.lapic.end_of_interrupt();
    let twin = event.try_clone().expect("a duplicate");
    assert!(matches!(bench.irqfds.assign(twin.as_raw_fd(), 21, None), Err(EventFdError::Busy)));
    bench.irqfds.deassign(twin.as_raw_fd(), 21).expect("nothing to undo is no error");
    bench.irqfds.deassign(twin.as_raw_fd(), 20).expect("a duplicate names it too");
    event.write(1).expect("room");
    bench.irqfds.assign(event.as_raw_fd(), 20, None).expect("free again");
    assert_eq!(bench.take(), 0x45);
}

#[test]
fn a_resampled_line_stays_high_until_the_eoi() {
    let bench = Bench::with_pin_20(true);
    let (first, second) = ((eventfd(), eventfd()), (eventfd(), eventfd()));
    for (event, resample) in [&first, &second] {
        bench.irqfds.assign(event.as_raw_fd(), 20, Some(resample.as_raw_fd())).expect("free");
    }
    first.0.write(1).expect("room");
    assert_eq!(bench.take(), 0x45);
    assert!(first.1.read().is_err() && second.1.read().is_err(), "not yet");
    bench.lapic.end_of_interrupt();
    assert_eq!((first.1.read().ok(), second.1.read().ok()), (Some(1), Some(1)), "all of the line are told");
    assert!(!bench.lapic.has_interrupt(), "the line is low");
    // One goes; the other one still works, and leaves a low line behind when it goes too.
    bench.irqfds.deassign(first.0.as_raw_fd(), 20).expect("assigned");
    second.0.write(1).expect("room");
    assert_eq!(bench.take(), 0x45);
    bench.lapic.end_of_interrupt();
    assert_eq!((first.1.read().ok(), second.1.read().ok()), (None, Some(1)));
    second.0.write(1).expect("room");
    assert_eq!(bench.take(), 0x45);
    bench.irqfds.deassign(second.0.as_raw_fd(), 20).expect("assigned");
    bench.lapic.end_of_interrupt();
    assert!(!bench.lapic.has_interrupt());
}

#[test]
fn msi_routes_and_blocking_descriptors() {
    let bench = Bench::new(IrqChipKind::Split { reserved_pins: 24 });
    let mut route = kvm_bindings::kvm_irq_routing_entry {
        gsi: 40,
        type_: kvm_bindings::KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    route.u.msi =
        kvm_bindings::kvm_irq_routing_msi { address_lo: 0xfee0_0000, data: 0x51, ..Default::default() };
    bench.chip.set_gsi_routing(&[route]).expect("a valid route");
    let event = EventFd::new(0).expect("an eventfd");
    let request = kvm_irqfd { fd: event.as_raw_fd() as u32, gsi: 40, ..Default::default() };
    bench.irqfds.request(&request).expect("free");
    event.write(1).expect("room");
    assert_eq!(bench.take(), 0x51);
    wait_until_taken(&event);
    let resampled = kvm_irqfd { flags: KVM_IRQFD_FLAG_RESAMPLE, ..request };
    assert!(
        matches!(bench.irqfds.request(&resampled), Err(EventFdError::Invalid)),
        "no pins in a split irqchip"
    );
    bench.irqfds.request(&kvm_irqfd { flags: KVM_IRQFD_FLAG_DEASSIGN, ..request }).expect("assigned");
}

#[test]
fn bad_irqfds() {
    let bench = Bench::with_pin_20(false);
    let file = File::open("/proc/self/stat").expect("a file");
    let event = eventfd();
    let cases = [
        (-1, 0, libc::EBADF),
        (0x7fff_0000, 0, libc::EBADF),
        (file.as_raw_fd(), 0, libc::EINVAL),
        (event.as_raw_fd(), 4, libc::EINVAL),
        (event.as_raw_fd(), KVM_IRQFD_FLAG_RESAMPLE, libc::EBADF),
        (-1, KVM_IRQFD_FLAG_DEASSIGN, libc::EBADF),
    ];
    for (descriptor, flags, errno) in cases {
        let request =
            kvm_irqfd { fd: descriptor as u32, gsi: 20, flags, resamplefd: u32::MAX, ..Default::default() };
        let error = bench.irqfds.request(&request).expect_err("a bad request");
        assert_eq!(error.errno(), errno, "{descriptor} {flags}");
    }
}

#[test]
fn guest_writes_become_signals() {
    const ANY: Option<u64> = None;
    // Length and value of the ioeventfd, data of the write, whether it is signalled.
    let cases: &[(u32, Option<u64>, &[u8], bool)] = &[
        (0, ANY, &[1], true),
        (0, ANY, &[1, 2, 3, 4, 5, 6, 7, 8], true),
        (2, ANY, &[1, 2], true),
        (2, ANY, &[1], false),
        (2, Some(0x0201), &[1, 2], true),
        (2, Some(0x0201), &[1, 3], false),
        (1, Some(0x1_0001), &[1], false),
        (4, Some(0xffff_ffff), &[0xff; 4], true),
        (8, Some(u64::MAX), &[0xff; 8], true),
    ];
    for &(length, value, data, signalled) in cases {
        for space in [IoSpace::Pio, IoSpace::Mmio] {
            let (table, event) = (IoEventFds::default(), eventfd());
            table.assign(space, 0x1000, length, value, event.as_raw_fd()).expect("sensible");
            assert_eq!(table.signal(space, 0x1000, data), signalled, "{length} {value:?} {data:?}");
            assert_eq!(event.read().ok(), signalled.then_some(1));
            assert!(!table.signal(space, 0x1001, data));
            assert!(!table.signal(
                if space == IoSpace::Pio { IoSpace::Mmio } else { IoSpace::Pio },
                0x1000,
                data
            ));
        }
    }
}

#[test]
fn ioeventfd_requests() {
    let (table, event, other) = (IoEventFds::default(), eventfd(), eventfd());
    let request = kvm_ioeventfd {
        addr: 0x1000,
        len: 2,
        datamatch: 7,
        fd: event.as_raw_fd(),
        flags: FLAG_PIO | FLAG_DATAMATCH,
        ..Default::default()
    };
    let errno = |request: kvm_ioeventfd| table.request(&request).err().map(|error| error.errno());
    assert_eq!(errno(request), None);
    let cases = [
        ("the same again", request, libc::EEXIST),
        ("any value", kvm_ioeventfd { flags: FLAG_PIO, ..request }, libc::EEXIST),
        ("any length", kvm_ioeventfd { flags: FLAG_PIO, len: 0, ..request }, libc::EEXIST),
        ("length 3", kvm_ioeventfd { len: 3, ..request }, libc::EINVAL),
        ("no length with a value", kvm_ioeventfd { len: 0, ..request }, libc::EINVAL),
        ("overflow", kvm_ioeventfd { addr: u64::MAX, ..request }, libc::EINVAL),
        ("unknown flag", kvm_ioeventfd { flags: 1 << 5, ..request }, libc::EINVAL),
        ("virtio-ccw", kvm_ioeventfd { flags: FLAG_VIRTIO_CCW, ..request }, libc::EINVAL),
        ("no descriptor", kvm_ioeventfd { fd: -1, datamatch: 8, ..request }, libc::EBADF),
    ];
    for (name, request, expected) in cases {
        assert_eq!(errno(request), Some(expected), "{name}");
    }
    assert_eq!(errno(kvm_ioeventfd { datamatch: 8, ..request }), None);
    assert_eq!(errno(kvm_ioeventfd { flags: FLAG_DATAMATCH, ..request }), None, "another space");
    let off = kvm_ioeventfd { flags: request.flags | FLAG_DEASSIGN, ..request };
    assert_eq!(errno(kvm_ioeventfd { fd: other.as_raw_fd(), ..off }), Some(libc::ENOENT));
    assert_eq!(errno(kvm_ioeventfd { datamatch: 9, ..off }), Some(libc::ENOENT));
    assert!(table.signal(IoSpace::Pio, 0x1000, &[7, 0]));
    assert_eq!(errno(off), None);
    assert_eq!(errno(off), Some(libc::ENOENT));
    assert!(!table.signal(IoSpace::Pio, 0x1000, &[7, 0]) && table.signal(IoSpace::Pio, 0x1000, &[8, 0]));
}

/// The worker used to be stopped through an eventfd, whose signal was lost when a client named it as an irqfd.
#[test]
fn the_worker_ends_though_a_client_watches_every_eventfd() {
    // In a process of its own: the eventfds of tests that run beside it would lose their signals, too.
    const ALONE: &str = "RING3_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let this = "eventfd::tests::the_worker_ends_though_a_client_watches_every_eventfd";
        let mut alone = std::process::Command::new(std::env::current_exe().expect("a test binary"));
        let output = alone.args([this, "--exact"]).env(ALONE, "1").output().expect("a process");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        return;
    }
    // Those that this process was born with are the other tests'.
    let entries = fs::read_dir("/proc/self/fd").expect("a directory").flatten();
    let inherited: Vec<RawFd> =
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    let greedy = Bench::new(IrqChipKind::Full);
    let others: Vec<Bench> = (0..4).map(|_| Bench::new(IrqChipKind::Full)).collect();
    for descriptor in (0..256).filter(|descriptor| !inherited.contains(descriptor)) {
        // Those that are no eventfds, or none at all, are refused.
        let _ = greedy.irqfds.assign(descriptor, 5, None);
    }
    drop(others);
}
