//! Another language: a device and a checker in Python, written from the `.proto` files alone.
//!
//! What they prove is in `tests/python/test_client.py`; here is the gateway it runs against, and the
//! look into the store that no client has.

use std::{
    env,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use tokio::process::Command;
use waypost_proto::ping::Ping;
use waypost_tests::World;

/// The interpreter that has what `tests/python/requirements.txt` names.
fn python() -> PathBuf {
    let made_by_ci = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/python/bin/python");
    let python = env::var_os("TEST_PYTHON").map_or(made_by_ci, PathBuf::from);
    assert!(
        python.exists(),
        "{} is not there: run make test, or .ci/python",
        python.display()
    );
    python
}

/// A stored ping as the client writes it down.
fn ledger_line(epoch: u32, ping: &Ping) -> Value {
    json!({
        "epoch": epoch,
        "seq": ping.seq,
        "time_ms": ping.time_ms,
        "latitude_e7": ping.latitude_e7,
        "longitude_e7": ping.longitude_e7,
        "accuracy_dm": ping.accuracy_dm,
        "altitude_dm": ping.altitude_dm,
        "speed_cm_per_s": ping.speed_cm_per_s,
        "course_ddeg": ping.course_ddeg,
        "heading_deg": ping.heading_deg,
        "battery_percent": ping.battery_percent,
        "source": ping.source as i32,
    })
}

/// What the client was told is stored is on disk once, and every column
/// means to the gateway what the schema made the client's author believe.
#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_that_knows_only_the_schema_sends_pings_reads_acks_and_watches() {
    let world = World::start().await;
    let device = world.device(1);
    let pki = world.scratch("python");
    device.credentials.write(&pki, "device").unwrap();
    world
        .authority
        .issue_checker("dev")
        .unwrap()
        .write(&pki, "checker")
        .unwrap();
    std::fs::write(pki.join("ca.pem"), world.authority.certificate_pem()).unwrap();
    let ledger = pki.join("ledger");

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/test_client.py");
    let output = Command::new(python())
        .arg("-B") // no __pycache__ in the checkout
        .arg(script)
        .args(["--devices", &world.addresses().devices.to_string()])
        .args(["--freshness", &world.addresses().freshness.to_string()])
        .args(["--user", &device.id.user.to_string()])
        .arg("--pki")
        .arg(&pki)
        .arg("--ledger")
        .arg(&ledger)
        .output()
        .await
        .unwrap();
    let proved = String::from_utf8_lossy(&output.stdout);
    let failed = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "the Python client ended with {}\n{proved}{failed}",
        output.status
    );

    let mut told: Vec<Value> = std::fs::read_to_string(&ledger)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    told.sort_unstable_by_key(|line| line["seq"].as_u64());
    let store = world.stop().await;
    let mut stored: Vec<Value> = store
        .rows_of(device.id.user)
        .map(Result::unwrap)
        .flat_map(|row| {
            row.record
                .pings
                .into_iter()
                .map(move |ping| ledger_line(row.key.epoch, &ping))
        })
        .collect();
    stored.sort_unstable_by_key(|line| line["seq"].as_u64());
    assert_eq!(stored, told);
}
