//! The gateway: RunPod's endpoint API on anyone's machine, and the workers behind it.
//!
//! One router serves clients and workers, in RunPod's own protocol on both sides. Jobs are in the [`store`]
//! before their sender hears of them; the [`pool`] starts `handler worker` when one waits and stops it when
//! none does; the [`hub`] wakes whoever waits for a change.

pub mod admission;
pub mod auth;
mod bucket;
pub mod config;
pub mod error;
pub mod events;
pub mod hub;
pub mod key;
pub mod media;
pub mod metrics;
pub mod openapi;
pub mod pool;
pub mod quota;
pub mod routes;
pub mod server;
pub mod store;
pub mod sweeper;
pub mod webhook;

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::value::RawValue;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::job::{JobError, JobStatus};
use crate::runpod::protocol::JobView;
use crate::storage::Storage;
use crate::storage::embedded::Embedded;
use admission::Admission;
use auth::Auth;
use bucket::Bucket;
use config::ServeConfig;
use hub::Hub;
use media::MediaFolder;
use pool::{Launch, Pool, World};
use store::{JobRecord, OnChange, Store};

/// How long the lock of the data folder is waited for, and between two tries.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// What every route can reach.
pub struct Gateway {
    /// The settings.
    pub config: ServeConfig,
    /// The accepted jobs.
    pub store: Store,
    /// Who waits for what.
    pub hub: Hub,
    /// The workers.
    pub pool: Pool,
    /// Who may do what.
    pub auth: Auth,
    /// The large texts of accepted jobs.
    pub media: MediaFolder,
    /// What becomes a job.
    pub admission: Admission,
    /// Where finished videos go, unless that store is served here.
    bucket: Option<Bucket>,
}

impl Gateway {
    /// `job` as clients see it.
    ///
    /// # Errors
    /// When its output is not JSON.
    pub fn view(&self, job: &JobRecord) -> serde_json::Result<JobView> {
        let between = |from: i64, to: i64| u64::try_from(to - from).unwrap_or(0);
        let output = match job.status {
            JobStatus::InProgress => self.hub.progress(&job.id).map(|progress| progress.to_string()),
            _ => job.output.clone(),
        };
        Ok(JobView {
            id: job.id.clone(),
            status: job.status,
            delay_time: job.started_ms.map(|started| between(job.created_ms, started)),
            execution_time: job.started_ms.zip(job.finished_ms).map(|(start, end)| between(start, end)),
            worker_id: job.worker.clone(),
            retries: job.retries,
            output: output.map(RawValue::from_string).transpose()?,
            error: job.error.clone(),
        })
    }
}

/// How a gateway behaves, beside what its routes have to know.
pub struct Setup {
    /// What the routes have to know.
    pub config: ServeConfig,
    /// How jobs are kept.
    pub store: store::Options,
    /// How workers are kept.
    pub pool: pool::Settings,
    /// What a worker is.
    pub launch: Launch,
    /// How webhooks are sent.
    pub webhooks: webhook::Settings,
    /// The bucket from which expired videos are deleted.
    pub storage: Storage,
    /// The store that is served here, where no other is configured.
    pub embedded: Option<Embedded>,
}

/// A gateway and what it does by itself.
pub struct Running {
    /// What every route can reach.
    pub gateway: Arc<Gateway>,
    tasks: JoinSet<()>,
    embedded: Option<Embedded>,
}

impl Running {
    /// Opens the store and begins to look after its jobs, on the runtime that this is called in.
    ///
    /// # Errors
    /// Those of [`Store::open`], [`MediaFolder::open`] and [`Pool::start`].
    pub fn start(setup: Setup) -> Result<Self, JobError> {
        let Setup { config, store: options, pool: settings, launch, webhooks, storage, embedded } = setup;
        let (hub, bells) = (Hub::default(), Bells::default());
        let store = open_store(&config.data_dir, &options, || bells.on_change(hub.clone()))?;
        let media = MediaFolder::open(&config.data_dir.join("media"))?;
        // Nothing is being accepted yet. A job that cannot be looked up may be there.
        media.remove_orphans(|job| !matches!(store.job(job), Ok(None)));
        let (bell, data_dir, spool) = (bells.pool, config.data_dir.clone(), config::spool(&config.data_dir));
        let world = World { store: store.clone(), hub: hub.clone(), bell, data_dir };
        let pool = Pool::start(world, launch, settings)?;
        let auth = Auth::new(&config, store.clone(), pool.clone())?;
        let bucket = embedded.is_none().then(|| Bucket::new(storage.clone()));
        let admission = Admission::default();
        let gateway = Arc::new(Gateway { config, store, hub, pool, auth, media, admission, bucket });
        let mut tasks = JoinSet::new();
        tasks.spawn(sweeper::run(gateway.clone(), bells.sweeper));
        tasks.spawn(webhook::run(gateway.clone(), webhooks, bells.webhooks));
        tasks.spawn(sweeper::sweep_bucket(storage, spool));
        Ok(Self { gateway, tasks, embedded })
    }

    /// Everything that is served.
    pub fn router(&self) -> axum::Router {
        let mut router = routes::router(&self.gateway);
        if let Some(embedded) = &self.embedded {
            let path = format!("/{}", crate::storage::embedded::BUCKET);
            let service = embedded.router().into_service();
            router = router.route_service(&path, service.clone());
            router = router.route_service(&format!("{path}/"), service.clone());
            router = router.route_service(&format!("{path}/{{*key}}"), service);
        }
        router
    }

    /// Ends everything but the pool, which has to be shut down before, and closes the store.
    pub async fn close(mut self) {
        self.tasks.shutdown().await;
        self.gateway.store.close().await;
    }
}

/// Opens the store. A gateway that is killed while it starts a worker leaves its lock with the child that is not
/// yet a program of its own, which then ends; whoever restarts the gateway at once must not be refused for that.
fn open_store(
    dir: &Path,
    options: &store::Options,
    on_change: impl Fn() -> OnChange,
) -> Result<Store, JobError> {
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match Store::open(dir, options.clone(), on_change()) {
            Err(e) if e.details.get("reason").is_some_and(|reason| reason == "STORE_IN_USE") => {
                if Instant::now() >= until {
                    return Err(e);
                }
                thread::sleep(LOCK_PAUSE);
            }
            opened => return opened,
        }
    }
}

/// Rung when a job changes, one for each who has to look.
#[derive(Default)]
struct Bells {
    pool: Arc<Notify>,
    sweeper: Arc<Notify>,
    webhooks: Arc<Notify>,
}

impl Bells {
    /// What follows from a change that is on disk.
    fn on_change(&self, hub: Hub) -> OnChange {
        let (pool, sweeper, webhooks) = (self.pool.clone(), self.sweeper.clone(), self.webhooks.clone());
        Box::new(move |job, status| {
            match status {
                JobStatus::InQueue => {
                    hub.wake_workers();
                    pool.notify_one();
                    sweeper.notify_one();
                }
                JobStatus::InProgress => sweeper.notify_one(),
                _ => {
                    hub.clear_progress(job);
                    webhooks.notify_one();
                    sweeper.notify_one();
                }
            }
            hub.job_changed(job);
        })
    }
}
