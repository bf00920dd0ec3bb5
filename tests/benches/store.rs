//! `cargo bench --bench store`: the job store on this machine's disk, empty and with 100 000 jobs that wait.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use handler::gateway::store::{NewJob, Options, Queue, Store};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// Clients at once, as in the comparison with other gateways.
const CLIENTS: u64 = 32;

/// Bytes of a request: a prompt and two addresses.
const REQUEST: usize = 700;

fn open(dir: &TempDir) -> Store {
    let options = Options {
        max_queued: u64::MAX,
        max_attempts: 3,
        lease: Duration::from_secs(30),
        retention: Duration::from_secs(24 * 3600),
    };
    Store::open(dir.path(), options, Box::new(|_, _| ())).expect("the store opens")
}

/// An id that was not used before.
fn next_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    // As random to the index as real ids are.
    format!("{:016x}-{n}", n.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

fn job(id: String) -> NewJob {
    NewJob {
        id,
        endpoint: "talkie".to_string(),
        queue: Queue::Talkie,
        request: format!(r#"{{"input":{{"prompt":"{}"}}}}"#, "x".repeat(REQUEST)),
        webhook: None,
        execution_timeout: Duration::from_secs(600),
        ttl: Duration::from_secs(24 * 3600),
        low_priority: false,
        idempotency: None,
    }
}

/// Accepts `jobs` in all, from so many clients at once that each waits for its answer.
fn accept(runtime: &Runtime, store: &Store, clients: u64, jobs: u64) {
    runtime.block_on(async {
        let clients = (0..clients).map(|client| {
            let (store, share) = (store.clone(), jobs / clients + u64::from(client < jobs % clients));
            tokio::spawn(async move {
                for _ in 0..share {
                    store.accept(job(next_id())).await.expect("a job is accepted");
                }
            })
        });
        for client in clients.collect::<Vec<_>>() {
            client.await.expect("a client ends");
        }
    });
}

fn store(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("there are threads");
    let mut group = criterion.benchmark_group("store");
    group.sample_size(10).warm_up_time(Duration::from_millis(500));
    for held in [0, 100_000] {
        let dir = tempfile::tempdir().expect("a folder");
        let store = open(&dir);
        accept(&runtime, &store, 256, held);
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("accept", held), |bencher| {
            bencher.iter_custom(|jobs| {
                let begun = Instant::now();
                accept(&runtime, &store, CLIENTS, jobs);
                begun.elapsed()
            });
        });
        let known: Vec<String> = (0..1000).map(|_| next_id()).collect();
        runtime.block_on(async {
            for id in &known {
                store.accept(job(id.clone())).await.expect("a job is accepted");
            }
        });
        let mut next = known.iter().cycle();
        group.bench_function(BenchmarkId::new("job", held), |bencher| {
            bencher.iter(|| store.job(next.next().expect("a cycle has no end")).expect("a job is read"));
        });
        let mut next = known.iter().cycle();
        group.bench_function(BenchmarkId::new("position", held), |bencher| {
            bencher.iter(|| store.position(next.next().expect("a cycle has no end")).expect("it is known"));
        });
    }
    let dir = tempfile::tempdir().expect("a folder");
    accept(&runtime, &open(&dir), 256, 10_000);
    group.bench_function(BenchmarkId::new("open", 10_000), |bencher| bencher.iter(|| drop(open(&dir))));
    group.finish();
}

criterion_group!(benches, store);
criterion_main!(benches);
