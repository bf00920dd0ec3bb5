//! Workers and a clock that tests move.

use std::time::{Duration, Instant};

use tokio::sync::mpsc::{self, UnboundedReceiver};

use super::super::Settings;
use super::super::worker::{Origin, Phase, Signal, Worker};
use super::{Plan, Roster};
use crate::gateway::store::Queue;
use crate::runpod::protocol::WorkerCounts;

const SECOND: Duration = Duration::from_secs(1);

/// Up to two workers, and one second of everything.
fn settings() -> Settings {
    Settings {
        idle_timeout: SECOND,
        min_workers: 0,
        max_workers: 2,
        start_timeout: SECOND,
        stop_grace: SECOND,
        drain_grace: SECOND,
        restart_pause: SECOND,
        ping_interval: SECOND,
        silence: SECOND,
    }
}

struct Bench {
    roster: Roster,
    now: Instant,
}

impl Bench {
    fn new(change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = settings();
        change(&mut settings);
        Self { roster: Roster::new(settings), now: Instant::now() }
    }

    /// A worker that was started now, and what it is told.
    fn start(&mut self, id: &str) -> UnboundedReceiver<Signal> {
        let (signals, told) = mpsc::unbounded_channel();
        let slot = self.roster.free_slot();
        let origin = Origin::Spawned { key: String::new(), slot, signals };
        self.roster.workers.insert(id.to_string(), Worker::spawned(origin, self.now));
        told
    }

    /// The same, which has asked for a job and has those of `jobs`.
    fn ready(&mut self, id: &str, jobs: &[&str]) -> UnboundedReceiver<Signal> {
        let told = self.start(id);
        self.worker(id).phase = Phase::Ready;
        self.worker(id).hold(jobs.iter().map(|job| (*job).to_string()));
        told
    }

    fn worker(&mut self, id: &str) -> &mut Worker {
        self.roster.workers.get_mut(id).unwrap()
    }

    fn later(&mut self, time: Duration) -> &mut Self {
        self.now += time;
        self
    }

    /// How many to start for `waiting` jobs, and when to look again.
    fn plan(&mut self, waiting: usize) -> (usize, Option<Duration>) {
        let Plan { start, next } = self.roster.plan(waiting, self.now);
        (start, next.map(|next| next - self.now))
    }
}

#[test]
fn nothing_waits_and_nothing_runs() {
    assert_eq!(Bench::new(|_| ()).plan(0), (0, None));
    assert_eq!(Bench::new(|settings| settings.min_workers = 1).plan(0), (1, None));
    assert_eq!(Bench::new(|settings| settings.max_workers = 0).plan(3), (0, None));
}

#[test]
fn one_worker_is_started_for_each_job_that_no_free_one_is_there_for() {
    let mut bench = Bench::new(|settings| settings.max_workers = 3);
    assert_eq!(bench.plan(5).0, 3);
    let _busy = bench.ready("busy", &["a"]);
    assert_eq!(bench.plan(1).0, 1);
    let _starting = bench.start("starting");
    assert_eq!((bench.plan(1).0, bench.plan(2).0, bench.plan(9).0), (0, 1, 1));
    // One that is about to end still has its memory.
    let settings = bench.roster.settings.clone();
    let now = bench.now;
    bench.worker("busy").drain(&settings, now);
    assert_eq!(bench.plan(9).0, 1);
    bench.roster.workers.insert("attached".into(), Worker::attached(Queue::Talkie, now));
    assert_eq!(bench.plan(2).0, 0, "attached workers take jobs too");
    bench.roster.closing = true;
    assert_eq!(bench.plan(9).0, 0);
}

#[test]
fn idle_workers_are_told_to_end_and_then_made_to() {
    let mut bench = Bench::new(|_| ());
    let mut told = bench.ready("w", &[]);
    assert_eq!(bench.later(SECOND / 2).plan(0), (0, Some(SECOND / 2)));
    assert!(told.try_recv().is_err());
    assert_eq!(bench.later(SECOND / 2).plan(0), (0, Some(SECOND)));
    assert_eq!(told.try_recv(), Ok(Signal::End));
    assert_eq!(bench.later(SECOND).plan(0), (0, None));
    assert_eq!(told.try_recv(), Ok(Signal::Kill));
    bench.later(SECOND).plan(0);
    assert!(told.try_recv().is_err(), "once is enough");
}

#[test]
fn workers_with_a_job_in_sight_are_not_idle() {
    for prepare in
        [(|worker| worker.hold(["a".to_string()])) as fn(&mut Worker), |worker| worker.taking = true]
    {
        let mut bench = Bench::new(|_| ());
        let mut told = bench.ready("w", &[]);
        prepare(bench.worker("w"));
        bench.later(10 * SECOND).plan(0);
        assert!(told.try_recv().is_err());
    }
    let mut bench = Bench::new(|settings| settings.min_workers = 1);
    let (mut first, mut second) = (bench.ready("first", &[]), bench.later(SECOND / 4).ready("second", &[]));
    assert_eq!(bench.later(10 * SECOND).plan(0).0, 0);
    assert_eq!(first.try_recv(), Ok(Signal::End), "who has been idle for longest goes");
    assert!(second.try_recv().is_err(), "one is kept");
    bench.plan(1);
    assert!(second.try_recv().is_err());
}

#[test]
fn a_worker_that_does_not_start_or_stop_is_killed() {
    let mut bench = Bench::new(|_| ());
    let (mut slow, mut stuck) = (bench.start("slow"), bench.ready("stuck", &["a"]));
    let until = bench.now + SECOND;
    bench.worker("stuck").stop("a", until);
    assert_eq!(bench.later(SECOND / 2).plan(0), (0, Some(SECOND / 2)));
    bench.later(SECOND / 2).plan(0);
    assert_eq!((slow.try_recv(), stuck.try_recv()), (Ok(Signal::Kill), Ok(Signal::Kill)));
    assert!(bench.worker("stuck").killed.as_ref().unwrap().contains("job a"));
}

#[test]
fn attached_workers_are_forgotten_when_they_are_silent() {
    let mut bench = Bench::new(|_| ());
    bench.roster.workers.insert("a".into(), Worker::attached(Queue::Endpoint("e".into()), bench.now));
    assert_eq!(bench.plan(0), (0, Some(SECOND)));
    let expected = WorkerCounts { idle: 1, ready: 1, ..WorkerCounts::default() };
    assert_eq!(bench.roster.counts(&Queue::Endpoint("e".into())), expected);
    assert_eq!(bench.roster.counts(&Queue::Talkie), WorkerCounts::default());
    assert_eq!(bench.later(SECOND).plan(0), (0, None));
    assert!(bench.roster.workers.is_empty());
}

#[test]
fn workers_that_fail_to_start_are_not_started_for_a_while() {
    let mut bench = Bench::new(|_| ());
    let now = bench.now;
    bench.roster.breaker.failure("exit code 1".into(), now);
    assert_eq!(bench.plan(1).0, 1);
    bench.roster.breaker.failure("exit code 1".into(), now);
    assert_eq!(bench.plan(1), (0, Some(SECOND)));
    assert_eq!(bench.plan(0), (0, None), "while nothing waits there is nothing to look at");
    assert_eq!(bench.later(SECOND).plan(1).0, 1);
}

#[test]
fn a_stop_is_told_once_and_again_after_a_while() {
    let mut bench = Bench::new(|_| ());
    let _told = bench.ready("w", &["a", "b"]);
    let now = bench.now;
    bench.worker("w").stop("a", now + 60 * SECOND);
    bench.worker("w").stop("unknown", now + 60 * SECOND);
    assert_eq!(bench.worker("w").stops(now), ["a"]);
    assert_eq!(bench.worker("w").stops(now + SECOND), [""; 0]);
    assert_eq!(bench.worker("w").stops(now + 5 * SECOND), ["a"]);
    assert!(bench.worker("w").works_on("b") && !bench.worker("w").works_on("a"));
    bench.worker("w").let_go("a", now);
    assert_eq!(bench.worker("w").stops(now + 60 * SECOND), [""; 0]);
}

#[test]
fn a_job_that_two_pings_leave_out_is_lost() {
    let mut bench = Bench::new(|_| ());
    let _told = bench.ready("w", &["a"]);
    let (with, without) = (["a".to_string()], []);
    // A ping may have been on its way when the job was handed over.
    for _ in 0..3 {
        assert!(bench.worker("w").pinged(&without).is_empty());
    }
    assert!(bench.worker("w").pinged(&with).is_empty());
    assert!(bench.worker("w").pinged(&without).is_empty());
    assert!(bench.worker("w").pinged(&with).is_empty());
    assert!(bench.worker("w").pinged(&without).is_empty());
    assert_eq!(bench.worker("w").pinged(&without), ["a"]);
}
