//! How a long text goes over the operator's socket: in chunks, each behind its length in four bytes, big-endian. One of
//! length 0 says that no more come.
//!
//! Pure: bytes in, bytes out. Must not know what the text is, or what is said before and after it. Of a chunk no more
//! is held than a reader's buffer.

use std::io::{self, Read, Write};

/// Says that no more chunks come.
pub(super) const END: [u8; 4] = [0; 4];

/// The longest chunk that is taken: far more than is ever sent, and little enough to be no length that is out of step.
const LONGEST_BYTES: u32 = 1 << 20;

/// Why a text was not taken to its end.
#[derive(Debug)]
pub(super) enum CopyError {
    /// No more comes, and that was not the end.
    CutOff(io::Error),
    /// It cannot be written.
    Output(io::Error),
}

/// What goes before a chunk. A chunk is never empty.
pub(super) fn length_of(chunk: &[u8]) -> [u8; 4] {
    let length = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
    length.to_be_bytes()
}

/// Writes a text that comes in chunks, and says how long it was once its end has come.
pub(super) fn copy(from: &mut impl Read, out: &mut impl Write) -> Result<u64, CopyError> {
    let mut bytes = 0;
    let mut buffer = [0; 16 << 10];
    loop {
        let mut length = END;
        from.read_exact(&mut length).map_err(CopyError::CutOff)?;
        let mut left = u32::from_be_bytes(length);
        if left == 0 {
            out.flush().map_err(CopyError::Output)?;
            return Ok(bytes);
        }
        if LONGEST_BYTES < left {
            let kind = io::ErrorKind::InvalidData;
            return Err(CopyError::CutOff(kind.into()));
        }
        bytes += u64::from(left);
        while 0 < left {
            let room = buffer.len().min(left as usize);
            let chunk = &mut buffer[..room];
            from.read_exact(chunk).map_err(CopyError::CutOff)?;
            out.write_all(chunk).map_err(CopyError::Output)?;
            left -= u32::try_from(room).unwrap_or(left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(chunks: &[&[u8]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for chunk in chunks {
            bytes.extend(length_of(chunk));
            bytes.extend(*chunk);
        }
        bytes.extend(END);
        bytes
    }

    #[test]
    fn a_text_comes_out_as_it_went_in() {
        let long = vec![b'x'; 40_000];
        let bytes = sent(&[b"one ", &long, b" two"]);
        let mut out = Vec::new();
        let copied = copy(&mut &bytes[..], &mut out).unwrap();
        assert_eq!(copied, out.len() as u64);
        assert_eq!(out, [b"one ", &long[..], b" two"].concat());
        let mut nothing = Vec::new();
        assert_eq!(copy(&mut &END[..], &mut nothing).unwrap(), 0);
    }

    #[test]
    fn wherever_it_is_cut_off_it_is_not_taken_for_a_whole() {
        let bytes = sent(&[b"one", b"two"]);
        for length in 0..bytes.len() {
            let copied = copy(&mut &bytes[..length], &mut Vec::new());
            assert!(
                matches!(copied, Err(CopyError::CutOff(_))),
                "after {length} bytes: {copied:?}"
            );
        }
        let out_of_step = [&[0xff; 4][..], b"more"].concat();
        let copied = copy(&mut &out_of_step[..], &mut Vec::new());
        assert!(matches!(copied, Err(CopyError::CutOff(_))), "{copied:?}");
    }

    #[test]
    fn an_output_that_takes_nothing_is_told_apart() {
        let bytes = sent(&[b"one"]);
        let copied = copy(&mut &bytes[..], &mut &mut [0; 2][..]);
        assert!(matches!(copied, Err(CopyError::Output(_))), "{copied:?}");
    }
}
