//! Silences, held against what a plain reading of the contract says of every millisecond.

use std::collections::HashSet;

use proptest::prelude::*;
use waypost_proto::v1::reset;

use super::*;
use crate::Resume;

fn user(number: u8) -> UserId {
    UserId([number; 16])
}

fn entry(number: u8, state: State, last_contact_ms: u64) -> Event {
    Event::Entry {
        entry: Entry {
            user: user(number),
            state,
            last_contact_ms,
            last_sample_ms: 0,
            last_fix_ms: 0,
            durable_ms: 0,
            position: 1,
            coalesced: 0,
        },
        is_snapshot: false,
    }
}

fn heard(number: u8, last_contact_ms: u64) -> Event {
    entry(number, State::Active, last_contact_ms)
}

fn resume() -> Resume {
    Resume::from_bytes(&[1; 10]).unwrap()
}

fn progress(resolved_ms: u64) -> Event {
    Event::Progress {
        resolved_ms,
        position: 1,
        lag_ms: 0,
        resume: resume(),
    }
}

fn snapshot_end() -> Event {
    Event::SnapshotEnd {
        count: 1,
        position: 1,
        resume: resume(),
    }
}

fn gap(from_ms: u64, until_ms: Option<u64>) -> Event {
    Event::Coverage(Gap {
        from_ms,
        until_ms,
        reason: coverage::Reason::Down,
        position: 1,
    })
}

fn reset() -> Event {
    Event::Reset {
        reason: reset::Reason::OtherStore,
    }
}

/// What these events change, in words.
fn said(silences: &mut Silences, events: impl IntoIterator<Item = Event>) -> Vec<String> {
    let mut changes = Vec::new();
    for event in events {
        silences.take(&event, &mut changes);
    }
    let words = |change: &Change| match change {
        Change::Silent {
            user,
            last_contact_ms,
            ..
        } => format!("{} silent since {last_contact_ms}", user.0[0]),
        Change::HeardAgain {
            user,
            last_contact_ms,
        } => format!("{} heard at {last_contact_ms}", user.0[0]),
        Change::Closed {
            user,
            last_contact_ms,
            state,
        } => format!("{} since {last_contact_ms} closed {state:?}", user.0[0]),
    };
    changes.iter().map(words).collect()
}

#[test]
fn a_silence_is_said_once_and_only_up_to_where_the_stream_is_complete() {
    let mut silences = Silences::new(100);
    assert!(said(&mut silences, [heard(1, 1_000), progress(1_099)]).is_empty());
    assert_eq!(
        said(&mut silences, [progress(1_100), progress(1_200)]),
        ["1 silent since 1000"]
    );
    assert!(said(&mut silences, [heard(1, 1_000)]).is_empty());
    assert_eq!(
        said(&mut silences, [heard(1, 1_250), progress(1_300)]),
        ["1 heard at 1250"]
    );
    assert_eq!(
        said(&mut silences, [progress(1_350)]),
        ["1 silent since 1250"]
    );
    assert_eq!((silences.users(), silences.silent()), (1, 1));
}

#[test]
fn a_pause_is_not_silence_and_ends_one() {
    let mut silences = Silences::new(100);
    let paused = || entry(1, State::Paused, 1_000);
    assert!(said(&mut silences, [heard(1, 1_000), paused(), progress(9_000)]).is_empty());
    assert!(
        said(
            &mut silences,
            [entry(2, State::NeverSeen, 0), progress(9_100)]
        )
        .is_empty()
    );
    assert_eq!(
        said(&mut silences, [heard(1, 1_000), progress(9_200), paused()]),
        ["1 silent since 1000", "1 since 1000 closed Some(Paused)"]
    );
}

#[test]
fn an_hour_down_makes_nobody_silent() {
    let mut silences = Silences::new(600_000);
    let (heard_at, down, up) = (1_000_000, 1_060_000, 4_660_000);
    let early = [
        heard(1, heard_at),
        gap(down, Some(up)),
        progress(up + 539_999),
    ];
    assert!(said(&mut silences, early).is_empty());
    assert_eq!(
        said(&mut silences, [progress(up + 540_000)]),
        ["1 silent since 1000000"]
    );
    // The control: without the gap it would have been said.
    let mut unaware = Silences::new(600_000);
    assert_eq!(
        said(&mut unaware, [heard(1, heard_at), progress(up)]).len(),
        1
    );
}

#[test]
fn a_gap_that_lasts_counts_until_it_ends() {
    let mut silences = Silences::new(100);
    let open = [heard(1, 1_000), gap(1_050, None), progress(5_000)];
    assert!(said(&mut silences, open).is_empty());
    assert!(said(&mut silences, [gap(1_050, Some(5_000)), progress(5_049)]).is_empty());
    assert_eq!(
        said(&mut silences, [progress(5_050)]),
        ["1 silent since 1000"]
    );
}

#[test]
fn after_a_reset_what_was_known_counts_no_more_and_what_was_said_is_not_said_again() {
    let mut silences = Silences::new(100);
    said(
        &mut silences,
        [
            heard(1, 1_000),
            heard(2, 1_000),
            heard(3, 1_000),
            progress(2_000),
        ],
    );
    said(&mut silences, [heard(4, 1_950), reset()]);
    assert_eq!(silences.users(), 0);
    assert!(said(&mut silences, [progress(1_400)]).is_empty());
    assert_eq!(
        said(
            &mut silences,
            [
                heard(1, 1_000),
                heard(2, 1_500),
                snapshot_end(),
                progress(1_550)
            ]
        ),
        ["2 heard at 1500", "3 since 1000 closed None"]
    );
    assert_eq!(silences.silent(), 1);
}

#[test]
fn what_is_remembered_goes_on_as_it_was() {
    let mut silences = Silences::new(100);
    said(
        &mut silences,
        [
            heard(1, 1_000),
            heard(2, 1_150),
            gap(1_050, Some(1_100)),
            progress(1_200),
        ],
    );
    let mut later = Silences::new(100);
    for (user, last_contact_ms, is_called) in silences.known() {
        later.remember(user, last_contact_ms, is_called);
    }
    let gaps = silences.gaps().map(Event::Coverage);
    assert!(said(&mut later, gaps).is_empty());
    for silences in [&mut silences, &mut later] {
        assert_eq!(
            said(silences, [progress(1_250), heard(1, 1_300)]),
            ["2 silent since 1150", "1 heard at 1300"]
        );
    }
}

#[test]
fn gaps_have_a_bound_and_joining_them_calls_nobody_early() {
    let mut silences = Silences::new(1);
    said(&mut silences, [heard(1, 0)]);
    let many = (0..2 * MAX_GAPS as u64).map(|number| gap(10 * number, Some(10 * number + 9)));
    said(&mut silences, many);
    assert_eq!(silences.gaps().count(), MAX_GAPS);
    assert!(silences.heard_ms(0, 20 * MAX_GAPS as u64) <= 2 * MAX_GAPS as u64);
    // Those before anybody's last contact go.
    said(
        &mut silences,
        [heard(1, u64::from(u32::MAX)), progress(u64::from(u32::MAX))],
    );
    assert_eq!(silences.gaps().count(), 0);
}

#[test]
fn a_gap_that_lasts_while_very_many_come_still_ends() {
    let mut silences = Silences::new(100);
    let lasting = |until_ms| {
        Event::Coverage(Gap {
            from_ms: 1_005,
            until_ms,
            reason: coverage::Reason::Overloaded,
            position: 1,
        })
    };
    said(&mut silences, [heard(1, 1_000), lasting(None)]);
    let many = 2 * MAX_GAPS as u64;
    let gaps = (0..many).map(|number| gap(1_000 + 2 * number, Some(1_001 + 2 * number)));
    assert!(said(&mut silences, gaps).is_empty());
    let end_ms = 1_000 + 2 * many;
    let until = [lasting(Some(end_ms)), progress(end_ms + 90)];
    assert!(said(&mut silences, until).is_empty());
    assert_eq!(
        said(&mut silences, [progress(end_ms + 100)]),
        ["1 silent since 1000"]
    );
}

proptest! {
    /// For every user and moment, called silent is who the gateway could have heard for the time, each
    /// millisecond looked at by itself.
    #[test]
    fn silence_is_time_that_the_gateway_could_hear(
        contacts in prop::collection::vec(0u64..200, 1..6),
        gaps in prop::collection::btree_map((0u64..200, any::<bool>()), 1u64..60, 0..6),
        silent_after_ms in 1u64..100,
        step_ms in 1usize..20,
    ) {
        let mut silences = Silences::new(silent_after_ms);
        let mut changes = Vec::new();
        let mut blind = HashSet::new();
        for (number, &contact_ms) in contacts.iter().enumerate() {
            silences.take(&heard(u8::try_from(number).unwrap(), contact_ms), &mut changes);
        }
        for (&(from_ms, is_overload), &length_ms) in &gaps {
            let reason = if is_overload { coverage::Reason::Overloaded } else { coverage::Reason::Down };
            let until_ms = from_ms + length_ms;
            blind.extend(from_ms..until_ms);
            let gap = Gap { from_ms, until_ms: Some(until_ms), reason, position: 1 };
            silences.take(&Event::Coverage(gap), &mut changes);
        }
        let mut silent = HashSet::new();
        for resolved_ms in (0..400).step_by(step_ms) {
            silences.take(&progress(resolved_ms), &mut changes);
            for change in changes.drain(..) {
                let Change::Silent { user, .. } = change else { panic!("{change:?}") };
                prop_assert!(silent.insert(user), "said twice");
            }
            for (number, &contact_ms) in contacts.iter().enumerate() {
                let heard_ms = (contact_ms..resolved_ms).filter(|ms| !blind.contains(ms)).count() as u64;
                let is_silent = silent.contains(&user(u8::try_from(number).unwrap()));
                prop_assert_eq!(is_silent, silent_after_ms <= heard_ms);
            }
        }
    }
}
