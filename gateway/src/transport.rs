//! QUIC's settings, each with its reason.
//!
//! Knows quinn's configuration, and derives its keys. Must not know sockets or threads.
//!
//! A fleet of small senders wants small windows: each permitted stream and byte of window is memory that every
//! one of its connections may claim.

use std::{sync::Arc, time::Duration};

use quinn::{
    EndpointConfig, ServerConfig, TransportConfig, VarInt, crypto::rustls::QuicServerConfig,
};
use ring::{hkdf, hmac};

use crate::{steer::SteeredIds, worker::DevicesConfig, worker::WorkerError};

/// What a connection may hold and how long it may be silent. Public, so that a server without a gateway
/// behind it can be measured with the same.
///
/// # Errors
/// When the idle timeout does not fit QUIC.
pub fn connection_settings(config: &DevicesConfig) -> Result<TransportConfig, WorkerError> {
    let window = |bytes: u32| VarInt::from_u32(bytes);
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(config.session.streams.get()))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(window(128 << 10))
        .receive_window(window(256 << 10))
        .send_window(64 << 10)
        .datagram_receive_buffer_size(None)
        .crypto_buffer_size(8 << 10)
        .max_idle_timeout(Some(config.idle_timeout.try_into()?))
        // Keeping alive is the device's business: it knows what its battery can bear.
        .keep_alive_interval(None)
        .mtu_discovery_config(None)
        .allow_spin(false);
    Ok(transport)
}

/// What all workers serve with. `secret` outlives the process, and so do the tokens of QUIC's Retry: a device that
/// has proved its address need not do so again because the gateway was restarted in between.
///
/// # Errors
/// When the TLS settings cannot be used for QUIC, or the idle timeout does not fit it.
pub fn server_config(
    config: &DevicesConfig,
    tls: Arc<rustls::ServerConfig>,
    secret: &[u8; 32],
) -> Result<ServerConfig, WorkerError> {
    let mut server = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    let token_key = hkdf::Salt::new(hkdf::HKDF_SHA256, b"waypost quic address token");
    server
        .transport_config(Arc::new(connection_settings(config)?))
        .token_key(Arc::new(token_key.extract(secret)))
        .max_incoming(config.admission.newcomers.get())
        .incoming_buffer_size(INCOMING_BYTES)
        .incoming_buffer_size_total(MOST_INCOMING_BYTES);
    Ok(server)
}

/// What makes the endpoint of one worker the one that `secret` names.
///
/// A packet of a connection that this process does not know is answered with a stateless reset (RFC 9000,
/// section 10.3). The device believes it only if it is made with the key that the connection began with:
/// with a key of each process's own, a device would wait for its own timeout after every crash.
pub(crate) fn endpoint_config(secret: &[u8; 32], worker: u8, workers: u8) -> EndpointConfig {
    let secret = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let derived = |purpose: &[u8]| {
        let key = hmac::sign(&secret, purpose);
        hmac::Key::new(hmac::HMAC_SHA256, key.as_ref())
    };
    let mut config = EndpointConfig::new(Arc::new(derived(b"waypost quic stateless reset")));
    let id_key = derived(b"waypost quic connection id");
    config
        .cid_generator(move || Box::new(SteeredIds::new(worker, workers, id_key.clone())))
        // quinn's 20 ms would take half an hour to tell a large fleet.
        .min_reset_interval(RESET_INTERVAL);
    config
}

/// What one newcomer may send before it is looked at: its early data.
const INCOMING_BYTES: u64 = 32 << 10;
/// And all of one worker together.
const MOST_INCOMING_BYTES: u64 = 16 << 20;
/// Between two stateless resets: a quarter of the handshakes that a core can do, which is what follows.
const RESET_INTERVAL: Duration = Duration::from_millis(1);
