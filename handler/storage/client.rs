//! The S3 client: how long it waits, what it tries again, and what time it is over there.

use std::error::Error as StdError;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::{ClassifyRetry, RetryAction, RetryConfig, RetryPartition, TokenBucket};
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Config, ConfigBag, Credentials, Intercept, Region, RequestChecksumCalculation,
    ResponseChecksumValidation, RuntimeComponents,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_http_client::tls;
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::dns::{DnsFuture, ResolveDns, ResolveDnsError};
use aws_smithy_runtime_api::client::interceptors::context::{
    BeforeDeserializationInterceptorContextRef, InterceptorContext,
};
use aws_smithy_runtime_api::client::interceptors::dyn_dispatch_hint;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::retries::classifiers::RetryClassifierPriority;
use reqwest::Url;
use tracing::instrument::WithSubscriber;
use tracing::subscriber::NoSubscriber;

use super::settings::StorageSettings;
use crate::inputs::{Refused, chain, is_public};

/// A clock that is off by less does not matter: signatures hold for 15 minutes to either side.
const SKEW_THAT_MATTERS: i64 = 60;

/// How uploads are cut, and how long anything is waited for. The default is for real stores.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// The largest file that is sent in one request.
    pub put_limit: u64,
    /// Bytes of each part of a larger one; R2 wants them equal.
    pub part_size: u64,
    /// Parts that are under way at once.
    pub parts_at_once: usize,
    /// Tries of one request, in quick succession.
    pub attempts: u32,
    /// The wait before the second try is random, up to this; it doubles from try to try.
    pub initial_backoff: Duration,
    /// The longest wait between two tries; also for a store that names a time.
    pub max_backoff: Duration,
    /// How often such tries are begun anew.
    pub rounds: u32,
    /// The wait before the second round is random, between half of this and this; it doubles too.
    pub round_pause: Duration,
    /// For a connection.
    pub connect_timeout: Duration,
    /// For the answer to a request that carries no file.
    pub call_timeout: Duration,
    /// For a request that carries up to `put_limit` bytes.
    pub upload_timeout: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            put_limit: 64 << 20,
            part_size: 16 << 20,
            parts_at_once: 3,
            attempts: 4,
            initial_backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(20),
            rounds: 3,
            round_pause: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            call_timeout: Duration::from_secs(30),
            upload_timeout: Duration::from_secs(120),
        }
    }
}

/// Clients of one store, which differ in how long they wait and for which host they sign.
#[derive(Clone, Debug)]
pub(super) struct Clients {
    /// For requests without a file.
    pub(super) calls: Client,
    /// For requests with one.
    pub(super) uploads: Client,
    /// For links.
    pub(super) links: Client,
    /// What the store's answers say about the time.
    pub(super) clock: Clock,
}

impl Clients {
    /// `only_public` keeps the client from addresses inside the network; for stores that a request names.
    pub(super) fn new(settings: &StorageSettings, tuning: &Tuning, only_public: bool) -> Self {
        let clock = Clock::default();
        let timeouts = |answer: Duration| {
            TimeoutConfig::builder()
                .connect_timeout(tuning.connect_timeout)
                .read_timeout(answer)
                .operation_attempt_timeout(answer)
                .operation_timeout(answer * (tuning.attempts + 1))
                .build()
        };
        let credentials = Credentials::new(
            &settings.credentials.access_key_id,
            settings.credentials.secret_access_key.expose(),
            settings.credentials.session_token.as_ref().map(|token| token.expose().to_string()),
            None,
            "talkie",
        );
        let retries = RetryConfig::standard()
            .with_max_attempts(tuning.attempts)
            .with_initial_backoff(tuning.initial_backoff)
            .with_max_backoff(tuning.max_backoff);
        let mut config = Config::builder()
            // Pinned: a newer version may change what is sent.
            .behavior_version(BehaviorVersion::v2026_01_12())
            .region(Region::new(settings.region.clone()))
            .endpoint_url(without_slash(&settings.endpoint))
            .credentials_provider(credentials)
            .force_path_style(true)
            // R2 does not take the checksums that are sent by default; Content-MD5 it does.
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .retry_config(retries)
            // The quota of retries that all clients of a process share by default is dry after some thirty
            // failures, in the very outage that it would be needed in.
            .retry_partition(RetryPartition::custom("talkie").token_bucket(TokenBucket::unlimited()).build())
            .retry_classifier(RetryLikeR2)
            .interceptor(clock.clone());
        if only_public {
            let client = aws_smithy_http_client::Builder::new()
                .tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::AwsLc))
                .build_with_resolver(PublicOnly);
            config = config.http_client(client);
        }
        let with = |answer| Client::from_conf(config.clone().timeout_config(timeouts(answer)).build());
        let links = config.clone().endpoint_url(without_slash(&settings.public_url));
        Self {
            calls: with(tuning.call_timeout),
            uploads: with(tuning.upload_timeout),
            links: Client::from_conf(links.build()),
            clock,
        }
    }
}

fn without_slash(url: &Url) -> &str {
    url.as_str().trim_end_matches('/')
}

/// Runs a call of the SDK without its log lines, which hold whole requests with their signatures.
pub(super) async fn quietly<T>(call: impl Future<Output = T>) -> T {
    call.with_subscriber(NoSubscriber::default()).await
}

/// The time at the store, from the `Date` of its answers. A link that is signed by a clock that is wrong does
/// not open, and a sweeper with one would delete what is not due.
#[derive(Clone, Debug, Default)]
pub(super) struct Clock {
    skew: Arc<AtomicI64>,
    known: Arc<AtomicBool>,
    alarmed: Arc<AtomicBool>,
}

impl Clock {
    /// Whether the store has answered yet.
    pub(super) fn is_known(&self) -> bool {
        self.known.load(Ordering::Relaxed)
    }

    /// Now, in seconds since 1970.
    pub(super) fn now(&self) -> u64 {
        let skew = self.skew.load(Ordering::Relaxed);
        if skew != 0 && !self.alarmed.swap(true, Ordering::Relaxed) {
            tracing::error!(skew_s = skew, "the clock of this machine is {} s off the store's", skew.abs());
        }
        seconds(SystemTime::now()).saturating_add_signed(skew)
    }

    fn learn(&self, date: &str) {
        use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};
        let Ok(date) = DateTime::from_str(date, DateTimeFormat::HttpDate) else { return };
        let skew = date.secs() - seconds(SystemTime::now()) as i64;
        self.skew.store(if skew.abs() > SKEW_THAT_MATTERS { skew } else { 0 }, Ordering::Relaxed);
        self.known.store(true, Ordering::Relaxed);
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[dyn_dispatch_hint]
impl Intercept for Clock {
    fn name(&self) -> &'static str {
        "talkie::Clock"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if let Some(date) = context.response().headers().get("date") {
            self.learn(date);
        }
        Ok(())
    }
}

/// What the SDK does not try again of itself: R2's 429, the 52x of the edge in front of it, and a
/// `Retry-After` is kept to.
#[derive(Debug)]
struct RetryLikeR2;

impl ClassifyRetry for RetryLikeR2 {
    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        use aws_smithy_runtime_api::client::retries::ErrorKind;
        let Some(response) = context.response() else { return RetryAction::NoActionIndicated };
        let kind = match response.status().as_u16() {
            429 => ErrorKind::ThrottlingError,
            status if is_passing(status) => ErrorKind::ServerError,
            _ => return RetryAction::NoActionIndicated,
        };
        let wait = response.headers().get("retry-after").and_then(|text| text.trim().parse().ok());
        match wait.map(Duration::from_secs) {
            Some(wait) => RetryAction::retryable_error_with_explicit_delay(kind, wait),
            None => RetryAction::retryable_error(kind),
        }
    }

    fn name(&self) -> &'static str {
        "talkie::RetryLikeR2"
    }

    fn priority(&self) -> RetryClassifierPriority {
        RetryClassifierPriority::run_after(RetryClassifierPriority::transient_error_classifier())
    }
}

/// Whether an answer says that another try may do.
fn is_passing(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502..=599)
}

/// Resolves names, and refuses those that lead inside.
#[derive(Clone, Debug)]
struct PublicOnly;

impl ResolveDns for PublicOnly {
    fn resolve_dns<'a>(&'a self, name: &'a str) -> DnsFuture<'a> {
        DnsFuture::new(async move {
            let found = tokio::net::lookup_host((name, 0)).await.map_err(ResolveDnsError::new)?;
            let found: Vec<IpAddr> = found.map(|address| address.ip()).collect();
            match found.iter().all(|address| is_public(*address)) {
                true => Ok(found),
                false => Err(ResolveDnsError::new(Refused("has a name that leads inside".to_string()))),
            }
        })
    }
}

/// Why a request to the store did not do.
#[derive(Debug)]
pub(super) struct Failure {
    /// What was tried and what came of it, without anything that signs.
    pub(super) message: String,
    /// The status of the answer, if there was one.
    pub(super) status: Option<u16>,
    /// The store's own word for it.
    pub(super) code: Option<String>,
    /// Whether another try may do.
    pub(super) passing: bool,
    /// The address was refused.
    pub(super) refused: bool,
}

impl Failure {
    /// Of the attempt to `what`.
    pub(super) fn new<E>(what: &str, error: &SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + StdError + 'static,
    {
        let status = error.raw_response().map(|response| response.status().as_u16());
        let meta = error.as_service_error().map(ProvideErrorMetadata::meta);
        let code = meta.and_then(|meta| meta.code()).map(str::to_string);
        let refused =
            std::iter::successors(Some(error as &(dyn StdError + 'static)), |e| StdError::source(*e))
                .any(|e| e.is::<Refused>());
        let passing = match status {
            // S3 answers 200 before it knows, and may then send an error.
            Some(200) => true,
            Some(status) => is_passing(status) || code.as_deref() == Some("RequestTimeout"),
            None => !refused && !matches!(error, SdkError::ConstructionFailure(_)),
        };
        let reason = match (status, &code) {
            (Some(status), Some(code)) => {
                let text = meta.and_then(|meta| meta.message()).unwrap_or_default();
                format!("the store answered {status} {code} {text}").trim_end().to_string()
            }
            (Some(status), None) => format!("the store answered {status}"),
            (None, _) => chain(error),
        };
        Self { message: format!("{what}: {reason}"), status, code, passing, refused }
    }

    /// Of something that happened here.
    pub(super) fn local(message: String) -> Self {
        Self { message, status: None, code: None, passing: false, refused: false }
    }

    /// Whether the store may have done what was asked although it did not say so, in this try or in one
    /// before it: a second write of a key may be refused as too soon, and an upload that is complete is gone.
    pub(super) fn may_have_worked(&self) -> bool {
        (self.passing && !self.refused) || self.code.as_deref() == Some("NoSuchUpload")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::config::Secret;
    use crate::job::Code;
    use crate::storage::Storage;
    use crate::storage::settings::{Credentials, Lifetimes};

    /// A store that a request names may have a public name and an address inside.
    #[tokio::test]
    async fn a_name_that_leads_inside_is_not_followed() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint =
            Url::parse(&format!("http://localhost:{}", listener.local_addr().unwrap().port())).unwrap();
        let credentials = Credentials {
            access_key_id: "key".to_string(),
            secret_access_key: Secret::new("secret".to_string()),
            session_token: None,
        };
        let settings = StorageSettings {
            public_url: endpoint.clone(),
            endpoint,
            region: "auto".to_string(),
            bucket: "talk".to_string(),
            credentials,
            lifetimes: Lifetimes::default(),
        };
        let tuning = Tuning {
            initial_backoff: Duration::from_millis(1),
            call_timeout: Duration::from_secs(5),
            ..Tuning::default()
        };
        let storage = Storage {
            clients: Clients::new(&settings, &tuning, true),
            settings: Arc::new(settings),
            tuning: Arc::new(tuning),
        };
        let error = storage.check().await.unwrap_err();
        assert!(error.code == Code::UrlNotAllowed && !error.retryable, "{error:?}");
        let connected = tokio::time::timeout(Duration::from_millis(1), listener.accept()).await;
        assert!(connected.is_err(), "no connection was made");
    }

    #[test]
    fn the_clock_follows_the_store_where_that_matters() {
        let clock = Clock::default();
        let here = seconds(SystemTime::now());
        let learn = |ahead: i64| {
            use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};
            let there = DateTime::from_secs(seconds(SystemTime::now()) as i64 + ahead);
            clock.learn(&there.fmt(DateTimeFormat::HttpDate).unwrap());
            clock.now() as i64 - here as i64
        };
        assert!(!clock.is_known());
        assert!((0..10).contains(&learn(30)) && clock.is_known());
        assert!((1195..1210).contains(&learn(1200)));
        assert!((-86_405..-86_390).contains(&learn(-86_400)));
        assert!((0..10).contains(&learn(0)), "a clock that was set is believed again");
        clock.learn("yesterday");
        assert!((0..10).contains(&(clock.now() as i64 - here as i64)));
    }
}
