//! What was sent and not answered yet, and whether an answer is right.
//!
//! Knows what the gateway and the echo owe for a request. Must not know connections or time.
//!
//! # Bounds
//!
//! It holds what it was told to expect, at most one round of a device.

use std::collections::VecDeque;

use anyhow::{Context, ensure};
use bytes::Bytes;
use waypost_proto::v1;

/// One request, ready for the wire.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    /// The highest sequence number in it; 0 if it holds no ping.
    pub(crate) last_seq: u64,
    /// The frame as it is sent.
    pub(crate) bytes: Bytes,
}

/// Requests in the order in which they are sent.
#[derive(Debug, Default)]
pub(crate) struct Owed {
    frames: VecDeque<Frame>,
    /// How much of the first has come back from the echo.
    matched_bytes: usize,
}

impl Owed {
    /// All of these, and nothing else, are to be answered.
    pub(crate) fn expect(&mut self, frames: &[Frame]) {
        *self = Self {
            frames: frames.iter().cloned().collect(),
            matched_bytes: 0,
        };
    }

    /// How many requests are not answered.
    pub(crate) fn len(&self) -> usize {
        self.frames.len()
    }

    /// Takes out what the gateway acknowledges.
    ///
    /// # Errors
    /// Unless all that was ever sent up to there is stored: nothing missing, refused or known already.
    pub(crate) fn acknowledge(&mut self, ack: &v1::Ack) -> anyhow::Result<()> {
        let mut last_seq = None;
        while let Some(frame) = self
            .frames
            .pop_front_if(|frame| frame.last_seq <= ack.durable_upto)
        {
            last_seq = Some(frame.last_seq);
        }
        let is_all = last_seq
            .is_none_or(|last_seq| ack.durable_upto == last_seq && ack.accepted == last_seq);
        ensure!(
            is_all && ack.rejects.is_empty(),
            "new pings were sent, up to {last_seq:?} of those that this answers: {ack:?}"
        );
        Ok(())
    }

    /// Takes out what the echo sends back.
    ///
    /// # Errors
    /// When it is not what was sent.
    pub(crate) fn hear(&mut self, mut echoed: &[u8]) -> anyhow::Result<()> {
        while !echoed.is_empty() {
            let frame = self.frames.front();
            let frame = frame.context("the echo says more than it was told")?;
            let rest = &frame.bytes[self.matched_bytes..];
            let (same, beyond) = echoed.split_at(rest.len().min(echoed.len()));
            ensure!(rest.starts_with(same), "the echo changed what it was told");
            echoed = beyond;
            self.matched_bytes += same.len();
            if self.matched_bytes == frame.bytes.len() {
                self.matched_bytes = 0;
                self.frames.pop_front();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owed() -> Owed {
        let mut owed = Owed::default();
        owed.expect(
            &[(2, &b"one"[..]), (4, b"two"), (6, b"three")].map(|(last_seq, bytes)| Frame {
                last_seq,
                bytes: Bytes::from_static(bytes),
            }),
        );
        owed
    }

    fn ack(durable_upto: u64, accepted: u64) -> v1::Ack {
        v1::Ack {
            durable_upto,
            accepted,
            ..v1::Ack::default()
        }
    }

    #[test]
    fn an_ack_answers_every_request_up_to_it() {
        let mut owed = owed();
        owed.acknowledge(&ack(4, 4)).unwrap();
        assert_eq!(owed.len(), 1);
        owed.acknowledge(&ack(4, 4)).unwrap();
        assert_eq!(owed.len(), 1);
        owed.acknowledge(&ack(6, 6)).unwrap();
        assert_eq!(owed.len(), 0);
    }

    #[test]
    fn an_ack_that_is_not_of_what_was_sent_is_wrong() {
        let refused = v1::Ack {
            rejects: vec![v1::Reject::default()],
            ..ack(0, 0)
        };
        for (wrong, why) in [
            (ack(4, 3), "one is a duplicate, filtered or refused"),
            (ack(4, 5), "one was stored that was not sent"),
            (ack(3, 3), "half of a request"),
            (ack(7, 7), "more than was sent"),
            (refused, "put off"),
        ] {
            assert!(owed().acknowledge(&wrong).is_err(), "{why}");
        }
    }

    #[test]
    fn an_echo_may_come_in_any_pieces() {
        let whole = b"onetwothree";
        for cut in 0..whole.len() {
            let mut owed = owed();
            owed.hear(&whole[..cut]).unwrap();
            owed.hear(&whole[cut..]).unwrap();
            assert_eq!(owed.len(), 0, "cut at {cut}");
        }
    }

    #[test]
    fn an_echo_of_something_else_is_wrong() {
        assert!(owed().hear(b"onetwa").is_err());
        assert!(owed().hear(b"onetwothreefour").is_err());
    }
}
