//! Asks engines over the API of their kind; here is llama-server's, which the stub engine has too.

use std::time::Duration;

use async_trait::async_trait;
use pool_domain::liveness::Work;
use pool_domain::{Failure, FailureClass};
use pool_services::Workload;
use pool_services::ports::{Endpoint, EngineProbe, Identity, Observed, PROBE_TIMEOUT, Up, Worked};
use serde_json::{Value, json};

use crate::decl::Kind;
use crate::http::{Answer, Ask, NoAnswer};
use crate::signals;
use crate::text::tidy;
use crate::vllm;

/// Who asks for health or work decides how long to wait (`[pool.health]`); this only bounds what was forgotten.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3600);
/// Enough for any answer about health.
const UP_BYTES: usize = 64 * 1024;
/// A chat template, a wide vector, the parameters of many slots.
const ANSWER_BYTES: usize = 1024 * 1024;

/// Asks over HTTP.
#[derive(Debug, Clone, Copy, Default)]
pub struct HttpProbe(());

impl HttpProbe {
    /// A probe; it keeps no connections.
    #[must_use]
    pub fn new() -> Self {
        Self(())
    }
}

#[async_trait]
impl EngineProbe for HttpProbe {
    async fn up(&self, endpoint: &Endpoint) -> Up {
        let ask = Ask { of: endpoint, path: "/health", body: None, timeout: PATIENCE, limit: UP_BYTES };
        match ask.send().await {
            Ok(answer) if is_vllm(endpoint) => vllm::up(&answer),
            Ok(answer) => up(&answer),
            Err(NoAnswer::Refused) => Up::Refused,
            Err(NoAnswer::TooLong) => Up::Wrong("/health answers with something long".to_owned()),
            Err(error) => Up::Failed(error.to_string()),
        }
    }

    async fn identify(&self, endpoint: &Endpoint) -> Result<Identity, Failure> {
        if is_vllm(endpoint) {
            return vllm::identify(endpoint).await;
        }
        let (served, props) = tokio::join!(served_model(endpoint), get(endpoint, "/props"));
        let (served, props) = (served?, props?);
        let props = props.json.filter(|_| props.status == 200).unwrap_or_default();
        if let (Some(expected), Some(path)) = (&endpoint.model_path, props["model_path"].as_str())
            && !same_file(expected, path.as_ref()).await
        {
            return Err(wrong(format!("it serves the file `{}`", crate::text::file_name(path.as_ref()))));
        }
        let slots = props["total_slots"].as_u64().unwrap_or(1).max(1);
        Ok(Identity {
            model: served,
            slots: u16::try_from(slots).unwrap_or(u16::MAX),
            version: props["build_info"].as_str().map(tidy),
        })
    }

    async fn work(&self, endpoint: &Endpoint) -> Result<Worked, Failure> {
        let model = &endpoint.model;
        let vllm = is_vllm(endpoint);
        let (path, body) = match endpoint.workload {
            Workload::Generate if vllm => vllm::unit_of_work(endpoint),
            Workload::Generate => ("/completion", json!({ "prompt": "Hi", "n_predict": 1, "cache_prompt": false })),
            Workload::Embed => ("/v1/embeddings", json!({ "model": model, "input": "Hi" })),
            Workload::Rerank => ("/v1/rerank", json!({ "model": model, "query": "Hi", "documents": ["Hi"] })),
        };
        let ask = Ask { of: endpoint, path, body: Some(body), timeout: PATIENCE, limit: ANSWER_BYTES };
        let answer = ask.send().await.map_err(|error| match error {
            NoAnswer::TimedOut(_) => Failure::new(FailureClass::Hang, format!("{path}: {error}")),
            _ => Failure::new(FailureClass::Health, format!("{path}: {error}")),
        })?;
        let done = |json: &Value| match endpoint.workload {
            Workload::Generate if vllm => vllm::did_work(json),
            workload => did_work(workload, json),
        };
        if answer.status == 200 && answer.json.as_ref().is_some_and(done) {
            return Ok(Worked::Done);
        }
        if matches!(answer.status, 429 | 503) {
            return Ok(Worked::Declined);
        }
        let message = if vllm { vllm::said } else { message };
        let said = answer.json.as_ref().and_then(message).map(|text| format!(": {}", tidy(text))).unwrap_or_default();
        let detail = format!("{path} answered {} without a {}{said}", answer.status, unit(endpoint.workload));
        Err(Failure::new(FailureClass::Health, detail))
    }

    async fn signals(&self, endpoint: &Endpoint) -> Work {
        self.observe(endpoint).await.work
    }

    async fn observe(&self, endpoint: &Endpoint) -> Observed {
        if is_vllm(endpoint) { vllm::observe(endpoint).await } else { signals::ask(endpoint).await }
    }
}

fn is_vllm(endpoint: &Endpoint) -> bool {
    endpoint.kind == Kind::Vllm.code()
}

/// The model it says it serves, which is the one expected.
pub(crate) async fn served_model(endpoint: &Endpoint) -> Result<String, Failure> {
    let models = get(endpoint, "/v1/models").await?;
    let served = models.json.as_ref().and_then(|models| models["data"][0]["id"].as_str());
    let Some(served) = served.filter(|_| models.status == 200) else {
        return Err(wrong(format!("/v1/models names no model (status {})", models.status)));
    };
    if served != endpoint.model {
        return Err(wrong(format!("it serves `{}` instead of `{}`", tidy(served), endpoint.model)));
    }
    Ok(served.to_owned())
}

pub(crate) async fn get(endpoint: &Endpoint, path: &str) -> Result<Answer, Failure> {
    let ask = Ask { of: endpoint, path, body: None, timeout: PROBE_TIMEOUT, limit: ANSWER_BYTES };
    ask.send().await.map_err(|error| Failure::new(FailureClass::Health, format!("{path}: {error}")))
}

fn up(answer: &Answer) -> Up {
    let json = answer.json.as_ref();
    match (answer.status, json) {
        (200, Some(json)) if json["status"] == "ok" => Up::Serving,
        (200, _) => Up::Wrong("/health answers 200, but not as an engine does".to_owned()),
        (503, Some(json)) => {
            let said = message(json).or_else(|| json["status"].as_str()).unwrap_or_default();
            if said.to_ascii_lowercase().contains("loading") {
                #[expect(clippy::cast_possible_truncation, reason = "a share, shown to people")]
                let progress = json["progress"].as_f64().map(|share| share.clamp(0.0, 1.0) as f32);
                return Up::Loading(progress);
            }
            // It may be ill or have too much to do; what it does tells.
            Up::Overloaded(format!("/health answers 503: {}", tidy(said)))
        }
        (status @ (429 | 503), _) => Up::Overloaded(format!("/health answers {status}")),
        (status @ 500.., _) => Up::Failed(format!("/health answers {status}")),
        (status, _) => Up::Wrong(format!("/health answers {status}")),
    }
}

fn message(json: &Value) -> Option<&str> {
    json["error"]["message"].as_str()
}

fn did_work(workload: Workload, json: &Value) -> bool {
    match workload {
        Workload::Generate => {
            json["tokens_predicted"].as_u64().is_some_and(|count| count > 0)
                || json["content"].as_str().is_some_and(|text| !text.is_empty())
        }
        Workload::Embed => {
            let vector = json["data"][0]["embedding"].as_array();
            vector.is_some_and(|vector| !vector.is_empty() && vector.iter().all(Value::is_number))
        }
        Workload::Rerank => json["results"][0]["relevance_score"].is_number(),
    }
}

fn unit(workload: Workload) -> &'static str {
    match workload {
        Workload::Generate => "token",
        Workload::Embed => "vector",
        Workload::Rerank => "score",
    }
}

async fn same_file(expected: &std::path::Path, served: &std::path::Path) -> bool {
    if expected == served {
        return true;
    }
    let (expected, served) = tokio::join!(tokio::fs::canonicalize(expected), tokio::fs::canonicalize(served));
    matches!((expected, served), (Ok(expected), Ok(served)) if expected == served)
}

pub(crate) fn wrong(detail: String) -> Failure {
    Failure::new(FailureClass::WrongServer, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_is_read_from_status_and_body() {
        let health = |status, json: Option<Value>| up(&Answer { status, json, text: String::new() });
        assert_eq!(health(200, Some(json!({ "status": "ok" }))), Up::Serving);
        assert!(matches!(health(200, None), Up::Wrong(_)), "KoboldCpp answers 200 with HTML to everything");
        assert!(matches!(health(200, Some(json!({ "status": "up" }))), Up::Wrong(_)));
        assert_eq!(health(503, Some(json!({ "status": "loading model" }))), Up::Loading(None));
        let new = json!({ "error": { "code": 503, "message": "Loading model" }, "progress": 0.5 });
        assert_eq!(health(503, Some(new)), Up::Loading(Some(0.5)));
        let ill = json!({ "error": { "code": 503, "message": "Unhealthy" } });
        assert!(matches!(health(503, Some(ill)), Up::Overloaded(_)));
        assert!(matches!(health(503, None), Up::Overloaded(_)));
        assert!(matches!(health(429, None), Up::Overloaded(_)));
        assert!(matches!(health(500, None), Up::Failed(_)));
        assert!(matches!(health(302, None), Up::Wrong(_)));
        assert!(matches!(health(404, None), Up::Wrong(_)));
    }

    #[test]
    fn work_is_what_the_workload_makes() {
        assert!(did_work(Workload::Generate, &json!({ "content": "", "tokens_predicted": 1 })));
        assert!(did_work(Workload::Generate, &json!({ "content": "a" })));
        assert!(!did_work(Workload::Generate, &json!({ "content": "" })));
        assert!(did_work(Workload::Embed, &json!({ "data": [{ "embedding": [0.5] }] })));
        assert!(!did_work(Workload::Embed, &json!({ "data": [{ "embedding": [null] }] })));
        assert!(did_work(Workload::Rerank, &json!({ "results": [{ "relevance_score": 0.1 }] })));
    }
}
