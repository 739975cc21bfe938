//! What each kind calls the same numbers.

use super::{Name, Table, Times};

const fn plain(name: &'static str) -> Name {
    Name { name, label: None }
}

const fn labelled(name: &'static str, key: &'static str, value: &'static str) -> Name {
    Name { name, label: Some((key, value)) }
}

/// Of a kind of engine, by its word; none for one that is not known.
pub(crate) fn of_kind(kind: &str) -> Option<&'static Table> {
    Some(match kind {
        // The stub has llama-server's.
        "llama.cpp" | "stub" => &LLAMA_CPP,
        "vllm" => &VLLM,
        "sglang" => &SGLANG,
        "tgi" => &TGI,
        "trtllm" => &TRTLLM,
        "triton" => &TRITON,
        _ => return None,
    })
}

const LLAMA_CPP: Table = Table {
    running: &[plain("llamacpp:requests_processing")],
    waiting: &[plain("llamacpp:requests_deferred")],
    // Newer versions do not tell.
    kv_used: &[plain("llamacpp:kv_cache_usage_ratio")],
    prompt_tokens: &[plain("llamacpp:prompt_tokens_total")],
    generated_tokens: &[plain("llamacpp:tokens_predicted_total")],
    first_token: &[],
    decode: &[Times::Totals {
        seconds: "llamacpp:tokens_predicted_seconds_total",
        count: "llamacpp:tokens_predicted_total",
    }],
};

const VLLM: Table = Table {
    running: &[plain("vllm:num_requests_running")],
    waiting: &[plain("vllm:num_requests_waiting")],
    kv_used: &[plain("vllm:kv_cache_usage_perc"), plain("vllm:gpu_cache_usage_perc")],
    prompt_tokens: &[plain("vllm:prompt_tokens_total")],
    generated_tokens: &[plain("vllm:generation_tokens_total")],
    first_token: &[Times::Histogram("vllm:time_to_first_token_seconds")],
    decode: &[
        Times::Histogram("vllm:inter_token_latency_seconds"),
        Times::Histogram("vllm:time_per_output_token_seconds"),
    ],
};

const SGLANG: Table = Table {
    running: &[plain("sglang:num_running_reqs")],
    waiting: &[plain("sglang:num_queue_reqs")],
    kv_used: &[plain("sglang:token_usage")],
    prompt_tokens: &[plain("sglang:prompt_tokens_total")],
    generated_tokens: &[plain("sglang:generation_tokens_total")],
    first_token: &[Times::Histogram("sglang:time_to_first_token_seconds")],
    decode: &[
        Times::Histogram("sglang:inter_token_latency_seconds"),
        Times::Histogram("sglang:time_per_output_token_seconds"),
    ],
};

const TGI: Table = Table {
    running: &[plain("tgi_batch_current_size")],
    waiting: &[plain("tgi_queue_size")],
    kv_used: &[],
    prompt_tokens: &[],
    // A histogram over requests, whose sum is the total.
    generated_tokens: &[plain("tgi_request_generated_tokens_sum")],
    first_token: &[],
    // Of each request its mean: near enough.
    decode: &[Times::Histogram("tgi_request_mean_time_per_token_duration")],
};

const TRTLLM: Table = Table {
    running: &[plain("trtllm_num_requests_running")],
    waiting: &[plain("trtllm_num_requests_waiting")],
    kv_used: &[plain("trtllm_kv_cache_utilization")],
    prompt_tokens: &[],
    generated_tokens: &[plain("trtllm_generation_tokens_total")],
    first_token: &[Times::Histogram("trtllm_time_to_first_token_seconds")],
    decode: &[Times::Histogram("trtllm_time_per_output_token_seconds")],
};

const TRITON: Table = Table {
    running: &[labelled("nv_trt_llm_request_metrics", "request_type", "active")],
    waiting: &[
        labelled("nv_trt_llm_request_metrics", "request_type", "waiting"),
        plain("nv_inference_pending_request_count"),
    ],
    kv_used: &[labelled("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", "fraction")],
    prompt_tokens: &[],
    // It tells only of the iteration that runs.
    generated_tokens: &[],
    first_token: &[Times::Millis("nv_inference_first_response_histogram_ms")],
    decode: &[],
};
