//! Who is connected, by device and by certificate, so that a connection can be ended when somebody is revoked.
//!
//! Knows open connections and whose they are. Must not know who is revoked: whoever enters a connection asks that
//! right afterwards, and whoever revokes ends connections right afterwards, so that none falls between the two. Holds
//! one entry per connection with a proven device, so it is bounded by the connections.

use std::{collections::BTreeMap, sync::Arc};

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
    is_ended: bool,
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
            is_ended: false,
        };
        self.open.lock().insert(place, open);
        Present {
            connected: self,
            place,
        }
    }

    /// Closes the connections of a device or user with REVOKED, and says how many those were.
    pub fn end(&self, subject: Subject) -> usize {
        let device = |user, device| DeviceId { user, device };
        let (first, last) = match subject {
            Subject::User(user) => (device(user, 0), device(user, u32::MAX)),
            Subject::Device(device) => (device, device),
        };
        let mut open = self.open.lock();
        let theirs = open.range_mut((first, 0)..=(last, usize::MAX));
        let ended = theirs.filter_map(|(_, open)| open.end()).collect();
        drop(open);
        close(ended)
    }

    /// Closes the connections whose certificates are revoked with REVOKED, and says how many those were.
    pub fn end_listed(&self, is_listed: impl Fn(&[CertificateId]) -> bool) -> usize {
        let mut open = self.open.lock();
        let theirs = open
            .values_mut()
            .filter(|open| is_listed(&open.certificates));
        let ended = theirs.filter_map(Open::end).collect();
        drop(open);
        close(ended)
    }
}

impl Open {
    /// The connection, if it is not ended already.
    fn end(&mut self) -> Option<Connection> {
        (!std::mem::replace(&mut self.is_ended, true)).then(|| self.connection.clone())
    }
}

/// Closing takes a connection's own lock, so the one over all of them is free by then.
fn close(ended: Vec<Connection>) -> usize {
    for connection in &ended {
        let code = u32::from(CloseCode::Revoked as u8);
        connection.close(code.into(), Refusal::Revoked.to_string().as_bytes());
    }
    ended.len()
}

impl Present<'_> {
    /// Whether it was ended here.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        let open = self.connected.open.lock();
        open.get(&self.place).is_some_and(|open| open.is_ended)
    }
}

impl Drop for Present<'_> {
    fn drop(&mut self) {
        self.connected.open.lock().remove(&self.place);
    }
}
