//! One measurement: a new control plane, one controller, and what it does.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, ListParams};
use serde_json::Value;
use tokio::time::{interval, sleep, timeout};

use crate::machine;
use crate::plane::{ControlPlane, Parts};
use crate::profile::Snapshot;
use crate::report::{
    Burst, ControllerReport, OneByOne, Percentiles, Rest, Restart, Run, megabytes, rounded,
};
use crate::subject::{Controller, Operator, PODS_EACH, Subject};
use crate::watch::{Seen, Watch};

/// What the names of the namespaces begin with.
const NAMESPACE: &str = "bench-";
const WARM_UP_NAMESPACE: &str = "warm-up";
/// Objects that are made and removed before anything is measured.
const WARM_UP: usize = 20;
/// Creations under way at the same time.
const CREATIONS: usize = 16;
/// A controller that has nothing to do gets this long before its memory is read.
const IDLE: Duration = Duration::from_secs(10);
/// Time after the last object is Ready that still counts as the burst's: controllers
/// may have work left.
const SETTLE: Duration = Duration::from_secs(10);
/// Longest wait for a controller to answer after its start.
const ANSWERS_WITHIN: Duration = Duration::from_mins(1);
/// Longest wait for one object, and for what the warm-up made to be gone.
const SOON: Duration = Duration::from_mins(2);
const LOOK_EVERY: Duration = Duration::from_millis(100);
const TELL_EVERY: Duration = Duration::from_secs(5);

/// What to measure with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings<'a> {
    pub(crate) parts: Parts<'a>,
    pub(crate) operator: Operator<'a>,
    pub(crate) deployments: usize,
    /// That the objects are spread over.
    pub(crate) namespaces: usize,
    /// Objects made one by one, after the burst.
    pub(crate) singly: usize,
    pub(crate) rest: Duration,
    /// Longest wait for all objects to be Ready.
    pub(crate) within: Duration,
}

/// The measurement, with its processes.
struct Bench<'a> {
    settings: Settings<'a>,
    subject: Subject,
    plane: ControlPlane,
    controller: Controller,
    watch: Watch,
    /// A pod for the peer's template.
    pod: Option<Value>,
}

/// What a measurement leaves behind.
pub(crate) struct Outcome {
    pub(crate) run: Run,
    /// A pod that the controller made.
    pub(crate) pod: Option<Value>,
    pub(crate) flags: std::collections::BTreeMap<&'static str, Vec<String>>,
}

/// Measures `subject`; `pod` is one that the operator has made.
pub(crate) async fn measure(
    settings: Settings<'_>,
    subject: Subject,
    pod: Option<Value>,
) -> anyhow::Result<Outcome> {
    let load_average = machine::load();
    say(subject, "starting a control plane");
    let mut plane = ControlPlane::start(settings.parts).await?;
    plane.namespace(WARM_UP_NAMESPACE).await?;
    for index in 0..settings.namespaces {
        plane.namespace(&format!("{NAMESPACE}{index}")).await?;
    }
    let controller = subject.start(&mut plane, settings.parts.programs, settings.operator)?;
    let watch = Watch::start(
        &plane.client,
        NAMESPACE,
        &subject.resource(),
        subject.is_ready(),
    );
    let mut bench = Bench {
        settings,
        subject,
        plane,
        controller,
        watch,
        pod,
    };
    bench.answering().await?;
    sleep(IDLE).await;
    let idle = bench.controller.process.usage()?;
    bench.warm_up().await?;
    let before = bench.snapshot().await?;
    let burst = bench.burst().await?;
    sleep(SETTLE).await;
    let after = bench.snapshot().await?;
    let (rest, rested) = bench.rest(&after).await?;
    let one_by_one = bench.one_by_one().await?;
    let pod = bench.any_pod().await?;
    let (bench, restart) = bench.restart().await?;
    let counters = after.counters.since(&before.counters);
    let deployments = settings.deployments as f64;
    let run = Run {
        subject,
        load_average,
        burst,
        controller: ControllerReport {
            idle_rss_megabytes: megabytes(idle.rss_bytes),
            rss_megabytes: megabytes(rested.controller.rss_bytes),
            peak_rss_megabytes: megabytes(rested.controller.peak_bytes),
            cpu_seconds: rounded(after.controller.cpu_seconds - before.controller.cpu_seconds),
            writes: counters.all_writes(),
            writes_each: rounded(counters.all_writes() as f64 / deployments),
            writes_by_kind: counters.writes,
            rounds: counters.rounds,
            rounds_each: rounded(counters.rounds as f64 / deployments),
        },
        rest,
        one_by_one,
        restart,
        profile: after.since(&before, subject.flow_schema()),
    };
    Ok(Outcome {
        run,
        pod,
        flags: bench.plane.flags.clone(),
    })
}

fn say(subject: Subject, what: &str) {
    eprintln!("  bench: {}: {what}", subject.name());
}

impl Bench<'_> {
    /// Fails if a program has ended.
    fn check(&mut self) -> anyhow::Result<()> {
        self.plane.check()?;
        self.controller.process.check()
    }

    async fn snapshot(&self) -> anyhow::Result<Snapshot> {
        Ok(Snapshot {
            at: Instant::now(),
            usage: self.plane.usage()?,
            controller: self.controller.process.usage()?,
            busy_seconds: machine::busy_seconds()?,
            counters: self.controller.counters(&self.plane).await?,
            api: self.plane.metrics().await?,
        })
    }

    /// Waits until the controller answers for its metrics.
    async fn answering(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + ANSWERS_WITHIN;
        loop {
            self.check()?;
            match self.controller.counters(&self.plane).await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => sleep(LOOK_EVERY).await,
            }
        }
    }

    /// Waits until `done` is true of what `watch` has seen; says how far it is.
    async fn until(
        &mut self,
        watch: Option<&Watch>,
        within: Duration,
        what: &str,
        done: impl Fn(&Seen) -> bool,
    ) -> anyhow::Result<()> {
        let begun = Instant::now();
        let mut tell = interval(TELL_EVERY);
        tell.tick().await;
        loop {
            let seen = watch.unwrap_or(&self.watch);
            let told = tokio::select! {
                () = seen.until(&done) => return Ok(()),
                _ = tell.tick() => seen.look(|seen| format!(
                    "{:.0} s: {} pods made, {} objects Ready",
                    begun.elapsed().as_secs_f64(), seen.pods_made, seen.ready()
                )),
            };
            say(self.subject, &told);
            self.check()?;
            if begun.elapsed() > within {
                bail!("{what} took more than {} s; {told}", within.as_secs());
            }
        }
    }

    /// Makes some objects and removes them, so that no subject is measured cold.
    async fn warm_up(&mut self) -> anyhow::Result<()> {
        say(self.subject, "warming up");
        let client = self.plane.client.clone();
        let resource = self.subject.resource();
        let watch = Watch::start(
            &client,
            WARM_UP_NAMESPACE,
            &resource,
            self.subject.is_ready(),
        );
        for index in 0..WARM_UP {
            let name = format!("warm-{index}");
            self.subject
                .create(&client, WARM_UP_NAMESPACE, &name, self.pod.as_ref())
                .await?;
        }
        let ready = |seen: &Seen| seen.ready() == WARM_UP;
        self.until(Some(&watch), SOON, "the warm-up", ready).await?;
        let objects: Api<DynamicObject> =
            Api::namespaced_with(client.clone(), WARM_UP_NAMESPACE, &resource);
        objects
            .delete_collection(&DeleteParams::background(), &ListParams::default())
            .await?;
        let gone = |seen: &Seen| seen.objects.is_empty() && seen.pods.is_empty();
        self.until(Some(&watch), SOON, "removing the warm-up", gone)
            .await?;
        sleep(SETTLE).await;
        Ok(())
    }

    /// Creates every object at once and waits until all are Ready.
    async fn burst(&mut self) -> anyhow::Result<Burst> {
        let count = self.settings.deployments;
        say(self.subject, &format!("creating {count} objects"));
        let begun = Instant::now();
        let create = stream::iter(0..count)
            .map(|index| self.create(index, format!("bench-{index}")))
            .buffer_unordered(CREATIONS)
            .try_collect::<()>();
        timeout(self.settings.within, create)
            .await
            .context("creating the objects took too long")??;
        let created = begun.elapsed();
        let within = self.settings.within;
        let ready = move |seen: &Seen| seen.ready() >= count;
        self.until(None, within, "the burst", ready).await?;
        self.watch.look(|seen| {
            let after = |moment: Option<Instant>| {
                moment.map_or(0.0, |moment| rounded((moment - begun).as_secs_f64()))
            };
            let ready = || seen.moments.values().filter_map(|moments| moments.ready);
            if seen.pods_made != count * PODS_EACH {
                bail!("{} pods were made for {count} objects", seen.pods_made);
            }
            let (first_pod, ready_after) = times(seen, |_| true);
            Ok(Burst {
                created_seconds: rounded(created.as_secs_f64()),
                all_pods_seconds: after(seen.last_pod),
                first_ready_seconds: after(ready().min()),
                all_ready_seconds: after(ready().max()),
                first_pod_milliseconds: first_pod,
                ready_milliseconds: ready_after,
            })
        })
    }

    async fn create(&self, index: usize, name: String) -> anyhow::Result<()> {
        let namespace = format!("{NAMESPACE}{}", index % self.settings.namespaces);
        self.subject
            .create(&self.plane.client, &namespace, &name, self.pod.as_ref())
            .await?;
        self.watch.created(&name);
        Ok(())
    }

    /// Leaves everything alone for some time.
    async fn rest(&mut self, before: &Snapshot) -> anyhow::Result<(Rest, Snapshot)> {
        let time = self.settings.rest;
        say(self.subject, &format!("resting {} s", time.as_secs()));
        sleep(time).await;
        self.check()?;
        let after = self.snapshot().await?;
        let counters = after.counters.since(&before.counters);
        let rest = Rest {
            seconds: rounded((after.at - before.at).as_secs_f64()),
            writes: counters.all_writes(),
            rounds: counters.rounds,
            cpu_seconds: rounded(after.controller.cpu_seconds - before.controller.cpu_seconds),
        };
        Ok((rest, after))
    }

    /// Creates more objects, one after another.
    async fn one_by_one(&mut self) -> anyhow::Result<OneByOne> {
        let count = self.settings.singly;
        say(self.subject, &format!("creating {count} more, one by one"));
        for index in 0..count {
            let name = format!("single-{index}");
            self.create(index, name.clone()).await?;
            let ready = move |seen: &Seen| {
                let moments = seen.moments.get(&name);
                moments.is_some_and(|moments| moments.ready.is_some())
            };
            self.until(None, SOON, "one object", ready).await?;
        }
        let (first_pod, ready) = self
            .watch
            .look(|seen| times(seen, |name| name.starts_with("single-")));
        Ok(OneByOne {
            objects: count,
            first_pod_milliseconds: first_pod,
            ready_milliseconds: ready,
        })
    }

    /// Some pod that the controller made.
    async fn any_pod(&self) -> anyhow::Result<Option<Value>> {
        let pods: Api<Pod> = Api::namespaced(self.plane.client.clone(), &format!("{NAMESPACE}0"));
        let list = pods.list(&ListParams::default().limit(1)).await?;
        let pod = list.items.first().map(serde_json::to_value);
        Ok(pod.transpose()?)
    }

    /// Ends the controller, starts it again, and waits until every object had a round.
    async fn restart(self) -> anyhow::Result<(Self, Restart)> {
        say(self.subject, "restarting the controller");
        let Bench {
            settings,
            subject,
            mut plane,
            controller,
            watch,
            pod,
        } = self;
        controller.process.stop().await?;
        let begun = Instant::now();
        let controller = subject.start(&mut plane, settings.parts.programs, settings.operator)?;
        let mut bench = Bench {
            settings,
            subject,
            plane,
            controller,
            watch,
            pod,
        };
        let wanted = u64::try_from(settings.deployments + settings.singly)?;
        let counters = loop {
            bench.check()?;
            match bench.controller.counters(&bench.plane).await {
                Ok(counters) if counters.objects >= wanted => break counters,
                other if begun.elapsed() > settings.within => {
                    bail!("the controller did not see every object again: {other:?}");
                }
                _ => sleep(LOOK_EVERY).await,
            }
        };
        let synced = begun.elapsed();
        let usage = bench.controller.process.usage()?;
        let restart = Restart {
            synced_seconds: rounded(synced.as_secs_f64()),
            cpu_seconds: rounded(usage.cpu_seconds),
            writes: counters.all_writes(),
            rss_megabytes: megabytes(usage.rss_bytes),
        };
        Ok((bench, restart))
    }
}

/// From creation to the first pod, and to Ready, of the objects that `which` names.
fn times(seen: &Seen, which: impl Fn(&str) -> bool) -> (Percentiles, Percentiles) {
    let (mut pods, mut ready) = (Vec::new(), Vec::new());
    for (_, moments) in seen.moments.iter().filter(|(name, _)| which(name)) {
        // The watch may tell of a pod before the creation's answer is read.
        let after =
            |moment: Option<Instant>| Some(moment?.saturating_duration_since(moments.created?));
        pods.extend(after(moments.first_pod));
        ready.extend(after(moments.ready));
    }
    (Percentiles::of(&pods), Percentiles::of(&ready))
}
