//! What checkers, operators and newcomers have the committer write, between two groups of pings.
//!
//! Each order is a commit of its own: durable, then in force and visible, then answered. Knows what each comes to; must not
//! know who gave it or how its answer travels.

use std::convert::Infallible;

use tracing::error;
use waypost_proto::id::UserId;

use super::{Committer, contact};
use crate::{
    audit::chain::{Deed, What, Who, Whose},
    bulletin::News,
    deadlines::NotSet,
    enrol::invitations::{Change, Invitation, NotInvited, NotValid},
    erase::{Erasure, Place},
    orders::{self, Invite, Order, Redeem, Redeemed, Revoke, Revoked, SetDeadlines},
    revocation::NoRoom,
    sharing::{Sharing, Transition, Turn},
    store::{Batch, CommitError},
};

impl Committer {
    /// Does what somebody wants, and answers when it is on disk.
    pub(super) fn obey(&mut self, order: Order) -> Result<(), CommitError> {
        let _waiting = self.pulse.wait();
        match order {
            Order::SetDeadlines(order, reply) => self.set_deadlines(&order, reply),
            Order::Revoke(order, reply) => self.revoke(order, reply),
            Order::Erase(user, place, reply) => self.erase(user, place, reply),
            Order::Invite(wanted, reply) => {
                if let Some(answer) = self.invite(&wanted)? {
                    reply.answer(answer);
                }
                Ok(())
            }
            Order::Redeem(wanted, reply) => {
                if let Some(answer) = self.redeem(&wanted)? {
                    reply.answer(answer);
                }
                Ok(())
            }
        }
    }

    fn set_deadlines(
        &mut self,
        order: &SetDeadlines,
        reply: orders::Reply<u64, NotSet>,
    ) -> Result<(), CommitError> {
        let is_granted = |user: &UserId| {
            let granted = self.freshness.visibility(user).granted;
            // Of an erased user, the grants say who is told of that.
            granted.contains(order.number) && self.holders.sharing(user) != Sharing::Erased
        };
        let set = order.settings.iter().filter(|(_, set)| set.is_some());
        if let Some(&(user, _)) = set.clone().find(|(user, _)| !is_granted(user)) {
            reply.answer(Err(NotSet::NotGranted(user)));
            return Ok(());
        }
        let said = self.said_next();
        let (freshness, holders) = (&self.freshness, &self.holders);
        let news = self
            .vigil
            .set_deadlines(order.checker, &order.settings, said, |user| {
                contact(freshness, holders, user)
            });
        let answer = match news {
            Ok(news) => {
                self.say(&news)?;
                Ok(self.position)
            }
            Err(too_many) => Err(too_many.into()),
        };
        reply.answer(answer);
        Ok(())
    }

    /// `None` when the store does not say which numbers the user's devices have.
    fn invite(
        &mut self,
        wanted: &Invite,
    ) -> Result<Option<Result<Invitation, NotInvited>>, CommitError> {
        if self.holders.sharing(&wanted.invitee.user()) == Sharing::Erased {
            return Ok(Some(Err(NotInvited::UnknownUser)));
        }
        let last_device = match self.store.last_device(wanted.invitee.user()) {
            Ok(last_device) => last_device,
            Err(error) => {
                error!(%error, "nobody is invited");
                return Ok(None);
            }
        };
        let now_ms = self.clock.now_ms();
        let expires_ms = now_ms.saturating_add(wanted.valid_for_ms);
        let invited = self.invitations.invite(
            wanted.code,
            wanted.invitee,
            wanted.checkers,
            last_device,
            expires_ms,
            now_ms,
        );
        match invited {
            Ok((invitation, change)) => {
                let batch = self.store.batch();
                self.write_invitations(&change, batch, &News::default())?;
                self.audit.tell(Deed {
                    at_ms: now_ms,
                    who: Who::Operator,
                    what: What::Invited,
                    whose: Whose::of(&[invitation.device.user]),
                });
                Ok(Some(Ok(invitation)))
            }
            Err(not_invited) => Ok(Some(Err(not_invited))),
        }
    }

    /// `None` when the store does not say what the holder has decided before.
    fn redeem(
        &mut self,
        wanted: &Redeem,
    ) -> Result<Option<Result<Redeemed, NotValid>>, CommitError> {
        let Some(invitation) = self.invitations.find(wanted.code) else {
            return Ok(Some(Err(NotValid)));
        };
        let (device, user) = (invitation.device, invitation.device.user);
        // A certificate would be of no use, and the code is kept in case that a revocation is lifted.
        if self.revocations.holds(&device) || self.holders.sharing(&user) == Sharing::Erased {
            return Ok(Some(Err(NotValid)));
        }
        let mut decisions = match self.store.decisions_of(user) {
            Ok(decisions) => decisions,
            Err(error) => {
                error!(%error, "nobody is enrolled");
                return Ok(None);
            }
        };
        let said = self.said_next();
        let redeemed = self.invitations.redeem(wanted.code, wanted.key, said.at_ms);
        let Ok((_, change)) = redeemed else {
            return Ok(Some(Err(NotValid)));
        };
        let by_all = self.checkers.are_granted_by_all();
        // None for a device that asks again.
        if let Some(change) = change {
            let agreed = decisions.agree(invitation.checkers, by_all, said.at_ms);
            let (mut batch, mut news) = (self.store.batch(), News::default());
            if !agreed.is_empty() {
                batch.put_decisions(user, &decisions);
                news.transitions.push(Transition {
                    user,
                    turn: Turn::Granted,
                    checkers: agreed,
                    at_ms: said.at_ms,
                    position: said.position,
                    number: 0,
                });
            }
            self.write_invitations(&change, batch, &news)?;
            self.record(device, What::Enrolled, said.at_ms);
            self.record_turn(device, Turn::Granted, agreed, said.at_ms);
        }
        let granted = decisions.visibility(by_all).granted;
        let checkers = self
            .checkers
            .names(granted.intersection(invitation.checkers));
        let mut checkers: Vec<_> = checkers.map(str::to_owned).collect();
        checkers.sort_unstable();
        Ok(Some(Ok(Redeemed { device, checkers })))
    }

    /// At a position of its own, so that a store that has lost it is noticed like any other that is behind.
    fn write_invitations(
        &mut self,
        change: &Change,
        mut batch: Batch,
        news: &News,
    ) -> Result<(), CommitError> {
        batch.put_invitations(change);
        self.say_with(batch, news)?;
        let open = &self.metrics.enrolment.open_invitations;
        open.set(self.invitations.len() as f64);
        Ok(())
    }

    /// Durable, then in force, then answered.
    fn revoke(
        &mut self,
        order: Revoke,
        reply: orders::Reply<Revoked, NoRoom>,
    ) -> Result<(), CommitError> {
        let Revoke { subject, is_lifted } = order;
        let before_ms = self.revocations.since_ms(subject);
        if before_ms.is_none() == is_lifted {
            let now_ms = before_ms;
            reply.answer(Ok(Revoked { before_ms, now_ms }));
            return Ok(());
        }
        if !is_lifted && let Err(no_room) = self.revocations.check_room() {
            reply.answer(Err(no_room));
            return Ok(());
        }
        let now_ms = (!is_lifted).then(|| self.clock.now_ms());
        let mut batch = self.store.batch();
        batch.put_revocation(subject, now_ms);
        let position = self.write(batch)?;
        self.revocations.set(subject, now_ms);
        self.metrics.trust.revoked(self.revocations.counts());
        self.freshness.publish(position, self.resolved_ms, &[], &[]);
        self.audit.tell(Deed {
            at_ms: self.clock.now_ms(),
            who: Who::Operator,
            what: match now_ms {
                Some(_) => What::Revoked,
                None => What::RevocationLifted,
            },
            whose: Whose::of_subject(subject),
        });
        reply.answer(Ok(Revoked { before_ms, now_ms }));
        Ok(())
    }

    /// As when a device wants it: durable, then visible, then answered, and what is held goes in its own time. It is on
    /// record already.
    fn erase(
        &mut self,
        user: UserId,
        place: Place,
        reply: orders::Reply<orders::Erasing, Infallible>,
    ) -> Result<(), CommitError> {
        let said = self.said_next();
        let told = self.freshness.visibility(&user).granted;
        let is_new = self.take_no_more_of(user);
        let fence = Transition::erased(user, told, said);
        if is_new {
            let news = News {
                deadlines: self.vigil.forget_user(user),
                transitions: vec![fence],
                ..News::default()
            };
            self.say(&news)?;
            let paused = &self.metrics.freshness.paused;
            paused.set(self.holders.paused() as f64);
            let known = &self.metrics.commits.known_devices;
            known.set(self.devices.len() as f64);
        }
        let begun = is_new.then(|| Erasure::begun_by(&fence));
        let finished = place.erase_and_tell(user, begun);
        reply.answer(Ok(orders::Erasing { is_new, finished }));
        Ok(())
    }
}
