//! The hand-off: from many sessions to the one committer, and back.
//!
//! Requests wait in a queue per lane, answers in a mailbox per session, and a bell per worker tells that
//! there are some. Knows order, receipt and who is to be woken; must not know what a request means, what
//! a record is, or where anything is stored. All that waits or wakes here comes from `crate::sync`, or is a
//! waker under a lock of it, so that `tests/schedules` can try out the orders in which sessions and committer meet.
//!
//! # Bounds
//!
//! Each lane has a queue of `queue_requests`. When one is full its sessions wait for a place and read
//! nothing more of that lane, so that QUIC flow control holds the devices back. Early data never waits for a
//! place and takes none of the last half of LIVE's: it has time until its handshake is over. A mailbox holds
//! what its session has in flight, and a bell the mailboxes that got something since it was heard last.

use std::{
    future::poll_fn,
    num::NonZeroUsize,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use waypost_proto::{
    device::{Claim, Deferral},
    id::DeviceId,
    session::{Granted, Lane, Request, Settled, Welcomed, batch_len},
};

use crate::{
    clock::Clock,
    sync::{Mutex, Notify, mpsc, sleep},
};

/// Two queues: the end that sessions hold and the end that the committer holds.
#[must_use]
pub(crate) fn new(
    queue_requests: NonZeroUsize,
    group_pings: NonZeroUsize,
    clock: Clock,
) -> (CommitHandle, Requests) {
    let (live_sender, live) = mpsc::channel(queue_requests.get());
    let (backfill_sender, backfill) = mpsc::channel(queue_requests.get());
    let handle = CommitHandle {
        live: live_sender,
        backfill: backfill_sender,
        clock: clock.clone(),
    };
    let resolved_ms = clock.now_ms().saturating_sub(1);
    let requests = Requests {
        live,
        backfill,
        group_pings: group_pings.get(),
        clock,
        resolved_ms,
    };
    (handle, requests)
}

/// What a session gets back.
#[derive(Debug)]
pub enum Answer {
    /// To a Hello.
    Welcomed(Welcomed),
    /// To a batch or a heartbeat.
    Settled(Settled),
    /// To what the holder wanted.
    Granted(Granted),
    /// The holder has erased the user: nothing more is taken.
    Erased,
    /// The batch was of an epoch that ended while it waited; or it was early data, and nothing may be said of
    /// it before Hello is judged.
    Fenced,
    /// The device is revoked. Nothing of the request is kept.
    Revoked,
    /// It is not known whether the request is on disk: the committer stopped. The device keeps what it
    /// has and sends it again.
    Lost,
}

/// Wakes the sessions of one worker.
///
/// To wake a task of another thread takes a lock and a system call. So the committer only puts a mailbox that has
/// got its first answer on the bell's list, and rings once for all answers of a group; [`Self::serve`], on
/// the worker's own thread, wakes each session once, which costs next to nothing there.
#[derive(Debug, Default)]
pub struct Bell {
    filled: Mutex<Vec<Arc<Mailbox>>>,
    rung: Notify,
}

impl Bell {
    /// Wakes sessions whenever the bell has rung, for ever. To be run where they run, once.
    pub async fn serve(&self) {
        loop {
            self.hear().await;
        }
    }

    /// Waits until there is news in any mailbox, and wakes the sessions of all that have some.
    pub async fn hear(&self) {
        loop {
            let filled = std::mem::take(&mut *self.filled.lock());
            if !filled.is_empty() {
                for mailbox in filled {
                    mailbox.wake();
                }
                return;
            }
            self.rung.notified().await;
        }
    }

    /// Puts a mailbox on the list. True if it is the first there: then the bell must be rung.
    fn list(&self, mailbox: &Arc<Mailbox>) -> bool {
        let mut filled = self.filled.lock();
        filled.push(Arc::clone(mailbox));
        filled.len() == 1
    }
}

/// The bells to be rung when a group is answered. That happens when it is dropped, so whatever becomes of
/// the committer, none is forgotten.
#[derive(Debug, Default)]
pub(crate) struct Rings(Vec<Arc<Bell>>);

impl Drop for Rings {
    fn drop(&mut self) {
        for bell in &self.0 {
            bell.rung.notify_one();
        }
    }
}

/// Where the answers for one session collect. Bounded by what the session may have in flight.
#[derive(Debug)]
pub struct Mailbox {
    inbox: Mutex<Inbox>,
    hello_answered: Notify,
    bell: Arc<Bell>,
}

/// What a session finds in its mailbox.
#[derive(Debug)]
pub struct Mail {
    /// In the order it was asked; perhaps none.
    pub answers: Vec<(Lane, Answer)>,
    /// Whether the session was called: there is something else to look at.
    pub is_call: bool,
}

#[derive(Debug, Default)]
struct Inbox {
    answers: Vec<(Lane, Answer)>,
    is_call: bool,
    is_taken_over: bool,
    /// Hellos that were handed over and not answered.
    waiting_hellos: usize,
    /// The session, while it waits for what may come here.
    session: Option<Waker>,
}

impl Inbox {
    fn wait(&mut self, context: &Context<'_>) {
        match &mut self.session {
            Some(session) => session.clone_from(context.waker()),
            None => self.session = Some(context.waker().clone()),
        }
    }
}

impl Mailbox {
    /// An empty one, of a session of the worker that hears `bell`.
    #[must_use]
    pub fn new(bell: &Arc<Bell>) -> Arc<Self> {
        Arc::new(Self {
            inbox: Mutex::default(),
            hello_answered: Notify::default(),
            bell: Arc::clone(bell),
        })
    }

    /// Waits until there is something, and takes all of it. Only its session may wait, for one thing at a time.
    pub async fn take(&self) -> Mail {
        poll_fn(|context| self.poll_take(context)).await
    }

    fn poll_take(&self, context: &Context<'_>) -> Poll<Mail> {
        let mut inbox = self.inbox.lock();
        if !inbox.is_call && inbox.answers.is_empty() {
            inbox.wait(context);
            return Poll::Pending;
        }
        Poll::Ready(Mail {
            answers: std::mem::take(&mut inbox.answers),
            is_call: std::mem::take(&mut inbox.is_call),
        })
    }

    /// Wakes the session if it waits. If not, it looks into its mailbox before it does.
    fn wake(&self) {
        let session = self.inbox.lock().session.take();
        if let Some(session) = session {
            session.wake();
        }
    }

    /// Calls the session, from whichever thread: something has changed that it looks at when it is called. One
    /// thing to wait for costs it less than one for each of these.
    pub fn call(&self) {
        self.inbox.lock().is_call = true;
        self.wake();
    }

    /// Tells the session, and calls it, that a newer connection of its device has taken over.
    pub fn take_over(&self) {
        self.inbox.lock().is_taken_over = true;
        self.call();
    }

    /// Whether a newer connection has taken over.
    #[must_use]
    pub fn is_taken_over(&self) -> bool {
        self.inbox.lock().is_taken_over
    }

    /// Waits until a newer connection has taken over, and leaves everything in the mailbox.
    pub async fn taken_over(&self) {
        poll_fn(|context| {
            let mut inbox = self.inbox.lock();
            if inbox.is_taken_over {
                return Poll::Ready(());
            }
            inbox.wait(context);
            Poll::Pending
        })
        .await;
    }

    /// Waits until no Hello of the session waits for its answer.
    async fn greeted(&self) {
        while self.inbox.lock().waiting_hellos > 0 {
            self.hello_answered.notified().await;
        }
    }
}

/// The right to answer one request. Dropped without an answer, it answers [`Answer::Lost`], so that no
/// session waits for ever whatever becomes of the committer.
#[derive(Debug)]
pub(crate) struct Reply {
    mailbox: Arc<Mailbox>,
    lane: Lane,
    is_hello: bool,
    is_answered: bool,
}

impl Reply {
    fn new(mailbox: &Arc<Mailbox>, lane: Lane, is_hello: bool) -> Self {
        if is_hello {
            mailbox.inbox.lock().waiting_hellos += 1;
        }
        Self {
            mailbox: Arc::clone(mailbox),
            lane,
            is_hello,
            is_answered: false,
        }
    }

    /// Answers, once and for all. The session hears of it when `rings` is dropped.
    pub(crate) fn answer(mut self, answer: Answer, rings: &mut Rings) {
        self.post(answer, rings);
    }

    fn post(&mut self, answer: Answer, rings: &mut Rings) {
        self.is_answered = true;
        let mut inbox = self.mailbox.inbox.lock();
        inbox.waiting_hellos -= usize::from(self.is_hello);
        let is_first = inbox.answers.is_empty();
        inbox.answers.push((self.lane, answer));
        drop(inbox);
        if is_first && self.mailbox.bell.list(&self.mailbox) {
            rings.0.push(Arc::clone(&self.mailbox.bell));
        }
        if self.is_hello {
            self.mailbox.hello_answered.notify_one();
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.is_answered {
            self.post(Answer::Lost, &mut Rings::default());
        }
    }
}

/// One request on its way to the committer.
#[derive(Debug)]
pub(crate) struct Submission {
    /// Who asks.
    pub(crate) device: DeviceId,
    /// When it was received: later than every moment that was announced before it was gathered.
    pub(crate) receive_ms: u64,
    /// What is asked.
    pub(crate) request: Request,
    /// A batch is to be put off, whatever is in it.
    pub(crate) deferral: Option<Deferral>,
    /// A batch came as early data, behind a Hello that claims this. It proves nothing of who sent it.
    pub(crate) early: Option<Claim>,
    /// The right to answer it.
    pub(crate) reply: Reply,
}

/// Hands requests to the committer. When the last clone is gone, the committer finishes what is queued
/// and stops.
#[derive(Clone, Debug)]
pub struct CommitHandle {
    live: mpsc::Sender<Submission>,
    backfill: mpsc::Sender<Submission>,
    clock: Clock,
}

/// The committer has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the committer has stopped")]
pub struct Stopped;

/// Why a request was not queued at once.
#[derive(Debug)]
pub enum NotQueued {
    /// There is no room, or it is of BACKFILL and may have to wait for a Hello.
    HasToWait(Request),
    /// The committer has stopped.
    Stopped,
}

impl From<Stopped> for NotQueued {
    fn from(Stopped: Stopped) -> Self {
        Self::Stopped
    }
}

impl CommitHandle {
    /// Queues a Hello, or a request of LIVE, if there is room: the usual case, which needs no future.
    ///
    /// # Errors
    /// The request, when it would have to wait, for [`Self::submit`]; or when the committer has stopped.
    pub fn try_submit(
        &self,
        device: DeviceId,
        lane: Lane,
        request: Request,
        deferral: Option<Deferral>,
        mailbox: &Arc<Mailbox>,
    ) -> Result<(), NotQueued> {
        let is_hello = matches!(request, Request::Hello(_));
        if !is_hello && lane != Lane::Live {
            return Err(NotQueued::HasToWait(request));
        }
        match self.live.try_reserve() {
            Ok(place) => {
                let reply = Reply::new(mailbox, lane, is_hello);
                let submission = self.received(device, request, deferral, reply);
                Ok(send(&self.live, place, submission)?)
            }
            Err(_) => Err(NotQueued::HasToWait(request)),
        }
    }

    /// Queues a request; waits while the lane's queue is full, and with a batch of BACKFILL while a Hello
    /// of the session waits for its answer.
    ///
    /// # Errors
    /// When the committer has stopped. The mailbox may get [`Answer::Lost`] for this request all the same.
    pub async fn submit(
        &self,
        device: DeviceId,
        lane: Lane,
        request: Request,
        deferral: Option<Deferral>,
        mailbox: &Arc<Mailbox>,
    ) -> Result<(), Stopped> {
        let is_hello = matches!(request, Request::Hello(_));
        let queue = if is_hello || lane == Lane::Live {
            // Hello is small, and nothing on either lane can go on before it is answered.
            &self.live
        } else {
            // LIVE may hold more than a group: this would be judged before the Hello that says what its
            // numbers mean, and another store's pings be taken for duplicates of this one's.
            mailbox.greeted().await;
            &self.backfill
        };
        let place = queue.reserve().await.map_err(|_| Stopped)?;
        let reply = Reply::new(mailbox, lane, is_hello);
        send(
            queue,
            place,
            self.received(device, request, deferral, reply),
        )
    }

    /// A request that is received now: once there is a place, so that what waited for one does not lie about
    /// when that was.
    fn received(
        &self,
        device: DeviceId,
        request: Request,
        deferral: Option<Deferral>,
        reply: Reply,
    ) -> Submission {
        Submission {
            device,
            receive_ms: self.clock.now_ms(),
            request,
            deferral,
            early: None,
            reply,
        }
    }

    /// Queues a batch of LIVE that came as early data, if there is room to spare. False if there is not; it
    /// can still be submitted when the handshake is over.
    #[must_use]
    pub fn offer_early(
        &self,
        device: DeviceId,
        claim: Claim,
        request: Request,
        mailbox: &Arc<Mailbox>,
    ) -> bool {
        if self.live.capacity() <= self.live.max_capacity() / 2 {
            return false;
        }
        let Ok(place) = self.live.try_reserve() else {
            return false;
        };
        // A committer that goes just now leaves it unanswered, and refuses the Hello that follows it.
        place.send(Submission {
            device,
            receive_ms: self.clock.now_ms(),
            request,
            deferral: None,
            early: Some(claim),
            reply: Reply::new(mailbox, Lane::Live, false),
        });
        true
    }

    /// How many requests wait, per lane.
    #[must_use]
    pub fn depth(&self, lane: Lane) -> usize {
        let queue = match lane {
            Lane::Live => &self.live,
            Lane::Backfill => &self.backfill,
        };
        queue.max_capacity() - queue.capacity()
    }
}

/// The committer's end of the queues. Dropped, it answers whatever waits with [`Answer::Lost`].
#[derive(Debug)]
pub(crate) struct Requests {
    live: mpsc::Receiver<Submission>,
    backfill: mpsc::Receiver<Submission>,
    group_pings: usize,
    clock: Clock,
    /// Everything received up to then was in a group that has been gathered.
    resolved_ms: u64,
}

/// What came of gathering a group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gathered {
    /// When the queues were drained.
    pub(crate) drain_ms: u64,
    /// Everything that was received up to then is in this group or an earlier one.
    pub(crate) resolved_ms: u64,
}

impl Requests {
    /// Waits until something is queued and takes what there is into `group`, LIVE first, up to the
    /// group's size; or nothing, every [`IDLE_RESOLVE_INTERVAL`]. None when every handle is gone and the
    /// queues are empty.
    pub(crate) async fn gather(&mut self, group: &mut Vec<Submission>) -> Option<Gathered> {
        let first = tokio::select! {
            biased;
            Some(submission) = self.live.recv() => Some((Lane::Live, submission)),
            Some(submission) = self.backfill.recv() => Some((Lane::Backfill, submission)),
            () = sleep(IDLE_RESOLVE_INTERVAL),
                if !(self.live.is_closed() && self.backfill.is_closed()) => None,
            else => return None,
        };
        // Read before the queues are drained: whatever is queued after this moment is received
        // after it.
        let drain_ms = self.clock.now_ms();
        let mut pings = 0;
        // Each queue is in the order of receipt, but for sessions that meet between stamp and queue: what
        // is left in it is no older than what was taken, or is moved below.
        let mut taken_upto_ms = [self.resolved_ms; 2];
        if let Some((lane, first)) = first {
            pings += request_len(&first.request);
            taken_upto_ms[lane as usize] = first.receive_ms;
            group.push(first);
        }
        // BACKFILL keeps an eighth of every group, so that it goes on under any load of LIVE.
        let bounds = [self.group_pings - self.group_pings / 8, self.group_pings];
        // More may be received within the millisecond of the drain, and of the last request taken.
        let mut resolved_ms = drain_ms.saturating_sub(1);
        for ((queue, bound), upto_ms) in [&mut self.live, &mut self.backfill]
            .into_iter()
            .zip(bounds)
            .zip(&mut taken_upto_ms)
        {
            while pings < bound {
                let Ok(submission) = queue.try_recv() else {
                    break;
                };
                pings += request_len(&submission.request);
                *upto_ms = submission.receive_ms;
                group.push(submission);
            }
            if !queue.is_empty() {
                resolved_ms = resolved_ms.min(upto_ms.saturating_sub(1));
            }
        }
        // A request that was stamped just before an announcement and queued just after it was heard,
        // as far as anybody can know, right after the announced moment.
        for submission in group {
            submission.receive_ms = submission.receive_ms.max(self.resolved_ms + 1);
        }
        self.resolved_ms = self.resolved_ms.max(resolved_ms);
        Some(Gathered {
            drain_ms,
            resolved_ms: self.resolved_ms,
        })
    }
}

fn send(
    queue: &mpsc::Sender<Submission>,
    place: mpsc::Permit<'_, Submission>,
    submission: Submission,
) -> Result<(), Stopped> {
    place.send(submission);
    // What is sent into a queue whose other end is gone is neither refused nor dropped: it lies there
    // until the last handle goes, and nobody would answer it.
    if queue.is_closed() {
        return Err(Stopped);
    }
    Ok(())
}

fn request_len(request: &Request) -> usize {
    match request {
        Request::Hello(_)
        | Request::Heartbeat
        | Request::Control { .. }
        | Request::Checkers { .. } => 1,
        Request::Batch { batch, .. } => batch_len(batch) as usize,
    }
}

/// How often an idle committer says that nothing is left behind, well below the second that the
/// freshness contract allows.
const IDLE_RESOLVE_INTERVAL: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_announced_ends_before_the_current_millisecond() {
        let (handle, mut requests) = standing_still(100);
        for _ in 0..2 {
            // All of it happens in one millisecond: none of it may be announced, and none be moved.
            ask(&handle, Lane::Live, Request::Heartbeat, &mailbox()).await;
            let (group, gathered) = gather(&mut requests).await;
            assert_eq!(group[0].receive_ms, STANDING_MS);
            assert_eq!(gathered.resolved_ms, STANDING_MS - 1);
        }
    }

    #[tokio::test]
    async fn what_is_left_in_a_queue_is_not_announced() {
        let (handle, mut requests) = standing_still(1);
        for _ in 0..3 {
            ask(&handle, Lane::Backfill, Request::Heartbeat, &mailbox()).await;
        }
        for left in [2, 1, 0] {
            let (group, gathered) = gather(&mut requests).await;
            assert_eq!((group.len(), handle.depth(Lane::Backfill)), (1, left));
            assert_eq!(group[0].receive_ms, STANDING_MS);
            assert_eq!(gathered.resolved_ms, STANDING_MS - 1);
        }
    }

    #[tokio::test]
    async fn backfill_is_not_judged_before_a_hello_that_more_than_a_group_of_live_is_ahead_of() {
        let (handle, mut requests) = standing_still(8);
        for _ in 0..20 {
            ask(&handle, Lane::Live, Request::Heartbeat, &mailbox()).await;
        }
        let mailbox = mailbox();
        ask(
            &handle,
            Lane::Live,
            Request::Hello(Claim::default()),
            &mailbox,
        )
        .await;
        let session = tokio::spawn(async move {
            ask(&handle, Lane::Backfill, Request::Heartbeat, &mailbox).await;
            mailbox.take().await;
        });
        // The session waits wherever it is going to.
        tokio::task::yield_now().await;
        let mut order = Vec::new();
        while order.len() < 22 {
            for submission in gather(&mut requests).await.0 {
                order.push((submission.reply.lane, submission.reply.is_hello));
                submission
                    .reply
                    .answer(Answer::Fenced, &mut Rings::default());
            }
        }
        assert_eq!(order[20..], [(Lane::Live, true), (Lane::Backfill, false)]);
        session.await.expect("the session was answered");
    }

    #[tokio::test]
    async fn early_data_leaves_half_of_the_queue_to_those_who_are_proven() {
        let (handle, mut requests) = standing_still(1_000);
        let mailbox = mailbox();
        let offer = || {
            let claim = Claim::default();
            handle.offer_early(DEVICE, claim, Request::Heartbeat, &mailbox)
        };
        let taken = (0..100).filter(|_| offer()).count();
        assert_eq!(taken, 32);
        ask(&handle, Lane::Live, Request::Heartbeat, &mailbox).await;
        let (group, _) = gather(&mut requests).await;
        let early = group.iter().filter(|one| one.early.is_some()).count();
        assert_eq!((group.len(), early), (33, 32));
        assert!(offer(), "there is room again");
    }

    #[tokio::test]
    async fn a_committer_that_goes_answers_what_waits_and_refuses_what_comes() {
        let (handle, requests) = standing_still(8);
        let mailbox = mailbox();
        ask(&handle, Lane::Live, Request::Heartbeat, &mailbox).await;
        ask(&handle, Lane::Backfill, Request::Heartbeat, &mailbox).await;
        drop(requests);
        let answers = mailbox.take().await.answers;
        assert!(
            matches!(
                answers[..],
                [(Lane::Live, Answer::Lost), (Lane::Backfill, Answer::Lost)]
            ),
            "{answers:?}"
        );
        let result = submit(&handle, Lane::Live, Request::Heartbeat, &mailbox).await;
        assert_eq!(result, Err(Stopped));
    }

    /// A mailbox of a worker that hears its bell.
    fn mailbox() -> Arc<Mailbox> {
        let bell = Arc::new(Bell::default());
        let mailbox = Mailbox::new(&bell);
        tokio::spawn(async move { bell.serve().await });
        mailbox
    }

    /// Queues whose clock stands still, because the store remembers a time to come.
    fn standing_still(group_pings: usize) -> (CommitHandle, Requests) {
        new(
            const { NonZeroUsize::new(64).unwrap() },
            group_pings.try_into().unwrap(),
            Clock::starting_at(STANDING_MS),
        )
    }

    async fn ask(handle: &CommitHandle, lane: Lane, request: Request, mailbox: &Arc<Mailbox>) {
        submit(handle, lane, request, mailbox).await.unwrap();
    }

    async fn submit(
        handle: &CommitHandle,
        lane: Lane,
        request: Request,
        mailbox: &Arc<Mailbox>,
    ) -> Result<(), Stopped> {
        handle.submit(DEVICE, lane, request, None, mailbox).await
    }

    async fn gather(requests: &mut Requests) -> (Vec<Submission>, Gathered) {
        let mut group = Vec::new();
        let gathered = requests.gather(&mut group).await.expect("a handle is left");
        (group, gathered)
    }

    const DEVICE: DeviceId = DeviceId {
        user: waypost_proto::id::UserId([1; 16]),
        device: 1,
    };
    /// The year 2096.
    const STANDING_MS: u64 = 4_000_000_000_000;
}
