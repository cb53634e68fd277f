//! What is taken of a certificate request: a public key, and the proof that whoever asks has the private one.
//!
//! Knows PKCS #10. Must not know who asks, nor what the certificate will say.

use rcgen::{
    PKCS_ECDSA_P256_SHA256, PKCS_ED25519, PublicKeyData as _, SignatureAlgorithm,
    SubjectPublicKeyInfo,
};
use x509_parser::{certification_request::X509CertificationRequest, prelude::FromDer as _};

/// The key of a request that was signed with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestedKey {
    pub(super) key: SubjectPublicKeyInfo,
    der: Vec<u8>,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// It is no PKCS #10 in DER, or there is more behind it.
    #[error("it cannot be read as PKCS #10 in DER")]
    Unreadable,
    /// TLS would take the certificate of no other key, or the key is a weak one.
    #[error("its key is neither one of P-256 nor Ed25519")]
    KeyKind,
    /// It is not signed by its own key.
    #[error("it is not signed by its own key")]
    Signature,
}

/// All that the gateway's TLS accepts of clients and that costs little to check: RSA keys are as large as the rest of a
/// handshake, and whether one is weak is not seen by looking at it.
static KEY_KINDS: [&SignatureAlgorithm; 2] = [&PKCS_ECDSA_P256_SHA256, &PKCS_ED25519];

impl RequestedKey {
    /// Reads a request in DER. Subject, names and extensions are not looked at.
    ///
    /// # Errors
    /// When there is no key in it that can be used, or no proof of it.
    pub fn read(request: &[u8]) -> Result<Self, RequestError> {
        let Ok(([], request)) = X509CertificationRequest::from_der(request) else {
            return Err(RequestError::Unreadable);
        };
        let der = request.certification_request_info.subject_pki.raw;
        let key = SubjectPublicKeyInfo::from_der(der).map_err(|_| RequestError::KeyKind)?;
        if !KEY_KINDS.contains(&key.algorithm()) {
            return Err(RequestError::KeyKind);
        }
        request
            .verify_signature()
            .map_err(|_| RequestError::Signature)?;
        Ok(Self {
            key,
            der: der.to_vec(),
        })
    }

    /// The key as it stands in a certificate (SubjectPublicKeyInfo, DER).
    #[must_use]
    pub fn as_der(&self) -> &[u8] {
        &self.der
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P384_SHA384};

    use super::*;

    fn request(key: &KeyPair) -> Vec<u8> {
        let params = CertificateParams::new(["ceo.example.org".to_owned()]).unwrap();
        params.serialize_request(key).unwrap().der().to_vec()
    }

    #[test]
    fn a_request_gives_its_key_whatever_it_names() {
        for kind in KEY_KINDS {
            let key = KeyPair::generate_for(kind).unwrap();
            let read = RequestedKey::read(&request(&key)).unwrap();
            assert_eq!(read.as_der(), key.subject_public_key_info());
        }
    }

    #[test]
    fn a_key_of_another_kind_is_refused() {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
        let read = RequestedKey::read(&request(&key));
        assert_eq!(read, Err(RequestError::KeyKind));
        // A well-formed request with an RSA key of 1,024 bits.
        let read = RequestedKey::read(include_bytes!("request/rsa-1024.der"));
        assert_eq!(read, Err(RequestError::KeyKind));
    }

    #[test]
    fn a_request_that_another_key_has_signed_is_refused() {
        let (own, other) = [(); 2].map(|()| KeyPair::generate().unwrap()).into();
        let find = |bytes: &[u8], part: &[u8]| {
            bytes
                .windows(part.len())
                .position(|window| window == part)
                .unwrap()
        };
        let mut forged = request(&own);
        let (own, other) = (own.public_key_raw(), other.public_key_raw());
        let at = find(&forged, own);
        forged[at..at + own.len()].copy_from_slice(other);
        assert_eq!(RequestedKey::read(&forged), Err(RequestError::Signature));
    }

    #[test]
    fn what_cannot_be_read_is_refused_and_nothing_panics() {
        let key = KeyPair::generate().unwrap();
        let whole = request(&key);
        for length in 0..whole.len() {
            assert!(RequestedKey::read(&whole[..length]).is_err(), "{length}");
        }
        let longer = [&whole[..], &[0]].concat();
        assert_eq!(RequestedKey::read(&longer), Err(RequestError::Unreadable));
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0x55;
            // What frames the signature is not signed; whatever stands there, no other key comes of it.
            if let Ok(read) = RequestedKey::read(&changed) {
                assert_eq!(read.as_der(), key.subject_public_key_info(), "byte {at}");
            }
        }
    }
}
