//! Pings that are due at fixed times, whether or not those before are answered.
//!
//! Knows the schedule and how to keep it. Must not know what a ping is or what an answer says.
//!
//! # Bounds
//!
//! A pace has an end; what a slow server leaves unanswered until then is what its wires owe.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use tokio::{sync::Notify, task::JoinSet};

use super::wire::{Answers, Wire};

/// A schedule: every wire in turn, at one rate for all together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// When the first ping is due.
    pub(crate) begin: Instant,
    /// All wires together.
    pub(crate) pings_per_s: f64,
    /// Pings of each wire.
    pub(crate) each: usize,
    /// Wires in all threads.
    pub(crate) wires: usize,
    /// Threads; the wires go round among them.
    pub(crate) threads: usize,
    /// Which of the threads this one is.
    pub(crate) thread: usize,
}

/// Says how many pings are due. A thread of its own beats it: the timers of tokio go off together once a
/// millisecond, and pings that come ten at a time cost a server less than ten that come alone.
#[derive(Debug, Default)]
struct Beat {
    due: AtomicUsize,
    changed: Notify,
}

impl Pace {
    /// From the first ping due to the last.
    pub(crate) fn length(&self) -> Duration {
        Duration::from_secs_f64((self.wires * self.each) as f64 / self.pings_per_s)
    }

    /// When the ping with the number `turn` of this thread's wire `at` is due.
    fn due(&self, at: usize, turn: usize) -> Instant {
        let number = turn * self.wires + self.thread + at * self.threads;
        self.begin + Duration::from_secs_f64(number as f64 / self.pings_per_s)
    }

    /// Sends what the wires have prepared, and waits until all is answered. Returns the time from due to
    /// answered of each ping, in microseconds.
    ///
    /// # Errors
    /// When a connection breaks, or an answer is wrong.
    pub(crate) async fn keep(self, wires: &mut Vec<Wire>) -> anyhow::Result<Vec<u64>> {
        let mut requests = Vec::with_capacity(wires.len());
        let mut reading = JoinSet::new();
        for (at, wire) in wires.drain(..).enumerate() {
            requests.push(wire.requests);
            reading.spawn(self.read(at, wire.answers));
        }
        let beat = self.start(requests.len())?;
        let total = requests.len() * self.each;
        let mut sent = 0;
        while sent < total {
            let due = beat.due.load(Ordering::Acquire);
            if sent == due {
                beat.changed.notified().await;
            }
            for number in sent..due {
                let (turn, at) = (number / requests.len(), number % requests.len());
                requests[at].send(turn).await?;
            }
            sent = due;
        }
        let mut latencies_us = Vec::with_capacity(total);
        let mut answers = Vec::with_capacity(requests.len());
        while let Some(read) = reading.join_next().await {
            let (at, answered, took_us) = read??;
            latencies_us.extend(took_us);
            answers.push((at, answered));
        }
        answers.sort_by_key(|(at, _)| *at);
        ensure!(
            answers.len() == requests.len(),
            "a wire has lost its way back"
        );
        wires.extend(
            requests
                .into_iter()
                .zip(answers)
                .map(|(requests, (_, answers))| Wire { requests, answers }),
        );
        Ok(latencies_us)
    }

    async fn read(
        self,
        at: usize,
        mut answers: Answers,
    ) -> anyhow::Result<(usize, Answers, Vec<u64>)> {
        let mut took_us = Vec::with_capacity(self.each);
        while took_us.len() < self.each {
            let answered = answers.next().await?;
            let now = Instant::now();
            for turn in (took_us.len()..).take(answered) {
                // What was not due yet cannot be answered, unless something is made up.
                let late = now.checked_duration_since(self.due(at, turn));
                let late = late.context("an answer came before its ping was due")?;
                took_us.push(u64::try_from(late.as_micros())?);
            }
        }
        ensure!(answers.owed() == 0, "fewer pings were due than prepared");
        Ok((at, answers, took_us))
    }

    fn start(self, wires: usize) -> std::io::Result<Arc<Beat>> {
        let beat = Arc::<Beat>::default();
        let beaten = Arc::clone(&beat);
        thread::Builder::new()
            .name("beat".to_owned())
            .spawn(move || {
                for turn in 0..self.each {
                    for at in 0..wires {
                        thread::sleep(self.due(at, turn).saturating_duration_since(Instant::now()));
                        beaten.due.store(turn * wires + at + 1, Ordering::Release);
                        beaten.changed.notify_one();
                    }
                }
            })?;
        Ok(beat)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threads_together_send_at_even_distances_and_each_wire_in_turn() {
        let begin = Instant::now();
        let (threads, wires, each) = (2, 5, 3);
        let mut due_us: Vec<u128> = Vec::new();
        for thread in 0..threads {
            let pace = Pace {
                begin,
                pings_per_s: 1_000.0,
                each,
                wires,
                threads,
                thread,
            };
            for turn in 0..each {
                let own = (wires - thread).div_ceil(threads);
                due_us.extend((0..own).map(|at| (pace.due(at, turn) - begin).as_micros()));
            }
        }
        due_us.sort_unstable();
        let even: Vec<u128> = (0..15).map(|number| number * 1_000).collect();
        assert_eq!(due_us, even);
    }
}
