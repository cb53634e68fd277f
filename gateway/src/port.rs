//! The UDP port that all workers share: one socket each, and no room for another process.
//!
//! Knows sockets and their options. Must not know QUIC, nor what the sockets are for.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
};

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tracing::warn;

use crate::steer;

/// Opens a socket for each of `workers` workers, in their order, and steers packets by connection id. Each asks
/// the kernel for `buffer_bytes` in either direction; if it grants less, the log names the setting to raise.
///
/// # Errors
/// When the address is taken, by whatever process, or not ours; or when the kernel refuses an option.
pub(crate) fn open(
    listen: SocketAddr,
    workers: u8,
    buffer_bytes: usize,
) -> io::Result<Vec<UdpSocket>> {
    let sockets = open_unsteered(listen, workers, buffer_bytes)?;
    if let [first, _, ..] = &sockets[..] {
        steer::attach(first, workers)?;
    }
    Ok(sockets)
}

/// The first socket is bound as if it were the only one, and shares its port only then. So it cannot join the
/// port of another process: the kernel would split the devices between the two. Nor can a process join that
/// binds like this one.
pub(crate) fn open_unsteered(
    listen: SocketAddr,
    workers: u8,
    buffer_bytes: usize,
) -> io::Result<Vec<UdpSocket>> {
    let new = || {
        Socket::new(
            Domain::for_address(listen),
            Type::DGRAM,
            Some(Protocol::UDP),
        )
    };
    let first = new()?;
    first.bind(&listen.into())?;
    grow_buffers(&first, buffer_bytes);
    let mut sockets = vec![UdpSocket::from(first)];
    if 1 < workers {
        // If the port was the system's to choose, it has chosen.
        let shared = sockets[0].local_addr()?;
        SockRef::from(&sockets[0]).set_reuse_port(true)?;
        for _ in 1..workers {
            let next = new()?;
            next.set_reuse_port(true)?;
            next.bind(&shared.into())?;
            set_buffers(&next, buffer_bytes);
            sockets.push(UdpSocket::from(next));
        }
    }
    Ok(sockets)
}

/// Asks for buffers, and says so once if they are smaller than wished.
fn grow_buffers(socket: &Socket, wanted_bytes: usize) {
    for (name, granted_bytes) in set_buffers(socket, wanted_bytes) {
        if granted_bytes < wanted_bytes {
            warn!(
                wanted_bytes,
                granted_bytes,
                "the kernel grants a smaller socket buffer, and bursts may lose packets; raise it with \
                 `sysctl -w {name}={wanted_bytes}`, or lower devices.socket_buffer_bytes"
            );
        }
    }
}

/// The settings that limit the buffers, each with what was granted.
fn set_buffers(socket: &Socket, wanted_bytes: usize) -> [(&'static str, usize); 2] {
    // Linux reserves as much again for its own bookkeeping, and reports the sum.
    let granted = |result: io::Result<()>, reported: io::Result<usize>| {
        result.and(reported).map_or(0, |bytes| bytes / 2)
    };
    [
        (
            "net.core.rmem_max",
            granted(
                socket.set_recv_buffer_size(wanted_bytes),
                socket.recv_buffer_size(),
            ),
        ),
        (
            "net.core.wmem_max",
            granted(
                socket.set_send_buffer_size(wanted_bytes),
                socket.send_buffer_size(),
            ),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const ANY: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

    #[test]
    fn all_sockets_are_on_one_port() {
        let sockets = open(ANY.into(), 5, 1 << 16).unwrap();
        let addresses: Vec<_> = sockets
            .iter()
            .map(|socket| socket.local_addr().unwrap())
            .collect();
        assert_eq!(addresses, [addresses[0]; 5]);
    }

    #[test]
    fn a_second_gateway_cannot_have_the_port_however_many_workers_either_has() {
        for (one, other) in [(1, 1), (1, 3), (3, 1), (3, 3)] {
            let sockets = open(ANY.into(), one, 1 << 16).unwrap();
            let taken = sockets[0].local_addr().unwrap();
            let error = open(taken, other, 1 << 16).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{one} and {other}");
            drop(sockets);
            open(taken, other, 1 << 16).unwrap();
        }
    }
}
