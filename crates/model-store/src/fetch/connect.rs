//! Connections, made only to addresses that the policy allows: what was checked is what is connected to, so that a name
//! that changes its address in between leads nowhere.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use http::{Request, Response};
use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use pool_domain::RemoteSource;
use pool_domain::model_policy::ModelPolicy;
use pool_domain::model_ref::{Host, Origin};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};

use super::{Limits, Trouble};

/// What hyper reads at once.
const READ: usize = 512 * 1024;

/// Makes connections.
#[derive(Debug)]
pub(crate) struct Connector {
    /// Certificates of further authorities.
    ca_file: Option<PathBuf>,
    /// Read when the first connection needs it.
    tls: OnceLock<Arc<ClientConfig>>,
}

impl Connector {
    pub(crate) fn new(ca_file: Option<PathBuf>) -> Self {
        Self { ca_file, tls: OnceLock::new() }
    }

    /// Asks who answers at an origin.
    pub(crate) async fn ask(
        &self,
        policy: &ModelPolicy,
        source: &RemoteSource,
        origin: &Origin,
        request: Request<Empty<Bytes>>,
        limits: &Limits,
    ) -> Result<Response<Incoming>, Trouble> {
        let host = &origin.host;
        let stream = timeout(limits.connect, connect(policy, source, origin))
            .await
            .map_err(|_| Trouble::later(format!("no connection to {host} came about in time")))??;
        // Speed is in large reads, not in small writes.
        let _ = stream.set_nodelay(true);
        if !origin.secure {
            return self.send(TokioIo::new(stream), request, host, limits).await;
        }
        let name = match host {
            Host::Name(name) => ServerName::try_from(name.clone()).map_err(|e| Trouble::Never(e.to_string()))?,
            Host::V4(v4) => ServerName::IpAddress(IpAddr::from(*v4).into()),
            Host::V6(v6) => ServerName::IpAddress(IpAddr::from(*v6).into()),
        };
        let tls = TlsConnector::from(self.tls().await?);
        let stream = timeout(limits.connect, tls.connect(name, stream))
            .await
            .map_err(|_| Trouble::later(format!("{host} does not finish the TLS handshake")))?
            .map_err(|e| Trouble::later(format!("the TLS handshake with {host} failed: {e}")))?;
        self.send(TokioIo::new(stream), request, host, limits).await
    }

    async fn send(
        &self,
        io: impl hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
        request: Request<Empty<Bytes>>,
        host: &Host,
        limits: &Limits,
    ) -> Result<Response<Incoming>, Trouble> {
        let cut = |e: hyper::Error| Trouble::later(format!("{host} cut the connection: {}", words(&e)));
        let (mut sender, connection) = http1::Builder::new().max_buf_size(READ).handshake(io).await.map_err(cut)?;
        // It ends with the answer's body, or when that is dropped; what it has to say is told there, too.
        tokio::spawn(async move { drop(connection.await) });
        timeout(limits.stall, sender.send_request(request))
            .await
            .map_err(|_| Trouble::later(format!("{host} does not answer")))?
            .map_err(cut)
    }

    async fn tls(&self) -> Result<Arc<ClientConfig>, Trouble> {
        if let Some(tls) = self.tls.get() {
            return Ok(Arc::clone(tls));
        }
        let ca_file = self.ca_file.clone();
        let made = tokio::task::spawn_blocking(move || config(ca_file.as_deref())).await;
        let made =
            made.map_err(|_| Trouble::later("the certificates were not read to the end"))?.map_err(Trouble::Never)?;
        // Whoever was faster read the same.
        Ok(Arc::clone(self.tls.get_or_init(|| made)))
    }
}

/// What hyper says, without what is below.
pub(crate) fn words(error: &hyper::Error) -> String {
    use std::error::Error;
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

fn config(ca_file: Option<&std::path::Path>) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    // Of those that cannot be read, a connection that needs them tells.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(path) = ca_file {
        let wrong = |why: String| format!("the file of `[models] ca_file` cannot be used: {why}");
        let own = CertificateDer::pem_file_iter(path).map_err(|e| wrong(e.to_string()))?;
        for certificate in own {
            let certificate = certificate.map_err(|e| wrong(e.to_string()))?;
            roots.add(certificate).map_err(|e| wrong(e.to_string()))?;
        }
    }
    let provider = Arc::new(crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = versions.map_err(|e| e.to_string())?.with_root_certificates(roots).with_no_client_auth();
    Ok(Arc::new(config))
}

/// The first of a host's addresses that may be connected to and answers.
async fn connect(policy: &ModelPolicy, source: &RemoteSource, origin: &Origin) -> Result<TcpStream, Trouble> {
    let addresses: Vec<SocketAddr> = match &origin.host {
        Host::V4(v4) => vec![(*v4, origin.port).into()],
        Host::V6(v6) => vec![(*v6, origin.port).into()],
        Host::Name(name) => lookup_host((name.as_str(), origin.port))
            .await
            .map_err(|_| Trouble::later(format!("the name {name} has no address at present")))?
            .collect(),
    };
    let (mut denied, mut failed) = (None, None);
    for address in addresses {
        if let Err(no) = policy.may_connect(source, origin, address.ip()) {
            denied = Some(no);
            continue;
        }
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = Some(error),
        }
    }
    Err(match (failed, denied) {
        (Some(error), _) => Trouble::later(format!("{} does not answer: {}", origin.host, error.kind())),
        (None, Some(denied)) => denied.into(),
        (None, None) => Trouble::later(format!("the name {} has no address at present", origin.host)),
    })
}
