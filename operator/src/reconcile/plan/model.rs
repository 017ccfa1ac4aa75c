//! How the model comes into a pod: volumes, mounts and init containers. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    ConfigMapKeySelector, Container, EmptyDirVolumeSource, EnvVar, EnvVarSource, ImageVolumeSource,
    PersistentVolumeClaimVolumeSource, ResourceRequirements, SecretKeySelector, Volume,
    VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use llama_contract::{
    CACHE_LOCK, CACHE_MODEL_FOLDER, FETCH_CA_ENV, FETCH_TOKEN_ENV, FetchArgs, INTERNAL_PORT,
    MODEL_COPY_PROGRAM, MODEL_FETCH_MOUNT, MODEL_FETCH_PROGRAM, MODEL_MOUNT, S3_KEY_ID_ENV,
    S3_SECRET_KEY_ENV, S3_SESSION_TOKEN_ENV, TERMINATION_LOG, TOOLS_MOUNT,
};
use llama_crds::v1alpha1::{ImagePullPolicy, KeyReference};

use super::WorkerSettings;
use super::pod::{container_security, mount};
use crate::reconcile::quantity;
use crate::reconcile::source::{Cache, Fetched, Source};

/// The init container that provides the program which the next one runs.
pub const INSTALL_CONTAINER: &str = "install-model-copy";
/// The init container that copies the model out of its image, or fetches it.
pub const FETCH_CONTAINER: &str = "fetch-model";

/// CPU that a step asks for.
pub(super) const CPU: &str = "50m";

const MODEL_VOLUME: &str = "model";
const TOOLS_VOLUME: &str = "tools";

/// What of a model's files is brought into the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// All.
    Whole,
    /// What their headers are in.
    Heads,
}

/// The cache that the whole model is kept in.
fn cache(source: &Source, extent: Extent) -> Option<&Cache> {
    match source {
        Source::Fetched(fetched) if extent == Extent::Whole => fetched.cache.as_ref(),
        _ => None,
    }
}

/// Where the worker finds the model: a claim and an image volume are mounted whole, a file
/// of an image is copied under its own name, and so is what is fetched.
pub(super) fn path(source: &Source, extent: Extent) -> String {
    match source {
        Source::Claim { path, .. } => format!("{MODEL_MOUNT}/{path}"),
        Source::ImageVolume { path, .. } => format!("{MODEL_MOUNT}{path}"),
        Source::Image { path, .. } => {
            let file = path.rsplit('/').next().unwrap_or(path);
            format!("{MODEL_MOUNT}/{file}")
        }
        Source::Fetched(fetched) => {
            let folder = match cache(source, extent) {
                Some(_) => format!("{MODEL_MOUNT}/{CACHE_MODEL_FOLDER}"),
                None => MODEL_MOUNT.to_owned(),
            };
            match fetched.from.entry() {
                Some(file) => format!("{folder}/{file}"),
                None => folder,
            }
        }
    }
}

/// The file by which the worker says that it uses the model.
pub(super) fn lock(source: &Source) -> Option<String> {
    cache(source, Extent::Whole).map(|_| format!("{MODEL_MOUNT}/{CACHE_LOCK}"))
}

/// The mount that the model is read from.
pub(super) fn reading(source: &Source, extent: Extent) -> VolumeMount {
    VolumeMount {
        read_only: Some(true),
        sub_path: cache(source, extent).map(|cache| cache.entry.clone()),
        ..mount(MODEL_VOLUME, MODEL_MOUNT)
    }
}

/// The volumes of the model. `room` bounds what is copied onto the node.
pub(super) fn volumes(source: &Source, extent: Extent, room: Option<&str>) -> Vec<Volume> {
    let scratch = |name: &str| Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource {
            size_limit: room.map(|room| Quantity(room.to_owned())),
            ..EmptyDirVolumeSource::default()
        }),
        ..Volume::default()
    };
    let claim = |name: &str, read_only| Volume {
        name: MODEL_VOLUME.to_owned(),
        persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
            claim_name: name.to_owned(),
            read_only,
        }),
        ..Volume::default()
    };
    match source {
        Source::Claim { claim: name, .. } => vec![claim(name, Some(true))],
        Source::Image { .. } => vec![scratch(MODEL_VOLUME), scratch(TOOLS_VOLUME)],
        Source::ImageVolume {
            reference,
            pull_policy,
            ..
        } => vec![Volume {
            name: MODEL_VOLUME.to_owned(),
            image: Some(ImageVolumeSource {
                reference: Some(reference.clone()),
                pull_policy: pull_policy.map(|policy| policy.as_str().to_owned()),
            }),
            ..Volume::default()
        }],
        Source::Fetched(_) => match cache(source, extent) {
            Some(cache) => vec![claim(&cache.claim, None)],
            None => vec![scratch(MODEL_VOLUME)],
        },
    }
}

/// The steps that bring the model into the pod. They never run beside the main container,
/// which asks for `cpu` and may use `memory`, so asking for no more costs nothing: where the
/// volume is in memory, what is copied counts against the limit.
pub(super) fn init_containers(
    source: &Source,
    settings: &WorkerSettings,
    extent: Extent,
    (cpu, memory): (&str, &str),
) -> Option<Vec<Container>> {
    match source {
        Source::Claim { .. } | Source::ImageVolume { .. } => None,
        Source::Image {
            reference,
            path,
            pull_policy,
        } => {
            let install = Container {
                resources: Some(resources(cpu, memory)),
                ..install(settings)
            };
            let copy = Container {
                image: Some(reference.clone()),
                image_pull_policy: pull_policy
                    .map(|policy: ImagePullPolicy| policy.as_str().to_owned()),
                resources: Some(resources(cpu, memory)),
                ..copy(path, extent)
            };
            Some(vec![install, copy])
        }
        Source::Fetched(fetched) => Some(vec![Container {
            image: Some(settings.image.clone()),
            image_pull_policy: settings.pull_policy.clone(),
            resources: Some(resources(cpu, memory)),
            ..fetch(fetched, extent)
        }]),
    }
}

/// Puts a static program where the next container, which runs in the model image, finds
/// it: that image needs to hold nothing but the model.
fn install(settings: &WorkerSettings) -> Container {
    Container {
        name: INSTALL_CONTAINER.to_owned(),
        image: Some(settings.image.clone()),
        image_pull_policy: settings.pull_policy.clone(),
        command: Some(words(&[MODEL_COPY_PROGRAM, "install", "--to", TOOLS_MOUNT])),
        volume_mounts: Some(vec![mount(TOOLS_VOLUME, TOOLS_MOUNT)]),
        ..step()
    }
}

fn copy(path: &str, extent: Extent) -> Container {
    let program = MODEL_COPY_PROGRAM.rsplit('/').next().unwrap_or_default();
    let program = format!("{TOOLS_MOUNT}/{program}");
    let mut command = words(&[&program, "copy", "--from", path, "--to", MODEL_FETCH_MOUNT]);
    if extent == Extent::Heads {
        command.push("--heads".to_owned());
    }
    Container {
        name: FETCH_CONTAINER.to_owned(),
        command: Some(command),
        volume_mounts: Some(vec![
            VolumeMount {
                read_only: Some(true),
                ..mount(TOOLS_VOLUME, TOOLS_MOUNT)
            },
            mount(MODEL_VOLUME, MODEL_FETCH_MOUNT),
        ]),
        ..step()
    }
}

fn fetch(fetched: &Fetched, extent: Extent) -> Container {
    let whole = extent == Extent::Whole;
    let cache = fetched.cache.as_ref().filter(|_| whole);
    let args = FetchArgs {
        source: fetched.from.clone(),
        to: MODEL_FETCH_MOUNT.into(),
        heads: !whole,
        cache_bytes: cache.map(|cache| cache.bytes),
        state_port: whole.then_some(INTERNAL_PORT),
    };
    Container {
        name: FETCH_CONTAINER.to_owned(),
        command: Some(words(&[MODEL_FETCH_PROGRAM])),
        args: Some(args.to_args()),
        env: Some(environment(fetched)),
        volume_mounts: Some(vec![mount(MODEL_VOLUME, MODEL_FETCH_MOUNT)]),
        ..step()
    }
}

/// By reference: the operator never reads the Secrets.
fn environment(fetched: &Fetched) -> Vec<EnvVar> {
    let variable = |name: &str, source: EnvVarSource| EnvVar {
        name: name.to_owned(),
        value_from: Some(source),
        ..EnvVar::default()
    };
    let secret = |name: &str, key: &str, optional: bool| EnvVarSource {
        secret_key_ref: Some(SecretKeySelector {
            name: name.to_owned(),
            key: key.to_owned(),
            optional: optional.then_some(true),
        }),
        ..EnvVarSource::default()
    };
    let mut all = vec![super::pod::node_name()];
    if let Some(KeyReference { name, key }) = &fetched.token {
        all.push(variable(FETCH_TOKEN_ENV, secret(name, key, false)));
    }
    if let Some(name) = &fetched.credentials {
        for (key, optional) in [
            (S3_KEY_ID_ENV, false),
            (S3_SECRET_KEY_ENV, false),
            (S3_SESSION_TOKEN_ENV, true),
        ] {
            all.push(variable(key, secret(name, key, optional)));
        }
    }
    if let Some(KeyReference { name, key }) = &fetched.certificates {
        let source = EnvVarSource {
            config_map_key_ref: Some(ConfigMapKeySelector {
                name: name.clone(),
                key: key.clone(),
                optional: None,
            }),
            ..EnvVarSource::default()
        };
        all.push(variable(FETCH_CA_ENV, source));
    }
    all
}

/// What all steps share.
fn step() -> Container {
    Container {
        security_context: Some(container_security()),
        termination_message_path: Some(TERMINATION_LOG.to_owned()),
        ..Container::default()
    }
}

/// Asks for little, and not for more than the main container.
fn resources(cpu: &str, memory: &str) -> ResourceRequirements {
    let of = |text: &str| Quantity(text.to_owned());
    let is_less = quantity::thousandths(cpu) < quantity::thousandths(CPU);
    ResourceRequirements {
        requests: Some(BTreeMap::from([
            ("cpu".to_owned(), of(if is_less { cpu } else { CPU })),
            ("memory".to_owned(), of("32Mi")),
        ])),
        limits: Some(BTreeMap::from([("memory".to_owned(), of(memory))])),
        ..ResourceRequirements::default()
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}
