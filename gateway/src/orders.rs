//! What checkers, operators and newcomers have the committer write: a queue of its own, beside those of the devices.
//!
//! Knows how an order gets to the committer and its answer back. Must not know what the committer does with it.
//!
//! # Bounds
//!
//! `QUEUE_ORDERS` wait, each of at most as many settings as one call may name; further calls wait for a place,
//! as many as the freshness service and the operator's door have connections for, and enrolment has newcomers. The
//! committer takes one between two groups of pings.

use std::convert::Infallible;

use waypost_proto::id::{DeviceId, UserId};

use crate::{
    deadlines::{Checker, NotSet, Setting},
    enrol::invitations::{CodeHash, Invitation, Invitee, KeyHash, NotInvited, NotValid},
    erase::{Finished, Place},
    grants::{CheckerNumber, CheckerSet},
    revocation::{NoRoom, Subject},
    sync::{mpsc, oneshot},
};

/// A call a commit: more than a few are only a backlog.
const QUEUE_ORDERS: usize = 16;

/// Something to be written.
#[derive(Debug)]
pub enum Order {
    /// Of a checker.
    SetDeadlines(SetDeadlines, Reply<u64, NotSet>),
    /// Of the operator.
    Revoke(Revoke, Reply<Revoked, NoRoom>),
    /// Of the operator, as the holder wishes: erase everything that is held on a user.
    Erase(UserId, Place, Reply<Erasing, Infallible>),
    /// Of an operator's backend: invite a device.
    Invite(Invite, Reply<Invitation, NotInvited>),
    /// Of a newcomer: redeem an invitation.
    Redeem(Redeem, Reply<Redeemed, NotValid>),
}

/// Deadlines that a checker sets or, where there is no setting, removes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetDeadlines {
    /// Whose they are.
    pub checker: Checker,
    /// Its number, by which users have granted it.
    pub number: CheckerNumber,
    /// Whom they are for.
    pub settings: Vec<(UserId, Option<Setting>)>,
}

/// A device or user that is let in no more from now on; or is again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revoke {
    /// Whom it is about.
    pub subject: Subject,
    /// Whether an earlier revocation is to be lifted.
    pub is_lifted: bool,
}

/// What became of [`Revoke`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revoked {
    /// Since when the subject was revoked before, in milliseconds since 1970-01-01 UTC; none if it was not.
    pub before_ms: Option<u64>,
    /// Since when it is revoked now; none if it is not.
    pub now_ms: Option<u64>,
}

/// An erasure whose fence is on disk.
#[derive(Debug)]
pub struct Erasing {
    /// Whether it was made now.
    pub is_new: bool,
    /// Tells when nothing is left.
    pub finished: Finished,
}

/// An invitation that an operator makes.
#[derive(Debug)]
pub struct Invite {
    /// What redeems it.
    pub code: CodeHash,
    /// Whose device it is for.
    pub invitee: Invitee,
    /// The checkers that the holder grants by redeeming it.
    pub checkers: CheckerSet,
    /// For how long it works, in milliseconds.
    pub valid_for_ms: u64,
}

/// A newcomer with a code.
#[derive(Debug)]
pub struct Redeem {
    /// The code.
    pub code: CodeHash,
    /// The newcomer's key.
    pub key: KeyHash,
}

/// What a newcomer's code has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redeemed {
    /// Who is enrolled.
    pub device: DeviceId,
    /// The names of the checkers that the holder has granted by it.
    pub checkers: Vec<String>,
}

/// The right to answer one order.
#[derive(Debug)]
pub struct Reply<Done, Refused>(oneshot::Sender<Result<Done, Refused>>);

impl<Done, Refused> Reply<Done, Refused> {
    /// Answers: it is on disk, or nothing has changed.
    pub fn answer(self, answer: Result<Done, Refused>) {
        // A caller that has given up meanwhile needs none.
        self.0.send(answer).ok();
    }
}

/// Why an order was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError<Refused> {
    /// It cannot be. Nothing has changed.
    #[error(transparent)]
    Refused(Refused),
    /// It is not known whether it is on disk: the committer has stopped.
    #[error("the gateway is stopping")]
    Stopped,
}

/// Gives orders. Clones share the queue.
#[derive(Clone, Debug)]
pub struct OrderHandle {
    orders: mpsc::Sender<Order>,
}

/// The committer's end of the queue. Orders that it never takes are answered [`OrderError::Stopped`] when it goes.
#[derive(Debug)]
pub struct Orders {
    orders: mpsc::Receiver<Order>,
}

/// Both ends.
#[must_use]
pub fn queue() -> (OrderHandle, Orders) {
    let (sender, receiver) = mpsc::channel(QUEUE_ORDERS);
    (OrderHandle { orders: sender }, Orders { orders: receiver })
}

impl OrderHandle {
    /// How many orders wait.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.orders.max_capacity() - self.orders.capacity()
    }

    /// Sets a checker's deadlines, and returns when that is on disk, with its position.
    ///
    /// # Errors
    /// When it is not.
    pub async fn set_deadlines(
        &self,
        checker: Checker,
        number: CheckerNumber,
        settings: Vec<(UserId, Option<Setting>)>,
    ) -> Result<u64, OrderError<NotSet>> {
        let order = SetDeadlines {
            checker,
            number,
            settings,
        };
        self.give(|reply| Order::SetDeadlines(order, reply)).await
    }

    /// Revokes, or lifts a revocation, and returns when that is on disk. From then on the committer judges nothing of
    /// whom it is about.
    ///
    /// # Errors
    /// When it is not.
    pub async fn revoke(&self, order: Revoke) -> Result<Revoked, OrderError<NoRoom>> {
        self.give(|reply| Order::Revoke(order, reply)).await
    }

    /// Erases everything that is held on a user, and returns when the fence is on disk: from then on the committer takes
    /// nothing of the user. To order it again does no harm.
    ///
    /// # Errors
    /// When it is not.
    pub async fn erase(
        &self,
        user: UserId,
        place: Place,
    ) -> Result<Erasing, OrderError<Infallible>> {
        self.give(|reply| Order::Erase(user, place, reply)).await
    }

    /// Makes an invitation, and returns when it is on disk.
    ///
    /// # Errors
    /// When it is not.
    pub async fn invite(&self, wanted: Invite) -> Result<Invitation, OrderError<NotInvited>> {
        self.give(|reply| Order::Invite(wanted, reply)).await
    }

    /// Redeems an invitation, and returns when that is on disk, with what it has come to.
    ///
    /// # Errors
    /// When it is not.
    pub async fn redeem(&self, wanted: Redeem) -> Result<Redeemed, OrderError<NotValid>> {
        self.give(|reply| Order::Redeem(wanted, reply)).await
    }

    async fn give<Done, Refused>(
        &self,
        order: impl FnOnce(Reply<Done, Refused>) -> Order,
    ) -> Result<Done, OrderError<Refused>> {
        let (reply, answer) = oneshot::channel();
        let sent = self.orders.send(order(Reply(reply))).await;
        sent.map_err(|_| OrderError::Stopped)?;
        // What is sent into a queue whose other end goes just now may lie there until the last handle goes, and
        // nobody would answer it.
        if self.orders.is_closed() {
            return Err(OrderError::Stopped);
        }
        let answer = answer.await.map_err(|_| OrderError::Stopped)?;
        answer.map_err(OrderError::Refused)
    }
}

impl Orders {
    /// The next order; waits for ever when nobody can give one any more.
    pub async fn next(&mut self) -> Order {
        match self.orders.recv().await {
            Some(order) => order,
            None => std::future::pending().await,
        }
    }

    /// The next order if one waits.
    pub fn try_next(&mut self) -> Option<Order> {
        self.orders.try_recv().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_order_is_answered_whatever_becomes_of_the_committer() {
        let (handle, mut orders) = queue();
        let give = |handle: OrderHandle| {
            let number = CheckerNumber::FIRST;
            let checker = Checker([1; 16]);
            tokio::spawn(async move { handle.set_deadlines(checker, number, Vec::new()).await })
        };
        let (first, second, third) = (
            give(handle.clone()),
            give(handle.clone()),
            give(handle.clone()),
        );
        let nobody = NotSet::NotGranted(UserId([7; 16]));
        for answer in [Ok(7), Err(nobody)] {
            match orders.next().await {
                Order::SetDeadlines(_, reply) => reply.answer(answer),
                other => panic!("nobody has ordered {other:?}"),
            }
        }
        // Taken, and never answered.
        drop(orders.next().await);
        assert_eq!(first.await.unwrap(), Ok(7));
        assert_eq!(second.await.unwrap(), Err(OrderError::Refused(nobody)));
        assert_eq!(third.await.unwrap(), Err(OrderError::Stopped));
        assert_eq!(handle.depth(), 0);
        let waiting = give(handle.clone());
        tokio::task::yield_now().await;
        assert_eq!(handle.depth(), 1);
        drop(orders);
        assert_eq!(waiting.await.unwrap(), Err(OrderError::Stopped));
        assert_eq!(give(handle).await.unwrap(), Err(OrderError::Stopped));
    }
}
