//! The API of the stub engine, as clients of llama-server expect it.

use crate::common::{Stub, read_answer};
use serde_json::{Value, json};

#[test]
fn it_says_what_it_is() {
    let stub = Stub::start(&["--model", "/models/tiny.gguf", "--alias", "tiny", "--slots", "2", "--ctx-size", "1024"]);
    assert_eq!(stub.get("/health"), (200, json!({ "status": "ok" })));
    assert_eq!(stub.get("/v1/health").0, 200);
    let (_, props) = stub.get("/props");
    assert_eq!(props["default_generation_settings"]["n_ctx"], 512);
    assert_eq!(props["total_slots"], 2);
    assert_eq!(props["model_path"], "/models/tiny.gguf");
    assert_eq!(props["model_alias"], "tiny");
    assert!(props["build_info"].as_str().unwrap().starts_with("stub-engine "));
    assert_eq!(stub.get("/v1/models").1["data"][0]["id"], "tiny");
    let (_, slots) = stub.get("/slots");
    assert_eq!(slots.as_array().unwrap().len(), 2);
    assert_eq!(slots[1], json!({ "id": 1, "is_processing": false, "n_ctx": 512 }));
    assert_eq!(stub.get("/nowhere").0, 404);
}

#[test]
fn text_is_the_same_whichever_way_it_is_asked_for() {
    let stub = Stub::start(&[]);
    let (status, native) = stub.post("/completion", &json!({ "prompt": "hello there", "n_predict": 5 }));
    assert_eq!(status, 200);
    let text = native["content"].as_str().unwrap();
    assert_eq!(text.split(' ').count(), 5);
    assert_eq!((&native["tokens_predicted"], &native["tokens_evaluated"]), (&json!(5), &json!(2)));

    let asked = json!({ "prompt": "hello there", "max_tokens": 5 });
    let (_, completion) = stub.post("/v1/completions", &asked);
    assert_eq!(completion["choices"][0]["text"], text);
    assert_eq!(completion["choices"][0]["finish_reason"], "length");

    let chat = json!({ "messages": [{ "role": "user", "content": "hello there" }], "max_tokens": 5 });
    let (_, answer) = stub.post("/v1/chat/completions", &chat);
    assert_eq!(answer["choices"][0]["message"]["content"], text);
    assert_eq!(answer["usage"], json!({ "prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7 }));

    for (path, mut body, done) in
        [("/completion", asked.clone(), false), ("/v1/completions", asked, true), ("/v1/chat/completions", chat, true)]
    {
        body["stream"] = json!(true);
        let mut events = stub.events(path, &body);
        if done {
            assert_eq!(events.pop().unwrap(), "[DONE]");
        }
        let events: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
        let streamed: String = events
            .iter()
            .filter_map(|event| {
                let choice = &event["choices"][0];
                [&event["content"], &choice["text"], &choice["delta"]["content"]].iter().find_map(|text| text.as_str())
            })
            .collect();
        assert_eq!(streamed, text, "{path}");
    }
}

#[test]
fn usage_comes_in_a_stream_when_asked_for() {
    let stub = Stub::start(&[]);
    let body = json!({ "prompt": "x", "max_tokens": 2, "stream": true, "stream_options": { "include_usage": true } });
    let events = stub.events("/v1/completions", &body);
    let usage: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 2);
}

#[test]
fn embeddings_and_ranks_are_answered() {
    let stub = Stub::start(&[]);
    let (_, answer) = stub.post("/v1/embeddings", &json!({ "input": ["a", "b"] }));
    assert_eq!(answer["data"].as_array().unwrap().len(), 2);
    assert!(answer["data"][0]["embedding"][0].is_f64());
    let query = json!({ "query": "red fox", "documents": ["blue whale", "red fox"], "top_n": 1 });
    let (_, answer) = stub.post("/v1/rerank", &query);
    assert_eq!(answer["results"].as_array().unwrap().len(), 1);
    assert_eq!(answer["results"][0]["index"], 1);
}

#[test]
fn bad_requests_are_refused_in_llama_servers_words() {
    let stub = Stub::start(&["--ctx-size", "8", "--slots", "1"]);
    for (path, body) in [
        ("/completion", json!({})),
        ("/v1/chat/completions", json!([])),
        ("/v1/embeddings", json!({ "input": null })),
        ("/v1/rerank", json!({ "query": "x" })),
    ] {
        let (status, answer) = stub.post(path, &body);
        assert_eq!((status, &answer["error"]["type"]), (400, &json!("invalid_request_error")), "{path}");
    }
    assert_eq!(stub.text("POST", "/completion", "{").0, 400);
    let (status, answer) = stub.post("/completion", &json!({ "prompt": "1 2 3 4 5 6 7 8" }));
    assert_eq!((status, &answer["error"]["type"]), (400, &json!("exceed_context_size_error")));
}

#[test]
fn requests_beyond_the_slots_queue_and_a_client_that_goes_frees_its_slot() {
    let stub = Stub::start(&["--slots", "1", "--ctx-size", "4000000000", "--tokens-per-second", "100"]);
    // So long that only the client's going ends it.
    let endless = json!({ "prompt": "x", "n_predict": 3_000_000_000_u64, "stream": true }).to_string();
    let first = stub.send("POST", "/completion", &endless);
    stub.await_busy(1);
    let mut second = stub.send("POST", "/completion", &json!({ "prompt": "x", "n_predict": 1 }).to_string());
    while !stub.text("GET", "/metrics", "").1.contains("\nllamacpp:requests_deferred 1\n") {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    drop(first);
    assert_eq!(read_answer(&mut second).0, 200);
    stub.await_busy(0);
}

#[test]
fn metrics_count_tokens() {
    let stub = Stub::start(&[]);
    stub.post("/completion", &json!({ "prompt": "a b c", "n_predict": 7 }));
    let (_, metrics) = stub.text("GET", "/metrics", "");
    for line in [
        "llamacpp:prompt_tokens_total 3",
        "llamacpp:tokens_predicted_total 7",
        "llamacpp:requests_processing 0",
        "llamacpp:requests_deferred 0",
        "# TYPE llamacpp:predicted_tokens_seconds gauge",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} in {metrics}");
    }
}
