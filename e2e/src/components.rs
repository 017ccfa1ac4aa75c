//! Kubernetes' own programs, etcd, `CoreDNS` and helm, built once from the Go
//! modules under `e2e/components` and kept in the cache.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::process::Command;

use crate::cache::Cache;
use crate::command::{self, CommandError};
use crate::digest::Hashed;
use crate::lock::{Lock, LockError};

/// The Kubernetes version that `components/kubernetes/go.mod` requires.
const KUBERNETES_MODULE: &str = "k8s.io/kubernetes";
/// The module of kwok.
const KWOK_MODULE: &str = "sigs.k8s.io/kwok";
/// The folder in it with stages that make nodes and pods ready at once.
const KWOK_STAGES: &str = "kustomize/stage/fast";
/// One build may take this long on a slow machine.
const BUILD_WITHIN: Duration = Duration::from_mins(40);
/// Enough that no two keys of one machine meet.
const KEY_DIGITS: usize = 16;
const QUICK: Duration = Duration::from_secs(30);
/// Files of a module that decide what is built.
const SOURCES: [&str; 4] = ["go.mod", "go.sum", "components.go", "main.go"];

/// A Go module and the programs that it gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Component {
    /// Its folder under `e2e/components`.
    pub name: &'static str,
    /// Program names and the packages they are built from.
    programs: &'static [(&'static str, &'static str)],
}

const KUBERNETES: Component = Component {
    name: "kubernetes",
    programs: &[
        ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
        (
            "kube-controller-manager",
            "k8s.io/kubernetes/cmd/kube-controller-manager",
        ),
        ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
        ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
        ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
        ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
    ],
};
const ETCD: Component = Component {
    name: "etcd",
    programs: &[("etcd", "go.etcd.io/etcd/server/v3")],
};
const HELM: Component = Component {
    name: "helm",
    programs: &[("helm", "helm.sh/helm/v3/cmd/helm")],
};
const COREDNS: Component = Component {
    name: "coredns",
    programs: &[("coredns", ".")],
};
const KWOK: Component = Component {
    name: "kwok",
    programs: &[("kwok", "sigs.k8s.io/kwok/cmd/kwok")],
};
/// An S3-compatible store over a folder, for tests.
pub const OBJECT_STORE: Component = Component {
    name: "object-store",
    programs: &[("versitygw", "github.com/versity/versitygw/cmd/versitygw")],
};

/// Queues of jobs, for the test that runs groups through it.
const KUEUE: Component = Component {
    name: "kueue",
    programs: &[("kueue", "sigs.k8s.io/kueue/cmd/kueue")],
};
/// Its module.
const KUEUE_MODULE: &str = "sigs.k8s.io/kueue";
/// The folder in it with its definitions of kinds and webhooks, and the name under
/// which they lie beside the programs.
const KUEUE_MANIFESTS: (&str, &str) = ("config/components", "kueue-manifests");

/// Everything that the local cluster is made of.
pub const ALL: [Component; 4] = [KUBERNETES, ETCD, COREDNS, HELM];
/// The same and what tests need besides.
pub const TESTED: [Component; 5] = [KUBERNETES, ETCD, COREDNS, HELM, OBJECT_STORE];
/// What a control plane with simulated nodes is made of.
pub const SIMULATED: [Component; 3] = [KUBERNETES, ETCD, KWOK];

/// A component could not be built.
#[derive(Debug, thiserror::Error)]
pub enum ComponentError {
    /// There is no Go compiler.
    #[error("no `go` program in PATH; install Go {needed} or newer")]
    NoGo {
        /// The least version that will do.
        needed: String,
    },
    /// The Go compiler is too old.
    #[error("`go` is version {found}; Go {needed} or newer is needed for {component}")]
    OldGo {
        /// What `go` says it is.
        found: String,
        /// The least version that will do.
        needed: String,
        /// The component that asks for it.
        component: &'static str,
    },
    /// A file of the module or the cache cannot be read or written.
    #[error("could not read or write {}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `go` failed.
    #[error("building {component} failed")]
    Build {
        /// The component.
        component: &'static str,
        /// What `go` said.
        #[source]
        source: CommandError,
    },
    /// A module's own files cannot be had.
    #[error("`go mod download` names no folder of {module}")]
    NoFolder {
        /// The module.
        module: &'static str,
    },
    /// The cache folder is locked.
    #[error("could not have the component cache for this run alone")]
    Lock(#[from] LockError),
    /// The module requires no version of Kubernetes.
    #[error("{} requires no version of {KUBERNETES_MODULE}", path.display())]
    NoVersion {
        /// Its go.mod.
        path: PathBuf,
    },
}

/// Paths of built programs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Programs(Vec<PathBuf>);

impl Programs {
    /// The file of the program called `name`, such as `kubelet`. A name that no
    /// component has is looked up in PATH when it runs.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0
            .iter()
            .find(|path| path.file_name().is_some_and(|file| file == name))
            .cloned()
            .unwrap_or_else(|| PathBuf::from(name))
    }
}

/// Builds what of `components` the cache lacks; says what it does on standard error.
pub async fn build(cache: &Cache, components: &[Component]) -> Result<Programs, ComponentError> {
    let folder = cache.components();
    let version = go_version(components).await?;
    let _lock = Lock::take(&folder.join("lock"), BUILD_WITHIN * 2).await?;
    let mut programs = Vec::new();
    for component in components {
        let module = module_folder(component);
        let key = key(&read_sources(&module)?, &version);
        let finished = folder.join(format!("{}-{key}", component.name));
        if !finished.is_dir() {
            build_one(component, &module, &finished).await?;
        }
        programs.extend(
            component
                .programs
                .iter()
                .map(|(name, _)| finished.join(name)),
        );
    }
    link(&programs, &cache.programs())?;
    Ok(Programs(programs))
}

/// Builds Kueue, and puts its manifests beside the programs. It is no part of [`TESTED`],
/// since it takes some minutes for one test.
pub async fn build_kueue(cache: &Cache) -> Result<(), ComponentError> {
    build(cache, &[KUEUE]).await?;
    let (folder, name) = KUEUE_MANIFESTS;
    let manifests = module_files(&KUEUE, KUEUE_MODULE, folder).await?;
    point(&cache.programs().join(name), &manifests)
}

/// The folder with kwok's own stages that make nodes ready, and pods as soon as they have
/// a node.
pub async fn kwok_stages() -> Result<PathBuf, ComponentError> {
    module_files(&KWOK, KWOK_MODULE, KWOK_STAGES).await
}

/// The folder `path` of `module`, which `component` is built from: files that are not part
/// of a program.
async fn module_files(
    component: &Component,
    module: &'static str,
    path: &str,
) -> Result<PathBuf, ComponentError> {
    let mut go = go_command();
    go.current_dir(module_folder(component))
        .args(["mod", "download", "-json", module]);
    let told = command::run(&mut go, BUILD_WITHIN)
        .await
        .map_err(|source| ComponentError::Build {
            component: component.name,
            source,
        })?;
    let told: serde_json::Value = serde_json::from_str(&told).unwrap_or_default();
    let folder = told["Dir"]
        .as_str()
        .map(|folder| Path::new(folder).join(path));
    folder
        .filter(|folder| folder.is_dir())
        .ok_or(ComponentError::NoFolder { module })
}

/// Makes `folder` hold a link to each of `programs`, for use from outside.
fn link(programs: &[PathBuf], folder: &Path) -> Result<(), ComponentError> {
    fs::create_dir_all(folder).map_err(file_error(folder))?;
    for program in programs {
        point(
            &folder.join(program.file_name().unwrap_or_default()),
            program,
        )?;
    }
    Ok(())
}

/// Makes `link` point to `target`.
fn point(link: &Path, target: &Path) -> Result<(), ComponentError> {
    if fs::read_link(link).is_ok_and(|known| known == target) {
        return Ok(());
    }
    // A link appears under its name in one step, so nobody finds none.
    let new = link.with_extension("new");
    if fs::symlink_metadata(&new).is_ok() {
        fs::remove_file(&new).map_err(file_error(&new))?;
    }
    symlink(target, &new).map_err(file_error(&new))?;
    fs::rename(&new, link).map_err(file_error(link))
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> ComponentError {
    let path = path.to_owned();
    move |source| ComponentError::File { path, source }
}

async fn build_one(
    component: &Component,
    module: &Path,
    finished: &Path,
) -> Result<(), ComponentError> {
    let start = Instant::now();
    eprintln!("  building {} (once, some minutes)", component.name);
    let unfinished = finished.with_extension("unfinished");
    // What an interrupted run left.
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(file_error(&unfinished))?;
    }
    fs::create_dir_all(&unfinished).map_err(file_error(&unfinished))?;
    let flags = linker_flags(component, module)?;
    for (program, package) in component.programs {
        let began = Instant::now();
        let mut go = go_command();
        go.current_dir(module)
            .args(["build", "-trimpath", "-buildvcs=false", "-ldflags", &flags])
            .arg("-o")
            .arg(unfinished.join(program))
            .arg(package);
        command::run(&mut go, BUILD_WITHIN)
            .await
            .map_err(|source| ComponentError::Build {
                component: component.name,
                source,
            })?;
        eprintln!("    {program} ({} s)", began.elapsed().as_secs());
    }
    fs::rename(&unfinished, finished).map_err(file_error(finished))?;
    eprintln!(
        "  built {} ({} s)",
        component.name,
        start.elapsed().as_secs()
    );
    Ok(())
}

/// `go` as our builds need it: static programs, exactly the pinned modules, and
/// the compiler that is installed.
fn go_command() -> Command {
    let mut go = Command::new("go");
    go.env("CGO_ENABLED", "0")
        .env("GOTOOLCHAIN", "local")
        .env("GOWORK", "off")
        .env("GOFLAGS", "-mod=readonly");
    go
}

fn module_folder(component: &Component) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("components")
        .join(component.name)
}

fn read_sources(module: &Path) -> Result<Vec<(&'static str, Vec<u8>)>, ComponentError> {
    let mut sources = Vec::new();
    for name in SOURCES {
        let path = module.join(name);
        match fs::read(&path) {
            Ok(content) => sources.push((name, content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(ComponentError::File { path, source }),
        }
    }
    Ok(sources)
}

/// The cache key: the same sources and compiler give the same programs.
fn key(sources: &[(&str, Vec<u8>)], go_version: &str) -> String {
    let mut hashed = Hashed::new(io::sink());
    // Writing to nowhere cannot fail.
    let _ = writeln!(hashed, "{go_version}");
    for (name, content) in sources {
        let _ = writeln!(hashed, "{name} {}", content.len());
        let _ = hashed.write_all(content);
    }
    let mut key = hashed.digest();
    key.truncate(KEY_DIGITS);
    key
}

/// Kubernetes programs say v0.0.0 unless the linker is told their version.
fn linker_flags(component: &Component, module: &Path) -> Result<String, ComponentError> {
    const STRIP: &str = "-s -w";
    const VARIABLES: &str = "k8s.io/component-base/version";
    if *component != KUBERNETES {
        return Ok(STRIP.to_owned());
    }
    let path = module.join("go.mod");
    let text = fs::read_to_string(&path).map_err(|source| ComponentError::File {
        path: path.clone(),
        source,
    })?;
    let version =
        required_version(&text, KUBERNETES_MODULE).ok_or(ComponentError::NoVersion { path })?;
    let mut numbers = version.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or("0"), numbers.next().unwrap_or("0"));
    Ok(format!(
        "{STRIP} -X {VARIABLES}.gitVersion={version} -X {VARIABLES}.gitMajor={major} \
         -X {VARIABLES}.gitMinor={minor}"
    ))
}

/// The version of `module` in the require lines of a go.mod.
fn required_version<'a>(go_mod: &'a str, module: &str) -> Option<&'a str> {
    go_mod.lines().find_map(|line| {
        let mut words = line
            .split_whitespace()
            .skip_while(|word| *word == "require");
        (words.next() == Some(module)).then(|| words.next())?
    })
}

/// The language version in a go.mod, the least that the compiler must have.
fn required_go(go_mod: &str) -> Option<&str> {
    go_mod.lines().find_map(|line| line.strip_prefix("go "))
}

/// The compiler's version, once it is known to be new enough for all of `components`.
async fn go_version(components: &[Component]) -> Result<String, ComponentError> {
    let mut needs = Vec::new();
    for component in components {
        let path = module_folder(component).join("go.mod");
        let text =
            fs::read_to_string(&path).map_err(|source| ComponentError::File { path, source })?;
        if let Some(needed) = required_go(&text) {
            needs.push((component.name, needed.trim().to_owned()));
        }
    }
    let newest = needs.iter().max_by_key(|(_, needed)| numbers(needed));
    let newest = newest.map_or_else(String::new, |(_, needed)| needed.clone());
    let found = command::run(go_command().args(["env", "GOVERSION"]), QUICK)
        .await
        .map_err(|_| ComponentError::NoGo { needed: newest })?;
    let found = found.trim().trim_start_matches("go").to_owned();
    for (component, needed) in needs {
        if numbers(&found) < numbers(&needed) {
            return Err(ComponentError::OldGo {
                found,
                needed,
                component,
            });
        }
    }
    Ok(found)
}

/// `1.26.8` as numbers that compare; text behind a number is left out.
fn numbers(version: &str) -> Vec<u32> {
    version
        .split('.')
        .map(|part| {
            let end = part
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(part.len());
            part[..end].parse().unwrap_or(0)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_depends_on_every_source_and_on_the_compiler() {
        let sources = |sum: &str| vec![("go.mod", b"m".to_vec()), ("go.sum", sum.into())];
        let first = key(&sources("a"), "1.26.8");
        assert_eq!(first, key(&sources("a"), "1.26.8"));
        assert_ne!(first, key(&sources("b"), "1.26.8"));
        assert_ne!(first, key(&sources("a"), "1.26.9"));
        assert_eq!(first.len(), 16);
    }

    #[test]
    fn versions_are_read_from_go_mod() {
        let text = "module m\n\ngo 1.24.0\n\nrequire k8s.io/kubernetes v1.34.4\n\n\
                    require (\n\tk8s.io/api v0.34.4 // indirect\n)\n";
        assert_eq!(required_version(text, KUBERNETES_MODULE), Some("v1.34.4"));
        assert_eq!(required_version(text, "k8s.io/api"), Some("v0.34.4"));
        assert_eq!(required_version(text, "k8s.io/none"), None);
        assert_eq!(required_go(text), Some("1.24.0"));
    }

    #[test]
    fn versions_compare_by_number() {
        assert!(numbers("1.9.1") < numbers("1.26"));
        assert!(numbers("1.26.8") > numbers("1.26.0"));
        assert_eq!(numbers("1.27rc1"), [1, 27]);
    }

    #[test]
    fn kubernetes_programs_are_told_their_version() {
        let flags = linker_flags(&KUBERNETES, &module_folder(&KUBERNETES)).unwrap();
        assert!(flags.contains("version.gitVersion=v1."), "{flags}");
        assert!(flags.contains("version.gitMajor=1 "), "{flags}");
        assert_eq!(linker_flags(&ETCD, Path::new("")).unwrap(), "-s -w");
    }

    #[test]
    fn every_module_has_its_sources() {
        for component in ALL.into_iter().chain(SIMULATED) {
            let sources = read_sources(&module_folder(&component)).unwrap();
            assert_eq!(sources.len(), 3, "{}", component.name);
        }
    }

    #[test]
    fn links_follow_the_last_build() {
        let folder = tempfile::tempdir().unwrap();
        let bin = folder.path().join("bin");
        for version in ["etcd-1/etcd", "etcd-2/etcd", "etcd-2/etcd"] {
            let program = folder.path().join(version);
            link(std::slice::from_ref(&program), &bin).unwrap();
            assert_eq!(fs::read_link(bin.join("etcd")).unwrap(), program);
        }
        assert_eq!(fs::read_dir(&bin).unwrap().count(), 1);
    }

    #[test]
    fn programs_are_found_by_name() {
        let programs = Programs(vec!["/c/etcd-1/etcd".into(), "/c/helm-1/helm".into()]);
        assert_eq!(programs.path("helm"), Path::new("/c/helm-1/helm"));
    }
}
