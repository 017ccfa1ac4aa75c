//! A real control plane on loopback, without nodes: etcd, kube-apiserver and the garbage
//! collector of kube-controller-manager.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};

/// Names the folder with the programs.
pub(crate) const PROGRAMS: &str = "LLAMA_COMPONENTS_DIR";
const KUBECONFIG: &str = "kubeconfig";
const READY_WITHIN: Duration = Duration::from_secs(90);

/// The processes; they end with this value.
pub(crate) struct ControlPlane {
    pub(crate) client: Client,
    children: Vec<Child>,
    folder: tempfile::TempDir,
}

impl ControlPlane {
    /// Path of a kubeconfig with all rights.
    #[allow(dead_code, reason = "not every test program starts others")]
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join(KUBECONFIG)
    }

    /// Starts another program beside it, with a log of its name.
    #[allow(dead_code, reason = "not every test program starts others")]
    pub(crate) fn start(&mut self, program: &Path, args: &[String]) -> anyhow::Result<()> {
        let name = program.file_name().unwrap_or_default().display();
        let log = self.folder.path().join(format!("{name}.log"));
        self.children.push(start(program, &log, args)?);
        Ok(())
    }

    /// The end of the log of a program that was started beside it.
    #[allow(dead_code, reason = "not every test program starts others")]
    pub(crate) fn last_words(&self, name: &str) -> String {
        let log = std::fs::read_to_string(self.folder.path().join(format!("{name}.log")));
        let log = log.unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// Starts the scheduler too.
    #[allow(dead_code, reason = "not every test program needs nodes")]
    pub(crate) fn start_scheduler(&mut self, programs: &Path) -> anyhow::Result<()> {
        let kubeconfig = self.kubeconfig().display().to_string();
        self.start(
            &programs.join("kube-scheduler"),
            &[
                format!("--kubeconfig={kubeconfig}"),
                format!("--authentication-kubeconfig={kubeconfig}"),
                format!("--authorization-kubeconfig={kubeconfig}"),
                "--leader-elect=false".to_owned(),
                "--secure-port=0".to_owned(),
            ],
        )
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        for child in self.children.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The folder with the programs, or `None` with a notice.
pub(crate) fn programs() -> Option<PathBuf> {
    let folder = std::env::var_os(PROGRAMS).map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipped: {PROGRAMS} names no folder with etcd and kube-apiserver");
    }
    folder
}

pub(crate) fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn start(program: &Path, log: &Path, args: &[String]) -> anyhow::Result<Child> {
    let log = std::fs::File::create(log)?;
    Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("start {}", program.display()))
}

pub(crate) fn run(program: &str, args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program).args(args).output()?;
    if !output.status.success() {
        bail!("{program}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Starts it all and waits until the API server is ready.
pub(crate) async fn control_plane(programs: &Path) -> anyhow::Result<ControlPlane> {
    let temporary = tempfile::tempdir()?;
    let folder = temporary.path().display().to_string();
    let path = |name: &str| format!("{folder}/{name}");
    let (key, public) = (path("sa.key"), path("sa.pub"));
    run("openssl", &["genrsa", "-out", &key, "2048"])?;
    run("openssl", &["rsa", "-in", &key, "-pubout", "-out", &public])?;
    std::fs::write(path("tokens.csv"), "secret,admin,1,system:masters\n")?;
    let (etcd, peer, secure) = (free_port()?, free_port()?, free_port()?);
    let (etcd, peer) = (
        format!("http://127.0.0.1:{etcd}"),
        format!("http://127.0.0.1:{peer}"),
    );
    let kubeconfig = path(KUBECONFIG);
    std::fs::write(&kubeconfig, config(secure))?;

    let mut children = Vec::new();
    let log = |name: &str| PathBuf::from(path(name));
    children.push(start(
        &programs.join("etcd"),
        &log("etcd.log"),
        &[
            format!("--data-dir={}", path("etcd")),
            format!("--listen-client-urls={etcd}"),
            format!("--advertise-client-urls={etcd}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=default={peer}"),
            "--unsafe-no-fsync".to_owned(),
        ],
    )?);
    children.push(start(
        &programs.join("kube-apiserver"),
        &log("api.log"),
        &[
            format!("--etcd-servers={etcd}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={secure}"),
            format!("--cert-dir={}", path("certs")),
            format!("--service-account-key-file={public}"),
            format!("--service-account-signing-key-file={key}"),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--token-auth-file={}", path("tokens.csv")),
            "--authorization-mode=RBAC".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--disable-admission-plugins=ServiceAccount".to_owned(),
        ],
    )?);
    let kubeconfig_value = Kubeconfig::read_from(&kubeconfig)?;
    let options = KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig_value, &options).await?;
    let plane = ControlPlane {
        client: Client::try_from(config)?,
        children,
        folder: temporary,
    };
    ready(&plane.client).await?;
    with_garbage_collector(plane, programs, &kubeconfig, &log("controllers.log"))
}

fn with_garbage_collector(
    mut plane: ControlPlane,
    programs: &Path,
    kubeconfig: &str,
    log: &Path,
) -> anyhow::Result<ControlPlane> {
    plane.children.push(start(
        &programs.join("kube-controller-manager"),
        log,
        &[
            format!("--kubeconfig={kubeconfig}"),
            "--leader-elect=false".to_owned(),
            "--secure-port=0".to_owned(),
            "--controllers=garbage-collector-controller,namespace-controller".to_owned(),
        ],
    )?);
    Ok(plane)
}

fn config(port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: x\n\
         clusters: [{{name: c, cluster: {{server: \"https://127.0.0.1:{port}\", insecure-skip-tls-verify: true}}}}]\n\
         users: [{{name: u, user: {{token: secret}}}}]\n\
         contexts: [{{name: x, context: {{cluster: c, user: u}}}}]\n"
    )
}

async fn ready(client: &Client) -> anyhow::Result<()> {
    let deadline = Instant::now() + READY_WITHIN;
    loop {
        let request = http::Request::get("/readyz").body(Vec::new())?;
        match client.request_text(request).await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                return Err(error).context("the API server is not ready");
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}
