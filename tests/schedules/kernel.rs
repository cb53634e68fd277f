//! The smallest meetings of a session and the committer, small enough that every order can be tried.
//! Knows the hand-off alone, without judging and storing.

use std::{num::NonZeroUsize, sync::Arc};

use shuttle::{future, thread};
use waypost_proto::{
    id::{DeviceId, UserId},
    session::{Lane, Request},
};

use crate::{
    as_it_is::handoff::{self, Answer, Bell, CommitHandle, Mailbox, NotQueued, Rings, Stopped},
    clock::Clock,
    sync::Alarm,
};

/// A session hands over one request while the committer goes away.
pub(crate) fn a_request_meets_a_committer_that_stops() {
    let (handle, requests) = handoff::new(ONE, ONE, Clock::starting_at(1));
    let stopping = thread::spawn(move || drop(requests));
    future::block_on(async {
        let bell = Arc::<Bell>::default();
        let mailbox = Mailbox::new(&bell);
        if hand_over(&handle, &mailbox).await.is_ok() {
            bell.hear().await;
            let answers = mailbox.take().await.answers;
            assert!(
                matches!(answers[..], [(Lane::Live, Answer::Lost)]),
                "{answers:?}"
            );
        }
    });
    stopping.join().unwrap();
}

/// A session waits for two answers while the committer gives them.
pub(crate) fn two_answers_meet_a_session_that_waits() {
    Alarm::default().set();
    let (handle, mut requests) = handoff::new(TWO, TWO, Clock::starting_at(1));
    let bell = Arc::<Bell>::default();
    let mailbox = Mailbox::new(&bell);
    let mut group = Vec::new();
    future::block_on(async {
        hand_over(&handle, &mailbox).await.unwrap();
        hand_over(&handle, &mailbox).await.unwrap();
        requests.gather(&mut group).await;
    });
    let answering = thread::spawn(move || {
        let mut rings = Rings::default();
        for submission in group {
            submission.reply.answer(Answer::Fenced, &mut rings);
        }
    });
    future::block_on(async {
        bell.hear().await;
        let mut answers = mailbox.take().await.answers;
        if answers.len() < 2 {
            bell.hear().await;
            answers.extend(mailbox.take().await.answers);
        }
        assert_eq!(answers.len(), 2);
    });
    answering.join().unwrap();
}

/// A session waits for the one place in the queue, which the committer is about to free.
pub(crate) fn a_full_queue_meets_a_session_that_waits() {
    Alarm::default().set();
    let (handle, mut requests) = handoff::new(ONE, ONE, Clock::starting_at(1));
    let mailbox = Mailbox::new(&Arc::default());
    future::block_on(async { hand_over(&handle, &mailbox).await.unwrap() });
    let waiting = thread::spawn(move || {
        future::block_on(async { hand_over(&handle, &mailbox).await.unwrap() });
    });
    let mut group = Vec::new();
    future::block_on(async { requests.gather(&mut group).await });
    waiting.join().unwrap();
}

async fn hand_over(handle: &CommitHandle, mailbox: &Arc<Mailbox>) -> Result<(), Stopped> {
    let device = DeviceId {
        user: UserId([1; 16]),
        device: 1,
    };
    match handle.try_submit(device, Lane::Live, Request::Heartbeat, None, mailbox) {
        Ok(()) => Ok(()),
        Err(NotQueued::HasToWait(request)) => {
            handle
                .submit(device, Lane::Live, request, None, mailbox)
                .await
        }
        Err(NotQueued::Stopped) => Err(Stopped),
    }
}

const ONE: NonZeroUsize = NonZeroUsize::MIN;
const TWO: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1);
