//! Who is connected, by device and by certificate, so that a connection can be ended when somebody is revoked or erased.
//!
//! Knows open connections and whose they are. Must not know who is revoked: whoever enters a connection asks that
//! right afterwards, and whoever revokes ends connections right afterwards, so that none falls between the two. Nor who
//! is erased: who says Hello is told by the committer. Holds one entry per connection with a proven device, so it is
//! bounded by the connections.

use std::{collections::BTreeMap, fmt, sync::Arc};

use parking_lot::Mutex;
use quinn::Connection;
use waypost_proto::{id::DeviceId, session::CloseCode};

use crate::{
    revocation::{CertificateId, Subject},
    tls::Refusal,
};

/// The open connections.
#[derive(Debug, Default)]
pub struct Connected {
    /// In the order of the devices, so that those of a user lie together.
    open: Mutex<BTreeMap<Place, Open>>,
}

/// A device, and which of its connections.
type Place = (DeviceId, usize);

#[derive(Debug)]
struct Open {
    connection: Connection,
    certificates: Arc<[CertificateId]>,
    ended: Option<Ending>,
}

/// Why connections are ended that have done nothing wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The operator has revoked the device or the user, or an authority a certificate.
    Revoked,
    /// Everything that is held on the user is erased.
    Erased,
}

impl Ending {
    /// What it is closed with.
    #[must_use]
    pub fn close_code(self) -> CloseCode {
        match self {
            Self::Revoked => CloseCode::Revoked,
            Self::Erased => CloseCode::Erased,
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Revoked => write!(f, "{}", Refusal::Revoked),
            Self::Erased => f.write_str("the holder has erased this user"),
        }
    }
}

/// A connection's entry, until it is dropped.
#[derive(Debug)]
pub struct Present<'a> {
    connected: &'a Connected,
    place: Place,
}

impl Connected {
    /// Enters a connection of a device that has shown these certificates.
    pub fn enter(
        &self,
        device: DeviceId,
        connection: Connection,
        certificates: Arc<[CertificateId]>,
    ) -> Present<'_> {
        let place = (device, connection.stable_id());
        let open = Open {
            connection,
            certificates,
            ended: None,
        };
        self.open.lock().insert(place, open);
        Present {
            connected: self,
            place,
        }
    }

    /// Closes the connections of a device or user, and says how many those were.
    pub fn end(&self, subject: Subject, why: Ending) -> usize {
        let device = |user, device| DeviceId { user, device };
        let (first, last) = match subject {
            Subject::User(user) => (device(user, 0), device(user, u32::MAX)),
            Subject::Device(device) => (device, device),
        };
        let mut open = self.open.lock();
        let theirs = open.range_mut((first, 0)..=(last, usize::MAX));
        let ended = theirs.filter_map(|(_, open)| open.end(why)).collect();
        drop(open);
        close(ended, why)
    }

    /// Closes the connections whose certificates are revoked with REVOKED, and says how many those were.
    pub fn end_listed(&self, is_listed: impl Fn(&[CertificateId]) -> bool) -> usize {
        let mut open = self.open.lock();
        let theirs = open
            .values_mut()
            .filter(|open| is_listed(&open.certificates));
        let why = Ending::Revoked;
        let ended = theirs.filter_map(|open| open.end(why)).collect();
        drop(open);
        close(ended, why)
    }
}

impl Open {
    /// The connection, if it is not ended already.
    fn end(&mut self, why: Ending) -> Option<Connection> {
        if self.ended.is_some() {
            return None;
        }
        self.ended = Some(why);
        Some(self.connection.clone())
    }
}

/// Closing takes a connection's own lock, so the one over all of them is free by then.
fn close(ended: Vec<Connection>, why: Ending) -> usize {
    let code = u32::from(why.close_code() as u8);
    for connection in &ended {
        connection.close(code.into(), why.to_string().as_bytes());
    }
    ended.len()
}

impl Present<'_> {
    /// Why it was ended here, if it was.
    #[must_use]
    pub fn ended(&self) -> Option<Ending> {
        let open = self.connected.open.lock();
        open.get(&self.place).and_then(|open| open.ended)
    }
}

impl Drop for Present<'_> {
    fn drop(&mut self) {
        self.connected.open.lock().remove(&self.place);
    }
}
