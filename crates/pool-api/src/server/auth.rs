//! Who may do what: tokens with scopes, each of a tenant if it says so. Without tokens whoever reaches the API may do
//! everything, as a daemon on loopback has it.

use std::fmt;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use thiserror::Error;
use tokio::sync::watch;

use super::pages;
use super::{AppState, Via};
use crate::dto::{Code, Problem};
use crate::gateway::{self, Dialect};

/// Shortest token: 128 bits in hexadecimal digits.
pub const MIN_TOKEN: usize = 32;
const MAX_TOKEN: usize = 512;
/// Most tokens: each request is compared with every one.
const MAX_TOKENS: usize = 256;

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Looking.
    Read,
    /// Using engines: leases and the gateway.
    Lease,
    /// Everything.
    Admin,
}

impl Scope {
    fn parse(word: &str) -> Option<Self> {
        match word {
            "read" => Some(Self::Read),
            "lease" => Some(Self::Lease),
            "admin" => Some(Self::Admin),
            _ => None,
        }
    }
}

/// A text that holds no tokens. It does not repeat them.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TokensError {
    /// One of its lines.
    #[error("line {line}: {why}")]
    Line {
        /// From 1.
        line: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There is none.
    #[error("there is no token in it")]
    Empty,
}

#[derive(Clone, PartialEq, Eq)]
struct Token {
    digest: [u8; 32],
    scopes: Vec<Scope>,
    tenant: Option<Arc<str>>,
}

/// The tokens that are taken. Only their digests are kept.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Tokens(Vec<Token>);

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tokens", self.0.len())
    }
}

fn digest(token: &[u8]) -> [u8; 32] {
    Sha256::digest(token).into()
}

impl Tokens {
    /// Reads tokens, one a line: `TOKEN SCOPES [TENANT]`, scopes with commas between them, of `read`, `lease` and `admin`.
    /// Empty lines, and those that begin with `#`, say nothing. A semicolon ends a line, too.
    ///
    /// # Errors
    /// The first line that is not of that form; or when there is none.
    pub fn parse(text: &str) -> Result<Self, TokensError> {
        let mut tokens = Vec::new();
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with('#'));
        let lines = lines.flat_map(|(n, line)| line.split(';').map(move |part| (n + 1, part.trim())));
        for (line, text) in lines.filter(|(_, text)| !text.is_empty() && !text.starts_with('#')) {
            let wrong = |why| TokensError::Line { line, why };
            let mut words = text.split_whitespace();
            let (token, scopes) = (words.next().unwrap_or_default(), words.next());
            if !(MIN_TOKEN..=MAX_TOKEN).contains(&token.len()) || !token.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(wrong("a token has 32 to 512 printed characters, such as `openssl rand -hex 32` makes"));
            }
            let scopes = scopes.ok_or_else(|| wrong("after the token come its scopes: read, lease, admin"))?;
            let scopes: Option<Vec<Scope>> = scopes.split(',').map(Scope::parse).collect();
            let scopes =
                scopes.ok_or_else(|| wrong("the scopes are read, lease and admin, with commas between them"))?;
            let tenant = words.next().map(Arc::from);
            if words.next().is_some() {
                return Err(wrong("after the scopes comes at most a tenant"));
            }
            let digest = digest(token.as_bytes());
            if tokens.iter().any(|t: &Token| t.digest == digest) {
                return Err(wrong("this token is there already"));
            }
            if tokens.len() == MAX_TOKENS {
                return Err(wrong("there are more than 256 tokens"));
            }
            tokens.push(Token { digest, scopes, tenant });
        }
        if tokens.is_empty() { Err(TokensError::Empty) } else { Ok(Self(tokens)) }
    }

    /// The tenants that they name.
    pub fn tenants(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|t| t.tenant.as_deref())
    }

    /// Whose token it is. Every token is looked at, so that the time it takes tells nothing.
    fn caller(&self, given: &[u8]) -> Option<Caller> {
        let given = digest(given);
        let mut found = None;
        for token in &self.0 {
            if bool::from(token.digest.ct_eq(&given)) {
                found = Some(token);
            }
        }
        found.map(|t| Caller { rights: Rights::Scopes(t.scopes.clone()), tenant: t.tenant.clone() })
    }
}

/// Whether tokens are asked for.
#[derive(Debug, Clone, Default)]
pub enum Access {
    /// No: whoever reaches it may do everything.
    #[default]
    Open,
    /// These, as they are at present.
    Tokens(watch::Receiver<Arc<Tokens>>),
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Rights {
    #[default]
    All,
    Scopes(Vec<Scope>),
}

/// Who asks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caller {
    rights: Rights,
    /// Whose requests these are.
    pub tenant: Option<Arc<str>>,
}

impl Caller {
    /// Whether a token of one of these scopes, or of `admin`, was shown.
    fn may(&self, needed: &[Scope]) -> bool {
        match &self.rights {
            Rights::All => true,
            Rights::Scopes(scopes) => scopes.iter().any(|s| *s == Scope::Admin || needed.contains(s)),
        }
    }

    /// Whether it may do everything.
    pub(crate) fn may_all(&self) -> bool {
        self.may(&[Scope::Admin])
    }

    /// The tenant to whom what it sees and does is kept; none for who may do everything.
    #[must_use]
    pub fn kept_to(&self) -> Option<&Arc<str>> {
        self.tenant.as_ref().filter(|_| !self.may(&[Scope::Admin]))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = std::convert::Infallible;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        Ok(parts.extensions.get::<Self>().cloned().unwrap_or_default())
    }
}

/// What a request needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Nothing: it tells nothing that is not in the program itself, or it is for probes.
    Nothing,
    /// One of these; `admin` always will do.
    AnyOf(&'static [Scope]),
}

/// What a request needs. What nobody thought of needs `admin`.
pub(super) fn need(method: &Method, path: &str) -> Need {
    use Scope::{Lease, Read};
    const OPEN: &[&str] = &["/livez", "/readyz", "/startupz", "/v2/health/live", "/v2/health/ready", "/openapi.json"];
    let looks = matches!(*method, Method::GET | Method::HEAD);
    let posts = *method == Method::POST;
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    let of_leases = matches!(*parts, ["v1", "leases"] | ["v1", "leases", _] | ["v1", "leases", _, "renew"])
        || matches!(*parts, ["v1", "pools", _, "leases"]);
    if looks && (OPEN.contains(&path) || pages::has(path)) {
        Need::Nothing
    } else if looks && (of_leases || path == "/v1/models") || posts && ["/v1/plan", "/v1/placements"].contains(&path) {
        Need::AnyOf(&[Read, Lease])
    } else if posts && (of_leases || gateway::PATHS.iter().any(|(p, _)| *p == path))
        || *method == Method::DELETE && of_leases
    {
        Need::AnyOf(&[Lease])
    } else if looks {
        Need::AnyOf(&[Read])
    } else {
        Need::AnyOf(&[])
    }
}

/// The one token of a request: as bearer, or where clients of Anthropic put it.
fn token(headers: &HeaderMap) -> Option<&[u8]> {
    const KEY: &str = "x-api-key";
    let only = |name: &str| -> Option<&HeaderValue> {
        let mut all = headers.get_all(name).iter();
        all.next().filter(|_| all.next().is_none())
    };
    if !headers.contains_key(header::AUTHORIZATION) {
        return only(KEY).map(HeaderValue::as_bytes);
    }
    let value = only(header::AUTHORIZATION.as_str())?.as_bytes();
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
}

pub(super) fn refuse(path: &str, problem: Problem) -> Response {
    match Dialect::of(path) {
        Some(dialect) => dialect.refuse(&problem),
        None => problem.into_response(),
    }
}

pub(super) async fn check(State(state): State<Arc<AppState>>, mut request: Request, next: Next) -> Response {
    let needed = need(request.method(), request.uri().path());
    let Access::Tokens(tokens) = &state.access else { return next.run(request).await };
    // Only the daemon's own user, and root, come in by that door.
    if request.extensions().get::<Via>().is_some_and(|via| *via == Via::Unix) {
        return next.run(request).await;
    }
    let Need::AnyOf(scopes) = needed else { return next.run(request).await };
    let caller = token(request.headers()).and_then(|given| tokens.borrow().caller(given));
    let Some(caller) = caller else {
        let problem = Problem::new(Code::Unauthorized, "the request shows no token that is taken here")
            .with_hint("send Authorization: Bearer TOKEN");
        let mut response = refuse(request.uri().path(), problem);
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        return response;
    };
    if !caller.may(scopes) {
        let problem = Problem::new(Code::Forbidden, "the token is not for this").with_hint(match scopes {
            [] => "it takes a token with the scope admin",
            [Scope::Lease] => "it takes a token with the scope lease or admin",
            [Scope::Read] => "it takes a token with the scope read or admin",
            _ => "it takes a token with one of the scopes read, lease, admin",
        });
        return refuse(request.uri().path(), problem);
    }
    request.extensions_mut().insert(caller);
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    #[test]
    fn tokens_are_read_and_found_whole() {
        let tokens = Tokens::parse(&format!("# comment\n\n{A} admin\n{B} read,lease acme ; {B}1 lease")).unwrap();
        assert_eq!(tokens.0.len(), 3);
        assert_eq!(tokens.tenants().collect::<Vec<_>>(), ["acme"]);
        assert!(tokens.caller(A.as_bytes()).unwrap().may(&[]));
        let b = tokens.caller(B.as_bytes()).unwrap();
        assert!(b.may(&[Scope::Read]) && b.may(&[Scope::Lease]) && !b.may(&[]));
        assert_eq!(b.kept_to().map(|t| &**t), Some("acme"));
        for wrong in ["", &A[1..], &format!("{A}a"), &format!(" {A}"), &format!("{A} "), &A.to_uppercase()] {
            assert!(tokens.caller(wrong.as_bytes()).is_none(), "{wrong:?}");
        }
        assert!(!format!("{tokens:?}").contains(A));
    }

    #[test]
    fn a_line_that_is_none_is_named_and_not_repeated() {
        for (text, line) in [
            (format!("{A} admin\nshort admin"), 2),
            (format!("\n{A}"), 2),
            (format!("{A} write"), 1),
            (format!("{A} admin one two"), 1),
            (format!("{A} read\n{A} admin"), 2),
        ] {
            let error = Tokens::parse(&text).unwrap_err();
            assert!(matches!(error, TokensError::Line { line: l, .. } if l == line), "{text}: {error}");
            assert!(!error.to_string().contains("aaaa") && !error.to_string().contains("short"));
        }
        assert_eq!(Tokens::parse("# none"), Err(TokensError::Empty));
    }

    #[test]
    fn one_token_in_one_place() {
        let of = |all: &[(&'static str, String)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in all {
                headers.append(*name, value.parse().unwrap());
            }
            token(&headers).map(<[u8]>::to_vec)
        };
        let bearer = |t: &str| ("authorization", format!("Bearer {t}"));
        assert_eq!(of(&[bearer(A)]), Some(A.into()));
        assert_eq!(of(&[("authorization", format!("bEARER {A}"))]), Some(A.into()));
        assert_eq!(of(&[("x-api-key", A.into())]), Some(A.into()));
        // What is not exactly a token is found by nobody, or is none.
        assert_ne!(of(&[bearer(&format!(" {A}"))]), Some(A.into()));
        for none in [
            vec![bearer(A), bearer(A)],
            vec![("authorization", "Basic x".into())],
            vec![("authorization", "B".into())],
            vec![],
        ] {
            assert_eq!(of(&none), None, "{none:?}");
        }
        assert_eq!(of(&[("authorization", "Basic x".into()), ("x-api-key", A.into())]), None);
    }

    #[test]
    fn what_nobody_thought_of_is_for_admins() {
        use Scope::{Lease, Read};
        for (method, path, want) in [
            ("GET", "/livez", Need::Nothing),
            ("DELETE", "/livez", Need::AnyOf(&[])),
            ("GET", "/v1/node", Need::AnyOf(&[Read])),
            ("GET", "/nowhere", Need::AnyOf(&[Read])),
            ("POST", "/nowhere", Need::AnyOf(&[])),
            ("BREW", "/v1/leases", Need::AnyOf(&[])),
            ("PUT", "/v1/pools/a/leases", Need::AnyOf(&[])),
            ("POST", "/v1/pools/a/leases", Need::AnyOf(&[Lease])),
            ("DELETE", "/v1/leases/x", Need::AnyOf(&[Lease])),
            ("DELETE", "/v1/pools/leases", Need::AnyOf(&[])),
            ("GET", "/v1/pools/leases", Need::AnyOf(&[Read])),
            ("POST", "/v1/leases/x/renew", Need::AnyOf(&[Lease])),
            ("POST", "/v1/leasesx", Need::AnyOf(&[])),
            ("DELETE", "/v1/pools/a", Need::AnyOf(&[])),
            ("POST", "/v1/chat/completions", Need::AnyOf(&[Lease])),
            ("POST", "/v1/pools/a/drain", Need::AnyOf(&[])),
            ("GET", "/v1/models", Need::AnyOf(&[Read, Lease])),
            ("GET", "/metrics", Need::AnyOf(&[Read])),
            ("GET", "/v1/pools/a/logs", Need::AnyOf(&[Read])),
        ] {
            assert_eq!(need(&method.parse().unwrap(), path), want, "{method} {path}");
        }
    }
}
