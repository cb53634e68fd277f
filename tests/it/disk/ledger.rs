//! Devices that keep a ledger of what was acknowledged, and the comparison with the store.

use std::{collections::BTreeSet, path::Path};

use waypost_proto::{ping::Ping, session::Lane, v1};
use waypost_tests::{Device, Process, Stream, World, hello, ping, ping_at, stored_seqs, until};

const SENDERS: u32 = 3;
/// What is on its way without an acknowledgement, so that a fault always finds some.
const AHEAD_BATCHES: u64 = 4;

/// A device that sends as fast as acknowledgements allow, and its ledger of them.
pub(super) struct Sender {
    pub(super) device: Device,
    batch_pings: u64,
    epoch: u32,
    pub(super) stream: Option<Stream>,
    pub(super) next_seq: u64,
    pub(super) acked: BTreeSet<u64>,
    pub(super) durable_upto: u64,
    pub(super) position: u64,
}

impl Sender {
    pub(super) async fn connect(gateway: &Process, number: u32, batch_pings: u64) -> Self {
        let mut sender = Self {
            device: gateway.device(number),
            batch_pings,
            epoch: 0,
            stream: None,
            next_seq: 1,
            acked: BTreeSet::new(),
            durable_upto: 0,
            position: 0,
        };
        sender.reconnect(gateway).await;
        sender
    }

    async fn reconnect(&mut self, gateway: &Process) {
        let link = gateway.connect(&self.device).await;
        let mut stream = link.open(hello(Lane::Live, self.epoch)).await;
        let epoch = stream.welcome().await.epoch;
        assert!(
            self.epoch == 0 || epoch == self.epoch,
            "the epoch is remembered"
        );
        self.epoch = epoch;
        self.stream = Some(stream);
    }

    /// Goes on until so many are acknowledged, or the connection ends.
    pub(super) async fn send_until(&mut self, enough: u64) {
        let mut stream = self.stream.take().unwrap();
        while self.durable_upto < enough {
            while self.next_seq <= self.durable_upto + AHEAD_BATCHES * self.batch_pings {
                let batch = samples(self.next_seq, self.batch_pings);
                if !stream.try_send_pings(self.epoch, &batch).await {
                    return;
                }
                self.next_seq += self.batch_pings;
            }
            let Some(ack) = stream.next_ack().await else {
                return;
            };
            self.note(&ack);
        }
        self.stream = Some(stream);
    }

    /// Sends what was sent and not acknowledged once more, until all of it is.
    async fn finish(&mut self, gateway: &Process) {
        self.reconnect(gateway).await;
        let mut stream = self.stream.take().unwrap();
        let mut seq = self.durable_upto + 1;
        while seq < self.next_seq {
            let batch = samples(seq, self.batch_pings);
            stream.send_pings(self.epoch, &batch).await;
            seq += self.batch_pings;
            while self.durable_upto + 1 < seq {
                let ack = stream.ack().await;
                self.note(&ack);
            }
        }
    }

    fn note(&mut self, ack: &v1::Ack) {
        let beyond = ack.ranges.iter().flat_map(|range| range.first..=range.last);
        self.acked
            .extend((self.durable_upto + 1..=ack.durable_upto).chain(beyond));
        self.durable_upto = ack.durable_upto;
        self.position = ack.position;
    }
}

/// Pings that are close together in time, so that many of them are not in the future.
fn samples(first_seq: u64, count: u64) -> Vec<Ping> {
    let at_ms = ping(0).time_ms;
    (first_seq..first_seq + count)
        .map(|seq| ping_at(seq, at_ms + seq))
        .collect()
}

pub(super) async fn all_send_until(senders: Vec<Sender>, enough: u64) -> Vec<Sender> {
    let sending: Vec<_> = senders
        .into_iter()
        .map(|mut sender| {
            tokio::spawn(async move {
                sender.send_until(enough).await;
                sender
            })
        })
        .collect();
    let mut senders = Vec::new();
    for sending in sending {
        senders.push(sending.await.unwrap());
    }
    senders
}

/// The checker of these tests: what was acknowledged and is not in the store, and what is in it twice.
pub(super) fn wrong(data_dir: &Path, senders: &[Sender]) -> Vec<String> {
    let store = World::open_store(data_dir);
    let mut wrong = Vec::new();
    for sender in senders {
        let stored = stored_seqs(&store, &sender.device);
        for pair in stored.windows(2) {
            if pair[0] == pair[1] {
                wrong.push(format!("{}: {:?} twice", sender.device.id, pair[0]));
            }
        }
        let stored: BTreeSet<_> = stored.into_iter().collect();
        for &seq in &sender.acked {
            if !stored.contains(&(sender.epoch, seq)) {
                wrong.push(format!("{}: {seq} lost", sender.device.id));
            }
        }
    }
    wrong
}

pub(super) async fn connect_all(gateway: &Process, batch_pings: u64) -> Vec<Sender> {
    let mut senders = Vec::new();
    for number in 1..=SENDERS {
        senders.push(Sender::connect(gateway, number, batch_pings).await);
    }
    // Something that was acknowledged before the fault.
    all_send_until(senders, 10 * batch_pings).await
}

/// Sends until the gateway has closed every connection, which it must do soon.
pub(super) async fn all_send_until_closed(senders: Vec<Sender>) -> Vec<Sender> {
    let longest = senders
        .iter()
        .map(|sender| sender.durable_upto + 2_000 * sender.batch_pings)
        .max();
    let senders = all_send_until(senders, longest.unwrap()).await;
    assert!(
        senders.iter().all(|sender| sender.stream.is_none()),
        "the gateway went on as if nothing had happened"
    );
    senders
}

/// It stops by itself, says why, and was not ready any more before it did.
pub(super) async fn stopped_because_of(gateway: &mut Process, reason: &str) {
    until(async || match gateway.readiness().await {
        Some((200, _)) => None,
        Some((code, said)) => {
            assert_eq!(code, 503);
            assert!(said.contains(reason), "{said}");
            Some(())
        }
        // It was too quick for us.
        None => Some(()),
    })
    .await;
    assert_eq!(gateway.exit_code().await, Some(1));
    let log = gateway.log();
    assert!(log.contains(reason), "{log}");
    assert!(log.contains("nothing was acknowledged after this"), "{log}");
}

pub(super) async fn cannot_start(gateway: &mut Process) {
    let ended = gateway.try_restart().await.expect_err("it cannot start");
    assert_eq!(ended.code(), Some(1));
}

/// After the fault is gone, the devices finish by themselves and everything is there once.
pub(super) async fn recovers(gateway: &mut Process, senders: &mut [Sender]) {
    gateway.restart().await;
    for sender in &mut *senders {
        sender.finish(gateway).await;
    }
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    let store = World::open_store(gateway.data_dir());
    for sender in senders {
        let all: Vec<_> = (1..sender.next_seq)
            .map(|seq| (sender.epoch, seq))
            .collect();
        assert_eq!(stored_seqs(&store, &sender.device), all);
    }
}
