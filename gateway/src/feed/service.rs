//! The calls of the freshness service.
//!
//! Knows who may call and what each call answers. Must not know how a stream goes on; that is
//! [`super::watcher`].

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status};
use tracing::debug;
use waypost_proto::{
    id::UserId,
    v1::{
        GetRequest, GetResponse, ListDeadlinesRequest, ListDeadlinesResponse, ListStaleRequest,
        ListStaleResponse, SetDeadlinesRequest, SetDeadlinesResponse, WatchRequest,
    },
};

use super::{
    listener::Peer,
    message::Message,
    notices::{self, Notices},
    rpc,
    token::{Scope, Tokens},
    watcher::Watcher,
    wire::{self, Selector},
};
use crate::{
    audit::{
        Audit, Repeats,
        chain::{Deed, What, Who, Whose},
    },
    clock::Clock,
    deadlines::{Checker, NotSet},
    freshness::Freshness,
    grants::CheckerNumber,
    metrics::Metrics,
    orders::{OrderError, OrderHandle},
    revocation::{CertificateId, Revocations},
    tls::{self, Refusal},
};

#[derive(Debug)]
pub(super) struct Service {
    pub(super) tokens: Tokens,
    pub(super) trust_domain: String,
    pub(super) freshness: Arc<Freshness>,
    pub(super) notices: Notices,
    pub(super) order: OrderHandle,
    pub(super) audit: Audit,
    /// Who has begun to watch whom within the last hour.
    pub(super) watched: Mutex<Repeats>,
    pub(super) revocations: Arc<Revocations>,
    pub(super) clock: Clock,
    pub(super) metrics: Metrics,
    /// Those who may call, and their numbers in the store.
    pub(super) checkers: BTreeMap<String, CheckerNumber>,
    pub(super) progress_interval: Duration,
    /// For the streams that may be open.
    pub(super) room: Arc<Semaphore>,
    /// For the lists of the silent that may be made at a time.
    pub(super) lists: Arc<Semaphore>,
    pub(super) watchers: TaskTracker,
    pub(super) cancel: CancellationToken,
}

#[tonic::async_trait]
impl rpc::freshness_server::Freshness for Service {
    type WatchStream = ReceiverStream<Result<Message, Status>>;

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let (_, number) = self.admit(&request)?;
        let users: Vec<UserId> = wire::get_users(request.get_ref())?;
        let (glimpses, head) = self.freshness.get(number, &users);
        let entries = users
            .iter()
            .zip(&glimpses)
            .map(|(user, glimpse)| wire::glimpse(user, glimpse))
            .collect();
        Ok(Response::new(GetResponse {
            entries,
            position: head.position,
            resolved_ms: head.resolved_ms,
        }))
    }

    async fn list_stale(
        &self,
        request: Request<ListStaleRequest>,
    ) -> Result<Response<ListStaleResponse>, Status> {
        let (_, number) = self.admit(&request)?;
        let request = request.get_ref();
        let (older_than_ms, after, limit) = (
            self.older_than_ms(request)?,
            wire::page_start(request)?,
            wire::page_size(request)?,
        );
        let turn = Arc::clone(&self.lists)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let freshness = Arc::clone(&self.freshness);
        // A look at a million users takes as long as many commits; nobody else should wait behind it.
        let page = tokio::task::spawn_blocking(move || {
            // Kept until it is made, also when the caller has given up meanwhile.
            let _turn = turn;
            freshness.stale(number, older_than_ms, after, limit)
        })
        .await
        .map_err(|_| Status::internal("the list could not be made"))?;
        let spans = self
            .notices
            .coverage(|coverage| coverage.within(older_than_ms, page.head.resolved_ms));
        Ok(Response::new(ListStaleResponse {
            entries: wire::entries(&page.users).collect(),
            next_page_token: wire::page_token(page.next),
            position: page.head.position,
            resolved_ms: page.head.resolved_ms,
            older_than_ms,
            coverage: spans.iter().map(notices::coverage_message).collect(),
        }))
    }

    async fn set_deadlines(
        &self,
        request: Request<SetDeadlinesRequest>,
    ) -> Result<Response<SetDeadlinesResponse>, Status> {
        let (checker, number) = self.admit(&request)?;
        let checker = Checker::named(&checker);
        let settings = notices::settings(request.get_ref())?;
        let set = self.order.set_deadlines(checker, number, settings).await;
        let position = set.map_err(|error| match error {
            OrderError::Refused(NotSet::TooMany(_)) => Status::resource_exhausted(format!(
                "{error}, and none of this call: remove some, or raise [freshness] max_deadlines"
            )),
            OrderError::Refused(NotSet::NotGranted(_)) => Status::permission_denied(format!(
                "{error}, so none of this call is set: a deadline for one of whom nothing is told would never pass"
            )),
            OrderError::Stopped => Status::unavailable(format!(
                "{error}: whether these deadlines are set is not known, so set them again"
            )),
        })?;
        Ok(Response::new(SetDeadlinesResponse { position }))
    }

    async fn list_deadlines(
        &self,
        request: Request<ListDeadlinesRequest>,
    ) -> Result<Response<ListDeadlinesResponse>, Status> {
        let (checker, _) = self.admit(&request)?;
        let checker = Checker::named(&checker);
        let (after, limit) = notices::deadlines_page(request.get_ref())?;
        let page = self.notices.deadlines(checker, after, limit + 1).await?;
        let (page, rest) = page.split_at(limit.min(page.len()));
        let next_page_token = match page.last() {
            Some(last) if !rest.is_empty() => Bytes::copy_from_slice(&last.user.0),
            _ => Bytes::new(),
        };
        Ok(Response::new(ListDeadlinesResponse {
            deadlines: page.iter().map(notices::deadline_state).collect(),
            next_page_token,
        }))
    }

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (checker, number) = self.admit(&request)?;
        let certificates = certificates_of(&request);
        let request = request.get_ref();
        let selector = Selector::new(request)?;
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
            self.metrics.freshness.refused.of("overloaded").increment(1);
            return Err(Status::resource_exhausted(
                "this gateway has as many watchers as it takes: come back in a while, or raise [freshness] max_watchers",
            ));
        };
        // One message waits while another is on its way; the next is not even made before there is
        // room, so that it holds what is newest then.
        let (messages, stream) = mpsc::channel(1);
        let scope = selector.scope(&checker);
        self.record_watch(&checker, &selector, scope);
        let watcher = Watcher {
            scope,
            selector,
            tokens: self.tokens.clone(),
            freshness: Arc::clone(&self.freshness),
            notices: self.notices.clone(),
            checker: Checker::named(&checker),
            number,
            certificates,
            revocations: Arc::clone(&self.revocations),
            clock: self.clock.clone(),
            metrics: self.metrics.clone(),
            progress_interval: self.progress_interval,
            cancel: self.cancel.clone(),
            messages,
            _room: room,
        };
        debug!(%checker, is_resuming = !request.token.is_empty(), "watching");
        self.watchers.spawn(watcher.run(request.token.clone()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

impl Service {
    /// Since when the users of a list were not heard.
    fn older_than_ms(&self, request: &ListStaleRequest) -> Result<u64, Status> {
        match (request.older_than_ms, request.silent_for_ms) {
            (older_than_ms, 0) => Ok(older_than_ms),
            (0, silent_for_ms) => {
                let resolved_ms = self.freshness.head().resolved_ms;
                Ok(self
                    .notices
                    .coverage(|coverage| coverage.moment_before(resolved_ms, silent_for_ms)))
            }
            _ => Err(Status::invalid_argument(
                "older_than_ms and silent_for_ms are two ways to say the same: pass one of them",
            )),
        }
    }

    /// Has it recorded that a checker watches. It is not waited for: a disk that hangs is just what checkers have to
    /// be told.
    fn record_watch(&self, checker: &str, selector: &Selector, scope: Scope) {
        let at_ms = self.clock.now_ms();
        if self.watched.lock().is_news(scope.0, at_ms) {
            self.audit.tell(Deed {
                at_ms,
                who: Who::Checker(checker.to_owned()),
                what: What::WatchStarted,
                whose: match selector.users() {
                    [] => Whose::Everybody,
                    users => Whose::of(users),
                },
            });
        }
    }

    /// The name of the checker that calls, if it may, and its number.
    fn admit<T>(&self, request: &Request<T>) -> Result<(String, CheckerNumber), Status> {
        let peer = request.extensions().get::<Peer>();
        let chain = peer.map_or_else(Default::default, |peer| &*peer.chain);
        let address = peer.map(|peer| peer.address);
        let checker = if self.revocations.lists(&certificates_of(request)) {
            // When its connection began it was not.
            Err(Refusal::Revoked)
        } else {
            tls::checker_of(chain, &self.trust_domain)
        };
        let checker = checker.map_err(|refusal| {
            self.metrics
                .freshness
                .refused
                .of(refusal.as_label())
                .increment(1);
            debug!(peer = ?address, %refusal, "refused");
            Status::permission_denied(format!(
                "only checkers may ask for freshness, and this peer is not one: {refusal}"
            ))
        })?;
        let Some(&number) = self.checkers.get(&checker) else {
            self.metrics
                .freshness
                .refused
                .of("not_allowed")
                .increment(1);
            debug!(peer = ?address, %checker, "refused");
            return Err(Status::permission_denied(format!(
                "checker {checker:?} is not in this gateway's [freshness] checkers: ask its operator"
            )));
        };
        Ok((checker, number))
    }
}

fn certificates_of<T>(request: &Request<T>) -> Arc<[CertificateId]> {
    let peer = request.extensions().get::<Peer>();
    peer.map_or_else(Default::default, |peer| Arc::clone(&peer.certificates))
}
