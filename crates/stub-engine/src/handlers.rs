//! The HTTP API, as llama-server has it.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use futures_util::stream;
use serde_json::{Value, json};

use crate::answer::{Job, Refusal, Shape, Task, plain_text, unix_seconds};
use crate::engine::{Engine, Health};
use crate::generate::{count_tokens, embedding, relevance};

/// What the engine says it was built from.
pub(crate) const BUILD_INFO: &str = concat!("stub-engine ", env!("CARGO_PKG_VERSION"));

type Shared = State<Arc<Engine>>;

pub(crate) fn router(engine: Arc<Engine>, api_key: Option<String>) -> Router {
    let key: Option<Arc<str>> = api_key.map(Arc::from);
    Router::new()
        .route("/health", get(health))
        .route("/v1/health", get(health))
        .route("/props", get(props))
        .route("/slots", get(slots))
        .route("/metrics", get(metrics))
        .route("/models", get(models))
        .route("/v1/models", get(models))
        .route("/completion", post(completion))
        .route("/v1/completions", post(text_completion))
        .route("/v1/chat/completions", post(chat_completion))
        .route("/v1/embeddings", post(embeddings))
        .route("/v1/rerank", post(rerank))
        .fallback(not_found)
        .layer(middleware::from_fn_with_state(key, refuse_without_key))
        .layer(middleware::from_fn_with_state(Arc::clone(&engine), refuse_while_loading))
        .with_state(engine)
}

/// As llama-server does; some paths are for everybody.
async fn refuse_without_key(State(key): State<Option<Arc<str>>>, request: Request, next: Next) -> Response {
    let public = ["/health", "/v1/health", "/models", "/v1/models"].contains(&request.uri().path());
    let bears = |key: &str| {
        let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        given.and_then(|value| value.strip_prefix("Bearer ")) == Some(key)
    };
    if public || key.as_deref().is_none_or(bears) {
        return next.run(request).await;
    }
    error(StatusCode::UNAUTHORIZED, "authentication_error", "Invalid API Key")
}

/// Until the model is loaded every path gives the same answer.
async fn refuse_while_loading(State(engine): Shared, request: Request, next: Next) -> Response {
    let Health::Loading { progress } = engine.health() else {
        return next.run(request).await;
    };
    let mut body = error_body(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", "Loading model");
    body["progress"] = json!((progress * 100.0).floor() / 100.0);
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

async fn health(State(engine): Shared) -> Response {
    if engine.health() == Health::Unhealthy {
        return error(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", "Unhealthy, as asked");
    }
    Json(json!({ "status": "ok" })).into_response()
}

async fn props(State(engine): Shared) -> Json<Value> {
    Json(json!({
        "default_generation_settings": { "id": 0, "n_ctx": engine.slot_context(), "is_processing": false },
        "total_slots": engine.args.slots,
        "model_path": engine.args.served_path(),
        "model_alias": engine.args.served_name(),
        "modalities": { "vision": false, "audio": false },
        "build_info": BUILD_INFO,
    }))
}

async fn slots(State(engine): Shared) -> Json<Value> {
    let context = engine.slot_context();
    let slots = engine.progress().enumerate().map(|(id, at)| {
        let mut slot = json!({ "id": id, "n_ctx": context, "is_processing": at.is_some() });
        if let Some(at) = at {
            slot["id_task"] = json!(at.task);
            slot["n_prompt_tokens_processed"] = json!(at.prompt);
            slot["next_token"] = json!([{ "n_decoded": at.decoded }]);
        }
        slot
    });
    Json(slots.collect())
}

async fn metrics(State(engine): Shared) -> impl IntoResponse {
    let counters = &engine.counters;
    let predicted = counters.predicted_tokens.load(Relaxed);
    let seconds = counters.predicted_micros.load(Relaxed) as f64 / 1e6;
    let speed = if seconds > 0.0 { predicted as f64 / seconds } else { 0.0 };
    let busy = engine.progress().flatten().count();
    let metrics = [
        (
            "prompt_tokens_total",
            "counter",
            "Prompt tokens processed.",
            counters.prompt_tokens.load(Relaxed).to_string(),
        ),
        ("tokens_predicted_total", "counter", "Tokens generated.", predicted.to_string()),
        ("tokens_predicted_seconds_total", "counter", "Time spent generating.", seconds.to_string()),
        ("predicted_tokens_seconds", "gauge", "Average tokens per second.", speed.to_string()),
        ("requests_processing", "gauge", "Requests in a slot.", busy.to_string()),
        ("requests_deferred", "gauge", "Requests that wait for one.", counters.deferred.load(Relaxed).to_string()),
    ];
    let lines = metrics.map(|(name, kind, help, value)| {
        format!("# HELP llamacpp:{name} {help}\n# TYPE llamacpp:{name} {kind}\nllamacpp:{name} {value}\n")
    });
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], lines.concat())
}

async fn models(State(engine): Shared) -> Json<Value> {
    let model = json!({
        "id": engine.args.served_name(), "object": "model", "created": unix_seconds(), "owned_by": "stub-engine",
        "meta": { "n_ctx_train": engine.args.ctx_size },
    });
    Json(json!({ "object": "list", "data": [model] }))
}

async fn completion(State(engine): Shared, body: Bytes) -> Response {
    generate(Shape::Native, &engine, &body).await
}

async fn text_completion(State(engine): Shared, body: Bytes) -> Response {
    generate(Shape::Text, &engine, &body).await
}

async fn chat_completion(State(engine): Shared, body: Bytes) -> Response {
    generate(Shape::Chat, &engine, &body).await
}

async fn generate(shape: Shape, engine: &Arc<Engine>, body: &[u8]) -> Response {
    let task = match parse(body).and_then(|body| Task::parse(shape, &body, engine)) {
        Ok(task) => task,
        Err(refusal) => return refuse(&refusal),
    };
    let mut job = Job::start(task, engine.admit().await);
    if job.task.stream {
        return event_stream(job);
    }
    let mut text = String::new();
    while let Some(word) = job.next().await {
        text.push_str(&word);
    }
    Json(job.whole(&text)).into_response()
}

fn event_stream(job: Job) -> Response {
    enum Step {
        Head(Job),
        Token(Job),
    }
    let events = stream::unfold(Some(Step::Head(job)), async |step| {
        let mut job = match step? {
            Step::Head(job) => match job.head() {
                Some(head) => return Some((event(&head), Some(Step::Token(job)))),
                None => job,
            },
            Step::Token(job) => job,
        };
        if let Some(token) = job.next().await {
            return Some((event(&job.delta(&token)), Some(Step::Token(job))));
        }
        let mut tail: String = job.tail().iter().map(event).collect();
        if job.task.shape != Shape::Native {
            tail.push_str("data: [DONE]\n\n");
        }
        Some((tail, None))
    });
    let events = futures_util::StreamExt::map(events, Ok::<_, Infallible>);
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(events)).into_response()
}

fn event(data: &Value) -> String {
    format!("data: {data}\n\n")
}

async fn embeddings(State(engine): Shared, body: Bytes) -> Response {
    let body = match parse(&body) {
        Ok(body) => body,
        Err(refusal) => return refuse(&refusal),
    };
    let inputs = match &body["input"] {
        // An array of token ids is one input; an array of anything else is one input each.
        Value::Array(inputs) if !inputs.iter().all(Value::is_number) => inputs.iter().map(plain_text).collect(),
        input => plain_text(input).map(|text| vec![text]),
    };
    let Some(inputs) = inputs else {
        return refuse(&Refusal::Invalid("'input' is missing or not text".to_owned()));
    };
    let _slot = engine.admit().await;
    let tokens = count_prompt(&engine, inputs.iter());
    let data: Vec<_> = inputs
        .iter()
        .enumerate()
        .map(|(index, text)| json!({ "index": index, "object": "embedding", "embedding": embedding(text) }))
        .collect();
    let usage = json!({ "prompt_tokens": tokens, "total_tokens": tokens });
    let model = engine.args.served_name();
    Json(json!({ "object": "list", "model": model, "data": data, "usage": usage })).into_response()
}

async fn rerank(State(engine): Shared, body: Bytes) -> Response {
    let body = match parse(&body) {
        Ok(body) => body,
        Err(refusal) => return refuse(&refusal),
    };
    let documents: Option<Vec<_>> = body["documents"].as_array().and_then(|all| all.iter().map(plain_text).collect());
    let (Some(query), Some(documents)) = (body["query"].as_str(), documents) else {
        return refuse(&Refusal::Invalid("'query' and 'documents' must be given as text".to_owned()));
    };
    let _slot = engine.admit().await;
    let tokens = count_prompt(&engine, documents.iter());
    let mut scores: Vec<_> = documents.iter().map(|document| relevance(query, document)).enumerate().collect();
    scores.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    scores.truncate(body["top_n"].as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX));
    let results: Vec<_> =
        scores.into_iter().map(|(index, score)| json!({ "index": index, "relevance_score": score })).collect();
    let usage = json!({ "prompt_tokens": tokens, "total_tokens": tokens });
    let model = engine.args.served_name();
    Json(json!({ "object": "list", "model": model, "results": results, "usage": usage })).into_response()
}

fn count_prompt<'a>(engine: &Engine, texts: impl Iterator<Item = &'a String>) -> u64 {
    let tokens = texts.map(|text| count_tokens(text)).sum();
    engine.counters.prompt_tokens.fetch_add(tokens, Relaxed);
    tokens
}

async fn not_found() -> Response {
    error(StatusCode::NOT_FOUND, "not_found_error", "File Not Found")
}

fn parse(body: &[u8]) -> Result<Value, Refusal> {
    let value: Value = serde_json::from_slice(body).map_err(|error| Refusal::Invalid(error.to_string()))?;
    if value.is_object() { Ok(value) } else { Err(Refusal::Invalid("the body is not a JSON object".to_owned())) }
}

fn refuse(refusal: &Refusal) -> Response {
    match refusal {
        Refusal::Invalid(why) => error(StatusCode::BAD_REQUEST, "invalid_request_error", why),
        Refusal::TooLong { prompt_tokens, context } => {
            let message = "the request exceeds the available context size, try increasing it";
            let mut body = error_body(StatusCode::BAD_REQUEST, "exceed_context_size_error", message);
            body["error"]["n_prompt_tokens"] = json!(prompt_tokens);
            body["error"]["n_ctx"] = json!(context);
            (StatusCode::BAD_REQUEST, Json(body)).into_response()
        }
    }
}

fn error(status: StatusCode, kind: &str, message: &str) -> Response {
    (status, Json(error_body(status, kind, message))).into_response()
}

fn error_body(status: StatusCode, kind: &str, message: &str) -> Value {
    json!({ "error": { "code": status.as_u16(), "message": message, "type": kind } })
}
