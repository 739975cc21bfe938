//! The dashboard in a real browser, over the real daemon with stub engines.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use support::browser::Browser;
use support::{Daemon, Engines, signal};

const POOLS: &str = r#"
[[pool]]
id = "chat"
model = "stub:chat"
engine = "stub"
args = ["--vram", "6 GiB"]
vram = "7 GiB"
slots = 4
activation = "on_demand"
[pool.backoff]
initial = "2s"
max = "2s"
jitter = 0.0
[[pool]]
id = "other"
model = "stub:other"
engine = "stub"
activation = "on_demand"
"#;

#[test]
fn a_pool_starts_crashes_recovers_and_is_drained_on_the_page() {
    let daemon = Daemon::start(POOLS);
    let engines = Engines::of(&daemon);
    let browser = Browser::start(1280, 1000);
    browser.open(&format!("http://{}/", daemon.addr()));
    browser.until("[data-pool=chat]", "idle");
    browser.until("#devices", "Simulated RTX 4090");
    browser.until("#connection", "live");

    // By mouse, with a question in between.
    browser.click("[data-pool=chat] [aria-label='Preload chat']");
    browser.until("#confirm", "Starts its engines");
    browser.click("#confirm-yes");
    let card = browser.until("[data-pool=chat][data-state=ready]", "0 of 4 slots in use");
    assert!(card.contains("proof: simulated"), "{card}");
    browser.until("#devices", "used by chat");
    if let Some(file) = std::env::var_os("POOL_MANAGERD_SCREENSHOT") {
        browser.screenshot(file.as_ref());
    }

    let first = engines.running();
    signal(first[0], "KILL");
    browser.until("[data-pool=chat]", "1 restarts");
    browser.until("[data-pool=chat][data-state=ready]", "ready");
    assert_ne!(engines.running(), first);
    browser.until("#events", "Restarting the chat pool");
    browser.click("[data-pool=chat] [aria-label='Logs chat']");
    browser.until("#panel-body", "listening on");
    browser.press("\u{e00c}");

    // By keyboard alone.
    browser.run("document.querySelector(\"[aria-label='Drain chat']\").focus()");
    browser.press("\u{e007}");
    browser.until("#confirm", "refused at once");
    // From the field that is asked for on to the button that says yes.
    browser.run("document.querySelector('#confirm-yes').focus()");
    browser.press(" ");
    browser.until("[data-pool=chat]", "on hold");
    browser.until("[data-pool=chat][data-state=idle]", "idle");
    browser.until("#events", "drain of chat: drained");
    assert!(engines.running().is_empty());

    // What is given up does nothing.
    browser.click("[data-pool=other] [aria-label='Preload other']");
    browser.until("#confirm", "Starts its engines");
    browser.press("\u{e00c}");
    browser.click("[data-pool=other] [aria-label='Plan other']");
    browser.until("#panel", "Memory plan of other");
    assert_eq!(daemon.pool("other")["state"], "idle");

    let complaints = browser.complaints();
    assert!(complaints.is_empty(), "{complaints:#?}");
    drop(browser);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn nothing_is_wider_than_a_phone() {
    let daemon = Daemon::start(POOLS);
    let browser = Browser::start(500, 900);
    browser.open(&format!("http://{}/", daemon.addr()));
    browser.until("[data-pool=chat]", "idle");
    // The narrowest window that a headless Chromium has is wider than a phone: the page lies in a frame of its own width.
    let width = browser.run(
        "document.body.style.width = '360px'; document.documentElement.style.width = '360px';
         const widest = Math.max(...[...document.querySelectorAll('main *')]
             .filter((e) => !e.closest('.scroll')).map((e) => e.getBoundingClientRect().right));
         return widest",
    );
    assert!(width.as_f64().unwrap() <= 360.0, "{width}");
    drop(browser);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn the_reference_shows_the_document_and_asks_nobody_else() {
    let daemon = Daemon::start(POOLS);
    let browser = Browser::start(1280, 1000);
    browser.open(&format!("http://{}/docs", daemon.addr()));
    browser.until("#reference", "/v1/pools/{id}/drain");
    // One that is tried on the page.
    browser.click("[id$='-livez'] .opblock-summary-control");
    browser.click("[id$='-livez'] .try-out__btn");
    browser.click("[id$='-livez'] .execute");
    browser.until("[id$='-livez'] .live-responses-table .response-col_status", "200");
    let complaints = browser.complaints();
    assert!(complaints.is_empty(), "{complaints:#?}");
}
