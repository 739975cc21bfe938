//! Which files of a repository a model is.

use thiserror::Error;

use crate::Sha256Digest;

/// One file of a repository, as the repository tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoFile {
    /// Its path there.
    pub name: String,
    /// Bytes, where they are told.
    pub bytes: Option<u64>,
    /// Its digest, where it is told.
    pub digest: Option<Sha256Digest>,
}

/// Why no files can be chosen.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ChoiceError {
    /// No such file.
    #[error("there is no file `{0}` in the repository")]
    NoFile(String),
    /// A part of a split is not there.
    #[error("the part `{0}` of the model is not in the repository")]
    NoPart(String),
    /// Nothing an engine can use.
    #[error("there is neither a GGUF file nor a {CONFIG} with safetensors files in the repository")]
    NoModel,
    /// More than one model.
    #[error("there are several models in the repository, name one of them: {0}")]
    Several(String),
    /// A name that leads elsewhere.
    #[error("the repository has a file whose name cannot be used here")]
    Name,
}

/// What makes a folder of safetensors files a model.
const CONFIG: &str = "config.json";
/// No model has more parts.
const MAX_PARTS: u32 = 999;
/// So many are named in an error.
const SHOWN: usize = 8;

/// The file names of a split model, all of them, if this is one of several parts: `{stem}-00002-of-00005.gguf`.
#[must_use]
pub fn split(file: &str) -> Option<Vec<String>> {
    let (rest, count) = file.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let five = |digits: &str| (digits.len() == 5).then(|| digits.parse::<u32>().ok()).flatten();
    let (number, count) = (five(number)?, five(count)?);
    let parts = (2..=MAX_PARTS).contains(&count) && (1..=count).contains(&number);
    parts.then(|| (1..=count).map(|n| format!("{stem}-{n:05}-of-{count:05}.gguf")).collect())
}

/// The files to fetch: of the one that is named, or of the one model that there is. The first is the one that an engine is
/// given, or that tells the folder it is given.
///
/// # Errors
/// When there is no such model, or more than one.
pub fn choose(files: &[RepoFile], named: Option<&str>) -> Result<Vec<RepoFile>, ChoiceError> {
    if files.iter().any(|f| !crate::model_ref::is_relative_path(&f.name)) {
        return Err(ChoiceError::Name);
    }
    let find = |name: &str| files.iter().find(|f| f.name == name).cloned();
    if let Some(named) = named {
        let first = find(named).ok_or_else(|| ChoiceError::NoFile(named.to_owned()))?;
        return match split(named) {
            Some(parts) => parts.into_iter().map(|p| find(&p).ok_or(ChoiceError::NoPart(p))).collect(),
            None => Ok(vec![first]),
        };
    }
    let here = |f: &&RepoFile| !f.name.contains('/');
    if let Some(config) = find(CONFIG)
        && files.iter().filter(here).any(|f| f.name.ends_with(".safetensors"))
    {
        // Weights in other formats, pictures and papers are of no use to an engine, and code is not fetched.
        let useful = |f: &&RepoFile| {
            let name = f.name.rsplit_once('.').map_or("", |(_, end)| end);
            matches!(name, "safetensors" | "json" | "txt" | "model" | "jinja" | "tiktoken") && f.name != CONFIG
        };
        return Ok(std::iter::once(config).chain(files.iter().filter(here).filter(useful).cloned()).collect());
    }
    let mut models: Vec<&RepoFile> = files.iter().filter(|f| f.name.ends_with(".gguf")).collect();
    // Of a split, its first part stands for it; a projector is no model of its own.
    models.retain(|f| split(&f.name).is_none_or(|parts| parts[0] == f.name));
    models.retain(|f| !f.name.rsplit('/').next().unwrap_or_default().starts_with("mmproj"));
    match models.as_slice() {
        [] => Err(ChoiceError::NoModel),
        [one] => choose(files, Some(&one.name)),
        several => {
            let mut names: Vec<_> = several.iter().take(SHOWN).map(|f| f.name.as_str()).collect();
            if several.len() > SHOWN {
                names.push("…");
            }
            Err(ChoiceError::Several(names.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo(names: &[&str]) -> Vec<RepoFile> {
        names.iter().map(|n| RepoFile { name: (*n).to_owned(), bytes: None, digest: None }).collect()
    }

    fn chosen(names: &[&str], named: Option<&str>) -> Result<Vec<String>, ChoiceError> {
        choose(&repo(names), named).map(|files| files.into_iter().map(|f| f.name).collect())
    }

    #[test]
    fn parts_of_a_split_are_told_by_their_names() {
        let all = ["q/a-00001-of-00003.gguf", "q/a-00002-of-00003.gguf", "q/a-00003-of-00003.gguf"];
        assert_eq!(split("q/a-00002-of-00003.gguf").unwrap(), all);
        for one in
            ["a.gguf", "a-00001-of-00001.gguf", "a-1-of-3.gguf", "a-00004-of-00003.gguf", "a-00001-of-99999.gguf"]
        {
            assert_eq!(split(one), None, "{one}");
        }
        assert_eq!(chosen(&all, Some(all[1])).unwrap(), all);
        assert_eq!(chosen(&all, None).unwrap(), all);
        assert_eq!(chosen(&all[..2], None), Err(ChoiceError::NoPart(all[2].to_owned())));
    }

    #[test]
    fn a_repository_is_its_one_model() {
        let gguf = ["README.md", "a.Q4.gguf", "mmproj-a.gguf"];
        assert_eq!(chosen(&gguf, None).unwrap(), ["a.Q4.gguf"]);
        let several = chosen(&["a.Q4.gguf", "a.Q8.gguf"], None).unwrap_err();
        assert!(several.to_string().contains("a.Q4.gguf, a.Q8.gguf"), "{several}");
        assert_eq!(chosen(&["a.Q4.gguf", "a.Q8.gguf"], Some("a.Q8.gguf")).unwrap(), ["a.Q8.gguf"]);
        assert_eq!(chosen(&["a.gguf"], Some("b.gguf")), Err(ChoiceError::NoFile("b.gguf".into())));
        assert_eq!(chosen(&["README.md", "model.bin"], None), Err(ChoiceError::NoModel));
    }

    #[test]
    fn a_folder_of_safetensors_is_what_an_engine_reads_of_it() {
        let files = [
            ".gitattributes",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "config.json",
            "tokenizer.json",
            "original/consolidated.safetensors",
            "pytorch_model.bin",
            "picture.png",
        ];
        let wanted = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        assert_eq!(chosen(&files, None).unwrap(), [&wanted[..], &["tokenizer.json"]].concat());
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_no_file() {
        for bad in ["../a.gguf", "/etc/passwd", "a//b.gguf", "a\\b.gguf", "a\0.gguf"] {
            assert_eq!(chosen(&["a.gguf", bad], None), Err(ChoiceError::Name), "{bad:?}");
        }
    }
}
