//! Every scenario of the load test in small form, as its user would call it: a gateway of its own, all
//! checks, JSON and page. None of it depends on how fast the machine is.

use std::{path::Path, process::Command};

use serde_json::Value;
use waypost_tests::binary;

/// Runs the load test; its report. All checks have passed.
fn report(arguments: &[&str]) -> Value {
    let (report, said, code) = attempt(arguments);
    assert_eq!(code, Some(0), "{said}\n{report:#}");
    for (field, value) in [("lost", 0), ("stored_twice", 0), ("freshness_wrong", 0)] {
        assert_eq!(report[field], value, "{field} in {report:#}");
    }
    assert_eq!(report["sent"], report["acked"], "{report:#}");
    assert!(report["gateway"]["rss_bytes"].is_u64(), "{report:#}");
    report
}

fn attempt(arguments: &[&str]) -> (Value, String, Option<i32>) {
    let dir = tempfile::tempdir().unwrap();
    let (json, html) = (dir.path().join("out.json"), dir.path().join("out.html"));
    let output = Command::new(binary("loadtest"))
        .args(arguments)
        .args(["--seed", "5", "--json"])
        .arg(&json)
        .arg("--html")
        .arg(&html)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let report: Value = serde_json::from_slice(&std::fs::read(&json).expect(&said)).unwrap();
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains("Over time") && page.contains("</html>"));
    (report, said, output.status.code())
}

fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn steady_acknowledges_every_ping() {
    let report = report(&[
        "steady",
        "--devices",
        "40",
        "--rate",
        "100",
        "--duration",
        "3s",
    ]);
    assert_eq!(report["sent"], 300);
    assert_eq!(report["stored"], 300);
    assert_eq!(report["freshness_checked"], 40);
}

#[test]
fn a_ramp_ends_with_every_device_connected() {
    let report = report(&[
        "ramp",
        "--devices",
        "40",
        "--connect-rate",
        "20",
        "--every",
        "1s",
        "--duration",
        "4s",
    ]);
    assert_eq!(report["ramp"]["connected"], 40);
    assert_eq!(report["scenario"], "ramp");
}

/// The other devices leave and come back, and the gateway stays.
#[test]
fn a_storm_ends_with_every_device_served() {
    let report = report(&[
        "storm",
        "--devices",
        "60",
        "--established",
        "10",
        "--every",
        "200ms",
        "--calm",
        "2s",
        "--most-slowdown",
        "1000000",
    ]);
    assert_eq!(report["storm"]["served"], 60);
    assert_eq!(report["storm"]["restarted"], false);
    assert_eq!(report["reconnects"], 0, "nobody was sent away: {report:#}");
}

#[test]
fn a_storm_after_the_gateway_was_killed_ends_with_every_device_served() {
    let report = report(&[
        "storm",
        "--devices",
        "60",
        "--established",
        "10",
        "--every",
        "200ms",
        "--calm",
        "2s",
        "--restart",
        "kill",
        "--most-slowdown",
        "1000000",
    ]);
    assert_eq!(report["storm"]["served"], 60);
    assert_eq!(report["storm"]["restarted"], true);
    assert!(
        10 <= number(&report["reconnects"]),
        "the restart was felt: {report:#}"
    );
}

/// The check has teeth: nobody keeps a thousandth of the latency.
#[test]
fn a_storm_that_slows_established_devices_down_too_much_fails() {
    let (report, said, code) = attempt(&[
        "storm",
        "--devices",
        "20",
        "--established",
        "5",
        "--every",
        "200ms",
        "--calm",
        "1s",
        "--most-slowdown",
        "0.000001",
    ]);
    assert_eq!(code, Some(1), "{said}\n{report:#}");
    assert_eq!(report["lost"], 0);
}

#[test]
fn devices_that_wake_for_each_ping_are_served_each_time() {
    for more in [&[][..], &["--full-handshakes"]] {
        let arguments = [
            "wake",
            "--devices",
            "20",
            "--every",
            "1s",
            "--duration",
            "3s",
        ];
        let report = report(&[&arguments, more].concat());
        let wake = &report["wake"];
        assert_eq!(wake["wakes"], 60);
        let kind = |name: &str| number(&wake[name]["wakes"]);
        let (full, all) = (
            kind("full"),
            kind("full") + kind("resumed") + kind("early_data"),
        );
        assert_eq!(all, 60, "{wake:#}");
        let least_full = if more.is_empty() { 20 } else { 60 };
        assert!(least_full <= full, "nobody has a ticket at first: {wake:#}");
    }
}

#[test]
fn after_hours_without_coverage_everybody_is_fresh_again_and_the_backlog_arrives() {
    let report = report(&[
        "backlog",
        "--devices",
        "20",
        "--held",
        "300",
        "--fresh-within",
        "1h",
    ]);
    assert_eq!(report["stored"], 20 * 301);
    assert_eq!(report["backlog"]["fresh"], 20);
    assert_eq!(report["backlog"]["held_each"], 300);
}

/// One of them reads a byte a second for some time, is never cut off, and is told in the end what it missed.
#[test]
fn every_checker_is_told_of_every_change_though_one_of_them_is_slow() {
    let report = report(&[
        "freshness",
        "--users",
        "300",
        "--devices",
        "200",
        "--rate",
        "1500",
        "--checkers",
        "8",
        "--slow-readers",
        "1",
        "--duration",
        "6s",
        "--most-p99",
        "1h",
        "--least-pace",
        "0",
    ]);
    assert_eq!(report["checkers"], 8);
    assert!(report["freshness_ms"]["p99"].is_f64(), "{report:#}");
    assert!(report["slow_reader_bytes"].is_u64(), "{report:#}");
    let found = &report["freshness"];
    assert_eq!(
        (&found["users"], &found["slow_readers"]),
        (&300.into(), &1.into())
    );
    assert!(0 < number(&found["behind"]), "it was slow: {report:#}");
}

/// The check has teeth: nobody is told within a nanosecond.
#[test]
fn checkers_that_are_told_too_late_fail_the_run() {
    let (report, said, code) = attempt(&[
        "freshness",
        "--users",
        "20",
        "--devices",
        "20",
        "--rate",
        "100",
        "--checkers",
        "2",
        "--slow-readers",
        "0",
        "--duration",
        "1s",
        "--most-p99",
        "1ns",
        "--least-pace",
        "0",
    ]);
    assert_eq!(code, Some(1), "{said}\n{report:#}");
    assert_eq!(report["freshness_wrong"], 0);
    assert!(report["slow_reader_bytes"].is_null(), "{report:#}");
}

#[test]
fn what_is_sent_again_is_a_duplicate() {
    let report = report(&[
        "duplicates",
        "--devices",
        "20",
        "--rate",
        "100",
        "--duration",
        "2s",
    ]);
    assert_eq!(report["sent"], 400);
    assert_eq!(report["stored"], 200);
    assert!(200 <= number(&report["duplicate"]) + number(&report["untold"]));
}

#[test]
fn no_connection_breaks_when_ports_change() {
    let report = report(&[
        "rebind",
        "--devices",
        "40",
        "--rate",
        "200",
        "--duration",
        "4s",
        "--every",
        "1s",
        "--sockets",
        "2",
    ]);
    assert!(1 <= number(&report["rebind"]["rebinds"]), "{report:#}");
    assert_eq!(report["reconnects"], 0, "{report:#}");
}

#[test]
fn a_bad_network_costs_no_ping() {
    let report = report(&[
        "lossy",
        "--devices",
        "20",
        "--rate",
        "100",
        "--duration",
        "4s",
        "--loss",
        "0.1",
        "--duplication",
        "0.05",
        "--delay",
        "5ms",
        "--jitter",
        "10ms",
        "--sockets",
        "2",
    ]);
    for what in ["passed", "lost", "duplicated", "overtaken"] {
        assert!(0 < number(&report["lossy"][what]), "{what} in {report:#}");
    }
}

#[test]
fn a_mix_plays_each_group_by_its_own_rules() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mix.toml");
    std::fs::write(
        &file,
        "duration = '4s'
         [[group]]\nname = 'vans'\ndevices = 10\nevery = '1s'\nbatch = 3
         [[group]]\nname = 'shift'\ndevices = 10\nevery = '1s'\npresence = 'joins'\nconnect_rate = 20.0
         [[group]]\nname = 'back'\ndevices = 5\nevery = '2s'\npresence = 'returns'\nafter = '1s'\nheld = 50
         [[group]]\nname = 'tags'\ndevices = 10\nevery = '2s'\npresence = 'wakes'\n",
    )
    .unwrap();
    let report = report(&["mix", path(&file)]);
    let groups = report["mix"]["groups"].as_array().unwrap();
    let sent = |at: usize| {
        (
            groups[at]["name"].as_str().unwrap(),
            number(&groups[at]["sent"]),
        )
    };
    assert_eq!(sent(0), ("vans", 120));
    assert_eq!(sent(2), ("back", 5 * (50 + 2)));
    assert_eq!(sent(3), ("tags", 20));
    assert!(groups.iter().all(|group| group["sent"] == group["acked"]));
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
