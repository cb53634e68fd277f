//! Who is let in: the certificate decides, and each refusal has its own reason.

use waypost_gateway::pki::{Purpose, Validity};
use waypost_proto::{id::Identity, session::Lane};
use waypost_tests::{Attempt, Process, World, hello, ping, stored_seqs};

/// Refused, with a reason in the metrics and the same in the log.
async fn refused(reason: &str, attempt: impl AsyncFnOnce(&World) -> Attempt) {
    let world = World::start().await;
    let attempt = attempt(&world).await;
    assert!(!attempt.is_served().await, "{reason}: must not be served");
    world
        .metrics_until(|metrics| {
            metrics.value(&format!(
                "waypost_connections_refused_total{{reason=\"{reason}\"}}"
            )) == 1.0
        })
        .await;
    assert_eq!(
        world
            .metrics()
            .await
            .value("waypost_connections_accepted_total"),
        0.0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn no_certificate() {
    refused("no_certificate", async |world| world.attempt(None).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_another_authority() {
    refused("unknown_issuer", async |world| {
        let other = World::authority_in(&world.scratch("other"));
        let credentials = other.issue_device(world.device(1).id).unwrap();
        world.attempt(Some(&credentials)).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate() {
    refused("expired", async |world| {
        let names = world
            .authority
            .names_of(&Identity::Device(world.device(1).id))
            .unwrap();
        let validity = Validity {
            not_before_s: 1_000_000_000,
            not_after_s: 1_100_000_000,
        };
        let key = rcgen::KeyPair::generate().unwrap();
        let credentials = world
            .authority
            .issue(names, Purpose::Client, validity, &key)
            .unwrap();
        world.attempt(Some(&credentials)).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_without_a_uri() {
    refused("no_identity", async |world| {
        let names = waypost_gateway::pki::host_names(&["device.example.org"]).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let credentials = world
            .authority
            .issue(names, Purpose::Client, Validity::days(1), &key)
            .unwrap();
        world.attempt(Some(&credentials)).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkers_certificate() {
    refused("not_a_device", async |world| {
        let credentials = world.authority.issue_checker("dev").unwrap();
        world.attempt(Some(&credentials)).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_says_why_too() {
    let mut gateway = Process::start(&[]).await;
    let device = gateway.device(1);
    let authority = gateway.authority();
    let key = rcgen::KeyPair::generate().unwrap();
    let past = Validity {
        not_before_s: 1_000_000_000,
        not_after_s: 1_100_000_000,
    };
    let device_names = authority.names_of(&Identity::Device(device.id)).unwrap();
    let expired = authority.issue(device_names, Purpose::Client, past, &key);
    let host_names = waypost_gateway::pki::host_names(&["device.example.org"]).unwrap();
    let nameless = authority.issue(host_names, Purpose::Client, Validity::days(1), &key);
    let other = World::authority_in(&gateway.data_dir().join("other"));
    let foreign = other.issue_device(device.id).unwrap();
    for (reason, credentials) in [
        ("no_certificate", None),
        ("unknown_issuer", Some(foreign)),
        ("expired", Some(expired.unwrap())),
        ("no_identity", Some(nameless.unwrap())),
    ] {
        let attempt = gateway.attempt(credentials.as_ref()).await;
        assert!(!attempt.is_served().await, "{reason}");
    }
    gateway.terminate();
    gateway.exit_code().await;
    let log = gateway.log();
    for reason in ["no_certificate", "unknown_issuer", "expired", "no_identity"] {
        assert!(log.contains(reason), "{reason} is not in the log:\n{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_device_sends_is_stored_under_its_certificates_name_only() {
    let world = World::start().await;
    let (ours, theirs) = (world.device(1), world.device(2));
    let link = world.connect(&ours).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    live.ack().await;
    let store = world.stop().await;
    assert_eq!(stored_seqs(&store, &ours), [(epoch, 1)]);
    assert_eq!(stored_seqs(&store, &theirs), []);
    assert_eq!(store.rows().count(), 1);
}
