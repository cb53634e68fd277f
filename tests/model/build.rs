//! Makes the negative controls: the gateway's feed as it is, each with one thing made wrong. Knows only text; a
//! control whose text is no longer there stops the build.

use std::{env, fs, path::Path};

/// Name of the control, the file that is changed, the text as it is, and as it is made wrong.
const CONTROLS: [(&str, &str, &str, &str); 6] = [
    (
        // As if progress had a way of its own to the checker: it says where the gateway is, not how far this
        // stream has told.
        "progress_goes_past_the_queue",
        "watcher.rs",
        "            heads.mark_unchanged();\n",
        "            if at.snapshot_count.is_none() && at.progress_due <= Instant::now() {
                at.progress_due = Instant::now() + self.progress_interval;
                let Head { position, resolved_ms } = self.freshness.head();
                let token = self.tokens.issue(position, self.scope);
                let progress = Progress { resolved_ms, position, lag_ms: 0, token };
                let mut message = Message::default();
                message.push(wire::encode([Kind::Progress(progress)]));
                room.send(Ok(message));
                room = self.room().await?;
            }
            heads.mark_unchanged();\n",
    ),
    (
        "resumes_a_commit_too_late",
        "watcher.rs",
        "self.freshness.reader_after(position),",
        "self.freshness.reader_after(position + 1),",
    ),
    (
        "forgets_what_was_overtaken",
        "wire.rs",
        "&update.seen, update.coalesced",
        "&update.seen, 0",
    ),
    (
        "tells_those_who_want_everybody_of_everybody",
        "watcher.rs",
        "self.selector.wants_all() && commit.granted_by_all().contains(self.number)",
        "self.selector.wants_all()",
    ),
    (
        "forgets_that_a_grant_was_withdrawn",
        "watcher.rs",
        "(Turn::Withdrawn, Glimpse::Withdrawn) => {",
        "(Turn::Withdrawn, Glimpse::Withdrawn) if position == 0 => {",
    ),
    (
        "forgets_what_was_said_while_a_checker_was_away",
        "watcher.rs",
        "Notices::after(self.checker, position),",
        "Notices::after(self.checker, head.position),",
    ),
];

const FEED: &str = "../../gateway/src";

fn main() {
    println!("cargo::rerun-if-changed={FEED}/feed.rs");
    println!("cargo::rerun-if-changed={FEED}/feed");
    println!("cargo::rerun-if-changed={FEED}/gen");
    let out = env::var("OUT_DIR").expect("cargo says where");
    for (control, changed, right, wrong) in CONTROLS {
        let feed = feed(control, &|name, text| {
            if name != changed {
                return text;
            }
            let times = text.matches(right).count();
            assert_eq!(
                times, 1,
                "{control}: {name} has this {times} times: {right}"
            );
            text.replace(right, wrong)
        });
        let path = Path::new(&out).join(format!("{control}.rs"));
        fs::write(path, feed).expect("the control's file");
    }
}

/// The feed as one text, its modules inside it, without its own tests.
fn feed(control: &str, change: &dyn Fn(&str, String) -> String) -> String {
    let root = env::var("CARGO_MANIFEST_DIR").expect("cargo says where");
    let mut feed = change("feed.rs", read("feed.rs"));
    for file in fs::read_dir(format!("{FEED}/feed")).expect("the feed's folder") {
        let name = file
            .expect("a file")
            .file_name()
            .into_string()
            .expect("a name");
        let module = format!("\nmod {};", name.trim_end_matches(".rs"));
        let text = change(&name, read(&format!("feed/{name}")));
        feed = feed.replace(
            &module,
            &format!("{} {{\n{text}}}", module.trim_end_matches(';')),
        );
    }
    feed.replace(
        "include!(\"gen/waypost.v1.rs\");",
        &read("gen/waypost.v1.rs"),
    )
    .replace("\"../gen/", &format!("\"{root}/{FEED}/gen/"))
    .replace("crate::feed::", "itself::")
    .replace("crate::", "waypost_gateway::")
    .replace("itself::", &format!("crate::{control}::"))
}

/// A file without its header, which text that is included cannot have.
fn read(name: &str) -> String {
    let text = fs::read_to_string(format!("{FEED}/{name}")).expect("a file of the gateway");
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = text.lines().filter(|line| !line.starts_with("//!"));
    lines.map(|line| format!("{line}\n")).collect()
}
