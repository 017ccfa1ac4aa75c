//! A Kubernetes cluster for demonstrations and end-to-end tests, and the images
//! to run on it, on machines with and without Docker.
//!
//! `llama-cluster up` makes or finds a [`cluster::Cluster`] from one of three
//! [`provider::Provider`]s; a test then [attaches](cluster::Cluster::attach) to it.

pub mod cache;
pub mod cluster;
pub mod command;
pub mod components;
mod digest;
pub mod image;
pub mod kind;
pub mod local;
pub mod lock;
pub mod provider;
pub mod static_programs;
pub mod wait;
