//! What operators call: invitations for their own backends, and for `waypost invite`.
//!
//! Knows who may call and what an invitation looks like. Must not know how one is kept or redeemed.
//!
//! # Bounds
//!
//! A call is one of its connection's, of which the freshness service has so many; a request is small; and no more
//! invitations are open than are kept.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use parking_lot::RwLock;
use ring::{
    digest,
    rand::{SecureRandom as _, SystemRandom},
};
use tonic::{Request, Response, Status};
use tracing::{debug, info};
use waypost_proto::{
    enrol::Code,
    id::UserId,
    v1::{InviteRequest, InviteResponse},
};

use super::{
    EnrolmentConfig, EnrolmentParts, address,
    invitations::{CodeHash, Invitee, NotInvited},
    rpc,
};
use crate::{
    feed::Peer,
    grants::{CheckerNumber, CheckerSet},
    hex::hex,
    metrics::Metrics,
    orders::{Invite, OrderError, OrderHandle},
    tls,
};

/// Makes invitations for those who may ask for them.
#[derive(Clone, Debug)]
pub struct Inviter {
    operators: Arc<BTreeSet<String>>,
    /// Whom an invitation may name.
    checkers: Arc<BTreeMap<String, CheckerNumber>>,
    trust_domain: String,
    valid_for_ms: u64,
    /// An invitation's text up to its code; another when the gateway is known by another authority.
    uri_start: Arc<RwLock<String>>,
    order: OrderHandle,
    metrics: Metrics,
}

impl Inviter {
    /// For the operators of the settings. Newcomers go to `listen`, and know the gateway by `authority`, in DER.
    pub(super) fn new(
        config: &EnrolmentConfig,
        listen: SocketAddr,
        authority: Option<&[u8]>,
        parts: &EnrolmentParts<'_>,
    ) -> Self {
        let uri_start = uri_start(&address(&config.public_host, listen.port()), authority);
        Self {
            operators: Arc::new(config.operators.iter().cloned().collect()),
            checkers: Arc::new(parts.checkers.clone()),
            trust_domain: parts.tls.trust_domain.clone(),
            valid_for_ms: milliseconds(config.invitation_lifetime),
            uri_start: Arc::new(RwLock::new(uri_start)),
            order: parts.order.clone(),
            metrics: parts.metrics.clone(),
        }
    }

    /// From now on newcomers know the gateway by this authority, in DER.
    pub(super) fn lead_to(&self, server: &str, authority: Option<&[u8]>) {
        *self.uri_start.write() = uri_start(server, authority);
    }

    /// The name of the operator that calls, if it may.
    fn admit<T>(&self, request: &Request<T>) -> Result<String, Status> {
        let peer = request.extensions().get::<Peer>();
        let chain = peer.map_or_else(Default::default, |peer| &*peer.chain);
        let admitted = match tls::operator_of(chain, &self.trust_domain) {
            Ok(operator) if self.operators.contains(&operator) => Ok(operator),
            Ok(operator) => Err(format!(
                "operator {operator:?} is not in this gateway's [enrolment] operators"
            )),
            Err(refusal) => Err(format!("only operators may invite, and {refusal}")),
        };
        admitted.map_err(|reason| {
            debug!(peer = ?peer.map(|peer| peer.address), %reason, "refused");
            self.count("not_allowed");
            Status::permission_denied(reason)
        })
    }

    /// The checkers of these names.
    fn named(&self, names: &[String]) -> Result<CheckerSet, Status> {
        let numbers = names.iter().map(|name| {
            self.checkers.get(name).copied().ok_or_else(|| {
                Status::invalid_argument(format!(
                    "{name:?} is not in this gateway's [freshness] checkers, so it can be told of nobody"
                ))
            })
        });
        numbers.collect()
    }

    fn count(&self, outcome: &str) {
        self.metrics.enrolment.invitations.of(outcome).increment(1);
    }
}

#[tonic::async_trait]
impl rpc::enrolment_server::Enrolment for Inviter {
    async fn invite(
        &self,
        request: Request<InviteRequest>,
    ) -> Result<Response<InviteResponse>, Status> {
        let operator = self.admit(&request)?;
        let request = request.get_ref();
        let random = SystemRandom::new();
        let mut secret = [0; Code::BYTES];
        random
            .fill(&mut secret)
            .map_err(|_| Status::internal("the system gives no random numbers"))?;
        let code = Code::new(secret);
        let wanted = invitee(&request.user)
            .and_then(|invitee| {
                Ok(Invite {
                    code: CodeHash::of(&code),
                    invitee,
                    checkers: self.named(&request.checkers)?,
                    valid_for_ms: valid_for_ms(request.valid_for_ms, self.valid_for_ms)?,
                })
            })
            .inspect_err(|_| self.count("refused"))?;
        let invitation = self.order.invite(wanted).await.map_err(|error| {
            self.count(match error {
                OrderError::Refused(_) => "refused",
                OrderError::Stopped => "failed",
            });
            match error {
                OrderError::Refused(NotInvited::UnknownUser) => {
                    Status::not_found(error.to_string())
                }
                OrderError::Refused(NotInvited::TooMany { .. } | NotInvited::NoNumberLeft) => {
                    Status::resource_exhausted(error.to_string())
                }
                OrderError::Stopped => Status::unavailable(format!(
                    "{error}: this invitation works for nobody, so ask again"
                )),
            }
        })?;
        self.count("made");
        info!(%operator, device = %invitation.device, "invited");
        Ok(Response::new(InviteResponse {
            code: code.to_string(),
            user: Bytes::copy_from_slice(&invitation.device.user.0),
            device: invitation.device.device,
            expires_ms: invitation.expires_ms,
            uri: format!(
                "{}{}code={code}",
                self.uri_start.read(),
                named_in_uri(&request.checkers)
            ),
        }))
    }
}

fn uri_start(server: &str, authority: Option<&[u8]>) -> String {
    let mut start = format!("waypost://enroll?server={server}&");
    if let Some(authority) = authority {
        start += &format!("ca={}&", hash_of(authority));
    }
    start
}

/// A new user has an id that is random, and so says nothing.
fn invitee(user: &[u8]) -> Result<Invitee, Status> {
    if user.is_empty() {
        let user = UserId(*uuid::Uuid::new_v4().as_bytes());
        return Ok(Invitee::NewUser(user));
    }
    let user = user.try_into().map_err(|_| {
        Status::invalid_argument("a user is 16 bytes; leave it out to invite a new one")
    })?;
    Ok(Invitee::KnownUser(UserId(user)))
}

/// What the invitation's text says of checkers. Their names need no escaping.
fn named_in_uri(names: &[String]) -> String {
    match names {
        [] => String::new(),
        _ => format!("checkers={}&", names.join(",")),
    }
}

fn valid_for_ms(wanted_ms: u64, usual_ms: u64) -> Result<u64, Status> {
    match wanted_ms {
        0 => Ok(usual_ms),
        wanted_ms if wanted_ms <= milliseconds(LONGEST_INVITATION) => Ok(wanted_ms),
        _ => Err(Status::invalid_argument(
            "an invitation works for 30 days at most",
        )),
    }
}

/// The SHA-256 in hexadecimal digits.
fn hash_of(der: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, der).as_ref())
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A code that lies around for longer is a risk and no help.
pub const LONGEST_INVITATION: Duration = Duration::from_secs(30 * 24 * 3_600);
