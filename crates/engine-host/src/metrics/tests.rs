use super::*;

fn read(kind: &str, page: &str) -> Reading {
    of_kind(kind).unwrap().read(page)
}

#[test]
fn samples_are_read_as_the_format_has_them() {
    let page = "# HELP a Things, with { and }.\n# TYPE a counter\n\na 1\n  b\t2.5e3 1700000000\n\
        c{x=\"} 7\",y=\"a\\\"}\\\\\"} 3 # {trace_id=\"t} 9\"} 0.5\nd{} 4\ne{x=\"open 5\nf\ng nan\nh +Inf\ni -1\nj x\n{} 6\n";
    let found: Vec<_> = samples(page).map(|s| (s.name, s.value)).collect();
    assert_eq!(found, [("a", 1.0), ("b", 2500.0), ("c", 3.0), ("d", 4.0)]);
}

#[test]
fn a_label_is_told_from_one_whose_name_ends_like_it() {
    let has = |line: &str, label| sample(line).unwrap().has(label);
    let line = "m{my_type=\"active\",request_type=\"waiting, x\",z=\"a\\\"request_type=\\\"active\"} 1";
    assert!(has(line, ("my_type", "active")));
    assert!(has(line, ("request_type", "waiting, x")));
    assert!(!has(line, ("request_type", "active")));
    assert!(!has("m 1", ("request_type", "active")));
    assert!(has("m{ a=\"1\", b=\"2\" } 1", ("b", "2")));
}

#[test]
fn llama_server_tells_totals_and_no_first_token() {
    let page = "# TYPE llamacpp:prompt_tokens_total counter\nllamacpp:prompt_tokens_total 120\n\
        llamacpp:prompt_tokens_total_of_another 3\nllamacpp:tokens_predicted_total 400\n\
        llamacpp:tokens_predicted_seconds_total 8\nllamacpp:predicted_tokens_seconds 50\n\
        llamacpp:requests_processing 2\nllamacpp:requests_deferred 1\n";
    for kind in ["llama.cpp", "stub"] {
        let told = read(kind, page);
        assert_eq!((told.running, told.waiting, told.kv_used), (Some(2), Some(1), None));
        assert_eq!((told.prompt_tokens, told.generated_tokens), (Some(120), Some(400)));
        assert_eq!((told.first_token, told.decode), (None, Some(Spent { seconds: 8.0, count: 400 })));
    }
}

#[test]
fn vllm_tells_all_of_it_over_several_engines_and_under_old_names() {
    let page = "vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 2.0\n\
        vllm:num_requests_running{engine=\"1\",model_name=\"m\"} 1.0\n\
        vllm:num_requests_waiting{engine=\"0\",model_name=\"m\"} 4.0\n\
        vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"m\"} 0.25\n\
        vllm:kv_cache_usage_perc{engine=\"1\",model_name=\"m\"} 0.75\n\
        vllm:prompt_tokens_total{engine=\"0\",model_name=\"m\"} 17.0\n\
        vllm:prompt_tokens_created{engine=\"0\",model_name=\"m\"} 1.7e+09\n\
        vllm:generation_tokens_total{engine=\"0\",model_name=\"m\"} 1.2e+03\n\
        vllm:time_to_first_token_seconds_bucket{engine=\"0\",le=\"0.1\",model_name=\"m\"} 3.0\n\
        vllm:time_to_first_token_seconds_count{engine=\"0\",model_name=\"m\"} 4.0\n\
        vllm:time_to_first_token_seconds_sum{engine=\"0\",model_name=\"m\"} 0.5\n\
        vllm:inter_token_latency_seconds_count{engine=\"0\",model_name=\"m\"} 1196.0\n\
        vllm:inter_token_latency_seconds_sum{engine=\"0\",model_name=\"m\"} 23.5\n";
    let told = read("vllm", page);
    assert_eq!((told.running, told.waiting, told.kv_used), (Some(3), Some(4), Some(0.5)));
    assert_eq!((told.prompt_tokens, told.generated_tokens), (Some(17), Some(1200)));
    assert_eq!(told.first_token, Some(Spent { seconds: 0.5, count: 4 }));
    assert_eq!(told.decode, Some(Spent { seconds: 23.5, count: 1196 }));
    let old = read(
        "vllm",
        "vllm:gpu_cache_usage_perc 0.3\nvllm:time_per_output_token_seconds_sum 2\nvllm:time_per_output_token_seconds_count 4\n",
    );
    assert_eq!((old.kv_used, old.decode), (Some(0.3), Some(Spent { seconds: 2.0, count: 4 })));
}

#[test]
fn the_kinds_to_come_are_read_by_their_names() {
    let sglang = read(
        "sglang",
        "sglang:token_usage{model_name=\"m\"} 0.28\nsglang:num_running_reqs{model_name=\"m\"} 3\nsglang:num_queue_reqs 1\n\
         sglang:prompt_tokens_total 8\nsglang:generation_tokens_total 7\nsglang:time_to_first_token_seconds_sum 2\n\
         sglang:time_to_first_token_seconds_count 4\nsglang:inter_token_latency_seconds_sum 1\nsglang:inter_token_latency_seconds_count 50\n",
    );
    assert_eq!((sglang.running, sglang.waiting, sglang.kv_used), (Some(3), Some(1), Some(0.28)));
    assert_eq!((sglang.prompt_tokens, sglang.generated_tokens), (Some(8), Some(7)));
    assert_eq!((sglang.first_token.unwrap().mean_ms(), sglang.decode.unwrap().mean_ms()), (Some(500.0), Some(20.0)));
    let tgi = read(
        "tgi",
        "tgi_queue_size 2\ntgi_batch_current_size 5\ntgi_request_generated_tokens_sum 90\ntgi_request_generated_tokens_count 3\n\
         tgi_request_mean_time_per_token_duration_sum 0.3\ntgi_request_mean_time_per_token_duration_count 3\n",
    );
    assert_eq!((tgi.running, tgi.waiting, tgi.generated_tokens), (Some(5), Some(2), Some(90)));
    assert!((tgi.decode.unwrap().mean_ms().unwrap() - 100.0).abs() < 1e-9);
    let trtllm = read(
        "trtllm",
        "trtllm_num_requests_running 1\ntrtllm_num_requests_waiting 0\ntrtllm_kv_cache_utilization 0.5\n\
         trtllm_generation_tokens_total 11\ntrtllm_time_to_first_token_seconds_sum 1\ntrtllm_time_to_first_token_seconds_count 2\n",
    );
    assert_eq!((trtllm.running, trtllm.waiting, trtllm.kv_used), (Some(1), Some(0), Some(0.5)));
    assert_eq!((trtllm.generated_tokens, trtllm.first_token.unwrap().mean_ms()), (Some(11), Some(500.0)));
    let triton = read(
        "triton",
        "nv_trt_llm_request_metrics{model=\"m\",request_type=\"active\",version=\"1\"} 4\n\
         nv_trt_llm_request_metrics{model=\"m\",request_type=\"waiting\",version=\"1\"} 2\n\
         nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"max\",model=\"m\"} 1000\n\
         nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"fraction\",model=\"m\"} 0.125\n\
         nv_inference_first_response_histogram_ms_sum 300\nnv_inference_first_response_histogram_ms_count 3\n",
    );
    assert_eq!((triton.running, triton.waiting, triton.kv_used), (Some(4), Some(2), Some(0.125)));
    assert!((triton.first_token.unwrap().mean_ms().unwrap() - 100.0).abs() < 1e-9);
    assert!(of_kind("other").is_none());
}

#[test]
fn what_is_hostile_or_foreign_is_nothing() {
    let long = "x".repeat(100_000);
    for page in ["", "<html>", &long, "vllm:num_requests_running", "vllm:num_requests_running{", "\u{0}\u{1} 1"] {
        assert_eq!(read("vllm", page), Reading::default());
    }
    let wild =
        read("vllm", "vllm:num_requests_running 1e300\nvllm:kv_cache_usage_perc 7\nvllm:prompt_tokens_total -5\n");
    assert_eq!((wild.running, wild.kv_used, wild.prompt_tokens), (Some(u32::MAX), Some(1.0), None));
}
