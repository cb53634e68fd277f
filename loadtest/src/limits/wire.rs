//! One connection of the measuring client: frames out, and each answer checked against what was sent.
//!
//! Knows streams and who is at their other end. Must not know threads, rounds or the clock.

use std::iter;

use anyhow::{Context, bail, ensure};
use quinn::{RecvStream, SendStream};
use waypost_proto::{frame::FrameReader, v1};

use super::{
    load::{self, Drive},
    owed::{Frame, Owed},
};
use crate::link::Link;

/// What a wire leads to, which decides what a right answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Server {
    /// It answers when a request is judged and synced.
    Waypost,
    /// It sends the same bytes back at once.
    Echo,
}

/// A device: a connection with one stream.
#[derive(Debug)]
pub(crate) struct Wire {
    /// The way out.
    pub(crate) requests: Requests,
    /// The way back.
    pub(crate) answers: Answers,
}

/// The way out of a wire, and what is to go there.
#[derive(Debug)]
pub(crate) struct Requests {
    send: SendStream,
    epoch: u32,
    next_seq: u64,
    frames: Vec<Frame>,
    /// Ends when it is dropped.
    _link: Link,
}

/// The way back.
#[derive(Debug)]
pub(crate) struct Answers {
    server: Server,
    recv: RecvStream,
    reader: FrameReader,
    /// Also what is about to be sent.
    owed: Owed,
}

impl Wire {
    /// Opens the stream and says Hello. It returns when that is answered: a client has done with a handshake
    /// before its server has checked the certificate.
    ///
    /// # Errors
    /// When the connection breaks, or the answer is not the one that the server owes.
    pub(crate) async fn open(server: Server, link: Link) -> anyhow::Result<Self> {
        let (send, recv) = link.connection().open_bi().await?;
        let hello = Frame {
            last_seq: 0,
            bytes: load::encoded(&load::hello()),
        };
        let mut wire = Self {
            requests: Requests {
                send,
                epoch: 1,
                next_seq: 1,
                frames: vec![hello.clone()],
                _link: link,
            },
            answers: Answers {
                server,
                recv,
                reader: FrameReader::new(MAX_FRAME_BYTES),
                owed: Owed::default(),
            },
        };
        wire.requests.send(0).await?;
        match server {
            Server::Waypost => wire.requests.epoch = wire.answers.welcome().await?.epoch,
            Server::Echo => {
                wire.answers.owed.expect(&[hello]);
                wire.answers.next().await?;
            }
        }
        Ok(wire)
    }

    /// Makes the frames of the next round: encoding them is no part of what is measured.
    pub(crate) fn prepare(&mut self, drive: Drive, requests: u64, request_pings: u64) {
        let Requests {
            epoch,
            next_seq,
            frames,
            ..
        } = &mut self.requests;
        *frames = iter::repeat_with(|| {
            let frame = drive.batch(*epoch, *next_seq, request_pings);
            *next_seq += request_pings;
            Frame {
                last_seq: *next_seq - 1,
                bytes: load::encoded(&frame),
            }
        })
        .take(usize::try_from(requests).unwrap_or(usize::MAX))
        .collect();
        self.answers.owed.expect(frames);
    }

    /// Sends what was prepared, each request when the one before is answered.
    ///
    /// # Errors
    /// When the connection breaks, or an answer is wrong.
    pub(crate) async fn exchange(mut self) -> anyhow::Result<Self> {
        for at in 0..self.requests.frames.len() {
            self.requests.send(at).await?;
            let answered = self.answers.next().await?;
            ensure!(
                answered == 1,
                "one request was sent, and {answered} were answered"
            );
        }
        Ok(self)
    }
}

impl Requests {
    /// Hands one of the prepared frames to the connection.
    ///
    /// # Errors
    /// When the connection has broken, or there is no such frame.
    pub(crate) async fn send(&mut self, at: usize) -> anyhow::Result<()> {
        let frame = self.frames.get(at).context("nothing more is prepared")?;
        Ok(self.send.write_chunk(frame.bytes.clone()).await?)
    }
}

impl Answers {
    /// How many requests are not answered.
    pub(crate) fn owed(&self) -> usize {
        self.owed.len()
    }

    /// Waits until more is answered, and returns how many requests.
    ///
    /// # Errors
    /// When the connection breaks, or the answer is wrong.
    pub(crate) async fn next(&mut self) -> anyhow::Result<usize> {
        let owed_before = self.owed.len();
        while self.owed.len() == owed_before {
            match self.server {
                Server::Waypost => match self.frame().await? {
                    v1::gateway_frame::Kind::Ack(ack) => self.owed.acknowledge(&ack)?,
                    other => bail!("a batch is answered with Ack, not with {other:?}"),
                },
                Server::Echo => {
                    let chunk = self.recv.read_chunk(usize::MAX, true).await?;
                    self.owed.hear(&chunk.context(ENDED)?.bytes)?;
                }
            }
        }
        Ok(owed_before - self.owed.len())
    }

    async fn welcome(&mut self) -> anyhow::Result<v1::Welcome> {
        match self.frame().await? {
            v1::gateway_frame::Kind::Welcome(welcome) => Ok(welcome),
            other => bail!("Hello is answered with Welcome, not with {other:?}"),
        }
    }

    async fn frame(&mut self) -> anyhow::Result<v1::gateway_frame::Kind> {
        loop {
            if let Some(frame) = self.reader.next::<v1::GatewayFrame>()? {
                return frame.kind.context("the gateway sent an unknown frame");
            }
            let chunk = self.recv.read_chunk(usize::MAX, true).await?;
            self.reader.extend(&chunk.context(ENDED)?.bytes);
        }
    }
}

/// More than any gateway has to say at once.
const MAX_FRAME_BYTES: usize = 65_536;
const ENDED: &str = "the server ended the stream";
