//! A gateway in this process, on a port of its own, without worker processes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use handler::config::{Config, ConfigArgs};
use handler::gateway::config::{Secret, ServeConfig};
use handler::gateway::pool::{self, Launch};
use handler::gateway::server::{self, Limits};
use handler::gateway::store::{Outcome, Queue, Taker};
use handler::gateway::{Gateway, Running, Setup, store, webhook};
use handler::storage::embedded::{Embedded, Rules};
use handler::storage::{Lifetimes, Storage};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use crate::pool::client::{Reply, call};

/// The worker that the tests are.
const WORKER: &str = "w-test";

/// A gateway that answers until it is dropped.
pub struct Rig {
    pub gateway: Arc<Gateway>,
    /// Its address, such as `http://127.0.0.1:8000`.
    pub base: String,
    closing: CancellationToken,
    pub runtime: Runtime,
    pub dir: TempDir,
}

/// What a test wants different.
pub struct Wishes {
    pub config: ServeConfig,
    pub store: store::Options,
    /// A bucket elsewhere.
    pub bucket: Option<Storage>,
}

impl Rig {
    pub fn start() -> Self {
        Self::with(|_| {})
    }

    /// Starts one with other settings.
    pub fn with(change: impl FnOnce(&mut Wishes)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let addr = listener.local_addr().unwrap();
        let base = format!("http://{addr}");
        let mut wishes = Wishes { config: config(&dir, addr), store: options(), bucket: None };
        change(&mut wishes);
        let limits = wishes.config.connections.clone();
        let setup = setup(&dir, &base, wishes);
        let closing = CancellationToken::new();
        let running = runtime.block_on(async { Running::start(setup).unwrap() });
        let router: Router = running.router();
        runtime.spawn(server::serve(listener, router, limits, closing.clone()));
        let gateway = running.gateway.clone();
        // What it does by itself goes on for as long as this runtime.
        runtime.spawn(async move {
            let _running = running;
            std::future::pending::<()>().await;
        });
        Self { gateway, base, closing, runtime, dir }
    }

    pub fn addr(&self) -> &str {
        self.base.strip_prefix("http://").unwrap()
    }

    #[track_caller]
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        call(&self.base, (method, path), headers, body).unwrap_or_else(|e| panic!("{method} {path}: {e}"))
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], b"")
    }

    #[track_caller]
    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.send("POST", path, &[("Content-Type", "application/json")], body.to_string().as_bytes())
    }

    /// Sends a job to the local endpoint; its id.
    #[track_caller]
    pub fn run(&self, request: &Value) -> String {
        let reply = self.post("/run", request);
        assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
        reply.json()["id"].as_str().unwrap().to_string()
    }

    #[track_caller]
    pub fn status(&self, job: &str) -> Value {
        let reply = self.get(&format!("/status/{job}"));
        assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
        reply.json()
    }

    /// Takes the next job, as a worker does; its id and its request.
    #[track_caller]
    pub fn take(&self) -> (String, Value) {
        self.take_from(Queue::Talkie)
    }

    #[track_caller]
    pub fn take_from(&self, queue: Queue) -> (String, Value) {
        let taker = Taker { worker: WORKER.to_string(), spawned: false };
        let leases = self.runtime.block_on(self.gateway.store.take(taker, queue, 1)).unwrap();
        let lease = leases.into_iter().next().expect("a job waits");
        (lease.id, serde_json::from_str(&lease.request).unwrap())
    }

    /// Ends a job that was taken.
    pub fn finish(&self, job: &str, outcome: Outcome) -> bool {
        self.runtime.block_on(self.gateway.store.finish(job, WORKER, outcome)).unwrap()
    }

    /// Sends a job and ends it with this output.
    #[track_caller]
    pub fn finished(&self, output: &Value) -> String {
        let job = self.run(&request());
        assert_eq!(self.take().0, job);
        assert!(self.finish(&job, Outcome::Completed(output.to_string())));
        job
    }

    pub fn push(&self, job: &str, part: &Value) {
        let pushed = self.gateway.store.push_chunk(job, WORKER, part.to_string());
        assert!(self.runtime.block_on(pushed).unwrap());
        self.gateway.hub.job_changed(job);
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.addr()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Sends these bytes and reads until the gateway closes the connection; what it said, and after how long.
    pub fn talk(&self, bytes: &[u8]) -> (String, Duration) {
        let (mut stream, began) = (self.connect(), Instant::now());
        let _ = stream.write_all(bytes);
        let mut said = Vec::new();
        // Some of it may be cut off by the reset that follows bytes which nobody reads.
        let _ = stream.read_to_end(&mut said);
        (String::from_utf8_lossy(&said).into_owned(), began.elapsed())
    }

    /// Tells the server to end.
    pub fn close(&self) {
        self.closing.cancel();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

/// A job whose media are elsewhere.
pub fn request() -> Value {
    json!({"input": {"image": "https://example.com/a.png", "audio": "https://example.com/a.wav"}})
}

/// Checks an error's shape and words.
#[track_caller]
pub fn refused(reply: &Reply, status: u16, code: &str) -> Value {
    let shown = format!("{} {}", reply.head, String::from_utf8_lossy(&reply.body));
    assert_eq!(reply.status, status, "{shown}");
    let error = reply.json()["error"].clone();
    assert_eq!(error["code"], code, "{shown}");
    for field in ["message", "hint", "retryable", "details"] {
        assert!(error.get(field).is_some(), "`{field}` is missing: {shown}");
    }
    error
}

/// The value of a header of an answer.
pub fn header<'a>(reply: &'a Reply, name: &str) -> Option<&'a str> {
    reply.head.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

fn config(dir: &TempDir, addr: SocketAddr) -> ServeConfig {
    let root = std::path::Path::new("/nonexistent");
    ServeConfig {
        addr,
        endpoint: "talkie".to_string(),
        model: Some("tiny".to_string()),
        data_dir: dir.path().to_path_buf(),
        public_url: format!("http://{addr}"),
        allowed_origins: Vec::new(),
        api_key: None::<Secret>,
        execution_timeout: Duration::from_secs(600),
        max_body_bytes: (10 << 20, 20 << 20),
        max_result_bytes: 20 << 20,
        min_free_bytes: 0,
        connections: Limits::default(),
        service: Config::new(&ConfigArgs::default(), |_| None, root).unwrap(),
    }
}

fn options() -> store::Options {
    let hour = Duration::from_secs(3600);
    store::Options { max_queued: 100_000, max_attempts: 3, lease: hour, retention: 24 * hour }
}

fn setup(dir: &TempDir, base: &str, wishes: Wishes) -> Setup {
    let embedded = Embedded::open(dir.path(), Rules::default()).unwrap();
    let url = |text: &str| text.parse().unwrap();
    let bucket = embedded.settings(url(base), url(base), Lifetimes::default());
    let minute = Duration::from_secs(60);
    Setup {
        config: wishes.config,
        store: wishes.store,
        pool: pool::Settings {
            idle_timeout: minute,
            min_workers: 0,
            // The tests are the workers.
            max_workers: 0,
            start_timeout: minute,
            stop_grace: minute,
            drain_grace: minute,
            restart_pause: minute,
            ping_interval: minute,
            silence: minute,
        },
        launch: Launch {
            program: "/nonexistent".into(),
            args: Vec::new(),
            env: Vec::new(),
            hidden: Vec::new(),
            base_url: base.to_string(),
            endpoint: "talkie".to_string(),
            logs: dir.path().join("logs"),
            gpus: Vec::new(),
        },
        webhooks: webhook::Settings {
            secret: None,
            allow_private_urls: false,
            timeout: minute,
            pauses: vec![minute],
        },
        embedded: wishes.bucket.is_none().then_some(embedded),
        storage: wishes.bucket.unwrap_or_else(|| Storage::new(bucket)),
    }
}
