//! What QEMU does with a running machine: snapshots, migration, debugging, resets, networking, firmware.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::gdb::Gdb;
use e2e::qemu::{APPEND, Qemu, scratch, text};
use e2e::{Guest, guest};
use xtask::{packages, run};

/// A chain of hashes: any disturbance shows in all that follows.
const CHAIN: &str = "h=start; i=0
while [ $i -lt 150 ]; do i=$((i+1)); h=$(echo $h | sha256sum | cut -c1-64); echo tick $i $h; done
echo chain done
";

/// What [`CHAIN`] prints.
fn expected_chain() -> Vec<String> {
    let printed = run(Command::new("sh").arg("-c").arg(CHAIN)).unwrap();
    ticks(&printed)
}

fn ticks(console: &str) -> Vec<String> {
    let whole = |line: &&str| line.starts_with("tick ") && line.len() > 70;
    console.lines().filter(whole).map(str::to_string).collect()
}

fn direct(guest: &Guest) -> [String; 6] {
    let append = format!("{APPEND} loglevel=3");
    let (kernel, initrd) = (text(&guest.kernel), text(&guest.initrd));
    ["-kernel".into(), kernel, "-initrd".into(), initrd, "-append".into(), append]
}

fn start(name: &str, machine: &str, guest: &Guest, more: &[&str]) -> Qemu {
    start_on(name, machine, "max", guest, more)
}

fn start_on(name: &str, machine: &str, cpu: &str, guest: &Guest, more: &[&str]) -> Qemu {
    let direct = direct(guest);
    let mut arguments: Vec<&str> = direct.iter().map(String::as_str).collect();
    arguments.extend(["-m", "256"]);
    arguments.extend(more);
    Qemu::start(name, machine, cpu, &arguments).unwrap()
}

#[test]
fn a_snapshot_is_saved_and_loaded() {
    packages::require(&[("qemu-img", "qemu-utils")]).unwrap();
    let disk = scratch("snapshot.qcow2");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("64M")).unwrap();
    let guest = guest("qemu-snapshot", "6.12", CHAIN).unwrap();
    let drive = format!("if=none,id=d,format=qcow2,file={}", text(&disk));
    let mut qemu = start("qemu-snapshot", "q35", &guest, &["-drive", &drive, "-no-reboot"]);
    let lines = expected_chain();
    qemu.wait_for(&lines[19], 1).unwrap();
    qemu.human("savevm one").unwrap();
    let later = &lines[ticks(&qemu.console()).len() + 20];
    qemu.wait_for(later, 1).unwrap();
    qemu.human("loadvm one").unwrap();
    qemu.wait_for("chain done", 1).unwrap();
    qemu.wait().unwrap();
    qemu.healthy();
    // What was said until the machine was loaded, and what was to be said from the snapshot on: both can begin and end in the
    // middle of a line.
    let console = qemu.console();
    let said = &console[console.find(&lines[0]).unwrap()..console.rfind("chain done").unwrap()];
    let expected = lines.join("\n") + "\n";
    let before = said.bytes().zip(expected.bytes()).take_while(|(a, b)| a == b).count();
    let after = said.bytes().rev().zip(expected.bytes().rev()).take_while(|(a, b)| a == b).count();
    assert!(before + after >= said.len(), "{before} + {after} of {}:\n{said}", said.len());
    assert_eq!(said.matches(later.as_str()).count(), 2, "{said}");
    let _ = std::fs::remove_file(disk);
}

#[test]
fn a_machine_migrates_through_a_file() {
    let file = scratch("migration");
    let guest = guest("qemu-migration", "6.12", CHAIN).unwrap();
    let mut source = start("qemu-source", "q35", &guest, &["-smp", "2", "-no-reboot"]);
    source.wait_for("tick 30 ", 1).unwrap();
    let uri = format!("exec:cat > {}", text(&file));
    source.command(&format!(r#"{{"execute":"migrate","arguments":{{"uri":"{uri}"}}}}"#)).unwrap();
    source.until(r#"{"execute":"query-migrate"}"#, "\"completed\"").unwrap();
    let before = source.console();
    source.command(r#"{"execute":"quit"}"#).unwrap();
    let incoming = format!("exec:cat {}", text(&file));
    let mut target =
        start("qemu-target", "q35", &guest, &["-smp", "2", "-no-reboot", "-incoming", &incoming]);
    target.wait_for("chain done", 1).unwrap();
    target.wait().unwrap();
    target.healthy();
    // A line may be cut where the machine moved; together they are the chain.
    let both = before + &target.console();
    let (said, expected) = (ticks(&both), expected_chain());
    assert!(said.len() >= expected.len() - 1, "{both}");
    assert!(said.iter().all(|line| expected.contains(line)), "{said:?}");
    assert_eq!(said.last(), expected.last());
    let _ = std::fs::remove_file(file);
}

/// A disk whose boot sector is `code`.
fn boot_sector(name: &str, code: &[u8]) -> PathBuf {
    let mut sector = code.to_vec();
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    let path = scratch(name);
    std::fs::write(&path, sector).unwrap();
    path
}

/// Says `R` and a line feed on the serial port, then halts with interrupts enabled.
const SAY_R: &[u8] = &[
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'R', 0xee, // mov al, 'R'; out dx, al
    0xb0, b'\n', 0xee, // mov al, '\n'; out dx, al
    0xfb, 0xf4, 0xeb, 0xfc, // sti; 1: hlt; jmp 1b
];

#[test]
fn system_reset_20_times() {
    let disk = boot_sector("reset.img", SAY_R);
    let drive = format!("if=virtio,format=raw,file={}", text(&disk));
    let mut qemu = Qemu::start("qemu-reset", "pc", "max", &["-m", "64", "-drive", &drive]).unwrap();
    for boots in 1..=20 {
        qemu.wait_for("R\n", boots).unwrap();
        qemu.command(r#"{"execute":"system_reset"}"#).unwrap();
    }
    qemu.wait_for("R\n", 21).unwrap();
    let _ = std::fs::remove_file(disk);
}

/// Says `S` if SeaBIOS has had SMIs before, and a write to the port for them makes one more; else `F`.
const SAY_SMI: &[u8] = &[
    0x66, 0xb9, 0x34, 0x00, 0x00, 0x00, // mov ecx, MSR_SMI_COUNT
    0x0f, 0x32, 0x66, 0x89, 0xc3, // rdmsr; mov ebx, eax
    0xb0, 0x12, 0xe6, 0xb2, // mov al, 0x12; out 0xb2, al
    0x0f, 0x32, 0x66, 0x29, 0xd8, // rdmsr; sub eax, ebx
    0x66, 0x83, 0xf8, 0x01, 0x75, 0x09, // cmp eax, 1; jne no
    0x66, 0x85, 0xdb, 0x74, 0x04, // test ebx, ebx; jz no
    0xb0, b'S', 0xeb, 0x02, // mov al, 'S'; jmp say
    0xb0, b'F', // no: mov al, 'F'
    0xba, 0xf8, 0x03, 0xee, // say: mov dx, 0x3f8; out dx, al
    0xb0, b'\n', 0xee, // mov al, '\n'; out dx, al
    0xfb, 0xf4, 0xeb, 0xfc, // sti; 1: hlt; jmp 1b
];

#[test]
fn seabios_uses_system_management_mode() {
    let disk = boot_sector("smm.img", SAY_SMI);
    for machine in ["q35,smm=on", "pc,smm=on"] {
        let drive = format!("if=virtio,format=raw,file={}", text(&disk));
        let arguments = ["-m", "64", "-smp", "2", "-drive", &drive];
        let mut qemu = Qemu::start("qemu-smm", machine, "max", &arguments).unwrap();
        for boots in 1..=2 {
            qemu.wait_for("\n", boots).unwrap();
            qemu.command(r#"{"execute":"system_reset"}"#).unwrap();
        }
        qemu.wait_for("\n", 3).unwrap();
        assert!(!qemu.console().contains('F'), "{machine}: {}", qemu.console());
    }
    let _ = std::fs::remove_file(disk);
}

#[test]
fn the_guest_reboots() {
    let guest = guest("qemu-reboot", "6.12", "echo I am up\nreboot -f\n").unwrap();
    let mut qemu = start("qemu-reboot", "q35", &guest, &["-smp", "2"]);
    qemu.wait_for("I am up", 2).unwrap();
    qemu.healthy();
}

#[test]
fn the_debugger_stops_at_a_hardware_breakpoint_and_steps() {
    // nop; inc ax; inc ax; nop; and the rest of SAY_R.
    let code = [&[0x90, 0x40, 0x40, 0x90], SAY_R].concat();
    let disk = boot_sector("gdb.img", &code);
    let socket = std::env::temp_dir().join(format!("ring3-gdb-{}", std::process::id()));
    let drive = format!("if=virtio,format=raw,file={}", text(&disk));
    let chardev = format!("socket,id=gdb,server=on,wait=off,path={}", text(&socket));
    let arguments = ["-m", "64", "-drive", &drive, "-chardev", &chardev, "-gdb", "chardev:gdb", "-S"];
    let mut qemu = Qemu::start("qemu-gdb", "pc", "max", &arguments).unwrap();
    let mut gdb = Gdb::connect(&socket).unwrap();
    gdb.ask("?").unwrap();
    gdb.done("Z1,7c00,1").unwrap();
    assert!(gdb.ask("c").unwrap().starts_with("T05"));
    assert_eq!(gdb.register(16).unwrap(), 0x7c00);
    let rax = gdb.register(0).unwrap();
    gdb.done("z1,7c00,1").unwrap();
    for (rip, added) in [(0x7c01, 0), (0x7c02, 1), (0x7c03, 2), (0x7c04, 2)] {
        assert!(gdb.ask("s").unwrap().starts_with("T05"));
        assert_eq!(gdb.register(16).unwrap(), rip);
        assert_eq!(gdb.register(0).unwrap() as u16, (rax as u16).wrapping_add(added));
    }
    // A software breakpoint: QEMU writes INT3 over the instruction that sets AL.
    gdb.done("Z0,7c07,1").unwrap();
    assert!(gdb.ask("c").unwrap().starts_with("T05"));
    assert_eq!(gdb.register(16).unwrap(), 0x7c07);
    gdb.done("z0,7c07,1").unwrap();
    gdb.done("D").unwrap();
    qemu.wait_for("R\n", 1).unwrap();
    let _ = std::fs::remove_file(disk);
}

/// Serves `file` to whoever asks, over HTTP on the loopback interface, `times` times; gives the port.
fn serve(file: Vec<u8>, times: usize) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().take(times) {
            let Ok(mut stream) = stream else { continue };
            let mut request = [0; 1024];
            let _ = stream.read(&mut request);
            let header = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", file.len());
            let _ = stream.write_all(header.as_bytes()).and_then(|()| stream.write_all(&file));
        }
    });
    port
}

#[test]
fn a_file_comes_through_virtio_net_intact() {
    let file: Vec<u8> = (0u32..1 << 20).flat_map(|i| i.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    let path = scratch("served");
    std::fs::write(&path, &file).unwrap();
    let sum = run(Command::new("sha256sum").arg(&path)).unwrap();
    let port = serve(file, 1);
    let script = format!(
        "ip link set lo up; ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0
echo BEGIN sum; wget -q -O - http://10.0.2.2:{port}/file | sha256sum; echo END sum\n"
    );
    let guest = guest("qemu-net", "6.12", &script).unwrap();
    let network = ["-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n", "-no-reboot"];
    let mut qemu = start("qemu-net", "q35", &guest, &network);
    qemu.wait_for("END sum", 1).unwrap();
    qemu.wait().unwrap();
    qemu.healthy();
    assert!(qemu.console().contains(sum.split(' ').next().unwrap()), "{}", qemu.console());
    let _ = std::fs::remove_file(path);
}

/// A FAT disk with a boot loader (syslinux), the kernel and the initramfs.
fn syslinux_disk(name: &str, guest: &Guest) -> PathBuf {
    packages::require(&[("mkfs.fat", "dosfstools"), ("mcopy", "mtools"), ("syslinux", "syslinux")]).unwrap();
    let disk = scratch(name);
    let _ = std::fs::remove_file(&disk);
    let mkfs = packages::find("mkfs.fat").unwrap();
    run(Command::new(mkfs).arg("-C").arg(&disk).arg("65536")).unwrap();
    let config = scratch("syslinux.cfg");
    let text =
        format!("DEFAULT linux\nPROMPT 0\nLABEL linux\n KERNEL vmlinuz\n APPEND initrd=initrd {APPEND}\n");
    std::fs::write(&config, text).unwrap();
    let copy = |from: &Path, to: &str| {
        run(Command::new("mcopy").arg("-i").arg(&disk).arg(from).arg(format!("::/{to}"))).unwrap();
    };
    copy(&guest.kernel, "vmlinuz");
    copy(&guest.initrd, "initrd");
    copy(&config, "syslinux.cfg");
    run(Command::new("syslinux").arg("--install").arg(&disk)).unwrap();
    let _ = std::fs::remove_file(config);
    disk
}

#[test]
fn seabios_boots_from_a_disk() {
    let guest = guest("qemu-disk", "6.12", "echo I am up\n").unwrap();
    let disk = syslinux_disk("seabios.img", &guest);
    let drive = format!("if=virtio,format=raw,file={}", text(&disk));
    let arguments = ["-m", "256", "-drive", &drive, "-no-reboot"];
    let mut qemu = Qemu::start("qemu-disk", "pc", "Skylake-Client", &arguments).unwrap();
    qemu.wait_for("I am up", 1).unwrap();
    qemu.wait().unwrap();
    qemu.healthy();
    let _ = std::fs::remove_file(disk);
}

/// Boots a kernel from OVMF: `code` is its image, `variables` the template of its variable store.
fn boot_ovmf(name: &str, [machine, cpu]: [&str; 2], code: &str, variables: &str, more: &[&str]) {
    packages::require(&[(code, "ovmf")]).unwrap();
    let store = scratch(&format!("{name}-vars.fd"));
    std::fs::copy(variables, &store).unwrap();
    let guest = guest(name, "6.12", "dmesg | grep -i 'efi: EFI v'\necho I am up\n").unwrap();
    let code = format!("if=pflash,format=raw,readonly=on,file={code}");
    let store_drive = format!("if=pflash,format=raw,file={}", text(&store));
    let mut arguments = vec!["-drive", &code, "-drive", &store_drive, "-no-reboot"];
    arguments.extend(more);
    let mut qemu = start_on(name, machine, cpu, &guest, &arguments);
    qemu.wait_for("I am up", 1).unwrap();
    qemu.wait().unwrap();
    qemu.healthy();
    assert!(qemu.console().contains("efi: EFI v"), "{}", qemu.console());
    let _ = std::fs::remove_file(store);
}

#[test]
fn ovmf_boots_a_kernel() {
    const CODE: &str = "/usr/share/OVMF/OVMF_CODE.fd";
    boot_ovmf("qemu-ovmf", ["q35", "max"], CODE, "/usr/share/OVMF/OVMF_VARS.fd", &[]);
}

/// The variables are behind SMIs there, whose handler runs on all processors, in long mode. This firmware maps all addresses
/// that the processor has before it has much memory, and does not come up, on QEMU's TCG neither, if there are many.
#[test]
fn ovmf_keeps_its_variables_in_system_management_mode() {
    const CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd";
    let secure = ["-smp", "2", "-global", "driver=cfi.pflash01,property=secure,value=on"];
    const CPU: &str = "max,host-phys-bits=off,phys-bits=36,la57=off";
    boot_ovmf("qemu-ovmf-smm", ["q35,smm=on", CPU], CODE, "/usr/share/OVMF/OVMF_VARS_4M.fd", &secure);
}
