//! Waypost end to end against a bare QUIC echo.
//!
//! One process with three runtimes: the gateway, an echo server on quinn with the gateway's TLS and
//! transport settings, and the client, which is the same for both: a thousand connections with client
//! certificates, one request outstanding on each. Waypost answers when the pings are judged and synced,
//! the echo server at once with the same bytes. The ratio says what durable and deduplicated cost on
//! top of QUIC. CPU is counted by thread, so it hardly depends on who else uses the machine.

#![expect(clippy::print_stdout, reason = "the figures are the point")]

mod fleet;

use std::{
    fs, iter,
    net::{SocketAddr, UdpSocket},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bytes::{Bytes, BytesMut};
use quinn::{
    Connection, Endpoint, EndpointConfig, RecvStream, SendStream, TokioRuntime,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use socket2::SockRef;
use tokio::{runtime::Runtime, task::JoinSet};
use tokio_util::sync::CancellationToken;
use waypost_gateway::{
    config::Config,
    gateway::Gateway,
    pki::{Authority, KeyPair},
    tls, transport,
};
use waypost_proto::{
    ALPN,
    frame::{FrameReader, encode_frame},
    v1,
};

use fleet::{DEVICES, Load, ROUNDS, median, rate};

const TRUST_DOMAIN: &str = "bench.example";
/// Names of the runtimes' threads; what else runs in this process is the gateway's.
const ECHO: &str = "echo";
const CLIENT: &str = "client";
const MAX_FRAME_BYTES: usize = 65_536;

fn main() -> Result<()> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let authority = Authority::create(&dir.path().join("pki"), TRUST_DOMAIN)?;
    let config = configuration(dir.path(), &authority)?;

    let (gateways, echoes, clients) = (runtime("gateway")?, runtime(ECHO)?, runtime(CLIENT)?);
    let gateway = gateways.block_on(Gateway::bind(&config))?;
    let gateway_address = gateway.addresses().devices;
    let stop = CancellationToken::new();
    let ended = gateways.spawn(gateway.run(stop.clone()));
    let (echo_address, echo) = echoes.block_on(async { echo_endpoint(&config) })?;
    echoes.spawn(serve_echo(echo));
    let endpoint = clients.block_on(async { client_endpoint(&config) })?;
    let connect =
        |kind, address| clients.block_on(connect_all(endpoint.clone(), kind, address, &authority));
    let mut waypost = connect(Kind::Waypost, gateway_address)?;
    let mut echo = connect(Kind::Echo, echo_address)?;

    println!(
        "Waypost against a bare quinn echo: {DEVICES} connections with mutual TLS, one request outstanding \
         on each; one process with three runtimes; medians of {ROUNDS} rounds each, in turn"
    );
    for load in Load::chosen() {
        let mut rounds = Vec::new();
        // The first round of each is for warming up.
        for _ in 0..=ROUNDS {
            rounds.push((
                clients.block_on(round(&mut waypost, &load))?,
                clients.block_on(round(&mut echo, &load))?,
            ));
        }
        report(&load, &rounds[1..]);
    }

    stop.cancel();
    gateways.block_on(ended)??;
    Ok(())
}

fn report(load: &Load, rounds: &[(Cost, Cost)]) {
    let middle = |figure: &dyn Fn(&(Cost, Cost)) -> f64| median(rounds.iter().map(figure));
    let pings = load.pings() as f64;
    let line = |name: &str, side: fn(&(Cost, Cost)) -> &Cost| {
        println!(
            "  {:<14}  {name:<7}  {:>7} pings/s  {:>6.2} µs of CPU a ping  {:.2} packets a request",
            load.name,
            rate(pings / middle(&|round| side(round).elapsed.as_secs_f64())),
            middle(&|round| side(round).server_cpu.as_secs_f64()) * 1e6 / pings,
            middle(&|round| side(round).packets as f64) / load.fleet_requests() as f64,
        );
    };
    line("Waypost", |(waypost, _)| waypost);
    line("echo", |(_, echo)| echo);
    println!(
        "  {:<14}  ratio    {:.2} of the echo's pings/s{}",
        load.name,
        middle(&|(waypost, echo)| echo.elapsed.as_secs_f64() / waypost.elapsed.as_secs_f64()),
        if load.request_pings == 1 {
            " (goal 0.75)"
        } else {
            ""
        },
    );
}

fn runtime(name: &str) -> std::io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .thread_name(name)
        .enable_all()
        .build()
}

fn configuration(dir: &Path, authority: &Authority) -> Result<Config> {
    let server = authority
        .issue_server(&["localhost"])?
        .write(&dir.join("pki"), "server")?;
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut config = Config {
        data_dir: dir.join("data"),
        ..Config::default()
    };
    config.devices.listen = any_port;
    config.freshness.listen = any_port;
    config.admin.listen = any_port;
    config.tls.certificate = server.certificate;
    config.tls.private_key = server.private_key;
    config.tls.client_ca = dir.join("pki/ca.pem");
    TRUST_DOMAIN.clone_into(&mut config.tls.trust_domain);
    Ok(config)
}

fn echo_endpoint(config: &Config) -> Result<(SocketAddr, Endpoint)> {
    let tls = tls::device_server_config(&config.tls)?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    server.transport_config(Arc::new(transport::connection_settings(&config.devices)?));
    let endpoint = endpoint(config, Some(server))?;
    Ok((endpoint.local_addr()?, endpoint))
}

fn client_endpoint(config: &Config) -> Result<Endpoint> {
    endpoint(config, None)
}

fn endpoint(config: &Config, server: Option<quinn::ServerConfig>) -> Result<Endpoint> {
    let socket = UdpSocket::bind(config.devices.listen)?;
    let buffers = SockRef::from(&socket);
    buffers.set_recv_buffer_size(config.devices.socket_buffer_bytes)?;
    buffers.set_send_buffer_size(config.devices.socket_buffer_bytes)?;
    let runtime = Arc::new(TokioRuntime);
    Ok(Endpoint::new(
        EndpointConfig::default(),
        server,
        socket,
        runtime,
    )?)
}

async fn serve_echo(endpoint: Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        tokio::spawn(async move {
            let connection = incoming.await?;
            let (mut send, mut recv) = connection.accept_bi().await?;
            while let Some(chunk) = recv.read_chunk(usize::MAX, true).await? {
                send.write_chunk(chunk.bytes).await?;
            }
            anyhow::Ok(())
        });
    }
}

/// What a client is connected to.
#[derive(Clone, Copy)]
enum Kind {
    Waypost,
    Echo,
}

/// A device: a connection with one stream.
struct Link {
    kind: Kind,
    send: SendStream,
    recv: RecvStream,
    reader: FrameReader,
    epoch: u32,
    next_seq: u64,
    connection: Connection,
}

async fn connect_all(
    endpoint: Endpoint,
    kind: Kind,
    address: SocketAddr,
    authority: &Authority,
) -> Result<Vec<Link>> {
    let key = KeyPair::generate()?;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(
        authority.certificate_pem().as_bytes(),
    )?)?;
    let mut links = Vec::new();
    for number in 0..DEVICES {
        let credentials = authority.issue_device_with_key(fleet::device_id(number), &key)?;
        let mut tls = rustls::ClientConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(
                vec![credentials.certificate_der()],
                credentials.private_key_der(),
            )?;
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let mut client = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
        let mut transport = quinn::TransportConfig::default();
        transport.keep_alive_interval(Some(Duration::from_secs(20)));
        client.transport_config(Arc::new(transport));
        let connection = endpoint.connect_with(client, address, "localhost")?.await?;
        links.push(Link::open(kind, connection).await?);
    }
    Ok(links)
}

impl Link {
    async fn open(kind: Kind, connection: Connection) -> Result<Self> {
        let (send, recv) = connection.open_bi().await?;
        let mut link = Self {
            kind,
            send,
            recv,
            reader: FrameReader::new(MAX_FRAME_BYTES),
            epoch: 1,
            next_seq: 1,
            connection,
        };
        let hello = encoded(&fleet::hello());
        link.send.write_chunk(hello.clone()).await?;
        match kind {
            Kind::Waypost => match link.next_frame().await? {
                v1::gateway_frame::Kind::Welcome(welcome) => link.epoch = welcome.epoch,
                other => bail!("no Welcome but {other:?}"),
            },
            Kind::Echo => link.read_back(hello.len()).await?,
        }
        Ok(link)
    }

    /// The frames of a round, and the last sequence number in each.
    fn prepare(&mut self, load: &Load) -> Vec<(u64, Bytes)> {
        iter::repeat_with(|| {
            let frame = fleet::batch(self.epoch, self.next_seq, load.request_pings);
            self.next_seq += load.request_pings;
            (self.next_seq - 1, encoded(&frame))
        })
        .take(usize::try_from(load.requests).unwrap_or(usize::MAX))
        .collect()
    }

    async fn run(mut self, frames: Vec<(u64, Bytes)>) -> Result<Self> {
        for (last_seq, frame) in frames {
            let frame_bytes = frame.len();
            self.send.write_chunk(frame).await?;
            match self.kind {
                Kind::Waypost => {
                    let v1::gateway_frame::Kind::Ack(ack) = self.next_frame().await? else {
                        bail!("a batch is answered with Ack");
                    };
                    // All that was ever sent is stored: nothing is missing, refused or known already.
                    let is_all = ack.durable_upto == last_seq && ack.accepted == last_seq;
                    ensure!(is_all, "up to {last_seq} was sent, but {ack:?}");
                }
                Kind::Echo => self.read_back(frame_bytes).await?,
            }
        }
        Ok(self)
    }

    async fn next_frame(&mut self) -> Result<v1::gateway_frame::Kind> {
        loop {
            if let Some(frame) = self.reader.next::<v1::GatewayFrame>()? {
                return frame.kind.context("an unknown frame");
            }
            let chunk = self.recv.read_chunk(usize::MAX, true).await?;
            self.reader
                .extend(&chunk.context("the stream ended")?.bytes);
        }
    }

    async fn read_back(&mut self, mut frame_bytes: usize) -> Result<()> {
        while 0 < frame_bytes {
            let chunk = self.recv.read_chunk(frame_bytes, true).await?;
            frame_bytes -= chunk.context("the stream ended")?.bytes.len();
        }
        Ok(())
    }
}

fn encoded(frame: &v1::DeviceFrame) -> Bytes {
    let mut bytes = BytesMut::new();
    encode_frame(frame, &mut bytes);
    bytes.freeze()
}

/// What a round took.
struct Cost {
    elapsed: Duration,
    server_cpu: Duration,
    /// Sent by the server; more than one a request means that acknowledgements of QUIC went alone.
    packets: u64,
}

/// All connections work through their frames at once.
async fn round(links: &mut Vec<Link>, load: &Load) -> Result<Cost> {
    let kind = links.first().context("there are connections")?.kind;
    let prepared: Vec<_> = links
        .drain(..)
        .map(|mut link| (link.prepare(load), link))
        .collect();
    let packets_of = |link: &Link| link.connection.stats().udp_rx.datagrams;
    let packets_before: u64 = prepared.iter().map(|(_, link)| packets_of(link)).sum();
    let cpu_before = server_cpu(kind)?;
    let started = Instant::now();
    let mut running = JoinSet::new();
    for (frames, link) in prepared {
        running.spawn(link.run(frames));
    }
    while let Some(link) = running.join_next().await {
        links.push(link??);
    }
    Ok(Cost {
        elapsed: started.elapsed(),
        server_cpu: server_cpu(kind)?.saturating_sub(cpu_before),
        packets: links.iter().map(packets_of).sum::<u64>() - packets_before,
    })
}

/// The processor time of a server's threads so far.
fn server_cpu(kind: Kind) -> Result<Duration> {
    let own_name = fs::read_to_string("/proc/self/comm")?;
    let mut nanoseconds = 0;
    for thread in fs::read_dir("/proc/self/task")? {
        let thread = thread?.path();
        let name = fs::read_to_string(thread.join("comm"))?;
        let is_of_server = match kind {
            Kind::Waypost => ![ECHO, CLIENT, own_name.trim()].contains(&name.trim()),
            Kind::Echo => name.trim() == ECHO,
        };
        if is_of_server {
            let times = fs::read_to_string(thread.join("schedstat"))?;
            let running = times.split_whitespace().next();
            nanoseconds += running.context("schedstat is empty")?.parse::<u64>()?;
        }
    }
    Ok(Duration::from_nanos(nanoseconds))
}
