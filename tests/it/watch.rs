//! "Nobody heard from U since T", through crashes: a checker follows with its token from one gateway process
//! to the next, and everything that was said of silence is held against what devices were acknowledged.

use std::{
    num::NonZeroUsize,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::{task::JoinHandle, time::MissedTickBehavior};
use waypost_checker::{Config, connect};
use waypost_loadtest::{
    device::{Device, DeviceConfig, Observer},
    link::{LinkError, Links},
};
use waypost_proto::{
    id::UserId,
    outbox::Event,
    v1::{WatchRequest, watch_event::Kind},
};
use waypost_tests::{
    Process, ping,
    silence::{Claims, Contact, Said},
    soak, until, within_minutes,
};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_of_silence_stays_right_through_crashes() {
    through_crashes(11, &mut |round| round < 8).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: make soak runs it"]
async fn soak_watch() {
    let (seed, length) = (soak::seed(), soak::length());
    let begun = Instant::now();
    let claims = through_crashes(seed, &mut |_| begun.elapsed() < length).await;
    soak::summary(format_args!(
        "checkers are never told a wrong silence: {claims}; seed {seed}"
    ));
}

/// Rounds of pings that end with SIGKILL, as long as `goes_on`; then everything said is judged.
async fn through_crashes(seed: u64, goes_on: &mut dyn FnMut(u32) -> bool) -> Claims {
    let mut dice = StdRng::seed_from_u64(seed);
    // As often as it may be set, so that as many claims as possible are made.
    let often = [("WAYPOST_FRESHNESS_PROGRESS_INTERVAL", "10ms")];
    let mut gateway = Process::start(&often).await;
    let contacts = Arc::new(Mutex::new(Vec::new()));
    let devices = fleet(&gateway, &contacts);
    let said = Arc::new(Mutex::new(Vec::new()));
    let checker = follow(&gateway, &said);
    let mut ticks = tokio::time::interval(Duration::from_millis(3));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut seq, mut round) = (0, 0);
    loop {
        let wanted = contacts.lock().len() + dice.random_range(1..60);
        let working = async {
            while contacts.lock().len() < wanted {
                ticks.tick().await;
                // Not all of them, so that there are silences.
                for device in devices.iter().filter(|_| dice.random_bool(0.4)) {
                    seq += 1;
                    device.push(ping(seq));
                }
            }
        };
        within_minutes(working).await;
        round += 1;
        if !goes_on(round) {
            break;
        }
        gateway.kill();
        said.lock().push(Said::Crash);
        gateway.restart().await;
    }
    for device in devices {
        within_minutes(device.stop_when_settled()).await;
    }
    let contacts = contacts.lock().clone();
    let last_ms = contacts.iter().map(|contact| contact.receive_ms).max();
    until(async || {
        said.lock()
            .iter()
            .any(|said| matches!(said, Said::Resolved { upto_ms, .. } if last_ms <= Some(*upto_ms)))
            .then_some(())
    })
    .await;
    checker.abort();
    let claims = Claims::judge(&said.lock(), &contacts);
    claims.unwrap_or_else(|wrong| panic!("{wrong}; seed {seed}"))
}

/// Four users with a device each that come back whenever the gateway does.
fn fleet(gateway: &Process, contacts: &Arc<Mutex<Vec<Contact>>>) -> Vec<Device> {
    let authority = gateway.authority();
    let root = CertificateDer::from_pem_slice(authority.certificate_pem().as_bytes()).unwrap();
    let one = NonZeroUsize::MIN;
    let links = Links::open(gateway.addresses().devices, "localhost", root, one).unwrap();
    let links = Arc::new(links);
    (1..=4)
        .map(|number| {
            let device = gateway.device(number);
            let chain = vec![device.credentials.certificate_der()];
            let key = device.credentials.private_key_der();
            let config = DeviceConfig {
                credentials: links.credentials(chain, key).unwrap(),
                capacity: NonZeroUsize::new(100_000).unwrap(),
                seed: u64::from(number),
            };
            let heard = Heard {
                user: device.id.user,
                contacts: Arc::clone(contacts),
            };
            let device = Device::spawn(Arc::clone(&links), config, heard);
            device.go_online();
            device
        })
        .collect()
}

/// Notes what a device was told of its contacts.
struct Heard {
    user: UserId,
    contacts: Arc<Mutex<Vec<Contact>>>,
}

impl Observer for Heard {
    fn connected(&mut self) {}

    fn observed(&mut self, event: &Event, _: tokio::time::Instant) {
        let (Event::Welcomed {
            server_ms: receive_ms,
            ..
        }
        | Event::Acknowledged { receive_ms, .. }) = *event
        else {
            return;
        };
        self.contacts.lock().push(Contact {
            user: self.user,
            receive_ms,
        });
    }

    fn disconnected(&mut self, _: Option<&LinkError>) {}
}

/// A checker that watches everybody and comes back with its token.
fn follow(gateway: &Process, said: &Arc<Mutex<Vec<Said>>>) -> JoinHandle<()> {
    let authority = gateway.authority();
    let credentials = authority.issue_checker("dev").unwrap();
    let address = format!("https://{}", gateway.addresses().freshness);
    let ca_pem = authority.certificate_pem().to_owned();
    let said = Arc::clone(said);
    tokio::spawn(async move {
        let mut token = bytes::Bytes::new();
        loop {
            let config = Config::new(
                &address,
                &ca_pem,
                &credentials.certificate_pem,
                &credentials.private_key_pem,
                "localhost",
            );
            let Ok(mut client) = connect(&config).await else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            let request = WatchRequest {
                token: token.clone(),
                ..WatchRequest::default()
            };
            let Ok(stream) = client.watch(request).await else {
                continue;
            };
            let mut stream = stream.into_inner();
            while let Ok(Some(message)) = stream.message().await {
                for event in message.events {
                    match event.kind.unwrap() {
                        Kind::Entry(entry) => said.lock().push(Said::Heard {
                            user: UserId(entry.user.as_ref().try_into().unwrap()),
                            last_contact_ms: entry.last_contact_ms,
                            position: entry.position,
                        }),
                        Kind::SnapshotEnd(end) => token = end.token,
                        Kind::Progress(progress) => {
                            token = progress.token;
                            said.lock().push(Said::Resolved {
                                upto_ms: progress.resolved_ms,
                                position: progress.position,
                            });
                        }
                        Kind::Reset(reset) => {
                            panic!("a token of this store was not taken: {reset:?}")
                        }
                        _ => {}
                    }
                }
            }
        }
    })
}
