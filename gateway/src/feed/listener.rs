//! The door for checkers: TCP, then TLS, up to bounds.
//!
//! Knows sockets, handshakes and their number. Must not know gRPC, or what a checker may ask.
//!
//! # Bounds
//!
//! Whoever has not shown a certificate takes none of the places of those who have: handshakes have places
//! of their own, [`MAX_HANDSHAKES`] in all and [`MAX_HANDSHAKES_PER_NETWORK`] for one address (for IPv6, one
//! /64), for [`HANDSHAKE_TIMEOUT`] at most, and for [`CROWDED_TIMEOUT`] when a quarter of them is taken. Whatever is beyond a bound is closed at once and counted: a
//! checker then tries again later, where one left waiting would know nothing.
//!
//! A connection that has shown its certificate stays for as long as the peer's machine is there, however slowly it
//! reads: see [`super::liveness`]. But no longer than its certificate holds.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::pki_types::CertificateDer;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    task::JoinSet,
    time::{Instant, Interval, MissedTickBehavior, Sleep, interval_at, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use super::{liveness::Liveness, tcp_info};
use crate::{
    admission::network,
    clock::system_now_ms,
    metrics::Metrics,
    revocation::CertificateId,
    tls::{Refusal, certificate_ids, expires_ms},
};

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    /// Its certificates, its own first: signed by a known authority and within their time.
    pub(crate) chain: Arc<[CertificateDer<'static>]>,
    /// The same, as revocation lists name them.
    pub(super) certificates: Arc<[CertificateId]>,
}

/// A connection that counts as long as it is open.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    liveness: Liveness,
    /// When it is looked whether the peer is there.
    looks: Interval,
    /// When the time of the peer's certificate is over, in milliseconds since 1970-01-01 UTC.
    expires_ms: u64,
    /// When it is looked whether that is so; none once it was.
    expiry: Option<Pin<Box<Sleep>>>,
    metrics: Metrics,
    _room: OwnedSemaphorePermit,
}

/// Accepts connections and their TLS.
pub(super) struct Door {
    pub(super) listener: TcpListener,
    /// Another when certificate files have changed; open connections stay as they are.
    pub(super) tls: watch::Receiver<Arc<rustls::ServerConfig>>,
    /// Places for connections that have shown their certificate.
    pub(super) room: Arc<Semaphore>,
    /// How long a peer may owe the acknowledgement of something before its machine is taken for gone.
    pub(super) patience: Duration,
    pub(super) metrics: Metrics,
}

impl Door {
    /// The connections that come in, until cancelled.
    pub(super) fn open(
        self,
        cancel: CancellationToken,
    ) -> impl Stream<Item = io::Result<Connection>> {
        let (admitted, connections) = mpsc::channel(1);
        tokio::spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = self.attend(admitted) => {}
            }
        });
        ReceiverStream::new(connections)
    }

    /// Until nobody takes the connections any more.
    async fn attend(self, admitted: mpsc::Sender<io::Result<Connection>>) {
        let mut places = Places::default();
        let mut handshakes = JoinSet::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, address)) if places.take(address.ip()) => {
                        let patience = places.patience();
                        let acceptor = TlsAcceptor::from(Arc::clone(&self.tls.borrow()));
                        let quiet = self.patience;
                        handshakes.spawn(shake_hands(acceptor, stream, address, patience, quiet));
                    }
                    Ok(_) => self.refused("overloaded"),
                    Err(error) => {
                        warn!(%error, "a checker's connection could not be accepted");
                        // Without file descriptors the next attempt would fail as well, at once.
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(shaken) = handshakes.join_next() => {
                    // A handshake that panicked keeps its place, and there is none that does.
                    let Ok((address, shaken)) = shaken else { continue };
                    places.give_back(address.ip());
                    let Some(connection) = self.admit(address, shaken) else { continue };
                    if admitted.send(Ok(connection)).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn admit(&self, address: SocketAddr, shaken: Shaken) -> Option<Connection> {
        let stream = match shaken {
            Ok(stream) => stream,
            Err(label) => {
                debug!(peer = %address, reason = label, "a checker's handshake failed");
                self.refused(label);
                return None;
            }
        };
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
            self.refused("overloaded");
            return None;
        };
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let peer = Peer {
            address,
            chain: chain.into(),
            certificates: certificate_ids(chain),
        };
        let expires_ms = expires_ms(chain);
        let between = self.patience / 2;
        let mut looks = interval_at(Instant::now() + between, between);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Some(Connection {
            stream,
            peer,
            liveness: Liveness::new(self.patience),
            looks,
            expires_ms,
            expiry: Some(Box::pin(sleep(Duration::ZERO))),
            metrics: self.metrics.clone(),
            _room: room,
        })
    }

    fn refused(&self, label: &'static str) {
        self.metrics.freshness.refused.of(label).increment(1);
    }
}

/// A handshake's outcome: the stream, or the label of why there is none.
type Shaken = Result<TlsStream<TcpStream>, &'static str>;

async fn shake_hands(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    patience: Duration,
    quiet: Duration,
) -> (SocketAddr, Shaken) {
    let shaken = match prepare(&stream, quiet) {
        Ok(()) => match timeout(patience, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(reason(&error)),
            Err(_) => Err("timed_out"),
        },
        Err(_) => Err("handshake_broken"),
    };
    (address, shaken)
}

/// `quiet` is how long nothing may come before the kernel asks whether the peer's machine is there.
fn prepare(stream: &TcpStream, quiet: Duration) -> io::Result<()> {
    // Progress and entries are small and wanted now.
    stream.set_nodelay(true)?;
    // The kernel counts whole seconds.
    let [quiet, between] = [quiet, quiet / 2].map(|time| time.max(Duration::from_secs(1)));
    let keep_alive = TcpKeepalive::new().with_time(quiet).with_interval(between);
    SockRef::from(stream).set_tcp_keepalive(&keep_alive)
}

fn reason(error: &io::Error) -> &'static str {
    error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
        .map_or("handshake_broken", |error| {
            Refusal::from_tls_error(error).as_label()
        })
}

/// Places for handshakes.
#[derive(Debug, Default)]
struct Places {
    taken: usize,
    taken_by: HashMap<IpAddr, usize>,
}

impl Places {
    /// Takes a place, if there is one for this address.
    fn take(&mut self, address: IpAddr) -> bool {
        let network = network(address);
        let taken_here = self.taken_by.get(&network).copied().unwrap_or_default();
        let is_free = self.taken < MAX_HANDSHAKES && taken_here < MAX_HANDSHAKES_PER_NETWORK;
        if is_free {
            self.taken += 1;
            self.taken_by.insert(network, taken_here + 1);
        }
        is_free
    }

    /// How long the next handshake may take: less when many are in progress.
    fn patience(&self) -> Duration {
        if self.taken <= MAX_HANDSHAKES / 4 {
            HANDSHAKE_TIMEOUT
        } else {
            CROWDED_TIMEOUT
        }
    }

    fn give_back(&mut self, address: IpAddr) {
        let network = network(address);
        self.taken = self.taken.saturating_sub(1);
        match self.taken_by.get_mut(&network) {
            Some(taken) if 1 < *taken => *taken -= 1,
            _ => drop(self.taken_by.remove(&network)),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl Connection {
    /// An error once the peer's certificate has expired. By the clock that TLS checks certificates with, which may be
    /// set, so that it is looked at it again and again.
    fn look_at_certificate(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while let Some(expiry) = &mut self.expiry {
            if expiry.as_mut().poll(cx).is_pending() {
                return Ok(());
            }
            let left_ms = self.expires_ms.saturating_sub(system_now_ms());
            if left_ms == 0 {
                debug!(peer = %self.peer.address, "the certificate of a checker that is connected has expired");
                self.metrics
                    .freshness
                    .refused
                    .of(Refusal::Expired.as_label())
                    .increment(1);
                self.expiry = None;
                break;
            }
            let left = Duration::from_millis(left_ms).min(EXPIRY_LOOK);
            expiry.as_mut().reset(Instant::now() + left);
        }
        match self.expiry {
            Some(_) => Ok(()),
            None => Err(io::Error::other(Refusal::Expired)),
        }
    }

    /// An error once the peer is gone. Looks when it is time to, and wakes the caller the next time: one that waits
    /// to write may not read meanwhile, so both come here first.
    fn look(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        self.look_at_certificate(cx)?;
        while self.looks.poll_tick(cx).is_ready() {
            let acknowledgements = tcp_info::acknowledgements(self.stream.get_ref().0)?;
            let now = Instant::now().into_std();
            if self.liveness.is_gone(now, acknowledgements) {
                debug!(peer = %self.peer.address, "a checker's machine is gone");
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.look(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.look(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.look(cx)?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.look(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A handshake takes milliseconds of somebody honest.
const MAX_HANDSHAKES: usize = 256;
/// Enough for all the checkers of an operations centre that start together behind one address.
const MAX_HANDSHAKES_PER_NETWORK: usize = 16;
/// Who has not proven itself by then is let go: its place is wanted.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Several round trips by satellite. Whoever stalls is gone five times as fast.
const CROWDED_TIMEOUT: Duration = Duration::from_secs(2);
/// How often it is looked whether a peer's certificate has expired, at least.
const EXPIRY_LOOK: Duration = Duration::from_secs(3_600);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn one_network_cannot_take_the_places_of_another() {
        let mut places = Places::default();
        let (greedy, other) = (address("192.0.2.1"), address("192.0.2.2"));
        let taken = (0..100).filter(|_| places.take(greedy)).count();
        assert_eq!(taken, MAX_HANDSHAKES_PER_NETWORK);
        assert!(places.take(other));
        places.give_back(greedy);
        assert!(places.take(greedy));
        assert!(!places.take(greedy));
    }

    #[test]
    fn an_ipv6_host_is_one_network_however_many_addresses_it_uses() {
        let mut places = Places::default();
        let hosts = (0..100).map(|host| address(&format!("2001:db8::{host:x}")));
        assert_eq!(
            hosts.filter(|&host| places.take(host)).count(),
            MAX_HANDSHAKES_PER_NETWORK
        );
        assert!(places.take(address("2001:db8:0:1::1")));
    }

    #[test]
    fn there_is_an_end_to_all_networks_together_and_nothing_is_left_when_they_are_gone() {
        let mut places = Places::default();
        let hosts: Vec<_> = (0..1_000u32)
            .map(|host| IpAddr::from(host.to_be_bytes()))
            .collect();
        let taken: Vec<_> = hosts
            .into_iter()
            .filter(|&host| places.take(host))
            .collect();
        assert_eq!(taken.len(), MAX_HANDSHAKES);
        assert_eq!(places.patience(), CROWDED_TIMEOUT);
        for host in taken {
            places.give_back(host);
        }
        assert_eq!((places.taken, places.taken_by.len()), (0, 0));
        assert_eq!(places.patience(), HANDSHAKE_TIMEOUT);
    }
}
