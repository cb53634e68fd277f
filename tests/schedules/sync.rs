//! A model of what the hand-off waits and wakes with: the same names, as tokio documents them, made so
//! that a schedule can come between any two steps.
//!
//! Assumed, not proven: that tokio's and parking_lot's own do what is written here. What matters most is
//! copied with its awkward sides: `Notify` keeps one wake-up for whoever comes later; places in a queue
//! are given in the order they were asked for; and what is sent, with a place that was taken before, into
//! a queue whose receiver is gone stays there until the last sender is gone.

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    ops::DerefMut,
    pin::Pin,
    sync::{Arc, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use shuttle::sync::atomic::{AtomicBool, Ordering};

/// A mutex without poisoning, like parking_lot's.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn lock(&self) -> impl DerefMut<Target = T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A state that one step looks at or changes as a whole; other tasks come between two steps, never into
/// one.
#[derive(Debug, Default)]
struct Steps<T> {
    // A load is where shuttle may let another task go on.
    before: AtomicBool,
    state: std::sync::Mutex<T>,
}

impl<T> Steps<T> {
    fn new(state: T) -> Self {
        Self {
            before: AtomicBool::new(false),
            state: std::sync::Mutex::new(state),
        }
    }

    fn step(&self) -> impl DerefMut<Target = T> {
        self.before.load(Ordering::SeqCst);
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Those who wait, in their order. A waiter that was served and leaves hands on what it was given.
#[derive(Debug, Default)]
struct Line {
    next_ticket: u64,
    waiting: VecDeque<(u64, Waker)>,
    served: Vec<u64>,
}

impl Line {
    fn serve_first(&mut self) -> Option<Waker> {
        let (ticket, waker) = self.waiting.pop_front()?;
        self.served.push(ticket);
        Some(waker)
    }

    fn take_served(&mut self, ticket: u64) -> bool {
        let at = self.served.iter().position(|&served| served == ticket);
        at.map(|at| self.served.swap_remove(at)).is_some()
    }

    fn wait(&mut self, ticket: &mut Option<u64>, waker: &Waker) {
        if let Some(ticket) = *ticket {
            for (waiting, old) in &mut self.waiting {
                if *waiting == ticket {
                    old.clone_from(waker);
                }
            }
        } else {
            *ticket = Some(self.next_ticket);
            self.waiting.push_back((self.next_ticket, waker.clone()));
            self.next_ticket += 1;
        }
    }

    fn leave(&mut self, ticket: u64) {
        self.waiting.retain(|(waiting, _)| *waiting != ticket);
    }
}

#[derive(Debug, Default)]
pub(crate) struct Notify(Steps<NotifyState>);

#[derive(Debug, Default)]
struct NotifyState {
    is_kept: bool,
    line: Line,
}

impl NotifyState {
    fn notify_one(&mut self) -> Option<Waker> {
        let waker = self.line.serve_first();
        self.is_kept |= waker.is_none();
        waker
    }
}

impl Notify {
    pub(crate) fn notify_one(&self) {
        let waker = self.0.step().notify_one();
        wake(waker);
    }

    pub(crate) fn notified(&self) -> Notified<'_> {
        Notified {
            notify: self,
            ticket: None,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Notified<'a> {
    notify: &'a Notify,
    ticket: Option<u64>,
}

impl Future for Notified<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let notify = self.notify;
        let mut state = notify.0.step();
        let is_served = match self.ticket {
            None => std::mem::take(&mut state.is_kept),
            Some(ticket) => state.line.take_served(ticket),
        };
        if is_served {
            self.ticket = None;
            return Poll::Ready(());
        }
        state.line.wait(&mut self.ticket, context.waker());
        Poll::Pending
    }
}

impl Drop for Notified<'_> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let mut state = self.notify.0.step();
        state.line.leave(ticket);
        let waker = if state.line.take_served(ticket) {
            state.notify_one()
        } else {
            None
        };
        drop(state);
        wake(waker);
    }
}

pub(crate) mod mpsc {
    //! A bounded queue with one receiver.

    use super::{Arc, Context, Line, Poll, Steps, VecDeque, Waker, poll_fn, wake};

    #[derive(Debug)]
    struct Queue<T> {
        capacity: usize,
        state: Steps<State<T>>,
    }

    #[derive(Debug)]
    struct State<T> {
        sent: VecDeque<T>,
        free_places: usize,
        line: Line,
        senders: usize,
        is_closed: bool,
        receiver: Option<Waker>,
    }

    impl<T> State<T> {
        fn free_place(&mut self) -> Option<Waker> {
            let waker = self.line.serve_first();
            if waker.is_none() {
                self.free_places += 1;
            }
            waker
        }
    }

    pub(crate) fn channel<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
        let queue = Arc::new(Queue {
            capacity,
            state: Steps::new(State {
                sent: VecDeque::new(),
                free_places: capacity,
                line: Line::default(),
                senders: 1,
                is_closed: false,
                receiver: None,
            }),
        });
        (Sender(Arc::clone(&queue)), Receiver(queue))
    }

    #[derive(Debug)]
    pub(crate) struct Sender<T>(Arc<Queue<T>>);

    impl<T> Sender<T> {
        pub(crate) async fn reserve(&self) -> Result<Permit<'_, T>, Closed> {
            let mut place = Place {
                queue: &self.0,
                ticket: None,
            };
            poll_fn(|context| place.poll(context)).await?;
            Ok(Permit {
                queue: &self.0,
                is_used: false,
            })
        }

        pub(crate) async fn send(&self, value: T) -> Result<(), Closed> {
            self.reserve().await?.send(value);
            Ok(())
        }

        pub(crate) fn try_reserve(&self) -> Result<Permit<'_, T>, NoPlace> {
            let mut state = self.0.state.step();
            if state.is_closed || state.free_places == 0 {
                return Err(NoPlace);
            }
            state.free_places -= 1;
            drop(state);
            Ok(Permit {
                queue: &self.0,
                is_used: false,
            })
        }

        pub(crate) fn is_closed(&self) -> bool {
            self.0.state.step().is_closed
        }

        pub(crate) fn max_capacity(&self) -> usize {
            self.0.capacity
        }

        pub(crate) fn capacity(&self) -> usize {
            self.0.state.step().free_places
        }
    }

    impl<T> Clone for Sender<T> {
        fn clone(&self) -> Self {
            self.0.state.step().senders += 1;
            Self(Arc::clone(&self.0))
        }
    }

    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            let mut state = self.0.state.step();
            state.senders -= 1;
            let waker = if state.senders == 0 {
                state.receiver.take()
            } else {
                None
            };
            drop(state);
            wake(waker);
        }
    }

    #[derive(Debug)]
    pub(crate) struct Closed;

    #[derive(Debug)]
    pub(crate) struct NoPlace;

    /// A place that is waited for.
    struct Place<'a, T> {
        queue: &'a Queue<T>,
        ticket: Option<u64>,
    }

    impl<T> Place<'_, T> {
        fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Closed>> {
            let mut state = self.queue.state.step();
            if self
                .ticket
                .is_some_and(|ticket| state.line.take_served(ticket))
            {
                self.ticket = None;
                return Poll::Ready(Ok(()));
            }
            if state.is_closed {
                return Poll::Ready(Err(Closed));
            }
            if self.ticket.is_none() && state.free_places > 0 {
                state.free_places -= 1;
                return Poll::Ready(Ok(()));
            }
            state.line.wait(&mut self.ticket, context.waker());
            Poll::Pending
        }
    }

    impl<T> Drop for Place<'_, T> {
        fn drop(&mut self) {
            let Some(ticket) = self.ticket else { return };
            let mut state = self.queue.state.step();
            state.line.leave(ticket);
            let waker = if state.line.take_served(ticket) {
                state.free_place()
            } else {
                None
            };
            drop(state);
            wake(waker);
        }
    }

    #[derive(Debug)]
    pub(crate) struct Permit<'a, T> {
        queue: &'a Queue<T>,
        is_used: bool,
    }

    impl<T> Permit<'_, T> {
        pub(crate) fn send(mut self, value: T) {
            self.is_used = true;
            self.queue.state.step().sent.push_back(value);
            let waker = self.queue.state.step().receiver.take();
            wake(waker);
        }
    }

    impl<T> Drop for Permit<'_, T> {
        fn drop(&mut self) {
            if !self.is_used {
                let waker = self.queue.state.step().free_place();
                wake(waker);
            }
        }
    }

    #[derive(Debug)]
    pub(crate) struct Receiver<T>(Arc<Queue<T>>);

    impl<T> Receiver<T> {
        pub(crate) async fn recv(&mut self) -> Option<T> {
            poll_fn(|context| {
                if let Ok(value) = self.try_recv() {
                    return Poll::Ready(Some(value));
                }
                let mut state = self.0.state.step();
                if !state.sent.is_empty() {
                    drop(state);
                    return Poll::Ready(self.try_recv().ok());
                }
                if state.senders == 0 {
                    return Poll::Ready(None);
                }
                state.receiver = Some(context.waker().clone());
                Poll::Pending
            })
            .await
        }

        pub(crate) fn try_recv(&mut self) -> Result<T, Empty> {
            let value = self.0.state.step().sent.pop_front().ok_or(Empty)?;
            let waker = self.0.state.step().free_place();
            wake(waker);
            Ok(value)
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.0.state.step().sent.is_empty()
        }

        pub(crate) fn is_closed(&self) -> bool {
            let state = self.0.state.step();
            state.is_closed || state.senders == 0
        }
    }

    impl<T> Drop for Receiver<T> {
        fn drop(&mut self) {
            let waiting = {
                let mut state = self.0.state.step();
                state.is_closed = true;
                std::mem::take(&mut state.line.waiting)
            };
            for (_, waker) in waiting {
                waker.wake();
            }
            while let Ok(value) = self.try_recv() {
                drop(value);
            }
        }
    }

    #[derive(Debug)]
    pub(crate) struct Empty;
}

pub(crate) mod oneshot {
    //! One value from one sender to one receiver.

    use super::{Arc, Context, Future, Pin, Poll, Steps, Waker, wake};

    #[derive(Debug)]
    struct State<T> {
        value: Option<T>,
        is_sender_gone: bool,
        is_receiver_gone: bool,
        receiver: Option<Waker>,
    }

    pub(crate) fn channel<T>() -> (Sender<T>, Receiver<T>) {
        let state = Arc::new(Steps::new(State {
            value: None,
            is_sender_gone: false,
            is_receiver_gone: false,
            receiver: None,
        }));
        (Sender(Arc::clone(&state)), Receiver(state))
    }

    #[derive(Debug)]
    pub(crate) struct Sender<T>(Arc<Steps<State<T>>>);

    impl<T> Sender<T> {
        pub(crate) fn send(self, value: T) -> Result<(), T> {
            let mut state = self.0.step();
            if state.is_receiver_gone {
                return Err(value);
            }
            // Told when it is dropped, which is now.
            state.value = Some(value);
            Ok(())
        }
    }

    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            let waker = {
                let mut state = self.0.step();
                state.is_sender_gone = true;
                state.receiver.take()
            };
            wake(waker);
        }
    }

    #[derive(Debug)]
    pub(crate) struct Receiver<T>(Arc<Steps<State<T>>>);

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Dropped;

    impl<T> Future for Receiver<T> {
        type Output = Result<T, Dropped>;

        fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
            let mut state = self.0.step();
            if let Some(value) = state.value.take() {
                return Poll::Ready(Ok(value));
            }
            if state.is_sender_gone {
                return Poll::Ready(Err(Dropped));
            }
            state.receiver = Some(context.waker().clone());
            Poll::Pending
        }
    }

    impl<T> Drop for Receiver<T> {
        fn drop(&mut self) {
            self.0.step().is_receiver_gone = true;
        }
    }
}

/// The alarm of one execution: the only thing that ends a sleep, so that no test of waking is saved by a
/// timer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Alarm(Arc<Steps<AlarmState>>);

#[derive(Debug, Default)]
struct AlarmState {
    rings: u64,
    is_ringing_for_ever: bool,
    sleepers: Vec<Waker>,
}

impl Alarm {
    /// Makes this the alarm of the execution that begins.
    pub(crate) fn set(&self) {
        ALARM.set(Some(self.clone()));
    }

    /// Ends the sleeps that have begun.
    pub(crate) fn ring(&self) {
        self.ring_then(false);
    }

    /// Ends all sleeps from now on.
    pub(crate) fn ring_for_ever(&self) {
        self.ring_then(true);
    }

    fn ring_then(&self, for_ever: bool) {
        let sleepers = {
            let mut state = self.0.step();
            state.rings += 1;
            state.is_ringing_for_ever |= for_ever;
            std::mem::take(&mut state.sleepers)
        };
        for waker in sleepers {
            waker.wake();
        }
    }
}

thread_local! {
    // One execution at a time on each thread: shuttle runs all tasks of an execution on one.
    static ALARM: std::cell::RefCell<Option<Alarm>> = const { std::cell::RefCell::new(None) };
}

pub(crate) async fn sleep(_duration: Duration) {
    let alarm = ALARM
        .with_borrow(Clone::clone)
        .expect("the execution has set its alarm");
    let mut begun_at = None;
    poll_fn(|context| {
        let mut state = alarm.0.step();
        let begun_at = *begun_at.get_or_insert(state.rings);
        if state.is_ringing_for_ever || begun_at < state.rings {
            return Poll::Ready(());
        }
        state.sleepers.push(context.waker().clone());
        Poll::Pending
    })
    .await;
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}
