//! Which worker a packet belongs to: the connection id says it, and the kernel reads it.
//!
//! Knows the layout of our connection ids and a filter program of seven instructions. Must not know what a
//! connection is, nor how workers run.
//!
//! All workers listen on one port (`SO_REUSEPORT`). By itself the kernel picks one by the packet's addresses,
//! so a device whose NAT gives it another port would reach a worker that does not know it, and be reset. So
//! every id that a worker gives out names it, and a classic BPF program, which needs no privilege, picks the
//! socket by it. A device's first packets carry an id that the device made up: they all carry the same one,
//! so they all reach the same worker, and every later packet carries ours.

use std::{io, net::UdpSocket, os::fd::AsRawFd, time::Duration};

use quinn::{ConnectionId, ConnectionIdGenerator};
use quinn_proto::InvalidCid;
use rand::RngExt;
use ring::hmac;

/// Makes connection ids of one worker: `[owner][random × 7][proof × 4]`.
///
/// The owner's byte is the worker's number modulo the number of workers. 7 random bytes are used up by no
/// fleet: quinn's own ids have 3, and whoever had an id before knows the token that resets it. The
/// proof is a keyed hash of the rest. A packet with an id that no gateway with this key ever made is
/// dropped, and only one that a gateway did make, before a restart perhaps, is worth a stateless reset.
#[derive(Debug)]
pub(crate) struct SteeredIds {
    worker: u8,
    workers: u8,
    key: hmac::Key,
}

impl SteeredIds {
    /// For worker number `worker`, from 0, of `workers`. With the same key the ids of an earlier process are
    /// known again, whatever the number of workers was.
    pub(crate) fn new(worker: u8, workers: u8, key: hmac::Key) -> Self {
        Self {
            worker,
            workers,
            key,
        }
    }

    fn proof(&self, start: &[u8]) -> [u8; PROOF_BYTES] {
        let tag = hmac::sign(&self.key, start);
        let mut proof = [0; PROOF_BYTES];
        proof.copy_from_slice(&tag.as_ref()[..PROOF_BYTES]);
        proof
    }
}

impl ConnectionIdGenerator for SteeredIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut dice = rand::rng();
        let mut id: [u8; ID_BYTES] = [0; ID_BYTES];
        let (start, proof) = id.split_at_mut(ID_BYTES - PROOF_BYTES);
        dice.fill(start);
        let turns = (u8::MAX - self.worker) / self.workers;
        start[0] = self.worker + self.workers * dice.random_range(0..=turns);
        proof.copy_from_slice(&self.proof(start));
        ConnectionId::new(&id)
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        let (start, proof) = id
            .split_at_checked(ID_BYTES - PROOF_BYTES)
            .ok_or(InvalidCid)?;
        // Not in constant time: the proof keeps strangers' packets cheap, and guards no secret.
        if proof == self.proof(start) {
            Ok(())
        } else {
            Err(InvalidCid)
        }
    }

    fn cid_len(&self) -> usize {
        ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// One instruction of classic BPF: operation, jumps if true and if false, operand.
type Instruction = (u16, u8, u8, u32);

/// Picks the socket by the owner's byte. The packet begins at its first byte of QUIC. With a long header
/// (RFC 8999, section 5.1) the id begins at byte 6, behind the version and a length; with a short one at
/// byte 1. A packet too short for that goes to the first worker, which drops it.
const fn program(workers: u8) -> [Instruction; 7] {
    const LOAD_BYTE: u16 = 0x30; // BPF_LD | BPF_B | BPF_ABS
    const JUMP_IF_SET: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
    const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
    const MODULO: u16 = 0x94; // BPF_ALU | BPF_MOD | BPF_K
    const RETURN: u16 = 0x16; // BPF_RET | BPF_A
    const LONG_HEADER: u32 = 0x80;
    [
        (LOAD_BYTE, 0, 0, 0),
        (JUMP_IF_SET, 0, 2, LONG_HEADER),
        (LOAD_BYTE, 0, 0, 6),
        (JUMP, 0, 0, 1),
        (LOAD_BYTE, 0, 0, 1),
        (MODULO, 0, 0, workers as u32),
        (RETURN, 0, 0, 0),
    ]
}

/// Makes the kernel pick among the sockets of a port by the connection id. `socket` is any one of them; their
/// order is that in which they were bound, and `workers` their number.
///
/// # Errors
/// When the kernel refuses the program.
#[expect(
    unsafe_code,
    reason = "no crate offers this socket option behind a safe function"
)]
pub(crate) fn attach(socket: &UdpSocket, workers: u8) -> io::Result<()> {
    let mut instructions =
        program(workers).map(|(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k });
    let size = size_of::<libc::sock_fprog>();
    let size_bytes = libc::socklen_t::try_from(size).map_err(io::Error::other)?;
    let filter = libc::sock_fprog {
        len: 7,
        filter: instructions.as_mut_ptr(),
    };
    // SAFETY: the option takes a `sock_fprog` by pointer and size. It and the seven instructions that it points
    // to live until the call returns, and the kernel copies them; it writes to neither.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const filter).cast(),
            size_bytes,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

const ID_BYTES: usize = 12;
const PROOF_BYTES: usize = 4;

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, time::Duration};

    use super::*;
    use crate::port;

    fn ids(worker: u8, workers: u8, key: &[u8]) -> SteeredIds {
        SteeredIds::new(worker, workers, hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    #[test]
    fn an_id_names_its_worker_whatever_their_number() {
        for workers in 1..=u8::MAX {
            for worker in 0..workers {
                let id = ids(worker, workers, b"key").generate_cid();
                assert_eq!(id[0] % workers, worker, "{worker} of {workers}");
            }
        }
    }

    #[test]
    fn ids_are_told_from_garbage_also_by_a_later_process_with_another_number_of_workers() {
        let id = ids(1, 2, b"key").generate_cid();
        assert!(ids(0, 5, b"key").validate(&id).is_ok());
        assert!(ids(1, 2, b"another key").validate(&id).is_err());
        for at in 0..ID_BYTES {
            let mut bytes = [0; ID_BYTES];
            bytes.copy_from_slice(&id);
            bytes[at] ^= 1;
            let forged = ConnectionId::new(&bytes);
            assert!(ids(1, 2, b"key").validate(&forged).is_err(), "byte {at}");
        }
        assert!(
            ids(1, 2, b"key")
                .validate(&ConnectionId::new(&[1; 8]))
                .is_err()
        );
    }

    #[test]
    fn no_two_ids_are_alike() {
        let mut made: Vec<_> = (0..10_000)
            .map(|_| ids(0, 255, b"key").generate_cid())
            .collect();
        made.sort();
        assert!(made.windows(2).all(|pair| pair[0] != pair[1]));
    }

    /// The numbers of the sockets that got the packets, in the order of the packets.
    fn received_by(sockets: &[UdpSocket], packets: &[Vec<u8>]) -> Vec<usize> {
        let address = sockets[0].local_addr().unwrap();
        for socket in sockets {
            socket.set_nonblocking(true).unwrap();
        }
        packets
            .iter()
            .map(|packet| {
                // Each from a port of its own, as behind a NAT that forgets.
                let device = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
                device.send_to(packet, address).unwrap();
                // On the loopback a packet has arrived when it has been sent.
                sockets
                    .iter()
                    .position(|socket| socket.recv(&mut [0; 64]).is_ok())
                    .unwrap_or_else(|| panic!("nobody got {packet:?}"))
            })
            .collect()
    }

    #[test]
    fn the_kernel_gives_every_packet_to_the_worker_that_its_id_names() {
        let workers = 4;
        let listen = (Ipv4Addr::LOCALHOST, 0).into();
        let sockets = port::open(listen, workers, 1 << 16).unwrap();
        let mut packets = Vec::new();
        let mut owners = Vec::new();
        for turn in 0..100 {
            let worker = turn % workers;
            let id = ids(worker, workers, b"key").generate_cid();
            let short = [&[0x40], &id[..], &[0; 20]].concat();
            let long = [&[0xc0, 0, 0, 0, 1, 12], &id[..], &[0; 20]].concat();
            packets.extend([short, long]);
            owners.extend([usize::from(worker); 2]);
        }
        assert_eq!(received_by(&sockets, &packets), owners);
        assert_eq!(
            received_by(&sockets, &[vec![0x40]]),
            [0],
            "too short for an id"
        );
    }

    #[test]
    fn without_the_program_packets_go_astray() {
        let listen = (Ipv4Addr::LOCALHOST, 0).into();
        let sockets = port::open_unsteered(listen, 4, 1 << 16).unwrap();
        let packets: Vec<_> = (0..100)
            .map(|_| [&[0x40], &ids(2, 4, b"key").generate_cid()[..], &[0; 20][..]].concat())
            .collect();
        let strays = received_by(&sockets, &packets);
        assert!(strays.iter().any(|&socket| socket != 2));
    }

    #[test]
    fn ids_do_not_expire() {
        assert_eq!(ids(0, 1, b"key").cid_lifetime(), None::<Duration>);
    }
}
