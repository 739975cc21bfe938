//! Seals on the names of leases. A name says where its slot is, and after a restart of the daemon that alone brings a lease
//! back: so nobody may make up one, or bring back another tenant's.

use std::fmt;
use std::sync::Arc;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;

/// Length of a seal in hexadecimal digits.
const DIGITS: usize = 16;

/// What seals are made with. It has to outlive the daemon, as leases do.
pub struct SealKey([u8; 32]);

impl fmt::Debug for SealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealKey(…)")
    }
}

impl SealKey {
    /// This one, which has to be random.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    fn seal(&self, name: &str, tenant: Option<&str>) -> String {
        // Any length is a key of HMAC (RFC 2104).
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.0) else { return String::new() };
        mac.update(name.as_bytes());
        // No name has this byte in it; no tenant is not the tenant without a name.
        mac.update(if tenant.is_some() { b"\0t" } else { b"\0-" });
        mac.update(tenant.unwrap_or_default().as_bytes());
        mac.finalize().into_bytes().iter().take(DIGITS / 2).map(|b| format!("{b:02x}")).collect()
    }

    /// The name of a lease of this tenant, as it goes out.
    #[must_use]
    pub fn sealed(&self, name: &str, tenant: Option<&str>) -> String {
        format!("{name}.{}", self.seal(name, tenant))
    }

    /// Whose lease it is that has this seal, of those who may be meant.
    pub(super) fn owner<'a>(
        &self,
        (name, seal): (&str, &str),
        of: impl IntoIterator<Item = Option<&'a Arc<str>>>,
    ) -> Option<Option<Arc<str>>> {
        let fits = |tenant: &Option<&Arc<str>>| {
            let own = self.seal(name, tenant.map(|t| &**t));
            bool::from(own.as_bytes().ct_eq(seal.as_bytes()))
        };
        of.into_iter().find(fits).map(Option::<&Arc<str>>::cloned)
    }
}

/// The name, and its seal where it has one.
pub(super) fn split(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once('.') {
        Some((name, seal)) if seal.len() == DIGITS && seal.bytes().all(|b| b.is_ascii_hexdigit()) => (name, Some(seal)),
        _ => (text, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_is_of_one_name_one_tenant_and_one_key() {
        let key = SealKey::new([7; 32]);
        let (acme, other): (Arc<str>, Arc<str>) = ("acme".into(), "other".into());
        let text = key.sealed("lease-a.b-r0-g1-0-1", Some("acme"));
        let (name, seal) = split(&text);
        let seal = seal.unwrap();
        assert_eq!(name, "lease-a.b-r0-g1-0-1");
        assert_eq!(key.owner((name, seal), [None, Some(&other), Some(&acme)]), Some(Some(acme.clone())));
        assert_eq!(key.owner((name, seal), [None, Some(&other)]), None);
        assert_eq!(key.owner(("lease-a.b-r0-g1-0-2", seal), [Some(&acme)]), None);
        assert_eq!(SealKey::new([8; 32]).owner((name, seal), [Some(&acme)]), None);
        let nobodys = key.sealed("n", None);
        let (name, seal) = split(&nobodys);
        assert_eq!(key.owner((name, seal.unwrap()), [Some(&acme), None]), Some(None));
    }

    #[test]
    fn what_has_no_seal_is_a_name() {
        for name in ["lease-a-r0-g1-0123456789abcdef-1", "x.y", "", "a.0123456789abcde"] {
            assert_eq!(split(name), (name, None));
        }
    }
}
