//! A device that has no certificate yet. It makes its key, redeems a code, and is then a device like any other.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use bytes::{Bytes, BytesMut};
use quinn::ConnectionError;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use waypost_gateway::enrol::rpc::enrolment_client::EnrolmentClient;
use waypost_proto::{
    enrol::{ENROLL_ALPN, ENROLL_FRAME_BYTES},
    frame::{FrameReader, encode_frame},
    id::{DeviceId, UserId},
    v1::{
        EnrollRequest, EnrollResponse, InviteRequest, InviteResponse, IssuedCertificate,
        enroll_response::Outcome, enrolment_refusal,
    },
};

use crate::{
    Link, World,
    link::{self, Attempt},
    process::within_minutes,
};

/// A device with its key.
#[derive(Debug)]
pub struct Newcomer {
    pub key: KeyPair,
}

/// A device that was enrolled.
#[derive(Debug)]
pub struct Enrolled {
    pub id: DeviceId,
    pub issued: IssuedCertificate,
    key: PrivatePkcs8KeyDer<'static>,
}

impl Newcomer {
    #[expect(clippy::new_without_default, reason = "each has a key of its own")]
    pub fn new() -> Self {
        Self {
            key: KeyPair::generate().unwrap(),
        }
    }

    /// A request that names somebody else, which is nobody's business.
    pub fn request(&self) -> Bytes {
        request(&self.key)
    }

    pub async fn redeem(&self, server: SocketAddr, ca_pem: &str, code: &str) -> EnrollResponse {
        let asked = ask(LOOPBACK, server, ca_pem, code, self.request()).await;
        asked.unwrap()
    }

    /// What it has become with a certificate.
    pub fn with(&self, issued: IssuedCertificate) -> Enrolled {
        let id = DeviceId {
            user: UserId(issued.user[..].try_into().unwrap()),
            device: issued.device,
        };
        Enrolled {
            id,
            issued,
            key: self.key.serialize_der().into(),
        }
    }
}

impl Enrolled {
    /// Connects to where devices go.
    pub async fn attempt(&self, gateway: SocketAddr, ca_pem: &str) -> Attempt {
        let chain = self.issued.chain.iter();
        let chain = chain
            .map(|der| CertificateDer::from(der.to_vec()))
            .collect();
        let shown = Some((chain, self.key.clone_key().into()));
        let config = link::client_config_with(ca_pem, shown, waypost_proto::ALPN, link::ordinary());
        link::attempt_from(LOOPBACK, gateway, config).await
    }

    pub async fn connect(&self, gateway: SocketAddr, ca_pem: &str) -> Link {
        self.attempt(gateway, ca_pem).await.unwrap()
    }
}

/// A certificate request for a key.
pub fn request(key: &KeyPair) -> Bytes {
    let params = CertificateParams::new(["somebody.example.org".to_owned()]).unwrap();
    Bytes::copy_from_slice(params.serialize_request(key).unwrap().der())
}

/// Asks for a certificate; or how the connection ended without an answer.
pub async fn ask(
    source: IpAddr,
    server: SocketAddr,
    ca_pem: &str,
    code: &str,
    certificate_request: Bytes,
) -> Result<EnrollResponse, ConnectionError> {
    let request = EnrollRequest {
        code: code.to_owned(),
        certificate_request,
    };
    let mut bytes = BytesMut::new();
    encode_frame(&request, &mut bytes);
    let connection = connect(source, server, ca_pem, ENROLL_ALPN).await?;
    converse(&connection, &bytes).await
}

/// A connection to the port of newcomers, or to another one, without a certificate.
pub async fn connect(
    source: IpAddr,
    server: SocketAddr,
    ca_pem: &str,
    alpn: &[u8],
) -> Result<quinn::Connection, ConnectionError> {
    let config = link::client_config_with(ca_pem, None, alpn, link::ordinary());
    let endpoint = quinn::Endpoint::client(SocketAddr::from((source, 0))).unwrap();
    let connecting = endpoint.connect_with(config, server, "localhost").unwrap();
    within_minutes(connecting).await
}

/// Writes bytes and reads the one frame that answers them.
pub async fn converse(
    connection: &quinn::Connection,
    bytes: &[u8],
) -> Result<EnrollResponse, ConnectionError> {
    let ended = |_| connection.close_reason().expect("it ends for a reason");
    let (mut send, mut recv) = connection.open_bi().await?;
    // A server that has had enough closes meanwhile.
    drop(send.write_all(bytes).await);
    drop(send.finish());
    let mut reader = FrameReader::new(ENROLL_FRAME_BYTES);
    loop {
        if let Some(response) = reader.next::<EnrollResponse>().unwrap() {
            return Ok(response);
        }
        let read = within_minutes(recv.read_chunk(usize::MAX, true)).await;
        let Some(chunk) = read.map_err(ended)? else {
            panic!("the stream ends without an answer")
        };
        reader.extend(&chunk.bytes);
    }
}

/// The certificate of an answer.
pub fn issued(response: EnrollResponse) -> IssuedCertificate {
    match response.outcome {
        Some(Outcome::Issued(issued)) => issued,
        other => panic!("no certificate but {other:?}"),
    }
}

/// The refusal of an answer.
pub fn refusal(response: &EnrollResponse) -> enrolment_refusal::Code {
    match &response.outcome {
        Some(Outcome::Refused(refusal)) => refusal.code(),
        other => panic!("no refusal but {other:?}"),
    }
}

impl World {
    /// A gateway at which devices can enrol, with an operator named `office`.
    pub async fn start_enrolling(
        change: impl FnOnce(&mut waypost_gateway::enrol::EnrolmentConfig),
    ) -> Self {
        Self::start_with(|config| {
            let ca = config.tls.client_ca.clone();
            config.enrolment.ca_key = Some(ca.with_extension("key"));
            config.enrolment.ca_certificate = Some(ca);
            config.enrolment.operators = vec!["office".to_owned()];
            change(&mut config.enrolment);
        })
        .await
    }

    /// Where newcomers connect.
    pub fn door(&self) -> SocketAddr {
        self.addresses().enrolment.expect("devices can enrol")
    }

    /// Asks for an invitation as `office`.
    pub async fn invite(&self, request: InviteRequest) -> Result<InviteResponse, tonic::Status> {
        let credentials = self.authority.issue_operator("office").unwrap();
        self.invite_with(&credentials, request).await
    }

    /// The same with any certificate.
    pub async fn invite_with(
        &self,
        credentials: &waypost_gateway::pki::Credentials,
        request: InviteRequest,
    ) -> Result<InviteResponse, tonic::Status> {
        let endpoint = self.checker_config(credentials).endpoint().unwrap();
        let channel = endpoint.connect().await.unwrap();
        let response = EnrolmentClient::new(channel).invite(request).await;
        response.map(tonic::Response::into_inner)
    }

    /// The code of an invitation for a new user.
    pub async fn code(&self) -> String {
        self.invite(InviteRequest::default()).await.unwrap().code
    }

    /// Redeems a code with a newcomer's key.
    pub async fn redeem(&self, newcomer: &Newcomer, code: &str) -> EnrollResponse {
        let ca_pem = self.authority.certificate_pem();
        newcomer.redeem(self.door(), ca_pem, code).await
    }

    /// A newcomer that was invited and is enrolled.
    pub async fn enrolled(&self) -> (Newcomer, Enrolled) {
        let newcomer = Newcomer::new();
        let response = self.redeem(&newcomer, &self.code().await).await;
        let enrolled = newcomer.with(issued(response));
        (newcomer, enrolled)
    }

    /// Connects with the certificate that a device was given.
    pub async fn connect_enrolled(&self, enrolled: &Enrolled) -> Link {
        let ca_pem = self.authority.certificate_pem();
        enrolled.connect(self.addresses().devices, ca_pem).await
    }

    /// The same, where it may be refused.
    pub async fn attempt_enrolled(&self, enrolled: &Enrolled) -> Attempt {
        let ca_pem = self.authority.certificate_pem();
        enrolled.attempt(self.addresses().devices, ca_pem).await
    }
}

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
