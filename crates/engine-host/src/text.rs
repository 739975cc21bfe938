//! Foreign text, made fit for a failure's detail.

use std::path::Path;

use pool_domain::{Failure, FailureClass};

/// Characters kept of a foreign text.
const MAX: usize = 200;

/// One line, without control characters, paths cut to their file names, at most 200 characters.
pub(crate) fn tidy(text: &str) -> String {
    let words = text.split_whitespace().map(strip_path);
    let line = words.collect::<Vec<_>>().join(" ");
    let line: String = line.chars().filter(|c| !c.is_control()).collect();
    match line.char_indices().nth(MAX) {
        Some((end, _)) => format!("{}…", &line[..line[..end].char_indices().last().map_or(0, |(at, _)| at)]),
        None => line,
    }
}

/// `'/srv/models/a.gguf',` becomes `'a.gguf',`; addresses with a scheme stay.
fn strip_path(word: &str) -> String {
    let Some(start) = word.find('/') else { return word.to_owned() };
    if word.contains("://") {
        return word.to_owned();
    }
    let absolute = word[..start].chars().all(|c| !c.is_alphanumeric() && c != '.') || word[..start].ends_with('=');
    match word.rfind('/') {
        Some(last) if absolute && last > start => format!("{}{}", &word[..start], &word[last + 1..]),
        _ => word.to_owned(),
    }
}

/// The name of a file, for people.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// A failure of class `config`.
pub(crate) fn config(detail: impl Into<String>) -> Failure {
    Failure::new(FailureClass::Config, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cut_and_lines_are_bounded() {
        assert_eq!(tidy("cannot open '/srv/models/a.gguf', sorry"), "cannot open 'a.gguf', sorry");
        assert_eq!(
            tidy("model=/srv/models/a.gguf at http://127.0.0.1:1/x and 3/4"),
            "model=a.gguf at http://127.0.0.1:1/x and 3/4"
        );
        assert_eq!(tidy("a\tb\u{1b}[31m\n c"), "a b[31m c");
        assert_eq!(tidy(&"ö".repeat(500)).chars().count(), MAX);
    }
}
