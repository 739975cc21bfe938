//! Servers that stall, cut, lie, change their mind, send elsewhere, or cannot now.

use pool_domain::FailureClass;

use crate::server::{Reply, Seen, Server, Then, file};
use crate::{Bench, content, failed, fetch, fetch_telling, holds, sha256};

const MIB: usize = 1 << 20;

#[tokio::test]
async fn a_model_is_fetched_once_and_then_it_is_there() {
    let model = content(1, 3 * MIB);
    let served = model.clone();
    let mut server = Server::start(move |seen| file(seen, &served, "\"1\"")).await;
    let b = Bench::new(&server);
    let url = server.url("/m/tiny.gguf");
    let (found, told) = fetch_telling(&b.models(), &url).await;
    let found = found.unwrap();
    holds(&found, &model);
    assert_eq!(found.id, "tiny");
    assert_eq!(found.local_path.as_ref().unwrap().file_name().unwrap(), "tiny.gguf");
    let told = told.unwrap();
    assert_eq!((told.step.code(), told.done, told.total), ("fetching", 3 << 20, Some(3 << 20)));
    let asked = server.seen();
    assert_eq!((asked.len(), asked[0].header("accept-encoding")), (1, Some("identity")));
    // Another start, another daemon: nobody is asked any more, also not when it is offline.
    assert_eq!(b.fetch(&url).await.unwrap(), found);
    let mut offline = b.options.clone();
    offline.policy.offline = true;
    assert_eq!(fetch(&model_store::Models::new(offline), &url).await.unwrap(), found);
    assert_eq!(server.requests(), 1);
    assert_eq!(b.names("partial"), Vec::<String>::new());
}

/// Gives a part of the file only, `times` times, and then the rest.
fn faulty(content: Vec<u8>, times: usize, then: Then) -> impl Fn(&Seen) -> Reply + Send + Sync {
    move |seen| {
        let whole = file(seen, &content, "\"1\"");
        if seen.nth < times { whole.only(MIB).then(then) } else { whole }
    }
}

#[tokio::test]
async fn a_connection_that_is_cut_is_taken_up_where_it_ended() {
    let model = content(2, 5 * MIB);
    let mut server = Server::start(faulty(model.clone(), 3, Then::Close)).await;
    let b = Bench::new(&server);
    holds(&b.fetch(&server.url("/a.gguf")).await.unwrap(), &model);
    let from: Vec<_> = server.seen().iter().map(|s| (s.from(), s.header("if-range").map(str::to_owned))).collect();
    let tag = Some("\"1\"".to_owned());
    let expected =
        [None, Some(MIB), Some(2 * MIB), Some(3 * MIB)].map(|from| (from, tag.clone().filter(|_| from.is_some())));
    assert_eq!(from, expected);
}

#[tokio::test]
async fn a_server_that_sends_nothing_any_more_is_left() {
    let model = content(3, 3 * MIB);
    let server = Server::start(faulty(model.clone(), 2, Then::Stall)).await;
    let b = Bench::new(&server);
    holds(&b.fetch(&server.url("/a.gguf")).await.unwrap(), &model);
    let silent = Server::start(|_| Reply { head: String::new(), ..Reply::status("") }.then(Then::Stall)).await;
    failed(Bench::new(&silent).fetch(&silent.url("/a.gguf")).await, &FailureClass::Fetch, "does not answer");
    assert_eq!(silent.requests(), 4, "as often as the limits say");
}

#[tokio::test]
async fn a_content_that_changes_in_between_is_fetched_from_its_beginning() {
    let (old, new) = (content(4, 3 * MIB), content(5, 4 * MIB));
    for honest in [true, false] {
        let (before, after) = (old.clone(), new.clone());
        let server = Server::start(move |seen| {
            if seen.nth == 0 {
                file(seen, &before, "\"old\"").only(MIB)
            } else if honest {
                file(seen, &after, "\"new\"")
            } else {
                // It does not know If-Range: a part of another content.
                let mut seen = seen.clone();
                seen.headers.remove("if-range");
                file(&seen, &after, "\"new\"")
            }
        })
        .await;
        let b = Bench::new(&server);
        holds(&b.fetch(&server.url("/a.gguf")).await.unwrap(), &new);
    }
}

#[tokio::test]
async fn a_server_without_ranges_or_names_is_asked_for_all_of_it_again() {
    let model = content(6, 2 * MIB);
    let served = model.clone();
    let mut server = Server::start(move |seen| {
        let whole = Reply::whole(&served);
        if seen.nth == 0 { whole.only(MIB) } else { whole }
    })
    .await;
    let b = Bench::new(&server);
    holds(&b.fetch(&server.url("/a.gguf")).await.unwrap(), &model);
    assert!(server.seen().iter().all(|s| s.from().is_none()), "what is here could not be told from another content");
}

#[tokio::test]
async fn a_length_that_never_comes_is_given_up() {
    let part = content(7, MIB / 2);
    let server = Server::start(move |seen| {
        let mut long = part.clone();
        long.resize(MIB, 0);
        // Whatever is asked for, the rest never comes.
        if seen.from().is_some() {
            file(seen, &long, "\"1\"").only(0)
        } else {
            file(seen, &long, "\"1\"").only(MIB / 2)
        }
    })
    .await;
    let b = Bench::new(&server);
    failed(b.fetch(&server.url("/a.gguf")).await, &FailureClass::Fetch, "cut the connection");
    b.assert_nothing_usable();
    assert_eq!(server.requests(), 4);
}

#[tokio::test]
async fn a_server_that_sends_more_than_there_is_room_for_is_stopped() {
    // Without a length, by chunks, and without an end.
    let server = Server::start(|_| {
        let chunk = [format!("{:x}\r\n", MIB).into_bytes(), vec![7; MIB], b"\r\n".to_vec()].concat();
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n".to_owned();
        Reply { head, body: chunk.repeat(8), then: Then::Stall }
    })
    .await;
    let mut b = Bench::new(&server);
    b.options.cache_max = Some(4 << 20);
    let models = b.models();
    models.keep(Vec::new);
    failed(fetch(&models, &server.url("/a.gguf")).await, &FailureClass::Artifact, "more than it said");
    b.assert_nothing_usable();
}

#[tokio::test]
async fn who_cannot_now_is_asked_again_and_not_for_ever() {
    let model = content(8, MIB);
    let served = model.clone();
    let server = Server::start(move |seen| match seen.nth {
        0 => Reply::status("503 Service Unavailable").with("retry-after", "0"),
        1 => Reply::status("429 Too Many Requests"),
        2 => Reply::status("502 Bad Gateway"),
        _ => file(seen, &served, "\"1\""),
    })
    .await;
    holds(&Bench::new(&server).fetch(&server.url("/a.gguf")).await.unwrap(), &model);
    let never = Server::start(|_| Reply::status("503 Service Unavailable")).await;
    failed(Bench::new(&never).fetch(&never.url("/a.gguf")).await, &FailureClass::Fetch, "status 503");
    assert_eq!(never.requests(), 4);
    // Longer than anybody waits here: the pool says so and comes back later.
    let later = Server::start(|_| Reply::status("429 Too Many Requests").with("retry-after", "86400")).await;
    failed(Bench::new(&later).fetch(&later.url("/a.gguf")).await, &FailureClass::Fetch, "status 429");
    assert_eq!(later.requests(), 1);
}

#[tokio::test]
async fn who_does_not_want_to_is_not_asked_again() {
    for (line, because) in [
        ("404 Not Found", "no such file"),
        ("403 Forbidden", "[models.tokens]"),
        ("401 Unauthorized", "[models.tokens]"),
        ("418 I'm a teapot", "status 418"),
        ("204 No Content", "status 204"),
    ] {
        let server = Server::start(move |_| Reply::status(line)).await;
        failed(Bench::new(&server).fetch(&server.url("/a.gguf")).await, &FailureClass::Artifact, because);
        assert_eq!(server.requests(), 1, "{line}");
    }
    let zipped = Server::start(|_| Reply::whole(b"GGUF").with("content-encoding", "gzip")).await;
    failed(Bench::new(&zipped).fetch(&zipped.url("/a.gguf")).await, &FailureClass::Artifact, "encoded");
}

#[tokio::test]
async fn a_redirect_leads_only_where_the_policy_allows() {
    let model = content(9, MIB);
    let served = model.clone();
    let other = Server::start(move |seen| file(seen, &served, "\"1\"")).await;
    let elsewhere = other.url("/b?signature=secret");
    let to = elsewhere.clone();
    let server = Server::start(move |seen| Reply::to(if seen.target == "/a.gguf" { &to } else { "/a.gguf" })).await;
    let mut b = Bench::new(&server);
    let refused = b.fetch(&server.url("/a.gguf")).await.unwrap_err();
    assert!(!refused.detail.contains("secret"), "{refused}");
    failed(Err(refused), &FailureClass::Artifact, &format!("leads to http://{}", other.addr));
    assert_eq!(other.requests(), 0);
    b.options.policy.allow.push(other.url("/*").parse().unwrap());
    holds(&b.fetch(&server.url("/x.gguf")).await.unwrap(), &model);
    for bad in ["http://169.254.169.254/latest", "file:///etc/passwd", "http://user@127.0.0.1/", "/../x"] {
        let server = Server::start(move |_| Reply::to(bad)).await;
        let done = Bench::new(&server).fetch(&server.url("/a.gguf")).await;
        assert_eq!(done.unwrap_err().class, FailureClass::Artifact, "{bad}");
    }
    let round = Server::start(|_| Reply::to("/a.gguf")).await;
    failed(Bench::new(&round).fetch(&round.url("/a.gguf")).await, &FailureClass::Artifact, "redirected 8 times");
}

#[tokio::test]
async fn a_name_that_means_this_machine_is_not_connected_to() {
    let server = Server::start(|seen| file(seen, b"GGUF", "\"1\"")).await;
    let port = server.addr.port();
    let mut b = Bench::new(&server);
    // A name like any other, but for what it means here.
    let name = hostname();
    b.options.policy.allow = vec![format!("http://{name}:{port}/*").parse().unwrap()];
    let failure = b.fetch(&format!("http://{name}:{port}/a.gguf")).await.unwrap_err();
    assert_eq!(server.requests(), 0, "{failure}");
    b.options.policy.allow = vec![format!("http://localhost:{port}/*").parse().unwrap()];
    // `localhost` says what it means.
    b.fetch(&format!("http://localhost:{port}/a.gguf")).await.unwrap_err();
    assert!(server.requests() > 0);
}

/// A name of this machine that is not `localhost`.
fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let name = name.trim().to_ascii_lowercase();
    if name.starts_with("localhost") { format!("x.{name}") } else { name }
}

#[tokio::test]
async fn a_wrong_digest_leaves_nothing_usable() {
    let model = content(10, MIB);
    let served = model.clone();
    let server = Server::start(move |seen| file(seen, &served, "\"1\"")).await;
    let b = Bench::new(&server);
    let (right, wrong) = (sha256(&model), sha256(b"another"));
    let url = |digest: &str| format!("{}#sha256={digest}", server.url("/a.gguf"));
    failed(b.fetch(&url(&wrong)).await, &FailureClass::Artifact, &format!("it is sha256:{right}"));
    b.assert_nothing_usable();
    assert_eq!(b.names("partial"), Vec::<String>::new());
    assert_eq!(server.requests(), 1, "it was not resumed: it is what the server has");
    holds(&b.fetch(&url(&right)).await.unwrap(), &model);
    // What is there does not become another because somebody says so.
    failed(b.fetch(&url(&wrong)).await, &FailureClass::Artifact, "is not what its digest says");
}

#[tokio::test]
async fn what_is_here_of_a_wrong_content_is_fetched_again() {
    let (model, other) = (content(11, 3 * MIB), content(12, 3 * MIB));
    let served = model.clone();
    // The first part is of something else, and the server has no name for it.
    let server = Server::start(move |seen| match seen.nth {
        0 => Reply::whole(&other).only(MIB),
        _ => {
            let head = file(seen, &served, "\"1\"").head.replace("etag: \"1\"\r\n", "");
            Reply { head, ..file(seen, &served, "\"1\"") }
        }
    })
    .await;
    let b = Bench::new(&server);
    let url = format!("{}#sha256={}", server.url("/a.gguf"), sha256(&model));
    holds(&b.fetch(&url).await.unwrap(), &model);
}

#[tokio::test]
async fn what_is_not_allowed_is_not_asked_for() {
    let server = Server::start(|seen| file(seen, b"GGUF", "\"1\"")).await;
    let mut b = Bench::new(&server);
    let url = server.url("/a.gguf");
    b.options.policy.offline = true;
    failed(
        b.fetch(&url).await,
        &FailureClass::Artifact,
        "`[models] offline` is set, and the model is not in the cache",
    );
    b.options.policy.allow.clear();
    failed(b.fetch(&url).await, &FailureClass::Artifact, "no entry of `[models] allow`");
    assert_eq!(server.requests(), 0);
}
