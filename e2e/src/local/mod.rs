//! A whole Kubernetes cluster on this Linux machine, without Docker.

pub mod certificates;
pub mod cgroups;
pub mod config;
pub mod daemons;
pub mod forward;
pub mod layout;
pub mod namespace;
pub mod node;
pub mod prepare;
pub mod processes;
pub mod start;
pub mod teardown;
