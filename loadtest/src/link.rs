//! Connections to a gateway and frames on their streams.
//!
//! Knows quinn, TLS and the cutting of frames. Must not know what a frame means, or when to send one.

mod ticket;

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use bytes::{Buf, BytesMut};
use quinn::{
    ConnectionError, Endpoint, EndpointConfig, IdleTimeout, NoneTokenStore, ReadError,
    TokioRuntime, TransportConfig, VarInt, WriteError, crypto::rustls::QuicClientConfig,
};
use rustls::{
    RootCertStore,
    client::{Resumption, WebPkiServerVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer},
    sign::{CertifiedKey, SigningKey, SingleCertAndKey},
    version::TLS13,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{sync::watch, time::timeout};
use waypost_gateway::tls;
use waypost_proto::{
    frame::{FrameError, FrameReader, encode_frame},
    session::CloseCode,
    v1,
};

use self::ticket::{Ticket, Witness};

/// The way to one gateway: a few sockets and all that the connections of many devices can share.
#[derive(Debug)]
pub struct Links {
    gateway: SocketAddr,
    gateway_name: String,
    endpoints: Vec<Endpoint>,
    next_endpoint: AtomicUsize,
    provider: Arc<CryptoProvider>,
    verifier: Arc<WebPkiServerVerifier>,
    transport: Arc<TransportConfig>,
    resumes: bool,
}

/// Who a device is to the gateway. Light to clone; clones share the ticket of the last connection, if one is
/// kept.
#[derive(Clone, Debug)]
pub struct Credentials {
    config: quinn::ClientConfig,
    /// Of those that resume: notices a handshake that is not resumed.
    witness: Option<Arc<Witness>>,
}

/// How a connection began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Handshake {
    /// Both sides showed and checked certificates; the first frame left after one round trip.
    Full,
    /// A ticket took their place. The first frame left after one round trip as well: there was no room for
    /// early data in the ticket, or the gateway took none.
    Resumed,
    /// A ticket took their place, and the gateway took what was sent together with the first packet.
    EarlyData,
}

/// One connection.
#[derive(Clone, Debug)]
pub struct Link {
    connection: quinn::Connection,
    /// How it began, once that is known.
    handshake: watch::Receiver<Option<Handshake>>,
}

/// One stream of a connection: frames both ways.
#[derive(Debug)]
pub struct LinkStream {
    send: quinn::SendStream,
    recv: quinn::RecvStream,
    reader: FrameReader,
    unsent: BytesMut,
}

/// What happened on a stream.
#[derive(Debug)]
pub enum Progress {
    /// The gateway said something.
    Read(v1::GatewayFrame),
    /// Everything queued was handed to the connection.
    Written,
    /// The gateway has finished its side.
    Ended,
}

/// Why there is no connection, or none any more.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LinkError {
    /// The address or the name cannot be connected to.
    #[error("cannot connect")]
    Connect(#[from] quinn::ConnectError),
    /// The gateway did not answer, or not in time.
    #[error("no connection within {} s; is a gateway listening there?", HANDSHAKE_PATIENCE.as_secs())]
    NoHandshake,
    /// The connection ended; [`LinkError::close_code`] says why, if the gateway said it.
    #[error("the connection ended")]
    Connection(#[from] ConnectionError),
    /// The gateway did not take what was sent before the handshake was over: all of it is void, its streams
    /// too, and the connection goes on. Open new streams and send it again.
    #[error("the gateway did not take early data")]
    EarlyDataRefused,
    /// A stream ended while it was needed.
    #[error("the gateway ended a stream that was in use")]
    Stream,
    /// The gateway's bytes are no frames.
    #[error("the gateway sent what is no frame")]
    Frame(#[from] FrameError),
    /// The gateway owes an answer for too long.
    #[error("the gateway owed an answer for {0:?}")]
    NoAnswer(Duration),
}

impl Links {
    /// Opens sockets towards a gateway. `gateway_name` is what its certificate must name, `authority`
    /// what must have signed it. Must be called within a tokio runtime, which then serves the sockets.
    ///
    /// # Errors
    /// When a socket cannot be had, or the authority is no certificate.
    pub fn open(
        gateway: SocketAddr,
        gateway_name: &str,
        authority: CertificateDer<'_>,
        sockets: NonZeroUsize,
    ) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots
            .add(authority.into_owned())
            .context("the authority's certificate cannot be used")?;
        let provider = tls::provider();
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .build()
                .context("the authority's certificate cannot be used")?;
        let endpoints = (0..sockets.get())
            .map(|at| open_endpoint(gateway, at))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            gateway,
            gateway_name: gateway_name.to_owned(),
            endpoints,
            next_endpoint: AtomicUsize::new(0),
            provider,
            verifier,
            transport: Arc::new(transport(Some(KEEP_ALIVE_INTERVAL))),
            resumes: false,
        })
    }

    /// Lets the credentials made from now on keep a ticket and send early data with it: what a device does
    /// that wakes for one ping. Off otherwise, since it takes some 5 KB for each device that has connected
    /// once.
    #[must_use]
    pub fn resuming(mut self) -> Self {
        self.resumes = true;
        self
    }

    /// Sets how often a silent device says that it is still there, so that NAT devices do not forget it;
    /// `None` for never.
    #[must_use]
    pub fn keeping_alive(mut self, interval: Option<Duration>) -> Self {
        self.transport = Arc::new(transport(interval));
        self
    }

    /// Makes credentials of a certificate chain and its key.
    ///
    /// # Errors
    /// When the key is not one for the certificate.
    pub fn credentials(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> anyhow::Result<Credentials> {
        let keys = CertifiedKey::from_der(chain, key, &self.provider)
            .context("the device's certificate and key cannot be used")?;
        self.credentials_of(keys)
    }

    /// The same for one of many devices that share a key, which is read only once.
    ///
    /// # Errors
    /// When TLS 1.3 cannot be had.
    pub fn credentials_with(
        &self,
        certificate: CertificateDer<'static>,
        key: &Arc<dyn SigningKey>,
    ) -> anyhow::Result<Credentials> {
        self.credentials_of(CertifiedKey::new(vec![certificate], key.clone()))
    }

    fn credentials_of(&self, keys: CertifiedKey) -> anyhow::Result<Credentials> {
        let builder = rustls::ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])?;
        let witness = self
            .resumes
            .then(|| Arc::new(Witness::new(self.verifier.clone())));
        let builder = match witness.clone() {
            Some(witness) => builder
                .dangerous()
                .with_custom_certificate_verifier(witness),
            None => builder.with_webpki_verifier(self.verifier.clone()),
        };
        let mut tls = builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(keys)));
        tls.alpn_protocols = vec![waypost_proto::ALPN.to_vec()];
        // rustls' own cache would take tens of kilobytes for each device.
        tls.resumption = match self.resumes {
            true => Resumption::store(Arc::new(Ticket::default())),
            false => Resumption::disabled(),
        };
        tls.enable_early_data = self.resumes;
        let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
        // Nor does the gateway ask for address tokens.
        config.token_store(Arc::new(NoneTokenStore));
        config.transport_config(self.transport.clone());
        Ok(Credentials { config, witness })
    }

    /// Connects over the next of the sockets. With a ticket that allows early data it returns at once:
    /// what is sent before [`Link::established`] may be refused, and is then void with its streams.
    ///
    /// How the connection began is told rightly as long as no two connections of the same credentials are
    /// being made at a time.
    ///
    /// # Errors
    /// When the handshake fails or takes too long.
    pub async fn connect(&self, credentials: &Credentials) -> Result<Link, LinkError> {
        let at = self.next_endpoint.fetch_add(1, Ordering::Relaxed) % self.endpoints.len();
        let connecting = self.endpoints[at].connect_with(
            credentials.config.clone(),
            self.gateway,
            &self.gateway_name,
        )?;
        let Some(witness) = credentials.witness.clone() else {
            let connection = timeout(HANDSHAKE_PATIENCE, connecting)
                .await
                .map_err(|_| LinkError::NoHandshake)??;
            let (_, handshake) = watch::channel(Some(Handshake::Full));
            return Ok(Link {
                connection,
                handshake,
            });
        };
        witness.take();
        let without_early_data = move || match witness.take() {
            true => Handshake::Full,
            false => Handshake::Resumed,
        };
        match connecting.into_0rtt() {
            Ok((connection, accepted)) => {
                let (tell, handshake) = watch::channel(None);
                let watched = connection.clone();
                tokio::spawn(async move {
                    let is_accepted = accepted.await;
                    // It is told of a connection that failed as well, and there is nothing to say then.
                    if watched.close_reason().is_none() {
                        tell.send_replace(Some(match is_accepted {
                            true => Handshake::EarlyData,
                            false => without_early_data(),
                        }));
                    }
                });
                Ok(Link {
                    connection,
                    handshake,
                })
            }
            Err(connecting) => {
                let connection = timeout(HANDSHAKE_PATIENCE, connecting)
                    .await
                    .map_err(|_| LinkError::NoHandshake)??;
                let (_, handshake) = watch::channel(Some(without_early_data()));
                Ok(Link {
                    connection,
                    handshake,
                })
            }
        }
    }

    /// Gives every socket another port; connections go on over it.
    ///
    /// # Errors
    /// When the system gives no socket.
    pub fn rebind(&self) -> anyhow::Result<()> {
        for (at, endpoint) in self.endpoints.iter().enumerate() {
            endpoint
                .rebind(open_socket(self.gateway, at)?)
                .context("the new UDP socket cannot be used")?;
        }
        Ok(())
    }

    /// Waits until the ends of all closed connections are on their way.
    pub async fn wait_idle(&self) {
        for endpoint in &self.endpoints {
            endpoint.wait_idle().await;
        }
    }
}

impl Link {
    /// How the connection began; `None` while that is not settled, and for ever if it failed.
    #[must_use]
    pub fn handshake(&self) -> Option<Handshake> {
        *self.handshake.borrow()
    }

    /// Waits until the handshake is over, and says how the connection began.
    ///
    /// # Errors
    /// When the handshake failed, or took too long.
    pub async fn established(&self) -> Result<Handshake, LinkError> {
        let mut handshake = self.handshake.clone();
        let known = timeout(HANDSHAKE_PATIENCE, handshake.wait_for(Option::is_some)).await;
        match known.map_err(|_| LinkError::NoHandshake)? {
            Ok(known) => known.ok_or(LinkError::NoHandshake),
            Err(_) => Err(self.end().unwrap_or(LinkError::NoHandshake)),
        }
    }

    /// Opens a stream.
    ///
    /// # Errors
    /// When the connection has ended.
    pub async fn open(&self) -> Result<LinkStream, LinkError> {
        let (send, recv) = self.connection.open_bi().await?;
        Ok(LinkStream {
            send,
            recv,
            reader: FrameReader::new(MAX_FRAME_BYTES),
            unsent: BytesMut::new(),
        })
    }

    /// The connection itself, for who needs no frames.
    pub(crate) fn connection(&self) -> &quinn::Connection {
        &self.connection
    }

    /// Ends the connection from this side; what is on its way may get lost.
    pub fn close(&self) {
        self.connection.close(
            VarInt::from_u32(u32::from(CloseCode::NoError as u8)),
            b"done",
        );
    }

    /// Why the connection has ended, if the gateway or the network ended it.
    #[must_use]
    pub fn end(&self) -> Option<LinkError> {
        let reason = self.connection.close_reason();
        reason
            .filter(|reason| *reason != ConnectionError::LocallyClosed)
            .map(LinkError::Connection)
    }
}

impl LinkStream {
    /// Queues a frame; [`Self::progress`] writes it.
    pub fn queue(&mut self, kind: v1::device_frame::Kind) {
        encode_frame(&v1::DeviceFrame { kind: Some(kind) }, &mut self.unsent);
    }

    /// Whether everything queued was handed to the connection.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.unsent.is_empty()
    }

    /// Says that nothing more will be written, once [`Self::is_written`].
    pub fn finish(&mut self) {
        // The stream can only be gone if the connection is, which the next read will tell.
        _ = self.send.finish();
    }

    /// Writes what is queued and waits for the next thing to happen. May be cancelled at any time.
    ///
    /// # Errors
    /// When the connection or the stream has ended, or the gateway's bytes are no frames.
    pub async fn progress(&mut self) -> Result<Progress, LinkError> {
        loop {
            if let Some(frame) = self.reader.next()? {
                return Ok(Progress::Read(frame));
            }
            tokio::select! {
                // Writing first: a ping that is due should not wait for an answer to be read.
                biased;
                written = self.send.write(&self.unsent), if !self.unsent.is_empty() => {
                    self.unsent.advance(written?);
                    if self.unsent.is_empty() {
                        // An idle device holds no buffer.
                        self.unsent = BytesMut::new();
                        return Ok(Progress::Written);
                    }
                }
                read = self.recv.read_chunk(usize::MAX, true) => match read? {
                    Some(chunk) => self.reader.extend(&chunk.bytes),
                    None => return Ok(Progress::Ended),
                },
            }
        }
    }
}

impl LinkError {
    /// The code that the gateway closed with, if it did.
    #[must_use]
    pub fn close_code(&self) -> Option<CloseCode> {
        match self {
            Self::Connection(ConnectionError::ApplicationClosed(close)) => {
                CloseCode::from_number(close.error_code.into_inner())
            }
            _ => None,
        }
    }
}

impl From<WriteError> for LinkError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::ConnectionLost(lost) => Self::Connection(lost),
            WriteError::ZeroRttRejected => Self::EarlyDataRefused,
            _ => Self::Stream,
        }
    }
}

impl From<ReadError> for LinkError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::ConnectionLost(lost) => Self::Connection(lost),
            ReadError::ZeroRttRejected => Self::EarlyDataRefused,
            _ => Self::Stream,
        }
    }
}

fn open_endpoint(gateway: SocketAddr, at: usize) -> anyhow::Result<Endpoint> {
    Endpoint::new(
        EndpointConfig::default(),
        None,
        open_socket(gateway, at)?,
        Arc::new(TokioRuntime),
    )
    .context("the UDP socket cannot be used")
}

/// The socket number `at` towards a gateway. On loopback each has an address of its own, as far as they go,
/// because a real fleet would not come from a single one.
fn open_socket(gateway: SocketAddr, at: usize) -> anyhow::Result<UdpSocket> {
    // To a gateway on this machine nothing leaves the machine, and nothing else comes in.
    let any_port: SocketAddr = match gateway {
        SocketAddr::V4(_) if gateway.ip().is_loopback() => {
            let last = u8::try_from(1 + at % LOOPBACK_ADDRESSES).unwrap_or(1);
            (Ipv4Addr::new(127, 0, 0, last), 0).into()
        }
        SocketAddr::V6(_) if gateway.ip().is_loopback() => (gateway.ip(), 0).into(),
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = Socket::new(
        Domain::for_address(gateway),
        Type::DGRAM,
        Some(Protocol::UDP),
    )
    .context("no UDP socket to be had")?;
    // The kernel gives what net.core.rmem_max and wmem_max allow. With thousands of devices behind one
    // socket, the default loses their acks and measures that.
    socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket
        .bind(&any_port.into())
        .context("no UDP port to be had")?;
    Ok(UdpSocket::from(socket))
}

/// What suits a device that sends little, and a process that plays many of them.
fn transport(keep_alive_interval: Option<Duration>) -> TransportConfig {
    let mut transport = TransportConfig::default();
    // The gateway opens no streams, and its answers are small.
    transport.max_concurrent_bidi_streams(VarInt::from_u32(0));
    transport.max_concurrent_uni_streams(VarInt::from_u32(0));
    transport.stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES));
    transport.receive_window(VarInt::from_u32(2 * STREAM_WINDOW_BYTES));
    transport.send_window(SEND_WINDOW_BYTES);
    transport.datagram_receive_buffer_size(None);
    transport.crypto_buffer_size(CRYPTO_BUFFER_BYTES);
    transport.keep_alive_interval(keep_alive_interval);
    transport.max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT_MS))));
    // Its probes would be most of what an idle device sends.
    transport.mtu_discovery_config(None);
    transport
}

/// More than any gateway has to say at once: 64 ranges, and a reject for each ping of a batch.
const MAX_FRAME_BYTES: usize = 65_536;
const STREAM_WINDOW_BYTES: u32 = 16 << 10;
/// One full frame.
const SEND_WINDOW_BYTES: u64 = 64 << 10;
const CRYPTO_BUFFER_BYTES: usize = 8 << 10;
const SOCKET_BUFFER_BYTES: usize = 8 << 20;
/// From 127.0.0.1 on; Linux has them all without being told.
const LOOPBACK_ADDRESSES: usize = 250;
/// Below the 30 seconds after which NAT devices forget a UDP flow.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// Four keep-alives may get lost.
const IDLE_TIMEOUT_MS: u32 = 90_000;
/// quinn alone would wait for the idle timeout. Long enough for a storm of connections.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);
