//! What only another process can show: a sudden end, and a disk that refuses.

use std::env;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use pool_domain::FailureClass;
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, setrlimit, umask};

use crate::server::{Server, Then, file};
use crate::{Bench, content, fetch, holds, options};

const MIB: usize = 1 << 20;
const URL: &str = "FETCH_TEST_URL";
const CACHE: &str = "FETCH_TEST_CACHE";
const FILE_MAX: &str = "FETCH_TEST_FILE_MAX";

/// Not a test of its own: what the others start.
#[tokio::test]
#[ignore = "started by other tests"]
async fn fetches_for_others() {
    let (Ok(url), Ok(cache)) = (env::var(URL), env::var(CACHE)) else { return };
    // As a service has it.
    umask(Mode::from_raw_mode(0o077));
    let mut options = options(Path::new(&cache), &["http://127.0.0.1:1/*"]);
    let origin = url.rsplit_once('/').unwrap().0;
    options.policy.allow = vec![format!("{origin}/*").parse().unwrap()];
    options.limits.stall = Duration::from_secs(600);
    if let Ok(max) = env::var(FILE_MAX) {
        // Then a write fails instead of ending the process.
        signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::new(AtomicBool::new(false))).unwrap();
        let max = Some(max.parse().unwrap());
        setrlimit(Resource::Fsize, Rlimit { current: max, maximum: max }).unwrap();
        let failure = fetch(&model_store::Models::new(options), &url).await.unwrap_err();
        assert_eq!(failure.class, FailureClass::Node, "{failure}");
        assert!(failure.detail.contains("may not hold files as large"), "{failure}");
        return;
    }
    fetch(&model_store::Models::new(options), &url).await.unwrap();
}

fn child(url: &str, cache: &Path, more: Option<(&str, String)>) -> Child {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "child::fetches_for_others", "--ignored"]).stdout(Stdio::null());
    command.env(URL, url).env(CACHE, cache).envs(more).spawn().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn engines_of_other_users_can_read_what_was_fetched() {
    let model = content(3, MIB);
    let served = model.clone();
    let server = Server::start(move |seen| file(seen, &served, "\"1\"")).await;
    let b = Bench::new(&server);
    let url = server.url("/a.gguf");
    let mut done = child(&url, &b.options.cache_dir, None);
    assert!(tokio::task::block_in_place(|| done.wait()).unwrap().success());
    let path = b.fetch(&url).await.unwrap().local_path.unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o644);
    let dirs = path.ancestors().skip(1).take_while(|dir| *dir != b.dir.path());
    for dir in dirs {
        assert_eq!(mode(dir), 0o755, "{}", dir.display());
    }
    assert_eq!(server.requests(), 1);
}

#[tokio::test]
async fn what_a_killed_process_fetched_is_gone_on_with() {
    let model = content(1, 6 * MIB);
    let served = model.clone();
    let mut server = Server::start(move |seen| {
        let whole = file(seen, &served, "\"1\"");
        if seen.nth == 0 { whole.only(4 * MIB).then(Then::Stall) } else { whole }
    })
    .await;
    let b = Bench::new(&server);
    let url = server.url("/a.gguf");
    let mut child = child(&url, &b.options.cache_dir, None);
    // Until it wrote what it got.
    let grown = || {
        let partial = b.names("partial").into_iter().find(|n| !n.ends_with(".json"))?;
        std::fs::metadata(b.cache("partial").join(partial)).ok().map(|m| m.len() as usize)
    };
    let waited = tokio::time::timeout(Duration::from_secs(60), async {
        while grown() != Some(4 * MIB) {
            tokio::task::yield_now().await;
        }
    });
    waited.await.expect("the child writes what it gets");
    child.kill().unwrap();
    child.wait().unwrap();
    b.assert_nothing_usable();
    server.seen();
    holds(&b.fetch(&url).await.unwrap(), &model);
    let asked = server.seen();
    assert_eq!((asked.len(), asked[0].from(), asked[0].header("if-range")), (1, Some(4 * MIB), Some("\"1\"")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_takes_no_more_is_said_plainly() {
    let model = content(2, 4 * MIB);
    let served = model.clone();
    let server = Server::start(move |seen| file(seen, &served, "\"1\"")).await;
    let b = Bench::new(&server);
    let url = server.url("/a.gguf");
    let mut full = child(&url, &b.options.cache_dir, Some((FILE_MAX, MIB.to_string())));
    assert!(tokio::task::block_in_place(|| full.wait()).unwrap().success());
    b.assert_nothing_usable();
    // Once there is room, it goes on.
    holds(&b.fetch(&url).await.unwrap(), &model);
}
