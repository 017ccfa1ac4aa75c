//! Modules that are said to be pure take no client and read no clock.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

use std::path::Path;

const PURE: [&str; 29] = [
    "src/names.rs",
    "src/labels.rs",
    "src/reconcile/bounds.rs",
    "src/reconcile/validate.rs",
    "src/reconcile/quantity.rs",
    "src/reconcile/pods.rs",
    "src/reconcile/failure.rs",
    "src/reconcile/waiting.rs",
    "src/reconcile/groups",
    "src/reconcile/no_room.rs",
    "src/reconcile/placement.rs",
    "src/reconcile/policy.rs",
    "src/reconcile/rollout.rs",
    "src/reconcile/template.rs",
    "src/reconcile/canonical.rs",
    "src/reconcile/condition.rs",
    "src/reconcile/fit.rs",
    "src/reconcile/fit_words.rs",
    "src/reconcile/kueue.rs",
    "src/reconcile/measured.rs",
    "src/reconcile/progress.rs",
    "src/reconcile/source.rs",
    "src/reconcile/status.rs",
    "src/reconcile/notices.rs",
    "src/reconcile/plan",
    "src/models/validate.rs",
    "src/models/plan.rs",
    "src/models/status.rs",
    "src/backoff.rs",
];

const IMPURE: [&str; 6] = [
    "Client",
    "Api<",
    "Timestamp::now",
    "Instant::now",
    "SystemTime",
    "async fn",
];

fn check(path: &Path) {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).expect("a folder") {
            check(&entry.expect("an entry").path());
        }
        return;
    }
    let text = std::fs::read_to_string(path).expect("a file");
    for word in IMPURE {
        assert!(!text.contains(word), "{} has {word:?}", path.display());
    }
}

#[test]
fn pure_modules_are_pure() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for path in PURE {
        check(&root.join(path));
    }
}
