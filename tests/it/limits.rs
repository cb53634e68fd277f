//! The measurement of limits in a small form: it measures everything, whatever the numbers are here.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Command, Output, Stdio},
};

use waypost_gateway::pki::prepare_development;
use waypost_tests::{binary, within_minutes};

fn limits(args: &[&str]) -> Output {
    Command::new(binary("loadtest"))
        .arg("limits")
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn a_small_run_measures_every_limit_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("limits.json");
    let stores = dir.path().join("stores");
    std::fs::create_dir(&stores).unwrap();
    let paths = [&stores, &json].map(|path| path.to_str().unwrap());
    let small = ["--connections", "50", "--rate", "500", "--seconds", "1"];
    let output = limits(
        &[
            &small[..],
            &["--rounds", "1", "--dir", paths[0], "--json", paths[1]],
        ]
        .concat(),
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");

    let figures: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&json).expect(&said)).unwrap();
    assert_eq!(figures["scenario"], "limits");
    assert_eq!(figures["connections"], 50);
    assert_eq!(figures["busy_connections"], 10);
    for figure in [
        "/echo_pings_per_s",
        "/waypost_pings_per_s",
        "/waypost_of_echo",
        "/echo_cpu_us_per_ping",
        "/waypost_cpu_us_per_ping",
        "/batches/echo_pings_per_s",
        "/batches/waypost_pings_per_s",
        "/batches/waypost_of_echo",
        "/batches/rocksdb_bytes_per_s",
        "/batches/rocksdb_pings_per_s",
        "/batches/committer_pings_per_s",
        "/batches/waypost_of_rocksdb",
        "/lone/echo_cpu_us",
        "/lone/waypost_cpu_us",
        "/lone/echo_ms/p50",
        "/lone/waypost_ms/p99",
        "/handshakes_per_s",
        "/storm_handshakes_per_s",
        "/storm_of_handshakes",
        "/echo_handshake_cpu_us",
        "/waypost_handshake_cpu_us",
        "/rocksdb_bytes_per_s",
        "/rocksdb_pings_per_s",
        "/committer_pings_per_s",
        "/waypost_of_rocksdb",
        "/group_requests",
        "/fsync_ms/p50",
        "/fsync_ms/p99",
    ] {
        let value = figures["limits"]
            .pointer(figure)
            .and_then(|value| value.as_f64());
        assert!(
            value.is_some_and(|value| 0.0 < value),
            "{figure} in {figures:#}"
        );
    }
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(
        table.contains("one ping outstanding on each of 10 connections"),
        "{table}"
    );
    assert_eq!(std::fs::read_dir(&stores).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_measured_is_an_error_and_no_number() {
    let output = limits(&["--dir", "/nowhere/at/all"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("/nowhere/at/all"), "{said}");
    assert!(output.stdout.is_empty());
}

#[tokio::test]
async fn the_echo_does_not_outlive_whoever_started_it() {
    let dir = tempfile::tempdir().unwrap();
    prepare_development(&dir.path().join("pki")).unwrap();
    let mut echo = Command::new(binary("loadtest"))
        .arg("echo-server")
        .arg("--data")
        .arg(dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut address = String::new();
    let mut said = BufReader::new(echo.stdout.take().unwrap());
    said.read_line(&mut address).unwrap();
    let address: SocketAddr = address.trim().parse().unwrap();
    assert!(address.ip().is_loopback());
    assert!(echo.try_wait().unwrap().is_none(), "it serves");

    drop(echo.stdin.take());
    let ended = tokio::task::spawn_blocking(move || echo.wait());
    assert!(within_minutes(ended).await.unwrap().unwrap().success());
}
