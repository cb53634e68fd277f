//! The real AIS day through QUIC into RocksDB and out as freshness, exactly; then all of it again.

use std::process::Command;

use waypost_tests::{ais_file, binary};

#[test]
fn a_day_of_vessels_arrives_exactly_and_a_second_time_as_duplicates() {
    let Some(ais) = ais_file() else { return };
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("out.json");
    let output = Command::new(binary("loadtest"))
        .arg("replay")
        .arg(ais)
        .args(["--speed-up", "max", "--passes", "2", "--json"])
        .arg(&json)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&json).expect(&said)).unwrap();
    assert!(output.status.success(), "{said}\n{report:#}");
    for (field, value) in [
        ("sent", 199_998),
        ("acked", 199_998),
        ("filtered", 0),
        ("rejected", 0),
        ("lost", 0),
        ("stored", 99_999),
        ("stored_twice", 0),
        ("freshness_checked", 10_631),
        ("freshness_wrong", 0),
    ] {
        assert_eq!(report[field], value, "{field} in {report:#}");
    }
    // Where a connection breaks on a busy machine, a first ack is lost and the ping comes back as a
    // duplicate: then there are more of these, and never fewer.
    let duplicate = report["duplicate"].as_u64().unwrap();
    let accepted = report["accepted"].as_u64().unwrap();
    assert!(99_999 <= duplicate, "{report:#}");
    assert_eq!(accepted + duplicate, 199_998, "{report:#}");
}
