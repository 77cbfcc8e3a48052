//! Programs that use KVM: finding them, and whether `libring3.so` can be put in front of their C library.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use goblin::elf::header::EM_X86_64;
use goblin::elf::program_header::{PT_INTERP, ProgramHeader};
use goblin::elf64::header::{Header, SIZEOF_EHDR};
use thiserror::Error;

/// Interpreters of scripts that are scripts themselves: as many as the kernel follows.
const SCRIPTS_MAX: usize = 5;

/// Why a program cannot be run with ring3. The text says what to do.
#[derive(Debug, Error)]
pub(crate) enum ClientError {
    /// It is not in `PATH`.
    #[error("{0}: there is no such program in PATH")]
    NotFound(String),
    /// It cannot be read.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// No mode bit allows it.
    #[error("{0} is not executable")]
    NotExecutable(PathBuf),
    /// Neither a program nor a script.
    #[error("{0} is neither an ELF program nor a script")]
    NotAProgram(PathBuf),
    /// For another kind of processor.
    #[error("{0} is no 64-bit x86 program; ring3 runs inside of the program's process and is one")]
    Machine(PathBuf),
    /// Static.
    #[error(
        "{0} is statically linked: it calls the kernel directly, so ring3 cannot put itself between it and \
         /dev/kvm.\n\
         Use a dynamically linked build of it: most distributions' packages are; for a Rust program build the \
         target x86_64-unknown-linux-gnu instead of …-musl, for a C program leave out -static."
    )]
    Static(PathBuf),
    /// Linked with a C library that we are not made for.
    #[error(
        "{program} is linked with another C library than GNU's (its loader is {loader}), and libring3.so needs \
         GNU's. Use a build for the GNU C library (for a Rust program the target x86_64-unknown-linux-gnu)."
    )]
    OtherLibc {
        /// The program.
        program: PathBuf,
        /// Its loader.
        loader: String,
    },
    /// Set-user-ID or set-group-ID.
    #[error(
        "{0} changes its user or group when it is run (set-ID bit), and for such programs the system ignores \
         LD_PRELOAD, which ring3 uses. Run it as its owner, or run a copy without that bit."
    )]
    SetId(PathBuf),
    /// Scripts all the way down.
    #[error("{0}: too many scripts that are interpreted by scripts")]
    TooManyScripts(PathBuf),
}

/// The file that a shell would run for `command`.
pub(crate) fn find(command: &OsStr) -> Result<PathBuf, ClientError> {
    if command.as_bytes().contains(&b'/') {
        return Ok(command.into());
    }
    let path = env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    let mut candidates = env::split_paths(&path).map(|directory| directory.join(command));
    let found =
        candidates.find(|file| fs::metadata(file).is_ok_and(|m| m.is_file() && m.mode() & 0o111 != 0));
    found.ok_or_else(|| ClientError::NotFound(command.display().to_string()))
}

/// Checks that `libring3.so` can be put in front of the C library of `program`, or of its interpreter if it is a script.
/// Gives the program that will really be run.
pub(crate) fn check(program: &Path) -> Result<PathBuf, ClientError> {
    let mut program = program.to_path_buf();
    for _ in 0..SCRIPTS_MAX {
        let failed = |source| ClientError::File { path: program.clone(), source };
        let metadata = fs::metadata(&program).map_err(failed)?;
        if !metadata.is_file() || metadata.mode() & 0o111 == 0 {
            return Err(ClientError::NotExecutable(program));
        }
        let mut file = File::open(&program).map_err(failed)?;
        let mut start = Vec::new();
        (&mut file).take(512).read_to_end(&mut start).map_err(failed)?;
        match interpreter(&start) {
            Some(next) => program = next,
            None => {
                check_elf(&program, &mut file, &start)?;
                return if changes_identity(&metadata) {
                    Err(ClientError::SetId(program))
                } else {
                    Ok(program)
                };
            }
        }
    }
    Err(ClientError::TooManyScripts(program))
}

/// The program that a script names in its first line.
fn interpreter(start: &[u8]) -> Option<PathBuf> {
    let line = start.strip_prefix(b"#!")?.split(|&byte| byte == b'\n').next()?;
    let mut words = line.split(|byte| byte.is_ascii_whitespace()).filter(|word| !word.is_empty());
    let program = PathBuf::from(OsStr::from_bytes(words.next()?));
    // env(1) looks for the real one.
    if program.file_name() == Some(OsStr::new("env")) {
        let real = words.find(|word| !word.starts_with(b"-") && !word.contains(&b'='));
        if let Some(real) = real.and_then(|real| find(OsStr::from_bytes(real)).ok()) {
            return Some(real);
        }
    }
    Some(program)
}

fn check_elf(program: &Path, file: &mut File, start: &[u8]) -> Result<(), ClientError> {
    let not_a_program = || ClientError::NotAProgram(program.to_path_buf());
    if !start.starts_with(goblin::elf::header::ELFMAG) {
        return Err(not_a_program());
    }
    let is_ours = start.get(4).is_some_and(|&class| class == goblin::elf::header::ELFCLASS64);
    let header = start.first_chunk::<SIZEOF_EHDR>().ok_or_else(not_a_program)?;
    let header = Header::from_bytes(header);
    if !is_ours || header.e_machine != EM_X86_64 {
        return Err(ClientError::Machine(program.to_path_buf()));
    }
    let failed = |source| ClientError::File { path: program.to_path_buf(), source };
    let size = usize::from(header.e_phnum) * usize::from(header.e_phentsize);
    let table = read_at(file, header.e_phoff, size).map_err(failed)?;
    let context =
        goblin::container::Ctx::new(goblin::container::Container::Big, goblin::container::Endian::Little);
    let segments =
        ProgramHeader::parse(&table, 0, header.e_phnum.into(), context).map_err(|_| not_a_program())?;
    let Some(loader) = segments.iter().find(|segment| segment.p_type == PT_INTERP) else {
        return Err(ClientError::Static(program.to_path_buf()));
    };
    let loader = read_at(file, loader.p_offset, loader.p_filesz.min(4096) as usize).map_err(failed)?;
    let loader = String::from_utf8_lossy(&loader).trim_end_matches('\0').to_string();
    if loader.contains("ld-linux") {
        Ok(())
    } else {
        Err(ClientError::OtherLibc { program: program.to_path_buf(), loader })
    }
}

fn read_at(file: &mut File, offset: u64, size: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; size];
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Whether the loader will be in its secure mode (ld.so(8)).
fn changes_identity(metadata: &fs::Metadata) -> bool {
    let own = fs::metadata("/proc/self").ok();
    let (uid, gid) = own.map_or((0, 0), |own| (own.uid(), own.gid()));
    metadata.mode() & libc::S_ISUID != 0 && metadata.uid() != uid
        || metadata.mode() & libc::S_ISGID != 0 && metadata.gid() != gid
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn scripts_name_their_interpreter() {
        let sh = Some(PathBuf::from("/bin/sh"));
        assert_eq!(interpreter(b"#!/bin/sh\necho"), sh);
        assert_eq!(interpreter(b"#! /bin/sh -e\n"), sh);
        assert_eq!(interpreter(b"#!/bin/sh"), sh);
        assert_eq!(interpreter(b"\x7fELF"), None);
        assert_eq!(interpreter(b"#!"), None);
        let env = interpreter(b"#!/usr/bin/env -S sh -e\n").unwrap();
        assert_eq!(env.file_name(), Some(OsStr::new("sh")));
    }

    #[test]
    fn programs_are_found_and_judged() {
        let shell = find(OsStr::new("sh")).unwrap();
        assert!(shell.is_absolute());
        check(&shell).unwrap();
        assert!(matches!(find(OsStr::new("no-such-program-here")), Err(ClientError::NotFound(_))));
        assert!(matches!(check(Path::new("/etc/passwd")), Err(ClientError::NotExecutable(_))));
        assert!(matches!(check(Path::new("/no/such/file")), Err(ClientError::File { .. })));
    }

    #[test]
    fn a_static_program_is_refused_and_told_why() {
        let directory = env::temp_dir().join(format!("ring3-client-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let file = directory.join("static");
        // An ELF header, and one loadable segment that nothing asks for.
        let mut elf = vec![0; SIZEOF_EHDR + 56];
        elf[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
        elf[16..20].copy_from_slice(&[2, 0, 62, 0]);
        elf[32] = SIZEOF_EHDR as u8;
        elf[54..58].copy_from_slice(&[56, 0, 1, 0]);
        elf[SIZEOF_EHDR] = 1;
        fs::write(&file, &elf).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        let refusal = check(&file).unwrap_err();
        assert!(matches!(refusal, ClientError::Static(_)), "{refusal}");
        assert!(refusal.to_string().contains("statically linked"));
        // The same for a 32-bit processor, and cut short.
        elf[4] = 1;
        fs::write(&file, &elf).unwrap();
        assert!(matches!(check(&file), Err(ClientError::Machine(_))));
        fs::write(&file, &elf[..20]).unwrap();
        assert!(check(&file).is_err());
        fs::remove_dir_all(&directory).unwrap();
    }
}
