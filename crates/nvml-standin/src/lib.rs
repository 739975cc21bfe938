//! A stand-in for `libnvidia-ml.so.1`, NVIDIA's driver library, for machines without a GPU: it exports what nvml-wrapper
//! loads and plays a script.
//!
//! It is loaded like the real one, by its name (`LD_LIBRARY_PATH`) or by its path. The script is the file that
//! [`SCRIPT_ENV`] names, else the one beside the library with `.toml` added to its name; it is read again whenever it
//! changes, so that devices can be made to fail while a daemon looks at them. [`script::Script`] says what can stand there.
//!
//! It cannot be mistaken for the real one: the driver's version is [`DRIVER_VERSION`], and every name begins with
//! [`NAME_PREFIX`].

mod clock;
mod ffi;
mod out;
pub mod script;
mod world;

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

pub use script::Script;

/// Names the script.
pub const SCRIPT_ENV: &str = "POOL_NVML_STANDIN";

/// What it says of itself when it is asked for the driver's version.
pub const DRIVER_VERSION: &str = "0.0 (stand-in, no GPU)";

/// Before every device's name.
pub const NAME_PREFIX: &str = "STAND-IN ";

/// The name by which the real library is loaded.
pub const SONAME: &str = "libnvidia-ml.so.1";

/// A library of this crate in a directory of its own, with its script.
#[derive(Debug)]
pub struct Installed {
    dir: PathBuf,
}

impl Installed {
    /// Puts the library that was built along with this program into a directory, under the name of the real one.
    ///
    /// # Errors
    /// When it was not built, or the directory cannot be written.
    pub fn into_dir(dir: &Path, script: &Script) -> io::Result<Self> {
        // Programs of examples lie beside the folder that tests and benches are in.
        let program = std::env::current_exe()?;
        let places = ["libnvml_standin.so", "../deps/libnvml_standin.so"];
        let built = program
            .parent()
            .and_then(|dir| places.iter().map(|place| dir.join(place)).find(|library| library.is_file()))
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "libnvml_standin.so is not beside this program"))?;
        symlink(built, dir.join(SONAME))?;
        let this = Self { dir: dir.to_owned() };
        this.play(script)?;
        Ok(this)
    }

    /// The library.
    #[must_use]
    pub fn library(&self) -> PathBuf {
        self.dir.join(SONAME)
    }

    /// Where it lies, for `LD_LIBRARY_PATH`.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where engines leave their claims if the script names no other directory.
    #[must_use]
    pub fn claims(&self) -> PathBuf {
        self.dir.join(world::CLAIMS)
    }

    /// Has it play another script from now on.
    ///
    /// # Errors
    /// What the file system says.
    pub fn play(&self, script: &Script) -> io::Result<()> {
        let text = toml::to_string(script).map_err(io::Error::other)?;
        let path = world::beside(&self.library());
        let new = path.with_extension("new");
        std::fs::write(&new, text)?;
        std::fs::rename(new, path)
    }
}
