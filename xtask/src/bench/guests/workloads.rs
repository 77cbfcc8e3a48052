//! The workloads of `guests/bench`: their names, and the images that they run from.

use std::path::{Path, PathBuf};
use std::process::Command;

use xtask::images::libraries;
use xtask::{Error, at, guest_dir, packages, root, run};

use super::tree::Tree;

/// Where the images and the program are made.
fn dir() -> PathBuf {
    guest_dir().join("bench")
}

/// An initramfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Image {
    /// The workloads and busybox.
    Min,
    /// Debian's programs as well.
    Full,
}

/// Not a workload: the way to /init.
pub(super) const BOOT: &str = "boot";
/// Workloads that take the full image.
const NEED_FULL: &str = "app.*,proc.execdyn";
/// Workloads that start programs of their image, so that the host can run them in a changed root only.
pub(super) const NEED_ROOT: &str = "app.*,proc.exec*";

/// Source files, and what their compiler gets besides [`FLAGS`]. Loops of integers must stay loops of integers.
const SOURCES: &[(&str, &[&str])] = &[
    ("int", &["-fno-tree-vectorize"]),
    ("branch", &["-fno-tree-vectorize"]),
    ("mem", &["-fno-tree-vectorize"]),
    ("fp", &[]),
    ("simd", &[]),
    ("sys", &[]),
    ("code", &[]),
    ("smp", &[]),
    ("app", &[]),
    ("main", &[]),
];
/// The same instructions for everybody: nothing that the compiler could take from this machine, nothing fused.
const FLAGS: &[&str] = &[
    "-O2",
    "-static",
    "-pthread",
    "-Wall",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-march=x86-64",
    "-mtune=generic",
];

/// What the workloads are compiled with: file, package.
const COMPILER: &[(&str, &str)] = &[("cc", "gcc"), ("/usr/lib/x86_64-linux-gnu/libm.a", "libc6-dev")];
/// Debian's programs of the full image: file, package.
const PROGRAMS: &[(&str, &str)] = &[
    ("/usr/bin/openssl", "openssl"),
    ("/usr/bin/zstd", "zstd"),
    ("/usr/bin/xz", "xz-utils"),
    ("/usr/bin/sqlite3", "sqlite3"),
    (PYTHON, "python3.11-minimal"),
    ("/bin/true", "coreutils"),
];
const PYTHON: &str = "/usr/bin/python3.11";
/// The package of Python's modules, and where it has them.
const PYTHON_MODULES: (&str, &str) = ("libpython3.11-minimal", "/usr/lib/python3.11");

/// Device nodes that the programs want.
const DEVICES: &[(&str, u32, u32)] = &[
    ("dev/console", 5, 1),
    ("dev/null", 1, 3),
    ("dev/zero", 1, 5),
    ("dev/random", 1, 8),
    ("dev/urandom", 1, 9),
];

/// Whether `name` fits `pattern`, in which `*` stands for anything.
fn fits(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name
            .strip_prefix(start)
            .is_some_and(|tail| (0..=tail.len()).any(|at| tail.get(at..).is_some_and(|t| fits(rest, t)))),
    }
}

/// Whether a list has `name`: the last pattern that fits decides, and one with a `-` before it takes away.
pub(super) fn wanted(list: &str, name: &str) -> bool {
    list.split(',').fold(false, |yes, pattern| {
        let without = pattern.strip_prefix('-');
        let pattern = without.unwrap_or(pattern);
        if pattern == "all" || fits(pattern, name) { without.is_none() } else { yes }
    })
}

/// The image that a workload runs from.
pub(super) fn image_of(name: &str) -> Image {
    if wanted(NEED_FULL, name) { Image::Full } else { Image::Min }
}

/// The compiled workloads.
pub(super) struct Workloads {
    /// The program.
    pub(super) program: PathBuf,
    /// All names, "boot" first.
    pub(super) names: Vec<String>,
}

impl Workloads {
    /// Compiles them.
    pub(super) fn build() -> Result<Workloads, Error> {
        packages::require(COMPILER)?;
        let dir = dir();
        at(&dir, std::fs::create_dir_all(&dir))?;
        let sources = root().join("guests/bench");
        let mut link = Command::new("cc");
        let program = dir.join("bench");
        link.args(["-static", "-pthread", "-s", "-o"]).arg(&program);
        for (name, flags) in SOURCES {
            let object = dir.join(name).with_extension("o");
            let mut compile = Command::new("cc");
            compile.args(FLAGS).args(*flags).arg("-c").arg("-o").arg(&object);
            run(compile.arg(sources.join(name).with_extension("c")))?;
            link.arg(object);
        }
        run(link.arg("-lm"))?;
        let listed = run(Command::new(&program).arg("-l"))?;
        let names = [BOOT].into_iter().chain(listed.lines()).map(str::to_string).collect();
        Ok(Workloads { program, names })
    }

    /// Names that `list` has. A pattern that fits none is an error.
    pub(super) fn select(&self, list: &str) -> Result<Vec<String>, Error> {
        let known = |pattern: &str| pattern == "all" || self.names.iter().any(|name| fits(pattern, name));
        if let Some(unknown) = list.split(',').find(|p| !known(p.strip_prefix('-').unwrap_or(p))) {
            let names = self.names.join(" ");
            return Err(Error::Guest(format!("no benchmark fits `{unknown}`; there are: {names}")));
        }
        let names: Vec<String> = self.names.iter().filter(|name| wanted(list, name)).cloned().collect();
        if names.is_empty() {
            return Err(Error::Guest(format!("`{list}` leaves no benchmark: begin it with `all,`")));
        }
        Ok(names)
    }

    /// Makes the userland of an image.
    pub(super) fn tree(&self, image: Image) -> Result<Tree, Error> {
        let mut tree = Tree::default();
        for name in ["bin", "dev", "proc", "sys", "tmp"] {
            tree.directory(name);
        }
        for (name, major, minor) in DEVICES {
            tree.device(name, *major, *minor);
        }
        tree.host_file("init", 0o755, &self.program)?;
        tree.host_file("bin/busybox", 0o755, &packages::busybox()?)?;
        tree.link("bin/sh", "busybox");
        tree.host_file("bin/strue", 0o755, &static_true()?)?;
        if image == Image::Full {
            add_programs(&mut tree)?;
            add_python(&mut tree)?;
            let sources = root().join("guests/bench");
            tree.host_file("bench.py", 0o644, &sources.join("bench.py"))?;
            tree.host_file("bench.sh", 0o644, &sources.join("bench.sh"))?;
        }
        Ok(tree)
    }
}

/// Packs an image and gives the archive's path.
pub(super) fn pack(tree: &Tree, image: Image) -> Result<PathBuf, Error> {
    let path = dir().join(match image {
        Image::Min => "min.cpio",
        Image::Full => "full.cpio",
    });
    at(&path, std::fs::write(&path, tree.archive()))?;
    Ok(path)
}

/// Writes a userland for the host to change its root to, and gives its path.
pub(super) fn unpack(tree: &Tree) -> Result<PathBuf, Error> {
    let path = dir().join("root");
    tree.write(&path)?;
    Ok(path)
}

/// The program that proc.exec starts.
fn static_true() -> Result<PathBuf, Error> {
    let program = dir().join("strue");
    let source = root().join("guests/bench/strue.c");
    run(Command::new("cc").args(["-O2", "-static", "-s", "-o"]).arg(&program).arg(source))?;
    Ok(program)
}

/// Debian's programs and their libraries.
fn add_programs(tree: &mut Tree) -> Result<(), Error> {
    packages::require(PROGRAMS)?;
    for (program, _) in PROGRAMS {
        let program = Path::new(program);
        for path in [program.to_path_buf()].into_iter().chain(libraries(program)) {
            tree.host_file(&path.to_string_lossy(), 0o755, &path)?;
        }
    }
    let settings = Path::new("/etc/ssl/openssl.cnf");
    if settings.is_file() {
        tree.host_file("usr/lib/ssl/openssl.cnf", 0o644, settings)?;
    }
    Ok(())
}

/// Python's modules, compiled, so that the first start is not charged with that.
fn add_python(tree: &mut Tree) -> Result<(), Error> {
    let (package, library) = PYTHON_MODULES;
    let stage = dir().join("python");
    let _ = std::fs::remove_dir_all(&stage);
    at(&stage, std::fs::create_dir_all(&stage))?;
    let listed = run(Command::new("dpkg").args(["-L", package]))?;
    let modules = listed.lines().map(Path::new).filter(|path| path.extension().is_some_and(|e| e == "py"));
    for (path, inside) in modules.filter_map(|path| Some((path, path.strip_prefix(library).ok()?))) {
        let to = stage.join(inside);
        to.parent().map_or(Ok(()), |parent| at(parent, std::fs::create_dir_all(parent)))?;
        at(path, std::fs::copy(path, &to))?;
    }
    let mut compile = Command::new(PYTHON);
    compile.args(["-m", "compileall", "-q", "-d", library, "--invalidation-mode", "unchecked-hash"]);
    run(compile.arg(&stage))?;
    add_directory(tree, library, &stage)
}

/// All that is in a directory of the host, as `name` of the tree.
fn add_directory(tree: &mut Tree, name: &str, from: &Path) -> Result<(), Error> {
    for entry in at(from, std::fs::read_dir(from))? {
        let path = at(from, entry)?.path();
        let name = format!("{name}/{}", path.file_name().unwrap_or_default().to_string_lossy());
        if path.is_dir() {
            add_directory(tree, &name, &path)?;
        } else {
            tree.host_file(&name, 0o644, &path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_pattern_that_fits_decides() {
        assert!(wanted("int.*", "int.list") && !wanted("int.*", "mem.triad"));
        assert!(wanted("all,-mem.*,mem.triad", "mem.triad") && !wanted("all,-mem.*", "mem.triad"));
        assert!(wanted("*.fork,sys.*pp*", "sys.getppid") && wanted("*.fork", "proc.fork"));
        assert!(!wanted("", "boot") && !wanted("int", "int.list"));
    }

    #[test]
    fn programs_run_from_the_full_image() {
        let images = ["boot", "proc.exec", "proc.execdyn", "app.xz1"].map(image_of);
        assert_eq!(images, [Image::Min, Image::Min, Image::Full, Image::Full]);
    }

    #[test]
    fn a_selection_says_what_there_is() {
        let names = ["boot", "int.list", "mem.triad"].map(String::from).to_vec();
        let workloads = Workloads { program: PathBuf::new(), names };
        assert_eq!(workloads.select("all,-boot").unwrap(), ["int.list", "mem.triad"]);
        let error = workloads.select("int.*,fp.*").unwrap_err().to_string();
        assert!(error.contains("`fp.*`") && error.contains("mem.triad"), "{error}");
        assert!(workloads.select("-boot").is_err());
    }
}
