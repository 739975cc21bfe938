//! How many tokens an answer has, as the engine says in it: looked for in its first and last bytes as they pass, which are
//! neither kept back nor changed.

use std::time::Duration;

use memchr::memmem;
use serde::Deserialize;
use tokio::time::Instant;

/// How much of the beginning is looked at: of embeddings some engines tell the tokens first, and Anthropic's streams begin
/// with the prompt's.
const HEAD: usize = 4 * 1024;
/// How much of the end is kept: a thousand streams at once keep as much each.
const TAIL: usize = 1024;
/// How much more may come before the rest is moved.
const SLACK: usize = 512;

/// What was told, and what was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Usage {
    /// Tokens of the request.
    pub(super) tokens_in: Option<u64>,
    /// Tokens of the answer.
    pub(super) tokens_out: Option<u64>,
    /// From the first token to the last.
    pub(super) decode: Option<Duration>,
}

/// OpenAI's words and Anthropic's.
#[derive(Debug, Default, Deserialize)]
struct Told {
    #[serde(alias = "input_tokens")]
    prompt_tokens: Option<u64>,
    #[serde(alias = "output_tokens")]
    completion_tokens: Option<u64>,
}

/// llama-server's own, which it tells without being asked.
#[derive(Debug, Default, Deserialize)]
struct Timings {
    prompt_n: Option<u64>,
    /// Tokens of the prompt that it had read before.
    cache_n: Option<u64>,
    predicted_n: Option<u64>,
    predicted_ms: Option<f64>,
}

/// Listens to one answer.
#[derive(Debug, Default)]
pub(super) struct Ear {
    /// The last bytes, and a few more than are looked at, so that not every part moves them.
    tail: Vec<u8>,
    /// When the first part came, and the newest.
    times: Option<(Instant, Instant)>,
    of_head: Usage,
}

impl Ear {
    /// A part of the answer passes. Says whether it is the first.
    pub(super) fn hear(&mut self, part: &[u8]) -> bool {
        if part.is_empty() {
            return false;
        }
        let (now, first) = (Instant::now(), self.times.is_none());
        if first {
            self.of_head = told(&part[..part.len().min(HEAD)]);
        }
        self.times = Some((self.times.map_or(now, |(first, _)| first), now));
        let new = &part[part.len().saturating_sub(TAIL)..];
        if self.tail.len() + new.len() > TAIL + SLACK {
            let kept = TAIL.saturating_sub(new.len()).min(self.tail.len());
            self.tail.drain(..self.tail.len() - kept);
        }
        if self.tail.capacity() < TAIL + SLACK {
            // Once, and no more than that: growing would double it.
            self.tail.reserve_exact(TAIL + SLACK - self.tail.len());
        }
        self.tail.extend_from_slice(new);
        first
    }

    /// It is over. `streams`: its parts came as they were made, so that times between them say something.
    pub(super) fn usage(&self, streams: bool) -> Usage {
        let end = told(&self.tail);
        let seen = self.times.filter(|_| streams).map(|(first, last)| last - first);
        Usage {
            tokens_in: end.tokens_in.or(self.of_head.tokens_in),
            tokens_out: end.tokens_out.or(self.of_head.tokens_out),
            decode: end.decode.or(seen),
        }
    }
}

fn told(bytes: &[u8]) -> Usage {
    let usage: Told = last_object(bytes, "\"usage\"").unwrap_or_default();
    let timings: Timings = last_object(bytes, "\"timings\"").unwrap_or_default();
    let prompt = timings.prompt_n.map(|n| n.saturating_add(timings.cache_n.unwrap_or(0)));
    Usage {
        tokens_in: usage.prompt_tokens.or(prompt),
        tokens_out: usage.completion_tokens.or(timings.predicted_n),
        decode: timings.predicted_ms.and_then(|ms| Duration::try_from_secs_f64(ms / 1e3).ok()),
    }
}

/// The last object of this name that is one, here. In text that a model made quotes are escaped, so there the name is not
/// found.
fn last_object<T: for<'a> Deserialize<'a>>(bytes: &[u8], name: &str) -> Option<T> {
    let mut rest = bytes;
    loop {
        let at = memmem::rfind(rest, name.as_bytes())?;
        let after = &rest[at + name.len()..];
        let value = after.trim_ascii_start().strip_prefix(b":").map(<[u8]>::trim_ascii_start);
        if let Some(object) = value.filter(|v| v.starts_with(b"{"))
            && let Some(Ok(found)) = serde_json::Deserializer::from_slice(object).into_iter().next()
        {
            return Some(found);
        }
        rest = &rest[..at];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(parts: &[&str], streams: bool) -> Usage {
        let mut ear = Ear::default();
        for part in parts {
            ear.hear(part.as_bytes());
        }
        ear.usage(streams)
    }

    fn tokens(parts: &[&str]) -> (Option<u64>, Option<u64>) {
        let usage = heard(parts, false);
        (usage.tokens_in, usage.tokens_out)
    }

    #[test]
    fn every_dialect_says_it_somewhere() {
        let chat = r#"{"choices":[{"message":{"content":"hi"}}],"usage":{"completion_tokens":7,"prompt_tokens":12,
            "total_tokens":19,"prompt_tokens_details":{"cached_tokens":4}},"id":"x"}"#;
        assert_eq!(tokens(&[chat]), (Some(12), Some(7)));
        let embeddings =
            format!(r#"{{"usage":{{"prompt_tokens":5,"total_tokens":5}},"data":[{}]}}"#, "0.1,".repeat(9_000));
        assert_eq!(tokens(&[&embeddings]), (Some(5), None));
        let anthropic = [
            "event: message_start\ndata: {\"message\":{\"usage\":{\"input_tokens\":9,\"output_tokens\":1}}}\n\n",
            &"event: content_block_delta\ndata: {\"delta\":{\"text\":\"a\"}}\n\n".repeat(200),
            "event: message_delta\ndata: {\"usage\": {\"output_tokens\": 30}}\n\nevent: message_stop\ndata: {}\n\n",
        ];
        assert_eq!(tokens(&anthropic), (Some(9), Some(30)));
        let responses = "data: {\"type\":\"response.completed\",\"response\":{\"usage\":{\"input_tokens\":3,\"output_tokens\":4}}}\n\n";
        assert_eq!(tokens(&[responses]), (Some(3), Some(4)));
    }

    #[test]
    fn a_stream_says_it_at_its_end_also_in_pieces_and_after_many_frames() {
        let frame = "data: {\"choices\":[{\"delta\":{\"content\":\"word\"}}],\"usage\":null}\n\n";
        let mut parts = vec![frame; 500];
        parts.extend([
            "data: {\"choices\":[],\"usa",
            "ge\":{\"prompt_tokens\":2,\"compl",
            "etion_tokens\":500}}\n\n",
            "data: [DONE]\n\n",
        ]);
        assert_eq!(tokens(&parts), (Some(2), Some(500)));
        let big = format!("{}{}", "x".repeat(100_000), "{\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2}}");
        assert_eq!(tokens(&["a", &big]), (Some(1), Some(2)));
    }

    #[test]
    fn llama_server_tells_its_time_without_being_asked() {
        let last = "data: {\"choices\":[{\"finish_reason\":\"stop\"}],\"timings\":{\"cache_n\":3,\"prompt_n\":8,\
            \"predicted_n\":20,\"predicted_ms\":190.5}}\n\ndata: [DONE]\n\n";
        let usage = heard(&[last], true);
        assert_eq!((usage.tokens_in, usage.tokens_out), (Some(11), Some(20)));
        assert_eq!(usage.decode, Some(Duration::from_micros(190_500)));
    }

    #[test]
    fn what_a_model_wrote_is_not_taken_for_it() {
        let text = r#"{"content":"say \"usage\": {\"prompt_tokens\": 99}","usage":"none"}"#;
        assert_eq!(tokens(&[text]), (None, None));
        for odd in [
            "",
            "\"usage\"",
            "\"usage\":",
            "\"usage\":{",
            "\"usage\":{\"prompt_tokens\":-1}",
            "\"timings\":{\"predicted_ms\":1e400}",
        ] {
            assert_eq!(heard(&[odd], false), Usage::default(), "{odd}");
        }
    }

    #[test]
    fn no_more_is_kept_than_is_looked_at() {
        let mut ear = Ear::default();
        assert!(ear.hear(b"a") && !ear.hear(b"b"));
        for size in [1, 100, 2_000, 3_000, 50_000, 7, 1_999] {
            ear.hear(&vec![b'x'; size]);
            assert!(ear.tail.len() >= TAIL.min(size) && ear.tail.capacity() <= TAIL + SLACK, "{}", ear.tail.capacity());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn of_a_stream_the_time_between_its_parts_is_known() {
        let mut ear = Ear::default();
        ear.hear(b"one");
        tokio::time::sleep(Duration::from_millis(300)).await;
        ear.hear(b"two");
        assert_eq!(ear.usage(true).decode, Some(Duration::from_millis(300)));
        assert_eq!(ear.usage(false).decode, None);
    }
}
