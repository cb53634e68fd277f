//! What a checker was told, judged against the model.
//!
//! Knows the promises of a Watch stream, one after the other as `freshness.proto` makes them. Must not know how
//! streams are made or read: it takes what was written down, in order.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use waypost_gateway::{
    coverage::{Reason, Span},
    deadlines::{Event, Kind as Lateness},
    grants::CheckerSet,
    sharing::{Sharing, Transition, Turn},
};
use waypost_proto::{
    id::UserId,
    v1::{
        self, Coverage, Deadline, Entry, Header, Progress, SnapshotEnd, State, deadline,
        watch_event::Kind,
    },
};

use crate::history::{History, Value};

/// What a subscriber wrote down.
#[derive(Clone, Debug)]
pub(crate) enum Said {
    /// A stream begins, with the token that came here in the log; or anew.
    Began { with: Option<usize> },
    /// A stream begins with a token that was tampered with.
    BeganForged,
    /// It was told something.
    Told(Kind),
    /// The stream is gone.
    Ended,
}

/// Which users a subscriber selects.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    /// None for all.
    pub(crate) users: Option<BTreeSet<UserId>>,
    /// Only entries of those who are active: none who was never seen or has paused.
    pub(crate) is_active_only: bool,
}

/// What is true, when all is quiet.
#[derive(Debug)]
pub(crate) struct Truth<'a> {
    pub(crate) history: &'a History,
    /// Spans as they are at the end.
    pub(crate) spans: &'a [Span],
    /// The subscriber's checker, as a set.
    pub(crate) checker: CheckerSet,
    /// All events of the subscriber's checker, by position.
    pub(crate) events: &'a [Event],
    /// All transitions, in order.
    pub(crate) transitions: &'a [Transition],
    /// Whoever had a deadline taken away: a LATE may then stand without a RECOVERED.
    pub(crate) released: &'a BTreeSet<UserId>,
}

/// What was judged and found right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) entries: u64,
    pub(crate) coalesced: u64,
    pub(crate) announced: u64,
    pub(crate) snapshots: u64,
    pub(crate) resumed: u64,
    pub(crate) resets: u64,
    pub(crate) spans: u64,
    pub(crate) late: u64,
    pub(crate) recovered: u64,
    pub(crate) transitions: u64,
    /// Users who were said to have withdrawn their grant.
    pub(crate) withdrawals: u64,
    /// Users of whom something was told again after that.
    pub(crate) grants: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: Self) {
        self.entries += other.entries;
        self.coalesced += other.coalesced;
        self.announced += other.announced;
        self.snapshots += other.snapshots;
        self.resumed += other.resumed;
        self.resets += other.resets;
        self.spans += other.spans;
        self.late += other.late;
        self.recovered += other.recovered;
        self.transitions += other.transitions;
        self.withdrawals += other.withdrawals;
        self.grants += other.grants;
    }
}

/// What a checker that works through a stream would have stored beside its token.
#[derive(Clone, Debug, Default)]
struct View {
    users: BTreeMap<UserId, Entry>,
    late: BTreeSet<UserId>,
    /// Nothing at or below may come later.
    announced: u64,
}

/// What is known of one stream.
#[derive(Clone, Debug, Default)]
struct Stream {
    has_begun: bool,
    expects_reset: bool,
    /// The entries so far, while the snapshot lasts.
    snapshot: Option<u64>,
    /// Where it began: after a token, or at the end of its snapshot.
    base: u64,
    resolved_ms: u64,
    /// Whether it has said once that it was level.
    was_level: bool,
    is_resumed: bool,
    /// The position that it handed out last of each user.
    had: BTreeMap<UserId, u64>,
    spans: Vec<Coverage>,
    /// Since its base.
    events: Vec<(u64, UserId, i32)>,
    transitions: Vec<v1::Transition>,
    /// Who was said on it to have withdrawn, and when.
    withdrawn: BTreeMap<UserId, u64>,
}

/// Judges all that a subscriber was told. The last thing must be an announcement of everything.
///
/// # Errors
/// The first promise that was broken, and what was told last.
pub(crate) fn judge(
    log: &[Said],
    selection: &Selection,
    truth: &Truth<'_>,
) -> Result<Tally, String> {
    let mut judge = Judge {
        selection,
        truth,
        decided: decided(truth),
        view: View::default(),
        stream: None,
        saved: BTreeMap::new(),
        tally: Tally::default(),
    };
    for (at, said) in log.iter().enumerate() {
        judge.hear(at, said).map_err(|wrong| {
            let last: Vec<_> = log[at.saturating_sub(LAST_SAID)..=at]
                .iter()
                .map(|said| format!("  {said:?}"))
                .collect();
            format!("{wrong}\ntold last:\n{}", last.join("\n"))
        })?;
    }
    judge.end()?;
    Ok(judge.tally)
}

/// A user who is late recovers with the next contact that shows, if not before under a new setting.
///
/// # Errors
/// The LATE that stands although the user was heard.
pub(crate) fn whoever_came_back_has_recovered(truth: &Truth<'_>) -> Result<(), String> {
    let events = truth.events.iter().enumerate();
    let late = events.filter(|(_, event)| event.kind == Lateness::Late);
    for (at, event) in late.filter(|(_, event)| !truth.released.contains(&event.user)) {
        let next = truth.history.next(&event.user, event.position);
        let Some(next) = next.map(|value| value.position) else {
            continue;
        };
        let mut since = truth.events[at..].iter();
        let has_recovered = since.any(|later| {
            later.user == event.user && later.kind == Lateness::Recovered && later.position <= next
        });
        if !has_recovered {
            return Err(format!(
                "{event:?} stands, and the user was heard at {next}"
            ));
        }
    }
    Ok(())
}

struct Judge<'a> {
    selection: &'a Selection,
    truth: &'a Truth<'a>,
    /// What holders decided of this checker, by position: whether it may be told. Until then it might.
    decided: BTreeMap<UserId, Vec<(u64, bool)>>,
    view: View,
    stream: Option<Stream>,
    /// The view at each token, by its place in the log.
    saved: BTreeMap<usize, View>,
    tally: Tally,
}

impl Judge<'_> {
    fn hear(&mut self, at: usize, said: &Said) -> Result<(), String> {
        match said {
            Said::Began { with } => {
                if let Some(token) = with {
                    self.view = self.saved[token].clone();
                }
                self.begin(with.is_some(), false);
            }
            Said::BeganForged => self.begin(true, true),
            Said::Ended => self.stream = None,
            Said::Told(told) => {
                let mut stream = self
                    .stream
                    .take()
                    .ok_or("something was told on no stream")?;
                self.told(told, &mut stream)?;
                self.stream = Some(stream);
                if matches!(told, Kind::SnapshotEnd(_) | Kind::Progress(_)) {
                    self.saved.insert(at, self.view.clone());
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, is_resumed: bool, expects_reset: bool) {
        // The token of an empty store is followed by a snapshot, as it says of itself.
        let is_resumed = is_resumed && (expects_reset || 0 < self.view.announced);
        if !is_resumed {
            self.view = View::default();
        }
        self.stream = Some(Stream {
            expects_reset,
            is_resumed,
            snapshot: (!is_resumed).then_some(0),
            base: self.view.announced,
            ..Stream::default()
        });
    }

    fn told(&mut self, told: &Kind, stream: &mut Stream) -> Result<(), String> {
        if let Kind::Header(header) = told {
            return self.header(header, stream);
        }
        if !stream.has_begun {
            return Err("something was told before the header".to_owned());
        }
        if stream.expects_reset && !matches!(told, Kind::Reset(_)) {
            return Err("a token that was tampered with was taken for good".to_owned());
        }
        match told {
            Kind::Header(_) => unreachable!("looked at above"),
            Kind::Reset(_) => {
                if !std::mem::take(&mut stream.expects_reset) {
                    return Err("a good token was answered with a reset".to_owned());
                }
                self.tally.resets += 1;
                self.view = View::default();
                stream.is_resumed = false;
                stream.snapshot = Some(0);
                stream.base = 0;
                Ok(())
            }
            Kind::Entry(entry) => self.entry(entry, stream),
            Kind::SnapshotEnd(end) => self.snapshot_end(end, stream),
            Kind::Progress(progress) => self.progress(progress, stream),
            Kind::Coverage(span) => self.coverage(span, stream),
            Kind::Deadline(event) => self.deadline(event, stream),
            Kind::Transition(transition) => self.transition(transition, stream),
        }
    }

    fn header(&mut self, header: &Header, stream: &mut Stream) -> Result<(), String> {
        if std::mem::replace(&mut stream.has_begun, true) {
            return Err("a second header".to_owned());
        }
        let begins_at = if stream.is_resumed && !stream.expects_reset {
            stream.base
        } else {
            0
        };
        if header.position != begins_at {
            return Err(format!(
                "a stream that should begin after {begins_at} begins after {}",
                header.position
            ));
        }
        if stream.is_resumed {
            self.tally.resumed += u64::from(!stream.expects_reset);
        }
        Ok(())
    }

    fn entry(&mut self, entry: &Entry, stream: &mut Stream) -> Result<(), String> {
        self.tally.entries += 1;
        let user = user_of(&entry.user)?;
        if !self.selects(&user) {
            return Err(format!("{user} was not asked for"));
        }
        if let Some(count) = &mut stream.snapshot {
            *count += 1;
        }
        match entry.state() {
            State::NeverSeen => return self.never_seen(user, entry, stream),
            State::Withdrawn => return self.withdrawn(user, entry, stream),
            _ => {}
        }
        self.is_news(entry.position, "an entry")?;
        let Some(value) = self.value_at(&user, entry.position) else {
            return Err(format!("{user} did not change at {}", entry.position));
        };
        is_as_it_was(entry, &value)?;
        self.may_be_told(&user, entry.position, stream)?;
        if stream.withdrawn.remove(&user).is_some() {
            self.tally.grants += 1;
        }
        if self.selection.is_active_only && value.state != State::Active {
            return Err(format!(
                "{entry:?} was told to one who asked for nobody in this state"
            ));
        }
        let had = stream.had.insert(user, entry.position);
        if had.is_some_and(|had| entry.position <= had) {
            return Err(format!(
                "{user} was told at {had:?}, and then at {}",
                entry.position
            ));
        }
        if let Some(before) = self.view.users.get(&user)
            && (entry.position < before.position
                || entry.last_contact_ms < before.last_contact_ms
                || entry.last_sample_ms < before.last_sample_ms
                || entry.last_fix_ms < before.last_fix_ms)
        {
            return Err(format!("{user} went back from {before:?}"));
        }
        self.coalesced(&user, entry, had, stream)?;
        self.view.users.insert(user, entry.clone());
        Ok(())
    }

    fn never_seen(&mut self, user: UserId, entry: &Entry, stream: &Stream) -> Result<(), String> {
        let is_named = self.selection.users.is_some() && !self.selection.is_active_only;
        let is_first = !self.view.users.contains_key(&user);
        let is_empty = Entry {
            user: entry.user.clone(),
            state: State::NeverSeen.into(),
            ..Entry::default()
        } == *entry;
        if stream.snapshot.is_none() || !is_named || !is_first || !is_empty {
            return Err(format!("{user} cannot be said to be never seen here"));
        }
        self.view.users.insert(user, entry.clone());
        Ok(())
    }

    /// The holder has withdrawn the grant: that is told once, after the transition, or to whoever asks for the user by name
    /// with the snapshot.
    fn withdrawn(&mut self, user: UserId, entry: &Entry, stream: &Stream) -> Result<(), String> {
        let is_empty = Entry {
            user: entry.user.clone(),
            state: State::Withdrawn.into(),
            position: entry.position,
            ..Entry::default()
        } == *entry;
        let was_granted = self
            .decided_of(&user)
            .iter()
            .all(|(_, is_granted)| *is_granted);
        let is_named = self.selection.users.is_some() && stream.snapshot.is_some();
        let is_first = !self.view.users.contains_key(&user);
        let is_in_place = match entry.position {
            0 => is_named && is_first,
            position => stream.withdrawn.get(&user) == Some(&position) && is_first,
        };
        if !is_empty || was_granted || self.selection.is_active_only || !is_in_place {
            return Err(format!("{entry:?} cannot be said here"));
        }
        self.tally.withdrawals += 1;
        self.view.users.insert(user, entry.clone());
        Ok(())
    }

    /// A user as of a commit that changed the user, or let the checker be told of the user.
    fn value_at(&self, user: &UserId, position: u64) -> Option<Value> {
        let value = self.truth.history.at(user, position)?;
        let is_granted = self.decided_of(user).contains(&(position, true));
        (value.position == position || is_granted).then_some(Value { position, ..*value })
    }

    fn decided_of(&self, user: &UserId) -> &[(u64, bool)] {
        self.decided.get(user).map_or(&[], Vec::as_slice)
    }

    /// Nothing is told of a user after the checker was told that the grant was withdrawn, nor of a time after a withdrawal
    /// that lasts. What is told when it was granted again is of before that, if nothing has changed since.
    fn may_be_told(&self, user: &UserId, position: u64, stream: &Stream) -> Result<(), String> {
        let decided = self.decided_of(user);
        let until = decided.partition_point(|(at, _)| *at <= position);
        let is_granted = until.checked_sub(1).is_none_or(|last| decided[last].1);
        let was_granted_after = |at: u64| {
            let mut later = decided.iter().filter(|(granted, _)| at < *granted);
            later.any(|(_, is_granted)| *is_granted)
        };
        let known = self.view.users.get(user);
        let known = known.filter(|entry| entry.state() == State::Withdrawn);
        let known = known.map(|entry| entry.position);
        let told = stream.withdrawn.get(user).copied().max(known);
        if told.is_some_and(|told| !was_granted_after(told)) {
            return Err(format!(
                "{user} was told of at {position}, and was said to have withdrawn at {told:?}"
            ));
        }
        if !is_granted && !was_granted_after(position) {
            return Err(format!(
                "{user} was told of at {position}, and has withdrawn: {decided:?}"
            ));
        }
        Ok(())
    }

    /// Whether the checker may be told of a user since a position, without end.
    fn is_granted_since(&self, user: &UserId, position: u64) -> bool {
        let last = self.decided_of(user).last();
        last.is_none_or(|(at, is_granted)| *is_granted && *at <= position)
    }

    /// Since when the user has withdrawn, for good.
    fn withdrawn_since(&self, user: &UserId) -> Option<u64> {
        let last = self.decided_of(user).last()?;
        (!last.1).then_some(last.0)
    }

    /// Every change of a user was told on this stream or counted.
    fn coalesced(
        &mut self,
        user: &UserId,
        entry: &Entry,
        had: Option<u64>,
        stream: &Stream,
    ) -> Result<(), String> {
        let coalesced = u64::from(entry.coalesced);
        self.tally.coalesced += coalesced;
        if !self.decided_of(user).is_empty() {
            // What changes while the grant is withdrawn is nobody's to count.
            return Ok(());
        }
        let since = had.unwrap_or(if stream.is_resumed { stream.base } else { 0 });
        let missed = self
            .truth
            .history
            .changes_between(user, since, entry.position);
        let (least, most) = match (stream.snapshot, had) {
            (Some(_), _) => (0, 0),
            // Only what changed since the stream was resumed is counted, and when exactly that was, it does not say.
            (None, None) if stream.is_resumed && !stream.was_level => (0, missed),
            // What it did not want, it did not miss.
            (None, _) if self.selection.is_active_only => (0, missed),
            (None, _) => (missed, missed),
        };
        if coalesced < least || most < coalesced {
            return Err(format!(
                "{user} was told at {} with {coalesced} values overtaken since {since}, and there were {missed}",
                entry.position
            ));
        }
        Ok(())
    }

    fn snapshot_end(&mut self, end: &SnapshotEnd, stream: &mut Stream) -> Result<(), String> {
        let Some(count) = stream.snapshot.take() else {
            return Err("a snapshot ended that had not begun".to_owned());
        };
        if count != end.count {
            return Err(format!(
                "a snapshot of {count} entries said it had {}",
                end.count
            ));
        }
        self.tally.snapshots += 1;
        for user in self.selection.users.iter().flatten() {
            if !self.selection.is_active_only && !self.view.users.contains_key(user) {
                return Err(format!(
                    "{user} was asked for by name and is not in the snapshot"
                ));
            }
        }
        self.announce(end.position, stream)?;
        let late: BTreeSet<_> = self.late_at(end.position).collect();
        let told = &self.view.late;
        if let Some(user) = late
            .symmetric_difference(told)
            .find(|&user| !self.truth.released.contains(user))
        {
            return Err(format!(
                "at {} {late:?} were late, and the snapshot said {told:?}: {user} differs",
                end.position
            ));
        }
        stream.base = end.position;
        stream.events.clear();
        // Those that came ahead of it count for what is announced next.
        stream
            .transitions
            .retain(|told| end.position < told.position);
        Ok(())
    }

    fn progress(&mut self, progress: &Progress, stream: &mut Stream) -> Result<(), String> {
        if stream.snapshot.is_some() {
            return Err("progress was told before the snapshot was complete".to_owned());
        }
        if progress.position < self.view.announced || progress.resolved_ms < stream.resolved_ms {
            return Err(format!(
                "progress went back from {} at {}",
                stream.resolved_ms, self.view.announced
            ));
        }
        stream.resolved_ms = progress.resolved_ms;
        stream.was_level |= progress.resolved_ms != 0;
        self.announce(progress.position, stream)?;
        for user in self.wanted_at(progress.position, &stream.transitions) {
            let heard_ms = self.truth.history.heard_by(&user, progress.resolved_ms);
            let told_ms = self
                .view
                .users
                .get(&user)
                .map_or(0, |entry| entry.last_contact_ms);
            if told_ms < heard_ms {
                return Err(format!(
                    "{user} was called silent since {told_ms} as of {}, and was heard at {heard_ms}",
                    progress.resolved_ms
                ));
            }
        }
        let events = self.truth.events.iter();
        let due: Vec<_> = events
            .filter(|event| stream.base < event.position && event.position <= progress.position)
            .filter(|event| self.selects(&event.user))
            .map(|event| (event.position, event.user, number(event.kind)))
            .collect();
        if due != stream.events {
            return Err(format!(
                "of the events between {} and {} these should have been told: {due:?}, and these were: {:?}",
                stream.base, progress.position, stream.events
            ));
        }
        let transitions = self.truth.transitions.iter();
        // Of those who have withdrawn meanwhile, it depends on the moment what is told.
        let has_decided = |user: &[u8]| self.decided.keys().any(|decided| decided.0 == user);
        let due: Vec<_> = transitions
            .filter(|it| stream.base < it.position && it.position <= progress.position)
            .filter(|it| self.selects(&it.user))
            .filter_map(as_told)
            .filter(|it| it.state() != State::Withdrawn && !has_decided(&it.user))
            .collect();
        let told = stream.transitions.iter();
        let told: Vec<_> = told
            .filter(|told| told.position <= progress.position && !has_decided(&told.user))
            .cloned()
            .collect();
        if due != told {
            return Err(format!(
                "of the transitions between {} and {} these should have been told: {due:?}, and these were: {told:?}",
                stream.base, progress.position
            ));
        }
        Ok(())
    }

    /// Nothing at or below this position will come later: so all of it must be here.
    fn announce(&mut self, position: u64, stream: &Stream) -> Result<(), String> {
        self.tally.announced += 1;
        for user in self.wanted_at(position, &stream.transitions) {
            let Some(value) = self.truth.history.at(&user, position) else {
                continue;
            };
            let told = self.view.users.get(&user).map_or(0, |entry| entry.position);
            if told < value.position {
                return Err(format!(
                    "{position} was announced, and {user} was told at {told} and not at {}",
                    value.position
                ));
            }
        }
        for (user, entry) in &self.view.users {
            let since = self
                .withdrawn_since(user)
                .filter(|since| *since <= position);
            let is_untold = [State::Withdrawn, State::NeverSeen].contains(&entry.state());
            if let Some(since) = since
                && !is_untold
            {
                return Err(format!(
                    "{position} was announced, and it was not told that {user} withdrew at {since}: {entry:?}"
                ));
            }
        }
        let missing = self.truth.spans.iter().find(|span| {
            let is_told = stream.spans.iter().any(|told| is_same(span, told));
            stream.base < span.position && span.position <= position && !is_told
        });
        if let Some(span) = missing {
            return Err(format!(
                "before {position} was announced, {span:?} should have been told"
            ));
        }
        self.view.announced = position;
        Ok(())
    }

    fn coverage(&mut self, told: &Coverage, stream: &mut Stream) -> Result<(), String> {
        self.tally.spans += 1;
        self.is_news(told.position, "a span")?;
        let is_true = self.truth.spans.iter().any(|span| {
            let is_of_it = span.from_ms == told.from_ms && reason_of(span.reason) == told.reason;
            // It comes again when it has ended; or longer, when a life that remembers nothing of itself followed it.
            let was_shorter = told.until_ms == 0 || Some(told.until_ms) < span.until_ms;
            is_same(span, told) || (is_of_it && was_shorter && told.position < span.position)
        });
        if !is_true {
            return Err(format!("there was no such span as {told:?}"));
        }
        if stream.spans.contains(told) {
            return Err(format!("{told:?} was told twice"));
        }
        stream.spans.push(*told);
        Ok(())
    }

    fn deadline(&mut self, told: &Deadline, stream: &mut Stream) -> Result<(), String> {
        self.is_news(told.position, "an event")?;
        let user = user_of(&told.user)?;
        if !self.selects(&user) {
            return Err(format!("{user} was not asked for"));
        }
        let is_late = told.kind() == deadline::Kind::Late;
        let is_true = self.truth.events.iter().any(|event| {
            (event.user, event.position, number(event.kind)) == (user, told.position, told.kind)
                && (event.at_ms, event.last_contact_ms, event.due_ms)
                    == (told.at_ms, told.last_contact_ms, told.due_ms)
        });
        if !is_true {
            return Err(format!("there was no such event as {told:?}"));
        }
        if is_late {
            self.tally.late += 1;
            let value = self.truth.history.at(&user, told.position);
            let is_right = value.map_or(told.last_contact_ms == 0, |value| {
                value.last_contact.may_be(told.last_contact_ms) && value.state == State::Active
            });
            if !is_right {
                return Err(format!(
                    "{user} was called late, and {value:?} is true: {told:?}"
                ));
            }
        } else {
            self.tally.recovered += 1;
        }
        let is_in_turn = if is_late {
            self.view.late.insert(user)
        } else {
            self.view.late.remove(&user)
        };
        if !is_in_turn && !self.truth.released.contains(&user) {
            return Err(format!("{told:?} is not in turn"));
        }
        stream.events.push((told.position, user, told.kind));
        Ok(())
    }

    fn transition(&mut self, told: &v1::Transition, stream: &mut Stream) -> Result<(), String> {
        self.tally.transitions += 1;
        self.is_news(told.position, "a transition")?;
        let user = user_of(&told.user)?;
        let mut transitions = self.truth.transitions.iter();
        let is_true = transitions.any(|it| {
            let concerns_it = it.turn != Turn::Withdrawn || it.checkers == self.truth.checker;
            concerns_it && as_told(it).as_ref() == Some(told)
        });
        if !is_true || !self.selects(&user) {
            return Err(format!("there was no such transition as {told:?}"));
        }
        let last_withdrawn = stream.withdrawn.get(&user);
        let is_again = last_withdrawn.is_some_and(|last| told.position <= *last);
        if stream.transitions.contains(told) || (told.state() == State::Withdrawn && is_again) {
            return Err(format!("{told:?} was told twice"));
        }
        if told.state() == State::Withdrawn {
            // From here on it is as if the user had never been told of.
            self.view.users.remove(&user);
            stream.withdrawn.insert(user, told.position);
            return Ok(());
        }
        self.may_be_told(&user, told.position, stream)?;
        stream.transitions.push(told.clone());
        Ok(())
    }

    /// All is quiet: what is told is what is true, and nothing else.
    fn end(&self) -> Result<(), String> {
        for (user, entry) in &self.view.users {
            if self.withdrawn_since(user).is_some() {
                // What else could be told of the user was looked at when everything was announced.
                continue;
            }
            match self.truth.history.last(user) {
                // It has been told of the transition.
                Some(value) if self.selection.is_active_only && value.state != State::Active => {}
                Some(value) => {
                    let position = entry.position.max(value.position);
                    let stands = self.value_at(user, position);
                    is_as_it_was(entry, &stands.unwrap_or(*value))?;
                }
                None if entry.state() == State::NeverSeen => {}
                None => return Err(format!("{user} was told of and never heard")),
            }
        }
        match self
            .wanted_at(u64::MAX, &[])
            .find(|user| !self.view.users.contains_key(user))
        {
            Some(user) => Err(format!("{user} was never told of")),
            None => Ok(()),
        }
    }

    fn is_news(&self, position: u64, what: &str) -> Result<(), String> {
        if position <= self.view.announced {
            let announced = self.view.announced;
            return Err(format!(
                "{what} at {position} came after position {announced} was announced"
            ));
        }
        Ok(())
    }

    fn late_at(&self, position: u64) -> impl Iterator<Item = UserId> {
        let mut late = BTreeSet::new();
        for event in self
            .truth
            .events
            .iter()
            .filter(|event| event.position <= position)
        {
            match event.kind {
                Lateness::Late => late.insert(event.user),
                Lateness::Recovered => late.remove(&event.user),
            };
        }
        late.into_iter().filter(|user| self.selects(user))
    }

    fn selects(&self, user: &UserId) -> bool {
        self.selection
            .users
            .as_ref()
            .is_none_or(|users| users.contains(user))
    }

    /// Those of whom it must have an entry when a position is announced.
    fn wanted_at(&self, position: u64, told: &[v1::Transition]) -> impl Iterator<Item = UserId> {
        let selected = self.truth.history.users().filter(|user| self.selects(user));
        let selected = selected.filter(move |user| self.is_granted_since(user, position));
        selected.filter(move |user| {
            if !self.selection.is_active_only || self.truth.history.shares_since(user, position) {
                return true;
            }
            // Who wants only the active may find one paused already, and must have been told of that before.
            let was_active = self.truth.history.at(user, position);
            was_active.is_some_and(|value| value.state == State::Active)
                && !told
                    .iter()
                    .any(|told| told.user == user.0[..] && position < told.position)
        })
    }
}

/// What holders decided of a checker, in order.
fn decided(truth: &Truth<'_>) -> BTreeMap<UserId, Vec<(u64, bool)>> {
    let mut decided: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for transition in truth.transitions {
        let is_granted = match transition.turn {
            Turn::Granted => true,
            Turn::Withdrawn => false,
            Turn::Sharing(_) => continue,
        };
        if transition.checkers == truth.checker {
            let of_user = decided.entry(transition.user).or_default();
            of_user.push((transition.position, is_granted));
        }
    }
    decided
}

/// Whether an entry says what is true of the user at its position.
pub(crate) fn is_as_it_was(entry: &Entry, value: &Value) -> Result<(), String> {
    let is_right = entry.position == value.position
        && value.last_contact.may_be(entry.last_contact_ms)
        && entry.last_sample_ms == value.last_sample_ms
        && entry.last_fix_ms == value.last_fix_ms
        && value
            .durable_ms
            .is_none_or(|durable_ms| entry.durable_ms == durable_ms)
        && value.last_contact.earliest_ms <= entry.durable_ms
        && entry.state() == value.state;
    if !is_right {
        return Err(format!("{entry:?} was told, and {value:?} is true"));
    }
    Ok(())
}

fn is_same(span: &Span, told: &Coverage) -> bool {
    *told
        == Coverage {
            from_ms: span.from_ms,
            until_ms: span.until_ms.unwrap_or_default(),
            reason: reason_of(span.reason),
            position: span.position,
        }
}

fn reason_of(reason: Reason) -> i32 {
    use waypost_proto::v1::coverage::Reason as Wire;
    let reason = match reason {
        Reason::Down => Wire::Down,
        Reason::Starting => Wire::Starting,
        Reason::Overloaded => Wire::Overloaded,
        Reason::DiskFailed => Wire::DiskFailed,
        Reason::ClockStepped => Wire::ClockStepped,
    };
    reason.into()
}

/// As checkers are told of it; none for a grant, of which the user's entry tells.
fn as_told(transition: &Transition) -> Option<v1::Transition> {
    let state = match transition.turn {
        Turn::Sharing(Sharing::Active) => State::Active,
        Turn::Sharing(Sharing::Paused) => State::Paused,
        Turn::Sharing(Sharing::Erased) => State::Erased,
        Turn::Withdrawn => State::Withdrawn,
        Turn::Granted => return None,
    };
    Some(v1::Transition {
        user: Bytes::copy_from_slice(&transition.user.0),
        state: state.into(),
        at_ms: transition.at_ms,
        position: transition.position,
        number: transition.number,
    })
}

fn number(kind: Lateness) -> i32 {
    match kind {
        Lateness::Late => deadline::Kind::Late.into(),
        Lateness::Recovered => deadline::Kind::Recovered.into(),
    }
}

fn user_of(id: &[u8]) -> Result<UserId, String> {
    let id = id.try_into().map_err(|_| format!("{id:?} is no user"))?;
    Ok(UserId(id))
}

/// How much of what was told is shown.
const LAST_SAID: usize = 12;

#[cfg(test)]
mod tests {
    use waypost_gateway::deadlines::Checker;
    use waypost_proto::{id::DeviceId, session::Lane, v1::Reset};

    use super::*;
    use crate::history::{Fact, What, bit};

    const ALICE: UserId = UserId([1; 16]);
    const BOB: UserId = UserId([2; 16]);

    /// Alice was heard in the commits 1, 3 and 5, Bob in 2; each time at ten times the commit's number.
    fn history() -> History {
        let facts = [(1, ALICE), (2, BOB), (3, ALICE), (5, ALICE)].map(|(position, user)| Fact {
            device: DeviceId { user, device: 1 },
            position,
            lane: Lane::Live,
            number: position,
            receive_ms: position * 10,
            commit_ms: Some(position * 10 + 1),
            is_paused: false,
            what: What::Contact,
        });
        History::of(facts.into(), &[], &[]).unwrap()
    }

    fn id(user: UserId) -> Bytes {
        Bytes::copy_from_slice(&user.0)
    }

    fn entry(user: UserId, position: u64, coalesced: u32) -> Entry {
        Entry {
            user: id(user),
            last_contact_ms: position * 10,
            durable_ms: position * 10 + 1,
            state: State::Active.into(),
            position,
            coalesced,
            ..Entry::default()
        }
    }

    fn told(user: UserId, position: u64) -> Said {
        Said::Told(Kind::Entry(entry(user, position, 0)))
    }

    fn header(position: u64) -> Said {
        let incarnation = Bytes::new();
        Said::Told(Kind::Header(Header {
            incarnation,
            position,
        }))
    }

    fn snapshot_end(count: u64, position: u64) -> Said {
        let token = Bytes::new();
        Said::Told(Kind::SnapshotEnd(SnapshotEnd {
            count,
            position,
            token,
        }))
    }

    fn progress(resolved_ms: u64, position: u64) -> Said {
        Said::Told(Kind::Progress(Progress {
            resolved_ms,
            position,
            ..Progress::default()
        }))
    }

    fn reset() -> Said {
        Said::Told(Kind::Reset(Reset::default()))
    }

    /// The gateway could not hear, says the commit 4.
    fn span() -> Span {
        Span {
            from_ms: 31,
            until_ms: Some(39),
            reason: Reason::Down,
            position: 4,
        }
    }

    fn span_told() -> Said {
        Said::Told(Kind::Coverage(Coverage {
            from_ms: 31,
            until_ms: 39,
            reason: reason_of(Reason::Down),
            position: 4,
        }))
    }

    /// Bob was late, says the commit 4.
    fn late() -> Event {
        Event {
            checker: Checker::named("ops"),
            user: BOB,
            kind: Lateness::Late,
            position: 4,
            at_ms: 40,
            last_contact_ms: 20,
            due_ms: 35,
        }
    }

    fn late_told() -> Said {
        Said::Told(Kind::Deadline(Deadline {
            user: id(BOB),
            kind: number(Lateness::Late),
            at_ms: 40,
            position: 4,
            last_contact_ms: 20,
            due_ms: 35,
        }))
    }

    /// A snapshot at 3, and all that follows it.
    fn right() -> Vec<Said> {
        vec![
            Said::Began { with: None },
            header(0),
            told(ALICE, 3),
            told(BOB, 2),
            snapshot_end(2, 3),
            progress(39, 3),
            span_told(),
            late_told(),
            told(ALICE, 5),
            progress(50, 5),
        ]
    }

    fn judged(log: &[Said]) -> Result<Tally, String> {
        let truth = Truth {
            history: &history(),
            checker: bit(0),
            spans: &[span()],
            events: &[late()],
            transitions: &[],
            released: &BTreeSet::new(),
        };
        let selection = Selection {
            users: None,
            is_active_only: false,
        };
        judge(log, &selection, &truth)
    }

    #[test]
    fn what_is_right_is_counted() {
        let mut log = right();
        // It comes back with the token of its snapshot, and with one that it made up.
        log.extend([
            Said::Ended,
            Said::Began { with: Some(4) },
            header(3),
            span_told(),
            late_told(),
        ]);
        log.extend([told(ALICE, 5), progress(50, 5)]);
        log.extend([
            Said::Ended,
            Said::BeganForged,
            header(0),
            reset(),
            told(ALICE, 5),
            told(BOB, 2),
        ]);
        log.extend([
            span_told(),
            late_told(),
            snapshot_end(2, 5),
            progress(50, 5),
        ]);
        let tally = judged(&log).unwrap();
        assert_eq!((tally.entries, tally.announced, tally.snapshots), (6, 6, 2));
        assert_eq!(
            (tally.resumed, tally.resets, tally.spans, tally.late),
            (1, 1, 3, 3)
        );
    }

    #[test]
    fn a_span_may_come_again_when_it_has_become_longer_and_not_shorter() {
        let told = |until_ms| {
            Said::Told(Kind::Coverage(Coverage {
                from_ms: 31,
                until_ms,
                reason: reason_of(Reason::Down),
                position: 2,
            }))
        };
        for (until_ms, is_right) in [(0, true), (38, true), (40, false)] {
            let mut log = right();
            log.insert(2, told(until_ms));
            assert_eq!(judged(&log).is_ok(), is_right, "{until_ms}");
        }
    }

    /// The negative controls: whatever is left out, altered or added is named.
    #[test]
    fn every_kind_of_wrong_is_named() {
        let without = |at: usize| {
            let mut log = right();
            log.remove(at);
            log
        };
        let with = |at: usize, said: Said| {
            let mut log = right();
            log[at] = said;
            log
        };
        let also = |at: usize, said: Said| {
            let mut log = right();
            log.insert(at, said);
            log
        };
        let resumed = |after: &[Said]| {
            let mut log = right();
            log.extend([Said::Ended, Said::Began { with: Some(4) }]);
            log.extend_from_slice(after);
            log
        };
        let altered = Entry {
            last_sample_ms: 1,
            ..entry(ALICE, 5, 0)
        };
        for (log, name) in [
            (without(1), "before the header"),
            (also(2, header(0)), "a second header"),
            (with(1, header(1)), "begins after 1"),
            (without(2), "said it had 2"),
            (with(4, snapshot_end(1, 3)), "said it had 1"),
            (with(4, snapshot_end(2, 5)), "was announced, and"),
            (without(4), "before the snapshot was complete"),
            (with(5, progress(50, 3)), "was called silent"),
            (without(6), "should have been told"),
            (also(7, span_told()), "was told twice"),
            (without(7), "should have been told"),
            (also(8, late_told()), "not in turn"),
            (without(8), "was announced, and"),
            (with(8, told(ALICE, 4)), "did not change at 4"),
            (
                with(8, Said::Told(Kind::Entry(entry(ALICE, 5, 1)))),
                "values overtaken",
            ),
            (with(8, Said::Told(Kind::Entry(altered))), "is true"),
            (also(9, told(ALICE, 5)), "and then at 5"),
            (
                also(10, told(ALICE, 5)),
                "an entry at 5 came after position 5",
            ),
            (also(10, progress(49, 5)), "went back"),
            (also(10, reset()), "answered with a reset"),
            (resumed(&[header(0)]), "should begin after 3"),
            (
                resumed(&[header(3), span_told(), late_told(), progress(50, 5)]),
                "was announced, and",
            ),
            (
                resumed(&[header(3), late_told(), told(ALICE, 5), progress(50, 5)]),
                "should have been told",
            ),
            (
                resumed(&[header(3), span_told(), told(ALICE, 5), progress(50, 5)]),
                "should have been told",
            ),
            (resumed(&[header(3)]), "is true"),
        ] {
            let wrong = judged(&log).unwrap_err();
            assert!(wrong.contains(name), "{wrong}\nand not {name}");
        }
        let mut log = right();
        log.extend([Said::Ended, Said::BeganForged, header(0), told(ALICE, 5)]);
        let wrong = judged(&log).unwrap_err();
        assert!(wrong.contains("taken for good"), "{wrong}");
    }

    #[test]
    fn a_late_user_who_was_heard_must_have_recovered() {
        let recovered = |position| Event {
            user: ALICE,
            kind: Lateness::Recovered,
            position,
            ..late()
        };
        let alice_late = Event {
            user: ALICE,
            ..late()
        };
        for (events, is_right) in [
            (vec![late()], true),
            (vec![alice_late], false),
            (vec![alice_late, recovered(5)], true),
            (vec![alice_late, recovered(6)], false),
        ] {
            let truth = Truth {
                history: &history(),
                checker: bit(0),
                spans: &[],
                events: &events,
                transitions: &[],
                released: &BTreeSet::new(),
            };
            let judged = whoever_came_back_has_recovered(&truth);
            assert_eq!(judged.is_ok(), is_right, "{events:?}: {judged:?}");
        }
    }
}
