//! Accepting TCP connections, up to a bound.
//!
//! Knows sockets and their number. Must not know TLS or gRPC.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

/// How long a connection is idle before the kernel asks whether the peer's machine still exists.
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);

/// A connection that counts as long as it is open.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    _room: OwnedSemaphorePermit,
}

/// The connections of a listener. When `room` is used up, a new one is closed at once and `refused` is
/// called: a checker then tries again later, where one left waiting would know nothing.
pub(super) fn connections(
    listener: TcpListener,
    room: Arc<Semaphore>,
    refused: impl Fn(),
) -> impl Stream<Item = io::Result<Connection>> {
    TcpIncoming::from(listener)
        // Progress and entries are small and wanted now.
        .with_nodelay(Some(true))
        .with_keepalive(Some(TCP_KEEPALIVE))
        .filter_map(move |accepted| match accepted {
            Ok(stream) => match Arc::clone(&room).try_acquire_owned() {
                Ok(room) => Some(Ok(Connection {
                    stream,
                    _room: room,
                })),
                Err(_) => {
                    refused();
                    None
                }
            },
            Err(error) => Some(Err(error)),
        })
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
