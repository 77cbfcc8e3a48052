//! Assembles the guest programs: `asm/NAME.S` becomes `NAME.elf`, with the C compiler that Rust links with.

use std::env;
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
            assemble(&cc, &path, &out);
        }
    }
}

fn assemble(cc: &std::ffi::OsStr, source: &Path, out: &Path) {
    let target = out.join(source.file_stem().unwrap_or_default()).with_extension("elf");
    let result = Command::new(cc)
        .args(["-m64", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none,-T,asm/link.ld"])
        .args(["-Wl,--no-warn-rwx-segments", "-Wa,--fatal-warnings", "-o"])
        .arg(&target)
        .arg(source)
        .status();
    if !result.is_ok_and(|status| status.success()) {
        fail(&format!("{} could not be assembled; it needs gcc and binutils", source.display()));
    }
}

fn fail(why: &str) -> ! {
    println!("cargo:error={why}");
    exit(1);
}
