//! A headless Chromium, driven by WebDriver (<https://www.w3.org/TR/webdriver2/>).

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::{eventually, request};

/// Name of an element in WebDriver's answers.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

pub struct Browser {
    driver: Child,
    addr: String,
    session: String,
    // Its profile; gone after it.
    _profile: tempfile::TempDir,
}

impl Browser {
    pub fn start(width: u32, height: u32) -> Self {
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .process_group(0)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("no chromedriver ({e}): `cargo xtask browser` installs it"));
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines().map_while(Result::ok);
        let told =
            lines.find_map(|l| l.split("successfully on port ").nth(1).map(|p| p.trim_end_matches('.').to_owned()));
        let addr = format!("127.0.0.1:{}", told.unwrap());
        std::thread::spawn(move || lines.for_each(drop));
        let profile = tempfile::tempdir().unwrap();
        let args = [
            "--headless=new".to_owned(),
            "--no-sandbox".to_owned(),
            "--disable-gpu".to_owned(),
            "--disable-quic".to_owned(),
            "--no-first-run".to_owned(),
            "--disable-background-networking".to_owned(),
            "--disable-component-update".to_owned(),
            "--disable-sync".to_owned(),
            "--disable-dev-shm-usage".to_owned(),
            format!("--user-data-dir={}", profile.path().display()),
            format!("--window-size={width},{height}"),
        ];
        let wish = json!({ "capabilities": { "alwaysMatch": {
            "goog:chromeOptions": { "args": args }, "goog:loggingPrefs": { "browser": "ALL" },
        } } });
        let mut browser = Self { driver, addr, session: String::new(), _profile: profile };
        let made = browser.send("POST", "/session", &wish);
        browser.session = made["sessionId"].as_str().unwrap_or_else(|| panic!("{made:#}")).to_owned();
        browser
    }

    fn send(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = (method == "POST").then(|| body.to_string());
        request(&self.addr, method, path, body.as_deref()).json()["value"].take()
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> Value {
        let value = self.send(method, &format!("/session/{}{path}", self.session), body);
        assert!(value["error"].is_null(), "{method} {path}: {value:#}");
        value
    }

    pub fn open(&self, url: &str) {
        self.ask("POST", "/url", &json!({ "url": url }));
    }

    /// What a script in the page returns.
    pub fn run(&self, script: &str) -> Value {
        self.ask("POST", "/execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// The text of what a CSS selector finds, once it holds `part`.
    pub fn until(&self, selector: &str, part: &str) -> String {
        let script = format!("return [...document.querySelectorAll({selector:?})].map((e) => e.innerText).join('\\n')");
        eventually(|| self.run(&script).as_str().filter(|text| text.contains(part)).map(str::to_owned))
    }

    /// Clicks as a mouse does: on what can be seen, once it is there. A page that lives may put a new one in its place.
    pub fn click(&self, selector: &str) {
        let find = json!({ "using": "css selector", "value": selector });
        eventually(|| {
            let found = self.send("POST", &format!("/session/{}/element", self.session), &find);
            let id = found[ELEMENT].as_str()?;
            let clicked = self.send("POST", &format!("/session/{}/element/{id}/click", self.session), &json!({}));
            clicked["error"].is_null().then_some(())
        });
    }

    /// Presses keys wherever the focus is.
    pub fn press(&self, keys: &str) {
        let each =
            keys.chars().flat_map(|c| ["keyDown", "keyUp"].map(|kind| json!({ "type": kind, "value": c.to_string() })));
        let actions = json!({ "actions": [{ "type": "key", "id": "keys", "actions": each.collect::<Vec<_>>() }] });
        self.ask("POST", "/actions", &actions);
    }

    /// What the page complained about so far.
    pub fn complaints(&self) -> Vec<String> {
        let log = self.ask("POST", "/se/log", &json!({ "type": "browser" }));
        log.as_array().unwrap().iter().map(|l| l["message"].to_string()).collect()
    }

    pub fn screenshot(&self, file: &Path) {
        let picture = self.ask("GET", "/screenshot", &Value::Null);
        std::fs::write(file, decode(picture.as_str().unwrap())).unwrap();
    }
}

/// Base64 as WebDriver writes it.
fn decode(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = text.bytes().filter_map(|b| DIGITS.iter().position(|d| *d == b));
    let (mut out, mut held, mut bits) = (Vec::new(), 0_usize, 0);
    for digit in digits {
        (held, bits) = (held << 6 | digit, bits + 6);
        if bits >= 8 {
            bits -= 8;
            out.push((held >> bits & 0xff) as u8);
        }
    }
    out
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() {
            self.send("DELETE", &format!("/session/{}", self.session), &Value::Null);
        }
        // Its browser is in its group.
        let _ = Command::new("kill").args(["-KILL", "--", &format!("-{}", self.driver.id())]).status();
        let _ = self.driver.wait();
    }
}
