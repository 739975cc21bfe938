//! The text format of Prometheus, for readers that do not ask for OpenMetrics.
//!
//! The two differ in little: there a counter's family has the name of its samples, `_total` included
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>), and neither units nor an end are told.

/// OpenMetrics as the text format 0.0.4.
pub(super) fn from_openmetrics(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let Some(told) = line.strip_prefix("# ") else {
            out.push_str(line);
            out.push('\n');
            continue;
        };
        let of_counter = |line: &str| line.starts_with("# TYPE ") && line.ends_with(" counter");
        let counter =
            of_counter(line) || lines.peek().is_some_and(|next| told.starts_with("HELP ") && of_counter(next));
        let mut words = told.splitn(3, ' ');
        let (Some(what @ ("HELP" | "TYPE")), Some(name), Some(rest)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        let suffix = if counter { "_total" } else { "" };
        // The name for what has no type is another there.
        let rest = if what == "TYPE" && rest == "unknown" { "untyped" } else { rest };
        out.push_str(&format!("# {what} {name}{suffix} {rest}\n"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::from_openmetrics;

    #[test]
    fn counters_are_named_as_their_samples() {
        let open = "# HELP a Things.\n# TYPE a counter\na_total{x=\"# TYPE b counter\"} 1\n# HELP b Bytes held.\n# TYPE b gauge\n# UNIT b bytes\nb 2\n# EOF\n";
        let plain = "# HELP a_total Things.\n# TYPE a_total counter\na_total{x=\"# TYPE b counter\"} 1\n# HELP b Bytes held.\n# TYPE b gauge\nb 2\n";
        assert_eq!(from_openmetrics(open), plain);
    }
}
