//! SIGKILL in mid-replay: no acknowledged ping is lost, and the devices finish by themselves.

use std::process::Command;

use quinn::ConnectionError;
use waypost_proto::session::Lane;
use waypost_tests::{Process, ais_file, binary, hello};

/// Done-when 3 of the main job. The load test keeps its own ledger of what was acknowledged and checks
/// the store against it at the end.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_gateway_has_everything_it_acknowledged() {
    let Some(ais) = ais_file() else { return };
    let mut gateway = Process::start(&[]).await;
    let report = gateway.data_dir().join("report.json");
    let replay = Command::new(binary("loadtest"))
        .arg("replay")
        .arg(ais)
        .args([
            "--speed-up",
            "4000",
            "--addr",
            &gateway.addresses().devices.to_string(),
        ])
        .args(["--freshness", &gateway.addresses().freshness.to_string()])
        .args(["--admin", &gateway.addresses().admin.to_string()])
        .arg("--pki")
        .arg(gateway.data_dir().join("pki"))
        .arg("--data")
        .arg(gateway.data_dir())
        .arg("--json")
        .arg(&report)
        .spawn()
        .unwrap();
    for _ in 1..=2 {
        // Counters begin again with each process; what was stored before does not come again.
        gateway
            .metrics_until(|metrics| {
                20_000.0 <= metrics.value("waypost_pings_total{fate=\"accepted\"}")
            })
            .await;
        gateway.kill();
        gateway.restart().await;
    }
    let output = tokio::task::spawn_blocking(|| replay.wait_with_output())
        .await
        .unwrap()
        .unwrap();
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert!(output.status.success(), "{report:#}");
    assert_eq!(report["lost"], 0);
    assert_eq!(report["stored_twice"], 0);
    assert_eq!(report["freshness_wrong"], 0);
    assert_eq!(report["stored"], 99_999);
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
}

/// Without that a device would learn it only when an answer is overdue. The idle timeout of the connection
/// is longer than the test waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_gateway_tells_devices_that_their_connections_are_gone() {
    let mut gateway = Process::start(&[]).await;
    let link = gateway.connect(&gateway.device(1)).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    live.welcome().await;
    gateway.kill();
    gateway.restart().await;
    // Its next keep-alive asks for it.
    assert_eq!(link.ended().await, ConnectionError::Reset);
}
