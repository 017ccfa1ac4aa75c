//! The pod's listening ports.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use llama_contract::FailureCategory;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::args::ServeArgs;
use crate::failure::Failure;
use crate::server::internal::Inspect;
use crate::server::{self, Admission, PortLimits};

/// The servers of one pod.
#[derive(Debug)]
pub(super) struct Servers {
    closing: CancellationToken,
    api: Option<JoinHandle<()>>,
    internal: JoinHandle<std::io::Result<()>>,
}

impl Servers {
    /// Opens the internal port, and the API port where the pod has one.
    ///
    /// # Errors
    /// When a port cannot be listened on.
    pub(super) async fn open(
        args: &ServeArgs,
        api_routes: Option<Router>,
        admission: watch::Receiver<Admission>,
        inspect: Arc<dyn Inspect>,
    ) -> Result<Self, Failure> {
        let closing = CancellationToken::new();
        let internal = listen(args.bind, args.internal_port).await?;
        let routes = server::internal::router(inspect);
        let internal = tokio::spawn(async move { axum::serve(internal, routes).await });
        let mut api = None;
        if let Some(routes) = api_routes {
            let listener = listen(args.bind, args.api_port).await?;
            let limits = PortLimits::default();
            let serving = server::serve(listener, routes, admission, closing.clone(), limits);
            api = Some(tokio::spawn(serving));
        }
        Ok(Self {
            closing,
            api,
            internal,
        })
    }

    /// Takes no more connections and lets clients read what they were answered,
    /// for `limit` at most.
    pub(super) async fn close(self, limit: Duration) {
        self.closing.cancel();
        if let Some(api) = self.api
            && tokio::time::timeout(limit, api).await.is_err()
        {
            tracing::warn!("some clients have not read the end of their answers");
        }
        self.internal.abort();
    }
}

/// Listens on `bind`, or on every address of the pod.
async fn listen(bind: Option<IpAddr>, port: u16) -> Result<TcpListener, Failure> {
    let opened = match bind {
        Some(address) => TcpListener::bind((address, port)).await,
        None => match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
            Ok(listener) => Ok(listener),
            // A node without IPv6.
            Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await,
        },
    };
    opened.map_err(|error| {
        let message = format!("listen on port {port}: {error}");
        Failure::new(FailureCategory::InvalidConfiguration, message)
    })
}
