//! One connection of the measuring client: frames out, and each answer checked against what was sent.
//!
//! Knows how the gateway and the echo answer. Must not know threads, rounds or the clock.
//!
//! # Bounds
//!
//! A wire owes what it was told to send, at most one round of it.

use std::{collections::VecDeque, iter};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use waypost_proto::{frame::FrameReader, v1};

use super::load::{self, Drive};
use crate::link::Link;

/// What a wire leads to, which decides what a right answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Server {
    /// It answers when a request is judged and synced.
    Waypost,
    /// It sends the same bytes back at once.
    Echo,
}

/// One request, ready for the wire.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    last_seq: u64,
    bytes: Bytes,
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
    /// What was or will be sent, and not answered.
    owed: VecDeque<Frame>,
    /// How much of the first that is owed has come back from the echo.
    matched_bytes: usize,
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
                owed: VecDeque::new(),
                matched_bytes: 0,
            },
        };
        wire.requests.send(0).await?;
        match server {
            Server::Waypost => wire.requests.epoch = wire.answers.welcome().await?.epoch,
            Server::Echo => {
                wire.answers.owed.push_back(hello);
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
        self.answers.owed = frames.iter().cloned().collect();
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
                    v1::gateway_frame::Kind::Ack(ack) => self.settle(&ack)?,
                    other => bail!("a batch is answered with Ack, not with {other:?}"),
                },
                Server::Echo => {
                    let chunk = self.recv.read_chunk(usize::MAX, true).await?;
                    self.match_bytes(&chunk.context(ENDED)?.bytes)?;
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

    /// All that was ever sent must be stored: nothing missing, refused or known already.
    fn settle(&mut self, ack: &v1::Ack) -> anyhow::Result<()> {
        let mut last_seq = None;
        while let Some(frame) = self
            .owed
            .pop_front_if(|frame| frame.last_seq <= ack.durable_upto)
        {
            last_seq = Some(frame.last_seq);
        }
        if let Some(last_seq) = last_seq {
            let is_all = ack.durable_upto == last_seq && ack.accepted == last_seq;
            ensure!(is_all, "pings up to {last_seq} were sent, but {ack:?}");
        }
        Ok(())
    }

    fn match_bytes(&mut self, mut echoed: &[u8]) -> anyhow::Result<()> {
        while !echoed.is_empty() {
            let frame = self
                .owed
                .front()
                .context("the echo says more than it heard")?;
            let rest = &frame.bytes[self.matched_bytes..];
            let (same, beyond) = echoed.split_at(rest.len().min(echoed.len()));
            ensure!(rest.starts_with(same), "the echo changed what it heard");
            echoed = beyond;
            self.matched_bytes += same.len();
            if self.matched_bytes == frame.bytes.len() {
                self.matched_bytes = 0;
                self.owed.pop_front();
            }
        }
        Ok(())
    }
}

/// More than any gateway has to say at once.
const MAX_FRAME_BYTES: usize = 65_536;
const ENDED: &str = "the server ended the stream";
