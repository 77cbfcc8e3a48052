//! Guest images: initramfs archives and ext4 disks.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cpio::Archive;
use crate::packages::{self, Kernel};
use crate::{Error, at, run};

/// Modules that the machine's devices need, in loading order; what a kernel has built in is passed over.
const MODULES: &[&str] = &[
    "virtio",
    "virtio_ring",
    "virtio_mmio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio-rng",
    "virtio_console",
    "failover",
    "net_failover",
    "virtio_net",
];

/// The first program of every initramfs: mounts, modules, then /script.
const INIT: &str = "#!/bin/sh
export PATH=/bin HOME=/ TERM=vt100
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /tmp /mnt
mount -t devpts pts /dev/pts
for m in /modules/*.ko; do [ -e \"$m\" ] && insmod \"$m\"; done
. /script
sync
poweroff -f
";

/// What an initramfs holds besides busybox and the modules.
#[derive(Debug, Default)]
pub struct Initramfs<'a> {
    /// Shell text that runs after the mounts; the guest powers off when it ends.
    pub script: &'a str,
    /// More files: name in the archive, permission bits, contents.
    pub files: Vec<(String, u32, Vec<u8>)>,
}

impl Initramfs<'_> {
    /// Builds the archive for `kernel` and writes it to `path`.
    pub fn build(&self, kernel: &Kernel, path: &Path) -> Result<(), Error> {
        let mut archive = Archive::new();
        for dir in ["bin", "dev", "proc", "sys", "modules", "driver", "root", "etc"] {
            archive.directory(dir);
        }
        archive.device("dev/console", 5, 1).device("dev/null", 1, 3).device("dev/ttyS0", 4, 64);
        archive.host_file("bin/busybox", 0o755, &packages::busybox()?)?.symlink("bin/sh", "busybox");
        for (order, name) in MODULES.iter().enumerate() {
            if let Some(data) = module(kernel, name)? {
                archive.file(&format!("modules/{order:02}-{name}.ko"), 0o644, &data);
            }
        }
        archive.file("init", 0o755, INIT.as_bytes()).file("script", 0o644, self.script.as_bytes());
        for (name, mode, data) in &self.files {
            archive.file(name, *mode, data);
        }
        if let Some(parent) = path.parent() {
            at(parent, std::fs::create_dir_all(parent))?;
        }
        at(path, std::fs::write(path, archive.finish()))
    }
}

/// The module's object code, decompressed; `None` if the kernel does not have it as a module.
fn module(kernel: &Kernel, name: &str) -> Result<Option<Vec<u8>>, Error> {
    let wanted = [format!("{name}.ko"), format!("{name}.ko.xz")];
    let Some(path) = find_file(&kernel.modules, &wanted) else { return Ok(None) };
    if path.extension().is_some_and(|e| e == "xz") {
        packages::require(&[("xz", "xz-utils")])?;
        let output = Command::new("xz").arg("-dc").arg(&path).output();
        return Ok(Some(at(&path, output)?.stdout));
    }
    Ok(Some(at(&path, std::fs::read(&path))?))
}

fn find_file(dir: &Path, names: &[String]) -> Option<PathBuf> {
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).ok()?.flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                dirs.push(path);
            } else if names.iter().any(|n| entry.file_name().to_string_lossy() == *n) {
                return Some(path);
            }
        }
    }
    None
}

/// Makes an ext4 image of `megabytes` with the contents of `tree` (or empty).
pub fn ext4(image: &Path, tree: Option<&Path>, megabytes: u32) -> Result<(), Error> {
    packages::require(&[("mke2fs", "e2fsprogs")])?;
    let mke2fs = packages::find("mke2fs").unwrap_or_else(|| "mke2fs".into());
    let _ = std::fs::remove_file(image);
    let mut command = Command::new(mke2fs);
    command.args(["-q", "-t", "ext4", "-F", "-E", "root_owner=0:0"]);
    if let Some(tree) = tree {
        command.arg("-d").arg(tree);
    }
    run(command.arg(image).arg(format!("{megabytes}M"))).map(|_| ())
}

/// The shared libraries that a program needs, the dynamic linker among them.
pub fn libraries(program: &Path) -> Vec<PathBuf> {
    // ldd fails for static programs.
    let listed = run(Command::new("ldd").arg(program)).unwrap_or_default();
    listed.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// Copies programs, with the shared libraries that they need, into `tree` at the same paths.
pub fn copy_programs(tree: &Path, programs: &[&str]) -> Result<(), Error> {
    let mut wanted: BTreeSet<PathBuf> = programs.iter().map(PathBuf::from).collect();
    wanted.extend(programs.iter().flat_map(|program| libraries(Path::new(program))));
    wanted.iter().try_for_each(|path| copy_into(tree, path))
}

/// Copies one host file (following links) to the same path below `tree`.
pub fn copy_into(tree: &Path, path: &Path) -> Result<(), Error> {
    let to = tree.join(path.strip_prefix("/").unwrap_or(path));
    if let Some(parent) = to.parent() {
        at(parent, std::fs::create_dir_all(parent))?;
    }
    at(path, std::fs::copy(path, &to)).map(|_| ())
}
