//! Assembles the guest programs: `asm/NAME.S` becomes `NAME.elf`, with the C compiler that Rust links with. The one in Rust, `pager`, is compiled
//! for the host's own target, which everybody has, without its operating system.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let cc = env::var_os("CC").unwrap_or_else(|| "cc".into());
    println!("cargo:rerun-if-changed=asm");
    println!("cargo:rerun-if-env-changed=CC");
    let Ok(entries) = std::fs::read_dir("asm") else {
        fail("guests/asm cannot be read");
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_some_and(|extension| extension == "S") {
            link(&cc, &path, None, &out.join(path.file_stem().unwrap_or_default()).with_extension("elf"));
        }
    }
    let library = out.join("libpager.a");
    compile(Path::new("pager/main.rs"), &library);
    link(&cc, Path::new("pager/boot.S"), Some(&library), &out.join("pager.elf"));
}

/// Compiles a crate without operating system. Interrupts come on the stack of whatever runs, so that nothing may be kept below it.
fn compile(source: &Path, target: &Path) {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    println!("cargo:rerun-if-changed=pager");
    let result = Command::new(rustc)
        .args([
            "--edition",
            "2024",
            "--crate-name",
            "pager",
            "--crate-type",
            "staticlib",
            "-C",
            "panic=abort",
        ])
        .args(["-C", "opt-level=2", "-C", "relocation-model=static", "-C", "no-redzone=yes", "-o"])
        .arg(target)
        .arg(source)
        .status();
    if !result.is_ok_and(|status| status.success()) {
        fail(&format!("{} could not be compiled", source.display()));
    }
}

fn link(cc: &OsStr, source: &Path, library: Option<&Path>, target: &Path) {
    let result = Command::new(cc)
        .args(["-m64", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none,-T,asm/link.ld,--gc-sections"])
        .args(["-Wl,--no-warn-rwx-segments", "-Wa,--fatal-warnings", "-o"])
        .arg(target)
        .arg(source)
        .args(library)
        .status();
    if !result.is_ok_and(|status| status.success()) {
        fail(&format!("{} could not be assembled; it needs gcc and binutils", source.display()));
    }
}

fn fail(why: &str) -> ! {
    println!("cargo:error={why}");
    exit(1);
}
