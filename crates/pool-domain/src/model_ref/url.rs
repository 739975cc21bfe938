//! Web addresses, read strictly: whoever decides by one and whoever connects to one must see the same host and path.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use thiserror::Error;

/// Why a text is no address that is followed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum UrlError {
    /// Not `http://` or `https://`.
    #[error("it does not begin with https:// (or http://)")]
    Scheme,
    /// Too long, or a character that belongs into no address.
    #[error("it has the character {0:?}, which has to be percent-encoded or left out")]
    Character(char),
    /// More than an address has.
    #[error("it is longer than {MAX} bytes")]
    TooLong,
    /// `user:password@`.
    #[error("it names a user: tokens belong into `[models.tokens]`")]
    UserInfo,
    /// The host is no name and no address.
    #[error("`{0}` is no host name and no IP address")]
    Host(String),
    /// The port is none.
    #[error("`{0}` is no port")]
    Port(String),
    /// A path that another reader could take for another one.
    #[error("its path has an empty, `.` or `..` part, or one that is hidden behind percent signs")]
    Path,
}

/// No address is longer, signed ones included.
const MAX: usize = 8192;

/// The host of an address.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// A name, in lower case.
    Name(String),
    /// An address.
    V4(Ipv4Addr),
    /// An address.
    V6(Ipv6Addr),
}

impl Host {
    fn parse(text: &str) -> Result<Self, UrlError> {
        let wrong = || UrlError::Host(text.to_owned());
        if let Some(v6) = text.strip_prefix('[') {
            let v6 = v6.strip_suffix(']').ok_or_else(wrong)?;
            return v6.parse().map(Self::V6).map_err(|_| wrong());
        }
        let name = text.to_ascii_lowercase();
        let last = name.rsplit('.').next().unwrap_or_default();
        // `0x7f.1`, `2130706433` and `127.1` are addresses to some readers: only the plain form is one here.
        if last.starts_with(|c: char| c.is_ascii_digit()) {
            return name.parse().map(Self::V4).map_err(|_| wrong());
        }
        let label = |l: &str| {
            let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
            !l.is_empty() && l.len() <= 63 && !l.starts_with('-') && !l.ends_with('-') && l.bytes().all(inner)
        };
        if name.len() <= 253 && name.split('.').all(label) { Ok(Self::Name(name)) } else { Err(wrong()) }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::V4(v4) => v4.fmt(f),
            Self::V6(v6) => write!(f, "[{v6}]"),
        }
    }
}

/// Who is asked: scheme, host and port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Origin {
    /// `https`, not `http`.
    pub secure: bool,
    /// The host.
    pub host: Host,
    /// The port.
    pub port: u16,
}

impl Origin {
    fn usual_port(&self) -> bool {
        self.port == if self.secure { 443 } else { 80 }
    }

    /// Host and port as a `Host` header has them: the usual port is left out.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.usual_port() { self.host.to_string() } else { format!("{}:{}", self.host, self.port) }
    }

    fn parse(text: &str, secure: bool) -> Result<Self, UrlError> {
        if text.contains('@') {
            return Err(UrlError::UserInfo);
        }
        let after_host = text.rfind(']').map_or(0, |i| i + 1);
        let (host, port) = match text[after_host..].rfind(':') {
            Some(i) => (&text[..after_host + i], Some(&text[after_host + i + 1..])),
            None => (text, None),
        };
        let usual = if secure { 443 } else { 80 };
        let port = match port {
            None => usual,
            Some(p) if p.bytes().all(|b| b.is_ascii_digit()) && !p.starts_with('0') => {
                p.parse().map_err(|_| UrlError::Port(p.to_owned()))?
            }
            Some(p) => return Err(UrlError::Port(p.to_owned())),
        };
        Ok(Self { secure, host: Host::parse(host)?, port })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.secure { "https" } else { "http" }, self.authority())
    }
}

/// An address to fetch from. It is shown without its query, in which signatures stand.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct HttpUrl {
    origin: Origin,
    path: String,
    query: Option<String>,
}

impl HttpUrl {
    /// Reads an address; a fragment is none of it.
    ///
    /// # Errors
    /// When it is none, or one that could be read in two ways.
    pub fn parse(text: &str) -> Result<Self, UrlError> {
        if text.len() > MAX {
            return Err(UrlError::TooLong);
        }
        if let Some(c) = text.chars().find(|c| !c.is_ascii_graphic() || "\"<>\\^`{|}".contains(*c)) {
            return Err(UrlError::Character(c));
        }
        let (secure, rest) = match text.split_once("://") {
            Some((s, rest)) if s.eq_ignore_ascii_case("https") => (true, rest),
            Some((s, rest)) if s.eq_ignore_ascii_case("http") => (false, rest),
            _ => return Err(UrlError::Scheme),
        };
        let rest = rest.split_once('#').map_or(rest, |(before, _)| before);
        let (rest, query) = rest.split_once('?').map_or((rest, None), |(before, q)| (before, Some(q.to_owned())));
        let (authority, path) = rest.find('/').map_or((rest, "/"), |i| (&rest[..i], &rest[i..]));
        check_path(path)?;
        Ok(Self { origin: Origin::parse(authority, secure)?, path: path.to_owned(), query })
    }

    /// Where a `Location` of an answer from here leads.
    ///
    /// # Errors
    /// When it is no address.
    pub fn join(&self, location: &str) -> Result<Self, UrlError> {
        let scheme = if self.origin.secure { "https" } else { "http" };
        let before_query = location.split(['?', '#']).next().unwrap_or_default();
        if before_query.contains("://") {
            Self::parse(location)
        } else if location.starts_with("//") {
            Self::parse(&format!("{scheme}:{location}"))
        } else if location.starts_with('/') {
            Self::parse(&format!("{}{location}", self.origin))
        } else {
            let folder = self.path.rsplit_once('/').map_or("", |(folder, _)| folder);
            Self::parse(&format!("{}{folder}/{location}", self.origin))
        }
    }

    /// The address of a path below this one. Each part is percent-encoded.
    #[must_use]
    pub fn below(&self, path: &str) -> Self {
        let mut whole = self.path.trim_end_matches('/').to_owned();
        for part in path.split('/') {
            whole.push('/');
            whole.push_str(&encoded(part));
        }
        Self { origin: self.origin.clone(), path: whole, query: None }
    }

    /// With this query, already encoded.
    #[must_use]
    pub fn with_query(mut self, query: impl Into<String>) -> Self {
        self.query = Some(query.into());
        self
    }

    /// Who is asked.
    #[must_use]
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The path, which begins with `/`.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The query, without its question mark.
    #[must_use]
    pub fn query(&self) -> Option<&str> {
        self.query.as_deref()
    }

    /// The whole of it, with what may be secret.
    #[must_use]
    pub fn revealed(&self) -> String {
        match &self.query {
            Some(query) => format!("{self}?{query}"),
            None => self.to_string(),
        }
    }
}

impl fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.origin, self.path)
    }
}

impl fmt::Debug for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}{}", if self.query.is_some() { "?…" } else { "" })
    }
}

/// One part of a path as it stands in an address.
fn encoded(part: &str) -> String {
    let mut text = String::with_capacity(part.len());
    for byte in part.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

/// A server may decode what stands behind percent signs before it looks for dots and slashes.
fn check_path(path: &str) -> Result<(), UrlError> {
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            continue;
        }
        let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16));
        let (Some(high), Some(low)) = (digit(bytes.next()), digit(bytes.next())) else { return Err(UrlError::Path) };
        let code = high * 16 + low;
        if code < 0x20 || code == 0x7f || [b'.', b'/', b'\\', b'%'].iter().any(|b| u32::from(*b) == code) {
            return Err(UrlError::Path);
        }
    }
    let mut parts = path.split('/').skip(1).peekable();
    while let Some(part) = parts.next() {
        // The last part of a folder is empty.
        if part == "." || part == ".." || part.is_empty() && parts.peek().is_some() {
            return Err(UrlError::Path);
        }
    }
    Ok(())
}
