//! What gRPC tools find out by themselves: what the service can be asked, and whether it is ready.

use tokio_stream::iter;
use tonic::{Code, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::{v1, v1alpha};
use waypost_checker::rpc::freshness_client::FreshnessClient;
use waypost_gateway::pki::Credentials;
use waypost_proto::v1::GetRequest;
use waypost_tests::World;

async fn channel(world: &World, credentials: &Credentials) -> Channel {
    let endpoint = world.checker_config(credentials).endpoint().unwrap();
    endpoint.connect().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_schema_can_be_asked_for_with_its_comments() {
    use v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let world = World::start().await;
    let credentials = world.authority.issue_checker("dev").unwrap();
    let mut tool = ServerReflectionClient::new(channel(&world, &credentials).await);
    let question = |request| ServerReflectionRequest {
        host: String::new(),
        message_request: Some(request),
    };
    let questions = [
        question(MessageRequest::ListServices(String::new())),
        question(MessageRequest::FileContainingSymbol(
            "waypost.v1.Freshness".to_owned(),
        )),
    ];
    let answers = tool.server_reflection_info(iter(questions)).await.unwrap();
    let mut answers = answers.into_inner();
    let mut answer = async || {
        let answer = answers.message().await.unwrap().unwrap();
        answer.message_response.unwrap()
    };

    let MessageResponse::ListServicesResponse(list) = answer().await else {
        panic!("the first answer is the list")
    };
    let names: Vec<_> = list
        .service
        .into_iter()
        .map(|service| service.name)
        .collect();
    for name in [
        "waypost.v1.Freshness",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
    ] {
        assert!(
            names.iter().any(|known| known == name),
            "{name} in {names:?}"
        );
    }
    let MessageResponse::FileDescriptorResponse(files) = answer().await else {
        panic!("the second answer is the file")
    };
    let file = String::from_utf8_lossy(&files.file_descriptor_proto[0]).into_owned();
    for part in [
        "Watch",
        "resolved_ms",
        "Snapshot and changes in one ordered stream",
    ] {
        assert!(
            file.contains(part),
            "{part} is missing; the comments are the documentation"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_that_speak_the_older_form_are_answered_too() {
    use v1alpha::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest,
    };
    let world = World::start().await;
    let credentials = world.authority.issue_checker("dev").unwrap();
    let mut tool = ServerReflectionClient::new(channel(&world, &credentials).await);
    let question = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::FileByFilename(
            "waypost/v1/freshness.proto".to_owned(),
        )),
    };
    let answers = tool.server_reflection_info(iter([question])).await.unwrap();
    assert!(answers.into_inner().message().await.unwrap().is_some());
}

/// Neither says anything of a user, so whoever has a certificate may ask, and only a checker may go on.
#[tokio::test(flavor = "multi_thread")]
async fn health_is_ready_until_the_gateway_stops_and_open_to_every_certificate() {
    let world = World::start().await;
    let device = world.authority.issue_device(world.device(1).id).unwrap();
    let channel = channel(&world, &device).await;
    let mut health = HealthClient::new(channel.clone());
    for service in ["", "waypost.v1.Freshness"] {
        let service = service.to_owned();
        let answer = health.check(HealthCheckRequest { service }).await.unwrap();
        assert_eq!(answer.into_inner().status(), ServingStatus::Serving);
    }
    let service = "no.such.Service".to_owned();
    let unknown = health.check(HealthCheckRequest { service }).await;
    assert_eq!(unknown.unwrap_err().code(), Code::NotFound);
    let refused = FreshnessClient::new(channel)
        .get(GetRequest::default())
        .await;
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);

    let watching = health.watch(HealthCheckRequest::default()).await.unwrap();
    let mut statuses = watching.into_inner();
    let first = statuses.message().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);
    let stopping = tokio::spawn(world.stop());
    let next = statuses.message().await.unwrap().unwrap();
    assert_eq!(next.status(), ServingStatus::NotServing);
    drop(stopping.await.unwrap());
}
