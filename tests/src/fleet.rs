//! A few [`Survivor`]s with one ledger, and what is asked of the gateway on their behalf after a crash.
//!
//! Knows how a life of the gateway goes on from the one before. Must not know when it is killed, or what
//! is done to its disk.

use std::{path::PathBuf, time::Duration};

use parking_lot::Mutex;
use rand::{RngExt, rngs::StdRng};
use waypost_checker::{Config, connect};
use waypost_proto::v1;

use crate::{
    Process, Survivor,
    audit::{self, Fault, Snapshot},
    ledger::{self, Acked, Ledger},
    process::{until, within_minutes},
    survivor::Visit,
};

/// How many devices: enough for groups of several in a commit, few enough for short rounds.
const DEVICES: usize = 6;

#[derive(Debug)]
pub struct Fleet {
    survivors: [Survivor; DEVICES],
    ledger: Mutex<Ledger>,
    ledger_file: PathBuf,
    ca_pem: String,
    /// What the store held at the last audit.
    held: Snapshot,
}

/// Settings of the store for a run: the defaults, or memory so small that it flushes, compacts and begins
/// new logs all the time.
pub fn store_settings(dice: &mut StdRng) -> &'static [(&'static str, &'static str)] {
    if dice.random() {
        &[
            ("WAYPOST_STORE_MEMTABLE_MIB", "1"),
            ("WAYPOST_STORE_WAL_MIB", "1"),
        ]
    } else {
        &[]
    }
}

/// What one audit looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Audited {
    /// Pings that devices were told are settled, over the whole life of the store.
    pub acked: usize,
    /// Pings in the store.
    pub stored: usize,
}

impl Fleet {
    /// Devices that know a gateway which has been ready once.
    pub fn new(gateway: &Process, seed: u64) -> Self {
        let ledger_file = gateway.scratch("ledger.txt");
        let mut number = 0;
        let survivors = std::array::from_fn(|_| {
            number += 1;
            Survivor::new(
                gateway.device(number),
                number,
                seed ^ u64::from(number) << 32,
            )
        });
        Self {
            survivors,
            ledger: Mutex::new(Ledger::create(&ledger_file)),
            ledger_file,
            ca_pem: gateway.authority().certificate_pem().to_owned(),
            held: Snapshot::default(),
        }
    }

    /// What the store held at the last audit.
    pub fn held(&self) -> &Snapshot {
        &self.held
    }

    /// The ledger.
    pub fn acked(&self) -> Vec<Acked> {
        ledger::read(&self.ledger_file)
    }

    pub fn survivors(&self) -> &[Survivor] {
        &self.survivors
    }

    /// Works against a running gateway until it is dropped.
    pub async fn work(&mut self, gateway: &Process) {
        let (survivors, visit) = self.visit(gateway);
        let [a, b, c, d, e, f] = survivors.each_mut();
        // On the heap: they are large together.
        Box::pin(async {
            tokio::join!(
                a.work(&visit),
                b.work(&visit),
                c.work(&visit),
                d.work(&visit),
                e.work(&visit),
                f.work(&visit),
            )
        })
        .await;
    }

    /// Works until something is so.
    pub async fn work_until(&mut self, gateway: &Process, is_so: impl Fn() -> bool) {
        tokio::select! {
            () = self.work(gateway) => unreachable!("it works until it is dropped"),
            () = until(async || is_so().then_some(())) => {}
        }
    }

    /// Works until so many more pings are in the ledger.
    pub async fn work_until_acked(&mut self, gateway: &Process, pings: usize) {
        let file = self.ledger_file.clone();
        let enough = ledger::read(&file).len() + pings;
        self.work_until(gateway, || enough <= ledger::read(&file).len())
            .await;
    }

    /// Works for a time.
    pub async fn work_for(&mut self, gateway: &Process, time: Duration) {
        drop(tokio::time::timeout(time, self.work(gateway)).await);
    }

    /// Ends when the gateway has acknowledged all that any device holds.
    pub async fn hand_over(&mut self, gateway: &Process) {
        let (survivors, visit) = self.visit(gateway);
        let [a, b, c, d, e, f] = survivors.each_mut();
        let all = Box::pin(async {
            tokio::join!(
                a.hand_over(&visit),
                b.hand_over(&visit),
                c.hand_over(&visit),
                d.hand_over(&visit),
                e.hand_over(&visit),
                f.hand_over(&visit),
            )
        });
        within_minutes(all).await;
    }

    fn visit<'a>(&'a mut self, gateway: &Process) -> (&'a mut [Survivor; DEVICES], Visit<'a>) {
        let told = self.survivors.iter().map(Survivor::told_position);
        let visit = Visit {
            gateway: gateway.addresses().devices,
            ca_pem: &self.ca_pem,
            ledger: &self.ledger,
            told_before: told.max().unwrap_or_default(),
        };
        (&mut self.survivors, visit)
    }

    /// Compares the store with the ledger, with what was sent, and with what it held before.
    ///
    /// # Panics
    /// When there is a store that cannot be read.
    pub fn audit(&mut self, gateway: &Process) -> (Audited, Vec<Fault>) {
        let held = Snapshot::of(gateway.data_dir());
        let acked = self.acked();
        let mut faults = audit::compare(&held, &self.held, &acked, &self.survivors);
        let told = self.survivors.iter_mut().flat_map(Survivor::take_faults);
        faults.extend(told.map(Fault::Told));
        let audited = Audited {
            acked: acked.len(),
            stored: held.pings(),
        };
        self.held = held;
        (audited, faults)
    }

    /// # Panics
    /// With the first of the faults, if there are any; the disk is left behind to be looked at.
    pub fn assert_sound(faults: &[Fault], gateway: &mut Process) {
        if !faults.is_empty() {
            let kept = gateway.leave_behind().display().to_string();
            let first: Vec<_> = faults.iter().take(20).collect();
            panic!("{} faults; all is kept in {kept}: {first:#?}", faults.len());
        }
    }

    /// Asks a gateway that has just recovered, before any device has spoken to it, what checkers are told.
    pub async fn audit_freshness(&self, gateway: &Process) -> Vec<Fault> {
        let credentials = gateway.authority().issue_checker("dev").unwrap();
        let address = format!("https://{}", gateway.addresses().freshness);
        let mut checker = connect(&Config::new(
            &address,
            &self.ca_pem,
            &credentials.certificate_pem,
            &credentials.private_key_pem,
            "localhost",
        ))
        .await
        .unwrap();
        let users = self
            .survivors
            .iter()
            .map(|survivor| survivor.device().id.user);
        let user_ids = users
            .map(|user| bytes::Bytes::copy_from_slice(&user.0))
            .collect();
        let response = checker.get(v1::GetRequest { user_ids }).await.unwrap();
        let entries = response.into_inner().entries;
        audit::compare_entries(&self.held, &entries, &self.survivors)
    }
}
