//! A disk image written through virtio-blk is intact.

use std::process::Command;

use e2e::{healthy, linux};
use xtask::{guest_dir, images, packages, run};

const SCRIPT: &str = "mount -t ext4 /dev/vda /mnt || echo MOUNT FAILED
mkdir /mnt/d && cd /mnt/d
for i in $(seq 1 60); do dd if=/bin/busybox of=f$i bs=4096 count=$i 2>/dev/null; done
rm f1 f20 f33; mv f2 renamed; ln -s renamed link; sync
echo BEGIN sums; sha256sum f60 renamed; ls | wc -l; echo END sums
cd /; umount /mnt
mount -t ext4 -o ro /dev/vda /mnt
echo BEGIN again; cd /mnt/d; sha256sum f60 renamed; ls | wc -l; echo END again
cd /; umount /mnt
";

#[test]
fn disk_written_through_virtio_blk_is_intact() {
    let image = guest_dir().join("scratch.img");
    std::fs::create_dir_all(guest_dir()).unwrap();
    images::ext4(&image, None, 64).unwrap();
    let outcome = linux("disk", "6.12", SCRIPT, |boot| {
        boot.disks = vec![image.display().to_string()];
        boot.cpus = 2;
    })
    .unwrap();
    healthy(&outcome);
    let written = outcome.section("sums").unwrap();
    assert_eq!(written.lines().count(), 3, "{written}");
    assert_eq!(Some(written), outcome.section("again"));
    let fsck = packages::find("e2fsck").unwrap();
    let report = run(Command::new(fsck).args(["-f", "-n"]).arg(&image)).unwrap();
    assert!(!report.contains("FIXED") && !report.contains("error"), "{report}");
}

#[test]
fn read_only_disk_refuses_writes() {
    let image = guest_dir().join("readonly.img");
    std::fs::create_dir_all(guest_dir()).unwrap();
    images::ext4(&image, None, 16).unwrap();
    let before = std::fs::read(&image).unwrap();
    let script = "echo BEGIN ro; cat /sys/block/vda/ro; dd if=/dev/zero of=/dev/vda count=1 2>&1 | grep -c -i 'operation not permitted'; echo END ro";
    let outcome =
        linux("readonly", "6.12", script, |boot| boot.disks = vec![format!("{},ro", image.display())])
            .unwrap();
    healthy(&outcome);
    assert_eq!(outcome.section("ro").map(|s| s.lines().next()), Some(Some("1")));
    assert!(std::fs::read(&image).unwrap() == before, "the image is unchanged");
}
