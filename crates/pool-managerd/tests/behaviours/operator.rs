//! What operators do with pools, and what comes of it.

use cucumber::{then, when};
use serde_json::{Value, json};

use crate::site::{Site, assert_refused, millis};
use crate::support::request;

fn strategy(how: &str) -> Value {
    json!(if how == "in place" { "in_place" } else { "overlap" })
}

#[when(regex = r#"^the operator (preloads|resumes) "([^"]+)"$"#)]
fn plain_verb(site: &mut Site, verb: String, pool: String) {
    site.post(&format!("/v1/pools/{pool}/{}", verb.trim_end_matches('s')), &json!({}));
    site.at = pool;
}

#[when(regex = r#"^the operator rolls back "([^"]+)"$"#)]
fn rolls_back(site: &mut Site, pool: String) {
    site.post(&format!("/v1/pools/{pool}/rollback"), &json!({}));
    site.at = pool;
}

#[when(regex = r#"^the operator drains "([^"]+)" within (\w+)( or not at all)?$"#)]
fn drains(site: &mut Site, pool: String, deadline: String, or_not: String) {
    let on_deadline = if or_not.is_empty() { "force" } else { "abort" };
    let body = json!({ "deadline_ms": millis(&deadline), "on_deadline": on_deadline });
    site.post(&format!("/v1/pools/{pool}/drain"), &body);
    site.at = pool;
}

#[when(
    regex = r#"^the operator reloads "([^"]+)" with the model "([^"]+)" (in place|with overlap)(?: within (\w+))?$"#
)]
fn reloads(site: &mut Site, pool: String, model: String, how: String, deadline: String) {
    let mut body = json!({ "new_model_ref": model, "strategy": strategy(&how) });
    if !deadline.is_empty() {
        body["deadline_ms"] = json!(millis(&deadline));
    }
    site.post(&format!("/v1/pools/{pool}/reload"), &body);
    site.at = pool;
}

#[when(regex = r#"^the operator reloads "([^"]+)" with an engine that serves something else (in place|with overlap)$"#)]
fn reloads_badly(site: &mut Site, pool: String, how: String) {
    let body = json!({ "args": ["--serve-model", "another"], "strategy": strategy(&how) });
    site.post(&format!("/v1/pools/{pool}/reload"), &body);
    site.at = pool;
}

#[when(regex = r#"^the operator reloads "([^"]+)" with a model that is not there$"#)]
fn reloads_nothing(site: &mut Site, pool: String) {
    let body = json!({ "new_model_ref": "file:/nowhere/none.gguf" });
    site.post(&format!("/v1/pools/{pool}/reload"), &body);
    site.at = pool;
}

#[when(regex = r#"^the operator resets the breaker of "([^"]+)"$"#)]
fn resets(site: &mut Site, pool: String) {
    site.post(&format!("/v1/pools/{pool}/breaker/reset"), &json!({}));
    assert!(site.answer().status < 300, "{:?}", site.answer());
    site.at = pool;
}

#[when(regex = r#"^the operator declares pool "([^"]+)" on GPU (\d+)$"#)]
fn declares(site: &mut Site, pool: String, gpu: u32) {
    let body = json!({ "model": "stub:any", "engine": "stub", "devices": gpu.to_string() }).to_string();
    site.answer = Some(request(site.daemon().addr(), "PUT", &format!("/v1/pools/{pool}"), Some(&body)));
}

#[then(regex = r#"^it is refused with "([^"]+)"$"#)]
fn refused(site: &mut Site, code: String) {
    assert_refused(site.answer(), &code);
}

/// The operation that was begun last, once it is over.
fn over(site: &Site) -> Value {
    let begun = site.answer().json();
    let id = begun["operation_id"].as_str().unwrap_or_else(|| panic!("{begun:#}"));
    let over = site.daemon().get(&format!("/v1/operations/{id}?wait_ms=60000")).json();
    assert_ne!(over["state"], "running", "{over:#}");
    over
}

#[then("the operation succeeds")]
fn succeeds(site: &mut Site) {
    let over = over(site);
    assert_eq!(over["state"], "succeeded", "{over:#}");
}

#[then("the operation fails")]
fn fails(site: &mut Site) {
    let over = over(site);
    assert_eq!(over["state"], "failed", "{over:#}");
    assert!(over["problem"].as_str().is_some_and(|p| !p.is_empty()), "{over:#}");
}

fn plan(site: &mut Site, context: u64) {
    let wish = site.plan.as_mut().expect("a model to plan");
    wish["context"] = json!(context);
    let wish = wish.clone();
    site.post("/v1/plan", &wish);
    assert_eq!(site.answer().status, 200, "{:?}", site.answer());
}

#[when(regex = r"^the operator plans a context of (\d+) tokens$")]
fn plans(site: &mut Site, context: u64) {
    plan(site, context);
}

#[then(regex = r"^it does not fit, because of GPU (\d+)$")]
fn does_not_fit(site: &mut Site, gpu: u32) {
    let told = site.answer().json();
    assert_eq!(told["fits"], false, "{told:#}");
    assert!(told["reason"].as_str().unwrap().contains(&format!("GPU {gpu}")), "{told:#}");
}

#[when("the operator plans the context that is proposed instead")]
fn plans_proposed(site: &mut Site) {
    let told = site.answer().json();
    let proposed = told["remedies"].as_array().unwrap().iter().find_map(|r| {
        let tokens = r.as_str()?.strip_prefix("context = ")?.strip_suffix(" fits")?;
        tokens.parse().ok()
    });
    plan(site, proposed.unwrap_or_else(|| panic!("{told:#}")));
}

#[then("it fits")]
fn fits(site: &mut Site) {
    let told = site.answer().json();
    assert_eq!(told["fits"], true, "{told:#}");
}

#[then(regex = r"^no GPU holds more KV cache than GPU (\d+) has room for$")]
fn capped(site: &mut Site, gpu: usize) {
    let told = site.answer().json();
    let room = told["devices"][gpu]["room_bytes"].as_u64().unwrap();
    for device in told["devices"].as_array().unwrap() {
        let kv = device["estimate"]["kv_bytes"].as_u64().unwrap();
        assert!(kv > 0 && kv <= room, "{told:#}");
        assert!(device["promised_bytes"].as_u64() <= device["room_bytes"].as_u64(), "{told:#}");
    }
}

#[then(regex = r"^(\d+) tokens more would not fit$")]
fn no_more(site: &mut Site, tokens: u64) {
    let context = site.answer().json()["context"].as_u64().unwrap();
    plan(site, context + tokens);
    assert_eq!(site.answer().json()["fits"], false, "{:?}", site.answer());
}
