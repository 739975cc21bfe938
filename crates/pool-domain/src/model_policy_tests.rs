use proptest::prelude::*;

use super::*;
use crate::ModelRef;

fn policy(allow: &[&str]) -> ModelPolicy {
    ModelPolicy {
        allow: allow.iter().map(|a| a.parse().unwrap()).collect(),
        offline: false,
        hf_endpoint: HttpUrl::parse(HF_ENDPOINT).unwrap(),
        s3_endpoint: None,
    }
}

fn source(text: &str) -> RemoteSource {
    match text.parse() {
        Ok(ModelRef::Remote(remote)) => remote.source,
        other => panic!("{text}: {other:?}"),
    }
}

fn url(text: &str) -> HttpUrl {
    HttpUrl::parse(text).unwrap()
}

#[test]
fn nothing_is_fetched_unless_it_is_allowed() {
    let all = ["hf:a/b", "https://h.org/a.gguf", "http://h.org/a.gguf", "s3://bucket/a.gguf", "oci://r.org/m:t"];
    for text in all {
        assert_eq!(policy(&[]).may_name(&source(text)), Err(Denied::NotAllowed(text.into())));
    }
    for (allow, fits, not) in [
        ("hf:*", &["hf:a/b", "hf:c/d@v1/e.gguf"][..], &["https://huggingface.co/a/b"][..]),
        ("hf:org/*", &["hf:org/a", "hf:org/b/c.gguf"], &["hf:org2/a", "hf:other/org"]),
        ("hf:org/repo", &["hf:org/repo", "hf:org/repo@v1/a.gguf"], &["hf:org/repo2"]),
        ("hf:org/repo/a.gguf", &["hf:org/repo/a.gguf"], &["hf:org/repo", "hf:org/repo/b.gguf"]),
        (
            "https://h.org/m/*",
            &["https://h.org/m/a.gguf", "https://h.org/m/x/a.gguf"],
            &["https://h.org/n/a.gguf", "http://h.org/m/a.gguf", "https://h.org:8443/m/a.gguf", "https://x.h.org/m/a"],
        ),
        (
            "https://*.h.org/*",
            &["https://x.h.org/a.gguf", "https://x.y.h.org/a.gguf"],
            &["https://h.org/a.gguf", "https://xh.org/a.gguf", "https://h.org.evil.org/a.gguf"],
        ),
        ("https://*/*", &["https://x.h.org/a.gguf"], &["https://127.0.0.1/a.gguf", "http://h.org/a.gguf"]),
        ("http://127.0.0.1:8080/*", &["http://127.0.0.1:8080/a.gguf"], &["http://127.0.0.1/a.gguf"]),
        ("s3://bucket/*", &["s3://bucket/a.gguf", "s3://bucket/f/"], &["s3://bucket2/a.gguf"]),
        ("oci://r.org/m/*", &["oci://r.org/m/a:t"], &["oci://r.org/n/a:t", "oci://r2.org/m/a:t"]),
    ] {
        let policy = policy(&[allow]);
        assert_eq!(policy.allow[0].to_string(), allow);
        for text in fits {
            assert_eq!(policy.may_name(&source(text)), Ok(()), "{allow} allows {text}");
        }
        for text in not {
            assert!(policy.may_name(&source(text)).is_err(), "{allow} does not allow {text}");
        }
    }
}

#[test]
fn entries_that_cannot_be_are_refused() {
    for (text, why) in [
        ("", AllowError::Form),
        ("*", AllowError::Form),
        ("hf://*", AllowError::Form),
        ("ftp://h.org/*", AllowError::Form),
        ("s3:bucket", AllowError::Form),
        ("hf:*/repo", AllowError::Star),
        ("https://h.org/*/x", AllowError::Star),
        ("https://*h.org/*", AllowError::Star),
        ("http://*/*", AllowError::Plain),
        ("http://*.h.org/*", AllowError::Plain),
    ] {
        assert_eq!(text.parse::<Allowed>(), Err(why), "{text}");
    }
    for text in ["https://h*.org/", "https://user@h.org/*", "https://h.org:x/*", "https://h.org/../*", "oci://-r/*"] {
        assert!(text.parse::<Allowed>().is_err(), "{text}");
    }
}

#[test]
fn a_redirect_is_held_to_the_same_policy() {
    let hub = policy(&["hf:*"]);
    let model = source("hf:a/b/c.gguf");
    for fine in
        ["https://huggingface.co/a/b", "https://cdn-lfs.huggingface.co/x?s=1", "https://cas-bridge.xethub.hf.co/x"]
    {
        assert_eq!(hub.may_ask(&model, &url(fine)), Ok(()), "{fine}");
    }
    for elsewhere in [
        "https://evil.org/x",
        "http://huggingface.co/a",
        "http://cdn-lfs.huggingface.co/a",
        "https://hf.co.evil.org/x",
        "https://cdn-lfs.huggingface.co:8443/x",
        "http://169.254.169.254/latest/meta-data",
    ] {
        let denied = hub.may_ask(&model, &url(elsewhere)).unwrap_err();
        assert!(matches!(denied, Denied::Elsewhere(_)), "{elsewhere}: {denied}");
    }
    // The hub's own storage is only the public hub's.
    let mirror = ModelPolicy { hf_endpoint: url("https://mirror.example.org"), ..hub.clone() };
    assert!(mirror.may_ask(&model, &url("https://cdn-lfs.huggingface.co/x")).is_err());
    assert_eq!(mirror.may_ask(&model, &url("https://mirror.example.org/x")), Ok(()));
    // Nor does one kind of source open another's hosts.
    let web = policy(&["hf:*", "https://h.org/*"]);
    let file = source("https://h.org/a.gguf");
    assert_eq!(web.may_ask(&file, &url("https://h.org/b?s=1")), Ok(()));
    assert!(web.may_ask(&file, &url("https://huggingface.co/x")).is_err());
    assert!(web.may_ask(&file, &url("http://h.org/a.gguf")).is_err(), "no way back to plain HTTP");
    let offline = ModelPolicy { offline: true, ..web };
    assert_eq!(offline.may_ask(&file, &url("https://h.org/a.gguf")), Err(Denied::Offline));
}

#[test]
fn private_addresses_are_reached_only_where_the_host_is_named() {
    let model = source("https://models.corp.example/a.gguf");
    let origin = url("https://models.corp.example/").origin().clone();
    let named = policy(&["https://models.corp.example/*"]);
    let open = policy(&["https://*.corp.example/*"]);
    let connects = |p: &ModelPolicy, ip: &str| p.may_connect(&model, &origin, ip.parse().unwrap()).is_ok();
    for public in ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::5db8:d822"] {
        assert!(connects(&named, public) && connects(&open, public), "{public}");
    }
    for private in ["10.1.2.3", "172.16.0.1", "192.168.0.1", "100.64.0.1", "fd00::1", "::ffff:10.0.0.1", "2002:a00:1::"]
    {
        assert!(connects(&named, private) && !connects(&open, private), "{private}");
    }
    // A name does not lead to this machine or its link, whoever answers for it.
    let local = ["127.0.0.1", "::1", "169.254.169.254", "fe80::1", "0.0.0.0", "::", "::ffff:127.0.0.1", "224.0.0.1"];
    for local in
        local.into_iter().chain(["64:ff9b::7f00:1", "2002:7f00:1::", "255.255.255.255", "::ffff:169.254.169.254"])
    {
        assert!(!connects(&named, local) && !connects(&open, local), "{local}");
    }
    let here = policy(&["http://127.0.0.1:8080/*", "http://localhost/*"]);
    for (text, ip, fine) in [
        ("http://127.0.0.1:8080/", "127.0.0.1", true),
        ("http://localhost/", "::1", true),
        ("http://127.0.0.1:8081/", "127.0.0.1", false),
        ("https://localhost/", "127.0.0.1", false),
    ] {
        let origin = url(text).origin().clone();
        assert_eq!(here.may_connect(&model, &origin, ip.parse().unwrap()).is_ok(), fine, "{text}");
    }
    // A mirror that the operator named.
    let mirror = ModelPolicy { hf_endpoint: url("http://127.0.0.1:9000"), ..policy(&["hf:*"]) };
    let origin = mirror.hf_endpoint.origin().clone();
    assert_eq!(mirror.may_connect(&source("hf:a/b"), &origin, "127.0.0.1".parse().unwrap()), Ok(()));
    assert!(mirror.may_connect(&model, &origin, "127.0.0.1".parse().unwrap()).is_err(), "for its own sources alone");
}

proptest! {
    #[test]
    fn an_entry_is_written_as_it_is_read(text in "(hf:|https?://|s3://|oci://)[a-zA-Z0-9.*:/_%-]{0,30}") {
        if let Ok(allowed) = text.parse::<Allowed>() {
            prop_assert_eq!(allowed.to_string().parse(), Ok(allowed), "{}", text);
        }
    }

    /// However an IPv4 address is written as one of IPv6, it reaches no less of this machine.
    #[test]
    fn an_address_in_other_clothes_reaches_no_further(octets: [u8; 4]) {
        let v4 = Ipv4Addr::from(octets);
        let [a, b, c, d] = octets;
        let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        let others = [v4.to_ipv6_mapped(), Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low)];
        for v6 in others.into_iter().chain([Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1)]) {
            prop_assert!(reach_v6(v6) >= reach_v4(v4), "{v6} for {v4}");
        }
    }
}
