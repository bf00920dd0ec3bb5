//! Polling for jobs and for stops, and how long to pause between polls.

use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::held::Held;
use super::platform::{NoReply, Platform, Reply};
use super::protocol::Job;

/// What the platform handed over.
#[derive(Debug)]
pub enum Handed {
    /// A job to run.
    Job(Box<Job>),
    /// Something else that has an id, so that it can be answered with an error.
    Malformed {
        /// Its id.
        id: String,
        /// What is wrong with it.
        why: String,
    },
}

/// What to make of an answer to a poll.
enum Answer<T> {
    /// After this time.
    Found(Vec<T>, Duration),
    /// As RunPod answers where there is nothing to do; after this time.
    Nothing(Duration),
    /// The platform asks for a pause.
    TooMany(Option<Duration>),
    Failed(String),
}

/// Sorts the answers that both polls have in common; `read` finds what is asked for in the body of a 200.
fn answer<T>(reply: Result<Reply, NoReply>, read: impl FnOnce(&Value) -> Vec<T>) -> Answer<T> {
    let reply = match reply {
        Ok(reply) => reply,
        // The platform holds a poll for longer than this worker waits. That is no failure.
        Err(NoReply::TimedOut) => return Answer::Nothing(Duration::MAX),
        Err(NoReply::Failed(why)) => return Answer::Failed(why),
    };
    match reply.status {
        200 => {
            let found = serde_json::from_slice(&reply.body).map(|body| read(&body)).unwrap_or_default();
            if found.is_empty() { Answer::Nothing(reply.after) } else { Answer::Found(found, reply.after) }
        }
        // RunPod answers 400 to a worker that FlashBoot has just woken.
        201..=299 | 400 => Answer::Nothing(reply.after),
        429 => Answer::TooMany(reply.retry_after),
        status => Answer::Failed(format!("HTTP {status}")),
    }
}

/// The jobs in the body of a take: one, or a list. What has no id is nobody's job.
fn jobs(body: &Value) -> Vec<Handed> {
    match body {
        Value::Array(list) => list.iter().filter_map(job).collect(),
        Value::Null => Vec::new(),
        one => job(one).into_iter().collect(),
    }
}

fn job(value: &Value) -> Option<Handed> {
    let id = match value.get("id") {
        Some(Value::String(id)) if !id.is_empty() => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => {
            tracing::error!("the platform handed over something without an `id`, expected a job");
            return None;
        }
    };
    let Some(input) = value.get("input") else {
        return Some(Handed::Malformed { id, why: "the job has no `input`".to_string() });
    };
    let rest = value.as_object().cloned().unwrap_or_default();
    let rest = rest.into_iter().filter(|(name, _)| name != "id" && name != "input").collect();
    Some(Handed::Job(Box::new(Job { id, input: input.clone(), rest })))
}

/// The ids in the body of a stop.
fn stops(body: &Value) -> Vec<String> {
    let ids = body.get("jobsToStop").and_then(Value::as_array);
    ids.into_iter().flatten().filter_map(|id| id.as_str().map(str::to_string)).collect()
}

/// How long to pause, in units: an answer that came too fast or not at all must not become a busy loop.
#[derive(Clone, Debug)]
pub struct Pace {
    unit: Duration,
    /// Answers in a row that said nothing at once, and failures in a row.
    empty: u32,
    failed: u32,
}

impl Pace {
    /// `unit` is a second, but in tests.
    pub fn new(unit: Duration) -> Self {
        Self { unit, empty: 0, failed: 0 }
    }

    /// After an answer that did what it should.
    pub fn good(&mut self) {
        *self = Self::new(self.unit);
    }

    /// After an answer that said nothing; none after one that the platform held back for a while.
    pub fn after_nothing(&mut self, held: Duration) -> Duration {
        if held >= self.unit {
            self.good();
            return Duration::ZERO;
        }
        self.failed = 0;
        let pause = doubled(self.unit / 20, self.empty).min(5 * self.unit);
        self.empty += 1;
        jittered(pause)
    }

    /// After an error.
    pub fn after_failure(&mut self) -> Duration {
        let pause = doubled(self.unit, self.failed).min(30 * self.unit);
        self.failed += 1;
        jittered(pause)
    }

    /// After a 429: as long as the platform asks, else as long as the Python worker waits.
    pub fn after_too_many(&self, asked: Option<Duration>) -> Duration {
        asked.unwrap_or(5 * self.unit)
    }

    fn after<T>(&mut self, answer: &Answer<T>) -> Duration {
        match answer {
            Answer::Found(..) => {
                self.good();
                Duration::ZERO
            }
            Answer::Nothing(held) => self.after_nothing(*held),
            Answer::TooMany(asked) => self.after_too_many(*asked),
            Answer::Failed(_) => self.after_failure(),
        }
    }
}

fn doubled(pause: Duration, times: u32) -> Duration {
    pause.saturating_mul(1_u32.checked_shl(times).unwrap_or(u32::MAX))
}

/// Between half and all of `pause`, so that workers that failed together do not come back together.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::random_range(0.5..=1.0))
}

/// How a worker polls for jobs.
#[derive(Clone)]
pub struct Polling {
    /// Where.
    pub platform: Platform,
    /// What the worker has to do already.
    pub held: Held,
    /// Jobs that it runs at once.
    pub slots: usize,
    /// The unit of its pauses.
    pub unit: Duration,
}

impl Polling {
    /// Polls until there is something to do, or until the poll that is open when `draining` comes is answered.
    pub async fn take(self, draining: CancellationToken) -> Vec<Handed> {
        let mut pace = Pace::new(self.unit);
        loop {
            let free = self.slots.saturating_sub(self.held.busy()).max(1);
            let answer = answer(self.platform.take(free, !self.held.is_empty()).await, jobs);
            let pause = pace.after(&answer);
            match answer {
                Answer::Found(handed, _) => return handed,
                Answer::Failed(why) => tracing::warn!(why, ?pause, "no job could be taken"),
                Answer::Nothing(_) | Answer::TooMany(_) => tracing::debug!(?pause, "no job"),
            }
            tokio::select! {
                biased;
                () = draining.cancelled() => return Vec::new(),
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
}

/// Sends the ids of jobs to stop, for as long as somebody listens.
pub async fn watch_stops(platform: Platform, unit: Duration, found: mpsc::Sender<String>) {
    let mut pace = Pace::new(unit);
    loop {
        let answer = answer(platform.stops().await, stops);
        // The platform may name a job again and again until it is stopped.
        let pause = match &answer {
            Answer::Found(_, held) => pace.after_nothing(*held),
            other => pace.after(other),
        };
        match answer {
            Answer::Found(ids, _) => {
                for id in ids {
                    if found.send(id).await.is_err() {
                        return;
                    }
                }
            }
            Answer::Failed(why) => tracing::warn!(why, ?pause, "stops could not be asked for"),
            Answer::Nothing(_) | Answer::TooMany(_) => {}
        }
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const UNIT: Duration = Duration::from_secs(1);
    const AT_ONCE: Duration = Duration::ZERO;

    fn reply(status: u16, body: &str) -> Result<Reply, NoReply> {
        Ok(Reply { status, retry_after: None, body: body.to_string().into(), after: AT_ONCE })
    }

    /// The jobs and the malformed elements in an answer.
    fn found(body: &Value) -> Vec<String> {
        let name = |handed| match handed {
            Handed::Job(job) => job.id,
            Handed::Malformed { id, .. } => format!("malformed {id}"),
        };
        jobs(body).into_iter().map(name).collect()
    }

    #[test]
    fn jobs_are_found_in_whatever_the_platform_hands_over() {
        for (body, expected) in [
            (json!({"id": "a", "input": {}}), vec!["a"]),
            (json!({"id": "a", "input": null}), vec!["a"]),
            (json!({"id": 7, "input": 1}), vec!["7"]),
            (json!({"id": "a"}), vec!["malformed a"]),
            (json!([{"input": 1}, {"id": "b", "input": 1}, "x", null]), vec!["b"]),
            (json!([{"id": "a", "input": 1}, {"id": "b", "input": 2}]), vec!["a", "b"]),
            (json!([]), vec![]),
            (json!(null), vec![]),
            (json!("a job"), vec![]),
            (json!({"id": "", "input": 1}), vec![]),
            (json!({"error": "no"}), vec![]),
        ] {
            assert_eq!(found(&body), expected, "{body}");
        }
    }

    #[test]
    fn a_job_keeps_what_the_sender_gave_beside_its_input() {
        let body = json!({"id": "a", "input": 1, "s3Config": {"bucketName": "b"}, "extra": 2});
        let Some(Handed::Job(job)) = job(&body) else { panic!("no job") };
        assert_eq!(Value::Object(job.rest), json!({"s3Config": {"bucketName": "b"}, "extra": 2}));
    }

    #[test]
    fn only_ids_that_are_text_are_stopped() {
        assert_eq!(stops(&json!({"jobsToStop": ["a", 1, null, "b"]})), ["a", "b"]);
        for odd in [json!({"jobsToStop": "a"}), json!([]), json!(null)] {
            assert!(stops(&odd).is_empty(), "{odd}");
        }
    }

    /// The pauses after `count` answers of this kind in a row.
    fn pauses(count: usize, reply: &Result<Reply, NoReply>) -> Vec<Duration> {
        let mut pace = Pace::new(UNIT);
        (0..count).map(|_| pace.after(&answer(reply.clone(), jobs))).collect()
    }

    #[test]
    fn answers_that_say_nothing_at_once_are_not_followed_by_a_busy_loop() {
        for odd in [reply(204, ""), reply(400, ""), reply(200, ""), reply(200, "<html>"), reply(200, "[]")] {
            let pauses = pauses(12, &odd);
            assert!(pauses[0] >= UNIT / 40 && pauses[0] <= UNIT / 20, "{odd:?}: {pauses:?}");
            assert!(pauses[11] >= UNIT * 5 / 2 && pauses[11] <= UNIT * 5, "{odd:?}: {pauses:?}");
        }
    }

    #[test]
    fn a_poll_that_was_held_is_followed_by_the_next_at_once() {
        let held = Ok(Reply { after: UNIT, ..reply(204, "").unwrap() });
        assert_eq!(pauses(3, &held), [AT_ONCE; 3]);
        assert_eq!(pauses(3, &Err(NoReply::TimedOut)), [AT_ONCE; 3]);
    }

    #[test]
    fn failures_are_followed_by_pauses_of_1_to_30_seconds_and_429_by_5() {
        for failed in [reply(500, ""), reply(401, ""), reply(404, ""), Err(NoReply::Failed("refused".into()))]
        {
            let pauses = pauses(40, &failed);
            assert!(pauses[0] >= UNIT / 2 && pauses[0] <= UNIT, "{pauses:?}");
            assert!(pauses[39] >= UNIT * 15 && pauses[39] <= UNIT * 30, "{pauses:?}");
        }
        assert_eq!(pauses(2, &reply(429, "")), [UNIT * 5; 2]);
        let told = Ok(Reply { retry_after: Some(UNIT * 2), ..reply(429, "").unwrap() });
        assert_eq!(pauses(2, &told), [UNIT * 2; 2]);
    }
}
