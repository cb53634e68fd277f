//! The gateway of the simulation: the real [`Session`] and [`DeviceRecord`], between a shell and a
//! committer that do what those of the gateway do, and a disk that keeps only what was synced.
//!
//! Knows frames, groups and syncs. Must not know delays or faults: the world tells it what arrives, when
//! a sync is done and when the power goes. What it wants done it leaves in [`Gateway::wants`].

use std::collections::{BTreeMap, HashMap, VecDeque};

use bytes::Bytes;
use waypost_proto::{
    device::{Deferral, DeviceRecord, Judgement, LastStored},
    frame::FrameReader,
    ping::{Ping, RejectCode},
    session::{
        CloseCode, Lane, Limits, Request, Session, Settled, Step, Violation, Welcomed, batch_len,
    },
    v1::{self, gateway_frame::Kind},
};

use crate::{
    dice::Dice,
    history::{Commit, Entry, Fate, Judged, LinkId, Row},
    world::{StreamId, Weather},
};

/// A protection that is taken away, to show that its loss is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sabotage {
    Nothing,
    /// Answers go out when a group is judged, and the sync comes afterwards.
    AckBeforeSync,
    /// Pings and the record that remembers them are written one after the other.
    DedupApart,
    /// The device's shell lets go of what is in flight when a connection is cut.
    ForgetAtCut,
    /// A device that came back from an older state goes on in the epoch it had then.
    RestoreKeepsEpoch,
}

/// Something for the world to do.
#[derive(Debug)]
pub(crate) enum Want {
    Write(LinkId, StreamId, v1::GatewayFrame),
    Finish(LinkId, StreamId),
    Close(LinkId, CloseCode),
    /// A newer connection took over; the older one notices a little later.
    TakeOver(LinkId),
    Gather,
    Sync,
}

/// What survives.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    records: HashMap<u32, DeviceRecord>,
    position: u64,
}

pub(crate) struct Gateway {
    pub(crate) wants: Vec<Want>,
    pub(crate) is_up: bool,
    pub(crate) disk: Disk,
    weather: Weather,
    sabotage: Sabotage,
    incarnation: u32,
    /// Not yet durable from here on.
    records: HashMap<u32, DeviceRecord>,
    last_stored: HashMap<u32, LastStored>,
    position: u64,
    queues: [VecDeque<Submission>; 2],
    group: Option<Group>,
    sessions: BTreeMap<LinkId, Connection>,
    current: HashMap<u32, LinkId>,
    /// With [`Sabotage::DedupApart`]: written with the next group.
    late_records: HashMap<u32, DeviceRecord>,
}

struct Connection {
    device: u32,
    session: Session,
    streams: BTreeMap<StreamId, Stream>,
    in_flight: [usize; 2],
    is_draining: bool,
    /// The device became this connection's with its first Hello.
    has_claimed: bool,
}

struct Stream {
    reader: FrameReader,
    lane: Option<Lane>,
    is_finished: bool,
}

struct Submission {
    link: LinkId,
    device: u32,
    lane: Lane,
    receive_ms: u64,
    request: Request,
    deferral: Option<Deferral>,
}

enum Answer {
    Welcomed(Welcomed),
    Settled(Settled),
    Fenced,
}

/// What one sync makes durable.
struct Group {
    commit: Commit,
    records: HashMap<u32, DeviceRecord>,
    answers: Vec<(LinkId, Lane, Answer)>,
}

impl Gateway {
    pub(crate) fn new(weather: Weather, sabotage: Sabotage) -> Self {
        Self {
            wants: Vec::new(),
            is_up: true,
            disk: Disk::default(),
            weather,
            sabotage,
            incarnation: 1,
            records: HashMap::new(),
            last_stored: HashMap::new(),
            position: 0,
            queues: Default::default(),
            group: None,
            sessions: BTreeMap::new(),
            current: HashMap::new(),
            late_records: HashMap::new(),
        }
    }

    pub(crate) fn heal(&mut self, weather: Weather) {
        self.weather = weather;
    }

    pub(crate) fn open(&mut self, link: LinkId, device: u32) {
        let limits = Limits {
            frame_bytes: self.weather.frame_bytes,
            batch_pings: self.weather.batch_pings,
            credit_pings: self.weather.credit_pings,
        };
        let incarnation = Bytes::copy_from_slice(&self.incarnation.to_be_bytes());
        let connection = Connection {
            device,
            session: Session::new(limits, incarnation),
            streams: BTreeMap::new(),
            in_flight: [0; 2],
            is_draining: false,
            has_claimed: false,
        };
        self.sessions.insert(link, connection);
    }

    /// Bytes of a stream have arrived.
    pub(crate) fn receive(
        &mut self,
        link: LinkId,
        at: StreamId,
        bytes: &[u8],
        now_ms: u64,
        dice: &mut Dice,
    ) {
        let Some(connection) = self.sessions.get_mut(&link) else {
            return;
        };
        let frame_bytes = usize::try_from(self.weather.frame_bytes).unwrap();
        let stream = connection.streams.entry(at).or_insert_with(|| Stream {
            reader: FrameReader::new(frame_bytes),
            lane: None,
            is_finished: false,
        });
        stream.reader.extend(bytes);
        self.work_through(link, at, now_ms, dice);
    }

    /// The device has finished its side of a stream.
    pub(crate) fn finished(&mut self, link: LinkId, at: StreamId) {
        if let Some(connection) = self.sessions.get_mut(&link)
            && let Some(stream) = connection.streams.get_mut(&at)
        {
            stream.is_finished = true;
            self.close_finished(link);
        }
    }

    /// A connection is gone, whatever the reason.
    pub(crate) fn gone(&mut self, link: LinkId) {
        if let Some(connection) = self.sessions.remove(&link)
            && self.current.get(&connection.device) == Some(&link)
        {
            self.current.remove(&connection.device);
        }
    }

    pub(crate) fn close(&mut self, link: LinkId, code: CloseCode) {
        if self.sessions.contains_key(&link) {
            self.gone(link);
            self.wants.push(Want::Close(link, code));
        }
    }

    /// Finish what is in flight, then close. The answers say that the gateway is about to stop.
    pub(crate) fn drain(&mut self) {
        let links: Vec<LinkId> = self.sessions.keys().copied().collect();
        for link in links {
            let connection = self.sessions.get_mut(&link).unwrap();
            connection.is_draining = true;
            connection.session.go_away(0);
            self.close_drained(link);
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.sessions.is_empty()
            && self.group.is_none()
            && self.queues.iter().all(VecDeque::is_empty)
    }

    /// All that was not synced is gone. What was on its way to disk may have got there.
    pub(crate) fn crash(&mut self, has_reached_disk: bool, history: &mut Vec<Entry>) -> bool {
        self.is_up = false;
        let group = self.group.take();
        let was_writing = group.is_some();
        if let Some(group) = group.filter(|_| has_reached_disk) {
            self.write(group, history);
        }
        self.queues = Default::default();
        self.sessions.clear();
        self.current.clear();
        self.late_records.clear();
        was_writing
    }

    pub(crate) fn restart(&mut self) {
        self.is_up = true;
        self.records = self.disk.records.clone();
        self.position = self.disk.position;
        self.last_stored.clear();
    }

    /// The same store, in an older state. Only while the gateway is down.
    pub(crate) fn replace_disk(&mut self, disk: Disk, is_other_store: bool) {
        assert!(!self.is_up);
        self.disk = disk;
        self.incarnation += u32::from(is_other_store);
    }

    /// Takes what is queued, LIVE first, judges it and sends it to the disk.
    pub(crate) fn gather(&mut self, now_ms: u64, history: &mut Vec<Entry>) {
        if !self.is_up || self.group.is_some() {
            return;
        }
        let most = self.weather.group_pings;
        let mut taken = Vec::new();
        let mut pings = 0;
        for (lane, bound) in [(0, most - most / 8), (1, most)] {
            while (pings < bound || taken.is_empty())
                && let Some(submission) = self.queues[lane].pop_front()
            {
                pings += match &submission.request {
                    Request::Batch { batch, .. } => batch_len(batch),
                    Request::Hello(_)
                    | Request::Heartbeat
                    | Request::Control { .. }
                    | Request::Checkers { .. } => 1,
                };
                taken.push(submission);
            }
        }
        if taken.is_empty() {
            return;
        }
        self.position += 1;
        let mut group = Group {
            commit: Commit {
                position: self.position,
                commit_ms: now_ms,
                events: Vec::new(),
                rows: Vec::new(),
                clocks: Vec::new(),
            },
            records: HashMap::new(),
            answers: Vec::new(),
        };
        for submission in taken {
            self.judge(submission, now_ms, &mut group);
        }
        let clocks = group.records.iter();
        group.commit.clocks = clocks
            .map(|(device, record)| (*device, record.clocks))
            .collect();
        if self.sabotage == Sabotage::AckBeforeSync {
            let answers = std::mem::take(&mut group.answers);
            self.deliver(answers, now_ms, history);
        }
        self.group = Some(group);
        self.wants.push(Want::Sync);
    }

    /// The group is durable: now it may be seen and acknowledged.
    pub(crate) fn synced(&mut self, now_ms: u64, history: &mut Vec<Entry>, dice: &mut Dice) {
        let Some(mut group) = self.group.take() else {
            return;
        };
        let answers = std::mem::take(&mut group.answers);
        self.write(group, history);
        let links = self.deliver(answers, now_ms, history);
        for link in links {
            self.resume(link, now_ms, dice);
        }
        if self.queues.iter().any(|queue| !queue.is_empty()) {
            self.wants.push(Want::Gather);
        }
    }

    fn write(&mut self, group: Group, history: &mut Vec<Entry>) {
        self.disk.position = group.commit.position;
        if self.sabotage == Sabotage::DedupApart {
            let late = std::mem::replace(&mut self.late_records, group.records);
            self.disk.records.extend(late);
        } else {
            self.disk.records.extend(group.records);
        }
        history.push(Entry::Committed(group.commit));
    }

    fn judge(&mut self, submission: Submission, commit_ms: u64, group: &mut Group) {
        let Submission {
            link,
            device,
            lane,
            receive_ms,
            request,
            deferral,
        } = submission;
        let position = group.commit.position;
        let events = &mut group.commit.events;
        let record = self.records.entry(device).or_default();
        record.contact(receive_ms);
        record.clocks.durable_ms = record.clocks.durable_ms.max(commit_ms);
        record.position = position;
        events.push(Judged::Contact { device, receive_ms });
        let answer = match request {
            Request::Hello(claim) => {
                let admission = record.admit(claim);
                events.push(Judged::Hello {
                    device,
                    admission,
                    epoch: record.epoch,
                    oldest_unsent_seq: claim.oldest_unsent_seq,
                });
                Answer::Welcomed(Welcomed {
                    admission,
                    epoch: record.epoch,
                    settled: record.settled.clone(),
                    receive_ms,
                    position,
                    is_paused: false,
                })
            }
            Request::Batch { batch, .. } if batch.epoch != record.epoch => Answer::Fenced,
            Request::Batch { batch, .. } => {
                let before = record.settled.clone();
                let mut last_stored = self.last_stored.get(&device).copied();
                let judgement = match deferral {
                    Some(deferral) => record.defer(&batch.pings, &batch.malformed, deferral.code),
                    None => record.judge(
                        &batch.pings,
                        &batch.malformed,
                        receive_ms,
                        &self.weather.policy,
                        &mut last_stored,
                    ),
                };
                self.last_stored
                    .extend(last_stored.map(|last| (device, last)));
                let pings = batch.pings.iter().map(|ping| (ping.seq, Some(*ping)));
                let malformed = batch.malformed.iter().map(|(seq, _)| (*seq, None));
                for (seq, ping) in pings.chain(malformed) {
                    events.push(Judged::Ping {
                        link,
                        device,
                        epoch: batch.epoch,
                        seq,
                        receive_ms,
                        ping,
                        fate: fate(&judgement, &batch.pings, before.contains(seq), seq),
                    });
                }
                let rows = judgement.stored.iter().map(|&at| Row {
                    device,
                    epoch: batch.epoch,
                    ping: batch.pings[at],
                });
                group.commit.rows.extend(rows);
                Answer::Settled(Settled {
                    epoch: record.epoch,
                    pings: batch_len(&batch),
                    accepted: judgement.stored.len() as u64,
                    duplicate: judgement.duplicate,
                    filtered: judgement.filtered,
                    rejects: judgement.rejects,
                    settled: record.settled.clone(),
                    receive_ms,
                    commit_ms,
                    position,
                    retry_after_ms: deferral.map_or(0, |deferral| deferral.retry_after_ms),
                    is_paused: false,
                })
            }
            // No device of this world pauses or grants.
            Request::Heartbeat | Request::Control { .. } | Request::Checkers { .. } => {
                Answer::Settled(Settled {
                    epoch: record.epoch,
                    pings: 0,
                    accepted: 0,
                    duplicate: 0,
                    filtered: 0,
                    rejects: Vec::new(),
                    settled: record.settled.clone(),
                    receive_ms,
                    commit_ms,
                    position,
                    retry_after_ms: 0,
                    is_paused: false,
                })
            }
        };
        group.records.insert(device, record.clone());
        group.answers.push((link, lane, answer));
    }

    /// Tells the sessions; returns those that are still there.
    fn deliver(
        &mut self,
        answers: Vec<(LinkId, Lane, Answer)>,
        now_ms: u64,
        history: &mut Vec<Entry>,
    ) -> Vec<LinkId> {
        let mut by_link: BTreeMap<LinkId, Vec<(Lane, Answer)>> = BTreeMap::new();
        for (link, lane, answer) in answers {
            by_link.entry(link).or_default().push((lane, answer));
        }
        let links: Vec<LinkId> = by_link.keys().copied().collect();
        for (link, answers) in by_link {
            if self.sessions.contains_key(&link) {
                self.deliver_to(link, answers, now_ms, history);
                self.close_finished(link);
                self.close_drained(link);
            }
        }
        links
    }

    fn deliver_to(
        &mut self,
        link: LinkId,
        answers: Vec<(Lane, Answer)>,
        now_ms: u64,
        history: &mut Vec<Entry>,
    ) {
        let mut settled: [Vec<Settled>; 2] = Default::default();
        for (lane, answer) in answers {
            let connection = self.sessions.get_mut(&link).unwrap();
            let device = connection.device;
            connection.in_flight[lane as usize] -= 1;
            match answer {
                Answer::Welcomed(welcomed) => {
                    let (frame, waiting) = match connection.session.handle_welcomed(&welcomed) {
                        Ok(next) => next,
                        Err(violation) => return self.close(link, violation.close_code()),
                    };
                    if let Some(Kind::Welcome(welcome)) = &frame.kind {
                        history.push(Entry::Welcomed {
                            device,
                            welcome: welcome.clone(),
                        });
                    }
                    self.write_frame(link, lane, frame);
                    for (lane, request) in waiting {
                        self.submit(link, lane, request, None, now_ms);
                    }
                }
                Answer::Settled(one) => settled[lane as usize].push(one),
                Answer::Fenced => return self.close(link, CloseCode::FencedEpoch),
            }
        }
        let lanes = settled.iter().filter(|settled| !settled.is_empty()).count();
        let mut written = 0;
        for (lane, settled) in Lane::ALL.into_iter().zip(settled) {
            let connection = self.sessions.get_mut(&link).unwrap();
            let device = connection.device;
            let Some(frame) = connection.session.handle_settled(settled) else {
                continue;
            };
            written += 1;
            if let Some(Kind::Ack(ack)) = &frame.kind {
                history.push(Entry::Acked {
                    link,
                    device,
                    ack: ack.clone(),
                    is_complete: written == lanes,
                });
            }
            self.write_frame(link, lane, frame);
        }
    }

    fn write_frame(&mut self, link: LinkId, lane: Lane, frame: v1::GatewayFrame) {
        let streams = &self.sessions[&link].streams;
        // The device may have let go of the stream; then nobody wants the answer.
        if let Some((at, _)) = streams.iter().find(|(_, stream)| stream.lane == Some(lane)) {
            self.wants.push(Want::Write(link, *at, frame));
        }
    }

    /// Goes on with frames that had arrived when there was no room, and that of other lanes.
    fn resume(&mut self, link: LinkId, now_ms: u64, dice: &mut Dice) {
        let Some(connection) = self.sessions.get(&link) else {
            return;
        };
        let mut begun: Vec<(bool, Option<Lane>, StreamId)> = connection
            .streams
            .iter()
            .map(|(at, stream)| (stream.lane.is_none(), stream.lane, *at))
            .collect();
        begun.sort_unstable();
        for (_, _, at) in begun {
            self.work_through(link, at, now_ms, dice);
        }
    }

    fn work_through(&mut self, link: LinkId, at: StreamId, now_ms: u64, dice: &mut Dice) {
        while let Some(connection) = self.sessions.get_mut(&link) {
            let is_full = REQUESTS_IN_FLIGHT <= connection.in_flight.iter().sum()
                || connection.session.is_out_of_credit();
            let Some(stream) = connection.streams.get_mut(&at) else {
                return;
            };
            if is_full || connection.is_draining {
                return;
            }
            let (lane, frame) = (stream.lane, stream.reader.next::<v1::DeviceFrame>());
            let step = match frame {
                Ok(None) => return,
                Ok(Some(frame)) => connection.session.handle_frame(lane, frame),
                Err(error) => Err(Violation::from(error)),
            };
            match step {
                Ok(Step::Ask(lane, request)) => {
                    self.bind(link, at, lane);
                    let is_batch = matches!(request, Request::Batch { .. });
                    let deferral =
                        (is_batch && dice.hits(self.weather.defer_per_mille)).then(|| Deferral {
                            code: dice.one_of(&[RejectCode::Overloaded, RejectCode::RateLimited]),
                            retry_after_ms: dice.one_of(&[0, 50, 3_000]),
                        });
                    self.submit(link, lane, request, deferral, now_ms);
                }
                Ok(Step::Answer(lane, frame)) => self.write_frame(link, lane, frame),
                Ok(Step::Wait(lane)) => self.bind(link, at, lane),
                // No device of the simulation has a certificate. What is left of it is a contact.
                Ok(Step::Renew(lane, _)) => {
                    self.submit(link, lane, Request::Heartbeat, None, now_ms);
                }
                Ok(Step::Export(..)) => unreachable!("no device of this world wants one"),
                Err(violation) => return self.close(link, violation.close_code()),
            }
        }
    }

    /// Hello has named the stream's lane; with the first one the device becomes this connection's.
    fn bind(&mut self, link: LinkId, at: StreamId, lane: Lane) {
        let connection = self.sessions.get_mut(&link).unwrap();
        connection.streams.get_mut(&at).unwrap().lane = Some(lane);
        if !std::mem::replace(&mut connection.has_claimed, true)
            && let Some(older) = self.current.insert(connection.device, link)
        {
            self.wants.push(Want::TakeOver(older));
        }
    }

    fn submit(
        &mut self,
        link: LinkId,
        lane: Lane,
        request: Request,
        deferral: Option<Deferral>,
        now_ms: u64,
    ) {
        let connection = self.sessions.get_mut(&link).unwrap();
        connection.in_flight[lane as usize] += 1;
        let queue = match request {
            Request::Hello(_) => Lane::Live,
            _ => lane,
        };
        self.queues[queue as usize].push_back(Submission {
            link,
            device: connection.device,
            lane,
            receive_ms: now_ms,
            request,
            deferral,
        });
        self.wants.push(Want::Gather);
    }

    /// Ends our side of streams that the device has finished and that have all their answers.
    fn close_finished(&mut self, link: LinkId) {
        let Some(connection) = self.sessions.get_mut(&link) else {
            return;
        };
        let (in_flight, session) = (connection.in_flight, &mut connection.session);
        let wants = &mut self.wants;
        connection.streams.retain(|at, stream| {
            let Some(lane) = stream.lane.filter(|lane| in_flight[*lane as usize] == 0) else {
                return true;
            };
            if stream.is_finished && !stream.reader.is_inside_frame() {
                session.handle_lane_closed(lane);
                wants.push(Want::Finish(link, *at));
                return false;
            }
            true
        });
    }

    fn close_drained(&mut self, link: LinkId) {
        let is_drained = self
            .sessions
            .get(&link)
            .is_some_and(|connection| connection.is_draining && connection.in_flight == [0; 2]);
        if is_drained {
            self.close(link, CloseCode::ShuttingDown);
        }
    }
}

/// What became of one ping of a batch, of which [`DeviceRecord`] says only the exceptions.
fn fate(judgement: &Judgement, pings: &[Ping], was_settled: bool, seq: u64) -> Fate {
    if let Some((_, code)) = judgement
        .rejects
        .iter()
        .find(|(refused, _)| *refused == seq)
    {
        Fate::Refused(*code)
    } else if judgement.stored.iter().any(|&at| pings[at].seq == seq) {
        Fate::Stored
    } else if was_settled {
        Fate::Duplicate
    } else {
        Fate::Filtered
    }
}

/// As in the gateway.
const REQUESTS_IN_FLIGHT: usize = 64;
