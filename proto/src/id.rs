//! Who sends: users and devices, and the URI in a certificate that names them.
//!
//! Knows the SPIFFE-shaped URI. Must not know certificates or TLS.

use std::fmt;

/// A user: 16 opaque bytes, written as a UUID.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserId(pub [u8; 16]);

/// One device of a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId {
    /// The user whose device it is.
    pub user: UserId,
    /// Its number within the user.
    pub device: u32,
}

/// Who a certificate speaks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// `spiffe://<trust-domain>/user/<uuid>/device/<u32>`
    Device(DeviceId),
    /// `spiffe://<trust-domain>/checker/<name>`
    Checker(String),
    /// `spiffe://<trust-domain>/operator/<name>`
    Operator(String),
}

/// Why a URI names nobody here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The URI is not one of this trust domain.
    #[error("the certificate belongs to another trust domain")]
    OtherTrustDomain,
    /// The path has not the form of a device, a checker or an operator.
    #[error("the certificate's URI names neither a device nor a checker nor an operator")]
    NotAnIdentity,
}

impl Identity {
    /// Reads a URI of the given trust domain.
    ///
    /// # Errors
    /// When the URI belongs to another trust domain, or its path names nobody.
    pub fn from_uri(uri: &str, trust_domain: &str) -> Result<Self, IdentityError> {
        let path = uri
            .strip_prefix("spiffe://")
            .and_then(|rest| rest.strip_prefix(trust_domain))
            .and_then(|rest| rest.strip_prefix('/'))
            .ok_or(IdentityError::OtherTrustDomain)?;
        let parts: Vec<&str> = path.split('/').collect();
        match parts.as_slice() {
            ["user", user, "device", device] => {
                let user = UserId::parse(user).ok_or(IdentityError::NotAnIdentity)?;
                let device = parse_canonical_u32(device).ok_or(IdentityError::NotAnIdentity)?;
                Ok(Self::Device(DeviceId { user, device }))
            }
            ["checker", name] if is_checker_name(name) => Ok(Self::Checker((*name).to_owned())),
            ["operator", name] if is_checker_name(name) => Ok(Self::Operator((*name).to_owned())),
            _ => Err(IdentityError::NotAnIdentity),
        }
    }

    /// Writes the URI for a certificate.
    #[must_use]
    pub fn to_uri(&self, trust_domain: &str) -> String {
        match self {
            Self::Device(id) => {
                format!(
                    "spiffe://{trust_domain}/user/{}/device/{}",
                    id.user, id.device
                )
            }
            Self::Checker(name) => format!("spiffe://{trust_domain}/checker/{name}"),
            Self::Operator(name) => format!("spiffe://{trust_domain}/operator/{name}"),
        }
    }
}

/// Whether a text can name a checker or an operator: 1 to 64 of `a-z`, `0-9`, `-`, `_` and `.`.
#[must_use]
pub fn is_checker_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.'))
}

impl UserId {
    /// Reads the lower-case hyphenated form of a UUID. Only that one form is an identity, so that two
    /// spellings can never name one user.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        if bytes.len() != 36 || [8, 13, 18, 23].iter().any(|&at| bytes[at] != b'-') {
            return None;
        }
        let digit = |b: u8| match b {
            b'0'..=b'9' => Some(b - b'0'),
            b'a'..=b'f' => Some(b - b'a' + 10),
            _ => None,
        };
        let mut digits = bytes
            .iter()
            .enumerate()
            .filter(|(at, _)| ![8, 13, 18, 23].contains(at));
        let mut id = [0; 16];
        for byte in &mut id {
            let high = digit(*digits.next()?.1)?;
            let low = digit(*digits.next()?.1)?;
            *byte = high << 4 | low;
        }
        Some(Self(id))
    }
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if [4, 6, 8, 10].contains(&at) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.user, self.device)
    }
}

/// A number without sign or leading zeros: one spelling, one device.
fn parse_canonical_u32(text: &str) -> Option<u32> {
    let number: u32 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER: &str = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";

    #[test]
    fn identities_round_trip() {
        for uri in [
            format!("spiffe://example.org/user/{USER}/device/7"),
            "spiffe://example.org/checker/night-watch.2".to_owned(),
            "spiffe://example.org/operator/crew-office".to_owned(),
        ] {
            let identity = Identity::from_uri(&uri, "example.org").unwrap();
            assert_eq!(identity.to_uri("example.org"), uri);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for (uri, error) in [
            (
                format!("spiffe://example.com/user/{USER}/device/7"),
                IdentityError::OtherTrustDomain,
            ),
            (
                format!("spiffe://example.org.evil/user/{USER}/device/7"),
                IdentityError::OtherTrustDomain,
            ),
            (
                format!("https://example.org/user/{USER}/device/7"),
                IdentityError::OtherTrustDomain,
            ),
            (
                format!("spiffe://example.org/user/{USER}/device/07"),
                IdentityError::NotAnIdentity,
            ),
            (
                format!("spiffe://example.org/user/{USER}/device/+7"),
                IdentityError::NotAnIdentity,
            ),
            (
                format!("spiffe://example.org/user/{USER}/device/4294967296"),
                IdentityError::NotAnIdentity,
            ),
            (
                format!("spiffe://example.org/user/{}/device/7", USER.to_uppercase()),
                IdentityError::NotAnIdentity,
            ),
            (
                format!("spiffe://example.org/user/{USER}/device/7/"),
                IdentityError::NotAnIdentity,
            ),
            (
                "spiffe://example.org/checker/".to_owned(),
                IdentityError::NotAnIdentity,
            ),
            (
                "spiffe://example.org/checker/Ops".to_owned(),
                IdentityError::NotAnIdentity,
            ),
            (
                "spiffe://example.org/operator/".to_owned(),
                IdentityError::NotAnIdentity,
            ),
        ] {
            assert_eq!(Identity::from_uri(&uri, "example.org"), Err(error), "{uri}");
        }
    }
}
