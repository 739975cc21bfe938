//! Made-up text, vectors and scores: always the same for the same input.

const WORDS: [&str; 32] = [
    "amber", "birch", "cloud", "delta", "ember", "field", "grain", "harbor", "inlet", "juniper", "kettle", "lantern",
    "meadow", "north", "orchard", "pebble", "quiet", "river", "silver", "timber", "under", "valley", "willow",
    "yonder", "zephyr", "bright", "copper", "drift", "early", "frost", "glade", "hollow",
];

/// Dimensions of an embedding.
pub(crate) const DIMENSIONS: usize = 64;

/// Words that depend on the prompt, one for each token.
#[derive(Debug)]
pub(crate) struct Words {
    state: u64,
    first: bool,
}

impl Words {
    pub(crate) fn for_prompt(prompt: &str) -> Self {
        Self { state: hash(prompt), first: true }
    }
}

impl Iterator for Words {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let word = WORDS[usize::try_from(step(&mut self.state) >> 59).unwrap_or(0)];
        let space = if std::mem::take(&mut self.first) { "" } else { " " };
        Some(format!("{space}{word}"))
    }
}

/// Tokens in a text: its words, and never none.
pub(crate) fn count_tokens(text: &str) -> u64 {
    (text.split_whitespace().count() as u64).max(1)
}

/// A vector of length one.
pub(crate) fn embedding(text: &str) -> Vec<f64> {
    let mut state = hash(text);
    let raw: Vec<f64> = (0..DIMENSIONS).map(|_| unit(&mut state) - 0.5).collect();
    let norm = raw.iter().map(|x| x * x).sum::<f64>().sqrt();
    raw.into_iter().map(|x| x / norm).collect()
}

/// How well a document answers a query: the share of the query's words it has, plus a little to break ties.
pub(crate) fn relevance(query: &str, document: &str) -> f64 {
    let words = |text: &str| text.split_whitespace().map(str::to_lowercase).collect::<Vec<_>>();
    let (query, document) = (words(query), words(document));
    let shared = query.iter().filter(|word| document.contains(word)).count();
    let tie = unit(&mut hash(&document.join(" "))) / 1000.0;
    shared as f64 / query.len().max(1) as f64 + tie
}

/// FNV-1a.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Knuth's linear congruential generator; its high bits are good enough for words.
fn step(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state
}

fn unit(state: &mut u64) -> f64 {
    (step(state) >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_printable_and_depend_on_the_prompt_alone() {
        let text = |prompt| Words::for_prompt(prompt).take(50).collect::<String>();
        assert_eq!(text("hello"), text("hello"));
        assert_ne!(text("hello"), text("goodbye"));
        assert_eq!(count_tokens(&text("hello")), 50);
        assert!(text("hello").chars().all(|c| c == ' ' || c.is_ascii_lowercase()));
    }

    #[test]
    fn embeddings_have_length_one() {
        let vector = embedding("hello");
        assert_eq!(vector.len(), DIMENSIONS);
        assert!((vector.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-9);
        assert_ne!(vector, embedding("goodbye"));
    }

    #[test]
    fn the_document_that_shares_words_is_more_relevant() {
        assert!(relevance("red fox", "a red fox ran") > relevance("red fox", "a blue whale swam"));
    }
}
