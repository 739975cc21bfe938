//! Many who want the same, room, and what is here already.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use model_store::Models;
use pool_domain::FailureClass;
use pool_services::ports::{ModelStore, Presence};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;

use crate::server::{Server, file};
use crate::{Bench, content, failed, fetch, fetch_telling, holds, model, options, sha256};

const MIB: usize = 1 << 20;

async fn serving(model: &[u8]) -> Server {
    let served = model.to_vec();
    Server::start(move |seen| file(seen, &served, "\"1\"")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_who_want_the_same_wait_for_one_download() {
    let model = content(1, 2 * MIB);
    let server = serving(&model).await;
    let b = Bench::new(&server);
    let url = server.url("/a.gguf");
    // Half of them share a store, the others have one of their own, as other processes do.
    let shared = b.models();
    let mut waiters = JoinSet::new();
    for n in 0..64 {
        let (models, url) = (if n % 2 == 0 { shared.clone() } else { b.models() }, url.clone());
        waiters.spawn(async move { fetch(&models, &url).await });
    }
    while let Some(done) = waiters.join_next().await {
        holds(&done.unwrap().unwrap(), &model);
    }
    assert_eq!(server.requests(), 1);
}

#[tokio::test]
async fn https_is_trusted_only_where_its_certificate_is() {
    let certified = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key.into())
        .unwrap();
    let model = content(2, MIB);
    let served = model.clone();
    let tls = Some(TlsAcceptor::from(Arc::new(config)));
    let server = Server::with_tls(tls, move |seen| file(seen, &served, "\"1\"")).await;
    let mut b = Bench::new(&server);
    let url = format!("https://{}/a.gguf", server.addr);
    b.options.policy.allow = vec![format!("https://{}/*", server.addr).parse().unwrap()];
    failed(b.fetch(&url).await, &FailureClass::Fetch, "TLS handshake");
    let ca = b.dir.path().join("ca.pem");
    fs::write(&ca, certified.cert.pem()).unwrap();
    b.options.ca_file = Some(ca);
    holds(&b.fetch(&url).await.unwrap(), &model);
}

#[tokio::test]
async fn a_file_that_looks_otherwise_is_read_again_and_one_that_is_otherwise_fetched_again() {
    let model = content(3, MIB);
    let server = serving(&model).await;
    let b = Bench::new(&server);
    let url = server.url("/a.gguf");
    let path = b.fetch(&url).await.unwrap().local_path.unwrap();
    // Copied back from a backup: the same content with another inode and another time.
    fs::copy(&path, b.dir.path().join("copy")).unwrap();
    fs::remove_file(&path).unwrap();
    fs::copy(b.dir.path().join("copy"), &path).unwrap();
    let (found, told) = fetch_telling(&b.models(), &url).await;
    holds(&found.unwrap(), &model);
    assert_eq!(told.unwrap().step.code(), "verifying");
    let (found, told) = fetch_telling(&b.models(), &url).await;
    holds(&found.unwrap(), &model);
    assert_eq!((told, server.requests()), (None, 1), "it is known again");
    // Another content of the same length.
    fs::write(&path, content(4, MIB)).unwrap();
    holds(&b.fetch(&url).await.unwrap(), &model);
    assert_eq!(server.requests(), 2);
    // And one that nobody could see without reading it.
    let mut bytes = model.clone();
    bytes[MIB / 2] ^= 1;
    let times = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, &bytes).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(times).unwrap();
    let mut always = b.options.clone();
    always.verify_always = true;
    holds(&fetch(&Models::new(always), &url).await.unwrap(), &model);
    assert_eq!(server.requests(), 3);
}

#[tokio::test]
async fn nothing_is_fetched_by_looking() {
    let model_file = content(5, MIB);
    let server = serving(&model_file).await;
    let b = Bench::new(&server);
    let models = b.models();
    let url = server.url("/a.gguf");
    assert_eq!(models.look(&model(&url)).await, Ok(Presence::Remote));
    assert_eq!((server.requests(), b.cache("").exists()), (0, false));
    let found = fetch(&models, &url).await.unwrap();
    assert_eq!(models.look(&model(&url)).await, Ok(Presence::Here(found)));
    assert!(models.permits(&model("https://evil.example.org/a.gguf")).is_err());
}

#[tokio::test]
async fn models_that_nobody_needs_leave_for_one_that_is_needed() {
    let model_file = content(6, 3 * MIB);
    let server = serving(&model_file).await;
    let mut b = Bench::new(&server);
    b.options.cache_max = Some(7 << 20);
    let url = |name: &str| server.url(&format!("/{name}.gguf"));
    let models = b.models();
    let kept = model(&url("kept"));
    models.keep(move || vec![kept.clone()]);
    // A store that nobody told what is in use removes nothing.
    let untold = b.models();
    for name in ["kept", "old"] {
        fetch(&models, &url(name)).await.unwrap();
    }
    // Its length is known once the server tells it, which is when it would be too much.
    let sized = |name: &str| format!("{}#sha256={}", url(name), sha256(&model_file));
    let hub = crate::hub::Hub::start(vec![("new.gguf", model_file.clone())]).await;
    let mut with_hub = b.options.clone();
    with_hub.policy.hf_endpoint = hub.endpoint();
    with_hub.policy.allow.push("hf:*".parse().unwrap());
    let models = Models::new(with_hub);
    let kept = model(&url("kept"));
    models.keep(move || vec![kept.clone()]);
    // The content is here: it takes no room.
    fetch(&models, "hf:org/repo/new.gguf").await.unwrap();
    assert_eq!(b.names("refs").len(), 3);
    let other = crate::hub::Hub::start(vec![("other.gguf", content(7, 2 * MIB))]).await;
    let mut options = b.options.clone();
    options.policy.hf_endpoint = other.endpoint();
    options.policy.allow.push("hf:*".parse().unwrap());
    let models = Models::new(options.clone());
    let kept = model(&url("kept"));
    models.keep(move || vec![kept.clone()]);
    fetch(&models, "hf:org/other/other.gguf").await.unwrap();
    assert_eq!(untold.look(&model(&url("old"))).await, Ok(Presence::Remote), "the one not used for longest");
    assert!(matches!(untold.look(&model(&url("kept"))).await, Ok(Presence::Here(_))));
    // More than the cap, whoever leaves.
    let huge = crate::hub::Hub::start(vec![("huge.gguf", content(8, 6 * MIB))]).await;
    options.policy.hf_endpoint = huge.endpoint();
    let models = Models::new(options);
    let kept = model(&url("kept"));
    models.keep(move || vec![kept.clone()]);
    failed(fetch(&models, "hf:org/huge/huge.gguf").await, &FailureClass::Node, "raise `[models] cache_max`");
    assert!(matches!(untold.look(&model(&sized("kept"))).await, Ok(Presence::Here(_))));
    assert_eq!(huge.file_requests(), 0, "said before anything is fetched");
}

#[tokio::test]
async fn where_only_the_answer_tells_the_size_room_is_made_before_its_body_is_taken() {
    let bytes = content(12, 3 * MIB);
    let mut server = serving(&bytes).await;
    let mut b = Bench::new(&server);
    b.options.cache_max = Some(4 << 20);
    let models = b.models();
    models.keep(Vec::new);
    let url = |name: &str| server.url(&format!("/{name}.gguf"));
    let [first, second] = ["first", "second"].map(url);
    for url in [&first, &second] {
        holds(&fetch(&models, url).await.unwrap(), &bytes);
    }
    // The same content is there once; its names count all the same, and the older one left.
    assert_eq!(models.look(&model(&first)).await, Ok(Presence::Remote));
    b.options.cache_max = Some(5 << 20);
    let (small, third) = (b.models(), url("third"));
    let pinned = model(&second);
    small.keep(move || vec![pinned.clone()]);
    failed(fetch(&small, &third).await, &FailureClass::Node, "raise `[models] cache_max`");
    assert!(matches!(small.look(&model(&second)).await, Ok(Presence::Here(_))));
    assert_eq!((server.seen().len(), b.names("partial").iter().filter(|n| !n.ends_with("json")).count()), (3, 1));
    let partial = b.names("partial").into_iter().find(|n| !n.ends_with("json")).unwrap();
    assert_eq!(fs::metadata(b.cache("partial").join(partial)).unwrap().len(), 0, "nothing of it was taken");
}

#[tokio::test]
async fn a_local_file_is_compared_with_its_digest_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let bytes = content(9, MIB);
    fs::write(&path, &bytes).unwrap();
    let mut options = options(&dir.path().join("cache"), &[]);
    options.roots = vec![dir.path().to_owned()];
    let models = Models::new(options);
    let text = |digest: &str| format!("file:{}#sha256={digest}", path.display());
    let right = text(&sha256(&bytes));
    let (found, told) = fetch_telling(&models, &right).await;
    holds(&found.unwrap(), &bytes);
    assert_eq!(told.map(|t| t.step.code()), Some("verifying"));
    let (found, told) = fetch_telling(&models, &right).await;
    assert_eq!((found.is_ok(), told), (true, None), "it was read before");
    failed(fetch(&models, &text(&sha256(b"x"))).await, &FailureClass::Artifact, "is not what its digest says");
    fs::write(&path, content(10, MIB)).unwrap();
    failed(fetch(&models, &right).await, &FailureClass::Artifact, "is not what its digest says");
}

#[tokio::test]
async fn a_download_that_nobody_waits_for_any_more_is_kept_and_gone_on_with() {
    let model = content(11, 4 * MIB);
    let served = model.clone();
    let stalls = Arc::new(AtomicBool::new(true));
    let switch = Arc::clone(&stalls);
    let mut server = Server::start(move |seen| {
        let whole = file(seen, &served, "\"1\"");
        if switch.load(Ordering::SeqCst) { whole.only(3 * MIB).then(crate::server::Then::Stall) } else { whole }
    })
    .await;
    let mut b = Bench::new(&server);
    b.options.limits.stall = std::time::Duration::from_secs(600);
    let (models, url) = (b.models(), server.url("/a.gguf"));
    let (told, mut heard) = tokio::sync::watch::channel(None);
    let (asked, there) = (crate::model(&url), models.clone());
    let task = tokio::spawn(async move { there.ensure_present(&asked, &told).await });
    heard.wait_for(|s| s.is_some_and(|s| s.done >= 2 << 20)).await.unwrap();
    task.abort();
    let _ = task.await;
    stalls.store(false, Ordering::SeqCst);
    server.seen();
    holds(&fetch(&models, &url).await.unwrap(), &model);
    let from = server.seen()[0].from().unwrap();
    assert!((2 * MIB..=3 * MIB).contains(&from), "{from}");
}
