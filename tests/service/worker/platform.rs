//! A platform that follows a script: it hands over what it is told to, answers as it is told to, and remembers
//! everything that it was asked.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long a test waits for something that must come. No test takes that long unless it fails.
const DEADLINE: Duration = Duration::from_secs(120);
/// How often a connection that is held open is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// A request that came.
#[derive(Clone, Debug)]
pub struct Request {
    pub at: Instant,
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Request {
    /// What is asked for: `job-take`, `job-done` and so on.
    pub fn route(&self) -> &str {
        self.target.split('/').nth(3).unwrap_or_default()
    }

    /// The last part of the path: the job of a result.
    pub fn id(&self) -> &str {
        self.target.split('?').next().and_then(|path| path.rsplit('/').next()).unwrap_or_default()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// Whether it ends a job, and does not only tell of its progress.
    pub fn is_end(&self) -> bool {
        self.route() == "job-done" && self.json()["status"] != "IN_PROGRESS"
    }

    /// The fields of the error that it ends a job with.
    pub fn error(&self) -> Value {
        let text =
            self.json()["error"].as_str().unwrap_or_else(|| panic!("no error: {}", self.body)).to_string();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }
}

/// An answer.
#[derive(Clone, Debug)]
pub enum Answer {
    /// A status, a header line or nothing, and a body.
    Reply(u16, String, String),
    /// The connection is closed without a word.
    HangUp,
    /// No answer comes, until the client hangs up.
    Silence,
}

impl Answer {
    pub fn json(value: &Value) -> Self {
        Self::Reply(200, "Content-Type: application/json".into(), value.to_string())
    }

    pub fn status(status: u16) -> Self {
        Self::Reply(status, String::new(), String::new())
    }
}

#[derive(Default)]
struct State {
    seen: Vec<Request>,
    /// Targets of requests whose client hung up before they were answered.
    hung_up: Vec<String>,
    takes: VecDeque<Answer>,
    stops: VecDeque<Answer>,
    /// Answers to results; 200 when there are none.
    ends: VecDeque<Answer>,
    /// The answer to every result, for so long from the first of them on, and when that was.
    outage: Option<(Answer, Duration)>,
    outage_began: Option<Instant>,
    /// The answer to every ping and every progress report.
    ping: Option<Answer>,
    /// Progress reports wait for their answers.
    reports_wait: bool,
    /// Answers to polls when there is nothing else; held open where there is none.
    otherwise: Option<Answer>,
}

/// The platform.
pub struct Platform {
    pub port: u16,
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Platform {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let platform = Self { port: listener.local_addr().unwrap().port(), shared: Arc::default() };
        let shared = platform.shared.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                thread::spawn(move || serve(stream, &shared));
            }
        });
        platform
    }

    /// What RunPod sets for a worker of this platform.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let url = |path: &str| format!("http://127.0.0.1:{}/v2/ep1/{path}?gpu=NVIDIA+A40", self.port);
        vec![
            ("RUNPOD_WEBHOOK_GET_JOB", url("job-take/$ID")),
            ("RUNPOD_WEBHOOK_POST_OUTPUT", url("job-done/$RUNPOD_POD_ID/$ID")),
            ("RUNPOD_WEBHOOK_POST_STREAM", url("job-stream/$RUNPOD_POD_ID/$ID")),
            ("RUNPOD_WEBHOOK_PING", url("ping/$RUNPOD_POD_ID")),
            ("RUNPOD_PING_INTERVAL", "20".into()),
            ("RUNPOD_AI_API_KEY", "worker-key-123".into()),
            ("RUNPOD_POD_ID", "pod1".into()),
            ("RUNPOD_POD_HOSTNAME", "host1".into()),
        ]
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.shared.1.notify_all();
    }

    /// Hands over a job that does `what`.
    pub fn job(&self, id: &str, what: &str) {
        self.take(Answer::json(&job(id, what)));
    }

    /// Answers one take.
    pub fn take(&self, answer: Answer) {
        self.change(|state| state.takes.push_back(answer));
    }

    /// Answers one poll for stops.
    pub fn stops(&self, answer: Answer) {
        self.change(|state| state.stops.push_back(answer));
    }

    /// Answers one result.
    pub fn end(&self, answer: Answer) {
        self.change(|state| state.ends.push_back(answer));
    }

    /// Answers every result so, for so long from the first of them on.
    pub fn outage(&self, answer: Answer, time: Duration) {
        self.change(|state| state.outage = Some((answer, time)));
    }

    /// Forgets the answers to results that were not given yet.
    pub fn ends_are_fine(&self) {
        self.change(|state| state.ends.clear());
    }

    /// Answers every ping.
    pub fn pings(&self, answer: Answer) {
        self.change(|state| state.ping = Some(answer));
    }

    /// Lets progress reports wait for their answers, or no longer.
    pub fn reports_wait(&self, wait: bool) {
        self.change(|state| state.reports_wait = wait);
    }

    /// Answers every poll that has no other answer.
    pub fn otherwise(&self, answer: Option<Answer>) {
        self.change(|state| state.otherwise = answer);
    }

    /// Everything so far that `wanted` is true for.
    pub fn seen(&self, wanted: impl Fn(&Request) -> bool) -> Vec<Request> {
        self.state().seen.iter().filter(|request| wanted(request)).cloned().collect()
    }

    /// Waits until there are `count` requests that `wanted` is true for.
    #[track_caller]
    pub fn wait_for(&self, count: usize, wanted: impl Fn(&Request) -> bool) -> Vec<Request> {
        self.wait_for_within(DEADLINE, count, wanted)
    }

    /// The same for what may take longer than anything else.
    #[track_caller]
    pub fn wait_for_within(
        &self,
        time: Duration,
        count: usize,
        wanted: impl Fn(&Request) -> bool,
    ) -> Vec<Request> {
        let reached = |state: &State| state.seen.iter().filter(|request| wanted(request)).count() >= count;
        self.wait_until(time, reached);
        self.seen(wanted)
    }

    /// Waits for the end of job `id`.
    #[track_caller]
    pub fn wait_for_end(&self, id: &str) -> Request {
        self.wait_for(1, |request| request.is_end() && request.id() == id).remove(0)
    }

    /// Waits until an open request of this route was hung up by the worker.
    #[track_caller]
    pub fn wait_for_hang_up(&self, route: &str) {
        let route = format!("/{route}/");
        self.wait_until(DEADLINE, |state| state.hung_up.iter().any(|target| target.contains(&route)));
    }

    #[track_caller]
    fn wait_until(&self, time: Duration, reached: impl Fn(&State) -> bool) {
        let until = Instant::now() + time;
        let mut state = self.state();
        while !reached(&state) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let mut seen: Vec<_> =
                    state.seen.iter().map(|r| format!("{} {:.200}", r.target, r.body)).collect();
                seen.extend(state.hung_up.iter().map(|target| format!("hung up: {target}")));
                seen.dedup();
                drop(state);
                panic!("nothing came; seen so far:\n{}", seen.join("\n"));
            }
            state = self.shared.1.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Waits until there are so many answers to takes that were not given, or that nobody has read.
    #[track_caller]
    pub fn wait_for_takes_left(&self, count: usize) {
        self.wait_until(DEADLINE, |state| state.takes.len() == count);
    }

    /// Answers to takes that were not given yet.
    pub fn takes_left(&self) -> usize {
        self.state().takes.len()
    }
}

/// A job for the scripted runner.
pub fn job(id: &str, what: &str) -> Value {
    json!({"id": id, "input": {"prompt": format!("fault: {what}")}})
}

fn serve(stream: TcpStream, shared: &(Mutex<State>, Condvar)) {
    stream.set_nodelay(true).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while let Some(request) = read(&mut reader) {
        let answer = {
            let mut state = shared.0.lock().unwrap();
            state.seen.push(request.clone());
            shared.1.notify_all();
            loop {
                // Nothing is handed to who has left.
                if request.route().starts_with("job-take") && has_hung_up(&stream) {
                    state.hung_up.push(request.target.clone());
                    shared.1.notify_all();
                    return;
                }
                let queued = match request.route() {
                    "job-take" | "job-take-batch" => {
                        state.takes.pop_front().or_else(|| state.otherwise.clone())
                    }
                    "job-stop" => state.stops.pop_front().or_else(|| state.otherwise.clone()),
                    "job-done" if request.is_end() => {
                        let began = *state.outage_began.get_or_insert(request.at);
                        let outage = state.outage.clone().filter(|(_, time)| began.elapsed() < *time);
                        let answer = outage.map(|(answer, _)| answer).or_else(|| state.ends.pop_front());
                        Some(answer.unwrap_or_else(|| Answer::json(&json!({"ok": true}))))
                    }
                    "ping" => Some(state.ping.clone().unwrap_or_else(|| Answer::status(200))),
                    "job-done" if state.reports_wait => None,
                    _ => Some(Answer::status(200)),
                };
                match queued {
                    Some(Answer::Silence) | None if has_hung_up(&stream) => {
                        state.hung_up.push(request.target.clone());
                        shared.1.notify_all();
                        return;
                    }
                    Some(Answer::Silence) => {
                        // The answer was taken from its queue; the next look finds it there again.
                        match request.route() {
                            "job-stop" => state.stops.push_front(Answer::Silence),
                            "job-done" => state.ends.push_front(Answer::Silence),
                            "job-take" => state.takes.push_front(Answer::Silence),
                            _ => {}
                        }
                        state = shared.1.wait_timeout(state, LOOK).unwrap().0;
                    }
                    None => state = shared.1.wait_timeout(state, LOOK).unwrap().0,
                    Some(answer) => break answer,
                }
            }
        };
        let unread = answer.clone();
        match answer {
            Answer::Reply(status, header, body) => {
                let header = if header.is_empty() { header } else { header + "\r\n" };
                let length =
                    if status == 204 { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
                let head = format!("HTTP/1.1 {status} X\r\n{length}{header}\r\n");
                let written = (&stream).write_all((head + &body).as_bytes());
                let lost = written.is_err() || was_lost(&stream);
                if lost && request.route().starts_with("job-take") && status == 200 {
                    shared.0.lock().unwrap().takes.push_front(unread);
                    shared.1.notify_all();
                }
                if lost {
                    return;
                }
            }
            Answer::HangUp | Answer::Silence => return,
        }
    }
}

fn has_hung_up(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let peeked = stream.peek(&mut [0]);
    stream.set_nonblocking(false).unwrap();
    matches!(peeked, Ok(0)) || peeked.is_err_and(|e| e.kind() != std::io::ErrorKind::WouldBlock)
}

/// Whether the other side hung up before it had read what was written: its system resets the connection then. Waits
/// for its next request or its end.
fn was_lost(stream: &TcpStream) -> bool {
    match stream.peek(&mut [0]) {
        // The reset may still be on its way, behind the end of the other side's own words.
        Ok(0) => (0..40).any(|_| {
            thread::sleep(LOOK);
            !matches!(stream.take_error(), Ok(None))
        }),
        peeked => peeked.is_err(),
    }
}

fn read(reader: &mut impl BufRead) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let target = line.split_whitespace().nth(1)?.to_string();
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.push((name.to_string(), value.to_string()));
    }
    let mut request = Request { at: Instant::now(), target, headers, body: String::new() };
    let length = request.header("content-length").map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    request.body = String::from_utf8(body).ok()?;
    Some(request)
}
