//! Tells the end of a job to the address that its sender gave: the whole job, as often as it takes for a day.
//!
//! Three tries come quickly, as RunPod makes them; the later ones follow the schedule of Standard Webhooks. A
//! delivery that was sent and not recorded is sent again: receivers tell the same message by its id.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::{Client, StatusCode, Url, header, redirect};
use serde_json::Value;
use standardwebhooks::{HEADER_WEBHOOK_ID, HEADER_WEBHOOK_SIGNATURE, HEADER_WEBHOOK_TIMESTAMP, Webhook};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Gateway;
use super::config::Secret;
use super::store::Delivery;
use crate::faults::kill_point;
use crate::inputs::{Guard, chain, check_url};
use crate::job::{Code, JobError};

/// Deliveries under way at once.
const AT_ONCE: usize = 16;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How late a delivery may be that was put off before this process began.
const PERIOD_AT_REST: Duration = Duration::from_secs(30);
/// By so much the clock that the store goes by may lag behind this process' own.
const CLOCK_SLACK: Duration = Duration::from_millis(50);
/// The longest pause that a receiver can ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// How webhooks are sent.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Signs them, in the form `whsec_…`.
    pub secret: Option<Secret>,
    /// Let them lead to private addresses; for development.
    pub allow_private_urls: bool,
    /// For one try.
    pub timeout: Duration,
    /// The pauses before the second try, the third, and so on; after the last, the sender is not told.
    pub pauses: Vec<Duration>,
}

/// Two quick tries after the first, then those of Standard Webhooks until a day has passed.
pub const PAUSE_SECONDS: [u64; 10] = [10, 10, 280, 1500, 5400, 10_800, 18_000, 14_400, 21_600, 14_400];

/// Whether `secret` can sign.
///
/// # Errors
/// [`Code::InvalidInput`], which does not show it.
pub fn check_secret(secret: &Secret) -> Result<(), JobError> {
    let expected = "`WEBHOOK_SECRET` (--webhook-secret) is not whsec_ and base64";
    let invalid = || JobError::new(Code::InvalidInput, expected).with_reason("CONFIG");
    Webhook::new(secret.expose()).map(drop).map_err(|_| invalid())
}

/// Delivers webhooks, for as long as the gateway lives. `changed` is rung when a job has ended.
pub async fn run(gateway: Arc<Gateway>, settings: Settings, changed: Arc<Notify>) {
    let sender = Arc::new(Sender { gateway, settings });
    let mut client = None;
    let (mut under_way, mut tries) = (HashSet::new(), JoinSet::new());
    let mut due = Instant::now();
    loop {
        match sender.gateway.store.due_deliveries(AT_ONCE + under_way.len()) {
            Ok(deliveries) => {
                for delivery in deliveries {
                    if tries.len() >= AT_ONCE || !under_way.insert(delivery.job.id.clone()) {
                        continue;
                    }
                    // Its certificates take megabytes, so it is made for the first webhook.
                    let made = match &client {
                        Some(client) => Ok(Client::clone(client)),
                        None => sender.client().map(|made| client.insert(made).clone()),
                    };
                    tries.spawn(sender.clone().deliver(made, delivery));
                }
            }
            Err(e) => tracing::error!("due webhooks cannot be read: {e}"),
        }
        tokio::select! {
            () = changed.notified() => {}
            Some(ended) = tries.join_next() => {
                if let Ok((job, next)) = ended {
                    under_way.remove(&job);
                    due = next.map_or(due, |pause| due.min(Instant::now() + pause + CLOCK_SLACK));
                }
            }
            () = tokio::time::sleep_until(due) => due = Instant::now() + PERIOD_AT_REST,
        }
    }
}

/// What became of a try.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// The receiver has it.
    Received,
    /// The receiver wants no more of them.
    Gone,
    /// Why not, and after which time the receiver wants the next.
    Failed(String, Option<Duration>),
}

struct Sender {
    gateway: Arc<Gateway>,
    settings: Settings,
}

impl Sender {
    fn client(&self) -> Result<Client, JobError> {
        Client::builder()
            .no_proxy()
            .referer(false)
            .redirect(redirect::Policy::none())
            .dns_resolver(Guard { allow_private: self.settings.allow_private_urls })
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(self.settings.timeout)
            // A kept connection would outlive the check of its address.
            .pool_max_idle_per_host(0)
            .user_agent(concat!("talkie/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| JobError::new(Code::Internal, format!("HTTPS cannot be set up: {}", chain(&e))))
    }

    /// Makes one try and records it. The job, and when the next try is.
    async fn deliver(
        self: Arc<Self>,
        client: Result<Client, JobError>,
        delivery: Delivery,
    ) -> (String, Option<Duration>) {
        let (job, tries) = (delivery.job.id.clone(), delivery.tries);
        let answer = match client {
            Ok(client) => self.send(&client, delivery).await,
            Err(e) => Answer::Failed(e.to_string(), None),
        };
        kill_point("K10");
        let next = next_try(&self.settings.pauses, tries, &answer);
        match (&answer, next) {
            (Answer::Received, _) => tracing::debug!(job, "the webhook of job {job} was received"),
            (Answer::Gone, _) => tracing::info!(job, "the webhook of job {job} is not wanted any more"),
            (Answer::Failed(why, _), Some(next)) => {
                tracing::info!(job, "the webhook of job {job} failed: {why}; next try in {next:?}");
            }
            (Answer::Failed(why, _), None) => {
                tracing::warn!(job, "the webhook of job {job} is given up: {why}");
            }
        }
        if let Err(e) = self.gateway.store.record_delivery(&job, next).await {
            tracing::error!(job, "the webhook of job {job} will be sent again: {e}");
            return (job, Some(PERIOD_AT_REST));
        }
        (job, next)
    }

    async fn send(&self, client: &Client, delivery: Delivery) -> Answer {
        let id = format!("msg_{}_{}", delivery.job.id, delivery.job.finished_ms.unwrap_or_default());
        let Some(url) = delivery.job.webhook.clone() else { return Answer::Gone };
        let failed = |why: String| Answer::Failed(why, None);
        let url = match Url::parse(&url) {
            Ok(url) => url,
            Err(e) => return failed(format!("its address is not a URL ({e})")),
        };
        if let Err(refused) = check_url(&url, self.settings.allow_private_urls) {
            return failed(format!("its address {refused}"));
        }
        let body = match self.body(delivery).await {
            Ok(body) => body,
            Err(e) => return failed(e.to_string()),
        };
        let mut request = client.post(url).header(header::CONTENT_TYPE, "application/json");
        if let Some(secret) = &self.settings.secret {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let now = i64::try_from(now).unwrap_or(i64::MAX);
            let signed = Webhook::new(secret.expose()).and_then(|key| key.sign(&id, now, body.as_bytes()));
            let signature = match signed {
                Ok(signature) => signature,
                Err(e) => return failed(format!("it cannot be signed: {e}")),
            };
            request = request.header(HEADER_WEBHOOK_TIMESTAMP, now);
            request = request.header(HEADER_WEBHOOK_SIGNATURE, signature);
        }
        match request.header(HEADER_WEBHOOK_ID, id).body(body).send().await {
            Ok(response) => answer(response.status(), response.headers().get(header::RETRY_AFTER)),
            // The URL is left out: its query may hold a secret.
            Err(e) => failed(chain(&e.without_url())),
        }
    }

    /// The whole job: as its status, with its input and its webhook.
    async fn body(&self, delivery: Delivery) -> Result<String, JobError> {
        let gateway = self.gateway.clone();
        let made = tokio::task::spawn_blocking(move || {
            let broken = |e| JobError::new(Code::Internal, format!("a stored job is not JSON: {e}"));
            let mut request: Value = serde_json::from_str(&delivery.request).map_err(broken)?;
            gateway.media.restore(&delivery.job.id, &mut request)?;
            let view = gateway.view(&delivery.job).map_err(broken)?;
            let mut body = serde_json::to_value(view).map_err(broken)?;
            if let Some(fields) = body.as_object_mut() {
                fields.insert("input".to_string(), request.get("input").cloned().unwrap_or(Value::Null));
                fields.insert("webhook".to_string(), delivery.job.webhook.into());
            }
            Ok(body.to_string())
        });
        made.await.unwrap_or_else(|e| Err(JobError::new(Code::Internal, format!("a job was not read: {e}"))))
    }
}

fn answer(status: StatusCode, retry_after: Option<&header::HeaderValue>) -> Answer {
    if status.is_success() {
        return Answer::Received;
    }
    if status == StatusCode::GONE {
        return Answer::Gone;
    }
    let seconds = retry_after.and_then(|value| value.to_str().ok()).and_then(|text| text.parse().ok());
    Answer::Failed(format!("it was answered with {status}"), seconds.map(Duration::from_secs))
}

/// When the next try is after `tries` and one more.
fn next_try(pauses: &[Duration], tries: u32, answer: &Answer) -> Option<Duration> {
    let Answer::Failed(_, asked) = answer else { return None };
    let pause = pauses.get(usize::try_from(tries).ok()?)?;
    Some(asked.map_or(*pause, |asked| asked.min(LONGEST_PAUSE).max(*pause)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn default_pauses() -> Vec<Duration> {
        PAUSE_SECONDS.map(Duration::from_secs).to_vec()
    }

    #[test]
    fn three_quick_tries_and_then_a_day() {
        let failed = Answer::Failed("no".to_string(), None);
        let mut passed = vec![Duration::ZERO];
        for tries in 0.. {
            let Some(pause) = next_try(&default_pauses(), tries, &failed) else { break };
            passed.push(passed[passed.len() - 1] + pause);
        }
        let hours = |h: u64| h * 3600;
        let expected = [0, 10, 20, 300, 1800, hours(2), hours(5), hours(10), hours(14), hours(20), hours(24)];
        assert_eq!(passed, expected.map(Duration::from_secs));
    }

    #[test]
    fn a_receiver_can_end_or_slow_the_tries() {
        let pauses = default_pauses();
        assert_eq!(next_try(&pauses, 0, &answer(StatusCode::OK, None)), None);
        assert_eq!(next_try(&pauses, 0, &answer(StatusCode::GONE, None)), None);
        let asked = |seconds: &str| {
            let header = seconds.parse().unwrap();
            next_try(&pauses, 0, &answer(StatusCode::TOO_MANY_REQUESTS, Some(&header)))
        };
        assert_eq!(asked("60"), Some(Duration::from_secs(60)));
        assert_eq!(asked("1"), Some(Duration::from_secs(10)));
        assert_eq!(asked("99999999"), Some(LONGEST_PAUSE));
        let moved = answer(StatusCode::FOUND, None);
        assert_eq!(next_try(&pauses, 0, &moved), Some(Duration::from_secs(10)));
    }
}
