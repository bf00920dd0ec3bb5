//! A store on a real socket, with a wire that can be cut at any request.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
};
use axum::body::Body;
use clap::Parser;
use handler::storage::embedded::{Embedded, Rules};
use handler::storage::{
    KeptVideo, Lifetimes, Publication, Published, Storage, StorageArgs, StorageSettings, Tuning, VideoSpool,
};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use reqwest::Url;
use serde_json::json;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tower::ServiceExt;

/// S3 takes no smaller parts.
pub const PART: u64 = 5 << 20;

/// What the wire does with a request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Passes it on.
    None,
    /// Answers in the store's place.
    Answer(u16, Vec<(&'static str, String)>, String),
    /// Cuts the connection before the store has seen anything.
    Cut,
    /// Cuts it when the store has done its work.
    LoseReply,
    /// Says nothing any more.
    Hang,
    /// Passes it on, and answers with another date.
    Date(String),
}

impl Fault {
    /// An error as S3 writes them.
    pub fn error(status: u16, code: &str) -> Self {
        let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>m</Message></Error>");
        Self::Answer(status, vec![("content-type", "application/xml".to_string())], body)
    }
}

/// A request, as far as tests look at it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub operation: &'static str,
    pub path: String,
    pub headers: HashMap<String, String>,
}

type Plan = dyn Fn(&Seen, usize) -> Fault + Send + Sync;

/// The embedded store behind the wire, and a spool.
pub struct World {
    pub dir: TempDir,
    pub settings: StorageSettings,
    pub storage: Storage,
    pub seen: Arc<Mutex<Vec<Seen>>>,
    /// Told of each request as it comes.
    pub events: Mutex<mpsc::UnboundedReceiver<Seen>>,
}

/// Patience for tests: the waits are there, and short.
pub fn quick() -> Tuning {
    Tuning {
        put_limit: PART,
        part_size: PART,
        initial_backoff: Duration::from_millis(1),
        max_backoff: Duration::from_millis(1500),
        round_pause: Duration::from_millis(2),
        call_timeout: Duration::from_secs(10),
        upload_timeout: Duration::from_secs(10),
        ..Tuning::default()
    }
}

impl World {
    /// A store under R2's rules.
    pub async fn new() -> Self {
        Self::with(quick(), |_, _| Fault::None).await
    }

    /// The wire does as `plan` says of a request and of how many of its operation came before it.
    pub async fn with(tuning: Tuning, plan: impl Fn(&Seen, usize) -> Fault + Send + Sync + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let embedded = Embedded::open(dir.path(), Rules::R2).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = Url::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        let settings = embedded.settings(url.clone(), url, Lifetimes::default());
        let (tell, events) = mpsc::unbounded_channel();
        let seen = Arc::new(Mutex::new(Vec::new()));
        tokio::spawn(serve(listener, embedded.router(), Arc::new(plan), seen.clone(), tell));
        let storage = Storage::with_tuning(settings.clone(), tuning);
        Self { dir, settings, storage, seen, events: Mutex::new(events) }
    }

    /// How often `operation` was asked for.
    pub fn count(&self, operation: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|seen| seen.operation == operation).count()
    }

    /// The next request for `operation`.
    pub async fn next(&self, operation: &str) -> Seen {
        // Only one test reads the events of its own world.
        let mut events = std::mem::replace(&mut *self.events.lock().unwrap(), mpsc::unbounded_channel().1);
        let found = loop {
            let event = tokio::time::timeout(Duration::from_secs(60), events.recv()).await;
            let event = event.unwrap_or_else(|_| panic!("no request for {operation} in a minute"));
            let seen = event.expect("the server lives as long as the test");
            if seen.operation == operation {
                break seen;
            }
        };
        *self.events.lock().unwrap() = events;
        found
    }

    pub fn raw(&self) -> Client {
        raw(&self.settings)
    }

    pub async fn keys(&self) -> Vec<String> {
        let listed = self.raw().list_objects_v2().bucket(&self.settings.bucket).send().await.unwrap();
        listed.contents().iter().map(|object| object.key().unwrap().to_string()).collect()
    }

    /// A video of `len` bytes in the spool.
    pub async fn keep(&self, job: &str, len: usize) -> KeptVideo {
        keep(
            &self.storage,
            self.dir.path(),
            job,
            len,
            &Publication { manifest: json!({"seed": 1}), ..Default::default() },
        )
        .await
    }

    pub async fn publish(&self, job: &str, len: usize) -> Published {
        let mut kept = self.keep(job, len).await;
        let published = self.storage.publish(&mut kept).await.unwrap();
        kept.done();
        published
    }
}

/// A video of `len` bytes in the spool below `dir`.
pub async fn keep(
    storage: &Storage,
    dir: &Path,
    job: &str,
    len: usize,
    publication: &Publication<'_>,
) -> KeptVideo {
    let video = VideoSpool::open(&dir.join("spool")).unwrap().job(job).unwrap();
    std::fs::write(video.path(), bytes(len)).unwrap();
    storage.keep(video, publication).await.unwrap()
}

/// Bytes without a pattern that a wrong order of parts would hide.
pub fn bytes(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// The SDK's own client, for what our client never does.
pub fn raw(settings: &StorageSettings) -> Client {
    let credentials = &settings.credentials;
    let secret = credentials.secret_access_key.expose();
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new(settings.region.clone()))
        .endpoint_url(settings.endpoint.as_str())
        .credentials_provider(Credentials::new(&credentials.access_key_id, secret, None, None, "test"))
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        .retry_config(aws_sdk_s3::config::retry::RetryConfig::disabled())
        .force_path_style(true);
    Client::from_conf(config.build())
}

/// The settings of the store that the environment names, where `TALKIE_S3_TEST` asks for it.
pub fn real_store() -> Option<StorageSettings> {
    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        storage: StorageArgs,
    }
    std::env::var_os("TALKIE_S3_TEST")?;
    let settings = Cli::parse_from(["test"]).storage.settings().unwrap();
    Some(settings.expect("TALKIE_S3_TEST needs R2_ACCOUNT_ID and its companions, or another store's"))
}

/// Which operation a request is.
fn operation<B>(request: &Request<B>) -> &'static str {
    let query = request.uri().query().unwrap_or_default();
    let has = |name: &str| query.split('&').any(|pair| pair.split('=').next() == Some(name));
    let is_object = request.uri().path().trim_end_matches('/').matches('/').count() > 1;
    match (request.method().as_str(), is_object) {
        ("PUT", _) if has("partNumber") => "part",
        ("PUT", _) => "put",
        ("POST", _) if has("uploads") => "create",
        ("POST", _) => "complete",
        ("DELETE", _) if has("uploadId") => "abort",
        ("DELETE", _) => "delete",
        ("HEAD", false) => "bucket",
        ("HEAD", true) => "head",
        (_, false) => "list",
        _ => "get",
    }
}

async fn serve(
    listener: TcpListener,
    router: axum::Router,
    plan: Arc<Plan>,
    seen: Arc<Mutex<Vec<Seen>>>,
    tell: mpsc::UnboundedSender<Seen>,
) {
    while let Ok((stream, _)) = listener.accept().await {
        let (router, plan, seen, tell) = (router.clone(), plan.clone(), seen.clone(), tell.clone());
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            let this = Seen {
                operation: operation(&request),
                path: request.uri().path().to_string(),
                headers: (request.headers().iter())
                    .map(|(name, value)| (name.to_string(), value.to_str().unwrap_or_default().to_string()))
                    .collect(),
            };
            let before = {
                let mut seen = seen.lock().unwrap();
                seen.push(this.clone());
                seen.iter().filter(|s| s.operation == this.operation).count() - 1
            };
            let fault = plan(&this, before);
            let _ = tell.send(this);
            answer(router.clone(), request, fault)
        });
        tokio::spawn(async move {
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn answer(
    router: axum::Router,
    request: Request<Incoming>,
    fault: Fault,
) -> Result<Response<Body>, std::io::Error> {
    let cut = || std::io::Error::from(std::io::ErrorKind::ConnectionReset);
    let pass = async |request: Request<Incoming>| router.oneshot(request.map(Body::new)).await.unwrap();
    match fault {
        Fault::None => Ok(pass(request).await),
        Fault::Answer(status, headers, body) => {
            // A client that is still sending would see a cut connection in place of the answer.
            let _ = request.into_body().collect().await;
            let mut response = Response::builder().status(status);
            for (name, value) in headers {
                response = response.header(name, value);
            }
            Ok(response.body(Body::from(body)).unwrap())
        }
        Fault::Cut => Err(cut()),
        Fault::LoseReply => {
            pass(request).await;
            Err(cut())
        }
        Fault::Hang => std::future::pending().await,
        Fault::Date(date) => {
            let mut response = pass(request).await;
            response.headers_mut().insert("date", date.parse().unwrap());
            Ok(response)
        }
    }
}
