//! Adapters that groups serve beside the model: which there should be, which there are, and
//! whom to tell. Pure.
//!
//! A pod is started with the list of that moment, so a group that begins to serve has them
//! already. Groups that serve are told a list that changed since.

use std::collections::BTreeSet;

use llama_contract::{ADAPTER_MOUNT, AdapterList, AdapterModule, AdapterPhase, AdapterReport};
use llama_crds::v1alpha1::{
    Adapter, AdapterStatus, LlamaDeploymentSpec, MAX_ADAPTER_RANK, MAX_ADAPTERS,
};

use super::golden::leader;
use super::groups::GroupPlan;
use super::observe::Observed;
use super::template::Templates;
use super::validate::{ValidationError, in_range};

/// Said of an adapter that the spec does not name any more.
const LEAVING: &str = "is forgotten once no request uses it";

/// The adapters that groups of a spec should have, and the room for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterSet {
    /// Claim with the adapters.
    pub claim: String,
    /// Adapters that a group can have.
    pub places: u8,
    /// Highest rank of an adapter.
    pub max_rank: u16,
    /// Those that it should have.
    pub loaded: Vec<Adapter>,
}

impl AdapterSet {
    /// The set that `spec` names for a model that clients call `served_name`.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn of(
        spec: &LlamaDeploymentSpec,
        served_name: &str,
    ) -> Result<Option<Self>, ValidationError> {
        let Some(adapters) = &spec.adapters else {
            return Ok(None);
        };
        let places = in_range("spec.adapters.places", adapters.places, 1, MAX_ADAPTERS)?;
        let rank = adapters.max_rank;
        let max_rank = in_range("spec.adapters.maxRank", rank, 1, MAX_ADAPTER_RANK)?;
        if adapters.loaded.len() > places as usize {
            return Err(ValidationError::TooManyAdapters {
                count: adapters.loaded.len(),
                places,
            });
        }
        let mut names = BTreeSet::from([served_name]);
        for adapter in &adapters.loaded {
            if !names.insert(&adapter.name) {
                return Err(ValidationError::AdapterNameTaken {
                    name: adapter.name.clone(),
                });
            }
            super::source::good_path("spec.adapters.loaded.path", &adapter.path, &adapter.path)?;
        }
        Ok(Some(Self {
            claim: adapters.claim_name.clone(),
            places: u8::try_from(places).unwrap_or(u8::MAX),
            max_rank: u16::try_from(max_rank).unwrap_or(u16::MAX),
            loaded: adapters.loaded.clone(),
        }))
    }

    /// The set of a group whose pods were made with the room of this one, where the spec
    /// has come to be `today`: another claim is not in its pods, and further adapters have
    /// no place.
    #[must_use]
    pub fn with_list_of(mut self, today: Option<&Self>) -> Self {
        if let Some(today) = today.filter(|today| today.claim == self.claim) {
            let loaded = today.loaded.iter().take(self.places.into());
            self.loaded = loaded.cloned().collect();
        }
        self
    }

    /// The same as workers are told.
    pub fn modules(&self) -> Vec<AdapterModule> {
        self.loaded.iter().map(module).collect()
    }
}

/// `adapter` as workers are told.
fn module(adapter: &Adapter) -> AdapterModule {
    AdapterModule {
        name: adapter.name.clone(),
        folder: format!("{ADAPTER_MOUNT}/{}", adapter.path).into(),
    }
}

/// A group that serves and has room for adapters.
struct Serving<'a> {
    index: i32,
    uid: String,
    set: &'a AdapterSet,
    /// What its first pod said of its adapters, if that is not long ago.
    told: Option<&'a [AdapterReport]>,
}

fn serving<'a>(
    groups: &[GroupPlan],
    templates: &'a Templates,
    observed: &'a Observed,
) -> Vec<Serving<'a>> {
    let ready = groups
        .iter()
        .filter(|group| group.is_wanted() && group.is_ready());
    ready
        .filter_map(|group| {
            // Most deployments have none, and then there is no pod to look for.
            let set = templates
                .of(&group.status.revision)?
                .deployment
                .adapters
                .as_ref()?;
            let uid = leader(group, observed)?;
            let state = observed.states.get(&uid);
            Some(Serving {
                index: group.status.index,
                set,
                told: state.map(|state| state.adapters.as_slice()),
                uid,
            })
        })
        .collect()
}

/// What status should say of the adapters of `wanted`, and of those that have to go. What
/// groups have not told lately stays as it was.
pub fn statuses(
    wanted: Option<&AdapterSet>,
    groups: &[GroupPlan],
    templates: &Templates,
    observed: &Observed,
    previous: &[AdapterStatus],
) -> Vec<AdapterStatus> {
    let serving = serving(groups, templates, observed);
    let all_told = serving.iter().all(|group| group.told.is_some());
    let wanted = wanted.map(|set| set.loaded.as_slice()).unwrap_or_default();
    let mut all: Vec<_> = wanted
        .iter()
        .map(|adapter| {
            let is_same =
                |old: &&AdapterStatus| old.name == adapter.name && old.path == adapter.path;
            let before = previous.iter().find(is_same);
            match before {
                Some(before) if !all_told => before.clone(),
                _ => status(adapter, &serving),
            }
        })
        .collect();
    let has = |group: &Serving<'_>, name: &str| {
        let mut told = group.told.unwrap_or_default().iter();
        told.any(|report| report.module.name == name)
    };
    let leaving = previous.iter().filter_map(|old| {
        if wanted.iter().any(|adapter| adapter.name == old.name) {
            return None;
        }
        let groups = serving.iter().filter(|group| has(group, &old.name)).count();
        (!all_told || groups > 0).then(|| AdapterStatus {
            message: Some(LEAVING.to_owned()),
            ..old.clone()
        })
    });
    all.extend(leaving);
    all.truncate(MAX_ADAPTERS as usize);
    all
}

fn status(adapter: &Adapter, serving: &[Serving<'_>]) -> AdapterStatus {
    let of = |group: &Serving<'_>| {
        let mut listed = group.set.loaded.iter();
        let module = module(listed.find(|listed| listed.name == adapter.name)?);
        let report = group.told?.iter().find(|report| report.module == module)?;
        Some((group.index, report.phase, report.message.clone()))
    };
    let reports: Vec<_> = serving.iter().filter_map(of).collect();
    let loaded = reports
        .iter()
        .filter(|report| report.1 == AdapterPhase::Loaded);
    let refused = reports
        .iter()
        .find(|report| report.1 == AdapterPhase::Refused);
    AdapterStatus {
        name: adapter.name.clone(),
        path: adapter.path.clone(),
        groups: i32::try_from(loaded.count()).unwrap_or(i32::MAX),
        message: refused.map(|(group, _, message)| {
            let why = message.as_deref().unwrap_or("refused");
            format!("group {group}: {why}")
        }),
    }
}

/// First pods that have to be asked which adapters they have: `statuses` do not say yet that
/// all groups with room have all of them and no others, or why not.
pub fn untold(
    groups: &[GroupPlan],
    templates: &Templates,
    observed: &Observed,
    statuses: &[AdapterStatus],
) -> Vec<String> {
    let serving = serving(groups, templates, observed);
    let all = i32::try_from(serving.len()).unwrap_or(i32::MAX);
    let settled = |status: &AdapterStatus| match status.message.as_deref() {
        None => status.groups == all,
        Some(message) => message != LEAVING,
    };
    if statuses.iter().all(settled) {
        return Vec::new();
    }
    serving.into_iter().map(|group| group.uid).collect()
}

/// First pods that have other adapters than they should, and what to tell each.
pub fn orders(
    groups: &[GroupPlan],
    templates: &Templates,
    observed: &Observed,
) -> Vec<(String, AdapterList)> {
    let ordered = |group: Serving<'_>| {
        let adapters = group.set.modules();
        let told: Vec<_> = group.told?.iter().map(|report| &report.module).collect();
        let has = |module: &AdapterModule| told.contains(&module);
        let same = told.len() == adapters.len() && adapters.iter().all(has);
        (!same).then_some((group.uid, AdapterList { adapters }))
    };
    let serving = serving(groups, templates, observed);
    serving.into_iter().filter_map(ordered).collect()
}
