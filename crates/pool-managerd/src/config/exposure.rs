//! Who can reach the API, and what that asks for.

use std::net::SocketAddr;

use super::check::path;
use super::raw::{RawAuth, RawConfig, RawTls};
use super::source::Source;
use super::{At, Auth, ConfigError, Profile, Step, Tls};

/// Where tokens are looked for unless the config says otherwise.
const TOKENS_ENV: &str = "POOL_MANAGERD_TOKENS";

pub(super) fn auth(raw: Option<&RawAuth>, source: &Source) -> Result<Option<Auth>, ConfigError> {
    let Some(raw) = raw else { return Ok(None) };
    let at = |key: &'static str| [Step::Key("auth"), Step::Key(key)];
    let file = raw.tokens_file.as_deref().map(|f| path(f, source, At::Key(&at("tokens_file")))).transpose()?;
    let env = match &raw.tokens_env {
        Some(name) if name.is_empty() || name.contains(['=', '\0']) => {
            return Err(source.error(At::Key(&at("tokens_env")), "it is no name of a variable"));
        }
        Some(name) => Some(name.clone()),
        None if file.is_none() => Some(TOKENS_ENV.to_owned()),
        None => None,
    };
    Ok(Some(Auth { file, env }))
}

pub(super) fn tls(raw: Option<&RawTls>, source: &Source) -> Result<Option<Tls>, ConfigError> {
    let Some(raw) = raw else { return Ok(None) };
    let at = |key: &'static str| [Step::Key("tls"), Step::Key(key)];
    Ok(Some(Tls {
        cert: path(&raw.cert, source, At::Key(&at("cert")))?,
        key: path(&raw.key, source, At::Key(&at("key")))?,
    }))
}

/// Refuses what everyone could use who reaches it, unless somebody wants it so.
pub(super) fn reachable(
    raw: &RawConfig,
    listen: SocketAddr,
    listen_at: At<'_>,
    source: &Source,
) -> Result<(), ConfigError> {
    if raw.node.insecure {
        return Ok(());
    }
    let profile_at = [Step::Key("node"), Step::Key("profile")];
    if raw.node.profile == Profile::Cloud && raw.auth.is_none() {
        return Err(source.error(At::Key(&profile_at), "the cloud profile requires tokens").hinting(
            "add [auth] with tokens_file, or set insecure = true in [node] if whoever reaches it may do everything",
        ));
    }
    if listen.ip().is_loopback() {
        return Ok(());
    }
    let (lacks, hint) = match (raw.auth.is_some(), raw.tls.is_some()) {
        (true, true) => return Ok(()),
        (false, false) => {
            ("everyone who reaches it could do everything", "add [auth] with tokens_file and [tls] with cert and key")
        }
        (false, true) => ("everyone who reaches it could do everything", "add [auth] with tokens_file"),
        (true, false) => ("tokens would cross the network for everybody to read", "add [tls] with cert and key"),
    };
    Err(source
        .error(listen_at, format!("{listen} is not loopback: {lacks}"))
        .hinting(format!("{hint}; or listen on 127.0.0.1, or set insecure = true in [node] if the network is trusted")))
}
