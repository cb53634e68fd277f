//! Lets a thread run only when nobody else wants to.
//!
//! Knows one system call. Must not know what the thread does.
//!
//! A load test that shares its machine with the gateway stands for machines elsewhere, whose work would not take
//! the gateway's processors. The least priority of the usual policy does not do: a thread that runs is left to run
//! for some milliseconds all the same, while a thread of this policy is put aside as soon as another one wakes.
//!
//! The one unsafe block of this package: neither std nor rustix has the call.

use std::io;

/// Makes the calling thread one that gives way to all others of the usual policy.
///
/// # Errors
/// When the system does not allow it.
#[expect(unsafe_code, reason = "a system call without a safe wrapper")]
pub(crate) fn give_way() -> io::Result<()> {
    const THIS_THREAD: libc::pid_t = 0;
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the call reads `parameters`, which live until it returns, and changes nothing but how this thread
    // is scheduled.
    match unsafe { libc::sched_setscheduler(THIS_THREAD, libc::SCHED_IDLE, &raw const parameters) }
    {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use super::*;

    #[test]
    fn only_the_thread_that_asks_gives_way() {
        let policy = || {
            // Field 41, of which the second, the name, ends with the last bracket.
            let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
            let after_name = stat.rsplit_once(") ").unwrap().1.to_owned();
            after_name
                .split(' ')
                .nth(41 - 3)
                .unwrap()
                .parse::<i32>()
                .unwrap()
        };
        let before = policy();
        let of_other = thread::spawn(move || {
            give_way().unwrap();
            policy()
        });
        assert_eq!(of_other.join().unwrap(), libc::SCHED_IDLE);
        assert_eq!(policy(), before);
    }
}
