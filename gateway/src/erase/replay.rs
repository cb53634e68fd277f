//! Erasures that a store does not know of, because it was put back from a time before them.
//!
//! Knows the two places in which erasures are kept: the store's own rows, and the list beside the keys, which is as new as
//! the keys are. Must not know how a store was put back: with the command or by hand, it is the same at the next start.
//!
//! Who is on the list and not in the store is fenced, before anybody is served; the eraser does the rest, as after a
//! crash. What the store knows and the list does not, as with keys from an older copy, is put on the list.

use std::collections::{BTreeMap, BTreeSet};

use tracing::warn;
use waypost_proto::id::UserId;

use super::{EraseError, Erasure};
use crate::{
    bulletin::News,
    deadlines::{self, Said},
    sharing::Transition,
    store::{ReadError, Store},
};

/// Brings the two together, and says who was fenced. `witnessed` are erasures that are known from elsewhere, with when
/// they were, in milliseconds since 1970-01-01 UTC.
///
/// # Errors
/// When the store cannot be read or written: then nobody may be served.
pub fn replay(
    store: &Store,
    witnessed: &[(UserId, u64)],
    now_ms: u64,
) -> Result<Vec<UserId>, EraseError> {
    let kept = store.load_holders()?.erasures;
    let of_store = kept
        .iter()
        .map(|(user, erasure)| (*user, erasure.fenced_ms));
    let known: Vec<_> = of_store.chain(witnessed.iter().copied()).collect();
    store.note_erased(&known)?;
    let in_store: BTreeSet<_> = kept.iter().map(|(user, _)| *user).collect();
    let missing: BTreeMap<_, _> = store
        .erased()
        .into_iter()
        .filter(|(user, _)| !in_store.contains(user))
        .collect();
    if missing.is_empty() {
        return Ok(Vec::new());
    }
    fence(store, &missing, now_ms)?;
    warn!(
        users = missing.len(),
        "this store was put back from a time before these users were erased; they are erased again"
    );
    Ok(missing.into_keys().collect())
}

/// As the committer does when the holder wants it; the receipt says when that was.
fn fence(store: &Store, users: &BTreeMap<UserId, u64>, now_ms: u64) -> Result<(), EraseError> {
    let position = store.last_position()? + 1;
    let expected = store.expected()?.into_iter();
    let by_all = store.load_checkers()?.are_granted_by_all();
    let transition = |(number, user): (u32, &UserId)| {
        let said = Said {
            position,
            at_ms: now_ms,
        };
        let told = store.decisions_of(*user)?.visibility(by_all).granted;
        Ok(Transition {
            number,
            ..Transition::erased(*user, told, said)
        })
    };
    let transitions: Result<Vec<_>, ReadError> = (0..).zip(users.keys()).map(transition).collect();
    let transitions = transitions?;
    let news = News {
        deadlines: expected
            .filter(|(_, user)| users.contains_key(user))
            .map(|(checker, user)| deadlines::Change::Removed(checker, user))
            .collect(),
        transitions,
        ..News::default()
    };
    let mut batch = store.batch();
    batch.put_position(position);
    batch.put_news(&news);
    for fence in &news.transitions {
        let begun = Erasure {
            fenced_ms: users[&fence.user],
            ..Erasure::begun_by(fence)
        };
        batch.put_erasure(fence.user, &begun);
    }
    Ok(store.commit(batch)?)
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, sync::Arc};

    use super::*;
    use crate::{
        clock::system_now_ms,
        erase::{
            Counts, Eraser, queue,
            tests::{ALICE, BOB, EACH, eraser, fence as fence_alice, filled, open},
        },
        sharing::Sharing,
    };

    /// Has all that is begun erased.
    fn finish(store: &Arc<Store>) -> Eraser {
        let (_handle, jobs) = queue();
        let mut eraser = Eraser {
            jobs: jobs.jobs,
            ..eraser(store)
        };
        assert_eq!(eraser.finish_begun(), 0);
        eraser
    }

    /// The store as it is on disk in one folder, and the keys as they are in another.
    fn put_back(from: &Path, keys_of: &Path) -> tempfile::TempDir {
        fn copy(from: &Path, to: &Path) {
            fs::create_dir_all(to).unwrap();
            for entry in fs::read_dir(from).unwrap() {
                let path = entry.unwrap().path();
                let to = to.join(path.file_name().unwrap());
                if path.is_dir() {
                    copy(&path, &to);
                } else {
                    fs::copy(path, to).unwrap();
                }
            }
        }
        let folder = tempfile::tempdir().unwrap();
        copy(&from.join("store"), &folder.path().join("store"));
        copy(&keys_of.join("keys"), &folder.path().join("keys"));
        fs::copy(keys_of.join("master.key"), folder.path().join("master.key")).unwrap();
        folder
    }

    #[test]
    fn a_store_from_before_an_erasure_is_fenced_by_the_keys_and_erased_again() {
        let folder = tempfile::tempdir().unwrap();
        drop(filled(folder.path()));
        let before = put_back(folder.path(), folder.path());
        let store = open(folder.path());
        fence_alice(&store);
        let fenced_ms = store.load_holders().unwrap().erasures[0].1.fenced_ms;
        assert_eq!(
            finish(&store).steps.count(ALICE).unwrap(),
            Counts::default()
        );
        drop(store);

        // By hand, without any command.
        let restored = put_back(before.path(), folder.path());
        let store = open(restored.path());
        let now_ms = system_now_ms();
        let last = store.last_position().unwrap();
        assert_eq!(store.count_user(ALICE).unwrap().devices, 2);
        assert_eq!(replay(&store, &[], now_ms).unwrap(), [ALICE]);
        assert_eq!(replay(&store, &[], now_ms).unwrap(), [], "once");
        let kept = store.load_holders().unwrap();
        let fenced = kept.withheld.iter().find(|(user, _)| *user == ALICE);
        assert_eq!(fenced.unwrap().1.sharing, Sharing::Erased);
        let begun = kept.erasures[0].1;
        assert_eq!((begun.fenced_ms, begun.position), (fenced_ms, last + 1));
        let eraser = finish(&store);
        assert_eq!(eraser.steps.count(ALICE).unwrap(), Counts::default());
        assert_eq!(eraser.steps.count(BOB).unwrap(), EACH, "and nobody else");
        drop((eraser, store));

        // The control: with the keys of before, nobody knows.
        let restored = put_back(before.path(), before.path());
        let store = open(restored.path());
        assert_eq!(replay(&store, &[], now_ms).unwrap(), []);
        assert_eq!(store.rows_of(ALICE).filter(Result::is_ok).count(), 4);
        // Unless somebody else does.
        assert_eq!(replay(&store, &[(ALICE, 5)], now_ms).unwrap(), [ALICE]);
        assert_eq!(store.erased(), [(ALICE, 5)]);
    }

    #[test]
    fn what_only_the_store_knows_is_put_on_the_list() {
        let folder = tempfile::tempdir().unwrap();
        let store = filled(folder.path());
        fence_alice(&store);
        assert_eq!(store.erased(), []);
        assert_eq!(replay(&store, &[], system_now_ms()).unwrap(), []);
        assert_eq!(store.erased().len(), 1);
    }
}
