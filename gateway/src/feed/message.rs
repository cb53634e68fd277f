//! One message of a Watch stream, in the bytes in which it is sent.
//!
//! Knows that a `WatchResponse` is its events one after the other, so that one can be put together of parts
//! which other streams send too. Must not know what the events say.

use bytes::{Buf, BufMut, Bytes};
use prost::{
    DecodeError,
    encoding::{DecodeContext, WireType, skip_field},
};

/// A `WatchResponse` that is encoded already. It can be sent, not read.
#[derive(Clone, Debug, Default)]
pub struct Message {
    parts: Vec<Bytes>,
}

impl Message {
    /// Adds events, encoded.
    pub(super) fn push(&mut self, events: Bytes) {
        if !events.is_empty() {
            self.parts.push(events);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }
}

impl prost::Message for Message {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        self.parts.iter().for_each(|part| buf.put_slice(part));
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        skip_field(wire_type, tag, buf, ctx)
    }

    fn encoded_len(&self) -> usize {
        self.parts.iter().map(Bytes::len).sum()
    }

    fn clear(&mut self) {
        self.parts.clear();
    }
}
