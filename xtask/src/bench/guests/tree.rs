//! A userland, to be packed as an initramfs or written to a directory of the host.

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use xtask::cpio::Archive;
use xtask::{Error, at, run};

/// What a name stands for.
#[derive(Clone, Debug)]
enum Entry {
    Directory,
    File { mode: u32, data: Vec<u8> },
    Link(&'static str),
    Device { major: u32, minor: u32 },
}

/// Names without a leading slash, in the order in which directories come before what they hold.
#[derive(Clone, Debug, Default)]
pub(super) struct Tree(BTreeMap<String, Entry>);

impl Tree {
    fn add(&mut self, name: &str, entry: Entry) {
        let name = name.trim_start_matches('/');
        for (end, _) in name.match_indices('/') {
            self.0.entry(name[..end].to_string()).or_insert(Entry::Directory);
        }
        self.0.insert(name.to_string(), entry);
    }

    /// Adds a directory.
    pub(super) fn directory(&mut self, name: &str) {
        self.add(name, Entry::Directory);
    }

    /// Adds a file with permission bits `mode`.
    pub(super) fn file(&mut self, name: &str, mode: u32, data: Vec<u8>) {
        self.add(name, Entry::File { mode, data });
    }

    /// Adds a copy of a host file.
    pub(super) fn host_file(&mut self, name: &str, mode: u32, from: &Path) -> Result<(), Error> {
        let data = at(from, std::fs::read(from))?;
        self.file(name, mode, data);
        Ok(())
    }

    /// Adds a symbolic link.
    pub(super) fn link(&mut self, name: &str, target: &'static str) {
        self.add(name, Entry::Link(target));
    }

    /// Adds a character device.
    pub(super) fn device(&mut self, name: &str, major: u32, minor: u32) {
        self.add(name, Entry::Device { major, minor });
    }

    /// The initramfs.
    pub(super) fn archive(&self) -> Vec<u8> {
        let mut archive = Archive::new();
        for (name, entry) in &self.0 {
            match entry {
                Entry::Directory => archive.directory(name),
                Entry::File { mode, data } => archive.file(name, *mode, data),
                Entry::Link(target) => archive.symlink(name, target),
                Entry::Device { major, minor } => archive.device(name, *major, *minor),
            };
        }
        archive.finish()
    }

    /// Writes the tree to a new directory; what was there goes. Devices take root.
    pub(super) fn write(&self, root: &Path) -> Result<(), Error> {
        let _ = std::fs::remove_dir_all(root);
        at(root, std::fs::create_dir_all(root))?;
        for (name, entry) in &self.0 {
            let path = root.join(name);
            match entry {
                Entry::Directory => at(&path, std::fs::create_dir_all(&path))?,
                Entry::File { mode, data } => {
                    at(&path, std::fs::write(&path, data))?;
                    at(&path, std::fs::set_permissions(&path, PermissionsExt::from_mode(*mode)))?;
                }
                Entry::Link(target) => at(&path, symlink(target, &path))?,
                Entry::Device { major, minor } => {
                    let mut mknod = Command::new("mknod");
                    mknod.args(["-m", "666"]).arg(&path).arg("c");
                    run(mknod.args([major, minor].map(u32::to_string))).map(drop)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_before_what_they_hold() {
        let mut tree = Tree::default();
        tree.file("/usr/bin/xz", 0o755, Vec::new());
        tree.link("bin/sh", "busybox");
        tree.directory("usr");
        let names: Vec<&str> = tree.0.keys().map(String::as_str).collect();
        assert_eq!(names, ["bin", "bin/sh", "usr", "usr/bin", "usr/bin/xz"]);
    }
}
