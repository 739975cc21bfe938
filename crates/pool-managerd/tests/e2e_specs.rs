//! Pools that are declared over HTTP or in a file that is read again, seen from outside.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::path::Path;

use pool_managerd::config::{self, Overrides};
use pool_services::ports::{StateLedger, StoredPool};
use serde_json::{Value, json};
use state_dir::StateDir;
use support::{Answer, Daemon, Engines, request, request_with, write_config};

fn stub(id: &str, more: &str) -> String {
    format!("[[pool]]\nid = \"{id}\"\nmodel = \"stub:{id}\"\nengine = \"stub\"\nactivation = \"preload\"\n{more}\n")
}

fn ask(daemon: &Daemon, method: &str, path: &str, body: &Value) -> Answer {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    request(daemon.addr(), method, path, Some(&body))
}

fn code(answer: &Answer) -> (u16, String) {
    (answer.status, answer.json()["code"].as_str().unwrap_or_default().to_owned())
}

/// Who serves a pool, and as what.
fn who(pool: &Value) -> (Value, Value, Value) {
    (pool["replicas"][0]["pid"].clone(), pool["replicas"][0]["generation"].clone(), pool["revision"].clone())
}

fn ready(daemon: &Daemon, id: &str) -> Value {
    daemon.until(id, |p| p["ready"] == true)
}

/// Changes the pools of the config and keeps the rest.
fn rewrite(dir: &Path, change: impl FnOnce(&str) -> String) {
    let file = dir.join("pool-managerd.toml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, change(&text)).unwrap();
}

#[test]
fn a_pool_of_the_api_outlives_the_daemon_until_it_is_deleted() {
    let daemon = Daemon::start("");
    let engines = Engines::of(&daemon);
    // The API answers before the pools are there.
    daemon.get("/v1/pools");
    let body = json!({"model": "stub:chat", "engine": "stub", "activation": "preload", "slots": 2});
    let begun = support::eventually(|| {
        let answer = ask(&daemon, "PUT", "/v1/pools/chat?wait_ms=60000", &body);
        (answer.status != 503).then_some(answer)
    });
    assert_eq!((begun.status, &begun.json()["verb"]), (200, &"declare".into()), "{begun:?}");
    assert!(begun.head.to_ascii_lowercase().contains("etag: \"1\""), "{begun:?}");
    let before = ready(&daemon, "chat");
    assert_eq!((&before["source"], &before["slots_total"]), (&"api".into(), &2.into()));
    let spec = daemon.get("/v1/pools/chat/spec").json();
    assert_eq!(
        (&spec["revision"], &spec["pool"]["slots"], &spec["pool"]["id"]),
        (&1.into(), &2.into(), &"chat".into())
    );

    let mut daemon = Daemon::start_in_place(daemon.kill(&engines));
    let after = ready(&daemon, "chat");
    assert_eq!((who(&after), &after["source"]), (who(&before), &"api".into()), "the same engine, the same pool");
    daemon.wait_log("started");
    let gone = ask(&daemon, "DELETE", "/v1/pools/chat?wait_ms=60000", &Value::Null);
    assert_eq!((gone.status, &gone.json()["outcome"]), (200, &"removed".into()), "{gone:?}");
    assert_eq!(code(&daemon.get("/v1/pools/chat")), (404, "POOL_NOT_FOUND".into()));
    assert!(engines.running().is_empty());
    let daemon = Daemon::start_in_place(daemon.kill(&engines));
    let pools = support::eventually(|| Some(daemon.get("/v1/pools")).filter(|a| a.status == 200));
    assert_eq!(pools.json(), json!([]));
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn what_cannot_be_declared_changes_nothing() {
    let daemon = Daemon::start(&stub("filed", "aliases = [\"gpt\"]"));
    ready(&daemon, "filed");
    let free = json!({"model": "stub:free", "engine": "stub", "activation": "preload", "args": ["--load-ms", "1"]});
    assert_eq!(ask(&daemon, "PUT", "/v1/pools/free?wait_ms=60000", &free).status, 200);
    let seen = || ["filed", "free"].map(|id| who(&daemon.pool(id)));
    let before = seen();
    let put = |more: Value| {
        let mut body = json!({"model": "stub:a", "engine": "stub"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    for (method, path, body, status, expected) in [
        ("PUT", "filed", put(json!({})), 409, "POOL_IN_FILE"),
        ("DELETE", "filed", Value::Null, 409, "POOL_IN_FILE"),
        ("DELETE", "none", Value::Null, 404, "POOL_NOT_FOUND"),
        ("PUT", "gpt", put(json!({})), 409, "CONFLICT"),
        ("PUT", "new", put(json!({"aliases": ["filed"]})), 409, "CONFLICT"),
        ("PUT", "new", put(json!({"id": "other"})), 400, "INVALID_PARAMS"),
        ("PUT", "new", put(json!({"engine": "nobodys"})), 422, "ENGINE_UNKNOWN"),
        ("PUT", "new", put(json!({"args": ["--host", "0.0.0.0"]})), 422, "ARG_DENIED"),
        ("PUT", "new", put(json!({"args": ["--state-file", "/tmp/x"]})), 422, "ARG_DENIED"),
        ("PUT", "new", put(json!({"model": "file:/etc/shadow"})), 422, "MODEL_REF_INVALID"),
        ("PUT", "new", put(json!({"devices": "9"})), 422, "MASK_INVALID"),
        ("PUT", "new", put(json!({"vram": "900 GiB"})), 422, "DOES_NOT_FIT"),
        ("PUT", "new", put(json!({"vram": "900 GiB", "devices": ["0", "1"], "replicas": 2})), 422, "DOES_NOT_FIT"),
        ("POST", "free/reload", json!({"new_model_ref": "file:/no/such/model.gguf"}), 422, "MODEL_REF_INVALID"),
        ("POST", "free/reload", json!({"new_model_ref": "stub:x", "engine": "llama.cpp"}), 422, "MODEL_REF_INVALID"),
        ("POST", "free/reload", json!({"args": ["--state-file", "/tmp/x"]}), 422, "ARG_DENIED"),
        ("POST", "free/reload", json!({"id": "other"}), 400, "INVALID_PARAMS"),
        ("POST", "none/reload", json!({}), 404, "POOL_NOT_FOUND"),
        ("POST", "none/drain", json!({}), 404, "POOL_NOT_FOUND"),
        ("POST", "free/drain", json!({"deadline_ms": -1}), 400, "INVALID_PARAMS"),
        ("POST", "free/rollback", json!({}), 409, "CONFLICT"),
    ] {
        let answer = ask(&daemon, method, &format!("/v1/pools/{path}"), &body);
        assert_eq!(code(&answer), (status, expected.to_owned()), "{method} {path} {body}: {answer:?}");
        assert!(answer.json()["hint"].is_string(), "{method} {path} {body}: {answer:?}");
        assert!(!answer.body.contains("/etc/shadow") && !answer.body.contains(daemon.dir().to_str().unwrap()));
    }
    assert_eq!(seen(), before);
    assert_eq!(daemon.get("/v1/pools").json().as_array().unwrap().len(), 2);
    let stored = fs::read_dir(daemon.dir().join("state/pools")).unwrap().flatten();
    let stored: Vec<_> =
        stored.map(|e| e.file_name().into_string().unwrap()).filter(|n| !n.starts_with("free.")).collect();
    assert_eq!(stored, [""; 0], "nothing was written down");
    assert!(!daemon.dir().join("state/run/new-r0").exists(), "something was launched");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_file_that_is_read_again_touches_only_the_pools_that_changed() {
    let mut daemon = Daemon::start_without_terminal(&(stub("stays", "") + &stub("goes", "")));
    let (stays, goes) = (ready(&daemon, "stays"), ready(&daemon, "goes"));
    rewrite(daemon.dir(), |text| {
        text.replace(&stub("goes", ""), "") + &stub("comes", "") + "[models]\nroots = [\"/srv\"]\n"
    });
    daemon.signal("HUP");
    ready(&daemon, "comes");
    daemon.wait_log("the config was read again");
    assert!(daemon.wait_log("counts after a restart").contains("models.roots"));
    support::eventually(|| (daemon.get("/v1/pools/goes").status == 404).then_some(()));
    assert!(!support::alive(goes["replicas"][0]["pid"].as_u64().unwrap().try_into().unwrap()));
    assert_eq!(who(&daemon.pool("stays")), who(&stays));

    // The same file once more is nothing to do.
    let again = daemon.post("/v1/config/reload", "").json();
    assert_eq!((&again["pools"], &again["unchanged"]), (&json!([]), &json!(["comes", "stays"])), "{again}");
    assert_eq!(again["needs_restart"], json!(["models.roots"]));

    // A file that cannot be changes nothing, and says where it is wrong.
    let before = ["stays", "comes"].map(|id| who(&daemon.pool(id)));
    for (bad, place, why) in [
        (stub("stays", ""), "pool[2].id", "two pools"),
        (stub("more", "slotz = 1"), "pool[2].slotz", "unknown field"),
        (stub("more", "devices = \"0,0\""), "pool[2].devices", "twice"),
        (stub("more", "aliases = [\"stays\"]"), "pool[2].aliases", "alias"),
        (stub("more", "args = [\"--host\", \"x\"]"), "pool[2].args", "--host"),
    ] {
        let file = daemon.dir().join("pool-managerd.toml");
        let good = fs::read_to_string(&file).unwrap();
        let broken = good
            .replace("[models]", &format!("{bad}[models]"))
            .replace(&stub("comes", ""), &stub("comes", "slots = 9"));
        fs::write(&file, broken).unwrap();
        // In this order, so that nobody reads the file while it is put right again.
        daemon.signal("HUP");
        assert!(daemon.wait_log(place).contains("nothing was changed"));
        let refused = daemon.post("/v1/config/reload", "");
        assert_eq!(code(&refused), (400, "INVALID_PARAMS".into()), "{refused:?}");
        let detail = refused.json()["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains("line ") && detail.contains(place) && detail.contains(why), "{detail}");
        assert!(!detail.contains('/'), "{detail}");
        assert_eq!(["stays", "comes"].map(|id| who(&daemon.pool(id))), before);
        fs::write(&file, good).unwrap();
    }
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_pool_of_the_file_and_one_of_the_api_do_not_take_each_others_name() {
    let daemon = Daemon::start(&stub("filed", ""));
    ready(&daemon, "filed");
    let body = json!({"model": "stub:free", "engine": "stub", "activation": "preload"});
    assert_eq!(ask(&daemon, "PUT", "/v1/pools/free?wait_ms=60000", &body).status, 200);
    let before = who(&daemon.pool("free"));
    rewrite(daemon.dir(), |text| text.to_owned() + &stub("free", "") + &stub("more", ""));
    let told = daemon.post("/v1/config/reload", "").json();
    assert_eq!(
        (&told["pools"][0]["pool_id"], &told["pools"][0]["operation_id"]),
        (&"free".into(), &Value::Null),
        "{told}"
    );
    assert!(told["pools"][0]["problem"].as_str().unwrap().contains("over the API"), "{told}");
    ready(&daemon, "more");
    assert_eq!(who(&daemon.pool("free")), before);
    assert_eq!(daemon.stop(), Some(0));
}

/// Puts a pool into the state directory of a daemon that does not run.
fn store(dir: &Path, pool: &StoredPool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { StateDir::open(dir.join("state")).unwrap().store_pool(pool).await.unwrap() });
}

#[test]
fn an_override_holds_as_long_as_its_table_stands() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_config(dir.path(), &stub("chat", ""));
    let digest = config::load(Some(&file), &Overrides::default()).unwrap().pools[0].source.digest().unwrap().to_owned();
    let document = json!({"id": "chat", "model": "stub:newer", "engine": "stub", "activation": "preload"}).to_string();
    let (pool, file_digest) = ("chat".parse().unwrap(), Some(digest));
    store(dir.path(), &StoredPool { pool, revision: 4, document, file_digest, previous: None, probation: None });
    let daemon = Daemon::start_in_place(dir);
    let pool = ready(&daemon, "chat");
    assert_eq!((&pool["model"], &pool["revision"], &pool["source"]), (&"stub:newer".into(), &4.into(), &"file".into()));
    let dir = daemon.end_by("TERM");
    rewrite(dir.path(), |text| text.to_owned() + "slots = 3\n");
    let mut daemon = Daemon::start_in_place(dir);
    let pool = ready(&daemon, "chat");
    assert_eq!((&pool["model"], &pool["revision"], &pool["slots_total"]), (&"stub:chat".into(), &5.into(), &3.into()));
    daemon.wait_log("the file counts");
    assert!(!daemon.dir().join("state/pools/chat.json").exists(), "it does not come back");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_stored_pool_that_cannot_be_read_any_more_is_kept_and_not_started() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &stub("chat", "aliases = [\"gpt\"]"));
    let stored = |id: &str, document: Value| StoredPool {
        pool: id.parse().unwrap(),
        revision: 1,
        document: document.to_string(),
        file_digest: None,
        previous: None,
        probation: None,
    };
    store(dir.path(), &stored("old", json!({"id": "old", "model": "stub:old", "engine": "stub", "colour": "red"})));
    store(dir.path(), &stored("gpt", json!({"id": "gpt", "model": "stub:gpt", "engine": "stub"})));
    let mut daemon = Daemon::start_in_place(dir);
    ready(&daemon, "chat");
    assert!(daemon.wait_log("cannot be read any more").contains("colour"));
    assert!(daemon.wait_log("is left out").contains("gpt"));
    assert_eq!(daemon.get("/v1/pools").json().as_array().unwrap().len(), 1);
    assert!(daemon.dir().join("state/pools/old.json").exists());
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_pool_that_changed_in_the_file_is_reloaded_and_its_neighbour_keeps_its_engine() {
    let daemon = Daemon::start_without_terminal(&(stub("a", "") + &stub("b", "")));
    let (a, b) = (ready(&daemon, "a"), ready(&daemon, "b"));
    rewrite(daemon.dir(), |text| text.replace(&stub("a", ""), &stub("a", "slots = 2")));
    daemon.signal("HUP");
    // The old engine may be there a moment longer.
    let replaced = |p: &Value| p["replicas"].as_array().unwrap().iter().all(|r| r["pid"] != a["replicas"][0]["pid"]);
    let changed = daemon.until("a", |p| p["revision"] == 2 && p["ready"] == true && replaced(p));
    assert_eq!(changed["slots_total"], 2, "{changed:#}");
    assert_eq!(who(&daemon.pool("b")), who(&b), "pool b keeps pid and generation");
    // What cannot serve leaves the old engine, and the next reading tries again.
    rewrite(daemon.dir(), |text| text.replace("slots = 2", "slots = 3\nargs = [\"--serve-model\", \"other\"]"));
    for _ in 0..2 {
        let told = daemon.post("/v1/config/reload", "").json();
        let operation = told["pools"][0]["operation_id"].as_str().unwrap_or_else(|| panic!("{told}"));
        let over = daemon.get(&format!("/v1/operations/{operation}?wait_ms=60000")).json();
        assert_eq!((&over["verb"], &over["state"]), (&"reload".into(), &"failed".into()), "{over}");
        let now = daemon.until("a", |p| p["ready"] == true);
        assert_eq!((&now["revision"], &now["slots_total"]), (&2.into(), &2.into()), "{now:#}");
    }
    assert_eq!(who(&daemon.pool("b")), who(&b));
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_reload_over_http_is_kept_and_can_be_taken_back_also_by_a_later_daemon() {
    let daemon = Daemon::start(&stub("filed", ""));
    let engines = Engines::of(&daemon);
    ready(&daemon, "filed");
    let free = json!({"model": "stub:one", "engine": "stub", "activation": "preload"});
    assert_eq!(ask(&daemon, "PUT", "/v1/pools/free?wait_ms=60000", &free).status, 200);
    for id in ["free", "filed"] {
        let done = daemon.cli(&["reload", id, "--model", "stub:two", "--strategy", "in_place", "--deadline", "1m"]);
        assert!(done.contains(&format!("reload of {id}: reloaded")), "{done}");
        let pool = ready(&daemon, id);
        assert_eq!((&pool["model"], &pool["revision"]), (&"stub:two".into(), &2.into()), "{pool:#}");
    }
    let same = ask(&daemon, "POST", "/v1/pools/free/reload?wait_ms=60000", &json!({"new_model_ref": "stub:two"}));
    assert_eq!((&same.json()["outcome"], &daemon.pool("free")["revision"]), (&"unchanged".into(), &2.into()));
    // A whole declaration does the same, if it was made from what is there.
    let late = request_if(&daemon, "PUT", "/v1/pools/free", 1, &free);
    assert_eq!(code(&late), (409, "CONFLICT".into()), "{late:?}");

    let daemon = Daemon::start_in_place(daemon.kill(&engines));
    for id in ["free", "filed"] {
        let pool = ready(&daemon, id);
        assert_eq!((&pool["model"], &pool["revision"]), (&"stub:two".into(), &2.into()), "{pool:#}");
        let back: Value = serde_json::from_str(&daemon.cli(&["rollback", id, "--json"])).unwrap();
        assert_eq!((&back["verb"], &back["state"]), (&"rollback".into(), &"succeeded".into()), "{back}");
        let first = if id == "free" { "stub:one" } else { "stub:filed" };
        assert_eq!(ready(&daemon, id)["model"], first);
    }
    let three = json!({"model": "stub:three", "engine": "stub", "activation": "preload"});
    let revision = daemon.pool("free")["revision"].as_u64().unwrap();
    let put = request_if(&daemon, "PUT", "/v1/pools/free?wait_ms=60000", revision, &three);
    assert_eq!((put.status, &put.json()["outcome"]), (200, &"reloaded".into()), "{put:?}");
    assert_eq!(daemon.pool("free")["revision"], revision + 1);
    assert_eq!(daemon.stop(), Some(0));
}

fn request_if(daemon: &Daemon, method: &str, path: &str, revision: u64, body: &Value) -> Answer {
    request_with(daemon.addr(), method, path, &format!("If-Match: \"{revision}\"\r\n"), Some(&body.to_string()))
}
