//! What happens between connecting and checking: pings are sent, and what the scenario wants befalls the
//! devices meanwhile.
//!
//! Knows order and pace. Must not know how a device works, or what makes a run right.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use waypost_proto::id::UserId;

use crate::{
    checker::Checker,
    findings::{
        AudienceFindings, AudienceMeasures, BacklogFindings, Findings, GroupFindings, RampFindings,
        StormFindings, StormMeasures, WakeFindings,
    },
    fleet::{Fleet, Pace, per_s},
    group::{Group, Presence},
    link::Handshake,
    local_gateway::LocalGateway,
    progress::Progress,
    readers::Readers,
    recorder::{Recorder, Watched},
    report::Latencies,
    run::Target,
    scenario::{Audience, Course, DuePing, EARLIER, STORMING, Scenario, Source, Storm},
    scrape::UseWatch,
};

/// All that takes part.
pub(crate) struct Stage<'a> {
    pub(crate) scenario: &'a Arc<Scenario>,
    pub(crate) fleet: &'a Arc<Fleet>,
    /// Who asks the gateway, if it can be asked.
    pub(crate) checker: Option<&'a mut Checker>,
    pub(crate) target: &'a Target,
    pub(crate) watched: Watched<'a>,
    pub(crate) recorder: &'a mut Recorder,
    /// The gateway, if it is ours to restart.
    pub(crate) gateway: Option<&'a mut LocalGateway>,
    pub(crate) progress: &'a Progress,
    pub(crate) stop: &'a CancellationToken,
    pub(crate) pace: Pace,
    /// The wall clock at the start of the run.
    pub(crate) start_ms: u64,
}

/// What a course has shown.
#[derive(Debug)]
pub(crate) struct Played {
    /// From the first ping due to the last one acknowledged, the time between passes left out.
    pub(crate) took_us: u64,
    /// How fast the devices connected that were there before the first ping.
    pub(crate) connects_per_s: Option<f64>,
    pub(crate) findings: Option<Findings>,
    /// From durable to read, where that is what the course is about.
    pub(crate) freshness_latencies: Option<Latencies>,
}

impl Stage<'_> {
    /// Plays the scenario from the first connection on until all is settled, or nothing moves any more.
    pub(crate) async fn play(&mut self) -> anyhow::Result<Played> {
        for (at, ping) in self.scenario.held_pings(self.start_ms) {
            self.fleet.hold(at, ping);
        }
        self.fleet.begin_phase();
        let connects_per_s = self.connect_those_who_stay().await?;
        let played = self.play_course(connects_per_s).await;
        self.recorder.look_at_the_end(&self.watched);
        played
    }

    async fn play_course(&mut self, connects_per_s: Option<f64>) -> anyhow::Result<Played> {
        match self.scenario.course.clone() {
            Course::Storm(storm) => {
                let begun_us = self.fleet.now_us();
                let findings = self.storm(storm).await?;
                Ok(Played {
                    took_us: self.since(begun_us),
                    connects_per_s,
                    findings: Some(Findings::Storm(findings)),
                    freshness_latencies: None,
                })
            }
            Course::Freshness(audience) => {
                let (took_us, findings, latencies) = self.freshness(audience).await?;
                Ok(Played {
                    took_us,
                    connects_per_s,
                    findings: Some(Findings::Freshness(findings)),
                    freshness_latencies: Some(latencies),
                })
            }
            Course::Rebind { every } => {
                let rebinder = self.rebind_each(every);
                let played = self.passes(connects_per_s).await;
                let rebinds = rebinder.stop().await?;
                Ok(Played {
                    findings: Some(Findings::Rebind { rebinds }),
                    ..played?
                })
            }
            Course::Calm
            | Course::Ramp
            | Course::Wake { .. }
            | Course::Backlog { .. }
            | Course::Mix
            // Of the bad network only the relay knows.
            | Course::Lossy(_) => self.passes(connects_per_s).await,
        }
    }

    /// The share of a pass that was of use.
    fn since(&self, begun_us: u64) -> u64 {
        self.fleet
            .last_acked_us()
            .map_or(0, |last_us| last_us.saturating_sub(begun_us))
    }

    async fn connect_those_who_stay(&mut self) -> anyhow::Result<Option<f64>> {
        let staying: Vec<usize> = (0..)
            .zip(self.scenario.presences())
            .filter(|(_, presence)| *presence == Presence::Stays)
            .map(|(group, _)| group)
            .collect();
        let begun = Instant::now();
        let mut connected = 0;
        for group in staying {
            self.connect(group..group + 1, self.pace).await?;
            connected += self.fleet.connected_in(group..group + 1);
        }
        Ok((0 < connected).then(|| connected as f64 / begun.elapsed().as_secs_f64()))
    }

    async fn connect(&mut self, groups: Range<usize>, pace: Pace) -> anyhow::Result<()> {
        let sizes = self.scenario.group_sizes();
        let total: usize = sizes[groups.clone()].iter().map(|(_, size)| size).sum();
        self.progress.begin("connecting", Some(total as u64));
        let begun = Instant::now();
        let look = |connected| {
            self.recorder.look(&self.watched);
            self.progress.at(connected, || per_s(connected, begun));
        };
        self.fleet
            .connect_groups(groups, pace, self.stop, look)
            .await
    }

    /// A step begins, to be seen at once and in the charts.
    fn begin(&mut self, step: &'static str, total: Option<u64>) {
        self.progress.begin(step, total);
        self.recorder.mark(self.fleet, step);
    }

    /// Sends everything as often as the scenario wants.
    async fn passes(&mut self, connects_per_s: Option<f64>) -> anyhow::Result<Played> {
        let groups = 0..self.scenario.group_sizes().len();
        let mut took_us = 0;
        let mut joined = Duration::ZERO;
        for pass in 1..=self.scenario.passes {
            if 1 < pass && !self.stop.is_cancelled() {
                self.fleet.disconnect_groups(groups.clone()).await;
                self.connect_those_who_stay().await?;
            }
            let begun_us = self.fleet.now_us();
            let sender = self.send(groups.clone(), pass, self.stop.clone());
            let joining = self.let_others_join();
            self.begin(
                if pass == 1 { "sending" } else { "again" },
                self.scenario.pings_per_pass(),
            );
            self.follow(sender, groups.clone()).await?;
            for joining in joining {
                let took = joining.await.context("connecting has failed")??;
                joined = joined.max(took);
            }
            took_us += self.since(begun_us);
        }
        Ok(Played {
            took_us,
            connects_per_s,
            findings: self.findings(took_us, joined),
            freshness_latencies: None,
        })
    }

    fn findings(&self, took_us: u64, joined: Duration) -> Option<Findings> {
        let Source::Groups(groups) = &self.scenario.source else {
            return None;
        };
        let groups = &groups.groups;
        let latencies = |group| self.fleet.group_latencies(group);
        match self.scenario.course {
            Course::Ramp => Some(Findings::Ramp(RampFindings::new(
                self.fleet.connected(),
                joined.as_secs_f64(),
            ))),
            Course::Wake { round_trip, .. } => {
                let kinds = [Handshake::Full, Handshake::Resumed, Handshake::EarlyData];
                let by_handshake = kinds.map(|kind| self.fleet.latencies_after(0, kind));
                let findings = WakeFindings::new(&latencies(0), &by_handshake, round_trip);
                Some(Findings::Wake(findings))
            }
            Course::Backlog { fresh_within } => Some(Findings::Backlog(BacklogFindings::new(
                groups.first().map_or(0, Group::held),
                &latencies(0),
                Duration::from_micros(took_us),
                fresh_within,
            ))),
            Course::Mix => {
                let of = |(at, group): (usize, &Group)| {
                    let (sent, acked) = self.fleet.counts_of(at);
                    GroupFindings::new(group, sent, acked, &latencies(at))
                };
                let groups = groups.iter().enumerate().map(of).collect();
                Some(Findings::Mix { groups })
            }
            // The others are found out elsewhere.
            Course::Calm
            | Course::Rebind { .. }
            | Course::Lossy(_)
            | Course::Storm(_)
            | Course::Freshness(_) => None,
        }
    }

    /// Hands each ping to its device when it is due, until all are or `stop` is cancelled.
    fn send(&self, groups: Range<usize>, pass: u32, stop: CancellationToken) -> JoinHandle<()> {
        let (fleet, scenario) = (self.fleet.clone(), self.scenario.clone());
        let start_ms = self.start_ms;
        spawn_blocking(move || hand_out(&fleet, &scenario, groups, pass, start_ms, &stop))
    }

    /// Lets those connect who do so while pings are sent.
    fn let_others_join(&self) -> Vec<Joining> {
        let mut joining = Vec::new();
        for (group, presence) in self.scenario.presences().into_iter().enumerate() {
            let (after, pace) = match presence {
                Presence::Stays => continue,
                Presence::Wakes => {
                    self.fleet.wake_when_needed(group);
                    continue;
                }
                Presence::Joins { per_s } => (
                    Duration::ZERO,
                    Pace {
                        per_s: per_s.or(self.pace.per_s),
                        ..self.pace
                    },
                ),
                Presence::Returns { after, .. } => (after, self.pace),
            };
            let (fleet, stop) = (self.fleet.clone(), self.stop.clone());
            let task = tokio::spawn(async move {
                tokio::select! {
                    () = sleep(after) => {}
                    () = stop.cancelled() => {}
                }
                let begun = Instant::now();
                fleet
                    .connect_groups(group..group + 1, pace, &stop, |_| {})
                    .await?;
                Ok(begun.elapsed())
            });
            joining.push(AbortOnDropHandle::new(task));
        }
        joining
    }

    fn rebind_each(&self, every: Duration) -> Rebinder {
        let fleet = self.fleet.clone();
        let end = CancellationToken::new();
        let end_of_task = end.clone();
        let rebinds = Arc::new(AtomicU64::new(0));
        let rebinds_of_task = rebinds.clone();
        let task = tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = sleep(every) => {}
                    () = end_of_task.cancelled() => return Ok(()),
                }
                fleet.rebind()?;
                rebinds_of_task.fetch_add(1, Ordering::Relaxed);
            }
        });
        Rebinder { end, rebinds, task }
    }

    /// Waits until a pass is sent and settled, or until nothing moves any more.
    async fn follow(
        &mut self,
        mut sender: JoinHandle<()>,
        groups: Range<usize>,
    ) -> anyhow::Result<()> {
        let acked_before = self.fleet.acked();
        let mut ticks = ticks();
        let mut is_sent = false;
        let mut moved = (self.fleet.acked(), Instant::now());
        loop {
            tokio::select! {
                sent = &mut sender, if !is_sent => {
                    sent.context("the sender has failed")?;
                    is_sent = true;
                    moved.1 = Instant::now();
                }
                _ = ticks.tick() => {}
            }
            let acked = self.fleet.acked();
            if acked != moved.0 {
                moved = (acked, Instant::now());
            }
            let is_settled = self.fleet.open_in(groups.clone()) == 0;
            if is_sent && (is_settled || SETTLE_PATIENCE <= moved.1.elapsed()) {
                return Ok(());
            }
            self.look(acked - acked_before);
        }
    }

    /// Waits until something is so, and goes on recording. False if it never is, or the run is stopped.
    async fn until(&mut self, mut done: impl FnMut(&Fleet) -> (u64, bool)) -> bool {
        let mut ticks = ticks();
        let mut moved = (0, Instant::now());
        loop {
            ticks.tick().await;
            let (count, is_so) = done(self.fleet);
            self.look(count);
            if is_so {
                return true;
            }
            if count != moved.0 {
                moved = (count, Instant::now());
            }
            if self.stop.is_cancelled() || SETTLE_PATIENCE <= moved.1.elapsed() {
                return false;
            }
        }
    }

    fn look(&mut self, done: u64) {
        self.recorder.look(&self.watched);
        let line = || self.recorder.line(&self.watched);
        self.progress.at(done, line);
    }

    /// The established devices report all the time. They are measured for a while, and again while all
    /// others reconnect, and afterwards.
    async fn storm(&mut self, storm: Storm) -> anyhow::Result<StormFindings> {
        let (established, storming) = (0..STORMING, STORMING..STORMING + 1);
        let [(_, established_devices), (_, storming_devices)] = &self.scenario.group_sizes()[..]
        else {
            bail!("a storm has two groups");
        };
        let (established_devices, total) = (*established_devices as u64, *storming_devices as u64);
        let scenario = self.scenario;
        let mut laps = scenario.pings(storming.clone(), self.start_ms);
        let enough = CancellationToken::new();
        let sender = self.send(established.clone(), 1, enough.clone());
        let _end = enough.clone().drop_guard();

        self.begin("first lap", Some(total));
        let is_served = self
            .send_a_lap_in_turn(STORMING, MOST_OPEN_PINGS, &mut laps, |fleet, due_ping| {
                fleet.send(due_ping.device, due_ping.ping, fleet.now_us());
            })
            .await;
        ensure!(
            is_served || self.stop.is_cancelled(),
            "the devices that are to storm were not served before"
        );
        self.begin("calm", None);
        let before = self.measured_for(storm.calm).await;

        self.fleet.begin_phase();
        self.begin("leaving", None);
        self.fleet.disconnect_groups(storming.clone()).await;
        let mut established_back = None;
        if let (Some(how), Some(gateway)) = (storm.restart, self.gateway.as_deref_mut()) {
            self.progress.begin("restarting", None);
            self.recorder.mark(self.fleet, "restarting");
            let begun = Instant::now();
            gateway.restart(how).await?;
            self.begin("returning", Some(established_devices));
            let is_back = self
                .until(|fleet| {
                    let connected = fleet.connected_in(0..STORMING);
                    (connected, connected == established_devices)
                })
                .await;
            ensure!(
                is_back || self.stop.is_cancelled(),
                "the established devices did not come back after the restart"
            );
            established_back = Some(begun.elapsed());
        }
        // What fell due while they were away is answered first.
        self.pause(storm.calm / 2).await;

        self.fleet.begin_phase();
        let during = self.phase();
        self.begin("storm", Some(total));
        self.send_a_lap(&mut laps);
        let begun = Instant::now();
        let knocking = {
            let (fleet, stop, pace) = (self.fleet.clone(), self.stop.clone(), self.pace);
            let groups = storming.clone();
            AbortOnDropHandle::new(tokio::spawn(async move {
                fleet
                    .connect_groups(groups, pace, &stop, |_| {})
                    .await
                    .map(|()| Instant::now())
            }))
        };
        let is_served = self
            .until(|fleet| {
                let connected = fleet.connected_in(STORMING..STORMING + 1);
                let open = fleet.open_in(STORMING..STORMING + 1);
                (total - open.min(total), connected == total && open == 0)
            })
            .await;
        let all_answered = begun.elapsed();
        let served = self.fleet.connected_in(storming);
        let connected = match is_served {
            true => knocking.await.context("the storm has failed")?? - begun,
            false => all_answered,
        };

        self.begin("calm again", None);
        let after = self.measured_for(storm.calm).await;
        enough.cancel();
        self.progress.begin("settling", None);
        self.follow(sender, 0..STORMING + 1).await?;
        let measures = StormMeasures {
            established: established_devices,
            storming: total,
            established_back,
            served,
            all_served: is_served,
            connected,
            all_answered,
            latencies: [before, during, after].map(|phase| self.fleet.phase_latencies(0, phase)),
        };
        Ok(StormFindings::new(&storm, &measures))
    }

    /// Checkers watch everybody while some report. After a quarter of the time the slow ones read a byte a second,
    /// and freely again in the end. For how long pings were answered, what was found, and how long those waited who
    /// are never slow, while others were.
    async fn freshness(
        &mut self,
        audience: Audience,
    ) -> anyhow::Result<(u64, AudienceFindings, Latencies)> {
        let asker = self.checker.take().zip(self.target.freshness);
        let (checker, service) = asker.context("nobody can watch without --freshness")?;
        let users: Vec<UserId> = self.scenario.devices().iter().map(|id| id.user).collect();
        self.let_earlier_ones_come().await?;

        self.begin("watching", Some(audience.checkers.into()));
        let (pki, slow) = (&self.target.pki, audience.slow_readers);
        let readers = Readers::start(service, pki, &users, audience.checkers, slow).await?;
        self.until_level(checker, &readers).await?;
        if let Some(end) = readers.first_end() {
            bail!("a checker was not served: {end}");
        }
        readers.begin_counting();

        let enough = CancellationToken::new();
        let sender = self.send(0..EARLIER, 1, enough.clone());
        let _end = enough.clone().drop_guard();
        let (begun, begun_us) = (Instant::now(), self.fleet.now_us());
        self.begin("all read", None);
        readers.begin_phase();
        self.pause(audience.duration / 4).await;
        self.begin("some slow", None);
        readers.begin_phase();
        readers.slow_down();
        self.pause(audience.duration * 3 / 4).await;
        let (entries, (_, updates)) = (readers.entries(), self.fleet.counts_of(0));
        let seconds = begun.elapsed().as_secs_f64();
        enough.cancel();
        self.progress.begin("settling", None);
        self.follow(sender, 0..EARLIER).await?;
        let took_us = self.since(begun_us);

        self.begin("all level", Some(audience.checkers.into()));
        let behind = readers.behind();
        readers.let_go();
        let let_go = Instant::now();
        let position = self.until_level(checker, &readers).await?;
        let caught_up = let_go.elapsed();
        let known = checker.get(&users).await?.entries;
        let bytes = self.watched.usage.and_then(UseWatch::most_lagging_bytes);
        let during = readers.latencies(1);
        let measures = AudienceMeasures {
            users: users.len() as u64,
            latencies: [readers.latencies(0), during.clone()],
            updates_per_s: updates as f64 / seconds,
            entries_per_s: entries as f64 / seconds,
            behind,
            caught_up,
            slow_reader_bytes: bytes.filter(|_| 0 < slow),
            readings: readers.readings(position, &known),
        };
        Ok((took_us, AudienceFindings::new(&audience, measures), during))
    }

    /// Those who are known to the gateway and not there any more connect, ping and leave.
    async fn let_earlier_ones_come(&mut self) -> anyhow::Result<()> {
        let Some((_, earlier)) = self.scenario.group_sizes().get(EARLIER).cloned() else {
            return Ok(());
        };
        let (group, scenario) = (EARLIER..EARLIER + 1, self.scenario);
        self.begin("earlier", Some(earlier as u64));
        self.fleet.wake_when_needed(EARLIER);
        let mut lap = scenario.pings(group.clone(), self.start_ms);
        let at_once = self.pace.at_once;
        let hold = |fleet: &Fleet, due: DuePing| fleet.hold(due.device, due.ping);
        let are_known = self
            .send_a_lap_in_turn(EARLIER, at_once, &mut lap, hold)
            .await;
        let have_left = self
            .until(|fleet| {
                let there = fleet.connected_in(group.clone());
                (earlier as u64 - there, there == 0)
            })
            .await;
        ensure!(
            (are_known && have_left) || self.stop.is_cancelled(),
            "not all of those were served who come once, before"
        );
        Ok(())
    }

    /// Waits for all readers whose stream goes on to be told of everything, at a time when nothing more happens. The
    /// newest commit. Goes on when the run is stopped: what was sent is still to be told.
    async fn until_level(
        &mut self,
        checker: &mut Checker,
        readers: &Readers,
    ) -> anyhow::Result<u64> {
        let mut ticks = ticks();
        let mut moved = (0, Instant::now());
        for _ in 0..MOST_LOOKS_FOR_QUIET {
            let position = checker.position().await?;
            loop {
                let (level, waiting) = readers.level(position);
                if waiting == 0 || SETTLE_PATIENCE <= moved.1.elapsed() {
                    break;
                }
                let told = level + readers.told();
                if told != moved.0 {
                    moved = (told, Instant::now());
                }
                ticks.tick().await;
                self.look(level);
            }
            if checker.position().await? == position {
                return Ok(position);
            }
        }
        bail!("others change users as well, so what checkers are told cannot be counted");
    }

    /// The phase that has just begun.
    fn phase(&self) -> usize {
        self.fleet.phases() - 1
    }

    /// Begins a phase and lets it last; its number.
    async fn measured_for(&mut self, calm: Duration) -> usize {
        self.fleet.begin_phase();
        let phase = self.phase();
        self.pause(calm).await;
        phase
    }

    async fn pause(&mut self, length: Duration) {
        let end = Instant::now() + length;
        self.until(|fleet| (fleet.acked(), end <= Instant::now()))
            .await;
    }

    /// One ping of each device of a group, no more than `at_once` at a time: all of them at once would be a storm
    /// before what is to be measured. False if they are not all answered.
    async fn send_a_lap_in_turn(
        &mut self,
        group: usize,
        at_once: u64,
        laps: &mut impl Iterator<Item = DuePing>,
        send: impl Fn(&Fleet, DuePing),
    ) -> bool {
        let devices = self.scenario.group_sizes()[group].1;
        let mut lap = laps.take(devices).peekable();
        let mut sent = 0;
        self.until(|fleet| {
            let mut open = fleet.open_in(group..group + 1);
            let answered = sent - open;
            while open < at_once
                && let Some(due_ping) = lap.next()
            {
                send(fleet, due_ping);
                open += 1;
                sent += 1;
            }
            (answered, open == 0 && lap.peek().is_none())
        })
        .await
    }

    /// One ping of each storming device, due now.
    fn send_a_lap(&self, laps: &mut impl Iterator<Item = DuePing>) {
        let devices = self.scenario.group_sizes()[STORMING].1;
        let due_us = self.fleet.now_us();
        for due_ping in laps.take(devices) {
            self.fleet.send(due_ping.device, due_ping.ping, due_us);
        }
    }
}

/// A group that connects while pings are sent; how long that took.
type Joining = AbortOnDropHandle<anyhow::Result<Duration>>;

/// Changes ports until it is told to stop.
struct Rebinder {
    end: CancellationToken,
    rebinds: Arc<AtomicU64>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Rebinder {
    async fn stop(self) -> anyhow::Result<u64> {
        self.end.cancel();
        self.task.await.context("the rebinding has failed")??;
        Ok(self.rebinds.load(Ordering::Relaxed))
    }
}

/// Hands each ping to its device when it is due. On a thread of its own, because tokio's timers wake only
/// once a millisecond, which would be seen in every latency.
fn hand_out(
    fleet: &Fleet,
    scenario: &Scenario,
    groups: Range<usize>,
    pass: u32,
    start_ms: u64,
    stop: &CancellationToken,
) {
    let begun_us = fleet.now_us();
    for due_ping in scenario.pings(groups, start_ms) {
        let due_us = if scenario.is_paced() {
            let due_us = begun_us + u64::try_from(due_ping.due.as_micros()).unwrap_or(u64::MAX / 2);
            while fleet.now_us() < due_us && !stop.is_cancelled() {
                thread::sleep(
                    Duration::from_micros(due_us - fleet.now_us().min(due_us)).min(STOP_LATENCY),
                );
            }
            due_us
        } else {
            while MOST_OPEN_PINGS <= fleet.open() && !stop.is_cancelled() {
                thread::sleep(ROOM_INTERVAL);
            }
            fleet.now_us()
        };
        if stop.is_cancelled() {
            return;
        }
        if pass == 1 {
            fleet.send(due_ping.device, due_ping.ping, due_us);
        } else {
            fleet.send_again(due_ping.device, due_ping.ping, due_us);
        }
    }
}

fn ticks() -> tokio::time::Interval {
    let mut ticks = interval(LIVE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// How many pings wait for acknowledgement at a time when nothing is paced.
const MOST_OPEN_PINGS: u64 = 2_000;
/// A run is given up when nothing was acknowledged for this long: a gateway that was killed has time to
/// come back.
const SETTLE_PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked for a moment in which the gateway has nothing new to tell.
const MOST_LOOKS_FOR_QUIET: usize = 10;
const LIVE_INTERVAL: Duration = Duration::from_millis(200);
const STOP_LATENCY: Duration = Duration::from_millis(100);
const ROOM_INTERVAL: Duration = Duration::from_micros(200);
