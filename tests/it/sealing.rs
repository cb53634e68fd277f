//! Sealing at rest: what a stranger finds on the disk, and what a gateway needs to read it.

use std::{fs, path::Path, process::Command};

use prost::Message;
use waypost_gateway::{
    seal::master::SealingConfig,
    store::{ReadError, Store},
};
use waypost_proto::{batch, ping::Ping, session::Lane};
use waypost_tests::{
    Process, binary,
    files::{all_bytes, has, telling_parts, written_times},
    hello, telling_pings,
};

const KEY: &str = "9f3c5a1b7e2d4f60819a3b5c7d9e0f1224466880aaccee0f1d2b3c4d5e6f7081";
const OTHER_KEY: &str = "8f3c5a1b7e2d4f60819a3b5c7d9e0f1224466880aaccee0f1d2b3c4d5e6f7081";

/// Sends a course and returns its epoch when it is on disk.
async fn store(gateway: &Process, pings: &[Ping]) -> u32 {
    let device = gateway.device(1);
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, pings).await;
    assert_eq!(live.ack().await.accepted, pings.len() as u64);
    epoch
}

fn opened(data_dir: &Path, key_file: &Path) -> Store {
    let sealing = SealingConfig {
        master_key_file: Some(key_file.to_owned()),
        ..SealingConfig::default()
    };
    Store::open_sealed_read_only(data_dir, &sealing).unwrap()
}

fn pings(store: &Store) -> Result<Vec<Ping>, ReadError> {
    let mut pings = Vec::new();
    for row in store.rows() {
        pings.extend(row?.record.pings);
    }
    Ok(pings)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_key_from_outside_is_needed_at_each_start_and_the_disk_alone_tells_nothing() {
    let mut gateway = Process::prepared(&[
        ("WAYPOST_STORE_SEALING_MASTER_KEY_ENV", "GATEWAY_KEY"),
        ("GATEWAY_KEY", KEY),
    ]);
    gateway.restart().await;
    let course = telling_pings();
    let epoch = store(&gateway, &course).await;
    gateway.kill();

    let data_dir = gateway.data_dir().to_owned();
    let key_file = gateway.scratch("key");
    fs::write(&key_file, KEY).unwrap();
    let store = opened(&data_dir, &key_file);
    let (id, device) = store.devices().next().unwrap().unwrap();
    assert_eq!((id.device, device.epoch), (1, epoch));
    drop(store);
    let disk = all_bytes(&data_dir);
    let mut telling = telling_parts(&batch::encode(epoch, &course).encode_to_vec());
    assert!(10 < telling.len());
    telling.extend(written_times(&device));
    assert!(telling.iter().all(|part| !has(&disk, part)));
    let key = [0x9f, 0x3c, 0x5a, 0x1b, 0x7e, 0x2d, 0x4f, 0x60];
    assert!(!has(&disk, &KEY.as_bytes()[..16]) && !has(&disk, &key));
    assert!(!data_dir.join("master.key").exists());
    let without = Store::open_read_only(&data_dir).unwrap();
    let row = without.rows().next().unwrap();
    assert!(matches!(row, Err(ReadError::Sealed { .. })), "{row:?}");
    let device = without.devices().next().unwrap();
    assert!(
        matches!(device, Err(ReadError::SealedRow { .. })),
        "{device:?}"
    );
    assert_eq!(without.device_ids().next(), Some(Ok(id)));

    gateway.unset("GATEWAY_KEY");
    gateway.try_restart().await.unwrap_err();
    assert!(
        gateway
            .log()
            .contains("GATEWAY_KEY must hold the master key")
    );
    gateway.set("GATEWAY_KEY", OTHER_KEY);
    gateway.try_restart().await.unwrap_err();
    assert!(gateway.log().contains("were wrapped by the master key"));
    gateway.set("GATEWAY_KEY", KEY);
    gateway.restart().await;
    assert!(!gateway.log().contains(KEY));
    gateway.kill();

    assert_eq!(pings(&opened(&data_dir, &key_file)).unwrap(), course);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_moves_to_a_key_of_their_own_and_no_ping_is_touched() {
    let mut gateway = Process::prepared(&[]);
    gateway.restart().await;
    store(&gateway, &telling_pings()).await;
    let (data, key_file) = (gateway.data_dir().to_owned(), gateway.scratch("own.key"));
    let keys = |args: &[&str]| {
        let output = Command::new(binary("waypost"))
            .arg("keys")
            .args(args)
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).unwrap())
    };
    let (data_arg, key_arg) = (data.to_str().unwrap(), key_file.to_str().unwrap());
    let rotate = ["rotate", "--data", data_arg, "--to-file", key_arg];
    assert!(keys(&["init", "--file", key_arg]).0);
    let (done, said) = keys(&rotate);
    assert!(!done && said.contains("stop the gateway first"), "{said}");

    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    let (done, said) = keys(&rotate);
    assert!(done, "{said}");
    let (done, said) = keys(&rotate);
    assert!(
        done && said.starts_with("0 keys are wrapped"),
        "again, nothing is left to do: {said}"
    );
    gateway.try_restart().await.unwrap_err();
    gateway.set("WAYPOST_STORE_SEALING_MASTER_KEY_FILE", key_arg);
    gateway.restart().await;
    gateway.kill();
    let stored = pings(&opened(&data, &key_file)).unwrap();
    assert_eq!(stored, telling_pings());

    // The former key stays where it was, for copies that need it, and no command takes it for the present one.
    assert!(data.join("master.key").exists());
    let waypost = |args: &[&str]| {
        let mut program = Command::new(binary("waypost"));
        program.args(args).args(["--data", data_arg]);
        let output = program
            .env("WAYPOST_STORE_SEALING_MASTER_KEY_FILE", key_arg)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{args:?}: {said}");
    };
    let user = gateway.device(1).id.user.to_string();
    waypost(&["revoke", "--list"]);
    waypost(&["revoke", "--user", &user]);
    waypost(&["erase", "--yes", "--user", &user]);
    let left = opened(&data, &key_file);
    assert_eq!(
        (pings(&left).unwrap(), left.device_ids().count()),
        (vec![], 0)
    );
}
