//! An authority's list of the certificates that it has revoked. Waypost makes none: this is what another tool would.

use std::{fs, path::Path};

use rcgen::{
    CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber,
    date_time_ymd,
};
use waypost_gateway::pki::Credentials;
use x509_parser::parse_x509_certificate;

/// The list, PEM, of the authority in this folder.
pub fn revocation_list(pki: &Path, revoked: &[&Credentials]) -> String {
    let revoked_certs = revoked.iter().map(|credentials| {
        let certificate = credentials.certificate_der();
        let (_, certificate) = parse_x509_certificate(&certificate).unwrap();
        RevokedCertParams {
            serial_number: SerialNumber::from_slice(certificate.raw_serial()),
            revocation_time: date_time_ymd(2_020, 1, 1),
            reason_code: None,
            invalidity_date: None,
        }
    });
    let list = CertificateRevocationListParams {
        this_update: date_time_ymd(2_020, 1, 1),
        next_update: date_time_ymd(2_100, 1, 1),
        crl_number: 1.into(),
        issuing_distribution_point: None,
        revoked_certs: revoked_certs.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let key = KeyPair::from_pem(&fs::read_to_string(pki.join("ca.key")).unwrap()).unwrap();
    let authority = fs::read_to_string(pki.join("ca.pem")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&authority, key).unwrap();
    list.signed_by(&issuer).unwrap().pem().unwrap()
}
