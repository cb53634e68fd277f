//! A hostile crowd: devices with certificates that do all they can to be in the way, and senders of packets
//! who have none.
//!
//! Knows abuses, one small function each; a round of it is done again and again until the crowd is sent
//! away. Must not know what a gateway should make of it. Loopback only.
//!
//! Real attackers bring their own processors. These run on one thread with the lowest priority, so that what
//! the good devices of a test suffer is the gateway's doing, and not that of a neighbour on the same core.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::BytesMut;
use parking_lot::Mutex;
use quinn::{Connection, Endpoint, RecvStream, SendStream, VarInt};
use rcgen::KeyPair;
use rustix::{process::setpriority_process, thread::gettid};
use tokio::{net::UdpSocket, runtime::Runtime, time};
use tokio_util::sync::CancellationToken;
use waypost_gateway::pki::Authority;
use waypost_proto::{
    batch,
    frame::{FrameReader, encode_frame},
    id::{DeviceId, UserId},
    session::Lane,
    v1::{self, device_frame::Kind},
};

use crate::{hello, link, packets, ping};

/// All abuses at work. Sent away when it is dropped.
#[derive(Debug)]
pub struct Crowd {
    runtime: Option<Runtime>,
    gateway: SocketAddr,
    ca_pem: String,
    endpoints: Mutex<Vec<Endpoint>>,
    stop: CancellationToken,
    rounds: Rounds,
}

/// How often each abuse was done.
type Rounds = Arc<Mutex<BTreeMap<&'static str, u64>>>;

/// One of the crowd, with a certificate of the gateway's own authority.
#[derive(Clone, Debug)]
struct Bad {
    gateway: SocketAddr,
    endpoint: Endpoint,
    config: quinn::ClientConfig,
}

/// A stream whose Hello was answered.
struct Talk {
    send: SendStream,
    recv: RecvStream,
    epoch: u32,
}

impl Crowd {
    /// Sets all of them on a gateway. `recorded` is what others have sent to it before.
    pub fn gather(
        gateway: SocketAddr,
        authority: &Authority,
        recorded: Vec<Vec<u8>>,
        seed: u64,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("crowd")
            .on_thread_start(|| {
                // To Linux a thread is a process of its own here; elsewhere the test may be slower.
                _ = setpriority_process(Some(gettid()), LOWEST_PRIORITY);
            })
            .enable_all()
            .build()
            .unwrap();
        let crowd = Self {
            runtime: Some(runtime),
            gateway,
            ca_pem: authority.certificate_pem().to_owned(),
            endpoints: Mutex::default(),
            stop: CancellationToken::new(),
            rounds: Rounds::default(),
        };
        let mut recruits = Recruits {
            key: KeyPair::generate().unwrap(),
            authority,
            number: 0,
        };
        let mut join = |abuse, number, transport: fn() -> quinn::TransportConfig| {
            (0..number)
                .map(|_| crowd.bad(recruits.next(), transport()))
                .map(|bad| (abuse, bad))
                .collect::<Vec<_>>()
        };
        crowd.let_loose(join("slow reader", 10, link::not_reading), slow_reader);
        crowd.let_loose(join("half a frame", 10, link::ordinary), half_a_frame);
        crowd.let_loose(join("silent streams", 10, link::ordinary), silent_streams);
        crowd.let_loose(
            join("streams taken back", 4, link::ordinary),
            streams_taken_back,
        );
        crowd.let_loose(
            join("no stream at all", 4, link::ordinary),
            no_stream_at_all,
        );
        crowd.let_loose(join("frame too long", 2, link::ordinary), frame_too_long);
        crowd.let_loose(join("batch too large", 2, link::ordinary), batch_too_large);
        crowd.let_loose(
            join("noise in a stream", 2, link::ordinary),
            noise_in_a_stream,
        );
        crowd.let_loose(join("frame bombs", 3, link::ordinary), frame_bombs);
        crowd.let_loose(join("sparse numbers", 4, link::ordinary), sparse_numbers);
        crowd.let_loose(join("byte by byte", 6, link::ordinary), byte_by_byte);
        crowd.let_loose(join("tiny batches", 3, link::ordinary), tiny_batches);
        crowd.let_loose(join("heartbeats", 3, link::ordinary), heartbeats);
        crowd.let_loose(join("flood of pings", 3, link::ordinary), flood_of_pings);
        crowd.let_loose(join("churn", 3, link::ordinary), churn);
        let foreign = tempfile::tempdir().unwrap();
        let stranger = Authority::create(foreign.path(), authority.trust_domain()).unwrap();
        recruits.authority = &stranger;
        let strangers = (0..2).map(|_| crowd.bad(recruits.next(), link::ordinary()));
        let strangers = strangers.map(|bad| ("strangers", bad)).collect();
        crowd.let_loose(strangers, churn);
        crowd.send_packets(recorded, seed);
        crowd
    }

    /// Sends all away and says how often each abuse was done.
    pub async fn disperse(mut self) -> BTreeMap<&'static str, u64> {
        self.stop.cancel();
        let endpoints = std::mem::take(&mut *self.endpoints.lock());
        for endpoint in &endpoints {
            endpoint.close(VarInt::from_u32(0), b"");
            // Only so that the gateway sees them go; it would notice by itself.
            drop(time::timeout(Duration::from_millis(100), endpoint.wait_idle()).await);
        }
        self.end();
        self.rounds.lock().clone()
    }

    fn end(&mut self) {
        self.stop.cancel();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    fn bad(
        &self,
        credentials: waypost_gateway::pki::Credentials,
        transport: quinn::TransportConfig,
    ) -> Bad {
        let runtime = self.runtime.as_ref().unwrap().enter();
        // Each from a port of its own: buffers of the sender's must not be what holds it back.
        let endpoint = Endpoint::client(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        drop(runtime);
        self.endpoints.lock().push(endpoint.clone());
        Bad {
            gateway: self.gateway,
            endpoint,
            config: link::client_config(&self.ca_pem, Some(&credentials), transport),
        }
    }

    /// Does rounds of an abuse, each on a connection of its own, until the crowd is sent away.
    fn let_loose<F>(&self, all: Vec<(&'static str, Bad)>, abuse: fn(Bad, Connection) -> F)
    where
        F: Future<Output = Option<()>> + Send + 'static,
    {
        for (name, bad) in all {
            let (stop, rounds) = (self.stop.clone(), Arc::clone(&self.rounds));
            self.spawn(async move {
                let endless = async {
                    loop {
                        let round = async {
                            let connection = bad.connect().await?;
                            abuse(bad.clone(), connection).await
                        };
                        // A gateway that neither answers nor closes must not make an abuser idle.
                        drop(time::timeout(LONGEST_ROUND, round).await);
                        *rounds.lock().entry(name).or_default() += 1;
                        time::sleep(BETWEEN_ROUNDS).await;
                    }
                };
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = endless => {}
                }
            });
        }
    }

    /// Packets of those who have no certificate, from many addresses.
    fn send_packets(&self, recorded: Vec<Vec<u8>>, seed: u64) {
        let config = link::client_config(&self.ca_pem, None, link::ordinary());
        let (gateway, rounds) = (self.gateway, Arc::clone(&self.rounds));
        self.spawn(async move {
            let first_packets = packets::first_packets(STALLED_HANDSHAKES, &config).await;
            tokio::join!(
                spray(gateway, 10, &rounds, "handshakes never finished", |at| {
                    first_packets[at % first_packets.len()].clone()
                }),
                spray(gateway, 80, &rounds, "recorded packets", |at| {
                    recorded[at % recorded.len()].clone()
                }),
                spray(gateway, 120, &rounds, "noise like a first packet", |at| {
                    packets::noise_like_a_first_packet(seed ^ (at as u64 + 1))
                }),
                spray(gateway, 160, &rounds, "noise", |at| {
                    let mut noise = packets::noise_like_a_first_packet(seed ^ (at as u64 + 7));
                    // Behind the part that looks like a header.
                    noise.split_off(20).split_off(at % 1_100)
                }),
            );
        });
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        drop(self.runtime.as_ref().unwrap().spawn(task));
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.end();
    }
}

struct Recruits<'a> {
    authority: &'a Authority,
    key: KeyPair,
    number: u32,
}

impl Recruits<'_> {
    fn next(&mut self) -> waypost_gateway::pki::Credentials {
        self.number += 1;
        let device = DeviceId {
            user: UserId([0xbd; 16]),
            device: self.number,
        };
        self.authority
            .issue_device_with_key(device, &self.key)
            .unwrap()
    }
}

impl Bad {
    async fn connect(&self) -> Option<Connection> {
        let connecting = self
            .endpoint
            .connect_with(self.config.clone(), self.gateway, "localhost")
            .ok()?;
        connecting.await.ok()
    }
}

impl Talk {
    async fn begin(connection: &Connection) -> Option<Self> {
        let (mut send, mut recv) = connection.open_bi().await.ok()?;
        send.write_all(&frame(Kind::Hello(hello(Lane::Live, 0))))
            .await
            .ok()?;
        let mut reader = FrameReader::new(usize::MAX);
        loop {
            let frame = reader.next::<v1::GatewayFrame>().ok()?;
            if let Some(v1::gateway_frame::Kind::Welcome(welcome)) =
                frame.and_then(|frame| frame.kind)
            {
                let epoch = welcome.epoch;
                return Some(Self { send, recv, epoch });
            }
            reader.extend(&recv.read_chunk(usize::MAX, true).await.ok()??.bytes);
        }
    }

    /// Writes, and reads whatever comes meanwhile. `None` when the gateway ends it.
    async fn say(&mut self, bytes: &[u8]) -> Option<()> {
        let Self { send, recv, .. } = self;
        tokio::select! {
            written = send.write_all(bytes) => written.ok(),
            () = read_all(recv) => None,
        }
    }

    /// Reads the answers to all that was said.
    async fn listen(mut self) {
        drop(self.send.finish());
        read_all(&mut self.recv).await;
    }
}

async fn read_all(recv: &mut RecvStream) {
    while let Ok(Some(_)) = recv.read_chunk(usize::MAX, true).await {}
}

fn frame(kind: Kind) -> BytesMut {
    let mut bytes = BytesMut::new();
    encode_frame(&v1::DeviceFrame { kind: Some(kind) }, &mut bytes);
    bytes
}

fn pings(epoch: u32, seqs: impl IntoIterator<Item = u64>) -> BytesMut {
    let pings: Vec<_> = seqs.into_iter().map(ping).collect();
    frame(Kind::Batch(batch::encode(epoch, &pings)))
}

async fn slow_reader(_: Bad, connection: Connection) -> Option<()> {
    let (mut send, _recv) = connection.open_bi().await.ok()?;
    send.write_all(&frame(Kind::Hello(hello(Lane::Live, 0))))
        .await
        .ok()?;
    let heartbeats = frame(Kind::Heartbeat(v1::Heartbeat {})).repeat(1_000);
    send.write_all(&heartbeats).await.ok()?;
    connection.closed().await;
    Some(())
}

async fn half_a_frame(_: Bad, connection: Connection) -> Option<()> {
    let mut talk = Talk::begin(&connection).await?;
    let batch = pings(talk.epoch, 1..=3);
    talk.say(&batch[..batch.len() / 2]).await?;
    connection.closed().await;
    Some(())
}

async fn silent_streams(_: Bad, connection: Connection) -> Option<()> {
    let mut streams = Vec::new();
    for _ in 0..4 {
        let (mut send, recv) = connection.open_bi().await.ok()?;
        send.write_all(&[9]).await.ok()?;
        streams.push((send, recv));
    }
    connection.closed().await;
    drop(streams);
    Some(())
}

async fn streams_taken_back(_: Bad, connection: Connection) -> Option<()> {
    let mut before: Option<(SendStream, RecvStream)> = None;
    loop {
        let (mut send, recv) = connection.open_bi().await.ok()?;
        send.write_all(&[9]).await.ok()?;
        time::sleep(Duration::from_millis(20)).await;
        if let Some((mut send, mut recv)) = before.replace((send, recv)) {
            send.reset(VarInt::from_u32(0)).ok()?;
            recv.stop(VarInt::from_u32(0)).ok()?;
        }
    }
}

async fn no_stream_at_all(_: Bad, connection: Connection) -> Option<()> {
    connection.closed().await;
    Some(())
}

async fn frame_too_long(_: Bad, connection: Connection) -> Option<()> {
    Talk::begin(&connection)
        .await?
        .say(&[0x81, 0x80, 0x04])
        .await?;
    connection.closed().await;
    Some(())
}

async fn batch_too_large(_: Bad, connection: Connection) -> Option<()> {
    let mut talk = Talk::begin(&connection).await?;
    let batch = pings(talk.epoch, 1..=1_001);
    talk.say(&batch).await?;
    connection.closed().await;
    Some(())
}

async fn noise_in_a_stream(_: Bad, connection: Connection) -> Option<()> {
    let mut talk = Talk::begin(&connection).await?;
    talk.say(&[7, 0, 0xff, 0x13, 0x37, 0xc0, 0xff, 0xee])
        .await?;
    connection.closed().await;
    Some(())
}

/// A few bytes that claim a thousand pings each.
async fn frame_bombs(_: Bad, connection: Connection) -> Option<()> {
    let mut talk = Talk::begin(&connection).await?;
    for at in 0..200 {
        let bomb = v1::PingBatch {
            epoch: talk.epoch,
            first_seq: 1 + at * 1_000,
            count: 1_000,
            ..v1::PingBatch::default()
        };
        talk.say(&frame(Kind::Batch(bomb))).await?;
    }
    talk.listen().await;
    Some(())
}

/// Every other number, so that each is a range of its own.
async fn sparse_numbers(_: Bad, connection: Connection) -> Option<()> {
    let mut talk = Talk::begin(&connection).await?;
    for at in 0..20 {
        let batch = pings(talk.epoch, (0..100).map(|number| 1 + 200 * at + 2 * number));
        talk.say(&batch).await?;
    }
    talk.listen().await;
    Some(())
}

async fn byte_by_byte(_: Bad, connection: Connection) -> Option<()> {
    let mut talk = Talk::begin(&connection).await?;
    for seq in 1..=20 {
        for byte in pings(talk.epoch, [seq]) {
            talk.say(&[byte]).await?;
            // A packet for each.
            time::sleep(Duration::from_millis(2)).await;
        }
    }
    talk.listen().await;
    Some(())
}

async fn tiny_batches(_: Bad, connection: Connection) -> Option<()> {
    let mut talk = Talk::begin(&connection).await?;
    for at in 0_u64.. {
        let mut bytes = BytesMut::new();
        for seq in at * 100..(at + 1) * 100 {
            bytes.extend_from_slice(&pings(talk.epoch, [1 + seq]));
        }
        talk.say(&bytes).await?;
    }
    Some(())
}

async fn heartbeats(_: Bad, connection: Connection) -> Option<()> {
    let mut talk = Talk::begin(&connection).await?;
    let heartbeats = frame(Kind::Heartbeat(v1::Heartbeat {})).repeat(100);
    loop {
        talk.say(&heartbeats).await?;
    }
}

/// As many as go, and no waiting for those that were put off.
async fn flood_of_pings(_: Bad, connection: Connection) -> Option<()> {
    let mut talk = Talk::begin(&connection).await?;
    for at in 0_u64.. {
        let batch = pings(talk.epoch, (1..=1_000).map(|number| at * 1_000 + number));
        talk.say(&batch).await?;
    }
    Some(())
}

async fn churn(_: Bad, connection: Connection) -> Option<()> {
    connection.close(VarInt::from_u32(0), b"");
    Some(())
}

/// Sends packets, each from the next of forty addresses, for ever.
async fn spray(
    gateway: SocketAddr,
    first_address: u8,
    rounds: &Rounds,
    name: &'static str,
    packet: impl Fn(usize) -> Vec<u8>,
) {
    let mut sockets = Vec::new();
    for last in first_address..first_address + 40 {
        let source = IpAddr::V4(Ipv4Addr::new(127, 0, 0, last));
        sockets.push(UdpSocket::bind((source, 0)).await.unwrap());
    }
    let mut ticks = time::interval(BETWEEN_PACKETS);
    for at in 0.. {
        ticks.tick().await;
        // A refusal by ICMP of an earlier one is told here, if the gateway has ended.
        drop(
            sockets[at % sockets.len()]
                .send_to(&packet(at), gateway)
                .await,
        );
        *rounds.lock().entry(name).or_default() += 1;
    }
}

const LOWEST_PRIORITY: i32 = 19;
const LONGEST_ROUND: Duration = Duration::from_secs(20);
/// Or those that are turned away would be most of the load.
const BETWEEN_ROUNDS: Duration = Duration::from_millis(20);
const BETWEEN_PACKETS: Duration = Duration::from_millis(4);
/// More than a gateway accepts before it asks for a proof of the address.
const STALLED_HANDSHAKES: usize = 1_000;
