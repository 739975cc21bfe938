//! The document.

use std::fmt::Write;

use pool_domain::estimate::{KvType, MIB};

use crate::estimates::measure::{CONTEXTS, Case, Row, SLOTS, Sizes, TYPES};

const HEAD: &str = "\
# Memory estimates beside llama.cpp's own

<!-- Made by `cargo xtask estimates`; do not edit. -->

`pool_domain::estimate` says before a start what an engine will take. This page compares it with what llama.cpp b11434
itself says: for each shape a GGUF file with a true header and no weights is written and
`llama-fit-params -m FILE -c CONTEXT -np SLOTS -ctk TYPE -ctv TYPE -fa on --no-repack --fit-print on` is asked. The file is
read back by `model-store`, so readers and formulas are compared together.

What this does not show: the engine here is a CPU build. Weights and context are laid out alike in every build; the compute
buffer is that of the CPU's graph, and a CUDA build may differ (padding of rows, scratch, operations that are fused or not,
copies kept for several devices), which is checked only where there is a GPU. What a CUDA context takes is in no figure of
this page: it is the estimate's `runtime`. The margin and what is learnt from a running engine are there for both.

Sizes are MiB; the engine prints whole ones, cut off, so both sides are compared so. Goals: weights and context within 1 %
(or 1 MiB), the total within 3 % or 100 MiB, whichever is more.
";

/// Contexts, types and slots of every shape, the worst of each.
pub(super) fn document(rows: &[Row]) -> String {
    let mut out = HEAD.to_owned();
    let cases: usize = rows.iter().map(|r| r.cases.len() + r.bare.len() + r.options.len()).sum();
    let missed: usize =
        rows.iter().flat_map(|r| r.cases.iter().chain(&r.bare)).filter(|c| !c.misses().is_empty()).count();
    let missed = missed + rows.iter().flat_map(|r| &r.options).filter(|v| !v.met()).count();
    line(&mut out, &format!("\n{} shapes, {cases} cases, {missed} of them miss a goal.\n", rows.len()));
    summary(&mut out, rows);
    peers(&mut out, rows);
    bare(&mut out, rows);
    options(&mut out, rows);
    line(&mut out, "\n## Every case\n");
    line(
        &mut out,
        "Each cell: engine / estimate. The compute column with flash attention is that of the KV type which differs most.",
    );
    rows.iter().for_each(|row| details(&mut out, row));
    out
}

fn line(out: &mut String, text: &str) {
    out.push_str(text);
    out.push('\n');
}

/// The largest difference, with its sign, in MiB and in percent of theirs.
fn worst<'a>(cases: impl Iterator<Item = &'a Case>, of: impl Fn(Sizes) -> u64) -> String {
    let pairs = cases.map(|c| (of(c.theirs), of(c.ours)));
    let Some((theirs, ours)) = pairs.max_by_key(|(t, o)| t.abs_diff(*o)) else { return "–".to_owned() };
    signed(theirs, ours)
}

fn signed(theirs: u64, ours: u64) -> String {
    let diff = theirs.abs_diff(ours);
    let sign = if ours < theirs { "−" } else { "+" };
    match (diff, (diff * 1000).checked_div(theirs)) {
        (0, _) => "0".to_owned(),
        (_, None) => format!("{sign}{diff}"),
        (_, Some(permille)) => format!("{sign}{diff} ({}.{} %)", permille / 10, permille % 10),
    }
}

fn summary(out: &mut String, rows: &[Row]) {
    line(out, "## Summary\n\nThe worst case of each shape: estimate less engine.\n");
    line(out, "| shape | kind | weights | context | compute | total | goals |\n|---|---|--:|--:|--:|--:|---|");
    for row in rows {
        let all = || row.cases.iter();
        let missed = all().filter(|c| !c.misses().is_empty()).count();
        let verdict = if missed == 0 { "met".to_owned() } else { format!("missed in {missed} of {}", row.cases.len()) };
        let columns = [
            worst(all(), |s| s.model),
            worst(all(), |s| s.context),
            worst(all(), |s| s.compute),
            worst(all(), Sizes::total),
            verdict,
        ];
        line(out, &format!("| {} | {} | {} |", row.name, row.kind, columns.join(" | ")));
    }
}

/// Ollama's predictor, in MiB: file size and 2 × layers × fewest KV heads × (embedding / heads) × context × 2 bytes.
fn ollama(row: &Row, context: u64) -> u64 {
    let [layers, kv, embedding, heads] = row.ollama;
    (row.bytes + 2 * layers * kv * (embedding / heads.max(1)) * context * 2) / MIB
}

fn peers(out: &mut String, rows: &[Row]) {
    line(out, "\n## Beside the formulas of others\n");
    line(out, "One slot, f16, flash attention on; engine's total, and how far estimates lie from it.");
    line(
        out,
        "Ollama: size of the file + 2 × layers × fewest KV heads × (embedding / heads) × context × 2 bytes; where it is",
    );
    line(
        out,
        "wrong it evicts everything and tries once more. gguf-parser publishes \"usually about 100 MiB\" as its error.\n",
    );
    let heads: Vec<String> = CONTEXTS.iter().map(|c| format!("{}k | ours | Ollama", c / 1024)).collect();
    line(out, &format!("| shape | {} |\n|---|{}", heads.join(" | "), "--:|".repeat(3 * CONTEXTS.len())));
    let mut sums = [[0u64; 2]; 3];
    for row in rows {
        let mut text = format!("| {}", row.name);
        for (context, sum) in CONTEXTS.into_iter().zip(&mut sums) {
            let Some(case) = row.find(context, 1, KvType::F16, true) else { continue };
            let (theirs, ours, ollama) = (case.theirs.total(), case.ours.total(), ollama(row, context));
            sum[0] += theirs.abs_diff(ours);
            sum[1] += theirs.abs_diff(ollama);
            let _ = write!(text, " | {theirs} | {} | {}", signed(theirs, ours), signed(theirs, ollama));
        }
        line(out, &format!("{text} |"));
    }
    let n = rows.len().max(1) as u64;
    let means: Vec<String> = sums.iter().map(|[a, b]| format!("| {} | {}", a / n, b / n)).collect();
    line(out, &format!("| **mean of the differences** | {} |", means.join(" | ")));
}

fn bare(out: &mut String, rows: &[Row]) {
    line(out, "\n## Layers alone\n");
    line(
        out,
        "`llama-fit-params` computes logits for a whole batch, llama-server for one token of each slot. The same shapes",
    );
    line(
        out,
        "with a vocabulary of 256 show what is left then: the compute buffer of the layers (engine / estimate, one slot,",
    );
    line(out, "f16).\n");
    line(out, "| shape | 4k | 32k | 4k, no flash attention | 32k, no flash attention |\n|---|--:|--:|--:|--:|");
    for row in rows {
        let cells: Vec<String> =
            row.bare.iter().map(|c| format!("{} / {}", c.theirs.compute, c.ours.compute)).collect();
        line(out, &format!("| {} | {} |", row.name, cells.join(" | ")));
    }
}

fn options(out: &mut String, rows: &[Row]) {
    let rows: Vec<&Row> = rows.iter().filter(|r| !r.options.is_empty()).collect();
    let Some(first) = rows.first() else { return };
    line(out, "\n## Other settings\n");
    line(out, "32k, one slot, f16, flash attention on, but for what is named. Context + compute: engine / estimate.\n");
    let names: Vec<&str> = rows.iter().map(|r| r.name).collect();
    line(out, &format!("| settings | {} |\n|---|{}", names.join(" | "), "--:|".repeat(names.len())));
    let shown = |sizes: Option<Sizes>| match sizes {
        Some(sizes) => format!("{} + {}", sizes.context, sizes.compute),
        None => "refused".to_owned(),
    };
    for (i, variant) in first.options.iter().enumerate() {
        let cell = |row: &&Row| {
            row.options.get(i).map_or_else(String::new, |v| format!("{} / {}", shown(v.theirs), shown(v.ours)))
        };
        let cells: Vec<String> = rows.iter().map(cell).collect();
        line(out, &format!("| `{}` | {} |", variant.name, cells.join(" | ")));
    }
}

impl Row {
    fn find(&self, context: u64, slots: u32, kv: KvType, flash: bool) -> Option<&Case> {
        self.cases.iter().find(|c| c.context == context && c.slots == slots && c.kv == kv && c.flash == flash)
    }
}

fn details(out: &mut String, row: &Row) {
    let Some(first) = row.cases.first() else { return };
    line(out, &format!("\n### {} ({})\n", row.name, row.kind));
    line(out, &format!("Weights {} / {}.\n", first.theirs.model, first.ours.model));
    line(
        out,
        "| context | slots | KV f16 | q8_0 | q4_0 | compute | no flash attention |\n|--:|--:|--:|--:|--:|--:|--:|",
    );
    for context in CONTEXTS {
        for slots in SLOTS {
            let found: Vec<&Case> = TYPES.iter().filter_map(|kv| row.find(context, slots, *kv, true)).collect();
            let kv: Vec<String> = found.iter().map(|c| format!("{} / {}", c.theirs.context, c.ours.context)).collect();
            let compute = |c: &Case| format!("{} / {}", c.theirs.compute, c.ours.compute);
            let most = found.iter().max_by_key(|c| c.theirs.compute.abs_diff(c.ours.compute)).map(|c| compute(c));
            let off = row.find(context, slots, KvType::F16, false).map(compute);
            let (most, off) = (most.unwrap_or_default(), off.unwrap_or_default());
            line(out, &format!("| {}k | {slots} | {} | {most} | {off} |", context / 1024, kv.join(" | ")));
        }
    }
}
