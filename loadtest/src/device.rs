//! One device of the fleet: a task that carries its outbox to the gateway, again and again.
//!
//! Knows streams, waiting and coming back. Must not know what to send when, or what to make of the
//! answers: it is handed pings, and an [`Observer`] is told what the outbox learns.
//!
//! A device is one task, one small lock and its pings; sockets belong to [`Links`].

use std::{future::pending, num::NonZeroUsize, panic, pin::pin, sync::Arc, time::Duration};

use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::{
    sync::Notify,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};
use waypost_gateway::clock::system_now_ms;
use waypost_proto::{
    outbox::{Event, Outbox, Pushed},
    ping::Ping,
    session::{CloseCode, Lane},
    v1::{self, device_frame::Kind},
};

use crate::link::{Credentials, Handshake, Link, LinkError, LinkStream, Links, Progress};

/// A device that is running. Dropping it stops it at once.
#[derive(Debug)]
pub struct Device {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

/// What a device is made of.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// Who it is.
    pub credentials: Credentials,
    /// How many unsettled pings it can hold; beyond that it drops its oldest.
    pub capacity: NonZeroUsize,
    /// Repeats the same waits between attempts to connect.
    pub seed: u64,
}

/// Is told what a device learns, from its task and while nothing is locked, so it may push pings. It
/// must not wait for anything.
pub trait Observer: Send + 'static {
    /// A connection begins; running totals count from zero.
    fn connected(&mut self);
    /// Its handshake is over, and began the connection like this. With early data this comes after the first
    /// frames were sent, and not at all when the connection fails before.
    fn established(&mut self, _handshake: Handshake) {}
    /// The outbox learned something, from a frame that was read at this time.
    fn observed(&mut self, event: &Event, read_at: Instant);
    /// A connection ended, or could not be made. `None` if the device wanted it to end.
    fn disconnected(&mut self, error: Option<&LinkError>);
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Something for the task to look at. There is one task, so one permit is enough.
    changed: Notify,
}

#[derive(Debug)]
struct State {
    outbox: Outbox,
    owes_heartbeat: bool,
    wish: Wish,
}

/// What the device is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    BeOffline,
    BeOnline,
    BeOnlineWhenNeeded,
    StopWhenSettled,
    StopAtOnce,
}

impl Device {
    /// Makes a device. It is offline until [`Self::go_online`].
    pub fn spawn(links: Arc<Links>, config: DeviceConfig, observer: impl Observer) -> Self {
        let state = State {
            outbox: Outbox::new(config.capacity),
            owes_heartbeat: false,
            wish: Wish::BeOffline,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Notify::new(),
        });
        let task = tokio::spawn(run(links, config, shared.clone(), observer));
        Self { shared, task }
    }

    /// Connects, and comes back whenever the connection ends.
    pub fn go_online(&self) {
        self.shared.wish(Wish::BeOnline);
    }

    /// Connects whenever something is to be sent, and leaves once all of it is settled.
    pub fn go_online_when_needed(&self) {
        self.shared.wish(Wish::BeOnlineWhenNeeded);
    }

    /// Closes the connection at once, whatever is in flight, and stays away. The observer is told when
    /// it has ended.
    pub fn go_offline(&self) {
        self.shared.wish(Wish::BeOffline);
    }

    /// Hands over a new ping; see [`Outbox::push`].
    pub fn push(&self, ping: Ping) -> Pushed {
        self.shared.change(|state| state.outbox.push(ping))
    }

    /// Hands over a new ping with a number of its own; see [`Outbox::push_numbered`].
    pub fn push_numbered(&self, ping: Ping) -> Option<Pushed> {
        self.shared.change(|state| state.outbox.push_numbered(ping))
    }

    /// Hands over a ping that was settled before; see [`Outbox::push_again`].
    pub fn push_again(&self, ping: Ping) -> bool {
        self.shared.change(|state| state.outbox.push_again(ping))
    }

    /// Sends a sign of life now, or as soon as there is a connection. It is answered with an
    /// acknowledgement.
    pub fn heartbeat(&self) {
        self.shared.change(|state| state.owes_heartbeat = true);
    }

    /// How many pings are not settled yet.
    #[must_use]
    pub fn held(&self) -> usize {
        self.shared.state.lock().outbox.held()
    }

    /// Goes online, and stops when everything is settled.
    pub async fn stop_when_settled(mut self) {
        self.shared.wish(Wish::StopWhenSettled);
        self.join().await;
    }

    /// Stops at once, whatever is in flight.
    pub async fn stop(mut self) {
        self.shared.wish(Wish::StopAtOnce);
        self.join().await;
    }

    async fn join(&mut self) {
        if let Err(error) = (&mut self.task).await
            && error.is_panic()
        {
            panic::resume_unwind(error.into_panic());
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.shared.wish(Wish::StopAtOnce);
    }
}

impl Shared {
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state.lock());
        self.changed.notify_one();
        result
    }

    fn wish(&self, wish: Wish) {
        self.change(|state| state.wish = wish);
    }

    /// Waits while the device is offline. False when there will be no connection any more.
    async fn until_wanted(&self) -> bool {
        loop {
            let (wants_connection, wish) = {
                let state = self.state.lock();
                (state.wants_connection(), state.wish)
            };
            let may_come = matches!(wish, Wish::BeOffline | Wish::BeOnlineWhenNeeded);
            if wants_connection || !may_come {
                return wants_connection;
            }
            self.changed.notified().await;
        }
    }

    /// Waits while there is to be a connection.
    async fn until_unwanted(&self) {
        while self.state.lock().wants_connection() {
            self.changed.notified().await;
        }
    }
}

impl State {
    fn wants_connection(&self) -> bool {
        match self.wish {
            Wish::BeOnline => true,
            Wish::StopWhenSettled | Wish::BeOnlineWhenNeeded => !self.outbox.is_settled(),
            Wish::BeOffline | Wish::StopAtOnce => false,
        }
    }
}

async fn run(
    links: Arc<Links>,
    config: DeviceConfig,
    shared: Arc<Shared>,
    mut observer: impl Observer,
) {
    let begun = Instant::now();
    let mut backoff = Backoff::new(config.seed);
    while shared.until_wanted().await {
        let attempt = tokio::select! {
            attempt = links.connect(&config.credentials) => attempt,
            () = shared.until_unwanted() => continue,
        };
        let error = match attempt {
            Ok(link) => {
                observer.connected();
                let mut is_established = false;
                let outcome = loop {
                    shared.state.lock().outbox.connected();
                    let conversation = Conversation {
                        shared: &shared,
                        observer: &mut observer,
                        link: &link,
                        begun,
                        patience: Patience::default(),
                        is_heartbeat_open: false,
                        is_established: &mut is_established,
                    };
                    let outcome = conversation.hold().await;
                    // The gateway has seen nothing of it; on the same connection it all begins anew.
                    if !matches!(outcome, Err(LinkError::EarlyDataRefused)) {
                        break outcome;
                    }
                };
                link.close();
                // A stream may notice the end of its connection before it knows the reason.
                let error = outcome.err().map(|error| link.end().unwrap_or(error));
                let mut state = shared.state.lock();
                if state.outbox.is_welcomed() {
                    backoff.reset();
                }
                if error.as_ref().and_then(LinkError::close_code) == Some(CloseCode::FencedEpoch) {
                    state.outbox.fenced();
                }
                state.outbox.disconnected();
                error
            }
            Err(error) => Some(error),
        };
        observer.disconnected(error.as_ref());
        // What the gateway said of pings is no reason to stay away after a connection that just broke.
        let is_sent_away = matches!(
            error.as_ref().and_then(LinkError::close_code),
            Some(CloseCode::Overloaded | CloseCode::ShuttingDown)
        );
        let retry_after_ms = {
            let outbox = &shared.state.lock().outbox;
            match is_sent_away {
                true => outbox.retry_after_ms(),
                false => outbox.return_after_ms(),
            }
        };
        tokio::select! {
            () = sleep(backoff.next_wait(Duration::from_millis(retry_after_ms))) => {}
            () = shared.until_unwanted() => {}
        }
    }
}

/// One connection from its beginning to its end.
struct Conversation<'a, O> {
    shared: &'a Shared,
    observer: &'a mut O,
    link: &'a Link,
    /// Where the outbox's clock starts.
    begun: Instant,
    patience: Patience,
    /// The outbox does not know that a heartbeat is answered too.
    is_heartbeat_open: bool,
    /// Whether the observer knows how the connection began.
    is_established: &'a mut bool,
}

/// How long an answer has been owed.
///
/// A device that has sent all it had is silent while it waits. If its NAT gives it another address in
/// that time, the answer goes to the old one, again and again, until the device says anything at all. So
/// it asks again, each time after a longer wait: a gateway that is slow must not be made slower.
#[derive(Debug, Default)]
struct Patience {
    owed_since: Option<Instant>,
    reminders: u32,
}

/// What to do about an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overdue {
    Nothing,
    /// Look again then.
    WaitUntil(Instant),
    /// Say something now, and look again then.
    RemindAndWaitUntil(Instant),
    GiveUp,
}

/// What a conversation does next.
enum Next {
    End,
    OpenBackfill,
    Wait { until: Option<Instant> },
}

impl<O: Observer> Conversation<'_, O> {
    /// Returns when the device or its outbox wants the connection to end.
    async fn hold(mut self) -> Result<(), LinkError> {
        let mut live = open(self.shared, self.link, Lane::Live).await?;
        let mut backfill = None;
        let mut alarm = pin!(sleep_until(self.begun));
        loop {
            let until = match self.fill(&mut live, backfill.as_mut())? {
                Next::End => return Ok(()),
                Next::OpenBackfill => {
                    backfill = Some(open(self.shared, self.link, Lane::Backfill).await?);
                    continue;
                }
                Next::Wait { until } => until,
            };
            // Setting an alarm costs more than one that rings too early now and then.
            if let Some(until) =
                until.filter(|until| alarm.is_elapsed() || *until < alarm.deadline())
            {
                alarm.as_mut().reset(until);
            }
            tokio::select! {
                biased;
                handshake = self.link.established(), if !*self.is_established => {
                    *self.is_established = true;
                    self.observer.established(handshake?);
                }
                progress = live.progress() => match progress? {
                    Progress::Read(frame) => self.take(frame),
                    Progress::Written => {}
                    Progress::Ended => return Err(LinkError::Stream),
                },
                progress = progress_of(backfill.as_mut()) => match progress? {
                    Progress::Read(frame) => self.take(frame),
                    Progress::Written => {}
                    Progress::Ended => backfill = None,
                },
                () = self.shared.changed.notified() => {}
                () = &mut alarm, if until.is_some() => {}
            }
        }
    }

    /// Gives the streams what they may send now.
    fn fill(
        &mut self,
        live: &mut LinkStream,
        backfill: Option<&mut LinkStream>,
    ) -> Result<Next, LinkError> {
        let now = Instant::now();
        let now_ms = self.outbox_ms(now);
        let mut state = self.shared.state.lock();
        if !state.wants_connection() || state.outbox.must_reconnect() {
            return Ok(Next::End);
        }
        // Early data is for pings: a heartbeat says that somebody is there, and that it cannot.
        if *self.is_established && std::mem::take(&mut state.owes_heartbeat) {
            live.queue(Kind::Heartbeat(v1::Heartbeat {}));
            self.is_heartbeat_open = true;
        }
        if live.is_written()
            && let Some(batch) = state.outbox.poll_batch(Lane::Live, now_ms)
        {
            live.queue(Kind::Batch(batch));
        }
        match backfill {
            None if state.outbox.has_backlog() => return Ok(Next::OpenBackfill),
            Some(stream) if stream.is_written() => {
                if let Some(batch) = state.outbox.poll_batch(Lane::Backfill, now_ms) {
                    stream.queue(Kind::Batch(batch));
                } else if !state.outbox.has_backlog() {
                    stream.finish();
                }
            }
            _ => {}
        }
        let poll_at = state
            .outbox
            .poll_timeout(now_ms)
            .map(|at_ms| self.begun + Duration::from_millis(at_ms));
        let is_owed =
            self.is_heartbeat_open || !state.outbox.is_welcomed() || 0 < state.outbox.in_flight();
        drop(state);
        let look_at = match self.patience.look(is_owed, now) {
            Overdue::Nothing => None,
            Overdue::WaitUntil(at) => Some(at),
            Overdue::RemindAndWaitUntil(at) => {
                live.queue(Kind::Heartbeat(v1::Heartbeat {}));
                Some(at)
            }
            Overdue::GiveUp => return Err(LinkError::NoAnswer(ANSWER_PATIENCE)),
        };
        Ok(Next::Wait {
            until: poll_at.into_iter().chain(look_at).min(),
        })
    }

    fn take(&mut self, frame: v1::GatewayFrame) {
        let read_at = Instant::now();
        let now_ms = self.outbox_ms(read_at);
        let events = {
            let outbox = &mut self.shared.state.lock().outbox;
            let before = (outbox.is_welcomed(), outbox.in_flight());
            let events = outbox.handle(frame, now_ms);
            // The answer to a reminder is not the answer that is owed.
            if before != (outbox.is_welcomed(), outbox.in_flight()) {
                self.patience = Patience::default();
            }
            events
        };
        self.is_heartbeat_open = false;
        for event in &events {
            self.observer.observed(event, read_at);
        }
    }

    fn outbox_ms(&self, now: Instant) -> u64 {
        u64::try_from((now - self.begun).as_millis()).unwrap_or(u64::MAX)
    }
}

impl Patience {
    fn look(&mut self, is_owed: bool, now: Instant) -> Overdue {
        if !is_owed {
            *self = Self::default();
            return Overdue::Nothing;
        }
        let since = *self.owed_since.get_or_insert(now);
        let give_up_at = since + ANSWER_PATIENCE;
        if give_up_at <= now {
            return Overdue::GiveUp;
        }
        let reminder_at = |reminders: u32| since + FIRST_REMINDER * ((2 << reminders) - 1);
        let is_due = reminder_at(self.reminders) <= now;
        while reminder_at(self.reminders) <= now {
            self.reminders += 1;
        }
        let look_at = reminder_at(self.reminders).min(give_up_at);
        if is_due {
            Overdue::RemindAndWaitUntil(look_at)
        } else {
            Overdue::WaitUntil(look_at)
        }
    }
}

/// Opens a lane's stream, which begins with Hello.
async fn open(shared: &Shared, link: &Link, lane: Lane) -> Result<LinkStream, LinkError> {
    let mut stream = link.open().await?;
    let hello = shared.state.lock().outbox.hello(lane, system_now_ms());
    stream.queue(Kind::Hello(hello));
    Ok(stream)
}

async fn progress_of(stream: Option<&mut LinkStream>) -> Result<Progress, LinkError> {
    match stream {
        Some(stream) => stream.progress().await,
        None => pending().await,
    }
}

/// How long to wait between connections: longer each time, and not as long as everybody else.
struct Backoff {
    dice: SmallRng,
    most: Duration,
}

impl Backoff {
    fn new(seed: u64) -> Self {
        Self {
            dice: SmallRng::seed_from_u64(seed),
            most: FIRST_WAIT,
        }
    }

    fn reset(&mut self) {
        self.most = FIRST_WAIT;
    }

    /// The gateway's wish comes on top, or all whom it asked to wait would come back at once.
    fn next_wait(&mut self, retry_after: Duration) -> Duration {
        let wait = self.dice.random_range(self.most / 2..=self.most);
        self.most = (self.most * 2).min(LONGEST_WAIT);
        retry_after + wait
    }
}

const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// QUIC itself notices a gateway that is gone only after the idle timeout. Far above any commit.
const ANSWER_PATIENCE: Duration = Duration::from_secs(15);
/// The next one comes twice as long after this one, and so on. Above what a commit takes.
const FIRST_REMINDER: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use rustls::pki_types::{CertificateDer, pem::PemObject};
    use tempfile::TempDir;
    use tokio::sync::mpsc;
    use tokio_util::sync::CancellationToken;
    use waypost_gateway::{
        config::Config,
        gateway::{Gateway, GatewayError},
        pki::{self, Authority},
        store::Store,
    };
    use waypost_proto::{
        id::{DeviceId, UserId},
        outbox::Totals,
        ping::Source,
    };

    use super::*;

    struct World {
        authority: Authority,
        config: Config,
        stop: CancellationToken,
        gateway: Option<JoinHandle<Result<(), GatewayError>>>,
        devices: SocketAddr,
        dir: TempDir,
    }

    impl World {
        async fn start() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let authority = pki::prepare_development(&dir.path().join("pki")).unwrap();
            let any_port = "127.0.0.1:0".parse().unwrap();
            let mut config = Config {
                data_dir: dir.path().join("data"),
                ..Config::default()
            };
            config.devices.listen = any_port;
            config.freshness.listen = any_port;
            config.admin.listen = any_port;
            config.tls.certificate = dir.path().join("pki/server.pem");
            config.tls.private_key = dir.path().join("pki/server.key");
            config.tls.client_ca = dir.path().join("pki/ca.pem");
            config.tls.trust_domain = authority.trust_domain().to_owned();
            let (stop, gateway) = (CancellationToken::new(), None);
            let mut world = Self {
                authority,
                config,
                stop,
                gateway,
                devices: any_port,
                dir,
            };
            world.run().await;
            world
        }

        async fn run(&mut self) {
            let gateway = Gateway::bind(&self.config).await.unwrap();
            self.devices = gateway.addresses().devices;
            // After a restart, devices look for it where it was.
            self.config.devices.listen = self.devices;
            self.stop = CancellationToken::new();
            self.gateway = Some(tokio::spawn(gateway.run(self.stop.clone())));
        }

        async fn end(&mut self) {
            self.stop.cancel();
            self.gateway.take().unwrap().await.unwrap().unwrap();
        }

        fn device(&self) -> (Device, mpsc::Receiver<Told>) {
            self.device_over(|links| links)
        }

        fn device_over(
            &self,
            change: impl FnOnce(Links) -> Links,
        ) -> (Device, mpsc::Receiver<Told>) {
            let id = DeviceId {
                user: UserId([7; 16]),
                device: 1,
            };
            let issued = self.authority.issue_device(id).unwrap();
            let ca_pem = self.authority.certificate_pem();
            let ca = CertificateDer::from_pem_slice(ca_pem.as_bytes()).unwrap();
            let links = Links::open(self.devices, "localhost", ca, NonZeroUsize::MIN).unwrap();
            let links = change(links);
            let credentials = links
                .credentials(vec![issued.certificate_der()], issued.private_key_der())
                .unwrap();
            let config = DeviceConfig {
                credentials,
                capacity: NonZeroUsize::new(10_000).unwrap(),
                seed: 1,
            };
            let (tell, told) = mpsc::channel(10_000);
            (Device::spawn(Arc::new(links), config, Teller(tell)), told)
        }

        /// The sequence numbers in the store.
        async fn stored(mut self) -> Vec<u64> {
            self.end().await;
            let store = Store::open_read_only(&self.config.data_dir).unwrap();
            let mut seqs: Vec<u64> = store
                .rows()
                .flat_map(|row| row.unwrap().record.pings)
                .map(|ping| ping.seq)
                .collect();
            seqs.sort_unstable();
            drop(self.dir);
            seqs
        }
    }

    #[derive(Clone, Debug, PartialEq)]
    enum Told {
        Connected,
        Established(Handshake),
        Event(Event),
        Disconnected(Option<CloseCode>),
    }

    struct Teller(mpsc::Sender<Told>);

    impl Observer for Teller {
        fn connected(&mut self) {
            self.0.try_send(Told::Connected).unwrap();
        }

        fn established(&mut self, handshake: Handshake) {
            self.0.try_send(Told::Established(handshake)).unwrap();
        }

        fn observed(&mut self, event: &Event, _read_at: Instant) {
            self.0.try_send(Told::Event(event.clone())).unwrap();
        }

        fn disconnected(&mut self, error: Option<&LinkError>) {
            self.0
                .try_send(Told::Disconnected(error.and_then(LinkError::close_code)))
                .unwrap();
        }
    }

    async fn until<T>(told: &mut mpsc::Receiver<Told>, find: impl Fn(&Told) -> Option<T>) -> T {
        loop {
            if let Some(found) = find(&told.recv().await.unwrap()) {
                return found;
            }
        }
    }

    async fn until_totals(told: &mut mpsc::Receiver<Told>, expected: Totals) {
        until(told, |told| match told {
            Told::Event(Event::Acknowledged { totals, .. }) => (*totals == expected).then_some(()),
            _ => None,
        })
        .await;
    }

    fn ping() -> Ping {
        Ping {
            source: Source::Gnss,
            ..Ping::at(0, system_now_ms(), 1, 2)
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_backlog_is_settled_over_both_lanes_and_a_restart_of_the_gateway() {
        let mut world = World::start().await;
        let (device, mut told) = world.device();
        for _ in 0..5_000 {
            device.push(ping());
        }
        device.go_online();
        until(&mut told, |told| {
            matches!(told, Told::Event(Event::Settled(_))).then_some(())
        })
        .await;
        world.end().await;
        device.push(ping());
        world.run().await;
        device.stop_when_settled().await;
        let mut settled = Vec::new();
        while let Some(told) = told.recv().await {
            if let Told::Event(Event::Settled(range)) = told {
                settled.extend(range.first..=range.last);
            }
        }
        assert_eq!(settled.iter().max(), Some(&5_001));
        assert_eq!(world.stored().await, (1..=5_001).collect::<Vec<_>>());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn pings_sent_again_and_heartbeats_are_answered() {
        let world = World::start().await;
        let (device, mut told) = world.device();
        device.go_online();
        let sent: Vec<Ping> = (0..3)
            .map(|_| ping())
            .map(|ping| Ping {
                seq: device.push(ping).seq,
                ..ping
            })
            .collect();
        until_totals(
            &mut told,
            Totals {
                accepted: 3,
                ..Totals::default()
            },
        )
        .await;

        device.go_offline();
        until(&mut told, |told| {
            (*told == Told::Disconnected(None)).then_some(())
        })
        .await;
        for ping in sent {
            assert!(device.push_again(ping));
        }
        device.go_online();
        until_totals(
            &mut told,
            Totals {
                duplicate: 3,
                ..Totals::default()
            },
        )
        .await;
        device.heartbeat();
        until_totals(
            &mut told,
            Totals {
                duplicate: 3,
                ..Totals::default()
            },
        )
        .await;
        device.stop().await;
        assert_eq!(world.stored().await, [1, 2, 3]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_device_with_a_ticket_sends_early_and_again_where_the_ticket_is_unknown() {
        let mut world = World::start().await;
        let (device, mut told) = world.device_over(Links::resuming);
        let handshakes = [Handshake::Full, Handshake::EarlyData, Handshake::Full];
        for (settled, handshake) in (1..).zip(handshakes) {
            if settled == 3 {
                world.end().await;
                world.run().await;
            }
            device.push(ping());
            device.go_online();
            let (mut began, mut is_settled) = (None, false);
            while began.is_none() || !is_settled {
                match told.recv().await.unwrap() {
                    Told::Established(handshake) => began = Some(handshake),
                    Told::Event(Event::Settled(range)) => is_settled = range.last == settled,
                    Told::Connected | Told::Event(_) | Told::Disconnected(_) => {}
                }
            }
            assert_eq!(began, Some(handshake));
            device.go_offline();
            until(&mut told, |told| {
                (*told == Told::Disconnected(None)).then_some(())
            })
            .await;
        }
        device.stop().await;
        assert_eq!(world.stored().await, [1, 2, 3]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_device_waits_for_a_gateway_that_is_not_there_yet() {
        let mut world = World::start().await;
        world.end().await;
        let (device, mut told) = world.device();
        device.push(ping());
        device.go_online();
        world.run().await;
        device.stop_when_settled().await;
        until(&mut told, |told| (*told == Told::Connected).then_some(())).await;
        assert_eq!(world.stored().await, [1]);
    }

    #[test]
    fn a_gateway_that_owes_an_answer_is_reminded_less_and_less_and_then_left() {
        let begun = Instant::now();
        let mut patience = Patience::default();
        let (mut now, mut reminded_after) = (begun, Vec::new());
        loop {
            now = match patience.look(true, now) {
                Overdue::WaitUntil(at) => at,
                Overdue::RemindAndWaitUntil(at) => {
                    reminded_after.push((now - begun).as_secs());
                    at
                }
                Overdue::GiveUp => break,
                Overdue::Nothing => unreachable!("an answer is owed"),
            };
        }
        assert_eq!(reminded_after, [2, 6, 14]);
        assert_eq!(now - begun, ANSWER_PATIENCE);
    }

    #[test]
    fn patience_begins_anew_with_the_next_answer_that_is_owed() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut patience = Patience::default();
        assert_eq!(patience.look(true, at(0)), Overdue::WaitUntil(at(2)));
        assert_eq!(
            patience.look(true, at(5)),
            Overdue::RemindAndWaitUntil(at(6))
        );
        assert_eq!(
            patience.look(true, at(5)),
            Overdue::WaitUntil(at(6)),
            "only once"
        );
        assert_eq!(patience.look(false, at(14)), Overdue::Nothing);
        assert_eq!(patience.look(true, at(20)), Overdue::WaitUntil(at(22)));
    }

    #[test]
    fn waits_grow_to_a_bound_and_respect_the_gateways_wish() {
        let mut backoff = Backoff::new(1);
        let wish = Duration::from_secs(30);
        let waits: Vec<Duration> = (0..20).map(|_| backoff.next_wait(wish)).collect();
        assert!(
            waits
                .iter()
                .all(|wait| wish < *wait && *wait <= wish + LONGEST_WAIT)
        );
        assert!(wish + LONGEST_WAIT / 2 <= waits[19]);
        backoff.reset();
        assert!(backoff.next_wait(wish) <= wish + FIRST_WAIT);
    }
}
