//! What any gRPC tool may ask: whether the gateway is ready, and what else it can be asked.
//!
//! Knows the usual services for both questions. Must not know freshness: neither says anything of a user, so
//! they are open to every peer that has shown a certificate of a known authority, be it in the list of
//! checkers or not.
//!
//! # Bounds
//!
//! None of their own: a call is one of its connection's, a request is small, and the answers are made once.

use std::convert::Infallible;

use tokio::sync::watch;
use tonic::server::NamedService;
use tonic_health::{
    ServingStatus,
    pb::health_server::{Health, HealthServer},
    server::HealthReporter,
};
use tonic_reflection::server::{Builder, v1, v1alpha};

use super::{rpc::freshness_server::FreshnessServer, service::Service};
use crate::admin::Stage;

/// `freshness.proto` and `enrolment.proto` with their comments, as `proto/tests/bootstrap.rs` compiles them.
const SCHEMA: &[u8] = include_bytes!("../gen/services.bin");

/// A question is a name.
const MAX_QUESTION_BYTES: usize = 4 << 10;

/// The health service, and who tells it; not ready until told.
pub(super) async fn health() -> (HealthReporter, HealthServer<impl Health>) {
    let (reporter, service) = tonic_health::server::health_reporter();
    tell(&reporter, ServingStatus::NotServing).await;
    (
        reporter,
        service.max_decoding_message_size(MAX_QUESTION_BYTES),
    )
}

/// Tells the stage, and every later one.
pub(super) async fn follow(
    reporter: HealthReporter,
    mut stages: watch::Receiver<Stage>,
) -> Infallible {
    loop {
        // The same as /readyz says.
        let status = match *stages.borrow_and_update() {
            Stage::Ready => ServingStatus::Serving,
            Stage::Starting | Stage::Hindered(_) | Stage::Draining | Stage::Failed(_) => {
                ServingStatus::NotServing
            }
        };
        tell(&reporter, status).await;
        if stages.changed().await.is_err() {
            // Nobody changes it any more.
            std::future::pending::<()>().await;
        }
    }
}

/// Of the whole server, which is the empty name, and of its one service.
async fn tell(reporter: &HealthReporter, status: ServingStatus) {
    for name in ["", FreshnessServer::<Service>::NAME] {
        reporter.set_service_status(name, status).await;
    }
}

/// The schema for whoever does not have it: in the present form of the protocol, and in the one that older
/// tools speak.
pub(super) fn reflection() -> (
    v1::ServerReflectionServer<impl v1::ServerReflection>,
    v1alpha::ServerReflectionServer<impl v1alpha::ServerReflection>,
) {
    let builder = || {
        Builder::configure()
            .register_encoded_file_descriptor_set(SCHEMA)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let is_checked = "descriptors that were compiled are well-formed";
    let present = builder().build_v1().expect(is_checked);
    let older = builder().build_v1alpha().expect(is_checked);
    (
        present.max_decoding_message_size(MAX_QUESTION_BYTES),
        older.max_decoding_message_size(MAX_QUESTION_BYTES),
    )
}
