//! What the handlers' annotations do not say of themselves: answers that every route can give, bodies that are read as they
//! come, the shapes of ids, and examples.

use axum::http::Method;
use serde_json::{Map, Value, json};

use crate::dto::{Code, Problem};
use crate::server::auth::{self, Need};
use crate::spec::PoolSpec;

const PROBLEM: &str = "application/problem+json";
const METHODS: [(&str, Method); 4] =
    [("get", Method::GET), ("post", Method::POST), ("put", Method::PUT), ("delete", Method::DELETE)];

pub(super) fn complete(document: &mut Value) {
    let Some(Value::Object(schemas)) = document.pointer_mut("/components/schemas") else { return };
    add_spec(schemas);
    if let Some(code) = schemas.get_mut("Problem").and_then(|p| p.pointer_mut("/properties/code")) {
        code["enum"] = Code::ALL.iter().map(|c| c.as_str()).collect();
    }
    let Some(Value::Object(paths)) = document.get_mut("paths") else { return };
    for (path, item) in paths {
        for (name, method) in METHODS {
            if let Some(Value::Object(operation)) = item.get_mut(name) {
                complete_operation(path, &method, operation);
            }
        }
    }
}

/// The pool's table: the schema of the config file, under the names of this document.
fn add_spec(schemas: &mut Map<String, Value>) {
    let settings =
        schemars::generate::SchemaSettings::draft2020_12().with(|s| s.definitions_path = "/components/schemas".into());
    let mut generator = settings.into_generator();
    let _ = generator.subschema_for::<PoolSpec>();
    for (name, schema) in generator.take_definitions(true) {
        schemas.entry(name).or_insert(schema);
    }
    // The path names it.
    if let Some(Value::Array(required)) = schemas.get_mut("PoolSpec").and_then(|s| s.get_mut("required")) {
        required.retain(|key| key != "id");
    }
}

fn complete_operation(path: &str, method: &Method, operation: &mut Map<String, Value>) {
    if let Some(Value::Array(parameters)) = operation.get_mut("parameters") {
        for parameter in parameters {
            if let Some((schema, example)) = parameter["name"].as_str().and_then(|name| shape(path, name)) {
                parameter["schema"] = schema;
                parameter["example"] = example;
            }
        }
    }
    if let Some((schema, examples)) = body(path, method) {
        let content = operation.entry("requestBody").or_insert_with(|| json!({ "required": true }));
        let content = &mut content["content"]["application/json"];
        if let Some(schema) = schema {
            content["schema"] = schema;
        }
        content["examples"] = examples;
    }
    if path == "/v1/pools/{id}" && method == Method::PUT {
        let one_of = json!({ "oneOf": [refer("OperationView"), refer("PlanView")] });
        if let Some(schema) =
            operation.get_mut("responses").and_then(|r| r.pointer_mut("/200/content/application~1json"))
        {
            schema["schema"] = one_of;
        }
    }
    let Some(Value::Object(responses)) = operation.get_mut("responses") else { return };
    for answer in usual(path, method) {
        // A gateway's answers are of its clients' forms.
        if !responses.contains_key("4XX") || answer.0 == "403" {
            responses.entry(answer.0).or_insert_with(|| problem(&answer.1));
        }
    }
    for response in responses.values_mut() {
        add_examples(response);
    }
}

fn refer(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

fn problem(description: &str) -> Value {
    json!({ "description": description, "content": { PROBLEM: { "schema": refer("Problem") } } })
}

/// Answers that do not depend on what the handler does.
fn usual(path: &str, method: &Method) -> Vec<(&'static str, String)> {
    let open = auth::need(method, path) == Need::Nothing;
    let mut answers = vec![
        ("403", if open { "FORBIDDEN_HOST" } else { "FORBIDDEN or FORBIDDEN_HOST" }.to_owned()),
        ("431", "INVALID_PARAMS: the head is too large".to_owned()),
    ];
    if path.contains('{') || path.starts_with("/v1/") {
        answers.push(("400", "INVALID_PARAMS".to_owned()));
    }
    if !open {
        answers.push(("401", "UNAUTHORIZED".to_owned()));
        answers.push(("503", "UNAVAILABLE".to_owned()));
    }
    if path.contains("/pools/{id}") || path.contains("/models/{id}") {
        answers.push(("404", "POOL_NOT_FOUND".to_owned()));
    }
    if matches!(*method, Method::POST | Method::PUT) {
        answers.push(("408", "INVALID_PARAMS: the body did not come in time".to_owned()));
        answers.push(("413", "INVALID_PARAMS: the body is too large".to_owned()));
    }
    answers
}

/// An example of each code that a problem's description names.
fn add_examples(response: &mut Value) {
    let description = response["description"].as_str().unwrap_or_default().to_owned();
    let Some(content) = response.get_mut("content").and_then(|c| c.get_mut(PROBLEM)) else { return };
    let named =
        |code: &&Code| description.split(|c: char| !c.is_ascii_uppercase() && c != '_').any(|w| w == code.as_str());
    let examples: Map<String, Value> = Code::ALL
        .iter()
        .filter(named)
        .map(|code| (code.as_str().to_owned(), json!({ "value": Problem::new(*code, code.about()) })))
        .collect();
    if !examples.is_empty() {
        content["examples"] = examples.into();
    }
}

/// The shape of a parameter, and one that is.
fn shape(path: &str, name: &str) -> Option<(Value, Value)> {
    let text = |pattern: &str| json!({ "type": "string", "pattern": pattern });
    Some(match name {
        "id" if path.contains("/pools/") || path.contains("/models/") => {
            (text(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"), json!("chat"))
        }
        "id" if path.contains("/leases/") => {
            (json!({ "type": "string", "maxLength": 256 }), json!("lease-chat-r0-g1-00000000deadbeef-1"))
        }
        "id" => (json!({ "type": "string", "maxLength": 256 }), json!("op-chat-0000002a-1")),
        "uuid" => (json!({ "type": "string", "maxLength": 256 }), json!("GPU-51000000-0000-4000-8000-000000000001")),
        "If-Match" => (text(r#"^("[0-9]{1,18}"|[0-9]{1,18})$"#), json!("\"1\"")),
        _ => return None,
    })
}

/// Schema of a body that no handler's type tells, and examples of it.
fn body(path: &str, method: &Method) -> Option<(Option<Value>, Value)> {
    let one = |value: Value| json!({ "example": { "value": value } });
    let of_client = |value: Value| {
        let schema = json!({
            "type": "object",
            "required": ["model"],
            "properties": {
                "model": { "type": "string", "description": "A pool, a model or an alias" },
                "stream": { "type": "boolean", "description": "Answer as server-sent events" },
            },
            "additionalProperties": true,
        });
        Some((Some(schema), one(value)))
    };
    let message = json!([{ "role": "user", "content": "Say hello." }]);
    match (method.as_str(), path) {
        ("PUT", "/v1/pools/{id}") => Some((
            Some(refer("PoolSpec")),
            json!({
                "a model": { "value": {
                    "model": "file:/srv/models/qwen2.5-7b-q4_k_m.gguf", "slots": 4, "context": 8192,
                    "activation": "on_demand", "idle_ttl": "10m", "aliases": ["gpt-4o-mini"],
                } },
                "an engine without a model": { "value": {
                    "model": "stub:chat", "engine": "stub", "args": ["--vram", "4 GiB"], "vram": "5 GiB",
                } },
            }),
        )),
        ("POST", "/v1/pools/{id}/reload") => Some((
            None,
            one(
                json!({ "new_model_ref": "file:/srv/models/qwen3-8b-q4_k_m.gguf", "strategy": "auto", "deadline_ms": 600_000 }),
            ),
        )),
        ("POST", "/v1/pools/{id}/drain") => Some((None, one(json!({ "deadline_ms": 30_000, "on_deadline": "force" })))),
        ("POST", "/v1/pools/{id}/leases") => Some((
            None,
            one(json!({ "ttl_ms": 60_000, "wait_ms": 30_000, "job_id": "job-1", "idempotency_key": "job-1/1" })),
        )),
        ("POST", "/v1/leases/{id}/renew") => Some((None, one(json!({ "ttl_ms": 60_000 })))),
        ("POST", "/v1/placements") => Some((None, one(json!({ "model": "chat" })))),
        ("POST", "/v1/plan") => Some((None, one(json!({ "pool": "chat" })))),
        ("POST", "/v1/chat/completions") => of_client(json!({ "model": "chat", "messages": message, "stream": true })),
        ("POST", "/v1/completions") => {
            of_client(json!({ "model": "chat", "prompt": "Once upon a time", "max_tokens": 32 }))
        }
        ("POST", "/v1/embeddings") => of_client(json!({ "model": "embed", "input": ["one", "two"] })),
        ("POST", "/v1/responses") => of_client(json!({ "model": "chat", "input": "Say hello." })),
        ("POST", "/v1/messages") => of_client(json!({ "model": "chat", "max_tokens": 32, "messages": message })),
        ("POST", "/v1/rerank") => {
            of_client(json!({ "model": "rank", "query": "a cat", "documents": ["a dog", "a kitten"] }))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::openapi_json;

    fn document() -> Value {
        serde_json::from_str(&openapi_json()).unwrap()
    }

    #[test]
    fn every_reference_leads_somewhere() {
        fn walk(document: &Value, at: &Value) {
            match at {
                Value::Object(keys) => {
                    if let Some(to) = keys.get("$ref").and_then(Value::as_str) {
                        let found = to.strip_prefix('#').and_then(|pointer| document.pointer(pointer));
                        assert!(found.is_some(), "{to}");
                    }
                    keys.values().for_each(|v| walk(document, v));
                }
                Value::Array(items) => items.iter().for_each(|v| walk(document, v)),
                _ => {}
            }
        }
        let document = document();
        walk(&document, &document);
    }

    #[test]
    fn every_code_has_an_example_under_its_status() {
        let document = document();
        let mut shown: Vec<&str> = Vec::new();
        for item in document["paths"].as_object().unwrap().values() {
            for operation in item.as_object().unwrap().values() {
                for (status, response) in operation["responses"].as_object().unwrap() {
                    let examples = response.pointer("/content/application~1problem+json/examples");
                    for (code, example) in examples.and_then(Value::as_object).into_iter().flatten() {
                        let told = example["value"]["status"].as_u64().unwrap();
                        assert!(
                            told.to_string() == *status || ["408", "413", "431"].contains(&status.as_str()),
                            "{code} {status}"
                        );
                        shown.push(code);
                    }
                }
            }
        }
        // What the gateway tells, in the form of its clients, and what no route of this document can answer.
        let elsewhere = ["MODEL_NOT_FOUND", "NOT_FOUND", "METHOD_NOT_ALLOWED", "ENGINE_FAILED", "INTERNAL"];
        for code in Code::ALL.iter().map(|c| c.as_str()) {
            assert!(shown.contains(&code) != elsewhere.contains(&code), "{code}");
        }
    }

    #[test]
    fn bodies_of_pools_are_the_config_s() {
        let spec = &document()["components"]["schemas"]["PoolSpec"];
        assert_eq!(spec["required"], json!(["model"]));
        assert!(spec["properties"]["idle_ttl"].is_object());
    }
}
