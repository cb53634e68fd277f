//! Metrics of the process, under the names that every Prometheus dashboard knows.
//!
//! Knows their names and Linux's `/proc`. Must not know the gateway.

use super::{
    series::{approximate, seconds},
    text::write_family,
};

/// The process as the operating system sees it. What it does not tell is left out.
pub(super) fn write_process(text: &mut String, started_ms: u64) {
    let mut write = |name, kind, help, value: Option<f64>| {
        if let Some(value) = value {
            write_family(text, name, kind, help, &[("", value.to_string())]);
        }
    };
    write(
        "process_start_time_seconds",
        "gauge",
        "When the process started, in seconds since 1970-01-01 UTC.",
        Some(seconds(started_ms)),
    );
    write(
        "process_resident_memory_bytes",
        "gauge",
        "Memory of the process that is in RAM.",
        resident_memory_bytes().map(approximate),
    );
    write(
        "process_cpu_seconds_total",
        "counter",
        "User and system CPU time of the process.",
        cpu_seconds(),
    );
    write(
        "process_open_fds",
        "gauge",
        "Open file descriptors of the process.",
        open_file_descriptors().map(approximate),
    );
}

fn resident_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib * 1024)
}

fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the command in brackets, and may hold blanks and brackets itself.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(approximate(user + system) / CLOCK_TICKS_PER_SECOND)
}

fn open_file_descriptors() -> Option<u64> {
    // One of them is the folder being read.
    std::fs::read_dir("/proc/self/fd")
        .ok()?
        .count()
        .checked_sub(1)?
        .try_into()
        .ok()
}

/// The unit of times in /proc on every Linux that Rust has a tier 1 or 2 target for.
const CLOCK_TICKS_PER_SECOND: f64 = 100.0;

#[cfg(test)]
mod tests {
    use crate::metrics::{Metrics, tests::series};

    #[cfg(target_os = "linux")]
    #[test]
    fn the_process_is_measured() {
        let page = series(&Metrics::new().render());
        for name in [
            "process_resident_memory_bytes",
            "process_open_fds",
            "process_start_time_seconds",
        ] {
            assert!(0.0 < page[name], "{name}");
        }
        assert!(page.contains_key("process_cpu_seconds_total"));
    }
}
