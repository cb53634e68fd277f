//! A device without manners: one connection, streams that carry any frame or any bytes.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;
use quinn::{ConnectionError, Endpoint, TransportConfig, VarInt, crypto::rustls::QuicClientConfig};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use waypost_gateway::{pki::Credentials, tls};
use waypost_proto::{batch, ping::Ping, session::CloseCode, v1};

use crate::{Device, World};

/// Long enough for a loaded machine; only a hang takes it.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where devices of tests are.
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A connection.
#[derive(Clone, Debug)]
pub struct Link {
    connection: quinn::Connection,
    // An endpoint that is dropped closes nothing, but must outlive its connections' last packets.
    _endpoint: Endpoint,
}

/// A connection that may be refused.
#[derive(Debug)]
pub struct Attempt(Result<Link, ConnectionError>);

impl Attempt {
    /// Whether a Hello is answered. With TLS 1.3 a client may believe that it is connected before the
    /// gateway has looked at its certificate.
    pub async fn is_served(self) -> bool {
        let Ok(link) = self.0 else { return false };
        let Ok((mut send, mut recv)) = link.connection.open_bi().await else {
            return false;
        };
        let mut bytes = BytesMut::new();
        let hello = crate::hello(waypost_proto::session::Lane::Live, 0);
        waypost_proto::frame::encode_frame(
            &v1::DeviceFrame {
                kind: Some(v1::device_frame::Kind::Hello(hello)),
            },
            &mut bytes,
        );
        if send.write_all(&bytes).await.is_err() {
            return false;
        }
        let answer = tokio::time::timeout(PATIENCE, recv.read_chunk(1, true)).await;
        matches!(answer.expect("a refusal is told"), Ok(Some(_)))
    }
}

/// Connects with a certificate or without one, from an address of its own on loopback.
pub(crate) async fn attempt(
    gateway: SocketAddr,
    ca_pem: &str,
    credentials: Option<&Credentials>,
    transport: TransportConfig,
) -> Attempt {
    let config = client_config(ca_pem, credentials, transport);
    attempt_from(LOOPBACK, gateway, config).await
}

pub(crate) async fn attempt_from(
    source: IpAddr,
    gateway: SocketAddr,
    config: quinn::ClientConfig,
) -> Attempt {
    let endpoint = Endpoint::client(SocketAddr::from((source, 0))).unwrap();
    let connecting = endpoint.connect_with(config, gateway, "localhost").unwrap();
    let connected = tokio::time::timeout(PATIENCE, connecting)
        .await
        .expect("a handshake ends");
    Attempt(connected.map(|connection| Link {
        connection,
        _endpoint: endpoint,
    }))
}

/// What a client with a certificate, or without one, tells quinn.
pub fn client_config(
    ca_pem: &str,
    credentials: Option<&Credentials>,
    transport: TransportConfig,
) -> quinn::ClientConfig {
    let shown = credentials.map(|credentials| {
        (
            vec![credentials.certificate_der()],
            credentials.private_key_der(),
        )
    });
    client_config_with(ca_pem, shown, waypost_proto::ALPN, transport)
}

/// The same for any chain and its key, and any protocol.
pub(crate) fn client_config_with(
    ca_pem: &str,
    shown: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
    alpn: &[u8],
    transport: TransportConfig,
) -> quinn::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(ca_pem.as_bytes()).unwrap())
        .unwrap();
    let builder = rustls::ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match shown {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    // Used only by whoever has a ticket and asks for it.
    config.enable_early_data = true;
    let mut config =
        quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).unwrap()));
    config.transport_config(Arc::new(transport));
    config
}

/// A device that keeps the ticket of one connection for the next.
#[derive(Debug)]
pub struct Returning {
    endpoint: Endpoint,
    config: quinn::ClientConfig,
}

impl Returning {
    /// A device that has no ticket yet.
    pub fn new(world: &World, device: &Device) -> Self {
        let ca_pem = world.authority.certificate_pem();
        Self {
            endpoint: Endpoint::client(SocketAddr::from((LOOPBACK, 0))).unwrap(),
            config: client_config(ca_pem, Some(&device.credentials), ordinary()),
        }
    }

    /// Connects and says nothing before the handshake is over.
    pub async fn connect(&self, gateway: SocketAddr) -> Link {
        let connecting = self.begin(gateway);
        let connected = tokio::time::timeout(PATIENCE, connecting).await;
        self.link(connected.expect("a handshake ends").unwrap())
    }

    /// Begins a connection with its ticket. What is sent now is early data; whether that was taken is known
    /// when the handshake is over.
    pub fn connect_early(&self, gateway: SocketAddr) -> (Link, quinn::ZeroRttAccepted) {
        let begun = self.begin(gateway).into_0rtt();
        let (connection, accepted) = begun.expect("the last connection left a ticket");
        (self.link(connection), accepted)
    }

    fn begin(&self, gateway: SocketAddr) -> quinn::Connecting {
        self.endpoint
            .connect_with(self.config.clone(), gateway, "localhost")
            .unwrap()
    }

    fn link(&self, connection: quinn::Connection) -> Link {
        Link {
            connection,
            _endpoint: self.endpoint.clone(),
        }
    }
}

impl Attempt {
    /// Whether the handshake went well, as far as this side knows.
    pub fn is_connected(&self) -> bool {
        self.0.is_ok()
    }

    pub fn unwrap(self) -> Link {
        self.0.unwrap()
    }

    /// The connection, if there is one.
    pub(crate) fn established(self) -> Option<Link> {
        self.0.ok()
    }
}

impl Link {
    pub(crate) fn connection(&self) -> &quinn::Connection {
        &self.connection
    }

    /// The certificate by which the gateway has proven itself, DER.
    pub fn gateway_certificate(&self) -> Vec<u8> {
        let chain = self.connection.peer_identity().unwrap();
        let chain = chain.downcast::<Vec<CertificateDer<'static>>>().unwrap();
        chain[0].to_vec()
    }

    /// Opens a stream and says Hello on it.
    pub async fn open(&self, hello: v1::Hello) -> Stream {
        let mut stream = self.open_raw().await;
        stream.send(v1::device_frame::Kind::Hello(hello)).await;
        stream
    }

    /// Opens a stream and says nothing.
    pub async fn open_raw(&self) -> Stream {
        self.try_open_raw().await.unwrap()
    }

    /// The same, or the end of the connection.
    pub async fn try_open_raw(&self) -> Result<Stream, ConnectionError> {
        let (send, recv) = self.connection.open_bi().await?;
        Ok(Stream {
            link: self.clone(),
            send,
            recv,
            unread: BytesMut::new(),
        })
    }

    /// Reads a stream that the gateway opens to its end: its first frame, and what is behind it.
    pub async fn read_uni(&self) -> (v1::GatewayFrame, Vec<u8>) {
        let mut stream = tokio::time::timeout(PATIENCE, self.connection.accept_uni())
            .await
            .expect("the gateway opens a stream")
            .unwrap();
        let bytes = tokio::time::timeout(PATIENCE, stream.read_to_end(1 << 24)).await;
        let mut unread = BytesMut::from(&*bytes.expect("it ends").unwrap());
        let frame = take_frame(&mut unread).expect("a frame first");
        (frame, unread.to_vec())
    }

    /// Ends the connection from this side.
    pub fn close(&self) {
        let code = u32::from(CloseCode::NoError as u8);
        self.connection.close(code.into(), b"done");
    }

    pub fn is_closed(&self) -> bool {
        self.connection.close_reason().is_some()
    }

    /// Waits for the end of the connection, whatever ends it.
    pub async fn ended(&self) -> ConnectionError {
        tokio::time::timeout(PATIENCE, self.connection.closed())
            .await
            .expect("the connection ends")
    }

    /// Waits for the end of the connection; the gateway's code, or `None` if it gave none.
    pub async fn closed(&self) -> Option<CloseCode> {
        match self.ended().await {
            ConnectionError::ApplicationClosed(close) => {
                CloseCode::from_number(close.error_code.into_inner())
            }
            _ => None,
        }
    }
}

/// One stream of a connection.
#[derive(Debug)]
pub struct Stream {
    link: Link,
    send: quinn::SendStream,
    recv: quinn::RecvStream,
    unread: BytesMut,
}

impl Stream {
    pub fn link(&self) -> &Link {
        &self.link
    }

    pub async fn send(&mut self, kind: v1::device_frame::Kind) {
        let mut bytes = BytesMut::new();
        waypost_proto::frame::encode_frame(&v1::DeviceFrame { kind: Some(kind) }, &mut bytes);
        self.send_raw(&bytes).await;
    }

    pub async fn send_pings(&mut self, epoch: u32, pings: &[Ping]) {
        self.send(v1::device_frame::Kind::Batch(batch::encode(epoch, pings)))
            .await;
    }

    /// Sends a batch and says whether it could: not when the connection has ended, or is not taken as early data.
    pub async fn try_send_pings(&mut self, epoch: u32, pings: &[Ping]) -> bool {
        self.try_send(v1::device_frame::Kind::Batch(batch::encode(epoch, pings)))
            .await
    }

    /// The same of any frame.
    pub async fn try_send(&mut self, kind: v1::device_frame::Kind) -> bool {
        let mut bytes = BytesMut::new();
        let frame = v1::DeviceFrame { kind: Some(kind) };
        waypost_proto::frame::encode_frame(&frame, &mut bytes);
        self.send.write_all(&bytes).await.is_ok()
    }

    pub async fn send_raw(&mut self, bytes: &[u8]) {
        self.send.write_all(bytes).await.unwrap();
    }

    /// Writes, and does not mind if the connection is closed meanwhile.
    pub async fn send_raw_unless_closed(&mut self, bytes: &[u8]) {
        drop(self.send.write_all(bytes).await);
    }

    /// Writes until all is written or the gateway has closed the connection.
    pub async fn send_raw_until_closed(&mut self, bytes: &[u8]) {
        let written = tokio::time::timeout(PATIENCE, self.send.write_all(bytes)).await;
        written
            .expect("the gateway ends it")
            .expect_err("the gateway closes before all is written");
    }

    pub fn finish(&mut self) {
        self.send.finish().unwrap();
    }

    /// Takes back what was written and wants no answer, as a device does that gives up.
    pub fn abandon(mut self) {
        // Either fails only when the connection is gone.
        drop(self.send.reset(VarInt::from_u32(0)));
        drop(self.recv.stop(VarInt::from_u32(0)));
    }

    /// Writes, and keeps the stream as it is until the connection ends.
    pub async fn leak_after_writing(mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.send_raw(bytes).await;
        }
        tokio::spawn(async move {
            self.link.connection.closed().await;
            drop(self);
        });
    }

    /// The next frame; `None` when the gateway has finished its side or closed.
    pub async fn next(&mut self) -> Option<v1::gateway_frame::Kind> {
        loop {
            if let Some(frame) = take_frame(&mut self.unread) {
                return frame.kind;
            }
            let read = tokio::time::timeout(PATIENCE, self.recv.read_chunk(usize::MAX, true)).await;
            match read.expect("the gateway answers or closes") {
                Ok(Some(chunk)) => self.unread.extend_from_slice(&chunk.bytes),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    pub async fn welcome(&mut self) -> v1::Welcome {
        match self.next().await {
            Some(v1::gateway_frame::Kind::Welcome(welcome)) => welcome,
            other => panic!(
                "no Welcome but {other:?}; closed with {:?}",
                self.link.connection.close_reason()
            ),
        }
    }

    pub async fn ack(&mut self) -> v1::Ack {
        let ack = self.next_ack().await;
        ack.unwrap_or_else(|| {
            panic!(
                "no Ack; closed with {:?}",
                self.link.connection.close_reason()
            )
        })
    }

    /// Asks for the next certificate; what comes of it, and the ack that says that the device was heard.
    pub async fn renew(&mut self, certificate_request: Bytes) -> (v1::EnrollResponse, v1::Ack) {
        let renew = v1::Renew {
            certificate_request,
        };
        self.send(v1::device_frame::Kind::Renew(renew)).await;
        match self.next().await {
            Some(v1::gateway_frame::Kind::Renewed(response)) => (response, self.ack().await),
            other => panic!("no answer to a renewal but {other:?}"),
        }
    }

    /// Asks for what the holder wants; what comes of it.
    pub async fn control(
        &mut self,
        id: u64,
        action: v1::control::Action,
    ) -> v1::control_result::Outcome {
        self.asked(id, action).await.outcome()
    }

    /// The same, with all that is said of it.
    pub async fn asked(&mut self, id: u64, action: v1::control::Action) -> v1::ControlResult {
        let action = Some(action);
        self.send(v1::device_frame::Kind::Control(v1::Control { id, action }))
            .await;
        match self.next().await {
            Some(v1::gateway_frame::Kind::ControlResult(result)) if result.id == id => result,
            other => panic!("no answer to {id} but {other:?}"),
        }
    }

    pub async fn next_ack(&mut self) -> Option<v1::Ack> {
        match self.next().await? {
            v1::gateway_frame::Kind::Ack(ack) => Some(ack),
            other => panic!("no Ack but {other:?}"),
        }
    }
}

pub(crate) fn take_frame(unread: &mut BytesMut) -> Option<v1::GatewayFrame> {
    let mut ahead = unread.as_ref();
    let length = prost::decode_length_delimiter(&mut ahead).ok()?;
    if ahead.len() < length {
        return None;
    }
    let prefix = unread.len() - ahead.len();
    unread.advance(prefix);
    Some(v1::GatewayFrame::decode(unread.split_to(length)).unwrap())
}

/// What an ordinary device would use.
pub fn ordinary() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport.keep_alive_interval(Some(Duration::from_secs(5)));
    transport
}

/// A device whose receive window is so small that unread answers soon stop the gateway's writes.
pub fn not_reading() -> TransportConfig {
    let mut transport = ordinary();
    transport.stream_receive_window(VarInt::from_u32(256));
    transport
}
