//! From a request's body to tokens, and from tokens to the JSON of each endpoint.

use std::iter::Take;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::engine::{Engine, Slot};
use crate::generate::{Words, count_tokens};

/// Tokens where the request names no number.
const DEFAULT_TOKENS: u64 = 64;

/// Which endpoint's JSON to speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// `/completion`
    Native,
    /// `/v1/completions`
    Text,
    /// `/v1/chat/completions`
    Chat,
}

/// Why a request is refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Invalid(String),
    TooLong { prompt_tokens: u64, context: u64 },
}

/// A request for text, understood.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Task {
    pub(crate) shape: Shape,
    pub(crate) stream: bool,
    include_usage: bool,
    prompt: String,
    prompt_tokens: u64,
    tokens: u64,
    /// The model ended the text itself, rather than the limit.
    ends_itself: bool,
}

impl Task {
    pub(crate) fn parse(shape: Shape, body: &Value, engine: &Engine) -> Result<Self, Refusal> {
        let prompt = match shape {
            Shape::Chat => chat_prompt(&body["messages"]),
            Shape::Native | Shape::Text => plain_text(&body["prompt"]),
        };
        let required = if shape == Shape::Chat { "messages" } else { "prompt" };
        let prompt = prompt.ok_or_else(|| Refusal::Invalid(format!("'{required}' is missing or not text")))?;
        let prompt_tokens = count_tokens(&prompt);
        let context = u64::from(engine.slot_context());
        if prompt_tokens >= context {
            return Err(Refusal::TooLong { prompt_tokens, context });
        }
        // A negative number means no limit, as in llama-server.
        let asked = ["n_predict", "max_completion_tokens", "max_tokens"].iter().find_map(|key| body[*key].as_u64());
        let room = context - prompt_tokens;
        Ok(Self {
            shape,
            stream: body["stream"].as_bool().unwrap_or(false),
            include_usage: body["stream_options"]["include_usage"].as_bool().unwrap_or(false),
            prompt,
            prompt_tokens,
            tokens: asked.unwrap_or(DEFAULT_TOKENS).min(room),
            ends_itself: asked.is_none() && DEFAULT_TOKENS <= room,
        })
    }
}

/// The text of a prompt: a string, or an array of strings and token ids (each id a word).
pub(crate) fn plain_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(token) => Some(token.to_string()),
        Value::Array(parts) => Some(parts.iter().map(plain_text).collect::<Option<Vec<_>>>()?.join(" ")),
        _ => None,
    }
}

fn chat_prompt(messages: &Value) -> Option<String> {
    let texts = messages.as_array()?.iter().map(|message| match &message["content"] {
        // Parts that are not text, such as images, count for nothing here.
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect::<Vec<_>>().join(" "),
        content => content.as_str().unwrap_or_default().to_owned(),
    });
    Some(texts.collect::<Vec<_>>().join("\n"))
}

/// A task in its slot, one token after another.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) task: Task,
    slot: Slot,
    words: Take<Words>,
    started: Instant,
    last: Instant,
    predicted: u64,
}

impl Job {
    pub(crate) fn start(task: Task, slot: Slot) -> Self {
        slot.engine.counters.prompt_tokens.fetch_add(task.prompt_tokens, Relaxed);
        slot.come_to(task.prompt_tokens, 0);
        let words = Words::for_prompt(&task.prompt).take(usize::try_from(task.tokens).unwrap_or(usize::MAX));
        let now = Instant::now();
        Self { task, slot, words, started: now, last: now, predicted: 0 }
    }

    /// The next token, at the speed that was asked for.
    pub(crate) async fn next(&mut self) -> Option<String> {
        let word = self.words.next()?;
        self.predicted += 1;
        let speed = self.slot.engine.args.tokens_per_second;
        if speed == 0 {
            // Even at full speed other requests get their turn.
            tokio::task::yield_now().await;
        } else {
            let due = Duration::from_secs_f64(self.predicted as f64 / f64::from(speed));
            tokio::time::sleep_until(self.started + due).await;
        }
        let now = Instant::now();
        let micros = u64::try_from((now - self.last).as_micros()).unwrap_or(u64::MAX);
        self.last = now;
        self.slot.engine.counters.predicted_tokens.fetch_add(1, Relaxed);
        self.slot.come_to(self.task.prompt_tokens, self.predicted);
        self.slot.engine.counters.predicted_micros.fetch_add(micros, Relaxed);
        Some(word)
    }

    /// The event that precedes the first token, if there is one.
    pub(crate) fn head(&self) -> Option<Value> {
        (self.task.shape == Shape::Chat)
            .then(|| self.chunk(&json!({ "role": "assistant", "content": null }), &Value::Null))
    }

    /// The event that carries a token.
    pub(crate) fn delta(&self, token: &str) -> Value {
        match self.task.shape {
            Shape::Native => json!({
                "index": 0, "content": token, "stop": false, "id_slot": self.slot.index,
                "tokens_predicted": self.predicted, "tokens_evaluated": self.task.prompt_tokens,
            }),
            Shape::Text => self.text_object(token, &Value::Null),
            Shape::Chat => self.chunk(&json!({ "content": token }), &Value::Null),
        }
    }

    /// The events that end a stream.
    pub(crate) fn tail(&self) -> Vec<Value> {
        let reason = json!(self.finish_reason());
        let mut last = match self.task.shape {
            Shape::Native => return vec![self.native_end("")],
            Shape::Text => self.text_object("", &reason),
            Shape::Chat => self.chunk(&json!({}), &reason),
        };
        last["timings"] = self.timings();
        if !self.task.include_usage {
            return vec![last];
        }
        let mut usage = last.clone();
        usage["choices"] = json!([]);
        usage["usage"] = self.usage();
        vec![last, usage]
    }

    /// The whole answer in one piece.
    pub(crate) fn whole(&self, text: &str) -> Value {
        let reason = json!(self.finish_reason());
        let mut answer = match self.task.shape {
            Shape::Native => return self.native_end(text),
            Shape::Text => self.text_object(text, &reason),
            Shape::Chat => {
                let message = json!({ "role": "assistant", "content": text });
                let choice = json!({ "index": 0, "message": message, "finish_reason": reason });
                self.object("chat.completion", "chatcmpl", &choice)
            }
        };
        answer["usage"] = self.usage();
        answer["timings"] = self.timings();
        answer
    }

    fn native_end(&self, content: &str) -> Value {
        json!({
            "index": 0, "content": content, "stop": true, "id_slot": self.slot.index,
            "model": self.slot.engine.args.served_name(),
            "stop_type": if self.task.ends_itself { "eos" } else { "limit" },
            "tokens_predicted": self.predicted, "tokens_evaluated": self.task.prompt_tokens,
            "truncated": false, "timings": self.timings(),
        })
    }

    fn text_object(&self, text: &str, reason: &Value) -> Value {
        let choice = json!({ "index": 0, "text": text, "logprobs": null, "finish_reason": reason });
        self.object("text_completion", "cmpl", &choice)
    }

    fn chunk(&self, delta: &Value, reason: &Value) -> Value {
        let choice = json!({ "index": 0, "delta": delta, "finish_reason": reason });
        self.object("chat.completion.chunk", "chatcmpl", &choice)
    }

    fn object(&self, object: &str, prefix: &str, choice: &Value) -> Value {
        let micros = self.started.duration_since(self.slot.engine.started()).as_micros();
        json!({
            "id": format!("{prefix}-{micros}-{}", self.slot.index),
            "object": object, "created": unix_seconds(), "model": self.slot.engine.args.served_name(),
            "system_fingerprint": crate::handlers::BUILD_INFO, "choices": [choice],
        })
    }

    fn finish_reason(&self) -> &'static str {
        if self.task.ends_itself { "stop" } else { "length" }
    }

    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.task.prompt_tokens, "completion_tokens": self.predicted,
            "total_tokens": self.task.prompt_tokens + self.predicted,
        })
    }

    fn timings(&self) -> Value {
        let seconds = (self.last - self.started).as_secs_f64();
        let per_second = if seconds > 0.0 { self.predicted as f64 / seconds } else { 0.0 };
        json!({
            "prompt_n": self.task.prompt_tokens, "prompt_ms": 0.0,
            "predicted_n": self.predicted, "predicted_ms": seconds * 1000.0, "predicted_per_second": per_second,
        })
    }
}

/// Now, as the OpenAI objects want it.
pub(crate) fn unix_seconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Args;
    use clap::Parser;

    fn parse(shape: Shape, body: &Value) -> Result<Task, Refusal> {
        let args = Args::try_parse_from(["--ctx-size", "400", "--slots", "4"]).unwrap();
        let (engine, _deaths) = Engine::new(args);
        Task::parse(shape, body, &engine)
    }

    #[test]
    fn prompts_come_in_every_form_the_api_allows() {
        let prompt = |shape, body: Value| parse(shape, &body).map(|task| task.prompt);
        assert_eq!(prompt(Shape::Native, json!({ "prompt": "a b" })).unwrap(), "a b");
        assert_eq!(prompt(Shape::Text, json!({ "prompt": ["a", 7] })).unwrap(), "a 7");
        let parts = json!({ "messages": [{ "role": "system", "content": "x" },
            { "role": "user", "content": [{ "type": "text", "text": "y" }, { "type": "image_url" }] }] });
        assert_eq!(prompt(Shape::Chat, parts).unwrap(), "x\ny");
        assert!(matches!(prompt(Shape::Chat, json!({ "prompt": "a" })), Err(Refusal::Invalid(_))));
        assert!(matches!(prompt(Shape::Native, json!({})), Err(Refusal::Invalid(_))));
    }

    #[test]
    fn the_number_of_tokens_is_bounded_by_the_request_and_the_context() {
        let tokens = |body: Value| parse(Shape::Native, &body).map(|task| (task.tokens, task.ends_itself));
        assert_eq!(tokens(json!({ "prompt": "a" })).unwrap(), (DEFAULT_TOKENS, true));
        assert_eq!(tokens(json!({ "prompt": "a", "n_predict": -1 })).unwrap(), (DEFAULT_TOKENS, true));
        assert_eq!(tokens(json!({ "prompt": "a", "max_tokens": 3 })).unwrap(), (3, false));
        assert_eq!(tokens(json!({ "prompt": "a", "n_predict": 1000 })).unwrap(), (99, false));
        let long = "word ".repeat(100);
        assert_eq!(tokens(json!({ "prompt": long })), Err(Refusal::TooLong { prompt_tokens: 100, context: 100 }));
    }
}
