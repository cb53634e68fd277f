//! The checker's end: a connection to the freshness service.
//!
//! Knows how a checker proves who it is. Must not know the service's other end.

use std::time::Duration;

use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::rpc::freshness_client::FreshnessClient;

/// A gateway that does not answer for this long is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A quiet connection is asked for a sign of life this often, and given up when none comes.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Why there is no connection to a freshness service.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address cannot be used.
    #[error("{address:?} is not the address of a freshness service: write it as https://host:port")]
    Address {
        /// What was given.
        address: String,
    },
    /// The certificates cannot be used.
    #[error("the certificates for {address} cannot be used")]
    Credentials {
        /// The service they were for.
        address: String,
        /// What the TLS library said.
        source: tonic::transport::Error,
    },
    /// The service cannot be reached, or one end does not accept the other's certificate.
    #[error("cannot connect to the freshness service at {address}")]
    Connect {
        /// Where it should be.
        address: String,
        /// What went wrong.
        source: tonic::transport::Error,
    },
}

/// Connects to `address`, such as `https://127.0.0.1:4434`, as the checker of a certificate.
/// `server_name` is the name or IP address in the gateway's certificate.
///
/// # Errors
/// When the address or the certificates cannot be used, or there is nobody there.
pub async fn connect(
    address: &str,
    ca_pem: impl AsRef<[u8]>,
    certificate_pem: impl AsRef<[u8]>,
    private_key_pem: impl AsRef<[u8]>,
    server_name: &str,
) -> Result<FreshnessClient<Channel>, ClientError> {
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(ca_pem))
        .identity(Identity::from_pem(certificate_pem, private_key_pem))
        .domain_name(server_name);
    let endpoint = Endpoint::from_shared(address.to_owned())
        .ok()
        .filter(|endpoint| endpoint.uri().scheme_str() == Some("https"))
        .ok_or_else(|| ClientError::Address {
            address: address.to_owned(),
        })?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .tls_config(tls)
        .map_err(|source| ClientError::Credentials {
            address: address.to_owned(),
            source,
        })?;
    let channel = endpoint
        .connect()
        .await
        .map_err(|source| ClientError::Connect {
            address: address.to_owned(),
            source,
        })?;
    Ok(FreshnessClient::new(channel))
}
