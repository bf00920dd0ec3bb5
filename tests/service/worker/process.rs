//! The real process: signals, exit codes, logs, and what is left when it is killed.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::platform::{Answer, Platform, Request};
use crate::media;
use crate::support::{handler, is_long};

const UNTIL: Duration = Duration::from_secs(120);

/// A platform, and a folder for the spools of its workers.
struct Rig {
    platform: Platform,
    dir: TempDir,
}

impl Rig {
    fn new() -> Self {
        Self { platform: Platform::start(), dir: tempfile::tempdir().unwrap() }
    }

    fn command(&self) -> Command {
        let mut command = handler();
        command.arg("worker").envs(self.platform.variables()).env("SPOOL_PATH", self.dir.path());
        command.env("MODEL_STORAGE_PATH", self.dir.path().join("models"));
        command.env("TALKIE_DEVICE", "cpu").args(["--model", "tiny", "--backoff-seconds", "0.01"]);
        command.args(["--min-free-bytes", "1"]).env("FAULTS_FROM_PROMPT", "1");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn start(&self) -> Process {
        self.start_with(&[])
    }

    fn start_with(&self, variables: &[(&str, &str)]) -> Process {
        Process(self.command().envs(variables.iter().copied()).spawn().unwrap())
    }

    /// Hands over a sound job that does `what`.
    fn job(&self, id: &str, what: &str) {
        let encode = |bytes: &[u8]| STANDARD.encode(bytes);
        self.platform.take(Answer::json(&json!({"id": id, "input": {
            "image": encode(&media::png(96, 96)), "audio": encode(&media::tone(16_000, 1, 0.2)),
            "prompt": format!("fault: {what}"), "output": {"inline": true},
        }})));
    }

    fn wait_for_take(&self) {
        self.platform.wait_for(1, |request| request.route() == "job-take");
    }

    /// Waits until the heartbeat names job `id`.
    fn wait_for_start(&self, id: &str) {
        self.platform.wait_for(1, |request| request.target.contains(&format!("job_id={id}&")));
    }

    /// The results in the spool.
    fn spooled(&self) -> usize {
        let folders = std::fs::read_dir(self.dir.path().join("results")).unwrap();
        let files = folders.flat_map(|folder| std::fs::read_dir(folder.unwrap().path()).unwrap());
        files.filter(|file| !file.as_ref().unwrap().path().ends_with("owner.json")).count()
    }
}

/// A worker process.
struct Process(Child);

impl Process {
    fn signal(&self, signal: i32) {
        // SAFETY: the call takes two numbers; the process is ours and has not been waited for.
        assert_eq!(unsafe { libc::kill(self.0.id() as i32, signal) }, 0);
    }

    /// Its exit code, or its signal as a negative number; standard output and error.
    #[track_caller]
    fn ended(mut self) -> (i32, String, String) {
        use std::os::unix::process::ExitStatusExt;
        let until = Instant::now() + UNTIL;
        let status = loop {
            match self.0.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > until => {
                    self.0.kill().unwrap();
                    panic!("the process does not end");
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let read = |pipe: Option<&mut dyn Read>| {
            let mut text = String::new();
            pipe.map(|pipe| pipe.read_to_string(&mut text));
            text
        };
        let stdout = read(self.0.stdout.as_mut().map(|pipe| pipe as &mut dyn Read));
        let stderr = read(self.0.stderr.as_mut().map(|pipe| pipe as &mut dyn Read));
        (status.code().unwrap_or_else(|| -status.signal().unwrap()), stdout, stderr)
    }

    #[track_caller]
    fn ends_with(self, code: i32) {
        let (ended, stdout, stderr) = self.ended();
        assert_eq!(ended, code, "{stdout}\n{stderr}");
    }

    #[track_caller]
    fn end(self) {
        self.signal(libc::SIGTERM);
        self.ends_with(0);
    }
}

#[test]
fn sigterm_idle_polls_held() {
    let rig = Rig::new();
    let process = rig.start();
    rig.wait_for_take();
    let asked = Instant::now();
    process.signal(libc::SIGTERM);
    rig.platform.wait_for_hang_up("job-take");
    rig.platform.wait_for_hang_up("job-stop");
    process.ends_with(0);
    // The Python worker waits for its polls, which is 28 s here.
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    assert_eq!(rig.spooled(), 0);
}

#[test]
fn sigterm_idle_polls_released() {
    let rig = Rig::new();
    let process = rig.start();
    rig.wait_for_take();
    process.signal(libc::SIGTERM);
    rig.platform.otherwise(Some(Answer::status(204)));
    process.ends_with(0);
}

#[test]
fn sigint_idle() {
    let rig = Rig::new();
    let process = rig.start();
    rig.wait_for_take();
    process.signal(libc::SIGINT);
    process.ends_with(0);
}

#[test]
fn sigterm_busy_sync() {
    let rig = Rig::new();
    let process = rig.start();
    rig.job("a", "steps 8");
    rig.wait_for_start("a");
    process.signal(libc::SIGTERM);
    let end = rig.platform.wait_for_end("a").json();
    assert!(end["output"]["size_bytes"].as_u64().unwrap() > 0, "{end}");
    process.ends_with(0);
    assert_eq!(rig.spooled(), 0);
}

#[test]
fn fault_18_sigterm_hands_a_long_job_back() {
    let rig = Rig::new();
    let process = rig.start_with(&[("STOP_GRACE_SECONDS", "0.2")]);
    rig.job("a", "wait");
    rig.wait_for_start("a");
    process.signal(libc::SIGTERM);
    assert_eq!(rig.platform.wait_for_end("a").error()["details"]["reason"], "PREEMPTED");
    process.ends_with(0);
}

/// Each phase in which the signal can find the real process, again and again: what was handed over has an answer, and
/// what was not is still there.
#[test]
fn fault_18_sigterm_in_every_phase() {
    let rounds = if is_long() { 200 } else { 2 };
    for round in 0..rounds {
        let rig = Rig::new();
        let process = rig.start();
        rig.wait_for_take();
        let asked = Instant::now();
        process.end();
        assert!(asked.elapsed() < Duration::from_secs(2), "idle, round {round}: {:?}", asked.elapsed());

        let rig = Rig::new();
        let process = rig.start();
        rig.job("busy", "steps 8");
        rig.wait_for_start("busy");
        process.end();
        assert!(rig.platform.wait_for_end("busy").json()["output"].is_object(), "busy, round {round}");
        assert_eq!(rig.spooled(), 0, "busy, round {round}");

        let rig = Rig::new();
        let process = rig.start();
        rig.wait_for_take();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // The moment is what differs here: before the signal, at it, and until the worker has hung up.
                std::thread::sleep(Duration::from_millis(400) * round / rounds);
                rig.job("late", "instant");
            });
            process.signal(libc::SIGTERM);
        });
        process.ends_with(0);
        let answered = !rig.platform.seen(|request| request.is_end() && request.id() == "late").is_empty();
        rig.platform.wait_for_takes_left(usize::from(!answered));
        assert_eq!(rig.spooled(), 0, "during a take, round {round}");
    }
}

#[test]
fn fault_19_a_second_signal_ends_at_once_and_keeps_the_spool() {
    let rig = Rig::new();
    for (first, second, code) in [(libc::SIGTERM, libc::SIGTERM, 143), (libc::SIGTERM, libc::SIGINT, 130)] {
        let rig = Rig::new();
        (0..10_000).for_each(|_| rig.platform.end(Answer::status(503)));
        let process = rig.start();
        rig.job("a", "instant");
        rig.platform.wait_for_end("a");
        process.signal(first);
        rig.platform.wait_for_hang_up("job-stop");
        process.signal(second);
        process.ends_with(code);
        assert_eq!(rig.spooled(), 1);
    }
    drop(rig);
}

#[test]
fn fault_20_hang_up_and_closed_outputs_are_no_reason_to_end() {
    let rig = Rig::new();
    let mut process = rig.start_with(&[("RUNPOD_ENDPOINT_ID", "ep1"), ("RUNPOD_LOG_LEVEL", "DEBUG")]);
    rig.wait_for_take();
    drop((process.0.stdout.take(), process.0.stderr.take()));
    process.signal(libc::SIGHUP);
    process.signal(libc::SIGPIPE);
    for id in ["a", "b"] {
        rig.job(id, "steps 2");
        assert!(rig.platform.wait_for_end(id).json()["output"].is_object());
    }
    process.end();
}

/// Kills a worker at `point` of job `a`, and starts the next; the ends of `a` that came by then and in all.
#[track_caller]
fn killed_at(point: &str) -> (usize, Vec<Request>, Rig) {
    let rig = Rig::new();
    let process = rig.start_with(&[("KILL_AT", point)]);
    rig.job("a", "instant");
    process.ends_with(-libc::SIGKILL);
    let is_end = |request: &Request| request.is_end();
    let before = rig.platform.seen(is_end).len();
    let next = rig.start_with(&[("RUNPOD_POD_ID", "pod2")]);
    rig.platform.wait_for(1, |request| request.target.contains("job-take/pod2"));
    let ends = rig.platform.seen(is_end);
    next.end();
    assert_eq!(rig.spooled(), 0);
    (before, ends, rig)
}

#[test]
fn kill_k14_leaves_nothing_and_stops_nothing() {
    let (before, ends, rig) = killed_at("K14");
    assert_eq!((before, ends.len()), (0, 0));
    // The platform hands it over again.
    let process = rig.start_with(&[("RUNPOD_POD_ID", "pod3")]);
    rig.job("a", "instant");
    assert!(rig.platform.wait_for_end("a").json()["output"].is_object());
    process.end();
}

#[test]
fn kill_k22_the_next_worker_delivers_what_was_spooled_before_its_first_take() {
    let (before, ends, _rig) = killed_at("K22");
    assert_eq!((before, ends.len()), (0, 1));
    assert!(ends[0].json()["output"]["size_bytes"].as_u64().unwrap() > 0);
    assert!(ends[0].target.contains("job-done/pod1/a"), "{}", ends[0].target);
}

#[test]
fn kill_k23_the_next_worker_posts_the_same_again() {
    let (before, ends, _rig) = killed_at("K23");
    assert_eq!((before, ends.len()), (1, 2));
    assert_eq!(ends[0].body, ends[1].body);
}

#[test]
fn fault_30_a_hanging_generation_is_reported_and_ends_the_process() {
    let rig = Rig::new();
    let process = rig.start_with(&[("HANG_SECONDS", "0.3")]);
    rig.job("a", "hang");
    rig.job("b", "instant");
    let error = rig.platform.wait_for_end("a").error();
    assert_eq!((&error["code"], &error["retryable"]), (&json!("WORKER_LOST"), &json!(true)), "{error}");
    process.ends_with(75);
    assert_eq!(rig.platform.takes_left(), 1, "it takes no further job");
}

#[test]
fn fault_57_a_sticky_error_is_reported_and_ends_the_process() {
    let rig = Rig::new();
    let process = rig.start();
    rig.job("a", "sticky");
    rig.job("b", "instant");
    let error = rig.platform.wait_for_end("a").error();
    assert_eq!((&error["code"], &error["retryable"]), (&json!("GPU_UNAVAILABLE"), &json!(true)), "{error}");
    process.ends_with(70);
    assert_eq!(rig.platform.takes_left(), 1, "it takes no further job");
}

#[test]
fn fault_56_a_loop_of_jobs_without_memory_ends_the_process() {
    let rig = Rig::new();
    let process = rig.start();
    for id in ["a", "b"] {
        rig.job(id, "oom");
        assert_eq!(rig.platform.wait_for_end(id).error()["code"], "GPU_OUT_OF_MEMORY");
    }
    process.ends_with(71);
}

#[test]
fn handler_os_exit() {
    let rig = Rig::new();
    let process = rig.start();
    rig.job("a", "abort");
    process.ends_with(-libc::SIGABRT);
    assert!(rig.platform.seen(|request| request.is_end()).is_empty());
    no_ping_comes(&rig);
}

#[test]
fn fault_31_sigkill_orphan_ping() {
    let rig = Rig::new();
    let process = rig.start();
    rig.job("a", "wait");
    rig.wait_for_start("a");
    process.signal(libc::SIGKILL);
    process.ends_with(-libc::SIGKILL);
    no_ping_comes(&rig);
}

/// The heartbeat of the Python worker outlives it. That nothing comes can only be seen by waiting: here for
/// twenty intervals.
#[track_caller]
fn no_ping_comes(rig: &Rig) {
    let pings = || rig.platform.seen(|request| request.route() == "ping").len();
    let before = pings();
    std::thread::sleep(Duration::from_millis(400));
    assert!(pings() <= before + 1, "one may have been on its way");
}

#[test]
fn fitness_check_failed() {
    for (variable, value, check) in
        [("SPOOL_PATH", "/dev/null/spool", "spool"), ("MIN_FREE_BYTES", "18446744073709551615", "disk")]
    {
        let rig = Rig::new();
        let mut command = handler();
        command.arg("worker").envs(rig.platform.variables()).env("SPOOL_PATH", rig.dir.path());
        command.env(variable, value).args(["--device", "cpu"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let (code, _, stderr) = Process(command.spawn().unwrap()).ended();
        assert_eq!(code, 1, "{stderr}");
        let error: Value = serde_json::from_str(stderr.lines().last().unwrap()).unwrap();
        assert_eq!(
            (&error["code"], &error["details"]["reason"]),
            (&json!("INSUFFICIENT_DISK"), &json!("UNFIT"))
        );
        let requests = rig.platform.seen(|_| true);
        assert_eq!(requests.len(), 1, "one ping and no take: {requests:?}");
        let expected = format!("/v2/ep1/ping/pod1?gpu=NVIDIA+A40&status=unhealthy&check={check}&reason=");
        assert!(requests[0].target.starts_with(&expected), "{}", requests[0].target);
    }
}

/// A worker that is to run on a GPU and has none says so before it takes a job. Where there is one, this shows nothing.
#[test]
fn fault_62_a_worker_without_its_gpu_takes_no_job() {
    if talkie::device::select(talkie::device::Preference::Cuda, |_| ()).is_ok() {
        return;
    }
    let rig = Rig::new();
    let began = Instant::now();
    let mut command = rig.command();
    command.args(["--device", "cuda"]);
    let (code, _, stderr) = Process(command.spawn().unwrap()).ended();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(code, 1, "{stderr}");
    let error: Value = serde_json::from_str(stderr.lines().last().unwrap()).unwrap();
    assert_eq!((&error["code"], &error["details"]["reason"]), (&json!("GPU_UNAVAILABLE"), &json!("UNFIT")));
    let requests = rig.platform.seen(|_| true);
    assert_eq!(requests.len(), 1, "one ping and no take: {requests:?}");
    assert!(requests[0].target.contains("&status=unhealthy&check=device&reason="), "{}", requests[0].target);
}

#[test]
fn wrong_settings_are_named() {
    for (variable, value, said) in [
        ("RUNPOD_WEBHOOK_GET_JOB", "", "`RUNPOD_WEBHOOK_GET_JOB` is not set"),
        ("RUNPOD_LOG_LEVEL", "loud", "`RUNPOD_LOG_LEVEL` is \"loud\", expected NOTSET"),
        (
            "STOP_GRACE_SECONDS",
            "soon",
            "`STOP_GRACE_SECONDS` (--stop-grace-seconds) is \"soon\", expected seconds",
        ),
    ] {
        let rig = Rig::new();
        let (code, _, stderr) = rig.start_with(&[(variable, value)]).ended();
        assert_eq!(code, 2, "{stderr}");
        let error: Value = serde_json::from_str(stderr.lines().last().unwrap()).unwrap();
        assert!(error["message"].as_str().unwrap().contains(said), "{error}");
    }
}

#[test]
fn credentials_file_overrides_key() {
    let rig = Rig::new();
    let home = rig.dir.path().join("home");
    std::fs::create_dir_all(home.join(".runpod")).unwrap();
    std::fs::write(home.join(".runpod/config.toml"), "[default]\napi_key = \"other-key\"\n").unwrap();
    let process = rig.start_with(&[("HOME", home.to_str().unwrap())]);
    rig.job("a", "instant");
    rig.platform.wait_for_end("a");
    process.end();
    let others = rig.platform.seen(|request| request.header("authorization") != Some("worker-key-123"));
    assert!(others.is_empty(), "one key for everything: {others:?}");
}

#[test]
fn json_logs_name_the_job_and_hold_no_key() {
    let rig = Rig::new();
    let mut process = rig.start_with(&[("RUNPOD_ENDPOINT_ID", "ep1"), ("RUNPOD_LOG_LEVEL", "trace")]);
    let mut lines = BufReader::new(process.0.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("--- Starting Serverless Worker |  Version talkie-"));
    rig.job("job-1", "steps 1");
    rig.platform.wait_for_end("job-1");
    process.end();
    let lines: Vec<String> = lines.map(Result::unwrap).collect();
    let said: Vec<Value> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (message, level) in [("Started.", "INFO"), ("Finished.", "INFO")] {
        let expected = json!({"requestId": "job-1", "message": message, "level": level});
        assert!(said.contains(&expected), "{expected}: {lines:#?}");
    }
    for secret in ["worker-key-123", "fault: steps"] {
        assert!(!lines.join("\n").contains(secret), "{secret}");
    }
}

#[test]
fn plain_logs() {
    let rig = Rig::new();
    let process = rig.start_with(&[("RUNPOD_DEBUG_LEVEL", "INFO")]);
    rig.job("j1", "panic");
    assert_eq!(rig.platform.wait_for_end("j1").error()["code"], "INTERNAL");
    process.signal(libc::SIGTERM);
    let (code, stdout, stderr) = process.ended();
    assert_eq!((code, stdout.as_str()), (0, ""));
    assert!(stderr.contains("job{job=\"j1\"}"), "{stderr}");
    assert!(stderr.contains("Started.") && !stderr.contains("worker-key-123"), "{stderr}");
}
