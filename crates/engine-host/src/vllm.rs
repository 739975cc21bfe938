//! Asks vLLM over its API: OpenAI's, with `/health`, `/version` and Prometheus metrics beside it.

use pool_domain::Failure;
use pool_domain::liveness::{Signals, Work};
use pool_domain::meters::Reading;
use pool_services::ports::{Endpoint, Identity, Observed, Up};
use serde_json::{Value, json};

use crate::http::{Answer, Ask, NoAnswer};
use crate::metrics::{self, PAGE_BYTES};
use crate::probe::{self, PATIENCE};
use crate::text::tidy;

/// It listens only once its model is loaded; then the body is empty.
pub(crate) fn up(answer: &Answer) -> Up {
    match answer.status {
        200 if answer.text.trim().is_empty() => Up::Serving,
        200 => Up::Wrong("/health answers 200, but not as vLLM does".to_owned()),
        429 => Up::Overloaded("/health answers 429".to_owned()),
        // Its engine core is dead.
        status @ 500.. => Up::Failed(format!("/health answers {status}")),
        status => Up::Wrong(format!("/health answers {status}")),
    }
}

pub(crate) async fn identify(endpoint: &Endpoint) -> Result<Identity, Failure> {
    let (model, version) = tokio::join!(probe::served_model(endpoint), probe::get(endpoint, "/version"));
    let version = version?.json.as_ref().and_then(|json| json["version"].as_str().map(tidy));
    let Some(version) = version else { return Err(probe::wrong("/version tells no version".to_owned())) };
    // It does not tell how many requests it runs at once: as many as it was told to.
    Ok(Identity { model: model?, slots: 0, version: Some(version) })
}

pub(crate) fn unit_of_work(endpoint: &Endpoint) -> (&'static str, Value) {
    ("/v1/completions", json!({ "model": endpoint.model, "prompt": "Hi", "max_tokens": 1, "temperature": 0 }))
}

pub(crate) fn did_work(json: &Value) -> bool {
    json["usage"]["completion_tokens"].as_u64().is_some_and(|count| count > 0)
        || json["choices"][0]["text"].as_str().is_some_and(|text| !text.is_empty())
}

pub(crate) async fn observe(endpoint: &Endpoint) -> Observed {
    let ask = Ask { of: endpoint, path: "/metrics", body: None, timeout: PATIENCE, limit: PAGE_BYTES };
    match ask.send().await {
        Ok(answer) if answer.status == 200 => {
            let reading = metrics::of_kind(&endpoint.kind).map(|table| table.read(&answer.text)).unwrap_or_default();
            Observed { work: work(&reading), reading }
        }
        Err(NoAnswer::TimedOut(_)) => Work::Silent.into(),
        // That nobody answers there, its health tells.
        Ok(_) | Err(_) => Work::Untold.into(),
    }
}

/// How far it came, as its metrics tell.
fn work(reading: &Reading) -> Work {
    let Some(running) = reading.running else { return Work::Untold };
    Work::Told(Signals {
        running,
        waiting: reading.waiting.unwrap_or(0),
        counters: [reading.prompt_tokens, reading.generated_tokens].into_iter().flatten().collect(),
        slots: Vec::new(),
        // Prompt tokens are counted when the first token comes.
        prefill_told: false,
    })
}

/// What it says in an answer that is no success: newer versions as OpenAI does, older ones without the envelope.
pub(crate) fn said(json: &Value) -> Option<&str> {
    json["error"]["message"].as_str().or_else(|| json["message"].as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_is_an_empty_answer() {
        let health = |status, text: &str| up(&Answer { status, json: None, text: text.to_owned() });
        assert_eq!(health(200, ""), Up::Serving);
        assert!(matches!(health(200, "<html>"), Up::Wrong(_)));
        assert!(matches!(health(503, ""), Up::Failed(_)));
        assert!(matches!(health(404, ""), Up::Wrong(_)));
    }

    #[test]
    fn the_metrics_of_vllm_tell_of_its_work() {
        let reading = Reading {
            running: Some(3),
            waiting: Some(4),
            prompt_tokens: Some(17),
            generated_tokens: Some(1200),
            ..Reading::default()
        };
        let Work::Told(told) = work(&reading) else { panic!("untold") };
        assert_eq!((told.running, told.waiting, told.counters), (3, 4, vec![17, 1200]));
        assert_eq!(work(&Reading::default()), Work::Untold);
    }

    #[test]
    fn a_token_is_work() {
        assert!(did_work(&json!({ "usage": { "completion_tokens": 1 }, "choices": [{ "text": "" }] })));
        assert!(did_work(&json!({ "choices": [{ "text": "a" }] })));
        assert!(!did_work(&json!({ "choices": [{ "text": "" }] })));
    }

    #[test]
    fn what_it_says_of_a_refusal_is_found_in_both_forms() {
        assert_eq!(said(&json!({ "error": { "message": "no" } })), Some("no"));
        assert_eq!(said(&json!({ "object": "error", "message": "no" })), Some("no"));
    }
}
