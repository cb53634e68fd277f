//! A device and the gateway's half of its connections: both cores of the protocol, the committer's handle between
//! them, and no network.
//!
//! Knows how a session asks the committer and hears its answers, as the shell of the gateway does it. Must not know
//! what is true: it writes down what the committer answered, also where the device never hears of it, because its
//! connection is gone by then.

use std::{
    collections::{BTreeMap, VecDeque},
    future::Future,
    sync::Arc,
};

use bytes::Bytes;
use waypost_gateway::commit::{Answer, Mailbox};
use waypost_proto::{
    device::{Claim, Deferral},
    id::DeviceId,
    outbox::{Event, Outbox},
    ping::{Ping, RejectCode},
    session::{CheckerWish, Lane, Limits, Request, Session, Settled, Step, Welcomed, Wish},
    v1::{
        self,
        control::{Action, GrantChecker, Pause, Resume, WithdrawChecker},
    },
};

use crate::{
    history::{Fact, Pings, Wanted, Wants, What},
    world::{CHECKERS, Life},
};

/// So few that a dozen pings are a backlog, and some of them wait.
const LIMITS: Limits = Limits {
    frame_bytes: 65_536,
    batch_pings: 4,
    credit_pings: 12,
};

/// What all devices of a run write to.
#[derive(Debug, Default)]
pub(crate) struct Book {
    pub(crate) facts: Vec<Fact>,
    pub(crate) wanted: Vec<Wanted>,
    /// Requests that nobody knows anything of, because the committer went with them.
    pub(crate) lost: u64,
    asked: u64,
}

pub(crate) struct Device {
    pub(crate) id: DeviceId,
    outbox: Outbox,
    connection: Option<Connection>,
    /// Connections that are gone for the device, while the committer may still hold what they asked.
    former: Vec<Connection>,
    /// Of this epoch, by number.
    pushed: BTreeMap<u64, Ping>,
    settled: Vec<Ping>,
    /// What somebody else could have kept of its early data.
    copy: Option<(Claim, Request)>,
}

struct Connection {
    mailbox: Arc<Mailbox>,
    session: Session,
    is_open: [bool; 2],
    /// In the order of the answers.
    asked: [VecDeque<Asked>; 2],
    early: Option<Early>,
    /// What its Hello claims, while the handshake is not over and the committer has not been asked.
    unproven: Option<Claim>,
}

struct Asked {
    number: u64,
    what: AskedWhat,
}

enum AskedWhat {
    Contact,
    Control(Wanted),
    Pings { pings: Pings, is_early: bool },
}

/// The batch that came before the handshake was over.
enum Early {
    Asked(Request),
    Settled(Settled),
}

impl Device {
    pub(crate) fn new(id: DeviceId) -> Self {
        Self {
            id,
            outbox: outbox(),
            connection: None,
            former: Vec::new(),
            pushed: BTreeMap::new(),
            settled: Vec::new(),
            copy: None,
        }
    }

    pub(crate) fn push(&mut self, ping: Ping) {
        let seq = self.outbox.push(ping).seq;
        self.pushed.insert(seq, Ping { seq, ..ping });
    }

    /// Sends a ping again that was settled, if there is one.
    pub(crate) fn push_again(&mut self, choice: usize) {
        if let Some(ping) = self.settled.get(choice % self.settled.len().max(1)) {
            self.outbox.push_again(*ping);
        }
    }

    /// Begins a connection; one that there was is gone. If it is early and there is something to send, that goes ahead
    /// and the handshake is still to come.
    pub(crate) async fn connect(&mut self, is_early: bool, life: &Life, book: &mut Book) {
        self.disconnect();
        self.outbox.connected();
        let mut connection = Connection::new(life);
        let now_ms = life.clock.now_ms();
        let claim = connection.hello(Lane::Live, self.outbox.hello(Lane::Live, now_ms));
        let batch = if is_early {
            self.outbox.poll_batch(Lane::Live, now_ms)
        } else {
            None
        };
        let request = batch.map(|batch| connection.batch(Lane::Live, batch));
        if let Some(request) = &request
            && life
                .commit
                .offer_early(self.id, claim, request.clone(), &connection.mailbox)
        {
            self.copy = Some((claim, request.clone()));
            connection.note(self.id, Lane::Live, request, true, life, book);
            connection.early = Some(Early::Asked(request.clone()));
            connection.unproven = Some(claim);
        } else {
            connection
                .ask(self.id, Lane::Live, Request::Hello(claim), None, life, book)
                .await;
            if let Some(request) = request {
                connection
                    .ask(self.id, Lane::Live, request, None, life, book)
                    .await;
            }
        }
        self.connection = Some(connection);
    }

    /// The handshake is over, and what was said before it counts.
    pub(crate) async fn finish_handshake(&mut self, life: &Life, book: &mut Book) {
        if let Some(connection) = &mut self.connection
            && let Some(claim) = connection.unproven.take()
        {
            connection
                .ask(self.id, Lane::Live, Request::Hello(claim), None, life, book)
                .await;
        }
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.connection.is_some()
    }

    /// The connection is gone, and with it every answer that the device has not read.
    pub(crate) fn disconnect(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.former.push(connection);
            self.outbox.disconnected();
        }
    }

    pub(crate) async fn heartbeat(&mut self, life: &Life, book: &mut Book) {
        if let Some(connection) = &mut self.connection
            && connection.session.is_welcomed()
        {
            connection
                .ask(self.id, Lane::Live, Request::Heartbeat, None, life, book)
                .await;
        }
    }

    /// The holder pauses, resumes, or decides of a checker. False if the device cannot ask now.
    pub(crate) async fn want(&mut self, wants: Wants, life: &Life, book: &mut Book) -> bool {
        let Some(connection) = &mut self.connection else {
            return false;
        };
        if !connection.session.is_welcomed() {
            return false;
        }
        let name = |checker: usize| CHECKERS[checker].to_owned();
        let action = match wants {
            Wants::Share(Wish::Pause) => Action::Pause(Pause {}),
            Wants::Share(Wish::Resume) => Action::Resume(Resume {}),
            Wants::Share(other) => panic!("nobody wants {other:?} in a run"),
            Wants::Tell {
                checker,
                is_granted: true,
            } => Action::GrantChecker(GrantChecker {
                name: name(checker),
            }),
            Wants::Tell { checker, .. } => Action::WithdrawChecker(WithdrawChecker {
                name: name(checker),
            }),
        };
        let control = v1::Control {
            id: book.asked,
            action: Some(action),
        };
        let frame = v1::DeviceFrame {
            kind: Some(v1::device_frame::Kind::Control(control)),
        };
        let request = connection.step(Some(Lane::Live), frame);
        connection
            .ask(self.id, Lane::Live, request, None, life, book)
            .await;
        true
    }

    /// A sign of life on a connection that a newer one has taken over, or that the device has given up.
    pub(crate) async fn late_heartbeat(&mut self, life: &Life, book: &mut Book) {
        let mut proven = self
            .former
            .iter_mut()
            .filter(|former| former.unproven.is_none());
        if let Some(former) = proven.next_back() {
            former
                .ask(self.id, Lane::Live, Request::Heartbeat, None, life, book)
                .await;
        }
    }

    /// Somebody sends what the device once sent as early data.
    pub(crate) fn replay(&mut self, life: &Life, book: &mut Book) {
        let Some((claim, request)) = self.copy.clone() else {
            return;
        };
        let mut connection = Connection::new(life);
        connection.unproven = Some(claim);
        if life
            .commit
            .offer_early(self.id, claim, request.clone(), &connection.mailbox)
        {
            connection.note(self.id, Lane::Live, &request, true, life, book);
            self.former.push(connection);
        }
    }

    /// Whether anything is asked on BACKFILL. Early data and BACKFILL in one commit have no order that answers tell.
    pub(crate) fn has_backfill_in_flight(&self) -> bool {
        let connections = self.former.iter().chain(&self.connection);
        connections
            .into_iter()
            .any(|connection| !connection.asked[Lane::Backfill as usize].is_empty())
    }

    /// Sends what the protocol lets it send now.
    pub(crate) async fn send(&mut self, deferral: Option<Deferral>, life: &Life, book: &mut Book) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        let now_ms = life.clock.now_ms();
        if self.outbox.has_backlog() && !connection.is_open[Lane::Backfill as usize] {
            let hello = self.outbox.hello(Lane::Backfill, now_ms);
            let claim = connection.hello(Lane::Backfill, hello);
            connection
                .ask(
                    self.id,
                    Lane::Backfill,
                    Request::Hello(claim),
                    None,
                    life,
                    book,
                )
                .await;
        }
        if !connection.session.is_welcomed() {
            return;
        }
        for lane in Lane::ALL {
            while connection.is_open[lane as usize]
                && !connection.session.is_out_of_credit()
                && let Some(batch) = self.outbox.poll_batch(lane, now_ms)
            {
                let request = connection.batch(lane, batch);
                connection
                    .ask(self.id, lane, request, deferral, life, book)
                    .await;
            }
        }
    }

    /// Reads the answers that there are.
    pub(crate) async fn read(&mut self, life: &Life, book: &mut Book) {
        for former in &mut self.former {
            former.overhear(self.id, book);
        }
        self.former.retain(|former| former.is_asking());
        let Some(connection) = &mut self.connection else {
            return;
        };
        if connection.unproven.is_some() {
            return;
        }
        for (lane, answer) in letters(&connection.mailbox) {
            let Some(frames) = connection.hear(self.id, lane, answer, life, book).await else {
                // The gateway ends the connection.
                self.disconnect();
                return;
            };
            for frame in frames {
                let events = self.outbox.handle(frame, life.clock.now_ms());
                for event in events {
                    match event {
                        Event::Settled(range) => {
                            let settled = self.pushed.range(range.first..=range.last);
                            self.settled.extend(settled.map(|(_, ping)| *ping));
                        }
                        Event::Renumbered { previous_seqs, .. } => {
                            let old = std::mem::take(&mut self.pushed);
                            let kept = (1..).zip(&previous_seqs).filter_map(|(seq, previous)| {
                                Some((
                                    seq,
                                    Ping {
                                        seq,
                                        ..*old.get(previous)?
                                    },
                                ))
                            });
                            self.pushed = kept.collect();
                            self.settled.clear();
                        }
                        _ => {}
                    }
                }
            }
        }
        if self.outbox.must_reconnect() {
            self.disconnect();
        }
    }

    /// Whether the committer owes no answer.
    pub(crate) fn is_quiet(&self) -> bool {
        self.former.is_empty()
            && self
                .connection
                .iter()
                .all(|connection| !connection.is_asking())
    }

    /// Whether it has nothing left to send.
    pub(crate) fn is_settled(&self) -> bool {
        self.outbox.is_settled()
    }

    /// The gateway is gone: what it answered is written down, and nobody reads it.
    pub(crate) fn bury(&mut self, book: &mut Book) {
        self.disconnect();
        for mut former in std::mem::take(&mut self.former) {
            former.overhear(self.id, book);
            assert!(!former.is_asking(), "a request was never answered");
        }
    }

    /// The app is installed anew: nothing that it held is there any more. Nothing may be asked at this moment, for what
    /// is fenced tells nobody when it was heard.
    pub(crate) fn wipe(&mut self) {
        assert!(self.is_quiet(), "asked before, it would be fenced");
        self.disconnect();
        self.former.clear();
        self.outbox = outbox();
        self.pushed.clear();
        self.settled.clear();
    }
}

impl Connection {
    fn new(life: &Life) -> Self {
        Self {
            mailbox: Mailbox::new(&life.bell),
            session: Session::new(LIMITS, Bytes::copy_from_slice(&life.incarnation)),
            is_open: [false; 2],
            asked: [const { VecDeque::new() }; 2],
            early: None,
            unproven: None,
        }
    }

    fn is_asking(&self) -> bool {
        self.asked.iter().any(|asked| !asked.is_empty())
    }

    fn hello(&mut self, lane: Lane, hello: v1::Hello) -> Claim {
        let frame = v1::DeviceFrame {
            kind: Some(v1::device_frame::Kind::Hello(hello)),
        };
        self.is_open[lane as usize] = true;
        match self.step(None, frame) {
            Request::Hello(claim) => claim,
            other => panic!("a Hello led to {other:?}"),
        }
    }

    fn batch(&mut self, lane: Lane, batch: v1::PingBatch) -> Request {
        let frame = v1::DeviceFrame {
            kind: Some(v1::device_frame::Kind::Batch(batch)),
        };
        self.step(Some(lane), frame)
    }

    /// What a frame asks of the committer.
    fn step(&mut self, lane: Option<Lane>, frame: v1::DeviceFrame) -> Request {
        match self.session.handle_frame(lane, frame).unwrap() {
            Step::Ask(_, request) => request,
            other => panic!("a frame led to {other:?}"),
        }
    }

    async fn ask(
        &mut self,
        device: DeviceId,
        lane: Lane,
        request: Request,
        deferral: Option<Deferral>,
        life: &Life,
        book: &mut Book,
    ) {
        self.note(device, lane, &request, false, life, book);
        let submitted = life
            .commit
            .submit(device, lane, request, deferral, &self.mailbox);
        submitted
            .await
            .expect("the committer runs as long as there are handles");
    }

    fn note(
        &mut self,
        device: DeviceId,
        lane: Lane,
        request: &Request,
        is_early: bool,
        life: &Life,
        book: &mut Book,
    ) {
        book.asked += 1;
        let wanted = |wants| {
            AskedWhat::Control(Wanted {
                device,
                wants,
                number: book.asked,
                asked_ms: life.clock.now_ms(),
            })
        };
        let tell = |name: &str, is_granted| Wants::Tell {
            checker: CHECKERS.iter().position(|known| *known == name).unwrap(),
            is_granted,
        };
        let what = match request {
            Request::Hello(_) | Request::Heartbeat => AskedWhat::Contact,
            Request::Checkers { wish, .. } => wanted(match wish {
                CheckerWish::Grant(name) => tell(name, true),
                CheckerWish::Withdraw(name) => tell(name, false),
                CheckerWish::Show => panic!("nobody asks {request:?} in a run"),
            }),
            Request::Control { wish, .. } => wanted(Wants::Share(*wish)),
            Request::Batch { batch, .. } => AskedWhat::Pings {
                pings: Pings {
                    epoch: batch.epoch,
                    valid: batch.pings.clone(),
                    malformed: batch.malformed.iter().map(|&(seq, _)| seq).collect(),
                },
                is_early,
            },
        };
        self.asked[lane as usize].push_back(Asked {
            number: book.asked,
            what,
        });
    }

    /// Writes down what is answered, for a device that does not hear it.
    fn overhear(&mut self, device: DeviceId, book: &mut Book) {
        for (lane, answer) in letters(&self.mailbox) {
            self.write_down(device, lane, &answer, book);
        }
    }

    fn write_down(&mut self, device: DeviceId, lane: Lane, answer: &Answer, book: &mut Book) {
        let asked = self.asked[lane as usize]
            .pop_front()
            .expect("an answer to what was asked");
        let (position, receive_ms, commit_ms, is_paused) = match answer {
            Answer::Welcomed(welcomed) => (
                welcomed.position,
                welcomed.receive_ms,
                None,
                welcomed.is_paused,
            ),
            Answer::Settled(settled) => {
                let commit_ms = Some(settled.commit_ms);
                (
                    settled.position,
                    settled.receive_ms,
                    commit_ms,
                    settled.is_paused,
                )
            }
            Answer::Granted(_) => {
                let AskedWhat::Control(wanted) = asked.what else {
                    panic!("granted without being asked");
                };
                book.wanted.push(wanted);
                return;
            }
            Answer::Erased | Answer::Revoked => panic!("nobody erases anything"),
            Answer::Fenced => {
                let is_early = matches!(asked.what, AskedWhat::Pings { is_early: true, .. });
                assert!(is_early, "no epoch ends while anything of it is asked");
                return;
            }
            Answer::Lost => {
                book.lost += 1;
                return;
            }
        };
        let what = match (asked.what, answer) {
            (AskedWhat::Pings { pings, is_early }, Answer::Settled(settled)) => What::Pings {
                pings,
                is_early,
                rejects: settled.rejects.clone(),
                accepted: settled.accepted,
            },
            _ => What::Contact,
        };
        book.facts.push(Fact {
            device,
            position,
            lane,
            number: asked.number,
            receive_ms,
            commit_ms,
            is_paused,
            what,
        });
    }

    /// What to tell the device. None if the connection must end.
    async fn hear(
        &mut self,
        device: DeviceId,
        lane: Lane,
        answer: Answer,
        life: &Life,
        book: &mut Book,
    ) -> Option<Vec<v1::GatewayFrame>> {
        self.write_down(device, lane, &answer, book);
        match answer {
            Answer::Welcomed(welcomed) => self.welcomed(device, welcomed, life, book).await,
            Answer::Settled(settled) => match self.early.take() {
                Some(Early::Asked(_)) => {
                    self.early = Some(Early::Settled(settled));
                    Some(Vec::new())
                }
                other => {
                    self.early = other;
                    Some(
                        self.session
                            .handle_settled(vec![settled])
                            .into_iter()
                            .collect(),
                    )
                }
            },
            Answer::Fenced => {
                if let Some(Early::Asked(request)) = self.early.take() {
                    // After the Hello that is asked already, or that never will be.
                    self.ask(device, lane, request, None, life, book).await;
                }
                Some(Vec::new())
            }
            Answer::Granted(granted) => Some(vec![self.session.handle_granted(granted)]),
            Answer::Erased | Answer::Revoked | Answer::Lost => None,
        }
    }

    async fn welcomed(
        &mut self,
        device: DeviceId,
        mut welcomed: Welcomed,
        life: &Life,
        book: &mut Book,
    ) -> Option<Vec<v1::GatewayFrame>> {
        let early = match self.early.take() {
            Some(Early::Settled(mut settled)) => {
                if settled.epoch == welcomed.epoch {
                    // As the gateway does it: the early batch is the ack's to tell.
                    std::mem::swap(&mut settled.settled, &mut welcomed.settled);
                    settled.position = welcomed.position;
                }
                Some(settled)
            }
            other => {
                self.early = other;
                None
            }
        };
        let (welcome, waiting) = self.session.handle_welcomed(&welcomed).ok()?;
        for (lane, request) in waiting {
            self.ask(device, lane, request, None, life, book).await;
        }
        let ack = early.and_then(|settled| self.session.handle_settled(vec![settled]));
        Some(std::iter::once(welcome).chain(ack).collect())
    }
}

/// All that has come, without waiting.
fn letters(mailbox: &Mailbox) -> Vec<(Lane, Answer)> {
    let mut letters = Vec::new();
    let waker = std::task::Waker::noop();
    let mut context = std::task::Context::from_waker(waker);
    loop {
        let take = std::pin::pin!(mailbox.take());
        match take.poll(&mut context) {
            std::task::Poll::Ready(mail) => letters.extend(mail.answers),
            std::task::Poll::Pending => return letters,
        }
    }
}

fn outbox() -> Outbox {
    // More than a run pushes: what is dropped has no part in this.
    Outbox::new(std::num::NonZeroUsize::new(10_000).expect("not zero"))
}

/// A batch that is put off for a moment.
pub(crate) const PUT_OFF: Deferral = Deferral {
    code: RejectCode::RateLimited,
    retry_after_ms: 5,
};
