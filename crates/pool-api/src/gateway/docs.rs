//! What the OpenAPI document says of the gateway. The handler is one, and the bodies are the engine's.

macro_rules! paths {
    ($($name:ident $path:literal $what:literal;)*) => {$(
        #[doc = $what]
        #[utoipa::path(post, path = $path, tag = "gateway",
            description = "Sent on to an engine that serves the `model` of the body, which is otherwise not looked at; the answer is the engine's, byte for byte.",
            params(
                ("X-Pool-Lease" = Option<String>, Header, description = "A lease to use instead of taking a slot"),
                ("X-Pool-Wait-Ms" = Option<u64>, Header, description = "How long to wait for a slot; at most ten minutes"),
                ("X-Pool-Progress" = Option<bool>, Header, description = "Begin a stream at once, with comments that tell how far a start is"),
                ("X-Request-Id" = Option<String>, Header, description = "The request's name; the answer has it, too")),
            responses(
                (status = 200, description = "The engine's answer: JSON, or events with `stream`"),
                (status = "4XX", description = "INVALID_PARAMS, UNAUTHORIZED, FORBIDDEN, model_not_found, LEASE_NOT_FOUND or POOL_SATURATED (with Retry-After), or the engine's own", body = Object),
                (status = "5XX", description = "ENGINE_FAILED, POOL_UNREADY, POOL_DRAINING, POOL_UNAVAILABLE, INSUFFICIENT_VRAM or UNAVAILABLE, or the engine's own", body = Object)))]
        #[expect(dead_code, reason = "only what it is annotated with is used")]
        pub(crate) fn $name() {}
    )*};
}

paths! {
    chat "/v1/chat/completions" "Chat, as OpenAI has it.";
    completions "/v1/completions" "Text, as OpenAI has it.";
    embeddings "/v1/embeddings" "Vectors, as OpenAI has it.";
    responses "/v1/responses" "Responses, as OpenAI has it, where the engine does.";
    messages "/v1/messages" "Messages, as Anthropic has it, where the engine does.";
    rerank "/v1/rerank" "Scores, as Jina has it.";
}
