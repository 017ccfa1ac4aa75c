//! Facts in, findings out. Pure.

mod claims;
mod deployments;
mod install;
mod nodes;
mod pods;

use jiff::Timestamp;

use super::facts::{Facts, Seen};
use super::finding::Finding;

/// Everything that there is to say of `facts` at `now`.
pub fn all(facts: &Facts, now: Timestamp) -> Vec<Finding> {
    let mut findings = install::check(facts, now);
    let subjects = match &facts.subjects {
        Seen::Known(subjects) => subjects.as_slice(),
        Seen::Hidden(why) => {
            findings.push(Finding::skip("LlamaDeployments", why));
            &[]
        }
    };
    findings.extend(nodes::check(facts, subjects));
    for subject in subjects {
        let mut found = deployments::check(subject, now);
        found.extend(claims::check(subject));
        found.extend(pods::check(subject, now));
        if found.is_empty() {
            found.push(deployments::nothing_found(subject));
        }
        findings.extend(found);
    }
    findings
}
