//! Which models may be fetched, from where, and over which connections. Nothing is, unless it is allowed.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use thiserror::Error;

use crate::model_ref::{Host, HttpUrl, Origin, RemoteSource};

/// The public hub.
pub const HF_ENDPOINT: &str = "https://huggingface.co";
/// Where the public hub keeps large files: names below these.
const HF_STORAGE: [&str; 2] = ["huggingface.co", "hf.co"];

/// One entry of `[models] allow`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    what: What,
    rest: Glob,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    Hf,
    S3,
    Oci { registry: String },
    Http { secure: bool, hosts: Hosts, port: u16 },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Hosts {
    /// This one, which may be of a private network.
    One(Host),
    /// All below this name, public ones only.
    Below(String),
    /// All, public ones only.
    Any,
}

/// A text, or the beginning of one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Glob {
    text: String,
    open: bool,
}

impl Glob {
    fn parse(text: &str) -> Result<Self, AllowError> {
        let (start, open) = text.strip_suffix('*').map_or((text, false), |start| (start, true));
        if start.contains('*') { Err(AllowError::Star) } else { Ok(Self { text: start.to_owned(), open }) }
    }

    fn fits(&self, text: &str) -> bool {
        if self.open { text.starts_with(&self.text) } else { text == self.text }
    }
}

/// Why an entry cannot be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AllowError {
    /// Of no known form.
    #[error("it is none of hf:…, https://…, http://…, s3://… and oci://…")]
    Form,
    /// A star in the middle.
    #[error("`*` stands at the end, or for the first part of a host name")]
    Star,
    /// Plain HTTP to whomever.
    #[error("http:// is read by everybody on the way: name the host in full")]
    Plain,
    /// The address is none.
    #[error("{0}")]
    Address(String),
}

impl FromStr for Allowed {
    type Err = AllowError;
    fn from_str(text: &str) -> Result<Self, AllowError> {
        let (scheme, rest) = text.split_once(':').ok_or(AllowError::Form)?;
        let slashes = || rest.strip_prefix("//").ok_or(AllowError::Form);
        let (what, rest) = match scheme {
            "hf" if !rest.starts_with("//") => (What::Hf, rest),
            "s3" => (What::S3, slashes()?),
            "oci" => {
                let (registry, rest) = slashes()?.split_once('/').unwrap_or((slashes()?, ""));
                let url = address(&format!("https://{registry}/"))?;
                (What::Oci { registry: url.origin().authority() }, rest)
            }
            "http" | "https" => return web(slashes()?, scheme == "https"),
            _ => return Err(AllowError::Form),
        };
        Ok(Self { what, rest: Glob::parse(rest)? })
    }
}

fn address(text: &str) -> Result<HttpUrl, AllowError> {
    HttpUrl::parse(text).map_err(|e| AllowError::Address(e.to_string()))
}

fn web(text: &str, secure: bool) -> Result<Allowed, AllowError> {
    let (authority, path) = text.find('/').map_or((text, "/"), |i| (&text[..i], &text[i..]));
    let (name, any) = match authority.strip_prefix('*') {
        Some("") => ("any.invalid", Some(None)),
        Some(below) => {
            let name = below.strip_prefix('.').ok_or(AllowError::Star)?;
            (name, Some(Some(name)))
        }
        None => (authority, None),
    };
    let scheme = if secure { "https" } else { "http" };
    let rest = Glob::parse(path)?;
    let url = address(&format!("{scheme}://{name}{}", rest.text))?;
    let Origin { host, port, .. } = url.origin().clone();
    let hosts = match (any, host) {
        (Some(_), _) if !secure => return Err(AllowError::Plain),
        (Some(None), _) => Hosts::Any,
        (Some(Some(_)), Host::Name(name)) => Hosts::Below(name),
        (Some(Some(_)), _) => return Err(AllowError::Star),
        (None, host) => Hosts::One(host),
    };
    Ok(Allowed { what: What::Http { secure, hosts, port }, rest })
}

impl Allowed {
    /// An entry for this source alone: who names it on the command line allows it by that.
    ///
    /// # Errors
    /// When its name could stand for others.
    pub fn exactly(source: &RemoteSource) -> Result<Self, AllowError> {
        match source {
            RemoteSource::Oci(oci) => format!("oci://{}/{}", oci.registry, oci.repo).parse(),
            other => other.to_string().parse(),
        }
    }

    fn fits(&self, source: &RemoteSource) -> bool {
        match (&self.what, source) {
            (What::Hf, RemoteSource::Hf(hf)) => self.rest.fits(&hf.repo) || self.rest.fits(&hf_name(hf)),
            (What::S3, RemoteSource::S3 { bucket, key }) => self.rest.fits(&format!("{bucket}/{key}")),
            (What::Oci { registry }, RemoteSource::Oci(oci)) => *registry == oci.registry && self.rest.fits(&oci.repo),
            (What::Http { .. }, RemoteSource::Http(url)) => self.fits_url(url),
            _ => false,
        }
    }

    fn fits_url(&self, url: &HttpUrl) -> bool {
        let What::Http { secure, hosts, port } = &self.what else { return false };
        let origin = url.origin();
        let host = match (hosts, &origin.host) {
            (Hosts::One(one), host) => one == host,
            (Hosts::Below(name), Host::Name(host)) => is_below(host, name),
            (Hosts::Any, Host::Name(_)) => true,
            // An address is not a name: it is named in full or not at all.
            _ => false,
        };
        host && *secure == origin.secure && *port == origin.port && self.rest.fits(url.path())
    }

    /// Whether the host of this address is named in full.
    fn names(&self, origin: &Origin) -> bool {
        match &self.what {
            What::Http { secure, hosts: Hosts::One(host), port } => {
                (secure, host, port) == (&origin.secure, &origin.host, &origin.port)
            }
            What::Oci { registry } => *registry == origin.authority(),
            _ => false,
        }
    }
}

/// `org/repo@revision/file`
fn hf_name(hf: &crate::model_ref::HfRef) -> String {
    RemoteSource::Hf(hf.clone()).to_string().split_off("hf:".len())
}

fn is_below(host: &str, name: &str) -> bool {
    host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
}

/// Why a model is not fetched, or not from there.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Denied {
    /// No entry allows it.
    #[error("no entry of `[models] allow` allows to fetch `{0}`")]
    NotAllowed(String),
    /// Nothing is fetched.
    #[error("`[models] offline` is set, and the model is not in the cache")]
    Offline,
    /// An answer leads to where nothing may be fetched from.
    #[error("it leads to {0}, from where no entry of `[models] allow` allows to fetch")]
    Elsewhere(String),
    /// A host that only a private network has.
    #[error("{0} is of this machine or a private network: an entry of `[models] allow` has to name the host in full")]
    Private(String),
}

/// What may be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPolicy {
    /// What is allowed.
    pub allow: Vec<Allowed>,
    /// Nothing is fetched, whatever is allowed; what is in the cache is used.
    pub offline: bool,
    /// The Hugging Face hub, or what stands in for it.
    pub hf_endpoint: HttpUrl,
    /// What stands in for the S3 of Amazon.
    pub s3_endpoint: Option<HttpUrl>,
}

impl ModelPolicy {
    /// Whether a pool may name this model.
    ///
    /// # Errors
    /// When nothing allows it.
    pub fn may_name(&self, source: &RemoteSource) -> Result<(), Denied> {
        if self.allow.iter().any(|a| a.fits(source)) { Ok(()) } else { Err(Denied::NotAllowed(source.to_string())) }
    }

    /// Whether this address may be asked for the sake of a model that may be named; asked again at each redirect.
    ///
    /// # Errors
    /// When it may not.
    pub fn may_ask(&self, source: &RemoteSource, url: &HttpUrl) -> Result<(), Denied> {
        if self.offline {
            return Err(Denied::Offline);
        }
        let origin = url.origin();
        let home = self.home(source).is_some_and(|home| home.origin() == origin);
        let storage = matches!(source, RemoteSource::Hf(_)) && self.is_hub_storage(origin);
        let registry = matches!(source, RemoteSource::Oci(oci) if oci.registry == origin.authority());
        let bucket = matches!(source, RemoteSource::S3 { .. }) && self.s3_endpoint.is_none() && is_amazon(origin);
        if home
            || storage
            || registry && self.plain_enough(origin)
            || bucket
            || self.allow.iter().any(|a| a.fits_url(url))
        {
            Ok(())
        } else {
            Err(Denied::Elsewhere(origin.to_string()))
        }
    }

    /// Whether a connection to this address of a host may be made.
    ///
    /// # Errors
    /// When the address is of this machine or a private network, and nobody named the host.
    pub fn may_connect(&self, source: &RemoteSource, origin: &Origin, to: IpAddr) -> Result<(), Denied> {
        let named = self.is_named(source, origin);
        let fine = match reach(to) {
            Reach::Public => true,
            Reach::Private => named,
            // A name never leads there, whoever answers for it: only the address itself, or `localhost`, does.
            Reach::Local => {
                named
                    && match &origin.host {
                        Host::Name(name) => name == "localhost",
                        Host::V4(_) | Host::V6(_) => true,
                    }
            }
        };
        if fine { Ok(()) } else { Err(Denied::Private(origin.host.to_string())) }
    }

    /// The service that serves a source, where the operator chooses it.
    #[must_use]
    pub fn home(&self, source: &RemoteSource) -> Option<&HttpUrl> {
        match source {
            RemoteSource::Hf(_) => Some(&self.hf_endpoint),
            RemoteSource::S3 { .. } => self.s3_endpoint.as_ref(),
            RemoteSource::Http(_) | RemoteSource::Oci(_) => None,
        }
    }

    fn is_named(&self, source: &RemoteSource, origin: &Origin) -> bool {
        let home = self.home(source).is_some_and(|home| home.origin() == origin);
        home || self.allow.iter().any(|a| a.names(origin))
    }

    fn is_hub_storage(&self, origin: &Origin) -> bool {
        let public = HttpUrl::parse(HF_ENDPOINT).is_ok_and(|public| public.origin() == self.hf_endpoint.origin());
        let Host::Name(host) = &origin.host else { return false };
        public && origin.secure && origin.port == 443 && HF_STORAGE.iter().any(|name| is_below(host, name))
    }

    /// A registry without TLS is one on this machine.
    fn plain_enough(&self, origin: &Origin) -> bool {
        origin.secure || is_loopback(&origin.host)
    }
}

/// Whether a host is this machine by its own words.
#[must_use]
pub fn is_loopback(host: &Host) -> bool {
    match host {
        Host::Name(name) => name == "localhost",
        Host::V4(v4) => v4.is_loopback(),
        Host::V6(v6) => v6.is_loopback(),
    }
}

fn is_amazon(origin: &Origin) -> bool {
    matches!(&origin.host, Host::Name(name) if origin.secure && origin.port == 443 && is_below(name, "amazonaws.com"))
}

/// How far an address reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reach {
    Public,
    /// A private network.
    Private,
    /// This machine, its link (where clouds answer with secrets), or nobody.
    Local,
}

fn reach(to: IpAddr) -> Reach {
    match to {
        IpAddr::V4(v4) => reach_v4(v4),
        IpAddr::V6(v6) => reach_v6(v6),
    }
}

fn reach_v4(v4: Ipv4Addr) -> Reach {
    let [a, b, c, _] = v4.octets();
    let local = v4.is_loopback() || v4.is_link_local() || v4.is_multicast() || a == 0 || a >= 240;
    // Shared address space, protocol assignments, documentation, benchmarks.
    let special = (a, b & 0xc0) == (100, 64)
        || (a, b, c) == (192, 0, 0)
        || (a, b & 0xfe) == (198, 18)
        || v4.is_documentation()
        || v4.is_private();
    if local {
        Reach::Local
    } else if special {
        Reach::Private
    } else {
        Reach::Public
    }
}

fn reach_v6(v6: Ipv6Addr) -> Reach {
    let s = v6.segments();
    let low = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        reach_v4(Ipv4Addr::new(a, b, c, d))
    };
    match s {
        // An IPv4 address in other clothes: mapped, compatible, translated (NAT64), 6to4.
        [0, 0, 0, 0, 0, 0 | 0xffff, h, l] if (h, l) != (0, 0) && (h, l) != (0, 1) => low(h, l).max(Reach::Private),
        [0x64, 0xff9b, 0, 0, 0, 0, h, l] => low(h, l),
        [0x2002, h, l, ..] => low(h, l),
        _ if v6.is_loopback() || v6.is_unspecified() || v6.is_multicast() || v6.is_unicast_link_local() => Reach::Local,
        // Only 2000::/3 is for everybody, and not all of it: documentation, Teredo.
        [0x2001, 0xdb8 | 0, ..] => Reach::Private,
        [first, ..] if first & 0xe000 == 0x2000 => Reach::Public,
        _ => Reach::Private,
    }
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.what {
            What::Hf => write!(f, "hf:")?,
            What::S3 => write!(f, "s3://")?,
            What::Oci { registry } => write!(f, "oci://{registry}/")?,
            What::Http { secure, hosts, port } => {
                let name = match hosts {
                    Hosts::One(host) => host.clone(),
                    Hosts::Below(name) => Host::Name(format!("*.{name}")),
                    Hosts::Any => Host::Name("*".into()),
                };
                write!(f, "{}", Origin { secure: *secure, host: name, port: *port })?;
            }
        }
        write!(f, "{}{}", self.rest.text, if self.rest.open { "*" } else { "" })
    }
}

#[cfg(test)]
#[path = "model_policy_tests.rs"]
mod tests;
