//! Who may reach the real daemon, and by what.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use support::{Daemon, Engines, binary, eventually, request_with, write_config};

const ADMIN: &str = "admin-0123456789abcdef0123456789abcdef";
const USER: &str = "user-0123456789abcdef0123456789abcdef0";
const NEXT: &str = "next-0123456789abcdef0123456789abcdef0";
const POOL: &str = r#"
[[pool]]
id = "chat"
model = "stub:chat"
engine = "stub"
slots = 2
args = ["--slots", "2"]
"#;

fn secret(dir: &Path, name: &str, text: &str) -> PathBuf {
    let file = dir.join(name);
    // Replaced as a whole, as whoever renews a secret does.
    let beside = dir.join(format!(".{name}"));
    fs::write(&beside, text).unwrap();
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(&beside, &file).unwrap();
    file
}

fn tls(dir: &Path, name: &str) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/tls");
    secret(dir, "cert.pem", &fs::read_to_string(from.join(format!("{name}.crt"))).unwrap());
    secret(dir, "key.pem", &fs::read_to_string(from.join(format!("{name}.key"))).unwrap());
}

fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}\r\n")
}

#[test]
fn a_lease_comes_back_after_a_restart_for_its_tenant_alone_and_nobody_makes_one_up() {
    const OTHER: &str = "other-0123456789abcdef0123456789abcdef";
    let dir = tempfile::tempdir().unwrap();
    secret(
        dir.path(),
        "tokens",
        &format!("# rotated; by hand\n{ADMIN} admin\n{USER} lease acme\n{OTHER} lease other\n"),
    );
    write_config(dir.path(), &format!("[auth]\ntokens_file = \"tokens\"\n{POOL}"));
    let daemon = Daemon::start_in_place(dir);
    let engines = Engines::of(&daemon);
    let ask = |daemon: &Daemon, method: &str, path: &str, token: &str, body: Option<&str>| {
        request_with(daemon.addr(), method, path, &bearer(token), body)
    };
    eventually(|| (ask(&daemon, "GET", "/v1/pools/chat", ADMIN, None).status == 200).then_some(()));
    let leased = ask(&daemon, "POST", "/v1/pools/chat/leases", USER, Some(r#"{"wait_ms":60000,"ttl_ms":600000}"#));
    assert_eq!(leased.status, 201, "{leased:?}");
    let id = leased.json()["lease_id"].as_str().unwrap().to_owned();
    // What somebody made of it who may lease, too.
    let (name, seal) = id.rsplit_once('.').unwrap();
    let next = format!("{}7", name.strip_suffix(|c: char| c.is_ascii_digit()).unwrap());
    let made_up = [name.to_owned(), format!("{next}.{seal}"), next, id.replace("-r0-", "-r1-")];
    let refuses = |daemon: &Daemon| {
        for id in &made_up {
            for token in [USER, OTHER] {
                let answer = ask(daemon, "POST", &format!("/v1/leases/{id}/renew"), token, Some("{}"));
                assert_eq!(answer.status, 404, "{id}: {answer:?}");
            }
        }
        let answer = ask(daemon, "POST", &format!("/v1/leases/{id}/renew"), OTHER, Some("{}"));
        assert_eq!(answer.status, 404, "another tenant's: {answer:?}");
    };
    refuses(&daemon);

    let daemon = Daemon::start_in_place(daemon.kill(&engines));
    eventually(|| (ask(&daemon, "GET", "/v1/pools/chat", ADMIN, None).json()["ready"] == true).then_some(()));
    refuses(&daemon);
    let back = ask(&daemon, "POST", &format!("/v1/leases/{id}/renew"), USER, Some(r#"{"ttl_ms":600000}"#));
    assert_eq!((back.status, back.json()["tenant_id"].as_str()), (200, Some("acme")), "{back:?}");
    assert_eq!(back.json()["lease_id"], id);
    refuses(&daemon);
    assert_eq!(ask(&daemon, "GET", "/v1/leases", USER, None).json().as_array().unwrap().len(), 1);
    assert_eq!(ask(&daemon, "POST", &format!("/v1/leases/{id}/renew"), USER, Some("{}")).status, 200);
    let body = r#"{"model":"chat","prompt":"a","max_tokens":1}"#;
    let headers = format!("{}X-Pool-Lease: {id}\r\n", bearer(USER));
    assert_eq!(request_with(daemon.addr(), "POST", "/v1/completions", &headers, Some(body)).status, 200);
    assert_eq!(ask(&daemon, "DELETE", &format!("/v1/leases/{id}"), USER, None).status, 204);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn secrets_in_a_pipe_are_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let made = std::process::Command::new("mkfifo").arg("-m600").arg(dir.path().join("tokens")).status().unwrap();
    assert!(made.success());
    let file = write_config(dir.path(), &format!("[auth]\ntokens_file = \"tokens\"\n{POOL}"));
    for command in ["check", "serve"] {
        let out = binary().args([command, "--config"]).arg(&file).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(78), "{said}");
        assert!(said.contains("is no file of at most 256 KiB"), "{said}");
    }
}

#[test]
fn tokens_guard_the_daemon_tenants_are_named_in_leases_logs_and_metrics_and_no_token_is_anywhere() {
    let dir = tempfile::tempdir().unwrap();
    secret(dir.path(), "tokens", &format!("# ours\n{ADMIN} admin\n{USER} lease acme\n"));
    let log =
        format!("[node]\nstate_dir = \"state\"\nengine_ports = \"{}\"\nlog = \"json\"\n", support::engine_ports());
    let config = format!("[auth]\ntokens_file = \"tokens\"\n{POOL}");
    write_config(dir.path(), &config);
    // The log of programs has every field.
    let file = dir.path().join("pool-managerd.toml");
    let text = fs::read_to_string(&file).unwrap();
    let node = text.find("[gpu]").unwrap();
    fs::write(&file, log + &text[node..]).unwrap();
    let mut command = binary();
    command.env("POOL_MANAGERD_LOG", "debug");
    let mut child = Daemon::start_as(command, dir);
    let (addr, admin, user) = (child.addr().to_owned(), bearer(ADMIN), bearer(USER));
    let ask =
        |method: &str, path: &str, headers: &str, body: Option<&str>| request_with(&addr, method, path, headers, body);

    assert_eq!(ask("GET", "/livez", "", None).status, 200);
    let none = ask("GET", "/v1/pools", "", None);
    assert_eq!((none.status, none.json()["code"].as_str()), (401, Some("UNAUTHORIZED")));
    eventually(|| (ask("GET", "/v1/pools/chat", &admin, None).status == 200).then_some(()));
    assert_eq!(ask("POST", "/v1/pools/chat/preload?wait_ms=60000", &user, Some("{}")).status, 403);
    let body = r#"{"model":"chat","prompt":"a","max_tokens":2,"stream":true}"#;
    let answer = ask("POST", "/v1/completions", &user, Some(body));
    assert_eq!(answer.status, 200, "{answer:?}");
    let lease = ask("POST", "/v1/pools/chat/leases", &user, Some("{}")).json();
    assert_eq!(lease["tenant_id"], "acme");
    let foreign = ask("POST", "/v1/pools/chat/leases", &user, Some(r#"{"tenant_id":"evil"}"#));
    assert_eq!((foreign.status, foreign.json()["code"].as_str()), (403, Some("FORBIDDEN")));
    let mine = ask("GET", "/v1/leases", &user, None).json();
    assert_eq!(mine.as_array().unwrap().len(), 1);
    // What an admin takes for others is not this tenant's.
    let other = ask("POST", "/v1/pools/chat/leases", &admin, Some(r#"{"tenant_id":"other"}"#)).json();
    let path = format!("/v1/leases/{}", other["lease_id"].as_str().unwrap());
    assert_eq!(ask("DELETE", &path, &user, None).status, 404);
    let again = ask("GET", "/v1/leases", &user, None).json();
    assert_eq!((again.as_array().unwrap().len(), &again[0]["lease_id"]), (1, &mine[0]["lease_id"]));
    assert_eq!(ask("GET", "/v1/leases", &admin, None).json().as_array().unwrap().len(), 2);
    let metrics = ask("GET", "/metrics", &admin, None).body;
    let line = "gateway_requests_total{pool_id=\"chat\",tenant_id=\"acme\",outcome=\"done\"} 1";
    assert!(metrics.contains(line), "{metrics}");
    let ended = child.wait_log("stream_ended");
    assert!(ended.contains("\"tenant_id\":\"acme\"") && ended.contains("\"correlation_id\":\"req-"), "{ended}");
    child.wait_log("lease_granted");

    // The command line shows its token, and its own words say what to do without.
    let server = format!("http://{addr}");
    let (code, told) = child.cli_with(&["status", "--server", &server], &[]);
    assert!(code == Some(1) && told.contains("POOL_MANAGERD_TOKEN"), "{told}");
    let (code, told) = child.cli_with(&["status", "--server", &server], &[("POOL_MANAGERD_TOKEN", ADMIN)]);
    assert!(code == Some(0) && told.contains("chat"), "{told}");
    let tokens = child.dir().join("tokens");
    let (code, told) = child.cli_with(&["status", "--server", &server, "--token-file", tokens.to_str().unwrap()], &[]);
    assert!(code == Some(0) && told.contains("chat"), "{told}");

    // Rotation: both are taken, then only the new one. What cannot be read changes nothing.
    let reload = |token: &str| ask("POST", "/v1/config/reload", &bearer(token), Some("{}")).status;
    secret(child.dir(), "tokens", &format!("{ADMIN} admin\n{NEXT} admin"));
    assert_eq!(reload(ADMIN), 200);
    eventually(|| (ask("GET", "/v1/node", &bearer(NEXT), None).status == 200).then_some(()));
    assert_eq!((ask("GET", "/v1/node", &admin, None).status, ask("GET", "/v1/models", &user, None).status), (200, 401));
    secret(child.dir(), "tokens", &format!("{ADMIN} nonsense"));
    assert_eq!(reload(NEXT), 200);
    child.wait_log("those from before stay in force");
    assert_eq!(ask("GET", "/v1/node", &bearer(NEXT), None).status, 200);
    secret(child.dir(), "tokens", &format!("{NEXT} admin"));
    assert_eq!(reload(NEXT), 200);
    eventually(|| (ask("GET", "/v1/node", &admin, None).status == 401).then_some(()));

    let log = child.log_so_far();
    for token in [ADMIN, USER, NEXT] {
        assert!(!log.contains(token) && !log.contains(&token[5..20]), "a token in the log:\n{log}");
        let commands = support::processes_with(token);
        assert!(commands.is_empty(), "a token among arguments");
    }
}

#[test]
fn certificates_are_served_and_renewed_and_the_socket_is_for_its_user() {
    let dir = tempfile::tempdir().unwrap();
    tls(dir.path(), "one");
    secret(dir.path(), "tokens", &format!("{ADMIN} admin"));
    let node = format!(
        "[node]\nstate_dir = \"state\"\nengine_ports = \"{}\"\nsocket = \"api.sock\"\n",
        support::engine_ports()
    );
    let config =
        format!("{POOL}[auth]\ntokens_file = \"tokens\"\n[tls]\ncert = \"cert.pem\"\nkey = \"key.pem\"\n{node}");
    let daemon = Daemon::start_in(dir, &config);
    let server = format!("https://{}", daemon.addr().replace("127.0.0.1", "localhost"));
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/tls");
    let status = |ca: &str, token: &str| {
        let ca = from.join(ca);
        let args = ["status", "--json", "--server", &server, "--ca", ca.to_str().unwrap()];
        daemon.cli_with(&args, &[("POOL_MANAGERD_TOKEN", token)])
    };
    eventually(|| (status("one.crt", ADMIN).0 == Some(0)).then_some(()));
    assert_ne!(status("two.crt", ADMIN).0, Some(0), "a stranger's certificate");
    assert_ne!(status("one.crt", USER).0, Some(0));
    let plain = std::panic::catch_unwind(|| support::request(daemon.addr(), "GET", "/livez", None).status);
    assert_ne!(plain.unwrap_or(0), 200, "no TLS, no answer");

    let socket = daemon.dir().join("api.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let unix = format!("unix:{}", socket.display());
    let inside = |args: &[&str]| daemon.cli_with(&[args, &["--server", &unix]].concat(), &[]);
    let (code, told) = inside(&["status", "--json"]);
    assert!(code == Some(0) && told.contains("\"chat\""), "{told}");
    assert_eq!(inside(&["stop", "chat"]).0, Some(0), "its user may do everything");

    tls(daemon.dir(), "two");
    // Looked at every few seconds; a reload of the config asks at once.
    eventually(|| (status("two.crt", ADMIN).0 == Some(0)).then_some(()));
    assert_ne!(status("one.crt", ADMIN).0, Some(0));
    // Another daemon takes over what was left of the socket of one that was killed, but not that of one that serves.
    let engines = support::Engines::of(&daemon);
    let daemon = Daemon::start_in_place(daemon.kill(&engines));
    assert!(fs::exists(daemon.dir().join("api.sock")).unwrap());
    assert_eq!(daemon.stop(), Some(0));
}

/// Runs `serve` until its log says this, or it ends.
fn serve_until(config: &str, said: &str) -> (Option<i32>, String) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("loose"), format!("{ADMIN} admin")).unwrap();
    fs::set_permissions(dir.path().join("loose"), fs::Permissions::from_mode(0o640)).unwrap();
    secret(dir.path(), "wrong", &format!("{ADMIN} admin\n{USER} nonsense"));
    secret(dir.path(), "empty", "# none\n");
    let file = dir.path().join("c.toml");
    fs::write(&file, format!("{config}\n[gpu]\nwait = \"60s\"\n")).unwrap();
    let mut command = binary();
    command.arg("serve").arg("--config").arg(&file).arg("--state-dir").arg(dir.path().join("state"));
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut all = String::new();
    for line in BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok) {
        all += &(line + "\n");
        if !said.is_empty() && all.contains(said) {
            support::signal(child.id(), "TERM");
            break;
        }
    }
    (child.wait().unwrap().code(), all)
}

#[test]
fn what_would_be_open_to_everybody_is_refused_or_said_loudly() {
    for (config, code, said) in [
        ("[node]\nlisten = \"0.0.0.0:0\"\n", 78, "not loopback"),
        ("[node]\nlisten = \"0.0.0.0:0\"\n[auth]\ntokens_file = \"wrong\"\n", 78, "for everybody to read"),
        ("[node]\nprofile = \"cloud\"\nlisten = \"127.0.0.1:0\"\n", 78, "requires tokens"),
        ("[node]\nlisten = \"127.0.0.1:0\"\n[auth]\ntokens_file = \"loose\"\n", 78, "others may read it"),
        ("[node]\nlisten = \"127.0.0.1:0\"\n[auth]\ntokens_file = \"wrong\"\n", 78, "line 2"),
        ("[node]\nlisten = \"127.0.0.1:0\"\n[auth]\ntokens_file = \"empty\"\n", 78, "no token"),
        ("[node]\nlisten = \"127.0.0.1:0\"\n[auth]\ntokens_file = \"absent\"\n", 78, "tokens_file"),
        ("[node]\nlisten = \"127.0.0.1:0\"\n[auth]\ntokens_env = \"NOT_SET_AT_ALL\"\n", 78, "no token"),
        ("[node]\nlisten = \"127.0.0.1:0\"\n[tls]\ncert = \"empty\"\nkey = \"empty\"\n", 78, "no certificate"),
    ] {
        let (ended, log) = serve_until(config, "");
        assert_eq!(ended, Some(code), "{config}\n{log}");
        assert!(log.contains(said), "{config}\n{log}");
        assert!(!log.contains(&ADMIN[6..]) && !log.contains(&USER[5..]), "{log}");
    }
    for config in [
        "[node]\nlisten = \"0.0.0.0:0\"\ninsecure = true\n",
        "[node]\nprofile = \"cloud\"\nlisten = \"127.0.0.1:0\"\ninsecure = true\n",
    ] {
        let (_, log) = serve_until(config, "the API listens");
        assert!(log.contains("INSECURE: everyone who reaches the API can do everything"), "{log}");
    }
    let (_, log) = serve_until("[node]\nlisten = \"127.0.0.1:0\"\n", "the API listens");
    assert!(!log.contains("INSECURE"), "{log}");
}
