//! The cluster's own certificate authority and what it signs.
//!
//! The names and groups are those that Kubernetes' default RBAC roles are bound to:
//! <https://kubernetes.io/docs/setup/best-practices/certificates/>.

use std::fs;
use std::io;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use super::layout::{self, Layout};
use super::node::Node;

/// Name of the authority's files.
pub const AUTHORITY: &str = "ca";
/// Name of the API server's serving certificate.
pub const API_SERVER: &str = "kube-apiserver";
/// Name of the certificate that the API server shows to the kubelet.
pub const API_SERVER_CLIENT: &str = "kube-apiserver-client";
/// Name of the kubelet's serving certificate.
pub const KUBELET_SERVING: &str = "kubelet-serving";
/// Name of the key that signs service account tokens.
pub const SERVICE_ACCOUNTS: &str = "service-accounts";
/// Client with every right.
pub const ADMIN: &str = "admin";
const ADMINISTRATORS: &str = "system:masters";
const NODES: &str = "system:nodes";

/// A certificate could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// Signing failed.
    #[error("could not make the certificate {name}")]
    Sign {
        /// Name of its files.
        name: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// It could not be written.
    #[error("could not write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Who a certificate is for.
struct Subject {
    file: String,
    user: String,
    group: Option<&'static str>,
    /// Host names and addresses, of servers only.
    hosts: Vec<String>,
}

fn subjects(nodes: &[Node<'_>]) -> Vec<Subject> {
    let client = |file: &str, user: &str, group| Subject {
        file: file.to_owned(),
        user: user.to_owned(),
        group,
        hosts: Vec::new(),
    };
    let server = |file: &str, hosts: Vec<String>| Subject {
        file: file.to_owned(),
        user: file.to_owned(),
        group: None,
        hosts,
    };
    let api_hosts = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "localhost",
        "127.0.0.1",
        layout::API_ADDRESS,
        layout::API_SERVICE_ADDRESS,
    ];
    let mut api_hosts: Vec<String> = api_hosts.map(str::to_owned).into();
    api_hosts.push(format!("kubernetes.default.svc.{}", layout::DOMAIN));
    let mut subjects = vec![
        server(API_SERVER, api_hosts),
        client(ADMIN, "llama-cluster-admin", Some(ADMINISTRATORS)),
        client(API_SERVER_CLIENT, API_SERVER_CLIENT, Some(ADMINISTRATORS)),
        client(
            "kube-controller-manager",
            "system:kube-controller-manager",
            None,
        ),
        client("kube-scheduler", "system:kube-scheduler", None),
        client("kube-proxy", "system:kube-proxy", None),
        client("coredns", super::config::DNS_USER, None),
    ];
    for node in nodes {
        let user = format!("system:node:{}", node.name());
        subjects.push(client(&node.file("kubelet"), &user, Some(NODES)));
        let hosts = vec![node.name(), node.address()];
        subjects.push(server(&node.file(KUBELET_SERVING), hosts));
    }
    subjects
}

/// Writes a new authority, a certificate for every part of the cluster, and the key
/// for service account tokens. Keys are readable by root only.
pub fn write_all(layout: &Layout, nodes: &[Node<'_>]) -> Result<(), CertificateError> {
    let (issuer, authority) = authority().map_err(sign_error(AUTHORITY))?;
    write(&layout.certificate(AUTHORITY), &authority)?;
    for subject in subjects(nodes) {
        let (certificate, key) = signed(&subject, &issuer).map_err(sign_error(&subject.file))?;
        write(&layout.certificate(&subject.file), &certificate)?;
        write(&layout.key(&subject.file), &key)?;
    }
    let tokens = KeyPair::generate().map_err(sign_error(SERVICE_ACCOUNTS))?;
    let public = tokens.public_key_pem();
    write(&layout.public_key(SERVICE_ACCOUNTS), &public)?;
    write(&layout.key(SERVICE_ACCOUNTS), &tokens.serialize_pem())
}

fn sign_error(name: &str) -> impl FnOnce(rcgen::Error) -> CertificateError {
    let name = name.to_owned();
    move |source| CertificateError::Sign { name, source }
}

fn write(path: &Path, text: &str) -> Result<(), CertificateError> {
    write_private(path, text).map_err(|source| CertificateError::Write {
        path: path.to_owned(),
        source,
    })
}

/// Writes a file that only its owner may read.
pub(super) fn write_private(path: &Path, text: &str) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?
        .write_all(text.as_bytes())
}

fn authority() -> Result<(Issuer<'static, KeyPair>, String), rcgen::Error> {
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    params
        .distinguished_name
        .push(DnType::CommonName, "llama-cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?.pem();
    Ok((Issuer::new(params, key), certificate))
}

fn signed(
    subject: &Subject,
    issuer: &Issuer<'_, KeyPair>,
) -> Result<(String, String), rcgen::Error> {
    let mut params = CertificateParams::new(subject.hosts.clone())?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, subject.user.as_str());
    if let Some(group) = subject.group {
        params
            .distinguished_name
            .push(DnType::OrganizationName, group);
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![if subject.hosts.is_empty() {
        ExtendedKeyUsagePurpose::ClientAuth
    } else {
        ExtendedKeyUsagePurpose::ServerAuth
    }];
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, issuer)?.pem();
    Ok((certificate, key.serialize_pem()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn api_server_is_known_by_every_address_clients_use() {
        let layout = Layout::new("test").unwrap();
        let subjects = subjects(&Node::all(&layout, 1));
        let api = subjects.iter().find(|s| s.file == API_SERVER).unwrap();
        for host in [
            "127.0.0.1",
            layout::API_ADDRESS,
            layout::API_SERVICE_ADDRESS,
        ] {
            assert!(api.hosts.iter().any(|known| known == host), "{host}");
        }
    }

    #[test]
    fn kubelet_is_the_node_that_the_node_authorizer_expects() {
        let layout = Layout::new("test").unwrap();
        let subjects = subjects(&Node::all(&layout, 2));
        for (file, user) in [
            ("kubelet", "system:node:test-node"),
            ("kubelet-2", "system:node:test-node-2"),
        ] {
            let kubelet = subjects.iter().find(|s| s.file == file).unwrap();
            assert_eq!(kubelet.user, user);
            assert_eq!(kubelet.group, Some(NODES));
        }
    }

    #[test]
    fn every_subject_can_be_signed() {
        let (issuer, _) = authority().unwrap();
        for subject in subjects(&Node::all(&Layout::new("test").unwrap(), 2)) {
            let (certificate, key) = signed(&subject, &issuer).unwrap();
            assert!(certificate.starts_with("-----BEGIN CERTIFICATE-----"));
            assert!(key.starts_with("-----BEGIN PRIVATE KEY-----"));
        }
    }

    #[test]
    fn private_files_are_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        write_private(&path, "secret").unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
}
