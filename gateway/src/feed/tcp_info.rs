//! What the kernel knows of a TCP connection.
//!
//! Knows one socket option. Must not know what follows from it.

use std::{io, mem::MaybeUninit, os::fd::AsRawFd, time::Duration};

use tokio::net::TcpStream;

use super::liveness::Acknowledgements;

/// What the other end has acknowledged, and what it should have.
///
/// # Errors
/// When the kernel does not say.
#[expect(
    unsafe_code,
    reason = "no crate offers this socket option behind a safe function"
)]
pub(super) fn acknowledgements(socket: &TcpStream) -> io::Result<Acknowledgements> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let size = size_of::<libc::tcp_info>();
    let mut size_bytes = libc::socklen_t::try_from(size).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `size_bytes` to `info`, which has that size, and both live until the call
    // returns.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut size_bytes,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it consists of whole numbers, which were zero before the kernel wrote some of them.
    let info = unsafe { info.assume_init() };
    let unanswered = info.tcpi_probes.max(info.tcpi_retransmits);
    Ok(Acknowledgements {
        are_due: UNANSWERED <= unanswered,
        last_ago: Duration::from_millis(info.tcpi_last_ack_recv.into()),
    })
}

/// Probes, or the same data, that were sent so often in vain. Of one that was not answered nothing follows: it can be
/// lost, and a kernel that has no room for more answers only twice a second.
const UNANSWERED: u8 = 3;
