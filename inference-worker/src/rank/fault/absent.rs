//! Builds without faults.

use crate::comm::Link;

/// The link as it is.
pub(in crate::rank) fn wrap(link: Box<dyn Link>) -> Box<dyn Link> {
    link
}
