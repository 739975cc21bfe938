//! Folders that become archives.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Release;
use crate::error::{self, Result};
use crate::process;

/// A folder to be filled.
#[derive(Debug)]
pub(super) struct Stage {
    root: PathBuf,
}

impl Stage {
    /// An empty one.
    pub(super) fn new(root: PathBuf) -> Result<Self> {
        if root.exists() {
            fs::remove_dir_all(&root).map_err(error::io(&root))?;
        }
        fs::create_dir_all(&root).map_err(error::io(&root))?;
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).map_err(error::io(&root))?;
        Ok(Self { root })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Puts a file there, and folders up to it.
    pub(super) fn put(&self, to: &str, contents: &[u8], mode: u32) -> Result<()> {
        let path = self.root.join(to);
        let mut missing: Vec<_> = path.ancestors().skip(1).take_while(|dir| !dir.exists()).collect();
        missing.reverse();
        for dir in missing {
            fs::create_dir(dir).map_err(error::io(dir))?;
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).map_err(error::io(dir))?;
        }
        fs::write(&path, contents).map_err(error::io(&path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(error::io(&path))
    }

    /// Puts a file of the repository there.
    pub(super) fn copy(&self, from: &str, to: &str, mode: u32) -> Result<()> {
        let from = process::root().join(from);
        self.put(to, &fs::read(&from).map_err(error::io(&from))?, mode)
    }

    /// Puts a file there compressed, as Debian wants what is read seldom.
    pub(super) fn put_gz(&self, to: &str, contents: &[u8]) -> Result<()> {
        self.put(to, contents, 0o644)?;
        // -n: neither a name nor a time in it.
        process::run(Command::new("gzip").args(["-9n", "--force"]).arg(self.root.join(to)))
    }
}

/// What the program prints when it is asked for something that is part of a package.
pub(super) fn told(program: &Path, args: &[&str]) -> Result<String> {
    process::output(Command::new(program).args(args).env_clear())
}

/// Completions for shells: where a package puts them, and the shell's name.
pub(super) const COMPLETIONS: &[(&str, &str)] = &[
    ("share/bash-completion/completions/pool-managerd", "bash"),
    ("share/zsh/vendor-completions/_pool-managerd", "zsh"),
    ("share/fish/vendor_completions.d/pool-managerd.fish", "fish"),
];

/// The tarball: unpacked below /usr/local it is an installation.
pub(super) fn tarball(release: &Release, licences: &str) -> Result<PathBuf> {
    let name = format!("pool-managerd-{}-{}-linux-gnu", release.version, std::env::consts::ARCH);
    let stage = Stage::new(release.out.join("stage/tarball").join(&name))?;
    let program = fs::read(&release.program).map_err(error::io(&release.program))?;
    stage.put("bin/pool-managerd", &program, 0o755)?;
    for (to, shell) in COMPLETIONS {
        stage.put(to, told(&release.program, &["completions", shell])?.as_bytes(), 0o644)?;
    }
    for (to, page) in super::deb::man_pages(release)? {
        stage.put(&to, page.as_bytes(), 0o644)?;
    }
    stage.put("share/doc/pool-managerd/LICENCES.txt", licences.as_bytes(), 0o644)?;
    for (from, to) in [
        ("README.md", "share/doc/pool-managerd/README.md"),
        ("LICENSE-MIT", "share/doc/pool-managerd/LICENSE-MIT"),
        ("LICENSE-APACHE", "share/doc/pool-managerd/LICENSE-APACHE"),
        ("config/pool-managerd.example.toml", "share/doc/pool-managerd/examples/pool-managerd.example.toml"),
        ("deploy/systemd/pool-managerd.service", "share/doc/pool-managerd/examples/pool-managerd.service"),
    ] {
        stage.copy(from, to, 0o644)?;
    }
    let file = release.out.join(format!("{name}.tar.gz"));
    let plain = release.out.join(format!("{name}.tar"));
    let mut tar = Command::new("tar");
    tar.args(["--create", "--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--format=gnu"]);
    tar.arg(format!("--mtime=@{}", release.epoch)).arg("--file").arg(&plain);
    process::run(tar.arg("--directory").arg(release.out.join("stage/tarball")).arg(&name))?;
    process::run(Command::new("gzip").args(["-9n", "--force"]).arg(&plain))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_for_everybody_to_read_whatever_the_umask() {
        let dir = tempfile::tempdir().unwrap();
        let stage = Stage::new(dir.path().join("stage")).unwrap();
        stage.put("a/b/c", b"text", 0o755).unwrap();
        let mode = |path: &str| fs::metadata(stage.root().join(path)).unwrap().permissions().mode() & 0o777;
        assert_eq!([mode("a"), mode("a/b"), mode("a/b/c")], [0o755; 3]);
        stage.put_gz("d", b"text").unwrap();
        assert!(stage.root().join("d.gz").is_file() && !stage.root().join("d").exists());
        assert!(Stage::new(stage.root().to_owned()).unwrap().root().read_dir().unwrap().next().is_none());
    }
}
