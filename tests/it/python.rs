//! Another language: a device and a checker in Python, written from the `.proto` files alone.
//!
//! What they prove is in `tests/python/test_client.py`; here is the gateway it runs against, and the
//! look into the store that no client has. `test_enrolment.py` is a device that has no certificate yet. And a
//! checker to start from, `checker_example.py`.

use std::{
    env,
    path::{Path, PathBuf},
    process::Stdio,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStdout, Command},
};
use waypost_proto::{ping::Ping, session::Lane, v1};
use waypost_tests::{Process, World, hello, ping, within_minutes};

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

/// A device that knows an invitation and the schema gets a certificate, pings with it, and renews it.
#[tokio::test(flavor = "multi_thread")]
async fn a_python_device_enrols_with_nothing_but_an_invitation() {
    let address = "127.0.0.1"; // which of its addresses localhost is, not all systems agree on
    let world = World::start_enrolling(|config| config.public_host = address.to_owned()).await;
    let invited = world.invite(v1::InviteRequest::default()).await.unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/test_enrolment.py");
    let output = Command::new(python())
        .arg("-B") // no __pycache__ in the checkout
        .arg(script)
        .arg(&invited.uri)
        .output()
        .await
        .unwrap();
    let proved = String::from_utf8_lossy(&output.stdout);
    let failed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{proved}{failed}");
    assert_eq!(proved.lines().count(), 5, "{proved}");
}

/// The example as a process, and what it says.
struct Example {
    _process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Example {
    fn start(gateway: &Process) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/checker_example.py");
        let mut process = Command::new(python())
            .arg("-B")
            .arg(script)
            .args(["--freshness", &gateway.addresses().freshness.to_string()])
            .arg("--pki")
            .arg(gateway.data_dir().join("pki"))
            .arg("--state")
            .arg(gateway.scratch("checker.json"))
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Self {
            _process: process,
            lines,
        }
    }

    /// All it says up to the first line that begins and ends so.
    async fn says(&mut self, begin: &str, end: &str) -> Vec<String> {
        let mut said: Vec<String> = Vec::new();
        let reading = async {
            while !said
                .last()
                .is_some_and(|line| line.starts_with(begin) && line.ends_with(end))
            {
                let line = self.lines.next_line().await.unwrap();
                said.push(line.unwrap_or_else(|| panic!("it ended after {said:?}")));
            }
        };
        within_minutes(reading).await;
        said
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_checker_goes_on_where_it_was_after_either_end_was_restarted() {
    let mut gateway = Process::start(&[]).await;
    let device = gateway.device(1);
    let entry = format!("entry {} ACTIVE", device.id.user);
    let sample = |number| format!(" {}", ping(number).time_ms);
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    live.ack().await;

    let mut checker = Example::start(&gateway);
    checker.says("connected 0", "").await;
    checker.says(&entry, &sample(1)).await;
    checker.says("snapshot_end 1", "").await;
    live.send_pings(epoch, &[ping(2)]).await;
    live.ack().await;
    checker.says(&entry, &sample(2)).await;

    gateway.kill();
    checker.says("lost ", "").await;
    checker.says("stale ", "").await;
    gateway.restart().await;
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, epoch)).await;
    live.welcome().await;
    live.send_pings(epoch, &[ping(3)]).await;
    live.ack().await;
    let mut said = checker.says(&entry, &sample(3)).await;
    drop(checker);

    live.send_pings(epoch, &[ping(4)]).await;
    live.ack().await;
    let mut later = Example::start(&gateway);
    said.extend(later.says(&entry, &sample(4)).await);
    let is_anew = |line: &&String| *line == "connected 0" || line.starts_with("snapshot_end");
    assert_eq!(said.iter().find(is_anew), None, "{said:?}");

    let pause = v1::control::Action::Pause(v1::control::Pause {});
    live.control(1, pause).await;
    let paused = format!("transition {} PAUSED", device.id.user);
    let said = later.says(&paused, "").await;
    let entry = format!("entry {} PAUSED", device.id.user);
    assert!(said.iter().any(|line| line.starts_with(&entry)), "{said:?}");
}
