//! The door: what checkers ask for becomes ours, checked, and what they are told becomes theirs.
//!
//! Knows the messages and the limits of a request. Must not know streams or who asks.

use bytes::{Bytes, BytesMut};
use tonic::Status;
use waypost_proto::{
    id::UserId,
    v1::{self, State, watch_event::Kind},
};

use super::token::Scope;
use crate::{
    freshness::{Encoded, Glimpse, LastSeen, Silence, Update},
    sharing::Sharing,
};

/// Users in one Get.
const MAX_GET_USERS: usize = 1_000;

/// Users in one page of ListStale.
const MAX_STALE_USERS: u32 = 1_000;

/// Users that one Watch can select by name; who wants more watches all.
const MAX_WATCH_USERS: usize = 10_000;

/// The number of `WatchResponse.events` in the schema.
const EVENTS_TAG: u32 = 1;

/// An entry takes about this many bytes in a message.
const ENTRY_BYTES: usize = 64;

/// Which entries a Watch gets.
#[derive(Debug)]
pub(super) struct Selector {
    /// Ascending; `None` for all.
    users: Option<Vec<UserId>>,
    /// Ascending; empty for all.
    states: Vec<State>,
}

impl Selector {
    /// Reads a request.
    pub(super) fn new(request: &v1::WatchRequest) -> Result<Self, Status> {
        let mut users = user_ids(&request.user_ids, MAX_WATCH_USERS)?;
        users.sort_unstable();
        users.dedup();
        let mut states = request
            .states
            .iter()
            .map(|&state| match State::try_from(state) {
                Ok(State::Unspecified) | Err(_) => Err(Status::invalid_argument(format!(
                    "{state} is not a state that a user can be in"
                ))),
                Ok(state) => Ok(state),
            })
            .collect::<Result<Vec<_>, _>>()?;
        states.sort_unstable();
        states.dedup();
        let users = (!users.is_empty()).then_some(users);
        Ok(Self { users, states })
    }

    /// What a token for this selection is bound to.
    pub(super) fn scope(&self, checker: &str) -> Scope {
        Scope::new(checker, self.users.as_deref(), &self.states)
    }

    /// The users selected by name; none when all are.
    pub(super) fn users(&self) -> &[UserId] {
        self.users.as_deref().unwrap_or_default()
    }

    /// Whether users in this state are selected.
    pub(super) fn wants_state(&self, state: State) -> bool {
        self.states.is_empty() || self.states.contains(&state)
    }

    /// Whether all users are selected, in all states.
    pub(super) fn wants_all(&self) -> bool {
        self.users.is_none() && self.states.is_empty()
    }

    /// Whether this user is selected, whatever its state.
    pub(super) fn wants_user(&self, user: &UserId) -> bool {
        self.users
            .as_ref()
            .is_none_or(|users| users.binary_search(user).is_ok())
    }
}

/// The users of a Get.
pub(super) fn get_users(request: &v1::GetRequest) -> Result<Vec<UserId>, Status> {
    user_ids(&request.user_ids, MAX_GET_USERS)
}

/// The size of a page of ListStale.
pub(super) fn page_size(request: &v1::ListStaleRequest) -> Result<usize, Status> {
    match request.page_size {
        0 => Ok(MAX_STALE_USERS as usize),
        size if size <= MAX_STALE_USERS => Ok(size as usize),
        size => Err(Status::invalid_argument(format!(
            "page_size {size} is more than {MAX_STALE_USERS}: ask for pages"
        ))),
    }
}

/// Where a page of ListStale begins; `None` for the first.
pub(super) fn page_start(request: &v1::ListStaleRequest) -> Result<Option<Silence>, Status> {
    let token = request.page_token.as_ref();
    if token.is_empty() {
        return Ok(None);
    }
    let (Some((contact, user)), 24) = (token.split_first_chunk::<8>(), token.len()) else {
        return Err(Status::invalid_argument(
            "page_token is not one: pass next_page_token of the page before, or none",
        ));
    };
    let mut id = [0; 16];
    id.copy_from_slice(user);
    Ok(Some(Silence {
        last_contact_ms: u64::from_be_bytes(*contact),
        user: UserId(id),
    }))
}

/// The token that [`page_start`] reads. It says no more than the page that it came with.
pub(super) fn page_token(next: Option<Silence>) -> Bytes {
    next.map(|last| {
        [&last.last_contact_ms.to_be_bytes()[..], &last.user.0]
            .concat()
            .into()
    })
    .unwrap_or_default()
}

/// The entries of these users, with one allocation for all their ids.
pub(super) fn entries(seen: &[LastSeen]) -> impl Iterator<Item = v1::Entry> {
    let mut ids = ids(seen.iter());
    seen.iter()
        .map(move |seen| entry_of(ids.split_to(16), seen, 0))
}

/// What a stream is handed, as events.
pub(super) fn updates(updates: &[Update]) -> impl Iterator<Item = Kind> {
    let mut ids = ids(updates.iter().map(|update| &update.seen));
    updates
        .iter()
        .map(move |update| Kind::Entry(entry_of(ids.split_to(16), &update.seen, update.coalesced)))
}

/// Events as they stand in a message.
pub(super) fn encode(events: impl IntoIterator<Item = Kind>) -> Bytes {
    let mut bytes = BytesMut::new();
    events
        .into_iter()
        .for_each(|kind| encode_event(kind, &mut bytes));
    bytes.freeze()
}

/// What a commit changed, as events in a message.
pub(super) fn encode_commit(seen: &[LastSeen]) -> Encoded {
    let mut bytes = BytesMut::with_capacity(seen.len() * ENTRY_BYTES);
    let ends = entries(seen)
        .map(|entry| {
            encode_event(Kind::Entry(entry), &mut bytes);
            bytes.len()
        })
        .collect();
    Encoded {
        bytes: bytes.freeze(),
        ends,
    }
}

fn encode_event(kind: Kind, bytes: &mut BytesMut) {
    let event = v1::WatchEvent { kind: Some(kind) };
    prost::encoding::message::encode(EVENTS_TAG, &event, bytes);
}

/// The entry of one user.
pub(super) fn entry(seen: &LastSeen) -> v1::Entry {
    entry_of(Bytes::copy_from_slice(&seen.user.0), seen, 0)
}

/// The entry of a user of whom nothing is told but this, as of a commit; 0 for none in particular.
pub(super) fn untold(user: &UserId, state: State, position: u64) -> v1::Entry {
    v1::Entry {
        user: Bytes::copy_from_slice(&user.0),
        state: state.into(),
        position,
        ..v1::Entry::default()
    }
}

/// The entry of a user whom somebody asked for by name.
pub(super) fn glimpse(user: &UserId, glimpse: &Glimpse) -> v1::Entry {
    match glimpse {
        Glimpse::NeverSeen => untold(user, State::NeverSeen, 0),
        Glimpse::Withdrawn => untold(user, State::Withdrawn, 0),
        Glimpse::Seen(seen) => entry(seen),
    }
}

fn ids<'a>(seen: impl ExactSizeIterator<Item = &'a LastSeen>) -> Bytes {
    let mut ids = BytesMut::with_capacity(seen.len() * 16);
    seen.for_each(|seen| ids.extend_from_slice(&seen.user.0));
    ids.freeze()
}

/// What a user's state is called on the wire.
pub(super) fn state(sharing: Sharing) -> State {
    match sharing {
        Sharing::Active => State::Active,
        Sharing::Paused => State::Paused,
        Sharing::Erased => State::Erased,
    }
}

fn entry_of(user: Bytes, seen: &LastSeen, coalesced: u32) -> v1::Entry {
    v1::Entry {
        user,
        last_contact_ms: seen.clocks.last_contact_ms,
        last_sample_ms: seen.clocks.last_sample_ms,
        last_fix_ms: seen.clocks.last_fix_ms,
        durable_ms: seen.clocks.durable_ms,
        state: state(seen.sharing).into(),
        position: seen.position,
        coalesced,
    }
}

fn user_ids(ids: &[Bytes], limit: usize) -> Result<Vec<UserId>, Status> {
    if limit < ids.len() {
        return Err(Status::invalid_argument(format!(
            "{} users are more than the {limit} that one call can name",
            ids.len()
        )));
    }
    ids.iter().map(user_id).collect()
}

/// One user's id.
pub(super) fn user_id(id: &Bytes) -> Result<UserId, Status> {
    match <[u8; 16]>::try_from(id.as_ref()) {
        Ok(id) => Ok(UserId(id)),
        Err(_) => Err(Status::invalid_argument(format!(
            "a user id has 16 bytes, the bytes of its UUID; this one has {}",
            id.len()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use waypost_proto::device::Clocks;

    use super::{super::message::Message, *};
    use crate::grants::CheckerSet;

    #[test]
    fn what_is_put_together_of_parts_is_the_message_of_the_schema() {
        let seen: Vec<_> = (1..=3)
            .map(|n| LastSeen {
                user: UserId([n; 16]),
                clocks: Clocks {
                    last_contact_ms: 1 << (20 * n),
                    ..Clocks::default()
                },
                sharing: Sharing::Active,
                granted: CheckerSet::ALL,
                position: u64::from(n),
            })
            .collect();
        let update = Update {
            seen: seen[0],
            coalesced: 300,
        };
        let header = Kind::Header(v1::Header {
            incarnation: Bytes::from_static(b"store"),
            position: 7,
        });
        let commit = encode_commit(&seen);
        let (first, second) = (commit.of(0), commit.of(1));
        assert!(commit.bytes.starts_with(&[first, second].concat()));
        let second = Bytes::copy_from_slice(second);

        let mut message = Message::default();
        message.push(encode([header.clone()]));
        message.push(commit.bytes);
        message.push(second);
        message.push(Bytes::new());
        message.push(encode(updates(&[update])));

        let overtaken = v1::Entry {
            coalesced: 300,
            ..entry(&seen[0])
        };
        let mut kinds = vec![header];
        kinds.extend([0, 1, 2, 1].map(|n: usize| Kind::Entry(entry(&seen[n]))));
        kinds.push(Kind::Entry(overtaken));
        let events = kinds
            .into_iter()
            .map(|kind| v1::WatchEvent { kind: Some(kind) });
        let response = v1::WatchResponse {
            events: events.collect(),
        };
        assert_eq!(message.encoded_len(), response.encoded_len());
        assert_eq!(message.encode_to_vec(), response.encode_to_vec());
    }
}
