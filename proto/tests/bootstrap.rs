//! The generated code that is checked in is what the `.proto` files say.
//!
//! Building needs no `protoc` and no generator: their output is committed. This test writes it anew and
//! fails if that changed a file; commit the change, then it passes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use prost::Message as _;

#[test]
fn generated_code_matches_the_schema() {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR"));
    let freshness = "waypost/v1/freshness.proto";
    let enrolment = "waypost/v1/enrolment.proto";
    let compile = |files: &[&str]| protox::compile(files, [proto]).expect("the schema compiles");
    let descriptors = compile(&["waypost/v1/device.proto", freshness, enrolment]);

    let messages = tempfile_dir("messages");
    prost_build::Config::new()
        .bytes(["."])
        .out_dir(&messages)
        .compile_fds(descriptors)
        .expect("messages generate");

    // Each half of the service lies with who speaks it: a checker is built without the gateway.
    let client = tempfile_dir("client");
    tonic_prost_build::configure()
        .extern_path(".waypost.v1", "::waypost_proto::v1")
        .build_server(false)
        .out_dir(&client)
        .compile_fds(compile(&[freshness]))
        .expect("the client generates");

    let server = tempfile_dir("server");
    tonic_prost_build::configure()
        .extern_path(".waypost.v1", "::waypost_proto::v1")
        // The server sends what it has encoded once for many streams.
        .extern_path(".waypost.v1.WatchResponse", "crate::feed::Message")
        .build_client(false)
        .out_dir(&server)
        .compile_fds(compile(&[freshness]))
        .expect("the server generates");

    // Both halves of this one are the gateway's: `waypost invite` asks, and the gateway answers.
    let both = tempfile_dir("enrolment");
    tonic_prost_build::configure()
        .extern_path(".waypost.v1", "::waypost_proto::v1")
        .out_dir(&both)
        .compile_fds(compile(&[enrolment]))
        .expect("client and server generate");

    // What the gateway tells grpcurl and its like, comments included.
    let described = compile(&[freshness, enrolment]).encode_to_vec();

    let changed: Vec<_> = [
        ("src/gen/waypost.v1.rs", generated(&messages)),
        ("../checker/src/gen/waypost.v1.rs", generated(&client)),
        ("../gateway/src/gen/waypost.v1.rs", generated(&server)),
        ("../gateway/src/gen/enrolment.rs", generated(&both)),
        ("../gateway/src/gen/services.bin", described),
    ]
    .into_iter()
    .map(|(committed, fresh)| (proto.join(committed), fresh))
    .filter(|(committed, fresh)| is_rewritten(committed, fresh))
    .map(|(committed, _)| committed)
    .collect();
    assert!(
        changed.is_empty(),
        "these were out of date and are written anew, commit them: {changed:?}"
    );
}

fn generated(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("waypost.v1.rs")).expect("the generator wrote a file")
}

fn is_rewritten(committed: &Path, fresh: &[u8]) -> bool {
    if fs::read(committed).is_ok_and(|old| old == fresh) {
        return false;
    }
    fs::create_dir_all(committed.parent().expect("a file has a folder")).expect("folder");
    fs::write(committed, fresh).expect("the checkout can be written");
    true
}

fn tempfile_dir(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&dir).expect("a folder for generated code");
    dir
}
