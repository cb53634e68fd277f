//! Takes the gateway's hand-off, orders and committer as they are, without their own tests, and makes the negative
//! controls: the same, each with one line made wrong. Knows only text; a control whose line is no longer
//! there stops the build.

use std::{env, fs, path::Path};

/// Name of the control, the file that is changed, the text as it is, and as it is made wrong.
const CONTROLS: [(&str, &str, &str, &str); 15] = [
    (
        "wakes_before_it_posts",
        "handoff.rs",
        "        inbox.answers.push((self.lane, answer));\n        drop(inbox);\n        if is_first && self.mailbox.bell.list(&self.mailbox) {\n            rings.0.push(Arc::clone(&self.mailbox.bell));\n        }",
        "        drop(inbox);\n        if is_first && self.mailbox.bell.list(&self.mailbox) {\n            rings.0.push(Arc::clone(&self.mailbox.bell));\n            drop(std::mem::take(rings));\n        }\n        self.mailbox.inbox.lock().answers.push((self.lane, answer));",
    ),
    (
        "wakes_only_the_first_of_a_group",
        "handoff.rs",
        "for mailbox in filled {",
        "for mailbox in filled.into_iter().take(1) {",
    ),
    (
        "a_dropped_request_is_silent",
        "handoff.rs",
        "if !self.is_answered {",
        "if false {",
    ),
    (
        "does_not_look_whether_the_committer_is_gone",
        "handoff.rs",
        "if queue.is_closed() {",
        "if queue.max_capacity() == 0 {",
    ),
    (
        "backfill_does_not_wait_for_hello",
        "handoff.rs",
        "mailbox.greeted().await;",
        "",
    ),
    (
        "announces_the_current_millisecond",
        "handoff.rs",
        "let mut resolved_ms = drain_ms.saturating_sub(1);",
        "let mut resolved_ms = drain_ms;",
    ),
    (
        "announces_what_is_left_in_a_queue",
        "handoff.rs",
        "if !queue.is_empty() {",
        "if false {",
    ),
    (
        "does_not_move_a_late_request_past_the_announced",
        "handoff.rs",
        "submission.receive_ms.max(self.resolved_ms + 1)",
        "submission.receive_ms.max(1)",
    ),
    (
        "answers_before_the_commit",
        "commit.rs",
        "self.store.commit(judged.batch)?;",
        "for (reply, answer) in std::mem::take(&mut judged.answers) { reply.answer(answer, &mut Rings::default()); } self.store.commit(judged.batch)?;",
    ),
    (
        "publishes_before_the_commit",
        "commit.rs",
        "self.store.commit(judged.batch)?;",
        "self.freshness.publish(position, resolved_ms, &judged.changes, &news.transitions); self.store.commit(judged.batch)?;",
    ),
    (
        "answers_before_it_publishes",
        "commit.rs",
        "        self.freshness\n            .publish(position, resolved_ms, &judged.changes, &news.transitions);",
        "        for (reply, answer) in std::mem::take(&mut judged.answers) { reply.answer(answer, &mut Rings::default()); }\n        self.freshness\n            .publish(position, resolved_ms, &judged.changes, &news.transitions);",
    ),
    (
        "answers_an_order_before_the_commit",
        "commit/orders.rs",
        "                self.say(&news)?;\n                Ok(self.position)",
        "                reply.answer(Ok(self.position + 1));\n                return self.say(&news);",
    ),
    (
        "publishes_a_position_before_its_news",
        "commit.rs",
        "        self.vigil.publish(news);\n        self.freshness\n            .publish(position, self.resolved_ms, &[], &news.transitions);",
        "        self.freshness\n            .publish(position, self.resolved_ms, &[], &news.transitions);\n        self.vigil.publish(news);",
    ),
    (
        "hears_of_no_order_while_it_waits",
        "commit.rs",
        "order = self.orders.next() => {",
        "order = future::pending::<super::orders::Order>() => {",
    ),
    (
        "an_order_does_not_look_whether_the_committer_is_gone",
        "orders.rs",
        "if self.orders.is_closed() {",
        "if self.orders.max_capacity() == 0 {",
    ),
];

/// What a variant consists of.
const FILES: [(&str, &str); 4] = [
    ("handoff.rs", "../../gateway/src/handoff.rs"),
    ("orders.rs", "../../gateway/src/orders.rs"),
    ("commit.rs", "../../gateway/src/commit.rs"),
    ("scenario.rs", "scenario.rs"),
];

/// A module of one of them, in a file of its own: where it is named, and that file.
const MODULE: (&str, &str, &str) = (
    "commit.rs",
    "mod orders;",
    "../../gateway/src/commit/orders.rs",
);

fn main() {
    for path in FILES.map(|(_, path)| path).into_iter().chain([MODULE.2]) {
        println!("cargo::rerun-if-changed={path}");
    }
    write_out("as_it_is", |_, text| text);
    for (control, changed, right, wrong) in CONTROLS {
        write_out(control, |name, text| {
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
    }
}

fn write_out(variant: &str, change: impl Fn(&str, String) -> String) {
    let out = env::var("OUT_DIR").expect("cargo says where");
    let folder = Path::new(&out).join(variant);
    fs::create_dir_all(&folder).expect("a folder for the variant");
    for (name, path) in FILES {
        let mut text = beside_each_other(&change(name, read(path)), "super");
        let (outer, named, module) = MODULE;
        if name == outer {
            let inner = change("commit/orders.rs", read(module));
            let inner = beside_each_other(&inner, "super::super");
            let opened = named.trim_end_matches(';');
            text = text.replace(named, &format!("{opened} {{\n{inner}\n}}"));
        }
        fs::write(folder.join(name), text).expect("the variant's file");
    }
}

/// A file without its own tests, which have no place in a schedule.
fn read(path: &str) -> String {
    let text = fs::read_to_string(path).expect("a file of the workspace");
    text.split("#[cfg(test)]")
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// The text with the files beside it imported, whichever variant they are of, and without a header, which
/// a file that is included cannot have.
fn beside_each_other(text: &str, beside: &str) -> String {
    let mut lines = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with("//!")) {
        let mut line = line.to_owned();
        for (name, _) in FILES {
            let module = format!("{}::", name.trim_end_matches(".rs"));
            line = line.replace(&format!("crate::{module}"), &format!("{beside}::{module}"));
            // Within `use crate::{...}`, which rustfmt writes with one module to a line.
            if line.starts_with(&format!("    {module}")) && line.ends_with(',') {
                let imported = line.trim().trim_end_matches(',');
                lines.push(format!("use {beside}::{imported};"));
                line.clear();
            }
        }
        lines.push(line);
    }
    // Imports taken out of the braces come first.
    let is_import = format!("use {beside}::");
    lines.sort_by_key(|line| !line.starts_with(&is_import));
    lines.join("\n")
}
