use proptest::prelude::*;

use super::*;

const DIGITS: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fn parse(text: &str) -> Result<ModelRef, ModelRefError> {
    text.parse()
}

/// What a reference is, its short name, and that it is written as it was read.
#[track_caller]
fn reads(text: &str, id: &str) -> ModelRef {
    let model = parse(text).unwrap();
    assert_eq!((model.to_string().as_str(), model.model_id().as_str()), (text, id));
    model
}

#[track_caller]
fn refused(text: &str, because: &str) {
    let error = parse(text).unwrap_err().to_string();
    assert!(error.contains(because), "{text:?}: {error}");
}

#[test]
fn every_form_is_read_and_written_alike() {
    assert_eq!(parse("/m/a.gguf").unwrap(), ModelRef::file("/m/a.gguf"));
    reads("file:/m/a.gguf", "a");
    reads("stub:tiny", "tiny");
    reads("name:org/tiny", "org/tiny");
    reads("hf:org/repo", "repo");
    reads("hf:org/repo@v1.0", "repo");
    reads("hf:org/repo/q4/a.Q4_K_M.gguf", "a.Q4_K_M");
    reads("https://models.example.org/a/b.gguf", "b");
    reads("http://127.0.0.1:8080/b.gguf", "b");
    reads("https://[::1]:8443/b.gguf", "b");
    reads("s3://bucket/folder/b.gguf", "b");
    reads("s3://bucket/folder/", "folder");
    reads("oci://registry.example.org:5000/models/tiny:q4", "tiny");
    reads(&format!("oci://ghcr.io/models/tiny@sha256:{DIGITS}"), "tiny");
    let hf = reads("hf:org/repo@main/a.gguf", "a");
    let ModelRef::Remote(RemoteRef { source: RemoteSource::Hf(hf), .. }) = hf else { panic!("{hf:?}") };
    let told = (hf.repo.as_str(), hf.revision.as_deref(), hf.file.as_deref());
    assert_eq!(told, ("org/repo", Some("main"), Some("a.gguf")));
    // A host is the same in upper case, and so is the usual port.
    assert_eq!(
        parse("HTTPS://Models.Example.org:443/a.gguf").unwrap_err(),
        ModelRefError::Unknown("HTTPS://Models.Example.org:443/a.gguf".into())
    );
    assert_eq!(parse("https://Models.Example.org:443/a.gguf"), parse("https://models.example.org/a.gguf"));
}

#[test]
fn a_digest_belongs_to_the_reference_of_one_file() {
    for text in ["file:/m/a.gguf", "hf:org/repo/a.gguf", "https://h.org/a.gguf", "s3://bucket/a.gguf"] {
        let model = reads(&format!("{text}#sha256={DIGITS}"), "a");
        assert_eq!(model.digest(), Some(DIGITS.parse().unwrap()));
    }
    let several = ["hf:org/repo", "s3://bucket/folder/", "oci://r.org/m:t", "hf:org/repo/a-00001-of-00002.gguf"];
    for text in several {
        refused(&format!("{text}#sha256={DIGITS}"), "a digest is of one file");
    }
    let upper = DIGITS.to_uppercase();
    let wrong = ["", "../../", &DIGITS[1..], &upper, &format!("{DIGITS}0"), &format!("{} ", &DIGITS[1..])];
    for wrong in wrong {
        refused(&format!("file:/m/a.gguf#sha256={wrong}"), "64 digits");
        refused(&format!("https://h.org/a.gguf#sha256={wrong}"), "64 digits");
        refused(&format!("oci://r.org/m@sha256:{wrong}"), "64 digits");
    }
    refused(&format!("https://h.org/a.gguf#sha256={DIGITS}\n"), "control character");
    refused(&format!("https://h.org/a.gguf#sha512={DIGITS}"), "behind `#`");
    refused("https://h.org/a.gguf#a", "behind `#`");
}

/// The rows for model references of the matrix of bad input.
#[test]
fn bad_model_references_are_refused() {
    for (text, because) in [
        ("", "empty"),
        ("../x", "no known form"),
        ("a.gguf", "no known form"),
        ("-m", "no known form"),
        ("%2e%2e/etc/passwd", "no known form"),
        ("file:a.gguf", "no known form"),
        ("file:../x", "no known form"),
        ("ftp://h.org/a.gguf", "no known form"),
        ("/m/a\0.gguf", "control character"),
        ("/a\n", "control character"),
        ("stub:", "empty"),
        ("stub:a/b", "only a-z"),
        ("name:", "empty"),
        ("hf:", "write hf:"),
        ("hf://", "is no repository"),
        ("hf:org", "write hf:"),
        ("hf:org/", "is no repository"),
        ("hf:../repo", "is no repository"),
        ("hf:-m/repo", "is no repository"),
        ("hf:org/repo@", "is no branch"),
        ("hf:org/repo@../x", "is no branch"),
        ("hf:org/repo/", "is no file"),
        ("hf:org/repo/../../x", "is no file"),
        ("hf:org/repo/%2e%2e/x", "is no file"),
        ("hf:org/repo/a?x=y", "is no file"),
        ("http://169.254.169.254/", "plain name of a file"),
        ("https://h.org/", "plain name of a file"),
        ("https://h.org", "plain name of a file"),
        ("https://h.org/../a.gguf", "`..` part"),
        ("https://h.org/x/%2e%2e/a.gguf", "`..` part"),
        ("https://h.org/x%2fa.gguf", "`..` part"),
        ("https://h.org/x%00/a.gguf", "`..` part"),
        ("https://h.org/x%2/a.gguf", "`..` part"),
        ("https://h.org//a.gguf", "`..` part"),
        ("https://h.org/a%20b.gguf", "plain name of a file"),
        ("https://h.org/a b.gguf", "' '"),
        ("https://h.org\\@evil.org/a.gguf", "'\\\\'"),
        ("https://user:secret@h.org/a.gguf", "names a user"),
        ("https://h.org/a.gguf?token=x", "a query"),
        ("https://h.org:0/a.gguf", "no port"),
        ("https://h.org:99999/a.gguf", "no port"),
        ("https://h.org:/a.gguf", "no port"),
        ("https://2130706433/a.gguf", "no host name"),
        ("https://0x7f.1/a.gguf", "no host name"),
        ("https://127.1/a.gguf", "no host name"),
        ("https://0177.0.0.1/a.gguf", "no host name"),
        ("https://[::1/a.gguf", "no host name"),
        ("https:///a.gguf", "no host name"),
        ("https://h..org/a.gguf", "no host name"),
        ("https://-h.org/a.gguf", "no host name"),
        ("https://hé.org/a.gguf", "'é'"),
        ("s3://b/a.gguf", "is no bucket"),
        ("s3://Bucket/a.gguf", "is no bucket"),
        ("s3://127.0.0.1/a.gguf", "is no bucket"),
        ("s3://bucket", "write s3:"),
        ("s3://bucket/", "no key"),
        ("s3://bucket/../a.gguf", "no key"),
        ("oci://r.org/m", "no tag"),
        ("oci://r.org/M:t", "no name of a repository"),
        ("oci://r.org/../m:t", "no name of a repository"),
        ("oci://r.org/m:-t", "is no tag"),
    ] {
        refused(text, because);
    }
    refused(&format!("/{}", "a".repeat(4096)), "longer than 4096");
    parse(&format!("/{}", "a".repeat(4095))).unwrap();
}

#[test]
fn an_address_is_shown_without_what_may_be_secret() {
    let url = HttpUrl::parse("https://cdn.example.org/a/b?Signature=secret#x").unwrap();
    assert_eq!((url.to_string().as_str(), url.query()), ("https://cdn.example.org/a/b", Some("Signature=secret")));
    assert!(!format!("{url:?}").contains("secret"));
    assert_eq!(url.revealed(), "https://cdn.example.org/a/b?Signature=secret");
}

#[test]
fn a_redirect_leads_where_it_says() {
    let from = HttpUrl::parse("https://h.org:8443/a/b.gguf").unwrap();
    for (location, to) in [
        ("https://cdn.org/x?s=1", "https://cdn.org/x?s=1"),
        ("//cdn.org/x", "https://cdn.org/x"),
        ("/x?u=https://evil.org/", "https://h.org:8443/x?u=https://evil.org/"),
        ("x", "https://h.org:8443/a/x"),
    ] {
        assert_eq!(from.join(location).unwrap().revealed(), to);
    }
    for bad in ["../x", "javascript://x", "file:///etc/passwd", "https://u@h.org/", "/a\\b", "/a\r\nb", "/%2e%2e/"] {
        assert!(from.join(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn parts_of_a_path_are_encoded() {
    let below = HttpUrl::parse("https://h.org/root/").unwrap().below("org/a b/ü+1.gguf");
    assert_eq!(below.to_string(), "https://h.org/root/org/a%20b/%C3%BC%2B1.gguf");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    /// Whatever is read is written so that it is read the same, and is nothing that leads elsewhere.
    #[test]
    fn whatever_is_read_is_read_again_the_same(
        head in "(hf:|https?://|s3://|oci://|file:|/|stub:|name:|)",
        tail in "([a-zA-Z0-9._%@:/#?=-]|\\.\\./|%2e|\\PC){0,40}",
        digest in proptest::option::of("[0-9a-f]{63,65}"),
    ) {
        let text = format!("{head}{tail}{}", digest.map(|d| format!("#sha256={d}")).unwrap_or_default());
        if let Ok(model) = parse(&text) {
            prop_assert_eq!(parse(&model.to_string()), Ok(model.clone()), "{}", text);
            if let ModelRef::Remote(remote) = &model {
                let shown = model.to_string();
                prop_assert!(!shown.contains("/../") && !shown.contains("%2e") && !shown.contains('?'), "{}", shown);
                if let RemoteSource::Http(url) = &remote.source {
                    prop_assert!(!shown.contains('@') && url.path().starts_with('/'));
                }
            }
        }
    }

    /// Any text at all: no panic, and the same answer twice.
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,200}") {
        prop_assert_eq!(parse(&text), parse(&text));
        let _ = HttpUrl::parse(&text);
        if let Ok(url) = HttpUrl::parse(&format!("https://h.org/{text}")) {
            prop_assert_eq!(url.origin().to_string(), "https://h.org");
        }
    }
}
