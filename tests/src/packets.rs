//! Datagrams as somebody on the way sees them: recorded, and sent again by whoever likes to.
//!
//! Knows UDP, and of QUIC no more than where a packet's form and connection id are. Must not know what is in
//! a packet.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use quinn::Endpoint;
use tokio::{net::UdpSocket, task::JoinHandle};

/// The first packets of as many handshakes, none of which will ever go on. Each is valid, and costs who
/// answers it a signature.
pub async fn first_packets(number: usize, config: &quinn::ClientConfig) -> Vec<Vec<u8>> {
    let nobody = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = nobody.local_addr().unwrap();
    let client = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let mut packets = Vec::with_capacity(number);
    let mut known = HashSet::new();
    let mut buffer = [0; 2_048];
    while packets.len() < number {
        let attempt = client
            .connect_with(config.clone(), address, "localhost")
            .unwrap();
        let is_new = loop {
            let (length, _) = nobody.recv_from(&mut buffer).await.unwrap();
            // What is sent again for an earlier one is not waited for.
            if known.insert(connection_id(&buffer[..length]).to_vec()) {
                break length;
            }
        };
        packets.push(buffer[..is_new].to_vec());
        drop(attempt);
    }
    packets
}

/// The id that a long header is sent to.
fn connection_id(packet: &[u8]) -> &[u8] {
    let length = usize::from(packet[5]);
    &packet[6..6 + length]
}

/// A packet that looks like the first of a handshake and holds nothing but noise.
pub fn noise_like_a_first_packet(noise: u64) -> Vec<u8> {
    let mut packet = vec![0; 1_200];
    // Zero would stay zero.
    let mut dice = noise.max(1);
    for byte in &mut packet {
        // xorshift: any noise will do.
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        *byte = dice.to_be_bytes()[0];
    }
    // Long header, Initial, version 1, an id of 8 bytes, none of the sender's, no token, all the rest is one
    // packet.
    packet[0] = 0xc0 | (packet[0] & 0x0f);
    packet[1..6].copy_from_slice(&[0, 0, 0, 1, 8]);
    packet[14..18].copy_from_slice(&[0, 0, 0x44, 0x9e]);
    packet
}

/// Somebody on the way between one device and its gateway, who writes down what the device sends.
#[derive(Debug)]
pub struct Eavesdropper {
    address: SocketAddr,
    recorded: Arc<Mutex<Vec<Vec<u8>>>>,
    task: JoinHandle<()>,
}

impl Eavesdropper {
    pub async fn start(gateway: SocketAddr) -> Self {
        let near = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let far = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        far.connect(gateway).await.unwrap();
        let address = near.local_addr().unwrap();
        let recorded = Arc::new(Mutex::new(Vec::new()));
        let written_down = Arc::clone(&recorded);
        let task = tokio::spawn(async move {
            let (mut from_device, mut from_gateway) = ([0; 65_536], [0; 65_536]);
            let mut device = None;
            loop {
                tokio::select! {
                    Ok((length, sender)) = near.recv_from(&mut from_device) => {
                        device = Some(sender);
                        let packet = &from_device[..length];
                        written_down.lock().push(packet.to_vec());
                        drop(far.send(packet).await);
                    }
                    Ok(length) = far.recv(&mut from_gateway) => {
                        if let Some(device) = device {
                            drop(near.send_to(&from_gateway[..length], device).await);
                        }
                    }
                }
            }
        });
        Self {
            address,
            recorded,
            task,
        }
    }

    /// Where the device connects instead.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What the device has sent so far, datagram by datagram.
    pub fn recorded(&self) -> Vec<Vec<u8>> {
        self.recorded.lock().clone()
    }
}

impl Drop for Eavesdropper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Sends datagrams from an address of its own on loopback, one every `pause`, so that no buffer overflows.
pub async fn send_from(
    source: IpAddr,
    gateway: SocketAddr,
    packets: impl IntoIterator<Item = impl AsRef<[u8]>>,
    pause: Duration,
) {
    let socket = UdpSocket::bind((source, 0)).await.unwrap();
    for packet in packets {
        // A refusal by ICMP of an earlier one is told here; the gateway may be restarting.
        drop(socket.send_to(packet.as_ref(), gateway).await);
        tokio::time::sleep(pause).await;
    }
}
