//! The socket of the daemon's own user.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;

use pool_api::server::Door;
use tokio::net::UnixListener;

use crate::config::Config;
use crate::exit::{CONFIG, Exit};

/// Opens it, if the config names one. One that a daemon left behind is replaced.
///
/// # Errors
/// Exit 78 when it cannot be, or somebody serves there.
pub(crate) fn bind(config: &Config) -> Result<Option<Door>, Exit> {
    let Some(path) = &config.node.socket else { return Ok(None) };
    let shown = path.display();
    let failed = |e: std::io::Error| {
        Exit::new(CONFIG, format!("cannot listen on {shown}: {e}"))
            .hinting("name a socket in a directory that is there and that this user may write to")
    };
    if let Ok(there) = fs::symlink_metadata(path) {
        if !there.file_type().is_socket() {
            return Err(Exit::new(CONFIG, format!("cannot listen on {shown}: something else is there")));
        }
        if UnixStream::connect(path).is_ok() {
            return Err(Exit::new(CONFIG, format!("cannot listen on {shown}: somebody serves there already")));
        }
        fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    // Until here others could connect; who they are is looked at for each connection.
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(Some(Door::Unix(listener, rustix::process::geteuid().as_raw())))
}
