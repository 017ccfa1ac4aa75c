//! The cluster that a command looks at. Every wait has a deadline.

use std::time::Duration;

use kube::api::{Api, ListParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use llama_crds::v1alpha1::LlamaDeployment;

use crate::args::ClusterFlags;
use crate::error::Error;

/// Longest wait for one answer of the API server, unless flags say another.
const DEADLINE: Duration = Duration::from_secs(30);
/// Most objects that are read of one kind.
const MOST_OBJECTS: u32 = 20_000;
/// Objects asked for at once.
const PAGE: u32 = 500;

/// The cluster that a command looks at.
#[expect(
    missing_debug_implementations,
    reason = "the client has nothing to print"
)]
pub struct Cluster {
    /// Asks its API server.
    pub client: Client,
    /// The namespace of the flags, or that of the context.
    pub namespace: String,
    /// What `--request-timeout` says.
    pub request_timeout: Option<Duration>,
    config: Config,
}

impl Cluster {
    /// The cluster of `flags`. Nothing is asked yet.
    pub async fn connect(flags: &ClusterFlags) -> Result<Self, Error> {
        let read = match &flags.kubeconfig {
            Some(path) => Kubeconfig::read_from(path),
            None => Kubeconfig::read(),
        };
        let wrong = |error| Error::Kubeconfig(Box::new(error));
        let options = KubeConfigOptions {
            context: flags.context.clone(),
            ..KubeConfigOptions::default()
        };
        let config = Config::from_custom_kubeconfig(read.map_err(wrong)?, &options).await;
        let mut config = config.map_err(wrong)?;
        if let Some(namespace) = &flags.namespace {
            config.default_namespace.clone_from(namespace);
        }
        Self::from_config(config, flags.request_timeout)
    }

    /// The cluster of `config`.
    pub fn from_config(config: Config, request_timeout: Option<Duration>) -> Result<Self, Error> {
        let client = Client::try_from(config.clone());
        Ok(Self {
            client: client.map_err(|error| Error::Client(Box::new(error)))?,
            namespace: config.default_namespace.clone(),
            request_timeout,
            config,
        })
    }

    /// A client that tries nothing again, so that each refusal is seen.
    pub fn plain_client(&self) -> Result<Client, Error> {
        let mut config = self.config.clone();
        config.default_retry = false;
        Client::try_from(config).map_err(|error| Error::Client(Box::new(error)))
    }

    /// Longest wait for one answer of the API server.
    pub fn deadline(&self) -> Duration {
        self.request_timeout.unwrap_or(DEADLINE)
    }

    /// Waits for `call`, which tries to `attempt`, until the deadline.
    pub async fn ask<T>(
        &self,
        attempt: &str,
        call: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, Error> {
        let limit = self.deadline();
        match tokio::time::timeout(limit, call).await {
            Err(_) => Err(Error::NoAnswer {
                attempt: attempt.to_owned(),
                limit,
            }),
            Ok(answer) => answer.map_err(|answer| Error::Api {
                attempt: attempt.to_owned(),
                answer: Box::new(answer),
            }),
        }
    }

    /// Every object of `api` that `params` select, page by page.
    pub async fn list<K>(
        &self,
        attempt: &str,
        api: &Api<K>,
        params: &ListParams,
    ) -> Result<Vec<K>, Error>
    where
        K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
    {
        let mut all = Vec::new();
        let mut params = params.clone().limit(PAGE);
        for _ in 0..MOST_OBJECTS / PAGE {
            let page = self.ask(attempt, api.list(&params)).await?;
            all.extend(page.items);
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params.continue_token = Some(token),
                None => return Ok(all),
            }
        }
        Err(Error::Unexpected(format!(
            "cannot {attempt}: expected at most {MOST_OBJECTS} objects"
        )))
    }

    /// The LlamaDeployment `name` of the namespace.
    pub async fn deployment(&self, name: &str) -> Result<LlamaDeployment, Error> {
        let namespace = &self.namespace;
        let api: Api<LlamaDeployment> = Api::namespaced(self.client.clone(), namespace);
        let attempt = format!("read LlamaDeployment {namespace}/{name}");
        self.ask(&attempt, api.get(name)).await
    }

    /// The LlamaDeployments of the namespace, or of all.
    pub async fn deployments(&self, all: bool) -> Result<Vec<LlamaDeployment>, Error> {
        let api: Api<LlamaDeployment> = self.api(all);
        self.list("list LlamaDeployments", &api, &ListParams::default())
            .await
    }

    /// Objects of the namespace, or of all.
    pub fn api<K>(&self, all: bool) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        if all {
            Api::all(self.client.clone())
        } else {
            Api::namespaced(self.client.clone(), &self.namespace)
        }
    }
}
