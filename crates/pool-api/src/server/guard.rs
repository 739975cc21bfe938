//! Host and Origin of every request, whatever its route and method. A browser that was led here by a rebound DNS name
//! or a strange page is turned away before anything happens.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::listen::HEAD_BYTES;
use super::{AppState, Via, pages};
use crate::dto::{Code, Problem};

fn forbidden(detail: &str, hint: &str) -> Response {
    Problem::new(Code::ForbiddenHost, detail).with_hint(hint).into_response()
}

/// Name and port of a Host, both as written; `None` when it is no Host.
fn split(host: &str) -> Option<(&str, Option<u16>)> {
    let (name, port) = if let Some(rest) = host.strip_prefix('[') {
        let (inner, after) = rest.split_once(']')?;
        match after {
            "" => (inner, None),
            p => (inner, Some(p.strip_prefix(':')?)),
        }
    } else {
        match host.split_once(':') {
            Some((n, p)) => (n, Some(p)),
            None => (host, None),
        }
    };
    let port = match port {
        None => None,
        Some(p) if p.bytes().all(|b| b.is_ascii_digit()) => Some(p.parse().ok()?),
        Some(_) => return None,
    };
    (!name.is_empty()).then_some((name, port))
}

fn host_allowed(host: &str, hosts: &[String], local: Option<SocketAddr>) -> bool {
    let Some((name, _)) = split(host) else { return false };
    if hosts.iter().any(|h| h.eq_ignore_ascii_case(host) || h.eq_ignore_ascii_case(name)) {
        return true;
    }
    let bracketed = host.starts_with('[');
    if !bracketed && name.eq_ignore_ascii_case("localhost") {
        return true;
    }
    let Ok(ip) = name.parse::<IpAddr>() else { return false };
    if ip.is_ipv6() != bracketed {
        return false;
    }
    ip.is_loopback() || local.is_some_and(|l| !ip.is_unspecified() && l.ip().to_canonical() == ip.to_canonical())
}

/// Whether an Origin is that of the daemon's own page, by a Host that was found to be its own before.
fn is_own(origin: &HeaderValue, host: &HeaderValue) -> bool {
    let origin = origin.as_bytes();
    let of = [&b"http://"[..], b"https://"].into_iter().find_map(|scheme| origin.strip_prefix(scheme));
    of.is_some_and(|of| of.eq_ignore_ascii_case(host.as_bytes()))
}

pub(super) async fn check(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    let local = match request.extensions().get::<Via>() {
        Some(Via::Tcp(local)) => *local,
        _ => None,
    };
    let info = &state.info;
    // The connection bounds how much of a head it keeps; what comes at once may be more.
    let size = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum::<usize>();
    if size + request.uri().path().len() > HEAD_BYTES {
        return Problem::new(Code::InvalidParams, format!("the head is larger than {HEAD_BYTES} bytes"))
            .with_status(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE)
            .into_response();
    }
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let named = match (hosts.next().map(|h| h.to_str()), hosts.next()) {
        (Some(Ok(h)), None) => host_allowed(h, &info.hosts, local),
        _ => false,
    };
    // An absolute request target names a host too; neither may be foreign.
    let target = request.uri().authority().is_none_or(|a| host_allowed(a.as_str(), &info.hosts, local));
    if !named || !target {
        return forbidden(
            "the request's Host is not one of this daemon's",
            "use localhost or the address it listens on, or name the host in [node] hosts",
        );
    }
    let host = request.headers().get(header::HOST);
    let known = |o: &HeaderValue| {
        info.origins.iter().any(|k| k.as_bytes() == o.as_bytes()) || host.is_some_and(|host| is_own(o, host))
    };
    if !request.headers().get_all(header::ORIGIN).iter().all(known) {
        return forbidden("the request's Origin is not allowed", "name the origin in [node] origins");
    }
    // A page elsewhere that only wants the request made sends no Origin, but browsers say where it comes from.
    let headers = request.headers();
    let from = headers.get("sec-fetch-site").map_or(&b""[..], HeaderValue::as_bytes);
    let led_here = request.method() == Method::GET && pages::has(request.uri().path());
    if [&b"cross-site"[..], b"same-site"].contains(&from) && !headers.contains_key(header::ORIGIN) && !led_here {
        return forbidden("the request comes from a page elsewhere", "name the page's origin in [node] origins");
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        let local: Option<SocketAddr> = Some("192.168.1.5:9200".parse().unwrap());
        let names = ["gpu.lan".to_owned(), "one.lan:9200".to_owned()];
        for good in [
            "localhost",
            "LOCALHOST:1",
            "127.0.0.1",
            "127.9.9.9:80",
            "[::1]",
            "[::1]:9200",
            "192.168.1.5:9200",
            "192.168.1.5",
            "gpu.lan",
            "GPU.lan:7",
            "one.lan:9200",
        ] {
            assert!(host_allowed(good, &names, local), "{good}");
        }
        for bad in [
            "",
            ":9200",
            "evil.test",
            "localhost.evil.test",
            "localhost.",
            "::1",
            "[127.0.0.1]",
            "[::1]x",
            "0.0.0.0",
            "[::]",
            "192.168.1.6",
            "127.0.0.1.evil.test",
            "localhost:x",
            "one.lan",
            "a@localhost",
            "localhost:1:2",
            "2130706433",
            "0x7f.1",
            "[localhost]",
            "localhost:99999",
        ] {
            assert!(!host_allowed(bad, &names, local), "{bad}");
        }
        let any: Option<SocketAddr> = Some("0.0.0.0:9200".parse().unwrap());
        assert!(!host_allowed("0.0.0.0", &[], any));
        let mapped: Option<SocketAddr> = Some("[::ffff:10.0.0.1]:1".parse().unwrap());
        assert!(host_allowed("10.0.0.1", &[], mapped));
    }
}
