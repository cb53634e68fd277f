//! What a message of the freshness stream says, read where it lies.
//!
//! Knows the schema's numbers of what many checkers on one machine look at. Must not know what was promised.
//!
//! A hundred checkers that read ten thousand entries a second each would spend the machine on making objects of
//! them. Here an entry is a few numbers on the stack.

use bytes::{Buf, Bytes};
use prost::{
    Message,
    encoding::{WireType, decode_key, decode_varint},
};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};
use waypost_proto::{id::UserId, v1::WatchRequest};

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// The stream begins.
    Header,
    /// A user changed.
    Entry(ToldEntry),
    /// A snapshot is complete with this many entries.
    SnapshotEnd {
        /// How many entries the gateway counts.
        count: u64,
        /// No entry at or below comes any more.
        position: u64,
    },
    /// No entry at or below this position comes any more.
    Progress {
        /// The commit.
        position: u64,
    },
    /// All that came before is void.
    Reset,
    /// What nobody here looks at.
    Other,
}

/// What is looked at of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ToldEntry {
    pub(crate) user: UserId,
    pub(crate) durable_ms: u64,
    pub(crate) position: u64,
    pub(crate) coalesced: u64,
}

/// A message is not one of the schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message of the stream cannot be read")]
pub(crate) struct Unreadable;

/// The events of an encoded `WatchResponse`, in order.
pub(crate) fn events(message: &[u8]) -> impl Iterator<Item = Result<Told, Unreadable>> + '_ {
    Fields(message).filter_map(|field| match field {
        Ok((1, Field::Bytes(event))) => Some(read_event(event)),
        Ok(_) => None,
        Err(unreadable) => Some(Err(unreadable)),
    })
}

fn read_event(event: &[u8]) -> Result<Told, Unreadable> {
    let mut told = Told::Other;
    for field in Fields(event) {
        told = match field? {
            (1, Field::Bytes(_)) => Told::Header,
            (2, Field::Bytes(entry)) => Told::Entry(read_entry(entry)?),
            (3, Field::Bytes(end)) => Told::SnapshotEnd {
                count: number(end, 1)?,
                position: number(end, 2)?,
            },
            (4, Field::Bytes(progress)) => Told::Progress {
                position: number(progress, 2)?,
            },
            (7, Field::Bytes(_)) => Told::Reset,
            _ => told,
        };
    }
    Ok(told)
}

fn read_entry(entry: &[u8]) -> Result<ToldEntry, Unreadable> {
    let mut read = ToldEntry {
        user: UserId([0; 16]),
        durable_ms: 0,
        position: 0,
        coalesced: 0,
    };
    for field in Fields(entry) {
        match field? {
            (1, Field::Bytes(user)) => read.user = UserId(user.try_into().map_err(|_| Unreadable)?),
            (5, Field::Number(durable_ms)) => read.durable_ms = durable_ms,
            (7, Field::Number(position)) => read.position = position,
            (8, Field::Number(coalesced)) => read.coalesced = coalesced,
            _ => {}
        }
    }
    Ok(read)
}

/// The number under this tag; 0 if there is none, as the schema has it.
fn number(message: &[u8], tag: u32) -> Result<u64, Unreadable> {
    let mut found = 0;
    for field in Fields(message) {
        if let (of, Field::Number(value)) = field?
            && of == tag
        {
            found = value;
        }
    }
    Ok(found)
}

/// A field's value. The schema has no other kinds.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of a message by tag, until the end or the first that cannot be read.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u32, Field<'a>), Unreadable>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let read = self.read();
        if read.is_none() {
            self.0 = &[];
        }
        Some(read.ok_or(Unreadable))
    }
}

impl<'a> Fields<'a> {
    fn read(&mut self) -> Option<(u32, Field<'a>)> {
        let (tag, wire_type) = decode_key(&mut self.0).ok()?;
        let value = decode_varint(&mut self.0).ok()?;
        let field = match wire_type {
            WireType::Varint => Field::Number(value),
            WireType::LengthDelimited => {
                let (bytes, rest) = self.0.split_at_checked(usize::try_from(value).ok()?)?;
                self.0 = rest;
                Field::Bytes(bytes)
            }
            _ => return None,
        };
        Some((tag, field))
    }
}

/// Hands on each message of a Watch stream as its bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WholeMessages;

impl Codec for WholeMessages {
    type Encode = WatchRequest;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for WholeMessages {
    type Item = WatchRequest;
    type Error = Status;

    fn encode(&mut self, request: WatchRequest, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        request
            .encode(buffer)
            .map_err(|error| Status::internal(error.to_string()))
    }
}

impl Decoder for WholeMessages {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(message.copy_to_bytes(message.remaining())))
    }
}

#[cfg(test)]
mod tests {
    use waypost_proto::v1::{
        Coverage, Entry, Header, Progress, Reset, SnapshotEnd, WatchEvent, WatchResponse,
        watch_event::Kind,
    };

    use super::*;

    fn message(kinds: Vec<Kind>) -> Vec<u8> {
        let events = kinds
            .into_iter()
            .map(|kind| WatchEvent { kind: Some(kind) })
            .collect();
        WatchResponse { events }.encode_to_vec()
    }

    #[test]
    fn what_is_read_is_what_the_schema_says() {
        let user = UserId([7; 16]);
        let message = message(vec![
            Kind::Header(Header::default()),
            Kind::Entry(Entry {
                user: Bytes::copy_from_slice(&user.0),
                last_contact_ms: 1,
                last_sample_ms: 2,
                last_fix_ms: 3,
                durable_ms: u64::MAX,
                state: 1,
                position: 300,
                coalesced: 70_000,
            }),
            Kind::SnapshotEnd(SnapshotEnd {
                count: 1,
                position: 300,
                token: Bytes::from_static(b"token"),
            }),
            Kind::Coverage(Coverage::default()),
            Kind::Progress(Progress {
                resolved_ms: 5,
                position: 301,
                lag_ms: 6,
                token: Bytes::from_static(b"token"),
            }),
            Kind::Reset(Reset::default()),
        ]);
        let read: Result<Vec<_>, _> = events(&message).collect();
        let expected = vec![
            Told::Header,
            Told::Entry(ToldEntry {
                user,
                durable_ms: u64::MAX,
                position: 300,
                coalesced: 70_000,
            }),
            Told::SnapshotEnd {
                count: 1,
                position: 300,
            },
            Told::Other,
            Told::Progress { position: 301 },
            Told::Reset,
        ];
        assert_eq!(read, Ok(expected));
    }

    #[test]
    fn what_is_cut_off_or_garbage_is_said_and_ends() {
        let whole = message(vec![Kind::Progress(Progress {
            position: 301,
            ..Progress::default()
        })]);
        for length in 1..whole.len() {
            let read: Result<Vec<_>, _> = events(&whole[..length]).collect();
            assert_eq!(read, Err(Unreadable), "{length} bytes");
        }
        assert_eq!(events(&[0xff; 64]).last(), Some(Err(Unreadable)));
    }
}
