//! SIGTERM drains: what was read is committed and acknowledged before the connection closes.

use waypost_proto::session::{CloseCode, Lane};
use waypost_tests::{Process, World, hello, ping, stored_seqs};

#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_before_the_signal_is_acknowledged_and_stored() {
    let mut gateway = Process::start(&[]).await;
    let device = gateway.device(1);
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    for seq in 1..=100 {
        live.send_pings(epoch, &[ping(seq)]).await;
    }
    let first = live.ack().await;
    gateway.terminate();
    let mut last = first;
    while let Some(ack) = live.next_ack().await {
        last = ack;
    }
    assert_eq!(link.closed().await, Some(CloseCode::ShuttingDown));
    assert_eq!(gateway.exit_code().await, Some(0));

    let store = World::open_store(gateway.data_dir());
    let acknowledged: Vec<_> = (1..=last.durable_upto).map(|seq| (epoch, seq)).collect();
    assert_eq!(
        stored_seqs(&store, &device),
        acknowledged,
        "all that was stored was acknowledged before the close"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_and_exit_codes_say_what_happened() {
    let mut gateway = Process::start(&[]).await;
    assert_eq!(gateway.admin("/readyz").await.0, 200);
    let second = std::process::Command::new(waypost_tests::binary("waypost"))
        .args(["serve", "--dev", "--data"])
        .arg(gateway.data_dir())
        .env("WAYPOST_ADMIN_LISTEN", "127.0.0.1:0")
        .env("WAYPOST_DEVICES_LISTEN", "127.0.0.1:0")
        .env("WAYPOST_FRESHNESS_LISTEN", "127.0.0.1:0")
        .env("WAYPOST_ENROLMENT_LISTEN", "127.0.0.1:0")
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1), "a store has one gateway");
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains("another"), "it says why: {said}");
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
}
