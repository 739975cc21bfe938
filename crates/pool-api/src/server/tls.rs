//! TLS, as far as the API knows of it: certificates and a key as text.

use std::sync::Arc;

use thiserror::Error;
use tokio_rustls::rustls;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

pub use tokio_rustls::rustls::ServerConfig;

/// Why texts are no certificate and key. They are not repeated.
#[derive(Debug, Error)]
pub enum TlsError {
    /// No certificate.
    #[error("there is no certificate in it (PEM)")]
    Certificate,
    /// No key.
    #[error("there is no private key in it (PEM, not encrypted)")]
    Key,
    /// They do not belong together, or are not usable.
    #[error("certificate and key cannot be used together")]
    Pair(#[source] rustls::Error),
}

/// What connections are served with, from a chain of certificates and a key in PEM.
///
/// # Errors
/// When the texts are none.
pub fn server_config(chain: &[u8], key: &[u8]) -> Result<Arc<ServerConfig>, TlsError> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
    let chain = chain.ok().filter(|c| !c.is_empty()).ok_or(TlsError::Certificate)?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| TlsError::Key)?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Pair)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(TlsError::Pair)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
