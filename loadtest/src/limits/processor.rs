//! What another process uses: processor time to the nanosecond, and memory.
//!
//! Knows /proc. Must not know whose process it is.

use std::{fs, io, time::Duration};

use anyhow::Context;
use rustix::param::page_size;

/// What the threads of a process that live now have used since they began. Unlike `/proc/PID/stat`, which
/// counts in hundredths of a second, it sees what a short round costs; it hardly depends on who else uses
/// the machine. A thread that ends takes its time with it, so a server's lasting threads should do the work.
///
/// # Errors
/// When there is no such process, or the kernel keeps no such account.
pub(crate) fn used_by(process_id: u32) -> anyhow::Result<Duration> {
    let tasks = format!("/proc/{process_id}/task");
    let mut used = Duration::ZERO;
    for task in fs::read_dir(&tasks).with_context(|| format!("cannot read {tasks}"))? {
        match fs::read_to_string(task?.path().join("schedstat")) {
            Ok(account) => used += parse(&account).context("a schedstat of the kernel is odd")?,
            // It has ended in the meantime.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("cannot read a thread's schedstat"),
        }
    }
    Ok(used)
}

/// The memory that a process has in use, in bytes.
///
/// # Errors
/// When there is no such process.
pub(crate) fn resident_bytes(process_id: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{process_id}/statm");
    let statm = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let pages: u64 = statm
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .with_context(|| format!("{path} is odd"))?;
    Ok(pages * page_size() as u64)
}

/// The first number is the time on a processor, in nanoseconds.
fn parse(account: &str) -> Option<Duration> {
    let running = account.split_whitespace().next()?;
    running.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_begins_with_the_time_on_a_processor() {
        assert_eq!(parse("1500 20 3\n"), Some(Duration::from_nanos(1_500)));
        assert_eq!(parse(""), None);
    }

    #[test]
    fn memory_that_is_used_is_seen() {
        let own = std::process::id();
        let before = resident_bytes(own).unwrap();
        let used = vec![1_u8; 64 << 20];
        let after = resident_bytes(own).unwrap();
        assert!(before + (32 << 20) < after, "{before} {after} {}", used[7]);
        assert!(resident_bytes(u32::MAX).is_err());
    }

    #[test]
    fn work_is_counted_and_another_process_is_not_taken_for_this_one() {
        let own = std::process::id();
        let before = used_by(own).unwrap();
        let mut number: u64 = 1;
        while used_by(own).unwrap() == before {
            number = std::hint::black_box(number.wrapping_mul(6_364_136_223_846_793_005));
        }
        assert!(used_by(u32::MAX).is_err());
    }
}
