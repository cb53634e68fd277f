//! A command's side of the operator's door: one connection, for one command.
//!
//! Knows the socket and what may come on it. Must not know what becomes of it.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use super::{
    Answer, Command, ControlError, LINE_BYTES, PATIENCE, SOCKET,
    chunks::{self, CopyError},
};

/// A gateway that was given a command.
#[derive(Debug)]
pub struct Call {
    stream: BufReader<UnixStream>,
    path: PathBuf,
}

impl Call {
    /// Gives the gateway of a data folder a command. None if no gateway runs there.
    ///
    /// # Errors
    /// When one does and cannot be asked.
    pub fn begin(data_dir: &Path, command: &Command) -> Result<Option<Self>, ControlError> {
        let path = data_dir.join(SOCKET);
        let mut stream = match UnixStream::connect(&path) {
            Ok(stream) => stream,
            // A socket without a gateway is left behind by one that was killed.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(None);
            }
            Err(source) => return Err(ControlError::Unreachable { path, source }),
        };
        let asked = (|| {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            let mut line = serde_json::to_vec(command)?;
            line.push(b'\n');
            stream.write_all(&line)
        })();
        match asked {
            Ok(()) => Ok(Some(Self {
                stream: BufReader::new(stream),
                path,
            })),
            Err(source) => Err(ControlError::NoAnswer { path, source }),
        }
    }

    /// Waits for the next line.
    ///
    /// # Errors
    /// When none comes.
    pub fn answer(&mut self) -> Result<Answer, ControlError> {
        self.line().map_err(|source| ControlError::NoAnswer {
            path: self.path.clone(),
            source,
        })
    }

    /// Writes what comes behind the line `follows`, and says how much that was.
    ///
    /// # Errors
    /// When it does not come to its end, or cannot be written. Then what was written is not the whole.
    pub fn copy(&mut self, out: &mut impl Write) -> Result<u64, ControlError> {
        let cut_off = |error: io::Error| ControlError::CutOff {
            reason: match error.kind() {
                io::ErrorKind::UnexpectedEof => {
                    "the gateway stopped, or its end of the connection did".to_owned()
                }
                io::ErrorKind::WouldBlock => "the gateway gives nothing any more".to_owned(),
                _ => error.to_string(),
            },
        };
        let copied = chunks::copy(&mut self.stream, out).map_err(|error| match error {
            CopyError::CutOff(error) => cut_off(error),
            CopyError::Output(error) => ControlError::Output(error),
        })?;
        match self.line().map_err(cut_off)? {
            Answer::Whole { bytes } if bytes == copied => Ok(bytes),
            Answer::Refused(reason) => Err(ControlError::CutOff { reason }),
            other => Err(ControlError::CutOff {
                reason: format!("after {copied} bytes the gateway said {other:?}"),
            }),
        }
    }

    fn line(&mut self) -> io::Result<Answer> {
        let mut line = String::new();
        (&mut self.stream).take(LINE_BYTES).read_line(&mut line)?;
        if line.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, thread};

    use waypost_proto::id::UserId;

    use super::*;
    use crate::export::Format;

    /// What a command makes of a gateway that says this, then goes.
    fn copied(said: Vec<u8>) -> (Result<u64, ControlError>, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join(SOCKET)).unwrap();
        let gateway = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut stream = BufReader::new(stream);
            let mut command = String::new();
            stream.read_line(&mut command).unwrap();
            stream.get_mut().write_all(&said).unwrap();
            command
        });
        let wanted = Command::export(UserId([7; 16]), Format::Jsonl);
        let mut call = Call::begin(folder.path(), &wanted).unwrap().unwrap();
        let command = gateway.join().unwrap();
        assert_eq!(serde_json::from_str::<Command>(&command).unwrap(), wanted);
        let mut out = Vec::new();
        let copied = match call.answer() {
            Ok(Answer::Follows) => call.copy(&mut out),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error),
        };
        (copied, out)
    }

    fn said(chunks: &[&[u8]], last: &str) -> Vec<u8> {
        let mut said = b"\"follows\"\n".to_vec();
        for chunk in chunks {
            said.extend(chunks::length_of(chunk));
            said.extend(*chunk);
        }
        said.extend(chunks::END);
        said.extend(last.as_bytes());
        said
    }

    #[test]
    fn what_comes_is_whole_only_with_its_last_line() {
        let whole = said(&[b"one", b"two"], "{\"whole\":{\"bytes\":6}}\n");
        let (copied_whole, out) = copied(whole.clone());
        assert_eq!((copied_whole.unwrap(), out), (6, b"onetwo".to_vec()));
        // The line's own end says nothing more.
        for length in 0..whole.len() - 1 {
            let (cut, _) = copied(whole[..length].to_vec());
            assert!(cut.is_err(), "after {length} bytes: {cut:?}");
        }
    }

    #[test]
    fn a_gateway_that_gives_up_says_why() {
        let refused = said(&[b"one"], "{\"refused\":\"the disk is gone\"}\n");
        let error = copied(refused).0.unwrap_err().to_string();
        assert!(error.contains("the disk is gone"), "{error}");
        let other_length = said(&[b"one"], "{\"whole\":{\"bytes\":4}}\n");
        let error = copied(other_length).0.unwrap_err();
        assert!(matches!(error, ControlError::CutOff { .. }), "{error}");
    }
}
