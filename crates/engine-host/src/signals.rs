//! What engines say of their work. For llama-server, and the stub engine like it, that is `/slots`: which requests run, the
//! prompt tokens read of each and the tokens generated; and `/metrics`, whose totals tell of requests that came and went
//! between two questions.

use std::time::Duration;

use pool_domain::liveness::{Signals, SlotWork, Work};
use pool_services::ports::{Endpoint, Observed};
use serde_json::Value;

use crate::http::{Ask, NoAnswer};
use crate::metrics::{self, total};

/// Who asks decides how long to wait (`[pool.health] timeout`); this only bounds what was forgotten.
const PATIENCE: Duration = Duration::from_secs(3600);
/// A prompt of many slots is told too.
const LIMIT: usize = 16 * 1024 * 1024;

/// Totals of work done, whatever the requests were.
const COUNTERS: &[&str] =
    &["llamacpp:prompt_tokens_total", "llamacpp:tokens_predicted_total", "llamacpp:n_decode_total"];
const WAITING: &str = "llamacpp:requests_deferred";

/// Asks for both at once.
pub(crate) async fn ask(endpoint: &Endpoint) -> Observed {
    let get = |path| Ask { of: endpoint, path, body: None, timeout: PATIENCE, limit: LIMIT }.send();
    let (slots, metrics) = tokio::join!(get("/slots"), get("/metrics"));
    let slots = match slots {
        Ok(answer) => answer.json.filter(|_| answer.status == 200),
        Err(NoAnswer::TimedOut(_)) => return Work::Silent.into(),
        // That nobody answers there, its health tells.
        Err(_) => None,
    };
    let metrics = metrics.ok().filter(|answer| answer.status == 200).map(|answer| answer.text);
    // The stub reads no prompt for long. llama-server tells of a prompt only after each batch of it, which is 2048 tokens:
    // more than half a minute where some layers are on the CPU.
    let work = read(slots.as_ref(), metrics.as_deref(), endpoint.kind == "stub");
    let table = metrics::of_kind(&endpoint.kind);
    let reading = table.zip(metrics.as_deref()).map(|(table, page)| table.read(page)).unwrap_or_default();
    Observed { work, reading }
}

fn read(slots: Option<&Value>, metrics: Option<&str>, prefill_told: bool) -> Work {
    let Some(slots) = slots.and_then(Value::as_array) else { return Work::Untold };
    let busy = slots.iter().enumerate().filter(|(_, slot)| slot["is_processing"] == true);
    let slots: Vec<_> = busy.map(|(at, slot)| slot_work(at, slot)).collect();
    let metric = |name: &str| metrics.and_then(|text| total(text, name));
    Work::Told(Signals {
        running: u32::try_from(slots.len()).unwrap_or(u32::MAX),
        waiting: metric(WAITING).and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
        counters: COUNTERS.iter().filter_map(|name| metric(name)).collect(),
        slots,
        prefill_told,
    })
}

fn slot_work(at: usize, slot: &Value) -> SlotWork {
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    // An object in older versions.
    let next = &slot["next_token"];
    let next = next.get(0).unwrap_or(next);
    SlotWork {
        slot: slot["id"]
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .unwrap_or(u32::try_from(at).unwrap_or(u32::MAX)),
        task: number(&slot["id_task"]),
        prompt: number(&slot["n_prompt_tokens_processed"]),
        decoded: number(&next["n_decoded"]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Words of llama-server (build 8, commit e1bb79b) while it reads a prompt, what is not asked for left out.
    const SLOTS: &str = r#"[{"id":0,"n_ctx":4096,"speculative":false,"is_processing":false},
        {"id":1,"n_ctx":4096,"is_processing":true,"id_task":2,"n_prompt_tokens":3501,"n_prompt_tokens_processed":2048,
        "n_prompt_tokens_cache":0,"next_token":[{"has_next_token":true,"n_remain":30,"n_decoded":5}]}]"#;

    #[test]
    fn the_words_of_llama_server_are_read() {
        let slots: Value = serde_json::from_str(SLOTS).unwrap();
        let metrics = "# TYPE llamacpp:prompt_tokens_total counter\nllamacpp:prompt_tokens_total 2048\n\
            llamacpp:prompt_tokens_total_of_another 3\nllamacpp:tokens_predicted_total 1.2e+06\n\
            llamacpp:requests_deferred 4\n";
        let Work::Told(told) = read(Some(&slots), Some(metrics), false) else { panic!("untold") };
        assert_eq!((told.running, told.waiting, told.counters), (1, 4, vec![2048, 1_200_000]));
        assert_eq!(told.slots, [SlotWork { slot: 1, task: 2, prompt: 2048, decoded: 5 }]);
    }

    #[test]
    fn without_metrics_slots_are_enough_and_without_slots_nothing_is_told() {
        let older = json!([{ "is_processing": true, "id_task": 7, "next_token": { "n_decoded": 3 } }]);
        let Work::Told(told) = read(Some(&older), None, false) else { panic!("untold") };
        assert_eq!((told.waiting, told.counters.len()), (0, 0));
        assert_eq!(told.slots, [SlotWork { slot: 0, task: 7, prompt: 0, decoded: 3 }]);
        assert_eq!(read(None, Some("llamacpp:prompt_tokens_total 1"), false), Work::Untold);
        assert_eq!(read(Some(&json!({ "error": "disabled" })), None, false), Work::Untold);
    }
}
