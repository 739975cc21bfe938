//! The Debian package, by dpkg-deb.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::Release;
use super::stage::{COMPLETIONS, Stage, told};
use crate::error::{self, Error, Result};
use crate::process;

const SCRIPTS: &[&str] = &["postinst", "prerm", "postrm"];

/// Debian's word for this machine's kind of processor.
pub(super) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Makes the package and says where it is.
pub(super) fn build(release: &Release, licences: &str) -> Result<PathBuf> {
    let stage = Stage::new(release.out.join("stage/deb"))?;
    let program = fs::read(&release.program).map_err(error::io(&release.program))?;
    stage.put("usr/bin/pool-managerd", &program, 0o755)?;
    for (to, shell) in COMPLETIONS {
        stage.put(&format!("usr/{to}"), told(&release.program, &["completions", shell])?.as_bytes(), 0o644)?;
    }
    for (to, page) in man_pages(release)? {
        stage.put_gz(&format!("usr/{to}"), page.as_bytes())?;
    }
    let doc = "usr/share/doc/pool-managerd";
    for (from, to) in [
        ("deploy/systemd/pool-managerd.service", "usr/lib/systemd/system/pool-managerd.service"),
        ("deploy/debian/pool-managerd.toml", "etc/pool-managerd/pool-managerd.toml"),
        ("README.md", &format!("{doc}/README.md")),
        ("LICENSE-MIT", &format!("{doc}/LICENSE-MIT")),
        ("deploy/debian/copyright", &format!("{doc}/copyright")),
        ("config/pool-managerd.example.toml", &format!("{doc}/examples/pool-managerd.example.toml")),
        ("deploy/prometheus/pool-managerd.rules.yml", &format!("{doc}/examples/pool-managerd.rules.yml")),
        ("deploy/grafana/pool-managerd.json", &format!("{doc}/examples/grafana.json")),
    ] {
        stage.copy(from, to, 0o644)?;
    }
    stage.put_gz(&format!("{doc}/LICENCES.txt"), licences.as_bytes())?;
    for script in SCRIPTS {
        stage.copy(&format!("deploy/debian/{script}"), &format!("DEBIAN/{script}"), 0o755)?;
    }
    stage.put("DEBIAN/conffiles", b"/etc/pool-managerd/pool-managerd.toml\n", 0o644)?;
    stage.put("DEBIAN/control", control(release, &program)?.as_bytes(), 0o644)?;

    let file = release.out.join(format!("pool-managerd_{}_{}.deb", release.deb_version, architecture()));
    let mut dpkg = Command::new("dpkg-deb");
    // It dates what is newer than SOURCE_DATE_EPOCH with that; everything here was just written.
    dpkg.args(["--root-owner-group", "-Zxz", "--build"]).arg(stage.root()).arg(&file);
    process::output(dpkg.env("SOURCE_DATE_EPOCH", release.epoch.to_string()))?;
    Ok(file)
}

fn control(release: &Release, program: &[u8]) -> Result<String> {
    let glibc = glibc(program).ok_or_else(|| {
        Error::Check(format!("{}: needs no glibc, so NVML cannot be loaded", release.program.display()))
    })?;
    let (version, arch) = (&release.deb_version, architecture());
    Ok(format!(
        "Package: pool-managerd\nVersion: {version}\nArchitecture: {arch}\nSection: net\nPriority: optional\n\
         Maintainer: the pool-managerd maintainers <pool-managerd@localhost>\n\
         Depends: adduser, init-system-helpers (>= 1.52), libc6 (>= {}.{}), libgcc-s1\n\
         Description: LLM engines on the GPUs of this node\n \
         Runs LLM inference engines on NVIDIA GPUs and keeps them true to their word: one is\n \
         called ready only when it has proved that it serves, it is restarted with backoff\n \
         when it dies, and drained before it is stopped.\n",
        glibc.0, glibc.1
    ))
}

/// The newest version of glibc whose symbols a program asks for.
fn glibc(program: &[u8]) -> Option<(u32, u32)> {
    const MARK: &[u8] = b"GLIBC_";
    let number = |digits: &[u8]| std::str::from_utf8(digits).ok()?.parse().ok();
    program
        .windows(MARK.len())
        .enumerate()
        .filter(|(_, part)| *part == MARK)
        .filter_map(|(at, _)| {
            let rest = program.get(at + MARK.len()..)?;
            let text = rest.get(..rest.iter().position(|byte| *byte == 0)?)?;
            let mut parts = text.split(|byte| *byte == b'.');
            Some((number(parts.next()?)?, number(parts.next()?)?))
        })
        .max()
}

/// Man pages as the program writes them: path below the prefix, and contents.
pub(super) fn man_pages(release: &Release) -> Result<Vec<(String, String)>> {
    let dir = Stage::new(release.out.join("stage/man"))?;
    process::run(Command::new(&release.program).arg("man").arg(dir.root()).env_clear())?;
    let mut pages = Vec::new();
    for entry in fs::read_dir(dir.root()).map_err(error::io(dir.root()))? {
        let path = entry.map_err(error::io(dir.root()))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        pages.push((format!("share/man/man1/{name}"), fs::read_to_string(&path).map_err(error::io(&path))?));
    }
    pages.sort();
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_glibc_counts_as_a_number() {
        assert_eq!(glibc(b"x\0GLIBC_2.9\0GLIBC_2.34\0GLIBC_2.2.5\0GLIBC_PRIVATE\0"), Some((2, 34)));
        assert_eq!(glibc(b"nothing"), None);
    }
}
