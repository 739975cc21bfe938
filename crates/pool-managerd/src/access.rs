//! Tokens and certificates: read at the start, and again when their files change. One task owns them; what cannot be read
//! then leaves in force what was.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use pool_api::server::tls::{ServerConfig, server_config};
use pool_api::server::{Access, Tokens};
use rustix::fs::OFlags;
use tokio::sync::{Notify, watch};
use tokio::time::{MissedTickBehavior, interval};

use crate::config::{Auth, Config, Tls};
use crate::exit::{CONFIG, Exit};

/// No file of tokens, certificates or keys is larger.
const MAX_BYTES: u64 = 256 * 1024;
/// Between two looks at the files.
const LOOK: Duration = Duration::from_secs(5);

/// What the way in needs.
#[derive(Debug)]
pub(crate) struct Keys {
    pub(crate) access: Access,
    pub(crate) tls: Option<watch::Receiver<Arc<ServerConfig>>>,
    pub(crate) keeper: Keeper,
}

/// Reads what the config names.
///
/// # Errors
/// Exit 78 when tokens or certificates cannot be read, or are none.
pub(crate) fn open(config: &Config) -> Result<Keys, Exit> {
    let tokens = config.auth.as_ref().map(|auth| tokens(auth).map(Arc::new)).transpose()?;
    let tls = config.tls.as_ref().map(certificates).transpose()?;
    let tokens = tokens.map(watch::Sender::new);
    let tls = tls.map(watch::Sender::new);
    Ok(Keys {
        access: tokens.as_ref().map_or(Access::Open, |t| Access::Tokens(t.subscribe())),
        tls: tls.as_ref().map(watch::Sender::subscribe),
        keeper: Keeper { tokens: config.auth.clone().zip(tokens), tls: config.tls.clone().zip(tls) },
    })
}

fn read(path: &Path, what: &str, for_us_alone: bool) -> Result<Vec<u8>, Exit> {
    let failed = |e: std::io::Error| Exit::new(CONFIG, format!("{what} {}: {e}", path.display()));
    // A pipe that nobody writes to would hold up the daemon; what is then read is what was looked at.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(failed)?;
    let told = file.metadata().map_err(failed)?;
    if for_us_alone && !closed(told.mode(), told.uid(), rustix::process::geteuid().as_raw()) {
        let (mode, path) = (told.mode() & 0o777, path.display());
        return Err(Exit::new(CONFIG, format!("{what} {path}: others may read it (mode {mode:o})"))
            .hinting(format!("chmod 600 {path}")));
    }
    if !told.is_file() || told.len() > MAX_BYTES {
        return Err(Exit::new(CONFIG, format!("{what} {}: is no file of at most 256 KiB", path.display())));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

/// Whether a file of this mode and owner is the daemon's alone. One that root gave to the daemon's group is, too: a daemon that is
/// not root gets its secrets so, from packages and in pods.
fn closed(mode: u32, owner: u32, daemon: u32) -> bool {
    let others = if owner == 0 && daemon != 0 { 0o037 } else { 0o077 };
    mode & others == 0
}

fn tokens(auth: &Auth) -> Result<Tokens, Exit> {
    const WHAT: &str = "[auth] tokens_file";
    let mut text = String::new();
    if let Some(file) = &auth.file {
        let bytes = read(file, WHAT, true)?;
        text = String::from_utf8(bytes)
            .map_err(|_| Exit::new(CONFIG, format!("{WHAT} {}: is no text", file.display())))?;
    }
    if let Some(value) = auth.env.as_ref().and_then(std::env::var_os) {
        let value = value.into_string().map_err(|_| Exit::new(CONFIG, "the tokens of the environment are no text"))?;
        // After the lines of the file, so that their numbers stay true.
        text = text + "\n" + &value;
    }
    Tokens::parse(&text).map_err(|e| {
        let place = auth.file.as_ref().map(|f| f.display().to_string());
        let place = place.or_else(|| auth.env.as_ref().map(|name| format!("${name}"))).unwrap_or_default();
        Exit::new(CONFIG, format!("[auth] {place}: {e}")).hinting("one token a line: TOKEN read,lease,admin [TENANT]")
    })
}

fn certificates(tls: &Tls) -> Result<Arc<ServerConfig>, Exit> {
    let chain = read(&tls.cert, "[tls] cert", false)?;
    let key = read(&tls.key, "[tls] key", true)?;
    let (cert, key_file) = (tls.cert.display(), tls.key.display());
    server_config(&chain, &key).map_err(|e| Exit::new(CONFIG, format!("[tls] {cert}, {key_file}: {e}")))
}

/// How a file is at present, as far as it tells whether another one is there.
type Stamp = Option<(u64, u64, SystemTime)>;

fn stamp(path: &Path) -> Stamp {
    let told = fs::metadata(path).ok()?;
    Some((told.ino(), told.len(), told.modified().ok()?))
}

/// The only writer of tokens and certificates.
#[derive(Debug)]
pub(crate) struct Keeper {
    tokens: Option<(Auth, watch::Sender<Arc<Tokens>>)>,
    tls: Option<(Tls, watch::Sender<Arc<ServerConfig>>)>,
}

impl Keeper {
    fn stamps(&self) -> Vec<Stamp> {
        let tokens = self.tokens.iter().filter_map(|(auth, _)| auth.file.as_deref());
        let tls = self.tls.iter().flat_map(|(tls, _)| [tls.cert.as_path(), tls.key.as_path()]);
        tokens.chain(tls).map(stamp).collect()
    }

    /// Reads the files again when they changed, or when `again` is rung.
    pub(crate) async fn run(self, again: Arc<Notify>) {
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut seen = self.stamps();
        loop {
            let asked = tokio::select! {
                biased;
                () = again.notified() => true,
                _ = looks.tick() => false,
            };
            let now = self.stamps();
            if asked || now != seen {
                seen = now;
                self.renew();
            }
        }
    }

    fn renew(&self) {
        let told = |what, renewed: Result<(), Exit>| match renewed {
            Ok(()) => tracing::info!(what, "read again"),
            Err(exit) => tracing::error!(
                what,
                error = exit.message,
                hint = exit.hints.join("; "),
                "cannot be read: those from before stay in force"
            ),
        };
        if let Some((auth, tx)) = &self.tokens {
            told("tokens", tokens(auth).map(|t| drop(tx.send_replace(Arc::new(t)))));
        }
        if let Some((tls, tx)) = &self.tls {
            told("certificates", certificates(tls).map(|c| drop(tx.send_replace(c))));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::closed;

    #[test]
    fn a_secret_is_the_daemon_s_alone_or_root_s_gift_to_its_group() {
        const ROOT: u32 = 0;
        const DAEMON: u32 = 65_532;
        for (mode, owner, daemon, expected) in [
            (0o600, DAEMON, DAEMON, true),
            (0o640, DAEMON, DAEMON, false),
            (0o440, ROOT, DAEMON, true),
            (0o640, ROOT, DAEMON, true),
            (0o660, ROOT, DAEMON, false),
            (0o444, ROOT, DAEMON, false),
            (0o440, ROOT, ROOT, false),
            (0o440, DAEMON, ROOT, false),
            (0o100_400, ROOT, ROOT, true),
        ] {
            assert_eq!(closed(mode, owner, daemon), expected, "{mode:o} of {owner} for {daemon}");
        }
    }
}
