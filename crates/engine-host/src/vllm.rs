//! Asks vLLM over its API: OpenAI's, with `/health`, `/version` and Prometheus metrics beside it.

use pool_domain::Failure;
use pool_domain::liveness::{Signals, Work};
use pool_services::ports::{Endpoint, Identity, Up};
use serde_json::{Value, json};

use crate::http::{Answer, Ask, NoAnswer};
use crate::probe::{self, PATIENCE};
use crate::signals::total;
use crate::text::tidy;

/// A hundred metrics with a label for each bucket of each histogram.
const METRICS_BYTES: usize = 16 * 1024 * 1024;

const RUNNING: &str = "vllm:num_requests_running";
const WAITING: &str = "vllm:num_requests_waiting";
/// Totals of work done, whatever the requests were.
const COUNTERS: [&str; 2] = ["vllm:prompt_tokens_total", "vllm:generation_tokens_total"];

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

pub(crate) async fn signals(endpoint: &Endpoint) -> Work {
    let ask = Ask { addr: endpoint.addr, path: "/metrics", body: None, timeout: PATIENCE, limit: METRICS_BYTES };
    match ask.send().await {
        Ok(answer) if answer.status == 200 => read(&answer.text),
        Err(NoAnswer::TimedOut(_)) => Work::Silent,
        // That nobody answers there, its health tells.
        Ok(_) | Err(_) => Work::Untold,
    }
}

fn read(metrics: &str) -> Work {
    let count = |name: &str| total(metrics, name).and_then(|n| u32::try_from(n).ok());
    let Some(running) = count(RUNNING) else { return Work::Untold };
    Work::Told(Signals {
        running,
        waiting: count(WAITING).unwrap_or(0),
        counters: COUNTERS.iter().filter_map(|name| total(metrics, name)).collect(),
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
    fn the_metrics_of_vllm_are_read() {
        let metrics = "# TYPE vllm:num_requests_running gauge\n\
            vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 2.0\n\
            vllm:num_requests_running{engine=\"1\",model_name=\"m\"} 1.0\n\
            vllm:num_requests_waiting{engine=\"0\",model_name=\"m\"} 4.0\n\
            vllm:prompt_tokens_total{engine=\"0\",model_name=\"m\"} 17.0\n\
            vllm:prompt_tokens_created{engine=\"0\",model_name=\"m\"} 1.7e+09\n\
            vllm:generation_tokens_total{engine=\"0\",model_name=\"m\"} 1.2e+03\n";
        let Work::Told(told) = read(metrics) else { panic!("untold") };
        assert_eq!((told.running, told.waiting, told.counters), (3, 4, vec![17, 1200]));
        assert_eq!(read("python_info 1\n"), Work::Untold);
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
