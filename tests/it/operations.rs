//! What an operator sees: real Prometheus, the commands, and no coordinates anywhere.

use std::{
    io::Write,
    process::{Command, Stdio},
    time::Duration,
};

use tokio::io::{AsyncBufReadExt, BufReader};
use waypost_proto::session::Lane;
use waypost_tests::{Process, binary, hello, ping, tool};

fn waypost(args: &[&str]) -> std::process::Output {
    Command::new(binary("waypost")).args(args).output().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_prometheus_scrapes_the_metrics_and_finds_them_well_formed() {
    let gateway = Process::start(&[]).await;
    let device = gateway.device(1);
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1), ping(2)]).await;
    live.ack().await;
    let (status, page) = gateway.admin("/metrics").await;
    assert_eq!(status, 200);

    let mut promtool = Command::new(tool("promtool"))
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    promtool
        .stdin
        .take()
        .unwrap()
        .write_all(page.as_bytes())
        .unwrap();
    let checked = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&checked.stderr);
    assert!(
        checked.status.success() && said.trim().is_empty(),
        "promtool says: {said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_itself_reports_the_target_up_and_the_four_fates_adding_up() {
    let gateway = Process::start(&[]).await;
    let device = gateway.device(1);
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1), ping(2)]).await;
    live.ack().await;
    live.send_pings(epoch, &[ping(2), ping(3)]).await;
    live.ack().await;

    let prometheus = waypost_tests::Prometheus::start(gateway.addresses().admin).await;
    let up = prometheus
        .query_until("up{job=\"waypost\"}", |value| value == 1.0)
        .await;
    assert_eq!(up, 1.0);
    let sum = prometheus
        .query_until(
            "sum(waypost_pings_total) - sum(waypost_pings_received_total)",
            |_| true,
        )
        .await;
    assert_eq!(sum, 0.0);
    let accepted = prometheus
        .query_until("waypost_pings_total{fate=\"accepted\"}", |_| true)
        .await;
    assert_eq!(accepted, 3.0);
    let duplicate = prometheus
        .query_until("waypost_pings_total{fate=\"duplicate\"}", |_| true)
        .await;
    assert_eq!(duplicate, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_coordinate_leaves_through_logs_metrics_pages_or_commands() {
    let mut gateway = Process::start(&[("WAYPOST_LOG_LEVEL", "trace")]).await;
    let device = gateway.device(1);
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    let mut marked = ping(1);
    (marked.latitude_e7, marked.longitude_e7) = (123_456_789, 987_654_321);
    live.send_pings(epoch, &[marked]).await;
    live.ack().await;
    let mut batch =
        waypost_proto::batch::encode(epoch, &[waypost_proto::ping::Ping { seq: 2, ..marked }]);
    batch.latitude[0] = 12_345_678_901;
    live.send(waypost_proto::v1::device_frame::Kind::Batch(batch))
        .await;
    assert_eq!(live.ack().await.rejected, 1);

    let mut said = String::new();
    for path in ["/metrics", "/", "/healthz", "/readyz"] {
        said += &gateway.admin(path).await.1;
    }
    let data = gateway.data_dir().display().to_string();
    let user = device.id.user.to_string();
    for args in [
        &["inspect", "--data", &data][..],
        &["inspect", "--data", &data, "--user", &user],
        &["inspect", "--data", &data, "--user", &user, "--json"],
    ] {
        let output = waypost(args);
        assert!(
            output.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        said += &String::from_utf8_lossy(&output.stdout);
    }
    gateway.terminate();
    gateway.exit_code().await;
    let log = gateway.log();
    assert!(
        log.contains("TRACE") || log.contains("DEBUG"),
        "the log was as talkative as it can be"
    );
    said += &log;
    assert!(said.contains(&user), "the device is in there, by its id");
    for coordinate in ["12.345", "123456789", "98.765", "987654321", "12345678901"] {
        assert!(!said.contains(coordinate), "{coordinate} got out");
    }
}

/// And a watcher lives through a restart of the gateway.
#[tokio::test(flavor = "multi_thread")]
async fn watch_shows_a_ping_as_it_is_stored_also_after_a_restart() {
    let mut gateway = Process::start(&[]).await;
    let device = gateway.device(1);
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    let mut watch = tokio::process::Command::new(binary("waypost"))
        .args(["watch", "--json", "--data"])
        .arg(gateway.data_dir())
        .args([
            "--addr",
            &format!("https://{}", gateway.addresses().freshness),
        ])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut shows = async |last_sample_ms: u64| {
        let user = device.id.user.to_string();
        let shown = async {
            while let Some(line) = lines.next_line().await.unwrap() {
                let event: serde_json::Value = serde_json::from_str(&line).unwrap();
                if event["event"] == "entry"
                    && event["user"] == user
                    && event["last_sample_ms"] == last_sample_ms
                {
                    return;
                }
            }
            panic!("watch ended");
        };
        let shown = tokio::time::timeout(Duration::from_secs(60), shown).await;
        shown.expect("watch shows it");
    };

    live.send_pings(epoch, &[ping(1)]).await;
    live.ack().await;
    shows(ping(1).time_ms).await;

    gateway.kill();
    gateway.restart().await;
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, epoch)).await;
    live.welcome().await;
    live.send_pings(epoch, &[ping(2)]).await;
    live.ack().await;
    shows(ping(2).time_ms).await;
}

#[test]
fn a_misspelt_key_is_refused_with_its_line_and_a_suggestion() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("waypost.toml");
    std::fs::write(
        &file,
        "[devices]\nlisten = \"127.0.0.1:0\"\nidle_timout = \"90s\"\n",
    )
    .unwrap();
    let output = waypost(&["check-config", "--config", &file.display().to_string()]);
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr);
    for part in [
        "waypost.toml:3",
        "devices.idle_timout",
        "devices.idle_timeout",
    ] {
        assert!(said.contains(part), "{part} is missing in: {said}");
    }
}

#[test]
fn a_newcomers_pki_passes_check_config() {
    let dir = tempfile::tempdir().unwrap();
    let pki = dir.path().join("pki").display().to_string();
    for args in [
        &[
            "pki",
            "init",
            "--dir",
            &pki,
            "--trust-domain",
            "example.org",
        ][..],
        &["pki", "server", "--dir", &pki],
        &["pki", "device", "--dir", &pki],
        &["pki", "checker", "--dir", &pki, "night-watch"],
    ] {
        let output = waypost(args);
        assert!(
            output.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let file = dir.path().join("waypost.toml");
    let config = format!(
        "data_dir = \"{0}/data\"\n[tls]\ncertificate = \"{1}/server.pem\"\nprivate_key = \"{1}/server.key\"\n\
         client_ca = \"{1}/ca.pem\"\ntrust_domain = \"example.org\"\n",
        dir.path().display(),
        pki
    );
    std::fs::write(&file, config).unwrap();
    let output = waypost(&["check-config", "--config", &file.display().to_string()]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(String::from_utf8_lossy(&output.stdout).contains("example.org"));
}
