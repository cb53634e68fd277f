//! Enrolment: a code becomes a certificate once, the certificate renews itself, and nobody gets further without one.

use std::{fs, net::IpAddr, time::Duration};

use bytes::Bytes;
use quinn::ConnectionError;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rcgen::{KeyPair, PKCS_ECDSA_P384_SHA384};
use rustls::pki_types::CertificateDer;
use tonic::Code;
use waypost_gateway::clock::system_now_ms;
use waypost_proto::{
    enrol::{ENROLL_ALPN, ENROLL_FRAME_BYTES},
    id::UserId,
    session::{CloseCode, Lane},
    v1::{
        EnrollResponse, InviteRequest, control, control_result, enroll_response::Outcome,
        enrolment_refusal,
    },
};
use waypost_tests::{
    Process, World, binary, hello,
    newcomer::{Newcomer, ask, connect, converse, issued, refusal, request},
    ping, soak, until,
};

const LOOPBACK: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

fn bytes_of(user: UserId) -> Bytes {
    Bytes::copy_from_slice(&user.0)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invited_device_pings_with_its_certificate_and_with_the_one_that_it_renews_itself() {
    let world = World::start_enrolling(|_| {}).await;
    let invited = world.invite(InviteRequest::default()).await.unwrap();
    let newcomer = Newcomer::new();
    let response = world.redeem(&newcomer, &invited.code).await;
    let first = newcomer.with(issued(response));
    assert_eq!(first.id.user.0[..], invited.user[..], "as it was invited");
    assert_eq!((first.id.device, invited.device), (1, 1));
    assert_eq!(first.id.user.0[6] >> 4, 4, "a random UUID");
    let issued_at_ms = first.issued.server_ms;
    let life_ms = first.issued.expires_ms - issued_at_ms;
    assert_eq!(life_ms.div_ceil(1_000), 7 * 24 * 3_600);
    let due_ms = first.issued.renew_at_ms - issued_at_ms;
    assert_eq!(due_ms, life_ms - life_ms / 3);
    let gateway = format!("localhost:{}", world.addresses().devices.port());
    assert_eq!(first.issued.gateway, gateway);

    let mut live = world
        .connect_enrolled(&first)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    assert_eq!(live.ack().await.durable_upto, 1);
    world
        .metrics_until(|page| page.value("waypost_audit_entries_total") == 3.0)
        .await;
    let audit = fs::read_to_string(world.config().data_dir.join("audit.log")).unwrap();
    let enrolled = format!(r#""who":{{"holder":"{}"}},"what":"enrolled""#, first.id);
    assert!(
        audit.contains(r#""who":"operator","what":"invited""#),
        "{audit}"
    );
    assert!(audit.contains(&enrolled), "{audit}");

    // With a new key, and while the holder has paused.
    let outcome = live
        .control(1, control::Action::Pause(control::Pause {}))
        .await;
    assert_eq!(outcome, control_result::Outcome::Done);
    let next = Newcomer::new();
    let (response, ack) = live.renew(next.request()).await;
    assert!(ack.paused, "the ack of a heartbeat");
    let second = next.with(issued(response));
    assert_eq!(second.id, first.id);
    let (response, _) = live.renew(next.request()).await;
    let too_soon = refusal(&response);
    assert_eq!(too_soon, enrolment_refusal::Code::TryLater);
    live.control(2, control::Action::Resume(control::Resume {}))
        .await;
    live.send_pings(epoch, &[ping(2)]).await;
    assert_eq!(live.ack().await.accepted, 2, "the connection goes on");

    let mut live = world
        .connect_enrolled(&second)
        .await
        .open(hello(Lane::Live, epoch))
        .await;
    assert_eq!(live.welcome().await.durable_upto, 2);
    live.send_pings(epoch, &[ping(3)]).await;
    assert_eq!(live.ack().await.durable_upto, 3);
    let page = world.metrics().await;
    for (outcome, times) in [("issued", 1.0), ("renewed", 1.0), ("try_later", 1.0)] {
        let series = format!("waypost_enrolments_total{{outcome=\"{outcome}\"}}");
        assert_eq!(page.value(&series), times, "{outcome}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_keys_that_redeem_one_code_at_once_one_wins_and_may_ask_again() {
    let world = World::start_enrolling(|_| {}).await;
    let code = world.code().await;
    let (door, ca_pem) = (world.door(), world.authority.certificate_pem().to_owned());
    let racing: Vec<_> = (0..12)
        .map(|_| {
            let (code, ca_pem) = (code.clone(), ca_pem.clone());
            tokio::spawn(async move {
                let newcomer = Newcomer::new();
                let response = newcomer.redeem(door, &ca_pem, &code).await;
                (newcomer, response)
            })
        })
        .collect();
    let mut winners = Vec::new();
    for one in racing {
        let (newcomer, response) = one.await.unwrap();
        if let Some(Outcome::Issued(issued)) = response.outcome {
            winners.push(newcomer.with(issued).id);
            let again = issued_again(&world, &newcomer, &code).await;
            assert_eq!(winners, [again], "the same device again");
        } else {
            assert_eq!(refusal(&response), enrolment_refusal::Code::NotValid);
            let again = world.redeem(&newcomer, &code).await;
            assert_eq!(again, response);
        }
    }
    assert_eq!(winners.len(), 1);
}

async fn issued_again(
    world: &World,
    newcomer: &Newcomer,
    code: &str,
) -> waypost_proto::id::DeviceId {
    let response = world.redeem(newcomer, code).await;
    newcomer.with(issued(response)).id
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_an_expired_and_a_used_code_are_answered_with_the_same_bytes() {
    let world = World::start_enrolling(|_| {}).await;
    let short = InviteRequest {
        valid_for_ms: 1,
        ..InviteRequest::default()
    };
    let expired = world.invite(short).await.unwrap();
    until(async || (expired.expires_ms < system_now_ms()).then_some(())).await;
    let used = world.code().await;
    issued(world.redeem(&Newcomer::new(), &used).await);

    let newcomer = Newcomer::new();
    let codes = [
        "0000-0000-0000-0000",
        "no code at all",
        "",
        &expired.code,
        &used,
    ];
    let mut answers = Vec::new();
    for code in codes {
        answers.push(world.redeem(&newcomer, code).await);
    }
    assert_eq!(refusal(&answers[0]), enrolment_refusal::Code::NotValid);
    assert!(
        answers.iter().all(|answer| *answer == answers[0]),
        "{answers:?}"
    );
    // The negative control: the same newcomer with a good code, typed as people type.
    let typed = world.code().await.to_lowercase().replace('-', " ");
    issued(world.redeem(&newcomer, &typed).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_proves_no_good_key_gets_no_certificate_and_uses_no_code_up() {
    let world = World::start_enrolling(|_| {}).await;
    let code = world.code().await;
    let ca_pem = world.authority.certificate_pem();
    let newcomer = Newcomer::new();
    let good = newcomer.request();
    let mut forged = good.to_vec();
    // The last byte of the signature.
    *forged.last_mut().unwrap() ^= 1;
    let large = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    for (what, bad) in [
        ("nothing", Bytes::new()),
        ("half a request", good.slice(..good.len() / 2)),
        ("a signature of no key", forged.into()),
        ("a key of another curve", request(&large)),
    ] {
        let response = ask(LOOPBACK, world.door(), ca_pem, &code, bad)
            .await
            .unwrap();
        let refused = refusal(&response);
        assert_eq!(refused, enrolment_refusal::Code::BadRequest, "{what}");
    }
    issued(world.redeem(&newcomer, &code).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn guesses_from_one_address_have_an_end_and_others_go_on() {
    let world = World::start_enrolling(|enrolment| {
        enrolment.tries_per_minute = 1;
        enrolment.tries_burst = 5;
    })
    .await;
    let (door, ca_pem) = (world.door(), world.authority.certificate_pem());
    let code = world.code().await;
    let guess = async |source: IpAddr, code: &str| {
        ask(source, door, ca_pem, code, Newcomer::new().request()).await
    };
    for _ in 0..5 {
        let response = guess(LOOPBACK, "0000-0000-0000-0000").await.unwrap();
        assert_eq!(refusal(&response), enrolment_refusal::Code::NotValid);
    }
    // Also with a good code, or it would tell a good one from a bad one.
    let refused = guess(LOOPBACK, &code).await;
    assert!(
        matches!(&refused, Err(ConnectionError::ConnectionClosed(close))
            if close.error_code == quinn::TransportErrorCode::CONNECTION_REFUSED),
        "{refused:?}"
    );
    issued(guess([127, 0, 0, 2].into(), &code).await.unwrap());
    world
        .metrics_until(|page| {
            page.value("waypost_enrolments_total{outcome=\"refused_unheard\"}") == 1.0
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_neither_connects_nor_renews() {
    let world = World::start_enrolling(|enrolment| {
        enrolment.certificate_lifetime = Duration::from_secs(3);
    })
    .await;
    let (_, device) = world.enrolled().await;
    let mut live = world
        .connect_enrolled(&device)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    live.welcome().await;
    assert_eq!(live.link().closed().await, Some(CloseCode::Expired));
    // A certificate holds up to and with its last second.
    assert!(device.issued.expires_ms + 1_000 <= system_now_ms());
    assert!(!world.attempt_enrolled(&device).await.is_served().await);
    let refused = "waypost_connections_refused_total{reason=\"expired\"}";
    world.metrics_until(|page| page.value(refused) == 1.0).await;
}

/// A gateway whose authority for devices has files of its own.
async fn start_with_own_authority() -> World {
    World::start_enrolling(|enrolment| {
        for path in [&mut enrolment.ca_certificate, &mut enrolment.ca_key] {
            let path = path.as_mut().unwrap();
            let extension = path.extension().unwrap().to_owned();
            let own = path.with_file_name("devices").with_extension(extension);
            fs::copy(&path, &own).unwrap();
            *path = own;
        }
    })
    .await
}

async fn reloaded(world: &World, outcome: &str, times: u8) {
    let series = format!("waypost_tls_reloads_total{{outcome=\"{outcome}\"}}");
    let times = f64::from(times);
    world
        .metrics_until(|page| page.value(&series) == times)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn newcomers_are_met_and_signed_by_what_is_in_the_files_now() {
    let world = start_with_own_authority().await;
    let pki = world.scratch("pki");
    let ca_pem = world.authority.certificate_pem().to_owned();
    let (_, before) = world.enrolled().await;
    let old_link = world.connect_enrolled(&before).await;
    let mut old = old_link.open(hello(Lane::Live, 0)).await;
    old.welcome().await;
    let shown = async || {
        let connection = connect(LOOPBACK, world.door(), &ca_pem, ENROLL_ALPN).await;
        let chain = connection.unwrap().peer_identity().unwrap();
        chain.downcast::<Vec<CertificateDer<'static>>>().unwrap()[0].to_vec()
    };

    // The gateway's own certificate.
    let renewed = world.authority.issue_server(&["localhost"]).unwrap();
    assert_ne!(shown().await, *renewed.certificate_der(), "the control");
    fs::write(pki.join("server.pem"), &renewed.certificate_pem).unwrap();
    fs::write(pki.join("server.key"), &renewed.private_key_pem).unwrap();
    reloaded(&world, "used", 1).await;
    assert_eq!(shown().await, *renewed.certificate_der());

    // An authority whose devices would be refused signs nothing, and the one before goes on.
    let other = World::authority_in(&world.scratch("other"));
    let replace = || {
        for extension in ["pem", "key"] {
            let from = world.scratch("other").join("ca").with_extension(extension);
            fs::copy(from, pki.join("devices").with_extension(extension)).unwrap();
        }
    };
    replace();
    reloaded(&world, "failed", 1).await;
    reloaded(&world, "used", 2).await;
    let (_, goes_on) = world.enrolled().await;
    assert!(world.attempt_enrolled(&goes_on).await.is_served().await);
    let invited = world.invite(InviteRequest::default()).await.unwrap();
    assert!(invited.uri.contains("&ca="), "{}", invited.uri);

    // Once they are let in it does, for newcomers and for who renews; newcomers cannot know the gateway by it.
    fs::write(pki.join("ca.pem"), ca_pem.clone() + other.certificate_pem()).unwrap();
    reloaded(&world, "used", 3).await;
    let invited = world.invite(InviteRequest::default()).await.unwrap();
    assert!(!invited.uri.contains("ca="), "{}", invited.uri);
    let (_, after) = world.enrolled().await;
    let next = Newcomer::new();
    let renewed = next.with(issued(old.renew(next.request()).await.0));
    assert_eq!(renewed.id, before.id);
    fs::write(pki.join("ca.pem"), other.certificate_pem()).unwrap();
    reloaded(&world, "used", 4).await;
    for (device, is_served) in [(&after, true), (&renewed, true), (&goes_on, false)] {
        let attempt = world.attempt_enrolled(device).await;
        assert_eq!(attempt.is_served().await, is_served, "{}", device.id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_listed_operators_invite_and_only_users_that_are_known() {
    let world = World::start_enrolling(|enrolment| enrolment.max_invitations = 4).await;
    let authority = &world.authority;
    for stranger in [
        authority.issue_operator("other").unwrap(),
        authority.issue_checker("dev").unwrap(),
        (*world.device(1).credentials).clone(),
    ] {
        let refused = world.invite_with(&stranger, InviteRequest::default()).await;
        assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
    }
    let invite = async |user: Bytes, valid_for_ms: u64| {
        let checkers = Vec::new();
        world
            .invite(InviteRequest {
                user,
                valid_for_ms,
                checkers,
            })
            .await
    };
    for (user, valid_for_ms, code) in [
        (bytes_of(UserId([9; 16])), 0, Code::NotFound),
        (Bytes::from_static(b"a name"), 0, Code::InvalidArgument),
        (Bytes::new(), u64::MAX, Code::InvalidArgument),
    ] {
        let refused = invite(user, valid_for_ms).await;
        assert_eq!(refused.unwrap_err().code(), code);
    }
    let first = invite(Bytes::new(), 0).await.unwrap();
    let other = invite(Bytes::new(), 0).await.unwrap();
    assert_ne!(first.user, other.user);
    let second = invite(first.user.clone(), 0).await.unwrap();
    assert_eq!((&second.user, second.device), (&first.user, 2));
    // One whom another authority has named is known when it has been here, and its numbers count.
    let elsewhere = world.device(5).sibling(&world, 41);
    let mut live = world
        .connect(&elsewhere)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    live.welcome().await;
    let further = invite(bytes_of(elsewhere.id.user), 0).await.unwrap();
    assert_eq!(further.device, 42);
    let refused = invite(Bytes::new(), 0).await;
    assert_eq!(refused.unwrap_err().code(), Code::ResourceExhausted);
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_are_not_given_twice_nor_codes_forgotten_by_a_restart() {
    let mut world = World::start_enrolling(|_| {}).await;
    let first = world.invite(InviteRequest::default()).await.unwrap();
    let newcomer = Newcomer::new();
    issued(world.redeem(&newcomer, &first.code).await);
    world.restart().await;
    let again = InviteRequest {
        user: first.user.clone(),
        ..InviteRequest::default()
    };
    assert_eq!(world.invite(again).await.unwrap().device, 2);
    let other = world.redeem(&Newcomer::new(), &first.code).await;
    assert_eq!(refusal(&other), enrolment_refusal::Code::NotValid);
    let same = issued(world.redeem(&newcomer, &first.code).await);
    assert_eq!((same.user, same.device), (first.user, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_certificate_nobody_gets_past_the_door() {
    let world = World::start_enrolling(|_| {}).await;
    let ca_pem = world.authority.certificate_pem();
    let devices = world.addresses().devices;
    for (port, alpn) in [
        (world.door(), waypost_proto::ALPN),
        (devices, ENROLL_ALPN),
        (devices, waypost_proto::ALPN),
    ] {
        // With TLS 1.3 a client may believe that it is connected until it reads.
        let refused = match connect(LOOPBACK, port, ca_pem, alpn).await {
            Ok(connection) => connection.closed().await,
            Err(error) => error,
        };
        let refused = refused.to_string();
        assert!(refused.contains("cryptographic handshake"), "{refused}");
    }
    // A device's frames mean nothing there.
    let connection = connect(LOOPBACK, world.door(), ca_pem, ENROLL_ALPN)
        .await
        .unwrap();
    let long = [&[0x81, 0x40][..], &[0; ENROLL_FRAME_BYTES + 1]].concat();
    let refused = converse(&connection, &long).await;
    let Err(ConnectionError::ApplicationClosed(close)) = refused else {
        panic!("{refused:?}")
    };
    let code = CloseCode::from_number(close.error_code.into_inner());
    assert_eq!(code, Some(CloseCode::FrameTooLarge));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_knows_no_authority_can_know_the_gateway_by_the_invitation() {
    let world = World::start_enrolling(|_| {}).await;
    let invited = world.invite(InviteRequest::default()).await.unwrap();
    let hash = invited
        .uri
        .split(['?', '&'])
        .find_map(|part| part.strip_prefix("ca="));
    let server = format!("server=localhost:{}&", world.door().port());
    assert!(
        invited.uri.starts_with("waypost://enroll?"),
        "{}",
        invited.uri
    );
    assert!(invited.uri.contains(&server), "{}", invited.uri);
    assert!(invited.uri.ends_with(&format!("code={}", invited.code)));

    let ca_pem = world.authority.certificate_pem();
    let connection = connect(LOOPBACK, world.door(), ca_pem, ENROLL_ALPN)
        .await
        .unwrap();
    let shown = connection.peer_identity().unwrap();
    let shown = shown.downcast::<Vec<CertificateDer<'static>>>().unwrap();
    let last = shown.last().unwrap();
    assert_eq!(hash, Some(&*sha256_hex(last)));
    let (_, enrolled) = world.enrolled().await;
    assert_eq!(enrolled.issued.authorities, [last.to_vec()]);
}

fn sha256_hex(bytes: &[u8]) -> String {
    use waypost_gateway::enrol::invitations::KeyHash;
    let hash = KeyHash::of(bytes).0;
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_without_an_authority_issues_nothing() {
    let world = World::start().await;
    assert_eq!(world.addresses().enrolment, None);
    let refused = world.invite(InviteRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
    let mut live = world
        .connect(&world.device(1))
        .await
        .open(hello(Lane::Live, 0))
        .await;
    live.welcome().await;
    let (response, _) = live.renew(Newcomer::new().request()).await;
    assert_eq!(refusal(&response), enrolment_refusal::Code::NotOffered);
}

/// SIGKILL somewhere between the request and the answer. Whatever was answered holds, and of two keys one has the code.
#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_request_and_answer_lets_a_code_work_for_one_key() {
    let mut gateway = Process::start(&[("WAYPOST_ENROLMENT_TRIES_BURST", "1000")]).await;
    let authority = gateway.authority();
    let ca_pem = authority.certificate_pem();
    let seed = soak::fixed_seed(11);
    let mut dice = StdRng::seed_from_u64(seed);
    for _ in 0..ROUNDS {
        let code = invite(&gateway).code;
        let first = Newcomer::new();
        let door = gateway.addresses().enrolment;
        let asking = tokio::spawn({
            let (code, ca_pem) = (code.clone(), ca_pem.to_owned());
            let request = first.request();
            async move { ask(LOOPBACK, door, &ca_pem, &code, request).await }
        });
        tokio::time::sleep(Duration::from_micros(dice.random_range(0..20_000))).await;
        gateway.kill();
        // Nobody is left to answer; what had been answered has arrived.
        let answer = if asking.is_finished() {
            asking.await.unwrap().ok()
        } else {
            asking.abort();
            None
        };
        gateway.restart().await;
        let door = gateway.addresses().enrolment;
        let second = Newcomer::new();
        let second_gets = second.redeem(door, ca_pem, &code).await;
        let first_gets = first.redeem(door, ca_pem, &code).await;
        let kept: Vec<&EnrollResponse> = [&first_gets, &second_gets]
            .into_iter()
            .filter(|response| matches!(response.outcome, Some(Outcome::Issued(_))))
            .collect();
        assert_eq!(kept.len(), 1, "one key has the code");
        if let Some(answer) = answer {
            let (told, now) = (issued(answer), issued(first_gets));
            assert_eq!((told.user, told.device), (now.user, now.device));
        }
    }
}

const ROUNDS: usize = 8;

#[derive(serde::Deserialize)]
struct Invited {
    code: String,
    uri: String,
    user: String,
    device: u32,
}

/// As an operator does it.
fn invite(gateway: &Process) -> Invited {
    serde_json::from_str(&waypost_invite(gateway, &["--json"])).unwrap()
}

fn waypost_invite(gateway: &Process, options: &[&str]) -> String {
    let address = format!("https://{}", gateway.addresses().freshness);
    let output = std::process::Command::new(binary("waypost"))
        .args(["invite", "--addr", &address, "--data"])
        .arg(gateway.data_dir())
        .args(options)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn waypost_invite_prints_a_code_that_works_and_a_picture_of_it() {
    let gateway = Process::start(&[]).await;
    let authority = gateway.authority();
    let ca_pem = authority.certificate_pem();
    let invited = invite(&gateway);
    let newcomer = Newcomer::new();
    let door = gateway.addresses().enrolment;
    let enrolled = newcomer.with(issued(newcomer.redeem(door, ca_pem, &invited.code).await));
    assert_eq!(enrolled.id.user.to_string(), invited.user);
    assert_eq!(invited.device, 1);
    assert!(invited.uri.ends_with(&invited.code));
    let link = enrolled.connect(gateway.addresses().devices, ca_pem).await;
    link.open(hello(Lane::Live, 0)).await.welcome().await;

    let further = [
        "--user",
        &invited.user,
        "--expires",
        "10m",
        "--checker",
        "dev",
    ];
    let text = waypost_invite(&gateway, &further);
    assert!(
        text.contains('\u{2580}') && text.contains("waypost://enroll?"),
        "{text}"
    );
    assert!(
        text.contains(&format!("{}, device 2\nCheckers   dev\n", invited.user)),
        "{text}"
    );
    assert!(text.contains("&checkers=dev&code="), "{text}");
}
