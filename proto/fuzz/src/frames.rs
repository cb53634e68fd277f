//! Any bytes, in any pieces, through the frame reader; for the fuzzer and for the replay of its corpus.
//!
//! Says how much it got through, so that a corpus that reaches nothing is noticed.

use bytes::BytesMut;
use waypost_proto::{
    frame::{FrameError, FrameReader, encode_frame},
    v1,
};

/// The first byte says where to cut; the rest are the bytes of a stream. Gives the frames that were read.
pub(crate) fn run(data: &[u8]) -> usize {
    let Some((piece, data)) = data.split_first() else {
        return 0;
    };
    let whole = read([data]);
    let pieces = read(data.chunks(usize::from(*piece).max(1)));
    assert_eq!(whole, pieces, "however it is split, it is the same");
    let mut written = BytesMut::new();
    for frame in &whole.0 {
        encode_frame(frame, &mut written);
    }
    let again = read([&written[..]]);
    assert_eq!(
        again,
        (whole.0.clone(), None, false),
        "what was read can be written"
    );
    whole.0.len()
}

fn read<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<v1::DeviceFrame>, Option<FrameError>, bool) {
    let mut reader = FrameReader::new(MAX_FRAME_BYTES);
    let mut frames = Vec::new();
    for piece in pieces {
        reader.extend(piece);
        loop {
            match reader.next() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Some(error), false),
            }
        }
    }
    (frames, None, reader.is_inside_frame())
}

const MAX_FRAME_BYTES: usize = 65_536;
