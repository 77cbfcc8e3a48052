//! Debian packages: tools that we run, and the kernels and busybox that guests run. Kernels are unpacked under
//! `target/guest`, never installed.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Error, at, guest_dir, run};

/// A guest kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    /// `lib/modules/RELEASE`.
    pub modules: PathBuf,
}

/// The kernels that ring3 is tested with: our name, series, and the packages that depend on its newest image. Cloud kernels
/// are small, but know processors and interrupts from ACPI only.
const KERNELS: &[(&str, &str, &[&str])] = &[
    ("6.12", "6.12", &["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"]),
    ("6.12-full", "6.12", &["linux-image-6.12-amd64", "linux-image-amd64"]),
    ("6.1", "6.1", &["linux-image-6.1-cloud-amd64", "linux-image-cloud-amd64"]),
];

/// Somebody else may be installing something: apt-get's option for how many seconds it waits.
const APT_WAITS: &str = "DPkg::Lock::Timeout=600";

/// Whether we may install packages, make devices and change roots.
pub fn is_root() -> bool {
    Path::new("/proc/self").metadata().is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0)
}

/// Makes sure that the programs in `tools` (program, package) are there; installs them if we are root.
pub fn require(tools: &[(&str, &str)]) -> Result<(), Error> {
    let absent = || tools.iter().filter(|(tool, _)| find(tool).is_none()).collect::<Vec<_>>();
    if absent().is_empty() {
        return Ok(());
    }
    let _alone = fetching()?;
    let missing = absent();
    let Some((tool, _)) = missing.first() else { return Ok(()) };
    let packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    if !is_root() {
        return Err(Error::MissingTool { tool: tool.to_string(), package: packages.join(" ") });
    }
    eprintln!("installing {}", packages.join(", "));
    let install = || {
        let mut apt = Command::new("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", APT_WAITS]);
        run(apt.args(["install", "-y", "-qq", "--no-install-recommends"]).args(&packages))
    };
    if install().is_err() {
        update()?;
        install()?;
    }
    match missing.iter().find(|(tool, _)| find(tool).is_none()) {
        None => Ok(()),
        Some((tool, package)) => {
            Err(Error::MissingTool { tool: tool.to_string(), package: package.to_string() })
        }
    }
}

/// Finds a program in PATH and in the system directories that PATH may lack, or a file by absolute path.
pub fn find(tool: &str) -> Option<PathBuf> {
    if tool.starts_with('/') {
        return Some(PathBuf::from(tool)).filter(|p| p.exists());
    }
    let path = std::env::var("PATH").unwrap_or_default();
    (path.split(':').chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"]))
        .map(|dir| Path::new(dir).join(tool))
        .find(|candidate| candidate.is_file())
}

fn update() -> Result<(), Error> {
    eprintln!("reading package lists");
    run(Command::new("apt-get").args(["update", "-qq"])).map(|_| ())
}

/// Names of the packages that `package` depends on; empty if it is unknown.
fn depends(package: &str) -> Vec<String> {
    let listed = run(Command::new("apt-cache").args(["depends", "--important", package])).unwrap_or_default();
    listed.lines().filter_map(|l| l.trim().strip_prefix("Depends: ")).map(str::to_string).collect()
}

/// Downloads `package` and unpacks it as the directory `into`, which appears complete or not at all.
fn unpack(package: &str, into: &Path) -> Result<(), Error> {
    unpack_all(&[package], into)
}

/// The same for several packages, which may be `NAME=VERSION`.
fn unpack_all(packages: &[&str], into: &Path) -> Result<(), Error> {
    let (part, download) = (into.with_extension("part"), into.with_extension("download"));
    for dir in [&part, &download] {
        // An earlier try may have been cut short.
        let _ = std::fs::remove_dir_all(dir);
        at(dir, std::fs::create_dir_all(dir))?;
    }
    eprintln!("fetching {}", packages.join(", "));
    run(Command::new("apt-get").args(["download", "-qq"]).args(packages).current_dir(&download))?;
    for entry in at(&download, std::fs::read_dir(&download))?.flatten() {
        run(Command::new("dpkg-deb").arg("-x").arg(entry.path()).arg(&part))?;
    }
    at(&download, std::fs::remove_dir_all(&download))?;
    let _ = std::fs::remove_dir_all(into);
    at(into, std::fs::rename(&part, into))
}

/// Held by whoever fetches or installs something. Only one does at a time, be it another thread or another process: tests
/// start together on a machine that has nothing yet.
fn fetching() -> Result<std::fs::File, Error> {
    let dir = guest_dir();
    at(&dir, std::fs::create_dir_all(&dir))?;
    let path = dir.join("fetch.lock");
    let lock = at(&path, std::fs::File::create(&path))?;
    at(&path, lock.lock())?;
    Ok(lock)
}

/// What `found` finds; if it finds nothing, what it finds after `fetch`, which nobody else does at the time.
fn fetched<T>(
    found: impl Fn() -> Option<T>,
    fetch: impl FnOnce() -> Result<(), Error>,
    missing: &str,
) -> Result<T, Error> {
    if let Some(there) = found() {
        return Ok(there);
    }
    let _alone = fetching()?;
    if found().is_none() {
        fetch()?;
    }
    found().ok_or_else(|| Error::Package(missing.to_string()))
}

/// The kernel called `name` ("6.12", "6.12-full" or "6.1"), fetched on first use.
pub fn kernel(name: &str) -> Result<Kernel, Error> {
    let dir = guest_dir().join(format!("linux-{name}"));
    fetched(|| unpacked_kernel(&dir), || unpack(&kernel_package(name)?, &dir), name)
}

/// The package that has the newest image of the kernel called `name`.
fn kernel_package(name: &str) -> Result<String, Error> {
    let Some((_, series, candidates)) = KERNELS.iter().find(|row| row.0 == name) else {
        return Err(Error::Package(format!("linux-image-{name}-amd64")));
    };
    let prefix = format!("linux-image-{series}.");
    let search = || candidates.iter().flat_map(|c| depends(c)).find(|name| name.starts_with(&prefix));
    if let Some(image) = search() {
        return Ok(image);
    }
    if is_root() {
        update()?;
    }
    search().ok_or_else(|| Error::Package(candidates[0].to_string()))
}

/// The tree in which modules for `kernel` are built, of exactly its version, fetched on first use.
pub fn kernel_headers(kernel: &Kernel) -> Result<PathBuf, Error> {
    let headers = format!("linux-headers-{}", kernel.release);
    let dir = guest_dir().join(&headers);
    let tree = dir.join("usr/src").join(&headers);
    // The last thing that is done to it.
    let done = dir.join("moved");
    let found = || Some(tree.clone()).filter(|_| done.is_file());
    let fetch = || {
        let version = debian_version(&kernel.image)?;
        let fetch = || {
            // What is the same for all flavours, and the programs that build.
            let parts = depends(&headers).into_iter().filter(|name| {
                name.starts_with("linux-headers-") && name.ends_with("-common")
                    || name.starts_with("linux-kbuild-")
            });
            let all: Vec<String> =
                parts.chain([headers.clone()]).map(|name| format!("{name}={version}")).collect();
            unpack_all(&all.iter().map(String::as_str).collect::<Vec<_>>(), &dir)
        };
        match fetch() {
            Err(_) if is_root() => update().and_then(|()| fetch())?,
            result => result?,
        }
        // The tree is made to be in /usr/src.
        let makefile = tree.join("Makefile");
        let text = at(&makefile, std::fs::read_to_string(&makefile))?;
        let moved = text.replace("include /usr/src", &format!("include {}", dir.join("usr/src").display()));
        at(&makefile, std::fs::write(&makefile, moved))?;
        at(&done, std::fs::write(&done, ""))
    };
    fetched(found, fetch, &headers)
}

/// The version of the package that a kernel image is from, as the kernel's banner has it: `#1 SMP Debian 6.12.117-1 (2026-11-14)`.
fn debian_version(image: &Path) -> Result<String, Error> {
    let bytes = at(image, std::fs::read(image))?;
    let unknown = || Error::Package(format!("of {}, whose version is not known,", image.display()));
    version_in_banner(&bytes).ok_or_else(unknown)
}

fn version_in_banner(image: &[u8]) -> Option<String> {
    // Linux's boot protocol: kernel_version, less 0x200.
    let [low, high] = image.get(0x20e..0x210)? else { return None };
    let start = usize::from(u16::from_le_bytes([*low, *high])) + 0x200;
    let banner = image.get(start..)?.split(|&byte| byte == 0).next()?;
    let banner = String::from_utf8_lossy(banner);
    let mut words = banner.split_whitespace().skip_while(|&word| word != "Debian").skip(1);
    words.next().map(str::to_string)
}

fn unpacked_kernel(dir: &Path) -> Option<Kernel> {
    let boot = std::fs::read_dir(dir.join("boot")).ok()?;
    let image = boot
        .flatten()
        .map(|e| e.path())
        .find(|p| p.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))?;
    let release = image.file_name()?.to_string_lossy().strip_prefix("vmlinuz-")?.to_string();
    let modules = ["lib/modules", "usr/lib/modules"]
        .iter()
        .map(|base| dir.join(base).join(&release))
        .find(|p| p.is_dir())?;
    Some(Kernel { release, image, modules })
}

/// Debian's statically linked busybox, fetched on first use.
pub fn busybox() -> Result<PathBuf, Error> {
    const PACKAGE: &str = "busybox-static";
    let dir = unpacked(PACKAGE)?;
    let found = ["bin/busybox", "usr/bin/busybox"].iter().map(|p| dir.join(p)).find(|p| p.is_file());
    found.ok_or_else(|| Error::Package(PACKAGE.into()))
}

/// Where `package` is unpacked, fetched on first use. It is not installed, nor is what it depends on.
pub fn unpacked(package: &str) -> Result<PathBuf, Error> {
    let dir = guest_dir().join(package);
    let fetch = || match unpack(package, &dir) {
        Err(_) if is_root() => update().and_then(|()| unpack(package, &dir)),
        result => result,
    };
    fetched(|| Some(dir.clone()).filter(|dir| dir.is_dir()), fetch, package)
}

/// Parts of the kernel's source that its KVM tests are built from.
const SOURCE_PARTS: &[&str] =
    &["Makefile", "scripts", "include", "arch/x86", "tools", "usr/include", "usr/Makefile"];

/// The source of Debian's kernel 6.12, as far as its KVM tests need it, fetched on first use.
pub fn kernel_source() -> Result<PathBuf, Error> {
    const PACKAGE: &str = "linux-source-6.12";
    let dir = guest_dir().join(PACKAGE);
    let source = dir.join("tree").join(PACKAGE);
    let found = || Some(source.clone()).filter(|s| s.join("tools/testing/selftests/kvm").is_dir());
    let fetch = || {
        if unpack(PACKAGE, &dir).is_err() {
            if is_root() {
                update()?;
            }
            unpack(PACKAGE, &dir)?;
        }
        let part = dir.join("part");
        at(&part, std::fs::create_dir_all(&part))?;
        eprintln!("unpacking the kernel's source");
        let parts = SOURCE_PARTS.iter().map(|part| format!("{PACKAGE}/{part}"));
        let archive = dir.join("usr/src").join(format!("{PACKAGE}.tar.xz"));
        run(Command::new("tar").arg("-C").arg(&part).arg("-xJf").arg(&archive).args(parts))?;
        at(&archive, std::fs::remove_file(&archive))?;
        at(&part, std::fs::rename(&part, dir.join("tree")))
    };
    require(&[("xz", "xz-utils")])?;
    fetched(found, fetch, PACKAGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    /// Two tests that fetched busybox at the same time gave a guest half of it, which hung.
    #[test]
    fn what_two_ask_for_at_once_is_fetched_once() {
        let (there, fetches) = (AtomicBool::new(false), AtomicU32::new(0));
        let ask = || {
            let found = || there.load(Ordering::SeqCst).then_some(());
            let fetch = || {
                fetches.fetch_add(1, Ordering::SeqCst);
                std::thread::yield_now();
                there.store(true, Ordering::SeqCst);
                Ok(())
            };
            fetched(found, fetch, "it").unwrap();
        };
        std::thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(ask))));
        assert_eq!(fetches.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_kernel_image_says_which_package_it_is_from() {
        let mut image = vec![0; 0x400];
        image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        assert_eq!(version_in_banner(&image), None);
        let banner =
            b"6.12.1+deb12-amd64 (x@debian.org) #1 SMP Debian 6.12.1-1~deb12u1 (2026-11-14)\0Debian 7";
        image[0x300..0x300 + banner.len()].copy_from_slice(banner);
        assert_eq!(version_in_banner(&image).as_deref(), Some("6.12.1-1~deb12u1"));
        assert_eq!(version_in_banner(&image[..0x20f]), None);
    }
}
