//! How a checker reaches a gateway and proves who it is.
//!
//! Knows addresses, certificates and what can be wrong with them. Must not know what is asked.

use std::{fmt, time::Duration};

use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use crate::rpc::freshness_client::FreshnessClient;

/// A gateway that does not answer for this long is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A quiet connection is asked for a sign of life this often, and given up when none comes.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Where the gateway is, who asks, and how patiently.
#[derive(Clone)]
pub struct Config {
    /// The freshness service, such as `https://127.0.0.1:4434`.
    pub address: String,
    /// The authority of the gateway's certificate, PEM.
    pub ca_pem: Vec<u8>,
    /// The checker's certificate, PEM.
    pub certificate_pem: Vec<u8>,
    /// The checker's private key, PEM.
    pub private_key_pem: Vec<u8>,
    /// The name or IP address in the gateway's certificate.
    pub server_name: String,
    /// A watch that learns nothing new for so long is stale. The contract is progress every second.
    pub stale_after: Duration,
    /// A stream that does not move for so long is given up, and another one tried. A call is given up after as long.
    pub lost_after: Duration,
}

/// Why a question has no answer, or a watch has ended for good.
#[derive(Debug, thiserror::Error)]
pub enum CheckerError {
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
    /// The service answers, and asking again would not change the answer.
    #[error("the freshness service refuses: {0}")]
    Refused(String),
    /// The service has no room for more, and has changed nothing.
    #[error("the freshness service has no room: {0}")]
    NoRoom(String),
    /// The service did not answer, or said that it cannot now.
    #[error("the freshness service did not answer: {0}")]
    Failed(String),
}

impl Config {
    /// With the patience that suits a gateway with the settings it comes with: stale after 3 s, another
    /// stream after 15 s.
    pub fn new(
        address: impl Into<String>,
        ca_pem: impl AsRef<[u8]>,
        certificate_pem: impl AsRef<[u8]>,
        private_key_pem: impl AsRef<[u8]>,
        server_name: impl Into<String>,
    ) -> Self {
        Self {
            address: address.into(),
            ca_pem: ca_pem.as_ref().to_vec(),
            certificate_pem: certificate_pem.as_ref().to_vec(),
            private_key_pem: private_key_pem.as_ref().to_vec(),
            server_name: server_name.into(),
            stale_after: Duration::from_secs(3),
            lost_after: Duration::from_secs(15),
        }
    }

    /// The gateway as tonic sees it: also for its other services, such as health and reflection.
    ///
    /// # Errors
    /// When the address or the certificates cannot be used.
    pub fn endpoint(&self) -> Result<Endpoint, CheckerError> {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.ca_pem))
            .identity(Identity::from_pem(
                &self.certificate_pem,
                &self.private_key_pem,
            ))
            .domain_name(&self.server_name);
        Endpoint::from_shared(self.address.clone())
            .ok()
            .filter(|endpoint| endpoint.uri().scheme_str() == Some("https"))
            .ok_or_else(|| CheckerError::Address {
                address: self.address.clone(),
            })?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .tls_config(tls)
            .map_err(|source| CheckerError::Credentials {
                address: self.address.clone(),
                source,
            })
    }
}

/// Connects, for the calls as they are in the schema.
///
/// # Errors
/// When the address or the certificates cannot be used, or there is nobody there.
pub async fn connect(config: &Config) -> Result<FreshnessClient<Channel>, CheckerError> {
    let channel = config
        .endpoint()?
        .connect()
        .await
        .map_err(|source| CheckerError::Connect {
            address: config.address.clone(),
            source,
        })?;
    Ok(FreshnessClient::new(channel))
}

// Without the key.
impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            address,
            server_name,
            stale_after,
            lost_after,
            ..
        } = self;
        f.debug_struct("Config")
            .field("address", address)
            .field("server_name", server_name)
            .field("stale_after", stale_after)
            .field("lost_after", lost_after)
            .finish_non_exhaustive()
    }
}

impl From<Status> for CheckerError {
    fn from(status: Status) -> Self {
        let said = status.message().to_owned();
        match status.code() {
            Code::PermissionDenied | Code::InvalidArgument | Code::Unimplemented => {
                Self::Refused(said)
            }
            Code::ResourceExhausted => Self::NoRoom(said),
            _ => Self::Failed(said),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(address: &str) -> Config {
        Config::new(address, "ca", "certificate", "top secret", "localhost")
    }

    #[test]
    fn an_address_without_tls_is_refused_before_anything_is_sent() {
        for address in ["http://127.0.0.1:4434", "127.0.0.1:4434", "", "https://["] {
            let refused = config(address).endpoint().unwrap_err();
            assert!(matches!(refused, CheckerError::Address { .. }), "{refused}");
        }
    }

    #[test]
    fn a_key_is_not_shown() {
        assert!(!format!("{:?}", config("https://localhost:1")).contains("secret"));
    }

    #[test]
    fn what_will_not_change_is_final() {
        let final_code = |code| matches!(Status::new(code, "").into(), CheckerError::Refused(_));
        assert!(final_code(Code::PermissionDenied));
        assert!(!final_code(Code::Unavailable));
        assert!(!final_code(Code::ResourceExhausted));
    }

    #[test]
    fn want_of_room_is_told_apart_from_an_answer_that_did_not_come() {
        let error = |code| CheckerError::from(Status::new(code, "said"));
        let no_room = error(Code::ResourceExhausted);
        assert!(matches!(no_room, CheckerError::NoRoom(_)), "{no_room}");
        for code in [Code::Unavailable, Code::Internal, Code::Unknown] {
            let failed = error(code);
            assert!(matches!(failed, CheckerError::Failed(_)), "{failed}");
        }
    }
}
