//! The thread that tells the platform that this worker lives. It shares nothing with the job loop but the list of
//! jobs, so that neither a busy loop nor a blocked one silences it; only a generation that no longer moves does.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::held::Held;
use super::platform::{Endpoints, NoReply, Platform, Reply};

/// A failing platform is complained about this often.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// Sends pings until it is dropped.
#[derive(Debug)]
pub struct Heartbeat(#[expect(dead_code, reason = "its drop ends the thread")] DropGuard);

impl Heartbeat {
    /// Starts the thread. It is silent while `defect` says that no job can be run: a heartbeat that goes on would
    /// tell the platform that all is well.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(
        endpoints: &Endpoints,
        held: Held,
        defect: impl Fn() -> Option<String> + Send + 'static,
    ) -> io::Result<Self> {
        let over = CancellationToken::new();
        let (endpoints, ended) = (endpoints.clone(), over.clone());
        thread::Builder::new().name("heartbeat".to_string()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let interval = endpoints.ping_interval;
            match (runtime, Platform::new(endpoints.into(), interval)) {
                (Ok(runtime), Ok(platform)) => {
                    let beat = Beat { platform, held, defect, complained: None };
                    runtime.block_on(async {
                        tokio::select! { () = ended.cancelled() => {}, () = beat.run(interval) => {} }
                    });
                }
                (Err(e), _) => tracing::error!(%e, "no heartbeat is sent"),
                (_, Err(e)) => tracing::error!(%e, "no heartbeat is sent"),
            }
        })?;
        Ok(Self(over.drop_guard()))
    }
}

struct Beat<D> {
    platform: Platform,
    held: Held,
    defect: D,
    complained: Option<Instant>,
}

impl<D: Fn() -> Option<String>> Beat<D> {
    async fn run(mut self, interval: Duration) {
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Some(reason) = (self.defect)() {
                self.complain(&format!("no heartbeat: {reason}"));
                continue;
            }
            match self.platform.ping(&self.held.ids()).await {
                None => return,
                Some(Ok(Reply { status: 200..=299, .. })) => self.complained = None,
                Some(Ok(reply)) => {
                    self.complain(&format!("the heartbeat was answered with {}", reply.status))
                }
                Some(Err(NoReply::TimedOut)) => self.complain("the heartbeat was not answered in time"),
                Some(Err(NoReply::Failed(why))) => self.complain(&format!("the heartbeat failed: {why}")),
            }
        }
    }

    fn complain(&mut self, what: &str) {
        if self.complained.is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY) {
            tracing::warn!("{what}");
            self.complained = Some(Instant::now());
        }
    }
}
