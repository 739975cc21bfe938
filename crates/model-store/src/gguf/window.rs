//! Which layers look back only so far.
//!
//! From `load_arch_hparams` of each architecture in llama.cpp's `src/models/`, with `load_swa_pattern` in
//! `llama-model.cpp` and `set_swa_pattern` in `llama-hparams.cpp`. An architecture that is not in the table attends to the
//! whole context there, whatever its file says of a window (`phi3`, `qwen2`, `llama`).

use super::model::Meta;
use crate::ProfileError;

const WINDOW: &str = "attention.sliding_window";
const PATTERN: &str = "attention.sliding_window_pattern";

/// How long the window is.
enum Length {
    /// The key is needed.
    Stored,
    /// The key, or this many tokens.
    Or(u32),
    /// The key; without it, or if it is 0, all layers attend to everything.
    IfStored,
    /// This many tokens, if the key is there and not 0.
    FixedIfStored(u32),
    /// This many tokens, unless the key says 0.
    FixedUnlessZero(u32),
}

/// Which layers have it.
enum Pattern {
    /// The last of each so many layers has none; the file may name another number or list the layers.
    Every(u32),
    /// The first of each so many has none.
    AfterFirst(u32),
    /// The file lists the layers.
    Listed,
    /// All with attention.
    All,
}

/// The window of each layer; `None` where the whole context is kept. `trunk` counts the layers without those for
/// prediction of further tokens, which have none unless they are listed.
pub(super) fn windows(meta: &Meta<'_>, trunk: u32, stored: u32) -> Result<Vec<Option<u64>>, ProfileError> {
    use Length::{FixedIfStored, FixedUnlessZero, IfStored, Or, Stored};
    use Pattern::{AfterFirst, All, Every, Listed};
    let none = vec![None; stored as usize];
    let (length, pattern) = match meta.architecture {
        "afmoe" | "mellum" | "olmo2" => (IfStored, Every(4)),
        "cohere2" | "exaone-moe" | "muse-glimmer" => (Stored, Every(4)),
        "cohere2moe" => (Stored, AfterFirst(4)),
        "dots3note" | "gemma4" | "granite_swa" | "maple" | "mimo2" | "spark2_5" | "step35" => (Stored, Listed),
        // The 32B; smaller ones have none.
        "exaone4" if trunk == 64 => (Or(4096), Every(4)),
        "gemma2" => (Or(4096), Every(2)),
        "gemma3" => (IfStored, Every(6)),
        "gemma3n" => (Stored, Every(5)),
        "gpt-oss" => (Stored, Every(2)),
        "laguna" => (IfStored, AfterFirst(4)),
        "lfm2" => (IfStored, All),
        "llama4" => (FixedUnlessZero(8192), Every(4)),
        "plamo3" => (IfStored, Every(8)),
        "smallthinker" => (FixedIfStored(4096), AfterFirst(4)),
        _ => return Ok(none),
    };
    let stated = meta.small(WINDOW)?;
    let length = match (length, stated) {
        (Stored, _) => meta.need(WINDOW)?,
        (Or(default), stated) => stated.unwrap_or(default),
        (IfStored | FixedIfStored(_), None | Some(0)) | (FixedUnlessZero(_), Some(0)) => return Ok(none),
        (IfStored, Some(n)) => n,
        (FixedIfStored(n), Some(_)) | (FixedUnlessZero(n), _) => n,
    };
    let listed = meta.list(PATTERN)?;
    let by_period = |period: u32, first: bool| -> Result<Vec<bool>, ProfileError> {
        let period = meta.small(PATTERN)?.unwrap_or(period);
        let bounded = |layer: u32| match period {
            0 => true,
            _ if first => !layer.is_multiple_of(period),
            _ => layer % period < period - 1,
        };
        Ok((0..trunk).map(bounded).collect())
    };
    let bounded: Vec<bool> = match (pattern, listed) {
        (All, _) => vec![true; trunk as usize],
        (_, Some(list)) => list.into_iter().map(|n| n != 0).collect(),
        (Every(n), None) => by_period(n, false)?,
        (AfterFirst(n), None) => by_period(n, true)?,
        (Listed, None) => return Err(ProfileError::Missing(meta.key(PATTERN))),
    };
    let of = |layer: usize| bounded.get(layer).is_some_and(|b| *b).then_some(u64::from(length));
    Ok((0..stored as usize).map(of).collect())
}
