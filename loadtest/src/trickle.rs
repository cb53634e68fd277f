//! The line of a checker that reads slowly: a TCP relay that can be told to read a byte a second.
//!
//! Knows bytes and how fast they are handed on. Must not know what they say.
//!
//! The gateway cannot tell it from a checker whose program hangs or whose line is bad: its kernel acknowledges what
//! comes until its small buffer is full, and then has no room for more.
//!
//! # Bounds
//!
//! A connection holds a buffer of 64 KiB each way, and the kernel's. A trickle that is dropped cuts its connections.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{
        TcpListener, TcpSocket, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinSet,
    time::sleep,
};
use tokio_util::task::AbortOnDropHandle;

/// A running relay. Dropping it stops it.
#[derive(Debug)]
pub(crate) struct Trickle {
    address: SocketAddr,
    is_slow: watch::Sender<bool>,
    connections: Arc<AtomicU64>,
    _relay: AbortOnDropHandle<()>,
}

impl Trickle {
    /// Begins to relay to this service, at full speed. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the system gives no socket.
    pub(crate) async fn start(service: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let is_slow = watch::Sender::new(false);
        let connections = Arc::new(AtomicU64::default());
        let relay = relay(listener, service, is_slow.subscribe(), connections.clone());
        Ok(Self {
            address,
            is_slow,
            connections,
            _relay: AbortOnDropHandle::new(tokio::spawn(relay)),
        })
    }

    /// Where the checker connects.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on a byte a second is read of what the service says.
    pub(crate) fn slow_down(&self) {
        self.is_slow.send_replace(true);
    }

    /// Everything is read at once again.
    pub(crate) fn let_go(&self) {
        self.is_slow.send_replace(false);
    }

    /// How many connections have been made: more than one when the service has cut one off.
    pub(crate) fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }
}

/// Until the listener breaks, and then every checker notices.
async fn relay(
    listener: TcpListener,
    service: SocketAddr,
    is_slow: watch::Receiver<bool>,
    connections: Arc<AtomicU64>,
) {
    let mut lines = JoinSet::new();
    while let Ok((checker, _)) = listener.accept().await {
        connections.fetch_add(1, Ordering::Relaxed);
        let is_slow = is_slow.clone();
        // How a line ends is seen at both of its ends.
        lines.spawn(async move { connect(checker, service, is_slow).await.ok() });
        while lines.try_join_next().is_some() {}
    }
}

async fn connect(
    checker: TcpStream,
    service: SocketAddr,
    is_slow: watch::Receiver<bool>,
) -> io::Result<()> {
    let socket = match service {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    // Asked for before it connects, because the window is agreed upon then.
    socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
    let service = socket.connect(service).await?;
    service.set_nodelay(true)?;
    checker.set_nodelay(true)?;
    let (mut from_checker, to_checker) = checker.into_split();
    let (from_service, mut to_service) = service.into_split();
    tokio::select! {
        asked = copy(&mut from_checker, &mut to_service) => asked.map(drop),
        told = hand_on(from_service, to_checker, is_slow) => told,
    }
}

/// Until one end closes, or this trickle is dropped.
async fn hand_on(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut is_slow: watch::Receiver<bool>,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let room = if *is_slow.borrow_and_update() {
            tokio::select! {
                biased;
                Ok(()) = is_slow.changed() => continue,
                () = sleep(BETWEEN_BYTES) => {}
            }
            &mut buffer[..1]
        } else {
            &mut buffer[..]
        };
        let count = tokio::select! {
            biased;
            Ok(()) = is_slow.changed() => continue,
            count = from.read(room) => count?,
        };
        if count == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..count]).await?;
    }
}

const BETWEEN_BYTES: Duration = Duration::from_secs(1);
const BUFFER_BYTES: usize = 64 << 10;
/// So little that the gateway feels at once that nobody reads.
const RECEIVE_BUFFER_BYTES: u32 = 8 << 10;

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn a_slow_line_reads_a_byte_a_second_and_nothing_is_lost_when_it_is_let_go() {
        let service = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let trickle = Trickle::start(service.local_addr().unwrap()).await.unwrap();
        let mut checker = TcpStream::connect(trickle.address()).await.unwrap();
        let (mut gateway, _) = service.accept().await.unwrap();

        gateway.write_all(b"free").await.unwrap();
        let mut read = [0; 4];
        checker.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"free");

        trickle.slow_down();
        let begun = Instant::now();
        gateway.write_all(b"slow").await.unwrap();
        checker.read_exact(&mut read[..2]).await.unwrap();
        assert!(BETWEEN_BYTES <= begun.elapsed(), "two bytes at once");
        trickle.let_go();
        checker.read_exact(&mut read[2..]).await.unwrap();
        assert_eq!(&read, b"slow");
        assert_eq!(trickle.connections(), 1);

        drop(gateway);
        assert_eq!(
            checker.read(&mut read).await.unwrap(),
            0,
            "the end is handed on"
        );
    }
}
