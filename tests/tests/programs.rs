//! Real Debian programs give byte-identical output in the guest and on the host.
//!
//! The programs, with their libraries, are copied from the host into a tree. The host runs the script in a chroot
//! of that tree; the guest mounts the same tree as an ext4 disk.

use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::{healthy, linux};
use xtask::{guest_dir, images, packages, run};

/// Programs, and the Debian packages that they come from.
const PROGRAMS: &[(&str, &str)] = &[
    ("/bin/bash", "bash"),
    ("/usr/bin/sort", "coreutils"),
    ("/usr/bin/sha256sum", "coreutils"),
    ("/usr/bin/md5sum", "coreutils"),
    ("/usr/bin/seq", "coreutils"),
    ("/usr/bin/factor", "coreutils"),
    ("/usr/bin/base64", "coreutils"),
    ("/usr/bin/wc", "coreutils"),
    ("/usr/bin/tr", "coreutils"),
    ("/usr/bin/head", "coreutils"),
    ("/usr/bin/od", "coreutils"),
    ("/bin/cat", "coreutils"),
    ("/bin/rm", "coreutils"),
    ("/usr/bin/python3", "python3-minimal"),
    ("/usr/bin/openssl", "openssl"),
    ("/usr/bin/sqlite3", "sqlite3"),
    ("/usr/bin/zstd", "zstd"),
    ("/usr/bin/xz", "xz-utils"),
    ("/usr/bin/gcc", "gcc"),
    ("/usr/bin/as", "binutils"),
    ("/usr/bin/ld", "binutils"),
    ("/usr/bin/perl", "perl-base"),
];

const SCRIPT: &str = r#"export PATH=/usr/bin:/bin LC_ALL=C HOME=/tmp TMPDIR=/tmp PYTHONDONTWRITEBYTECODE=1
cd /tmp
echo "bash: $((2 ** 40 / 7)) ${BASH_VERSION}"; declare -A m; for i in {1..500}; do m[$i]=$((i * i % 97)); done; echo "${m[@]}" | md5sum
seq 1 30000 | sort -R --random-source=/bin/bash | sha256sum
seq 1 30000 | sort -k1,1n -r | head -3
factor 1000000007 18014398509481983 600851475143
od -An -tx8 -N4096 /bin/bash | md5sum
echo "--- python3"
python3 -c '
import hashlib, math, json, random, struct, zlib
random.seed(7)
v = [random.gauss(0, 1) for _ in range(5000)]
print(repr(math.fsum(v)), repr(math.sin(v[3])), repr(math.exp(v[4])), repr(math.gamma(4.3)))
print(hashlib.sha256(json.dumps(sorted(v)).encode()).hexdigest())
print(pow(3, 10**5, 10**40 + 7), 2**521 % 1000003, zlib.crc32(struct.pack("<1000d", *v[:1000])))
print(repr(sum(1 / (k * k) for k in range(1, 20000))))
'
echo "--- openssl"
head -c 300000 /usr/bin/python3 > data
openssl dgst -sha256 data; openssl dgst -sha512 data; openssl dgst -sha3-256 data
openssl enc -aes-256-cbc -K 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff -iv 0123456789abcdef0123456789abcdef -in data | md5sum
openssl enc -aes-128-ctr -K 00112233445566778899aabbccddeeff -iv 0123456789abcdef0123456789abcdef -in data | md5sum
openssl enc -chacha20 -K 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff -iv 0123456789abcdef0123456789abcdef -in data | md5sum
openssl dgst -sha256 -sign /key.pem data | openssl md5
openssl dgst -sha256 -sign /key.pem -out sig data; openssl dgst -sha256 -prverify /key.pem -signature sig data
echo "--- sqlite3"
sqlite3 :memory: "create table t(a integer primary key, b text, c real); with recursive n(i) as (select 1 union all select i+1 from n where i<5000) insert into t select i, hex(i*7919), i/7.0 from n; create index x on t(b); select count(*), sum(a), total(c), max(b), group_concat(substr(b,1,2)) from t where a%501=0; select printf('%.12f', avg(c*c)) from t;"
echo "--- compressors"
zstd -q -c -9 data | sha256sum; zstd -q -c -19 data | zstd -q -dc | cmp - data && echo same
xz -c -6 data | sha256sum; xz -c -1 data | xz -dc | cmp - data && echo same
echo "--- gcc"
cat > p.c <<'C'
#include <stdio.h>
#include <math.h>
#include <string.h>
static double f(double x) { return x * x - 2 + sin(x) / 3; }
int main(void) {
  double a = 0, b = 2; for (int i = 0; i < 60; i++) { double m = (a + b) / 2; if (f(m) > 0) b = m; else a = m; }
  long double l = 1.0L; for (int i = 1; i < 30; i++) l += l / i;
  float s = 0; for (int i = 1; i < 1000; i++) s += 1.0f / i;
  printf("%.17g %.20Lg %.9g %zu\n", a, l, s, strlen("ring3")); return 0; }
C
gcc -O2 -o p p.c -lm && ./p; gcc -O0 -S -o - p.c | md5sum; gcc -O3 -march=x86-64-v3 -o p3 p.c -lm && ./p3
echo "--- perl"
perl -e 'my %h; $h{$_ % 1009} .= chr(65 + $_ % 26) for 1..40000; my $s = join "", map { $h{$_} } sort { $a <=> $b } keys %h; my $n = () = $s =~ /(?:ABC|[X-Z]{2,3})/g; printf "%d %d %.15g\n", length $s, $n, atan2(1, 3) * exp(0.5);'
"#;

fn copy_directory(tree: &Path, directory: &Path, wanted: &dyn Fn(&Path) -> bool) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !entry.file_type().is_ok_and(|t| t.is_symlink()) {
            copy_directory(tree, &path, wanted);
        } else if path.is_file() && wanted(&path) {
            images::copy_into(tree, &path).unwrap();
        }
    }
}

fn build_tree(tree: &Path) {
    let _ = std::fs::remove_dir_all(tree);
    for dir in ["tmp", "dev", "proc"] {
        std::fs::create_dir_all(tree.join(dir)).unwrap();
    }
    let names: Vec<&str> = PROGRAMS.iter().map(|(program, _)| *program).collect();
    images::copy_programs(tree, &names).unwrap();
    images::copy_programs(tree, &["/usr/bin/cmp"]).unwrap();
    std::fs::copy("/bin/bash", tree.join("bin/sh")).unwrap();
    // Where device nodes cannot be made, a plain file does for the host's run; the guest mounts its own /dev.
    let null = tree.join("dev/null");
    if run(Command::new("mknod").arg(&null).args(["c", "1", "3"])).is_err() {
        std::fs::write(&null, "").unwrap();
    }
    copy_python(tree);
    copy_compiler(tree);
    let key = Command::new("openssl")
        .args(["genrsa", "-out"])
        .arg(tree.join("key.pem"))
        .arg("2048")
        .output()
        .unwrap();
    assert!(key.status.success(), "a key for the signing test");
    std::fs::write(tree.join("script"), SCRIPT).unwrap();
}

/// Python's standard library, wherever this Python keeps it.
fn copy_python(tree: &Path) {
    let ask = "import os; print(os.path.dirname(os.__file__))";
    let found = run(Command::new("/usr/bin/python3").args(["-I", "-c", ask])).unwrap();
    let library = PathBuf::from(found.trim());
    let modules = |path: &Path| {
        let text = path.to_string_lossy();
        (text.ends_with(".py") || text.contains("lib-dynload"))
            && !text.contains("/test/")
            && !text.contains("/site-packages/")
            && !text.contains("/dist-packages/")
    };
    copy_directory(tree, &library, &modules);
    let dynamic = library.join("lib-dynload");
    for entry in std::fs::read_dir(dynamic).into_iter().flatten().flatten() {
        images::copy_programs(tree, &[&entry.path().to_string_lossy()]).unwrap();
    }
}

/// What `gcc` runs and reads: cc1, collect2, crt files, libgcc, libc and its headers.
fn copy_compiler(tree: &Path) {
    let ask = |what: &str| run(Command::new("gcc").arg(what)).unwrap().trim().to_string();
    for helper in ["cc1", "collect2", "liblto_plugin.so"] {
        let path = ask(&format!("-print-prog-name={helper}"));
        let path = if path.starts_with('/') { path } else { ask(&format!("-print-file-name={helper}")) };
        if path.starts_with('/') {
            images::copy_programs(tree, &[&path]).unwrap();
        }
    }
    let library = PathBuf::from(ask("-print-libgcc-file-name"));
    copy_directory(tree, library.parent().unwrap(), &|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("crt")
            || name.starts_with("libgcc")
            || path.components().any(|c| c.as_os_str() == "include")
    });
    for file in [
        "crt1.o",
        "Scrt1.o",
        "crti.o",
        "crtn.o",
        "libc.so",
        "libc.so.6",
        "libc_nonshared.a",
        "libm.so",
        "libm.so.6",
        "libmvec.so.1",
        "ld-linux-x86-64.so.2",
        "libgcc_s.so.1",
    ] {
        let path = PathBuf::from(ask(&format!("-print-file-name={file}")));
        if path.is_absolute() {
            let path = path.canonicalize().map_or(path.clone(), |_| normal(&path));
            images::copy_into(tree, &path).unwrap();
        }
    }
    images::copy_into(tree, Path::new("/lib64/ld-linux-x86-64.so.2")).unwrap();
    for mvec in [
        "/lib/x86_64-linux-gnu/libmvec.so.1",
        "/lib/x86_64-linux-gnu/libm.so.6",
        "/lib/x86_64-linux-gnu/libc.so.6",
    ] {
        images::copy_into(tree, Path::new(mvec)).unwrap();
    }
    copy_directory(tree, Path::new("/usr/include/x86_64-linux-gnu"), &|_| true);
    for dir in ["linux", "asm-generic"] {
        copy_directory(tree, &Path::new("/usr/include").join(dir), &|_| true);
    }
    for entry in std::fs::read_dir("/usr/include").into_iter().flatten().flatten() {
        if entry.path().is_file() {
            images::copy_into(tree, &entry.path()).unwrap();
        }
    }
}

/// The path without `..` components, links left as they are.
fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}

#[test]
fn debian_programs_give_the_hosts_output() {
    packages::require(PROGRAMS).unwrap();
    let tree = guest_dir().join("programs");
    build_tree(&tree);
    let host = run(Command::new("chroot").arg(&tree).args(["/bin/bash", "/script"])).unwrap();
    for leftover in std::fs::read_dir(tree.join("tmp")).unwrap().flatten() {
        std::fs::remove_file(leftover.path()).unwrap();
    }
    let image = guest_dir().join("programs.img");
    images::ext4(&image, Some(&tree), 512).unwrap();
    let script = "mount -t ext4 -o ro /dev/vda /mnt; mount -t tmpfs none /mnt/tmp; mount --bind /dev /mnt/dev
echo BEGIN programs; chroot /mnt /bin/bash /script 2>&1; echo END programs; umount /mnt/dev /mnt/tmp /mnt";
    let outcome = linux("programs", "6.12", script, |boot| {
        boot.disks = vec![format!("{},ro", image.display())];
        boot.memory = 1024;
        boot.append.push_str(" quiet");
    })
    .unwrap();
    healthy(&outcome);
    let guest = outcome.section("programs").unwrap_or_default();
    for (line, (ours, theirs)) in guest.lines().zip(host.lines()).enumerate() {
        assert_eq!(ours, theirs, "line {line}");
    }
    assert_eq!(guest, host);
    assert!(host.lines().count() > 25, "the script ran to its end on the host:\n{host}");
}
