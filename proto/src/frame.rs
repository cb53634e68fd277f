//! Frames on a stream: a varint length, then that many bytes of one protobuf message.
//!
//! Knows lengths and their limit. Must not know what the messages mean, nor where the bytes come from
//! or go to.

use std::fmt;

use bytes::{Buf, BytesMut};
use prost::Message;

/// Cuts a stream back into the frames that were written to it, however it was split on the way.
///
/// Give it what has arrived with [`Self::extend`], then take frames with [`Self::next`] until there is
/// none. Then it holds at most one begun frame, and no memory at all between frames: most connections
/// are idle most of the time. An error is final; asking again gives the same one.
pub struct FrameReader {
    max_frame_bytes: usize,
    buffer: BytesMut,
}

/// Why a stream cannot be read any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The peer announced more than the limit.
    #[error("a frame of {length} bytes is over the limit of {limit} bytes; send it in parts")]
    TooLarge {
        /// What the prefix says.
        length: u64,
        /// What is allowed.
        limit: usize,
    },
    /// The prefix is no varint in its shortest form, or what it announced is not the message.
    #[error(
        "a frame cannot be decoded: it must be a shortest varint length and a message of the schema"
    )]
    Malformed,
}

impl FrameReader {
    /// A reader that refuses frames longer than this, their prefix not counted.
    #[must_use]
    pub fn new(max_frame_bytes: usize) -> Self {
        Self {
            max_frame_bytes,
            buffer: BytesMut::new(),
        }
    }

    /// Takes what has arrived.
    ///
    /// It is copied, which costs less than a nanosecond a ping. Keeping a slice of the transport's
    /// receive buffer would hold all of that buffer for the sake of one begun frame.
    pub fn extend(&mut self, chunk: &[u8]) {
        self.buffer.extend_from_slice(chunk);
    }

    /// The next frame, or `None` until more of it has arrived.
    ///
    /// A length is checked before anything is done for it, and an allowed one gets memory only as its
    /// bytes arrive: announcing a frame costs the peer as much as it costs us.
    #[expect(
        clippy::should_implement_trait,
        reason = "no iterator: it goes on after `None`"
    )]
    pub fn next<M: Message + Default>(&mut self) -> Result<Option<M>, FrameError> {
        let Some((prefix_bytes, length)) = read_prefix(&self.buffer, self.max_frame_bytes)? else {
            return Ok(None);
        };
        let end = prefix_bytes + length;
        // Decoding from a slice copies bytes fields instead of sharing the buffer with them.
        let Some(body) = self.buffer.get(prefix_bytes..end) else {
            return Ok(None);
        };
        let message = M::decode(body).map_err(|_| FrameError::Malformed)?;
        self.buffer.advance(end);
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
        Ok(Some(message))
    }

    /// Whether a frame has begun and not ended, once [`Self::next`] has given `None`.
    #[must_use]
    pub fn is_inside_frame(&self) -> bool {
        !self.buffer.is_empty()
    }
}

/// Says how much is buffered and not what: it may be coordinates.
impl fmt::Debug for FrameReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameReader")
            .field("max_frame_bytes", &self.max_frame_bytes)
            .field("buffered_bytes", &self.buffer.len())
            .finish()
    }
}

/// Appends one frame.
pub fn encode_frame(message: &impl Message, out: &mut BytesMut) {
    message
        .encode_length_delimited(out)
        .expect("BytesMut grows as needed");
}

/// The size of the prefix and the length that it announces; `None` if the prefix is not all there.
fn read_prefix(bytes: &[u8], max_frame_bytes: usize) -> Result<Option<(usize, usize)>, FrameError> {
    let mut length = 0;
    for (at, byte) in bytes.iter().take(MAX_PREFIX_BYTES).enumerate() {
        length |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 != 0 {
            continue;
        }
        if at > 0 && *byte == 0 {
            return Err(FrameError::Malformed);
        }
        return match usize::try_from(length) {
            Ok(length) if length <= max_frame_bytes => Ok(Some((at + 1, length))),
            _ => Err(FrameError::TooLarge {
                length,
                limit: max_frame_bytes,
            }),
        };
    }
    if bytes.len() < MAX_PREFIX_BYTES {
        Ok(None)
    } else {
        Err(FrameError::Malformed)
    }
}

/// Enough for 32 bits, which is more than any limit in use.
const MAX_PREFIX_BYTES: usize = 5;

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::v1::{
        Control, DeviceFrame, Heartbeat, Hello, PingBatch, control, device_frame::Kind,
    };

    const LIMIT: usize = 65_536;

    /// Feeds the chunks one by one; gives the frames, how it ended, and whether a frame was left open.
    fn read<'a>(
        chunks: impl IntoIterator<Item = &'a [u8]>,
    ) -> (Vec<DeviceFrame>, Option<FrameError>, bool) {
        let mut reader = FrameReader::new(LIMIT);
        let mut frames = Vec::new();
        for chunk in chunks {
            reader.extend(chunk);
            loop {
                match reader.next() {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break,
                    Err(error) => {
                        assert_eq!(
                            reader.next::<DeviceFrame>(),
                            Err(error),
                            "an error is final"
                        );
                        return (frames, Some(error), false);
                    }
                }
            }
        }
        (frames, None, reader.is_inside_frame())
    }

    /// Cuts bytes at the given places, taken modulo the length; empty chunks may result.
    fn split<'a>(bytes: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        cuts.windows(2)
            .map(|ends| &bytes[ends[0]..ends[1]])
            .collect()
    }

    fn frame() -> impl Strategy<Value = DeviceFrame> {
        let hello = (
            any::<u32>(),
            any::<u64>(),
            prop::collection::vec(any::<u8>(), 0..40),
        )
            .prop_map(|(epoch, next_seq, incarnation)| {
                Kind::Hello(Hello {
                    epoch,
                    next_seq,
                    incarnation: Bytes::from(incarnation),
                    ..Hello::default()
                })
            });
        let batch = prop::collection::vec(any::<i64>(), 0..200).prop_map(|time| {
            Kind::Batch(PingBatch {
                time,
                ..PingBatch::default()
            })
        });
        let control = any::<u64>().prop_map(|id| {
            Kind::Control(Control {
                id,
                action: Some(control::Action::Pause(control::Pause {})),
            })
        });
        prop::option::of(prop_oneof![
            hello,
            batch,
            control,
            Just(Kind::Heartbeat(Heartbeat {}))
        ])
        .prop_map(|kind| DeviceFrame { kind })
    }

    proptest! {
        #[test]
        fn any_split_gives_the_frames_that_were_written(
            frames in prop::collection::vec(frame(), 0..8),
            cuts in prop::collection::vec(any::<usize>(), 0..30),
        ) {
            let mut bytes = BytesMut::new();
            for frame in &frames {
                encode_frame(frame, &mut bytes);
            }
            prop_assert_eq!(read(split(&bytes, &cuts)), (frames.clone(), None, false));
            prop_assert_eq!(read(bytes.chunks(1)), (frames, None, false));
        }

        #[test]
        fn any_bytes_are_read_the_same_however_they_are_split(
            bytes in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..300),
                // Short frames of few different bytes, so that many of them decode.
                prop::collection::vec(prop_oneof![0..0x30_u8, 0x80..0x84_u8], 0..300),
            ],
            cuts in prop::collection::vec(any::<usize>(), 0..30),
        ) {
            prop_assert_eq!(read(split(&bytes, &cuts)), read([&bytes[..]]));
        }
    }

    #[test]
    fn a_length_is_refused_by_its_prefix_alone() {
        for (prefix, expected) in [
            (&[0x80, 0x80, 0x04][..], None),
            (
                &[0x81, 0x80, 0x04],
                Some(FrameError::TooLarge {
                    length: 65_537,
                    limit: LIMIT,
                }),
            ),
            (
                &[0xff, 0xff, 0xff, 0xff, 0x7f],
                Some(FrameError::TooLarge {
                    length: (1 << 35) - 1,
                    limit: LIMIT,
                }),
            ),
            // Not the shortest form of 0 and of 1.
            (&[0x80, 0x00], Some(FrameError::Malformed)),
            (&[0x81, 0x80, 0x80, 0x80, 0x00], Some(FrameError::Malformed)),
            // Longer than any length in use, whatever follows.
            (&[0xff, 0xff, 0xff, 0xff, 0xff], Some(FrameError::Malformed)),
        ] {
            let (frames, error, is_inside_frame) = read([prefix]);
            assert_eq!((frames.len(), error), (0, expected), "{prefix:x?}");
            assert_eq!(is_inside_frame, expected.is_none(), "{prefix:x?}");
        }
    }

    #[test]
    fn an_announced_frame_gets_no_memory_before_it_arrives() {
        let mut reader = FrameReader::new(LIMIT);
        reader.extend(&[0x80, 0x80, 0x04]);
        assert_eq!(reader.next::<DeviceFrame>(), Ok(None));
        assert!(
            reader.buffer.capacity() < 1_024,
            "{} bytes",
            reader.buffer.capacity()
        );
    }

    #[test]
    fn between_frames_the_reader_holds_no_memory() {
        let mut bytes = BytesMut::new();
        encode_frame(
            &DeviceFrame {
                kind: Some(Kind::Heartbeat(Heartbeat {})),
            },
            &mut bytes,
        );
        let mut reader = FrameReader::new(LIMIT);
        reader.extend(&bytes);
        assert!(
            reader
                .next::<DeviceFrame>()
                .expect("a whole frame")
                .is_some()
        );
        assert!(!reader.is_inside_frame());
        assert_eq!(reader.buffer.capacity(), 0);
    }

    #[test]
    fn a_frame_of_an_unknown_kind_is_a_frame_without_a_kind() {
        // Field 100, two bytes; then a heartbeat, which must still be found.
        let bytes = [0x05, 0xa2, 0x06, 0x02, 0xff, 0xff, 0x02, 0x1a, 0x00];
        let known = DeviceFrame {
            kind: Some(Kind::Heartbeat(Heartbeat {})),
        };
        assert_eq!(
            read([&bytes[..]]),
            (vec![DeviceFrame { kind: None }, known], None, false)
        );
    }

    #[test]
    fn a_body_that_is_no_message_is_malformed() {
        // Field 2 claims more bytes than the frame has, and the next frame must not lend them.
        let bytes = [0x02, 0x12, 0x05, 0x02, 0x1a, 0x00, 0x00, 0x00];
        assert_eq!(
            read([&bytes[..]]),
            (vec![], Some(FrameError::Malformed), false)
        );
    }
}
