//! A stream that goes on: connects, reads, notices when nothing comes, and comes back.
//!
//! Knows connections and when to try again; what the events mean is [`crate::follow`]'s. One task, the
//! consumer's own: nothing runs while nobody calls [`Watch::next`].
//!
//! # Bounds
//!
//! The events of one message wait here, up to 4 MB on the wire. While a consumer is busy the gateway waits,
//! and sends the newest value of each user then: being slow costs values, never order or memory.

use std::{collections::VecDeque, fmt, pin::Pin, time::Duration};

use bytes::Bytes;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tonic::{Streaming, transport::Endpoint};
use waypost_proto::{
    id::UserId,
    v1::{State, WatchRequest, WatchResponse},
};

use crate::{
    CheckerError, Config, Event, Interruption, Resume, Violation,
    follow::{Follower, Overdue, Patience},
    rpc::freshness_client::FreshnessClient,
};

const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// A consumer that comes late leaves this much time to read what has come meanwhile.
const GRACE: Duration = Duration::from_millis(100);

/// Whom to watch. The default is everybody that the checker may see, in any state.
#[derive(Clone, Debug, Default)]
pub struct Selector {
    /// Only these users, at most 10,000; empty for all.
    pub users: Vec<UserId>,
    /// Only entries in these states; empty for all.
    pub states: Vec<State>,
}

/// A stream of [`Event`]s that outlives connections and gateways.
pub struct Watch {
    endpoint: Endpoint,
    address: String,
    selector: Selector,
    lost_after: Duration,
    follower: Follower,
    events: VecDeque<Event>,
    link: Link,
    /// Attempts since the last progress.
    failures: u32,
}

type Messages = Box<Streaming<WatchResponse>>;
type Opening = Pin<Box<dyn Future<Output = Result<Messages, Interrupted>> + Send>>;

/// How far the connection is.
enum Link {
    /// Another is tried at this moment.
    Pausing(Instant),
    /// Kept here while it goes on, so that a consumer that looks elsewhere meanwhile does not start it
    /// over and over.
    Opening(Opening),
    Streaming(Messages),
}

/// What became of waiting.
enum Step {
    Begin,
    Opened(Messages),
    Message(WatchResponse),
}

/// Why there is no stream.
enum Interrupted {
    /// It may go better next time.
    For(Interruption),
    /// It will not.
    Final(CheckerError),
}

impl Watch {
    /// Begins with a snapshot, or where an earlier watch with the same selection was. Nothing is sent
    /// before the first [`Self::next`], and nobody needs to be there yet.
    ///
    /// # Errors
    /// When the address or the certificates cannot be used.
    pub fn new(
        config: &Config,
        selector: Selector,
        from: Option<Resume>,
    ) -> Result<Self, CheckerError> {
        let patience = Patience {
            stale_after: config.stale_after,
            lost_after: config.lost_after,
        };
        let now = Instant::now();
        Ok(Self {
            endpoint: config.endpoint()?,
            address: config.address.clone(),
            selector,
            lost_after: config.lost_after,
            follower: Follower::new(from, patience, now.into_std()),
            events: VecDeque::new(),
            link: Link::Pausing(now),
            failures: 0,
        })
    }

    /// The next event. Comes back by itself to a gateway that went away; may be dropped and called again
    /// without losing anything.
    ///
    /// # Errors
    /// When the service refuses and coming back would not change that. Who calls again all the same asks
    /// again, after ten seconds.
    pub async fn next(&mut self) -> Result<Event, CheckerError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let stepped = match self.follower.due() {
                // What has come already counts, also when the consumer comes late for it.
                Some(due) => {
                    let due = Instant::from_std(due).max(Instant::now() + GRACE);
                    timeout_at(due, self.link.step()).await.ok()
                }
                None => Some(self.link.step().await),
            };
            let now = Instant::now().into_std();
            let interruption = match stepped {
                Some(Ok(Step::Begin)) => {
                    self.follower.begin(now);
                    self.link = Link::Opening(self.open());
                    continue;
                }
                Some(Ok(Step::Opened(stream))) => {
                    self.link = Link::Streaming(stream);
                    continue;
                }
                Some(Ok(Step::Message(message))) => match self.take(message) {
                    Ok(()) => {
                        // A stream of entries without progress does not wait, and is stale all the same.
                        if let Some(Overdue::Stale(event)) = self.follower.overdue(now) {
                            self.events.push_back(event);
                        }
                        continue;
                    }
                    Err(violation) => {
                        self.follower.distrust();
                        violation.into()
                    }
                },
                Some(Err(Interrupted::Final(error))) => {
                    self.follower.end();
                    self.link = Link::Pausing(Instant::now() + LAST_RETRY);
                    return Err(error);
                }
                Some(Err(Interrupted::For(interruption))) => interruption,
                None => match self.follower.overdue(now) {
                    None => continue,
                    Some(Overdue::Stale(event)) => return Ok(event),
                    Some(Overdue::Motionless) => Interruption::Motionless(self.lost_after),
                },
            };
            self.interrupt(interruption);
        }
    }

    fn take(&mut self, message: WatchResponse) -> Result<(), Violation> {
        let now = Instant::now().into_std();
        // A kind that this version does not know is none of its business.
        for kind in message.events.into_iter().filter_map(|event| event.kind) {
            self.follower.take(kind, now, &mut self.events)?;
            if let Some(Event::Progress { .. } | Event::Live { .. }) = self.events.back() {
                self.failures = 0;
            }
        }
        Ok(())
    }

    /// Ends the stream and says when the next is tried.
    fn interrupt(&mut self, why: Interruption) {
        let retry_in = back_off(self.failures, rand::random());
        self.failures = self.failures.saturating_add(1);
        self.follower.end();
        self.link = Link::Pausing(Instant::now() + retry_in);
        self.events.push_back(Event::Disconnected { why, retry_in });
    }

    /// A connection of its own for each stream: one that broke unnoticed is not used again.
    fn open(&self) -> Opening {
        let endpoint = self.endpoint.clone();
        let address = self.address.clone();
        let request = WatchRequest {
            token: self.follower.token(),
            user_ids: self
                .selector
                .users
                .iter()
                .map(|user| Bytes::copy_from_slice(&user.0))
                .collect(),
            states: self
                .selector
                .states
                .iter()
                .map(|&state| state.into())
                .collect(),
        };
        let patience = self.lost_after;
        Box::pin(async move {
            let opening = async {
                let channel = endpoint.connect().await.map_err(|source| {
                    let error = CheckerError::Connect { address, source };
                    Interrupted::For(Interruption::Unreachable(error))
                })?;
                let answer = FreshnessClient::new(channel).watch(request).await?;
                Ok(Box::new(answer.into_inner()))
            };
            timeout(patience, opening)
                .await
                .unwrap_or(Err(Interrupted::For(Interruption::Motionless(patience))))
        })
    }
}

impl Link {
    async fn step(&mut self) -> Result<Step, Interrupted> {
        match self {
            Self::Pausing(until) => {
                sleep_until(*until).await;
                Ok(Step::Begin)
            }
            Self::Opening(opening) => Ok(Step::Opened(opening.await?)),
            Self::Streaming(stream) => match stream.message().await? {
                Some(message) => Ok(Step::Message(message)),
                None => Err(Interrupted::For(Interruption::Ended)),
            },
        }
    }
}

impl From<tonic::Status> for Interrupted {
    fn from(status: tonic::Status) -> Self {
        let said = status.message().to_owned();
        match status.into() {
            error @ CheckerError::Refused(_) => Self::Final(error),
            _ => Self::For(Interruption::Status(said)),
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let link = match &self.link {
            Link::Pausing(_) => "pausing",
            Link::Opening(_) => "opening",
            Link::Streaming(_) => "streaming",
        };
        f.debug_struct("Watch")
            .field("address", &self.address)
            .field("link", &link)
            .field("failures", &self.failures)
            .field("waiting", &self.events.len())
            .finish_non_exhaustive()
    }
}

/// The pause before the next try: twice as long after each failure, up to a limit, and between half and
/// all of that, so that many watchers do not come back in one moment. After a stream that worked it is
/// short: a gateway that stops is often back soon.
fn back_off(failures: u32, random: u8) -> Duration {
    let whole = FIRST_RETRY
        .saturating_mul(1 << failures.min(16))
        .min(LAST_RETRY);
    whole / 2 + whole * u32::from(random) / 510
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_differ() {
        assert_eq!(back_off(0, u8::MAX), FIRST_RETRY);
        assert_eq!(back_off(0, 0), FIRST_RETRY / 2);
        assert_eq!(back_off(2, u8::MAX), FIRST_RETRY * 4);
        for failures in [6, 40, u32::MAX] {
            assert_eq!(back_off(failures, u8::MAX), LAST_RETRY);
            assert_eq!(back_off(failures, 0), LAST_RETRY / 2);
        }
    }
}
