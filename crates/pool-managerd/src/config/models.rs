//! `[models]`: where models come from, and what may be fetched.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pool_domain::ModelRef;
use pool_domain::model_policy::{Allowed, HF_ENDPOINT, ModelPolicy};
use pool_domain::model_ref::HttpUrl;
use pool_services::PoolSpec;

use super::check::{home, path};
use super::raw::{RawModels, Verify};
use super::source::Source;
use super::{At, ConfigError, Step};

/// Names another hub for every program that uses one.
const HF_ENDPOINT_VARIABLE: &str = "HF_ENDPOINT";

/// Where models come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Models {
    /// Directories, or single files named on the command line.
    pub roots: Vec<PathBuf>,
    /// Where fetched models are kept.
    pub cache_dir: PathBuf,
    /// Most bytes there; unset = as many as the disk holds.
    pub cache_max: Option<u64>,
    /// Read every model whole before each start.
    pub verify_always: bool,
    /// What may be fetched.
    pub policy: ModelPolicy,
    /// Files with a token, by host.
    pub tokens: BTreeMap<String, PathBuf>,
    /// Keys for buckets.
    pub s3_credentials: Option<PathBuf>,
    /// Region of buckets.
    pub s3_region: Option<String>,
    /// Certificates of further authorities.
    pub ca_file: Option<PathBuf>,
}

impl Models {
    /// Keys that differ.
    pub(super) fn differs(&self, other: &Self) -> Vec<&'static str> {
        let mut keys = Vec::new();
        macro_rules! keys {
            ($($key:literal $($field:ident).+;)*) => {$(
                if self.$($field).+ != other.$($field).+ {
                    keys.push(concat!("models.", $key));
                }
            )*};
        }
        keys! {
            "roots" roots;
            "cache_dir" cache_dir;
            "cache_max" cache_max;
            "verify" verify_always;
            "allow" policy.allow;
            "offline" policy.offline;
            "hf_endpoint" policy.hf_endpoint;
            "s3_endpoint" policy.s3_endpoint;
            "s3_region" s3_region;
            "s3_credentials" s3_credentials;
            "tokens" tokens;
            "ca_file" ca_file;
        }
        keys
    }
}

fn at(key: &'static str) -> [Step<'static>; 2] {
    [Step::Key("models"), Step::Key(key)]
}

pub(super) fn check(raw: &RawModels, source: &Source) -> Result<Models, ConfigError> {
    let file = |key, text: &Option<String>| text.as_ref().map(|t| path(t, source, At::Key(&at(key)))).transpose();
    let roots = raw.roots.iter().map(|r| path(r, source, At::Key(&at("roots")))).collect::<Result<_, _>>()?;
    let allow = raw.allow.iter().map(|text| {
        text.parse::<Allowed>().map_err(|e| {
            source
                .error(At::Key(&at("allow")), format!("`{text}` cannot be: {e}"))
                .hinting("write for example \"hf:ORG/*\" or \"https://models.example.org/*\"")
        })
    });
    let endpoint = |key, text: &str| {
        let url = HttpUrl::parse(text).ok().filter(|url| url.query().is_none());
        url.ok_or_else(|| {
            source
                .error(At::Key(&at(key)), format!("`{text}` is no address of a service"))
                .hinting("write for example \"https://mirror.example.org\"")
        })
    };
    let variable = std::env::var(HF_ENDPOINT_VARIABLE).ok().filter(|v| !v.is_empty());
    let hf_endpoint = raw.hf_endpoint.as_ref().or(variable.as_ref()).map_or(HF_ENDPOINT, String::as_str);
    let mut tokens = BTreeMap::new();
    for (host, text) in &raw.tokens {
        let key = [Step::Key("models"), Step::Key("tokens"), Step::Key(host)];
        let named = HttpUrl::parse(&format!("https://{host}/")).ok().map(|url| url.origin().authority());
        let named = named.filter(|named| named == host).ok_or_else(|| {
            source
                .error(At::Key(&key), format!("`{host}` is no host"))
                .hinting("write the name as in \"huggingface.co\", with the port if it is not the usual one")
        })?;
        tokens.insert(named, path(text, source, At::Key(&key))?);
    }
    Ok(Models {
        roots,
        cache_dir: match &raw.cache_dir {
            Some(text) => path(text, source, At::Key(&at("cache_dir")))?,
            None => default_cache_dir(),
        },
        cache_max: raw.cache_max.clone().map(pool_api::spec::SizeText::into_value),
        verify_always: raw.verify == Verify::Always,
        policy: ModelPolicy {
            allow: allow.collect::<Result<_, _>>()?,
            offline: raw.offline,
            hf_endpoint: endpoint("hf_endpoint", hf_endpoint)?,
            s3_endpoint: raw.s3_endpoint.as_ref().map(|text| endpoint("s3_endpoint", text)).transpose()?,
        },
        tokens,
        s3_credentials: file("s3_credentials", &raw.s3_credentials)?,
        s3_region: raw.s3_region.clone(),
        ca_file: file("ca_file", &raw.ca_file)?,
    })
}

fn default_cache_dir() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    let cache = cache.or_else(|| home().map(|h| h.join(".cache")));
    cache.map_or_else(|| PathBuf::from("/var/cache/pool-managerd"), |cache| cache.join("models"))
}

/// Whether the pool may name its model.
pub(super) fn permitted(index: usize, pool: &PoolSpec, models: &Models, source: &Source) -> Result<(), ConfigError> {
    let ModelRef::Remote(remote) = &pool.model else { return Ok(()) };
    models.policy.may_name(&remote.source).map_err(|denied| {
        source
            .error(At::Key(&[Step::Key("pool"), Step::Index(index), Step::Key("model")]), denied.to_string())
            .hinting(format!("add \"{}\" to allow in [models]", remote.source))
    })
}
