//! A listener with a bound on how many connections there are and on how long each lives.
//!
//! Axum has neither, and without them whoever reaches the admin port could take the file descriptors
//! that the store needs. Knows TCP. Must not know HTTP.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep},
};

/// Accepts no more than [`MAX_CONNECTIONS`] at a time; further ones wait in the system's backlog.
pub(super) struct BoundedListener {
    listener: TcpListener,
    free: Arc<Semaphore>,
    lifetime: Duration,
}

impl BoundedListener {
    pub(super) fn new(listener: TcpListener) -> Self {
        let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        Self {
            listener,
            free,
            lifetime: MAX_LIFETIME,
        }
    }
}

impl axum::serve::Listener for BoundedListener {
    type Io = BoundedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (BoundedStream, SocketAddr) {
        let slot = Arc::clone(&self.free)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let (stream, peer) = axum::serve::Listener::accept(&mut self.listener).await;
        (
            BoundedStream {
                stream,
                end: Box::pin(sleep(self.lifetime)),
                _slot: slot,
            },
            peer,
        )
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that fails once its time is up, and holds its place among the others until dropped.
pub(super) struct BoundedStream {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    _slot: OwnedSemaphorePermit,
}

impl BoundedStream {
    /// Fails when the time is up; wakes the task when that happens while it waits.
    fn check_time(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.end.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for BoundedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check_time(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for BoundedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check_time(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_time(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Some Prometheus servers, a supervisor's probes and a few browsers.
const MAX_CONNECTIONS: usize = 32;
/// A page takes milliseconds. Prometheus keeps its connection between scrapes; it opens a new one
/// without losing a scrape when the old one is gone.
const MAX_LIFETIME: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use axum::serve::Listener as _;
    use tokio::{io::AsyncReadExt, time::timeout};

    use super::*;

    async fn listen() -> (BoundedListener, SocketAddr) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        (BoundedListener::new(listener), addr)
    }

    #[tokio::test]
    async fn one_connection_too_many_waits_for_a_free_place() {
        let (mut listener, addr) = listen().await;
        let mut clients = Vec::new();
        let mut served = Vec::new();
        for _ in 0..=MAX_CONNECTIONS {
            clients.push(TcpStream::connect(addr).await.unwrap());
        }
        for _ in 0..MAX_CONNECTIONS {
            served.push(listener.accept().await);
        }
        assert!(timeout(Duration::ZERO, listener.accept()).await.is_err());
        served.pop();
        listener.accept().await;
        drop((clients, served));
    }

    #[tokio::test]
    async fn a_stalled_connection_ends_when_its_time_is_up() {
        let (mut listener, addr) = listen().await;
        listener.lifetime = Duration::ZERO;
        let _client = TcpStream::connect(addr).await.unwrap();
        let (mut stream, _) = listener.accept().await;
        let error = stream.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
