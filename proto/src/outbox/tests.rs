//! The outbox alone; `proto/tests/simulation` runs it against the gateway's own session and device record.

use super::*;
use crate::{device::is_retryable, ping::Source, terms::Density, v1::gateway_frame::Kind};

const STORE: &[u8] = b"store";

fn ping(name: u64) -> Ping {
    Ping {
        source: Source::Gnss,
        ..Ping::at(0, name, 0, 0)
    }
}

fn outbox(capacity: usize) -> Outbox {
    Outbox::new(NonZeroUsize::new(capacity).unwrap())
}

fn push(outbox: &mut Outbox, count: u64) {
    for name in 0..count {
        outbox.push(ping(name));
    }
}

fn range(first: u64, last: u64) -> SeqRange {
    SeqRange { first, last }
}

fn welcome(epoch: u32) -> v1::Welcome {
    v1::Welcome {
        epoch,
        incarnation: Bytes::from_static(STORE),
        ..v1::Welcome::default()
    }
}

fn ack(epoch: u32, durable_upto: u64) -> v1::Ack {
    v1::Ack {
        epoch,
        incarnation: Bytes::from_static(STORE),
        durable_upto,
        ..v1::Ack::default()
    }
}

fn flow(credit: u32) -> Option<v1::Flow> {
    Some(v1::Flow {
        credit,
        ..v1::Flow::default()
    })
}

fn told_welcome(outbox: &mut Outbox, welcome: v1::Welcome) -> Vec<Event> {
    outbox.handle(
        v1::GatewayFrame {
            kind: Some(Kind::Welcome(welcome)),
        },
        0,
    )
}

fn told_ack(outbox: &mut Outbox, ack: v1::Ack) -> Vec<Event> {
    outbox.handle(
        v1::GatewayFrame {
            kind: Some(Kind::Ack(ack)),
        },
        0,
    )
}

/// An outbox that is connected in epoch 1.
fn welcomed(capacity: usize) -> Outbox {
    let mut outbox = outbox(capacity);
    outbox.connected();
    told_welcome(&mut outbox, welcome(1));
    outbox
}

fn sent(outbox: &mut Outbox, lane: Lane, now_ms: u64) -> Vec<u64> {
    let batch = outbox.poll_batch(lane, now_ms);
    batch.map_or_else(Vec::new, |batch| seqs_of(&batch))
}

fn seqs_of(batch: &v1::PingBatch) -> Vec<u64> {
    let decoded = batch::decode(batch, usize::MAX).unwrap();
    decoded.pings.iter().map(|ping| ping.seq).collect()
}

fn reject(seq: u64, code: RejectCode) -> v1::Reject {
    v1::Reject {
        seq,
        code: code.into(),
        retryable: is_retryable(code),
    }
}

#[test]
fn without_an_epoch_nothing_but_hello_is_sent_until_welcome() {
    let mut outbox = outbox(10);
    push(&mut outbox, 3);
    outbox.connected();
    assert_eq!(outbox.hello(Lane::Live, 5).epoch, 0);
    assert_eq!(sent(&mut outbox, Lane::Live, 0), []);
    let events = told_welcome(&mut outbox, welcome(4));
    assert!(events.contains(&Event::Renumbered {
        epoch: 4,
        previous_seqs: vec![1, 2, 3]
    }));
    let batch = outbox.poll_batch(Lane::Live, 0).unwrap();
    assert_eq!((batch.epoch, seqs_of(&batch)), (4, vec![1, 2, 3]));
}

#[test]
fn with_an_epoch_pings_follow_hello_at_once() {
    let mut outbox = welcomed(10);
    outbox.disconnected();
    push(&mut outbox, 2);
    outbox.connected();
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [1, 2]);
}

#[test]
fn a_fenced_queue_asks_for_an_epoch_of_its_own() {
    let mut outbox = welcomed(10);
    outbox.disconnected();
    push(&mut outbox, 2);
    outbox.connected();
    sent(&mut outbox, Lane::Live, 0);
    outbox.fenced();
    outbox.disconnected();
    outbox.connected();
    assert_eq!(outbox.hello(Lane::Live, 0).epoch, 0);
    assert_eq!(sent(&mut outbox, Lane::Live, 0), []);
    told_welcome(&mut outbox, welcome(2));
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [1, 2]);
    outbox.fenced();
    assert_eq!(
        outbox.epoch(),
        2,
        "the epoch began on this connection, so older frames are meant"
    );
}

#[test]
fn a_backlog_sends_its_newest_first_and_the_rest_behind_it() {
    let mut outbox = welcomed(3_000);
    outbox.disconnected();
    push(&mut outbox, 2_500);
    outbox.connected();
    assert!(!outbox.has_backlog(), "not before Welcome");
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [2_500]);
    told_welcome(
        &mut outbox,
        v1::Welcome {
            flow: flow(10_000),
            ..welcome(1)
        },
    );
    assert!(outbox.has_backlog());
    assert_eq!(
        sent(&mut outbox, Lane::Backfill, 0),
        (1..=1_000).collect::<Vec<_>>()
    );
    outbox.push(ping(0));
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [2_501]);
    assert_eq!(
        sent(&mut outbox, Lane::Backfill, 0),
        (1_001..=2_000).collect::<Vec<_>>()
    );
    assert_eq!(
        sent(&mut outbox, Lane::Backfill, 0),
        (2_001..=2_499).collect::<Vec<_>>()
    );
    let events = told_ack(
        &mut outbox,
        v1::Ack {
            flow: flow(10_000),
            ..ack(1, 2_499)
        },
    );
    assert!(events.contains(&Event::Settled(range(1, 2_499))));
    assert!(!outbox.has_backlog());
}

#[test]
fn no_more_than_one_batch_needs_no_second_lane() {
    let mut outbox = welcomed(3_000);
    outbox.disconnected();
    push(&mut outbox, 1_000);
    outbox.connected();
    told_welcome(&mut outbox, welcome(1));
    assert!(!outbox.has_backlog());
    assert_eq!(sent(&mut outbox, Lane::Live, 0).len(), 1_000);
}

#[test]
fn both_lanes_share_the_credit_and_backfill_leaves_some_to_live() {
    let mut outbox = welcomed(3_000);
    outbox.disconnected();
    push(&mut outbox, 2_000);
    outbox.connected();
    told_welcome(
        &mut outbox,
        v1::Welcome {
            flow: flow(100),
            ..welcome(1)
        },
    );
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [2_000]);
    assert_eq!(
        sent(&mut outbox, Lane::Backfill, 0),
        (1..=74).collect::<Vec<_>>()
    );
    assert_eq!(sent(&mut outbox, Lane::Backfill, 0), []);
    push(&mut outbox, 50);
    assert_eq!(
        sent(&mut outbox, Lane::Live, 0),
        (2_001..=2_025).collect::<Vec<_>>()
    );
    assert_eq!(outbox.in_flight(), 100);
    told_ack(
        &mut outbox,
        v1::Ack {
            flow: flow(100),
            ..ack(1, 74)
        },
    );
    assert_eq!(
        sent(&mut outbox, Lane::Live, 0),
        (2_026..=2_050).collect::<Vec<_>>()
    );
    assert_eq!(
        sent(&mut outbox, Lane::Backfill, 0),
        (75..=98).collect::<Vec<_>>()
    );
}

#[test]
fn without_credit_one_ping_asks_for_more_after_a_while() {
    let mut outbox = welcomed(10);
    push(&mut outbox, 5);
    told_ack(
        &mut outbox,
        v1::Ack {
            flow: flow(0),
            ..ack(1, 0)
        },
    );
    assert_eq!(sent(&mut outbox, Lane::Live, 0), []);
    assert_eq!(outbox.poll_timeout(0), Some(LEAST_RETRY_MS));
    assert_eq!(sent(&mut outbox, Lane::Live, LEAST_RETRY_MS), [1]);
    assert_eq!(sent(&mut outbox, Lane::Live, LEAST_RETRY_MS), []);
    assert_eq!(
        outbox.poll_timeout(LEAST_RETRY_MS),
        None,
        "the answer to it is what we wait for"
    );
}

#[test]
fn batches_are_spaced_out_and_backfill_gets_its_turn() {
    let mut outbox = welcomed(3_000);
    outbox.disconnected();
    push(&mut outbox, 1_500);
    outbox.connected();
    let flow = v1::Flow {
        credit: 2_000,
        min_interval_ms: 100,
        ..v1::Flow::default()
    };
    told_welcome(
        &mut outbox,
        v1::Welcome {
            flow: Some(flow),
            ..welcome(1)
        },
    );
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [1_500]);
    outbox.push(ping(0));
    assert_eq!(sent(&mut outbox, Lane::Live, 99), []);
    assert_eq!(outbox.poll_timeout(99), Some(100));
    assert_eq!(sent(&mut outbox, Lane::Live, 100), []);
    assert_eq!(sent(&mut outbox, Lane::Backfill, 100).len(), 1_000);
    assert_eq!(sent(&mut outbox, Lane::Live, 200), [1_501]);
}

#[test]
fn batches_fit_the_limits_that_welcome_states() {
    let mut outbox = outbox(100);
    outbox.connected();
    let limits = v1::Limits {
        frame_bytes: 200,
        batch_pings: 60,
        ranges: 64,
    };
    told_welcome(
        &mut outbox,
        v1::Welcome {
            limits: Some(limits),
            ..welcome(1)
        },
    );
    push(&mut outbox, 100);
    let mut seqs = Vec::new();
    while let Some(batch) = outbox.poll_batch(Lane::Live, 0) {
        assert!(batch.count <= 60);
        seqs.extend(seqs_of(&batch));
        let frame = v1::DeviceFrame {
            kind: Some(v1::device_frame::Kind::Batch(batch)),
        };
        assert!(frame.encoded_len() <= 200);
    }
    assert_eq!(seqs, (1..=100).collect::<Vec<_>>());
}

#[test]
fn an_ack_of_another_epoch_or_store_settles_nothing() {
    let mut outbox = welcomed(10);
    push(&mut outbox, 3);
    sent(&mut outbox, Lane::Live, 0);
    assert_eq!(told_ack(&mut outbox, ack(2, 3)), []);
    let other = v1::Ack {
        incarnation: Bytes::from_static(b"other"),
        ..ack(1, 3)
    };
    assert_eq!(told_ack(&mut outbox, other), []);
    assert_eq!(outbox.held(), 3);
}

#[test]
fn an_ack_settles_what_it_covers_and_only_once() {
    let mut outbox = welcomed(20);
    push(&mut outbox, 10);
    sent(&mut outbox, Lane::Live, 0);
    let told = v1::Ack {
        ranges: vec![v1::SeqRange { first: 5, last: 6 }],
        accepted: 5,
        receive_ms: 7,
        commit_ms: 8,
        position: 9,
        ..ack(1, 3)
    };
    let totals = Totals {
        accepted: 5,
        ..Totals::default()
    };
    let acknowledged = Event::Acknowledged {
        receive_ms: 7,
        commit_ms: 8,
        position: 9,
        totals,
    };
    assert_eq!(
        told_ack(&mut outbox, told.clone()),
        [
            Event::Settled(range(1, 3)),
            Event::Settled(range(5, 6)),
            acknowledged.clone()
        ]
    );
    assert_eq!(told_ack(&mut outbox, told), [acknowledged]);
    assert_eq!((outbox.held(), outbox.in_flight()), (5, 5));
    assert_eq!(outbox.hello(Lane::Live, 0).last_acked, 3);
}

#[test]
fn what_welcome_covers_is_not_sent_again() {
    let mut outbox = welcomed(10);
    push(&mut outbox, 5);
    sent(&mut outbox, Lane::Live, 0);
    outbox.disconnected();
    outbox.connected();
    let ranges = vec![v1::SeqRange { first: 4, last: 4 }];
    told_welcome(
        &mut outbox,
        v1::Welcome {
            durable_upto: 2,
            ranges,
            ..welcome(1)
        },
    );
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [3, 5]);
}

#[test]
fn a_full_outbox_drops_its_oldest_and_tells_hello_with_the_holders_terms() {
    let mut outbox = welcomed(3);
    outbox.set_terms(Terms {
        precision: v1::Precision::Grid1Km,
        density: Density {
            least_interval_ms: 60_000,
            least_distance_m: 50,
        },
    });
    push(&mut outbox, 3);
    sent(&mut outbox, Lane::Live, 0);
    assert_eq!(
        outbox.push(ping(0)),
        Pushed {
            seq: 4,
            dropped: Some(1)
        }
    );
    assert_eq!(outbox.in_flight(), 2);
    let hello = outbox.hello(Lane::Live, 77);
    assert_eq!(
        hello,
        v1::Hello {
            epoch: 1,
            oldest_unsent_seq: 2,
            next_seq: 5,
            queued: 3,
            dropped_total: 1,
            last_acked: 0,
            device_wall_ms: 77,
            precision: v1::Precision::Grid1Km.into(),
            lane: v1::Lane::Live.into(),
            incarnation: Bytes::from_static(STORE),
            least_interval_ms: 60_000,
            least_distance_m: 50,
        }
    );
}

/// Found by the simulation, where the acks that named the refusals got lost.
#[test]
fn what_was_refused_in_an_ack_that_got_lost_is_sent_again_once_everything_is_answered() {
    let mut outbox = welcomed(10);
    push(&mut outbox, 3);
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [1, 2, 3]);
    let answered = |rejected| v1::Ack {
        rejected,
        ..ack(1, 0)
    };
    told_ack(&mut outbox, answered(2));
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [], "one is on its way");
    told_ack(&mut outbox, answered(3));
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [], "not at once");
    assert_eq!(sent(&mut outbox, Lane::Live, LEAST_RETRY_MS), [1, 2, 3]);
}

#[test]
fn a_permanent_reject_is_settled_and_a_retryable_one_waits() {
    let mut outbox = welcomed(10);
    push(&mut outbox, 3);
    sent(&mut outbox, Lane::Live, 0);
    let rejects = vec![
        reject(1, RejectCode::TooOld),
        reject(2, RejectCode::Overloaded),
    ];
    let flow = v1::Flow {
        credit: 10,
        retry_after_ms: 5_000,
        ..v1::Flow::default()
    };
    let events = told_ack(
        &mut outbox,
        v1::Ack {
            rejects,
            flow: Some(flow),
            ..ack(1, 1)
        },
    );
    assert_eq!(
        events[..3],
        [
            Event::Rejected {
                seq: 1,
                code: RejectCode::TooOld,
                retryable: false
            },
            Event::Settled(range(1, 1)),
            Event::Rejected {
                seq: 2,
                code: RejectCode::Overloaded,
                retryable: true
            },
        ]
    );
    assert_eq!(sent(&mut outbox, Lane::Live, 4_999), []);
    assert_eq!(outbox.poll_timeout(4_999), Some(5_000));
    assert_eq!(sent(&mut outbox, Lane::Live, 5_000), [2]);
}

#[test]
fn too_sparse_sends_what_is_missing_first() {
    let mut outbox = welcomed(10);
    push(&mut outbox, 5);
    sent(&mut outbox, Lane::Live, 0);
    outbox.disconnected();
    outbox.connected();
    sent(&mut outbox, Lane::Live, 0);
    let told = v1::Ack {
        ranges: vec![v1::SeqRange { first: 3, last: 3 }],
        rejects: [1, 2, 4, 5]
            .map(|seq| reject(seq, RejectCode::TooSparse))
            .to_vec(),
        missing: vec![v1::SeqRange { first: 1, last: 2 }],
        ..ack(1, 0)
    };
    told_ack(&mut outbox, told);
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [1, 2]);
    assert_eq!(sent(&mut outbox, Lane::Live, 0), []);
    told_ack(&mut outbox, ack(1, 3));
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [4, 5]);
}

/// Found by the simulation: LIVE sent what could not be taken again and again, and BACKFILL, which had the
/// one ping that makes room, did not get its turn.
#[test]
fn while_ranges_are_missing_the_lowest_goes_first_and_alone_whatever_its_lane() {
    let mut outbox = welcomed(3_000);
    outbox.disconnected();
    push(&mut outbox, 2_500);
    outbox.connected();
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [2_500]);
    told_welcome(
        &mut outbox,
        v1::Welcome {
            flow: flow(10_000),
            ..welcome(1)
        },
    );
    let too_sparse = v1::Ack {
        rejects: vec![reject(2_500, RejectCode::TooSparse)],
        rejected: 1,
        missing: vec![v1::SeqRange {
            first: 1,
            last: 2_500,
        }],
        flow: flow(10_000),
        ..ack(1, 0)
    };
    told_ack(&mut outbox, too_sparse);
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [], "it leaves the turn");
    assert_eq!(sent(&mut outbox, Lane::Backfill, 0).first(), Some(&1));
    assert_eq!(sent(&mut outbox, Lane::Backfill, 0), [], "one at a time");
    assert_eq!(sent(&mut outbox, Lane::Live, 0), []);
}

#[test]
fn holes_that_nothing_here_can_fill_are_closed_by_the_next_hello() {
    let mut outbox = welcomed(10);
    for seq in [2, 4, 6] {
        outbox.push_numbered(Ping { seq, ..ping(seq) }).unwrap();
    }
    assert_eq!(outbox.push_numbered(Ping { seq: 6, ..ping(6) }), None);
    sent(&mut outbox, Lane::Live, 0);
    let told = v1::Ack {
        ranges: vec![v1::SeqRange { first: 2, last: 2 }],
        rejects: vec![reject(4, RejectCode::TooSparse)],
        missing: vec![v1::SeqRange { first: 1, last: 1 }],
        ..ack(1, 0)
    };
    assert!(told_ack(&mut outbox, told).contains(&Event::Leaving(LeaveReason::HolesToClose)));
    assert!(!outbox.must_reconnect(), "6 is in flight");
    told_ack(
        &mut outbox,
        v1::Ack {
            rejects: vec![reject(6, RejectCode::TooSparse)],
            ..ack(1, 0)
        },
    );
    assert!(outbox.must_reconnect());
    outbox.disconnected();
    outbox.connected();
    assert_eq!(outbox.hello(Lane::Live, 0).oldest_unsent_seq, 4);
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [4, 6]);
}

#[test]
fn a_new_epoch_numbers_what_is_held_from_1() {
    let mut outbox = welcomed(10);
    push(&mut outbox, 5);
    told_ack(&mut outbox, ack(1, 2));
    outbox.disconnected();
    outbox.connected();
    sent(&mut outbox, Lane::Live, 0);
    let events = told_welcome(&mut outbox, welcome(2));
    assert!(events.contains(&Event::Renumbered {
        epoch: 2,
        previous_seqs: vec![3, 4, 5]
    }));
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [1, 2, 3]);
    assert_eq!(outbox.push(ping(0)).seq, 4);
    let hello = outbox.hello(Lane::Backfill, 0);
    assert_eq!(
        (hello.epoch, hello.last_acked, hello.dropped_total),
        (2, 0, 0)
    );
}

#[test]
fn an_epoch_that_another_queue_has_used_is_left_alone() {
    let mut outbox = welcomed(10);
    push(&mut outbox, 2);
    outbox.disconnected();
    outbox.connected();
    let events = told_welcome(
        &mut outbox,
        v1::Welcome {
            durable_upto: 9,
            ..welcome(2)
        },
    );
    assert!(events.contains(&Event::Leaving(LeaveReason::EpochTaken)));
    assert_eq!((outbox.held(), outbox.must_reconnect()), (2, true));
    outbox.disconnected();
    outbox.connected();
    assert_eq!(outbox.hello(Lane::Live, 0).epoch, 0);
    told_welcome(&mut outbox, welcome(3));
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [1, 2]);
}

#[test]
fn a_copy_that_is_told_of_pings_it_never_sent_keeps_them_for_an_epoch_of_its_own() {
    let mut outbox = welcomed(10);
    push(&mut outbox, 2);
    sent(&mut outbox, Lane::Live, 0);
    outbox.disconnected();
    // What the original did with 3 and 4, this copy cannot know; it gives them to other pings.
    push(&mut outbox, 3);
    outbox.connected();
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [1, 2, 3, 4, 5]);
    let events = told_welcome(
        &mut outbox,
        v1::Welcome {
            durable_upto: 4,
            ..welcome(1)
        },
    );
    assert!(events.contains(&Event::Leaving(LeaveReason::EpochTaken)));
    assert_eq!((outbox.held(), outbox.must_reconnect()), (5, true));
    outbox.disconnected();
    outbox.connected();
    assert_eq!(outbox.hello(Lane::Live, 0).epoch, 0);
}

#[test]
fn what_was_sent_is_believed_to_be_settled_by_a_later_welcome() {
    let mut outbox = welcomed(10);
    push(&mut outbox, 3);
    sent(&mut outbox, Lane::Live, 0);
    let told = v1::Ack {
        rejects: vec![reject(2, RejectCode::Overloaded)],
        ..ack(1, 1)
    };
    told_ack(&mut outbox, told);
    outbox.disconnected();
    outbox.connected();
    let events = told_welcome(
        &mut outbox,
        v1::Welcome {
            durable_upto: 3,
            ..welcome(1)
        },
    );
    assert!(events.contains(&Event::Settled(range(2, 3))));
}

#[test]
fn the_same_epoch_number_of_another_store_is_not_used() {
    let mut outbox = welcomed(10);
    push(&mut outbox, 3);
    sent(&mut outbox, Lane::Live, 0);
    told_ack(&mut outbox, ack(1, 2));
    assert_eq!(outbox.hello(Lane::Live, 0).last_acked, 2);
    outbox.disconnected();
    outbox.connected();
    let other = Bytes::from_static(b"other");
    let events = told_welcome(
        &mut outbox,
        v1::Welcome {
            incarnation: other.clone(),
            ..welcome(1)
        },
    );
    assert!(events.contains(&Event::Leaving(LeaveReason::EpochTaken)));
    let hello = outbox.hello(Lane::Live, 0);
    assert_eq!(
        (hello.epoch, hello.last_acked, hello.incarnation),
        (0, 0, other)
    );
}

#[test]
fn a_batch_does_not_reach_further_than_it_can_say() {
    let mut outbox = welcomed(10);
    for seq in [1, SPAN_OF_BATCH, SPAN_OF_BATCH + 1] {
        outbox.push_numbered(Ping { seq, ..ping(seq) }).unwrap();
    }
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [1, SPAN_OF_BATCH]);
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [SPAN_OF_BATCH + 1]);
}

#[test]
fn go_away_ends_when_nothing_is_in_flight() {
    let mut outbox = welcomed(10);
    push(&mut outbox, 1);
    sent(&mut outbox, Lane::Live, 0);
    push(&mut outbox, 1);
    let flow = v1::Flow {
        credit: 10,
        retry_after_ms: 300,
        go_away: true,
        ..v1::Flow::default()
    };
    let events = told_ack(
        &mut outbox,
        v1::Ack {
            flow: Some(flow),
            ..ack(1, 0)
        },
    );
    assert_eq!(events[0], Event::Leaving(LeaveReason::GoAway));
    assert_eq!(sent(&mut outbox, Lane::Live, 0), []);
    assert!(!outbox.must_reconnect());
    told_ack(&mut outbox, ack(1, 1));
    assert!(outbox.must_reconnect());
    assert_eq!(outbox.retry_after_ms(), 300);
}

#[test]
fn pings_pushed_again_keep_their_numbers_and_are_answered_by_the_totals() {
    let mut outbox = welcomed(10);
    push(&mut outbox, 2);
    sent(&mut outbox, Lane::Live, 0);
    told_ack(
        &mut outbox,
        v1::Ack {
            accepted: 2,
            ..ack(1, 2)
        },
    );
    assert!(
        !outbox.push_again(Ping { seq: 3, ..ping(3) }),
        "3 was never pushed"
    );
    for seq in [1, 2] {
        assert!(outbox.push_again(Ping { seq, ..ping(seq) }));
    }
    outbox.push(ping(3));
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [3]);
    assert_eq!(sent(&mut outbox, Lane::Live, 0), [1, 2]);
    let events = told_ack(
        &mut outbox,
        v1::Ack {
            accepted: 3,
            ..ack(1, 3)
        },
    );
    assert_eq!(events[0], Event::Settled(range(3, 3)));
    assert!(
        !outbox.is_settled(),
        "the repetitions were not answered yet"
    );
    let events = told_ack(
        &mut outbox,
        v1::Ack {
            accepted: 3,
            duplicate: 2,
            ..ack(1, 3)
        },
    );
    assert_eq!(events[0], Event::Repeated(range(1, 2)));
    assert!(outbox.is_settled());
}
