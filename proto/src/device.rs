//! What the gateway remembers of one device, and how it judges what the device sends.
//!
//! Knows epochs, dedup, the clocks of a sign of life, and the thinning rule. Must not know where the
//! record is kept or who waits for the verdict: the committer changes a record here, writes it together
//! with the pings it admitted, and only then tells anybody.

use crate::{
    ping::{Ping, RejectCode},
    ranges::{RangeSet, Verdict},
    terms::Density,
};

/// The clocks of one device, all in milliseconds since 1970-01-01 UTC; 0 means never. None ever goes
/// back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clocks {
    /// When the gateway last heard from it.
    pub last_contact_ms: u64,
    /// The newest sample, by the device's clock.
    pub last_sample_ms: u64,
    /// The newest sample that was a fix and not a repetition.
    pub last_fix_ms: u64,
    /// When this was committed.
    pub durable_ms: u64,
}

impl Clocks {
    /// Takes the newer of each clock: how the devices of a user become one sign of life.
    #[must_use]
    pub fn newest(self, other: Self) -> Self {
        Self {
            last_contact_ms: self.last_contact_ms.max(other.last_contact_ms),
            last_sample_ms: self.last_sample_ms.max(other.last_sample_ms),
            last_fix_ms: self.last_fix_ms.max(other.last_fix_ms),
            durable_ms: self.durable_ms.max(other.durable_ms),
        }
    }
}

/// The newest samples among some pings, in milliseconds since 1970-01-01 UTC by the device's clock; 0 if
/// there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Samples {
    /// The newest sample.
    pub sample_ms: u64,
    /// The newest that was a fix and not a repetition.
    pub fix_ms: u64,
}

impl Samples {
    fn take(&mut self, ping: &Ping) {
        self.sample_ms = self.sample_ms.max(ping.time_ms);
        if ping.is_fix() {
            self.fix_ms = self.fix_ms.max(ping.time_ms);
        }
    }

    /// Takes the newer of each.
    #[must_use]
    pub fn newest(self, other: Self) -> Self {
        Self {
            sample_ms: self.sample_ms.max(other.sample_ms),
            fix_ms: self.fix_ms.max(other.fix_ms),
        }
    }
}

/// The durable memory of one device. Constant in size for a device that sends in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceRecord {
    /// The current epoch; 0 before the first was issued.
    pub epoch: u32,
    /// What is settled in the current epoch.
    pub settled: RangeSet,
    /// Its signs of life.
    pub clocks: Clocks,
    /// The commit that changed this record last.
    pub position: u64,
    /// How many sequence numbers were given up as gaps, over all epochs.
    pub gaps: u64,
    /// What was sampled in pings that came as early data and are stored, while nothing has proved since that
    /// the device is there. They are its own, whoever sent them, so the next contact brings them into
    /// `clocks`: the device learns from Welcome that they are settled and does not send them again. Boxed,
    /// for most devices have none.
    pub unproven: Option<Box<Samples>>,
}

/// The operator's rules for what is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Pings sampled longer ago than this before their receive time are refused.
    pub retention_ms: u64,
    /// Pings sampled further than this after their receive time are refused.
    pub future_tolerance_ms: u64,
    /// At least this much device time lies between two pings stored one after the other; 0 is off.
    pub least_interval_ms: u64,
    /// And at least this distance; 0 is off.
    pub least_distance_m: f64,
}

impl Policy {
    /// These rules, or the holder's where those are stricter.
    #[must_use]
    pub fn and(&self, density: &Density) -> Self {
        Self {
            least_interval_ms: self.least_interval_ms.max(density.least_interval_ms),
            least_distance_m: self.least_distance_m.max(density.least_distance_m.into()),
            ..*self
        }
    }

    /// Whether any ping can be filtered at all.
    #[must_use]
    pub fn thins(&self) -> bool {
        self.least_interval_ms > 0 || self.least_distance_m > 0.0
    }
}

/// What the thinning rule compares with: the ping of this device that was stored last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastStored {
    time_ms: u64,
    latitude_e7: i32,
    longitude_e7: i32,
}

/// What Hello asks of the record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// The epoch of the device's queue; 0 for none.
    pub epoch: u32,
    /// Lower numbers will never be sent.
    pub oldest_unsent_seq: u64,
    /// What the device was told is settled; 0 if nothing.
    pub last_acked: u64,
    /// Whether another store issued the epoch, so that all of this speaks of other pings.
    pub is_foreign: bool,
}

/// The answer to a [`Claim`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The device's epoch is the current one and goes on.
    Resumed,
    /// A new epoch begins, because the device asked for one.
    NewEpoch,
    /// A new epoch begins, because the device was acknowledged more than this record remembers: the
    /// store has lost data.
    LostAcknowledged,
    /// Another queue of this device has a later epoch, or there is no later one left. The epoch goes
    /// on as it was.
    Fenced,
}

impl Admission {
    /// Its name in metrics.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Resumed => "resumed",
            Self::NewEpoch => "new_epoch",
            Self::LostAcknowledged => "lost_acknowledged",
            Self::Fenced => "fenced",
        }
    }
}

/// Why a batch is put off, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deferral {
    /// A retryable code.
    pub code: RejectCode,
    /// When the device may try again, in milliseconds from now.
    pub retry_after_ms: u32,
}

/// What became of one batch. The four fates add up to the pings that came in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// Stored: indices into the batch, ascending.
    pub stored: Vec<usize>,
    /// How many were settled before, or twice in this batch.
    pub duplicate: u64,
    /// How many were left out by the thinning rule.
    pub filtered: u64,
    /// The refused ones.
    pub rejects: Vec<(u64, RejectCode)>,
}

impl DeviceRecord {
    /// Records that the device was heard at `receive_ms`, and with that takes its early data for proven.
    pub fn contact(&mut self, receive_ms: u64) {
        self.clocks.last_contact_ms = self.clocks.last_contact_ms.max(receive_ms);
        if let Some(samples) = self.unproven.take() {
            self.sampled(*samples);
        }
    }

    /// Whether a Hello would change nothing but the contact: the epoch goes on, no data was lost, no hole is
    /// closed. Only then may pings that follow it be judged before it is.
    #[must_use]
    pub fn goes_on_unchanged(&self, claim: &Claim) -> bool {
        claim.epoch != 0
            && !claim.is_foreign
            && claim.epoch == self.epoch
            && claim.last_acked <= self.settled.floor()
            && claim.oldest_unsent_seq <= self.settled.floor().saturating_add(1)
    }

    /// Answers Hello: resumes the device's epoch or begins the next.
    pub fn admit(&mut self, claim: Claim) -> Admission {
        self.admit_above(claim, 0)
    }

    /// The same where a store that was lost may have issued any epoch up to `issued`: the next one lies above those as
    /// well.
    pub fn admit_above(&mut self, claim: Claim, issued: u32) -> Admission {
        if claim.epoch != 0 && !claim.is_foreign && claim.epoch < self.epoch {
            return Admission::Fenced;
        }
        // Far more than any store that was restored from a backup can lag behind: a number made up.
        let known = self.epoch.max(issued);
        let is_made_up = MAX_EPOCH_LEAD < claim.epoch.saturating_sub(known);
        let claim = if is_made_up { Claim::default() } else { claim };
        let admission = if claim.epoch == 0 || claim.is_foreign {
            Admission::NewEpoch
        } else if self.epoch < claim.epoch || self.settled.floor() < claim.last_acked {
            Admission::LostAcknowledged
        } else {
            // One Hello can give up nearly all numbers there are, and the next epoch begins anew.
            let given_up = self.settled.close_below(claim.oldest_unsent_seq);
            self.gaps = self.gaps.saturating_add(given_up);
            return Admission::Resumed;
        };
        // An epoch above all, so that no (epoch, seq) can ever name two pings. A device that has burnt
        // through four thousand million epochs gets no more.
        let Some(epoch) = known.max(claim.epoch).checked_add(1) else {
            return Admission::Fenced;
        };
        self.epoch = epoch;
        self.settled = RangeSet::default();
        admission
    }

    /// Judges a batch of the current epoch and settles what needs no second look.
    ///
    /// `malformed` are pings that the decoder could not make valid. All that is settled here, refused
    /// pings included, is a duplicate from now on; only a retryable refusal leaves no trace.
    pub fn judge(
        &mut self,
        pings: &[Ping],
        malformed: &[(u64, RejectCode)],
        receive_ms: u64,
        policy: &Policy,
        last_stored: &mut Option<LastStored>,
    ) -> Judgement {
        let (judgement, samples) = self.settle(pings, malformed, receive_ms, policy, last_stored);
        self.sampled(samples);
        judgement
    }

    /// The same for early data, which may be somebody else's copy of what the device once sent: no clock
    /// moves before the next [`Self::contact`].
    pub fn judge_unproven(
        &mut self,
        pings: &[Ping],
        malformed: &[(u64, RejectCode)],
        receive_ms: u64,
        policy: &Policy,
        last_stored: &mut Option<LastStored>,
    ) -> Judgement {
        let (judgement, samples) = self.settle(pings, malformed, receive_ms, policy, last_stored);
        if samples != Samples::default() {
            let unproven = self.unproven.get_or_insert_default();
            **unproven = unproven.newest(samples);
        }
        judgement
    }

    fn settle(
        &mut self,
        pings: &[Ping],
        malformed: &[(u64, RejectCode)],
        receive_ms: u64,
        policy: &Policy,
        last_stored: &mut Option<LastStored>,
    ) -> (Judgement, Samples) {
        let (mut judgement, mut samples) = (Judgement::default(), Samples::default());
        for (at, ping) in pings.iter().enumerate() {
            match self.settled.insert(ping.seq) {
                Verdict::Duplicate => judgement.duplicate += 1,
                Verdict::TooSparse => judgement.rejects.push((ping.seq, RejectCode::TooSparse)),
                Verdict::New => match untimely(ping, receive_ms, policy) {
                    Some(code) => judgement.rejects.push((ping.seq, code)),
                    None => {
                        samples.take(ping);
                        if is_too_dense(ping, policy, *last_stored) {
                            judgement.filtered += 1;
                        } else {
                            judgement.stored.push(at);
                            *last_stored = Some(LastStored::from(ping));
                        }
                    }
                },
            }
        }
        for &(seq, code) in malformed {
            match self.settled.insert(seq) {
                Verdict::Duplicate => judgement.duplicate += 1,
                Verdict::TooSparse => judgement.rejects.push((seq, RejectCode::TooSparse)),
                Verdict::New => judgement.rejects.push((seq, code)),
            }
        }
        (judgement, samples)
    }

    /// Refuses a batch of the current epoch for ever, whatever is in it. What was settled before is a duplicate, as
    /// ever.
    pub fn refuse(
        &mut self,
        pings: &[Ping],
        malformed: &[(u64, RejectCode)],
        code: RejectCode,
    ) -> Judgement {
        debug_assert!(!is_retryable(code), "{code:?} is not for ever");
        let seqs = pings.iter().map(|ping| ping.seq);
        let mut judgement = Judgement::default();
        for seq in seqs.chain(malformed.iter().map(|&(seq, _)| seq)) {
            match self.settled.insert(seq) {
                Verdict::Duplicate => judgement.duplicate += 1,
                Verdict::TooSparse => judgement.rejects.push((seq, RejectCode::TooSparse)),
                Verdict::New => judgement.rejects.push((seq, code)),
            }
        }
        judgement
    }

    /// Puts a batch of the current epoch off without judging it: what is settled already is a duplicate,
    /// as ever, and all else may be sent again later. Nothing is settled here, so that the same pings
    /// are judged when they come back.
    #[must_use]
    pub fn defer(
        &self,
        pings: &[Ping],
        malformed: &[(u64, RejectCode)],
        code: RejectCode,
    ) -> Judgement {
        debug_assert!(is_retryable(code), "{code:?} is for ever");
        let seqs = pings.iter().map(|ping| ping.seq);
        let mut judgement = Judgement::default();
        for seq in seqs.chain(malformed.iter().map(|&(seq, _)| seq)) {
            if self.settled.contains(seq) {
                judgement.duplicate += 1;
            } else {
                judgement.rejects.push((seq, code));
            }
        }
        judgement
    }

    fn sampled(&mut self, samples: Samples) {
        self.clocks.last_sample_ms = self.clocks.last_sample_ms.max(samples.sample_ms);
        self.clocks.last_fix_ms = self.clocks.last_fix_ms.max(samples.fix_ms);
    }
}

impl From<&Ping> for LastStored {
    fn from(ping: &Ping) -> Self {
        Self {
            time_ms: ping.time_ms,
            latitude_e7: ping.latitude_e7,
            longitude_e7: ping.longitude_e7,
        }
    }
}

/// How far above its own a gateway takes a device's epoch seriously. Epochs are given out one by one, at
/// most a few a second in a storm; a single Hello must not be able to use all of them up.
const MAX_EPOCH_LEAD: u32 = 1_000_000;

/// Whether a refused ping may be sent again. All others are settled for ever.
#[must_use]
pub fn is_retryable(code: RejectCode) -> bool {
    matches!(
        code,
        RejectCode::RateLimited | RejectCode::Overloaded | RejectCode::TooSparse
    )
}

fn untimely(ping: &Ping, receive_ms: u64, policy: &Policy) -> Option<RejectCode> {
    if receive_ms.saturating_add(policy.future_tolerance_ms) < ping.time_ms {
        Some(RejectCode::TimeInFuture)
    } else if ping.time_ms < receive_ms.saturating_sub(policy.retention_ms) {
        Some(RejectCode::TooOld)
    } else {
        None
    }
}

fn is_too_dense(ping: &Ping, policy: &Policy, last_stored: Option<LastStored>) -> bool {
    let Some(last) = last_stored else {
        return false;
    };
    // A distance costs more than all else that is done for a ping, and the rule is off by default.
    ping.time_ms.abs_diff(last.time_ms) < policy.least_interval_ms
        || (policy.least_distance_m > 0.0
            && ping.distance_m(last.latitude_e7, last.longitude_e7) < policy.least_distance_m)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ping::Source;

    const NOW_MS: u64 = 1_700_000_000_000;

    fn policy() -> Policy {
        Policy {
            retention_ms: 86_400_000,
            future_tolerance_ms: 300_000,
            least_interval_ms: 0,
            least_distance_m: 0.0,
        }
    }

    fn ping(seq: u64, time_ms: u64) -> Ping {
        Ping {
            source: Source::Gnss,
            ..Ping::at(seq, time_ms, 500_000_000, 0)
        }
    }

    fn device_in_epoch(epoch: u32) -> DeviceRecord {
        DeviceRecord {
            epoch,
            ..DeviceRecord::default()
        }
    }

    fn claim(epoch: u32) -> Claim {
        Claim {
            epoch,
            ..Claim::default()
        }
    }

    #[test]
    fn an_epoch_is_issued_once() {
        let mut device = DeviceRecord::default();
        assert_eq!(device.admit(claim(0)), Admission::NewEpoch);
        assert_eq!(device.epoch, 1);
        assert_eq!(device.admit(claim(0)), Admission::NewEpoch);
        assert_eq!(device.epoch, 2);
        assert_eq!(device.admit(claim(1)), Admission::Fenced);
        assert_eq!(device.admit(claim(2)), Admission::Resumed);
        assert_eq!(device.epoch, 2);
    }

    #[test]
    fn an_epoch_that_a_lost_store_may_have_issued_is_not_issued_again() {
        const ISSUED: u32 = 200_000_000;
        // Fresh, and known from before; without an epoch, and with one that the lost store has issued.
        for record in [DeviceRecord::default(), device_in_epoch(3)] {
            for (claimed, expected) in [
                (0, Admission::NewEpoch),
                (7, Admission::LostAcknowledged),
                (ISSUED + 2, Admission::LostAcknowledged),
            ] {
                let mut device = record.clone();
                assert_eq!(device.admit_above(claim(claimed), ISSUED), expected);
                assert_eq!(device.epoch, ISSUED.max(claimed) + 1);
            }
        }
        // Who was acknowledged no more than the record remembers goes on.
        let mut device = device_in_epoch(3);
        assert_eq!(device.admit_above(claim(3), ISSUED), Admission::Resumed);
        assert_eq!(device.epoch, 3);
    }

    #[test]
    fn what_was_put_off_is_judged_when_it_comes_back() {
        let mut device = device_in_epoch(1);
        let (first, both) = ([ping(1, NOW_MS)], [ping(1, NOW_MS), ping(2, NOW_MS)]);
        device.judge(&first, &[], NOW_MS, &policy(), &mut None);
        let before = device.clone();
        let deferred = device.defer(
            &both,
            &[(3, RejectCode::BadCoordinates)],
            RejectCode::Overloaded,
        );
        assert_eq!(deferred.duplicate, 1);
        assert_eq!(
            deferred.rejects,
            [(2, RejectCode::Overloaded), (3, RejectCode::Overloaded)]
        );
        assert_eq!(device, before, "it leaves no trace");
        let judged = device.judge(&both, &[], NOW_MS, &policy(), &mut None);
        assert_eq!((judged.stored, judged.duplicate), (vec![1], 1));
    }

    #[test]
    fn the_last_epoch_is_never_issued_twice() {
        let mut device = device_in_epoch(u32::MAX);
        device.settled.insert(1);
        assert_eq!(device.admit(claim(0)), Admission::Fenced);
        assert_eq!(device.admit(claim(u32::MAX)), Admission::Resumed);
        assert!(device.settled.contains(1));
    }

    #[test]
    fn an_epoch_that_was_made_up_does_not_use_up_the_others() {
        let mut device = device_in_epoch(3);
        assert_eq!(device.admit(claim(u32::MAX - 1)), Admission::NewEpoch);
        assert_eq!(device.epoch, 4);
    }

    #[test]
    fn a_store_that_remembers_less_than_it_acknowledged_starts_a_new_epoch() {
        let mut device = device_in_epoch(3);
        device.settled.insert(1);
        let forgotten = Claim {
            epoch: 3,
            last_acked: 2,
            ..Claim::default()
        };
        assert_eq!(device.admit(forgotten), Admission::LostAcknowledged);
        assert_eq!(device.epoch, 4);
        assert_eq!(
            device.admit(claim(9)),
            Admission::LostAcknowledged,
            "an epoch never issued here"
        );
        assert_eq!(device.epoch, 10);
        assert_eq!(device.settled, RangeSet::default());
    }

    #[test]
    fn the_epoch_of_another_store_is_never_issued_again_here() {
        for (own, foreign, issued) in [(0, 1, 2), (1, 1, 2), (5, 1, 6), (1, 5, 6)] {
            let mut device = device_in_epoch(own);
            let claim = Claim {
                epoch: foreign,
                oldest_unsent_seq: 90,
                last_acked: 100,
                is_foreign: true,
            };
            assert_eq!(device.admit(claim), Admission::NewEpoch);
            assert_eq!(device.epoch, issued, "{own} here, {foreign} there");
            assert_eq!((device.gaps, &device.settled), (0, &RangeSet::default()));
        }
    }

    #[test]
    fn numbers_that_will_never_be_sent_become_a_recorded_gap() {
        let mut device = device_in_epoch(1);
        for seq in [1, 2, 5] {
            device.settled.insert(seq);
        }
        device.admit(Claim {
            epoch: 1,
            oldest_unsent_seq: 5,
            last_acked: 2,
            is_foreign: false,
        });
        assert_eq!((device.gaps, device.settled.floor()), (2, 5));
        assert!(device.settled.above().is_empty());
    }

    #[test]
    fn giving_up_all_numbers_of_epoch_after_epoch_does_not_overflow() {
        let mut device = device_in_epoch(1);
        for epoch in 1..=3 {
            device.admit(Claim {
                epoch,
                oldest_unsent_seq: u64::MAX,
                ..Claim::default()
            });
            assert_eq!(device.admit(claim(0)), Admission::NewEpoch);
        }
        assert_eq!(device.gaps, u64::MAX);
    }

    #[test]
    fn each_ping_has_one_fate_and_every_batch_is_a_contact() {
        let mut device = device_in_epoch(1);
        device.contact(NOW_MS);
        let pings = [
            ping(1, NOW_MS),
            ping(1, NOW_MS),
            ping(2, NOW_MS + 300_001),
            ping(3, NOW_MS - 86_400_001),
            ping(4, NOW_MS - 1),
        ];
        let malformed = [(5, RejectCode::BadCoordinates)];
        let judgement = device.judge(&pings, &malformed, NOW_MS, &policy(), &mut None);
        assert_eq!(judgement.stored, [0, 4]);
        assert_eq!((judgement.duplicate, judgement.filtered), (1, 0));
        assert_eq!(
            judgement.rejects,
            [
                (2, RejectCode::TimeInFuture),
                (3, RejectCode::TooOld),
                (5, RejectCode::BadCoordinates)
            ]
        );
        assert_eq!(
            device.settled.floor(),
            5,
            "what is refused for ever does not block the queue"
        );
        assert_eq!(device.clocks.last_sample_ms, NOW_MS);

        let again = device.judge(&pings, &malformed, NOW_MS, &policy(), &mut None);
        assert_eq!((again.stored.len(), again.duplicate), (0, 6));
    }

    #[test]
    fn the_holder_may_be_stricter_than_the_operator_and_not_laxer() {
        let operators = Policy {
            least_interval_ms: 1_000,
            least_distance_m: 0.0,
            ..policy()
        };
        for (density, expected) in [((0, 0), (1_000, 0.0)), ((60_000, 5), (60_000, 5.0))] {
            let density = Density {
                least_interval_ms: density.0,
                least_distance_m: density.1,
            };
            let both = operators.and(&density);
            assert_eq!((both.least_interval_ms, both.least_distance_m), expected);
            assert!(both.thins());
        }
    }

    #[test]
    fn what_comes_while_the_holder_has_paused_is_settled_and_moves_nothing() {
        let mut device = device_in_epoch(1);
        device.settled.insert(1);
        let before = device.clocks;
        let pings = [ping(1, NOW_MS), ping(2, NOW_MS)];
        let malformed = [(3, RejectCode::BadCoordinates)];
        let refused = device.refuse(&pings, &malformed, RejectCode::Paused);
        assert_eq!(
            refused,
            Judgement {
                duplicate: 1,
                rejects: vec![(2, RejectCode::Paused), (3, RejectCode::Paused)],
                ..Judgement::default()
            }
        );
        assert_eq!((device.settled.floor(), device.clocks), (3, before));
        // After the holder has resumed they are what they were: settled, and not stored.
        let again = device.judge(&pings, &malformed, NOW_MS, &policy(), &mut None);
        assert_eq!((again.stored.len(), again.duplicate), (0, 3));
    }

    #[test]
    fn early_data_is_stored_and_moves_no_clock_before_the_next_contact() {
        let mut device = device_in_epoch(1);
        device.contact(NOW_MS - 60_000);
        device.judge(
            &[ping(1, NOW_MS - 60_000)],
            &[],
            NOW_MS,
            &policy(),
            &mut None,
        );
        let before = device.clocks;
        let early = [ping(2, NOW_MS - 10), ping(3, NOW_MS - 5)];
        let judgement = device.judge_unproven(&early, &[], NOW_MS, &policy(), &mut None);
        assert_eq!((judgement.stored, device.settled.floor()), (vec![0, 1], 3));
        assert_eq!(device.clocks, before);

        let replayed = device.judge_unproven(&early, &[], NOW_MS, &policy(), &mut None);
        assert_eq!((replayed.stored.len(), replayed.duplicate), (0, 2));
        assert_eq!(device.clocks, before);

        device.contact(NOW_MS);
        assert_eq!(device.unproven, None);
        let proven = Clocks {
            last_contact_ms: NOW_MS,
            last_sample_ms: NOW_MS - 5,
            last_fix_ms: NOW_MS - 5,
            ..before
        };
        assert_eq!(device.clocks, proven);
    }

    #[test]
    fn early_data_of_the_past_moves_nothing_back() {
        let mut device = device_in_epoch(1);
        device.contact(NOW_MS);
        device.judge(&[ping(2, NOW_MS)], &[], NOW_MS, &policy(), &mut None);
        let before = device.clocks;
        device.judge_unproven(
            &[ping(1, NOW_MS - 60_000)],
            &[],
            NOW_MS,
            &policy(),
            &mut None,
        );
        device.contact(NOW_MS);
        assert_eq!(device.clocks, before);
    }

    #[test]
    fn only_a_hello_that_changes_nothing_lets_early_data_in() {
        let mut device = device_in_epoch(2);
        for seq in [1, 2, 5] {
            device.settled.insert(seq);
        }
        let plain = Claim {
            epoch: 2,
            oldest_unsent_seq: 3,
            last_acked: 2,
            is_foreign: false,
        };
        assert!(device.goes_on_unchanged(&plain));
        for (name, claim) in [
            ("asks for an epoch", Claim { epoch: 0, ..plain }),
            ("is fenced", Claim { epoch: 1, ..plain }),
            ("is of the future", Claim { epoch: 3, ..plain }),
            (
                "is of another store",
                Claim {
                    is_foreign: true,
                    ..plain
                },
            ),
            (
                "was told more than is known",
                Claim {
                    last_acked: 3,
                    ..plain
                },
            ),
            (
                "closes a hole",
                Claim {
                    oldest_unsent_seq: 4,
                    ..plain
                },
            ),
        ] {
            assert!(!device.goes_on_unchanged(&claim), "{name}");
            let mut changed = device.clone();
            changed.admit(claim);
            let is_fenced = claim.epoch == 1;
            assert_eq!(changed == device, is_fenced, "{name}");
        }
        let before = device.clone();
        assert_eq!(device.admit(plain), Admission::Resumed);
        assert_eq!(device, before);
    }

    #[test]
    fn no_clock_goes_back() {
        let mut device = device_in_epoch(1);
        device.contact(NOW_MS);
        device.judge(&[ping(9, NOW_MS)], &[], NOW_MS, &policy(), &mut None);
        let before = device.clocks;
        device.contact(NOW_MS - 5_000);
        device.judge(
            &[ping(1, NOW_MS - 60_000)],
            &[],
            NOW_MS,
            &policy(),
            &mut None,
        );
        assert_eq!(device.clocks, before);
    }

    #[test]
    fn a_repeated_position_is_a_sample_but_not_a_fix() {
        let mut device = device_in_epoch(1);
        let repeated = Ping {
            source: Source::LastKnown,
            ..ping(2, NOW_MS)
        };
        device.judge(
            &[ping(1, NOW_MS - 10), repeated],
            &[],
            NOW_MS,
            &policy(),
            &mut None,
        );
        assert_eq!(device.clocks.last_sample_ms, NOW_MS);
        assert_eq!(device.clocks.last_fix_ms, NOW_MS - 10);
    }

    #[test]
    fn thinning_leaves_out_what_is_too_close_in_time_or_place() {
        let policy = Policy {
            least_interval_ms: 1_000,
            least_distance_m: 10.0,
            ..policy()
        };
        let metres_north = |metres: i32| 500_000_000 + metres * 90;
        let at = |seq, after_ms, metres| Ping {
            latitude_e7: metres_north(metres),
            ..ping(seq, NOW_MS - 60_000 + after_ms)
        };
        let pings = [
            at(1, 0, 0),
            at(2, 999, 50),
            at(3, 1_000, 5),
            at(4, 1_000, 15),
            at(5, 2_500, 15),
        ];
        let mut last_stored = None;
        let mut device = device_in_epoch(1);
        let judgement = device.judge(&pings, &[], NOW_MS, &policy, &mut last_stored);
        assert_eq!(judgement.stored, [0, 3]);
        assert_eq!(judgement.filtered, 3);
        assert_eq!(device.settled.floor(), 5, "a filtered ping is settled");
        assert_eq!(
            device.clocks.last_sample_ms,
            NOW_MS - 57_500,
            "and is a sign of life"
        );
    }

    #[test]
    fn a_ping_that_would_be_too_sparse_may_come_again() {
        let mut device = device_in_epoch(1);
        let sparse: Vec<Ping> = (1..=65).map(|at| ping(at * 2, NOW_MS)).collect();
        let judgement = device.judge(&sparse, &[], NOW_MS, &policy(), &mut None);
        assert_eq!(judgement.rejects, [(130, RejectCode::TooSparse)]);
        assert!(is_retryable(RejectCode::TooSparse));
        device.judge(&[ping(1, NOW_MS)], &[], NOW_MS, &policy(), &mut None);
        let again = device.judge(&sparse[64..], &[], NOW_MS, &policy(), &mut None);
        assert_eq!(again.stored, [0]);
    }
}
