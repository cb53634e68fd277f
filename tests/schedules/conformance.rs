//! The model of `sync.rs` and what the gateway uses behave alike, step by step, wherever the hand-off leans
//! on it. Each of these is played with both. Knows no hand-off.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
};

/// Looks once whether it is ready.
fn ready<F: Future>(future: Pin<&mut F>) -> Option<F::Output> {
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

macro_rules! behaves {
    ($module:ident, $play:path, $notify:path, $mpsc:path, $oneshot:path) => {
        mod $module {
            use std::{pin::pin, sync::Arc};

            use super::ready;
            use $mpsc as mpsc;
            use $notify as Notify;
            use $oneshot as oneshot;

            #[test]
            fn one_wake_up_is_kept_for_whoever_comes_later() {
                $play(|| {
                    let notify = Notify::default();
                    notify.notify_one();
                    notify.notify_one();
                    assert!(ready(pin!(notify.notified())).is_some());
                    assert!(ready(pin!(notify.notified())).is_none());
                });
            }

            #[test]
            fn a_waiter_that_leaves_hands_its_wake_up_on() {
                $play(|| {
                    let notify = Notify::default();
                    let mut first = Box::pin(notify.notified());
                    let mut second = Box::pin(notify.notified());
                    assert!(ready(first.as_mut()).is_none());
                    assert!(ready(second.as_mut()).is_none());
                    notify.notify_one();
                    assert!(ready(second.as_mut()).is_none());
                    drop(first);
                    assert!(ready(second.as_mut()).is_some());
                    notify.notify_one();
                    drop(Box::pin(notify.notified()));
                    assert!(ready(pin!(notify.notified())).is_some());
                });
            }

            #[test]
            fn places_go_to_those_who_wait_in_their_order() {
                $play(|| {
                    let (sender, mut receiver) = mpsc::channel(1);
                    let place = ready(pin!(sender.reserve())).unwrap().unwrap();
                    assert_eq!((sender.capacity(), sender.max_capacity()), (0, 1));
                    let mut first = Box::pin(sender.reserve());
                    let mut second = Box::pin(sender.reserve());
                    let mut third = Box::pin(sender.reserve());
                    assert!(ready(first.as_mut()).is_none());
                    assert!(ready(second.as_mut()).is_none());
                    assert!(ready(third.as_mut()).is_none());
                    place.send(1);
                    assert!(ready(first.as_mut()).is_none());
                    assert_eq!(receiver.try_recv().ok(), Some(1));
                    assert!(ready(second.as_mut()).is_none());
                    // It was given the place and does not take it.
                    drop(first);
                    let place = ready(second.as_mut()).unwrap().unwrap();
                    assert!(ready(third.as_mut()).is_none());
                    drop(place);
                    assert!(ready(third.as_mut()).is_some());
                });
            }

            #[test]
            fn what_was_sent_is_received_before_the_end() {
                $play(|| {
                    let (sender, mut receiver) = mpsc::channel(2);
                    assert!(receiver.is_empty() && receiver.try_recv().is_err());
                    assert!(ready(pin!(receiver.recv())).is_none());
                    ready(pin!(sender.reserve())).unwrap().unwrap().send(1);
                    assert!(!receiver.is_empty() && !receiver.is_closed());
                    drop(sender.clone());
                    assert!(!receiver.is_closed());
                    drop(sender);
                    assert!(receiver.is_closed());
                    assert_eq!(ready(pin!(receiver.recv())), Some(Some(1)));
                    assert_eq!(ready(pin!(receiver.recv())), Some(None));
                });
            }

            #[test]
            fn a_receiver_that_goes_drops_what_was_sent_and_keeps_what_is_sent_later() {
                $play(|| {
                    let value = Arc::new(());
                    let (sender, receiver) = mpsc::channel(3);
                    ready(pin!(sender.reserve()))
                        .unwrap()
                        .unwrap()
                        .send(Arc::clone(&value));
                    let place = ready(pin!(sender.reserve())).unwrap().unwrap();
                    assert!(!sender.is_closed());
                    drop(receiver);
                    assert_eq!(Arc::strong_count(&value), 1);
                    assert!(sender.is_closed());
                    assert!(ready(pin!(sender.reserve())).unwrap().is_err());
                    // The reason why the hand-off looks again after it has sent.
                    place.send(Arc::clone(&value));
                    assert_eq!(Arc::strong_count(&value), 2);
                    drop(sender);
                    assert_eq!(Arc::strong_count(&value), 1);
                });
            }

            #[test]
            fn who_waits_for_a_place_is_told_that_the_receiver_goes() {
                $play(|| {
                    let (sender, receiver) = mpsc::channel::<u32>(1);
                    let place = ready(pin!(sender.reserve())).unwrap().unwrap();
                    let mut waiting = Box::pin(sender.reserve());
                    assert!(ready(waiting.as_mut()).is_none());
                    drop(receiver);
                    assert!(ready(waiting.as_mut()).unwrap().is_err());
                    drop(place);
                });
            }

            #[test]
            fn who_sends_for_lack_of_a_place_waits_and_is_told_that_the_receiver_goes() {
                $play(|| {
                    let (sender, mut receiver) = mpsc::channel(1);
                    assert!(ready(pin!(sender.send(1))).unwrap().is_ok());
                    let mut second = Box::pin(sender.send(2));
                    let mut third = Box::pin(sender.send(3));
                    assert!(ready(second.as_mut()).is_none());
                    assert!(ready(third.as_mut()).is_none());
                    assert_eq!(receiver.try_recv().ok(), Some(1));
                    assert!(ready(third.as_mut()).is_none());
                    assert!(ready(second.as_mut()).unwrap().is_ok());
                    drop(receiver);
                    assert!(ready(third.as_mut()).unwrap().is_err());
                });
            }

            #[test]
            fn an_answer_is_kept_until_it_is_asked_for_and_comes_once() {
                $play(|| {
                    let (sender, receiver) = oneshot::channel();
                    let mut receiver = Box::pin(receiver);
                    assert!(ready(receiver.as_mut()).is_none());
                    assert_eq!(sender.send(1), Ok(()));
                    assert_eq!(ready(receiver.as_mut()), Some(Ok(1)));
                });
            }

            #[test]
            fn either_end_of_an_answer_learns_that_the_other_has_gone() {
                $play(|| {
                    let (sender, receiver) = oneshot::channel::<u32>();
                    let mut receiver = Box::pin(receiver);
                    assert!(ready(receiver.as_mut()).is_none());
                    drop(sender);
                    assert!(ready(receiver.as_mut()).unwrap().is_err());
                    let (sender, receiver) = oneshot::channel();
                    drop(receiver);
                    assert_eq!(sender.send(2), Err(2));
                });
            }
        }
    };
}

fn play_alone(case: fn()) {
    case();
}

fn play_in_shuttle(case: fn()) {
    shuttle::check_random(case, 1);
}

behaves!(
    model,
    super::play_in_shuttle,
    crate::sync::Notify,
    crate::sync::mpsc,
    crate::sync::oneshot
);
behaves!(
    tokios,
    super::play_alone,
    tokio::sync::Notify,
    tokio::sync::mpsc,
    tokio::sync::oneshot
);
