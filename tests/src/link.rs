//! A device without manners: one connection, streams that carry any frame or any bytes.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Buf, BytesMut};
use prost::Message;
use quinn::{ConnectionError, Endpoint, TransportConfig, VarInt, crypto::rustls::QuicClientConfig};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use waypost_gateway::{pki::Credentials, tls};
use waypost_proto::{batch, ping::Ping, session::CloseCode, v1};

/// Long enough for a loaded machine; only a hang takes it.
const PATIENCE: Duration = Duration::from_secs(20);

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

/// Connects with a certificate or without one.
pub(crate) async fn attempt(
    gateway: SocketAddr,
    ca_pem: &str,
    credentials: Option<&Credentials>,
    transport: TransportConfig,
) -> Attempt {
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(ca_pem.as_bytes()).unwrap())
        .unwrap();
    let builder = rustls::ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match credentials {
        Some(credentials) => builder
            .with_client_auth_cert(
                vec![credentials.certificate_der()],
                credentials.private_key_der(),
            )
            .unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![waypost_proto::ALPN.to_vec()];
    let mut config =
        quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).unwrap()));
    config.transport_config(Arc::new(transport));
    let endpoint = Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let connecting = endpoint.connect_with(config, gateway, "localhost").unwrap();
    let connected = tokio::time::timeout(PATIENCE, connecting)
        .await
        .expect("a handshake ends");
    Attempt(connected.map(|connection| Link {
        connection,
        _endpoint: endpoint,
    }))
}

impl Attempt {
    pub(crate) fn unwrap(self) -> Link {
        self.0.unwrap()
    }
}

impl Link {
    /// Opens a stream and says Hello on it.
    pub async fn open(&self, hello: v1::Hello) -> Stream {
        let mut stream = self.open_raw().await;
        stream.send(v1::device_frame::Kind::Hello(hello)).await;
        stream
    }

    /// Opens a stream and says nothing.
    pub async fn open_raw(&self) -> Stream {
        let (send, recv) = self.connection.open_bi().await.unwrap();
        Stream {
            link: self.clone(),
            send,
            recv,
            unread: BytesMut::new(),
        }
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

    pub async fn send_raw(&mut self, bytes: &[u8]) {
        self.send.write_all(bytes).await.unwrap();
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

    pub async fn next_ack(&mut self) -> Option<v1::Ack> {
        match self.next().await? {
            v1::gateway_frame::Kind::Ack(ack) => Some(ack),
            other => panic!("no Ack but {other:?}"),
        }
    }
}

fn take_frame(unread: &mut BytesMut) -> Option<v1::GatewayFrame> {
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
pub(crate) fn ordinary() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport.keep_alive_interval(Some(Duration::from_secs(5)));
    transport
}

/// A device whose receive window is so small that unread answers soon stop the gateway's writes.
pub(crate) fn not_reading() -> TransportConfig {
    let mut transport = ordinary();
    transport.stream_receive_window(VarInt::from_u32(256));
    transport
}
