//! Who uses engines: leases, and requests to the engines themselves.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;

use cucumber::{then, when};
use serde_json::{Value, json};

use crate::site::{Site, assert_refused, completion, millis, retry_after};
use crate::support::{Answer, eventually, request};

/// Long enough for everything that is waited for.
const LONG: u64 = 60_000;

fn path(lease: &Value) -> String {
    format!("/v1/leases/{}", lease["lease_id"].as_str().unwrap())
}

fn keep(site: &mut Site, client: String, answer: &Answer) {
    assert_eq!(answer.status, 201, "{answer:?}");
    site.leases.insert(client, answer.json());
}

fn take(site: &mut Site, client: String, pool: &str, body: &Value) {
    let answer = site.daemon().post(&format!("/v1/pools/{pool}/leases"), &body.to_string());
    keep(site, client, &answer);
}

/// Asks in a thread of its own.
fn ask(site: &mut Site, client: String, pool: String, wait_ms: u64) {
    let (addr, body) = (site.daemon().addr().to_owned(), json!({ "wait_ms": wait_ms }).to_string());
    let path = format!("/v1/pools/{pool}/leases");
    site.asking.insert(client, thread::spawn(move || request(&addr, "POST", &path, Some(&body))));
    site.at = pool;
}

fn answered(site: &mut Site, client: &str) -> Answer {
    site.asking.remove(client).expect("it asked").join().unwrap()
}

#[when(regex = r#"^client "([^"]+)" gets a lease of "([^"]+)"$"#)]
fn gets(site: &mut Site, client: String, pool: String) {
    take(site, client, &pool, &json!({ "ttl_ms": 600_000 }));
}

#[when(regex = r#"^client "([^"]+)" gets a lease of "([^"]+)" for (\w+)$"#)]
fn gets_for(site: &mut Site, client: String, pool: String, ttl: String) {
    take(site, client, &pool, &json!({ "ttl_ms": millis(&ttl) }));
}

#[when(regex = r#"^client "([^"]+)" gets a lease of "([^"]+)" on replica "([^"]+)"$"#)]
fn gets_on(site: &mut Site, client: String, pool: String, replica: String) {
    take(site, client.clone(), &pool, &json!({ "prefer_replica": replica }));
    assert_eq!(site.leases[&client]["replica_id"], replica);
}

#[when(regex = r#"^client "([^"]+)" gets a lease on the new engine of "([^"]+)"$"#)]
fn gets_new(site: &mut Site, client: String, pool: String) {
    site.at.clone_from(&pool);
    site.until(|p| p["revision"].as_u64() > Some(1) && p["ready"] == true);
    take(site, client.clone(), &pool, &json!({}));
    let old = &site.before[&pool]["replicas"][0]["replica_id"];
    assert_ne!(&site.leases[&client]["replica_id"], old);
}

#[when(regex = r#"^client "([^"]+)" asks for a lease of "([^"]+)"$"#)]
fn asks(site: &mut Site, client: String, pool: String) {
    ask(site, client, pool, LONG);
}

#[when(regex = r#"^client "([^"]+)" waits for a lease of "([^"]+)"$"#)]
fn waits(site: &mut Site, client: String, pool: String) {
    ask(site, client, pool, LONG);
    let waiting = site.asking.len();
    eventually(|| (site.pool()["leases_waiting"] == waiting).then_some(()));
}

#[when(regex = r#"^client "([^"]+)" waits for a lease of "([^"]+)" for at most (\w+)$"#)]
fn waits_for(site: &mut Site, client: String, pool: String, time: String) {
    ask(site, client, pool, millis(&time));
}

#[then(regex = r#"^client "([^"]+)" gets the lease$"#)]
fn got(site: &mut Site, client: String) {
    let answer = answered(site, &client);
    keep(site, client, &answer);
}

#[then(regex = r#"^client "([^"]+)" still waits$"#)]
fn still_waits(site: &mut Site, client: String) {
    assert_eq!(site.pool()["leases_waiting"], site.asking.len());
    assert!(!site.asking[&client].is_finished());
}

#[then("nobody waits")]
fn nobody_waits(site: &mut Site) {
    assert_eq!(site.pool()["leases_waiting"], 0);
}

#[then(regex = r#"^client "([^"]+)" is refused with "([^"]+)"$"#)]
fn is_refused(site: &mut Site, client: String, code: String) {
    let answer = answered(site, &client);
    assert_refused(&answer, &code);
    retry_after(&answer);
}

#[then(regex = r#"^a lease is refused with "([^"]+)" and says when to come back$"#)]
fn refused(site: &mut Site, code: String) {
    let answer = site.daemon().post(&format!("/v1/pools/{}/leases", site.at), "{}");
    assert_refused(&answer, &code);
    assert!(retry_after(&answer) > 0);
}

#[when(regex = r#"^client "([^"]+)" releases the lease$"#)]
fn releases(site: &mut Site, client: String) {
    assert_eq!(site.daemon().delete(&path(&site.leases[&client])).status, 204);
}

#[when(regex = r#"^client "([^"]+)" renews the lease$"#)]
fn renews(site: &mut Site, client: String) {
    let answer = site.daemon().post(&format!("{}/renew", path(&site.leases[&client])), r#"{"ttl_ms":3600000}"#);
    assert_eq!(answer.status, 200, "{answer:?}");
    site.answer = Some(answer);
}

#[then(regex = r#"^the lease of "([^"]+)" ends later than before$"#)]
fn ends_later(site: &mut Site, client: String) {
    let (before, now) = (&site.leases[&client], site.answer().json());
    assert_eq!(now["lease_id"], before["lease_id"]);
    // Times of this form compare as text.
    assert!(now["expires_at"].as_str() > before["expires_at"].as_str(), "{before:#} {now:#}");
}

#[then(regex = r#"^client "([^"]+)" cannot renew, because of "([^"]+)"$"#)]
fn cannot_renew(site: &mut Site, client: String, code: String) {
    assert_refused(&site.daemon().post(&format!("{}/renew", path(&site.leases[&client])), "{}"), &code);
}

#[then(regex = r#"^releasing "([^"]+)" is refused with "([^"]+)"$"#)]
fn release_refused(site: &mut Site, lease: String, code: String) {
    assert_refused(&site.daemon().delete(&format!("/v1/leases/{lease}")), &code);
}

#[then(regex = r"^(\d+) leases? (?:is|are) held$")]
fn held(site: &mut Site, leases: usize) {
    assert_eq!(site.pool()["active_leases"], leases, "{:#}", site.pool());
    assert_eq!(site.daemon().get("/v1/leases").json().as_array().unwrap().len(), leases);
}

#[then(regex = r#"^"([^"]+)" is on replica "([^"]+)"$"#)]
fn on(site: &mut Site, client: String, replica: String) {
    assert_eq!(site.leases[&client]["replica_id"], replica);
}

#[then(regex = r#"^"([^"]+)" and "([^"]+)" are on (different replicas|the same replica)$"#)]
fn spread(site: &mut Site, one: String, other: String, how: String) {
    let same = site.leases[&one]["replica_id"] == site.leases[&other]["replica_id"];
    assert_eq!(same, how == "the same replica", "{:#?}", site.leases);
}

#[then(regex = r#"^the engine answers at the address in the lease of "([^"]+)"$"#)]
fn answers(site: &mut Site, client: String) {
    assert!(!completion(site.leases[&client]["endpoint"]["url"].as_str().unwrap()).is_empty());
}

#[then("a client gets an answer from its engine")]
fn gets_answer(site: &mut Site) {
    let pool = site.until(|p| p["ready"] == true);
    let serving = pool["replicas"].as_array().unwrap().iter().find(|r| r["ready"] == true).unwrap();
    assert!(!completion(serving["endpoint"].as_str().unwrap()).is_empty());
}

/// Whatever comes of it.
#[when("a client uses its engine")]
fn uses(site: &mut Site) {
    let endpoint = site.pool()["replicas"][0]["endpoint"].as_str().unwrap().replace("http://", "");
    let mut socket = TcpStream::connect(&endpoint).unwrap();
    let body = r#"{"prompt":"hello","n_predict":3}"#;
    write!(
        socket,
        "POST /completion HTTP/1.1\r\nHost: {endpoint}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let _ = socket.read_to_end(&mut Vec::new());
}
