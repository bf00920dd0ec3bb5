//! `runpod.toml`: what the endpoint shall be. It is read strictly; what is wrong is named with its line.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Deserializer, de};
use toml::Spanned;

use crate::job::{Code, JobError};

/// Sizes of a volume that RunPod offers, in GB.
const VOLUME_GB: RangeInclusive<u64> = 10..=4096;
/// RunPod's limits of an execution timeout: 5 seconds to 7 days.
const EXECUTION_TIMEOUT_S: RangeInclusive<u64> = 5..=7 * 86_400;
/// RunPod's limits of an idle timeout.
const IDLE_TIMEOUT_S: RangeInclusive<u64> = 1..=3600;
/// The image takes up to 1 GB; beyond a few terabytes it is a slip of the pen.
const CONTAINER_DISK_GB: RangeInclusive<u64> = 1..=4096;
/// More GPUs or workers than an account gets.
const MOST_GPUS: u64 = 8;
const MOST_WORKERS: u64 = 1000;
/// The least queue delay that RunPod takes.
const LEAST_QUEUE_DELAY_S: f64 = 0.5;
/// The longest that a job may wait for another worker where one is busy.
const MOST_QUEUE_DELAY_S: f64 = 3600.0;
/// Parts of names whose values are not written into a file.
const SECRET_NAMES: [&str; 6] = ["SECRET", "TOKEN", "PASSWORD", "API_KEY", "ACCESS_KEY", "PRIVATE_KEY"];

/// The endpoint as the file describes it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// By which the endpoint is found again.
    #[serde(deserialize_with = "name")]
    pub name: String,
    /// The image where `--image` names none.
    pub image: Option<String>,
    /// Disk of a worker beside the volume, in GB.
    #[serde(deserialize_with = "container_disk")]
    pub container_disk_gb: u64,
    /// The longest that one job may run, in seconds.
    #[serde(deserialize_with = "execution_timeout")]
    pub execution_timeout_s: u64,
    /// Whether stopped workers are kept for quicker starts.
    pub flashboot: bool,
    /// The id of the credential that opens a private registry.
    pub registry: Option<String>,
    /// What workers run on.
    pub gpu: Gpu,
    /// How many run, and for how long.
    pub workers: Workers,
    /// The network volume, if there is one.
    pub volume: Option<Volume>,
    /// Variables of the container.
    #[serde(default)]
    env: BTreeMap<Spanned<String>, Spanned<EnvValue>>,
}

/// What workers run on.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// RunPod's pools, the preferred one first.
    #[serde(deserialize_with = "pools")]
    pub pools: Vec<String>,
    /// GPUs of one worker.
    #[serde(deserialize_with = "gpu_count")]
    pub count: u64,
    /// The least CUDA version of the host's driver.
    #[serde(deserialize_with = "cuda_version")]
    pub min_cuda: String,
}

/// How many workers run, and for how long.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "RawWorkers")]
pub struct Workers {
    /// Workers that always run.
    pub min: u64,
    /// Workers that run at most.
    pub max: u64,
    /// Seconds that a worker waits for the next job.
    pub idle_timeout_s: u64,
    /// Seconds that a job waits before another worker is started.
    pub queue_delay_s: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWorkers {
    #[serde(deserialize_with = "workers")]
    min: u64,
    #[serde(deserialize_with = "workers")]
    max: u64,
    #[serde(deserialize_with = "idle_timeout")]
    idle_timeout_s: u64,
    #[serde(deserialize_with = "queue_delay")]
    queue_delay_s: f64,
}

impl TryFrom<RawWorkers> for Workers {
    type Error = String;

    fn try_from(raw: RawWorkers) -> Result<Self, String> {
        let RawWorkers { min, max, idle_timeout_s, queue_delay_s } = raw;
        if max == 0 || max < min {
            return Err(format!("`max` is {max}, expected at least 1 and not less than `min` ({min})"));
        }
        Ok(Self { min, max, idle_timeout_s, queue_delay_s })
    }
}

/// The network volume.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// By which the volume is found again.
    #[serde(deserialize_with = "name")]
    pub name: String,
    /// Its size in GB; it can only grow.
    #[serde(deserialize_with = "volume_size")]
    pub size_gb: u64,
    /// Where it is, and with it every worker.
    #[serde(deserialize_with = "name")]
    pub data_center: String,
}

/// Where a variable's value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum EnvValue {
    /// It stands in the file.
    Plain(String),
    /// RunPod puts in the secret of this reference when a worker starts.
    RunpodSecret(String),
    /// It is taken from this variable of whoever deploys.
    FromEnvironment(String),
}

impl<'de> Deserialize<'de> for EnvValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if let Some(inner) = text.strip_prefix("{{").and_then(|rest| rest.strip_suffix("}}")) {
            return match inner.trim().strip_prefix("RUNPOD_SECRET_").is_some_and(is_word) {
                true => Ok(Self::RunpodSecret(text)),
                false => Err(de::Error::custom("expected a secret as {{ RUNPOD_SECRET_name }}")),
            };
        }
        if let Some(name) = text.strip_prefix("${").and_then(|rest| rest.strip_suffix('}')) {
            return match is_word(name) {
                true => Ok(Self::FromEnvironment(name.to_string())),
                false => Err(de::Error::custom("expected a variable as ${NAME}")),
            };
        }
        Ok(Self::Plain(text))
    }
}

/// The variables of the container, with their values.
#[derive(Clone, Default)]
pub struct Env {
    /// By name.
    pub values: BTreeMap<String, String>,
    /// Names whose values are not shown.
    pub hidden: BTreeSet<String>,
}

impl fmt::Debug for Env {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.values.keys()).finish()
    }
}

impl Spec {
    /// Reads `text`, which is called `origin` in errors.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] naming file, line, value and expectation.
    pub fn parse(text: &str, origin: &str) -> Result<Self, JobError> {
        let spec: Self = toml::from_str(text).map_err(|e| {
            let start = e.span().unwrap_or_default().start;
            refused(text, origin, start, e.message())
        })?;
        for (name, value) in &spec.env {
            let start = name.span().start;
            let name = name.get_ref().as_str();
            if !is_word(name) {
                let said = format!("`{name}` is not a variable's name, expected letters, digits and `_`");
                return Err(refused(text, origin, start, &said));
            }
            if name.starts_with("RUNPOD_") {
                return Err(refused(text, origin, start, &format!("`{name}` is set by RunPod itself")));
            }
            let is_secret = SECRET_NAMES.iter().any(|part| name.contains(part));
            if is_secret && matches!(value.get_ref(), EnvValue::Plain(_)) {
                let said = format!(
                    "`{name}` is a secret, expected {{{{ RUNPOD_SECRET_{name} }}}} or ${{{name}}} in place of its value"
                );
                return Err(hidden(text, origin, start, &said));
            }
        }
        Ok(spec)
    }

    /// The variables of the container; `lookup` is the environment of whoever deploys.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] naming the variable that is not set.
    pub fn env(&self, lookup: impl Fn(&str) -> Option<String>) -> Result<Env, JobError> {
        let mut env = Env::default();
        for (name, value) in &self.env {
            let name = name.get_ref().clone();
            let value = match value.get_ref() {
                EnvValue::Plain(text) | EnvValue::RunpodSecret(text) => text.clone(),
                EnvValue::FromEnvironment(variable) => {
                    env.hidden.insert(name.clone());
                    lookup(variable).filter(|value| !value.is_empty()).ok_or_else(|| {
                        let message = format!("`{variable}` is not set, expected the value of `env.{name}`");
                        JobError::new(Code::InvalidInput, message).with_reason("CONFIG")
                    })?
                }
            };
            env.values.insert(name, value);
        }
        Ok(env)
    }
}

/// An error at byte `start` of `text`, with the line itself.
fn refused(text: &str, origin: &str, start: usize, said: &str) -> JobError {
    let shown = text.lines().nth(line_of(text, start) - 1).unwrap_or_default().trim().to_string();
    let mut error = hidden(text, origin, start, said);
    error.message.push_str(&format!(", in `{shown}`"));
    error
}

/// The same without the line, which may hold a secret.
fn hidden(text: &str, origin: &str, start: usize, said: &str) -> JobError {
    let message = format!("{origin} line {}: {said}", line_of(text, start));
    JobError::new(Code::InvalidInput, message).with_reason("RUNPOD_TOML")
}

fn line_of(text: &str, start: usize) -> usize {
    let before = &text.as_bytes()[..start.min(text.len())];
    before.iter().filter(|byte| **byte == b'\n').count() + 1
}

fn is_word(text: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric() || c == '_';
    !text.is_empty() && !text.starts_with(|c: char| c.is_ascii_digit()) && text.chars().all(letter)
}

fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    match text.trim() == text && (1..=100).contains(&text.chars().count()) {
        true => Ok(text),
        false => Err(de::Error::custom("expected 1 to 100 characters without spaces around them")),
    }
}

fn pools<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let pools = Vec::<String>::deserialize(deserializer)?;
    let unique: BTreeSet<_> = pools.iter().collect();
    match !pools.is_empty() && unique.len() == pools.len() && pools.iter().all(|pool| is_word(pool)) {
        true => Ok(pools),
        false => Err(de::Error::custom("expected at least one pool such as \"ADA_48_PRO\", each once")),
    }
}

fn cuda_version<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    let number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    match text.split_once('.').is_some_and(|(major, minor)| number(major) && number(minor)) {
        true => Ok(text),
        false => Err(de::Error::custom("expected a version such as \"13.0\"")),
    }
}

fn queue_delay<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let seconds = f64::deserialize(deserializer)?;
    match (LEAST_QUEUE_DELAY_S..=MOST_QUEUE_DELAY_S).contains(&seconds) {
        true => Ok(seconds),
        false => Err(de::Error::custom(format!(
            "{seconds} is out of range, expected {LEAST_QUEUE_DELAY_S} to {MOST_QUEUE_DELAY_S}"
        ))),
    }
}

fn within<'de, D: Deserializer<'de>>(deserializer: D, range: RangeInclusive<u64>) -> Result<u64, D::Error> {
    let number = i64::deserialize(deserializer)?;
    u64::try_from(number).ok().filter(|number| range.contains(number)).ok_or_else(|| {
        let (least, most) = (range.start(), range.end());
        de::Error::custom(format!("{number} is out of range, expected {least} to {most}"))
    })
}

fn container_disk<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    within(deserializer, CONTAINER_DISK_GB)
}

fn execution_timeout<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    within(deserializer, EXECUTION_TIMEOUT_S)
}

fn idle_timeout<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    within(deserializer, IDLE_TIMEOUT_S)
}

fn gpu_count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    within(deserializer, 1..=MOST_GPUS)
}

fn workers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    within(deserializer, 0..=MOST_WORKERS)
}

fn volume_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    within(deserializer, VOLUME_GB)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = include_str!("../../runpod.toml");

    fn with(old: &str, new: &str) -> Result<Spec, JobError> {
        assert!(OURS.contains(old), "{old}");
        Spec::parse(&OURS.replacen(old, new, 1), "runpod.toml")
    }

    #[test]
    fn the_file_of_this_repository_is_sound() {
        let spec = Spec::parse(OURS, "runpod.toml").unwrap();
        assert_eq!(spec.gpu.pools, ["ADA_48_PRO", "AMPERE_80", "ADA_80_PRO", "HOPPER_141"]);
        assert_eq!((spec.workers.min, spec.workers.max), (0, 5));
        assert!(spec.env(|_| None).unwrap().hidden.is_empty(), "it deploys with RunPod's secrets alone");
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (old, new, said) in [
            ("flashboot = true", "flashboot = true\nflash = 1", "unknown field `flash`"),
            ("flashboot = true\n", "", "missing field `flashboot`"),
            ("flashboot = true", "flashboot = 1", "invalid type"),
            ("idle_timeout_s = 30", "idle_timeout_s = 0", "0 is out of range, expected 1 to 3600"),
            ("idle_timeout_s = 30", "idle_timeout_s = -1", "-1 is out of range"),
            ("max = 5", "max = 0", "`max` is 0, expected at least 1"),
            ("min = 0", "min = 6", "`max` is 5, expected at least 1 and not less than `min` (6)"),
            ("queue_delay_s = 4", "queue_delay_s = 0.1", "0.1 is out of range"),
            ("count = 1", "count = 0", "0 is out of range, expected 1 to 8"),
            ("\"AMPERE_80\", ", "\"ADA_48_PRO\", ", "each once"),
            ("min_cuda = \"13.0\"", "min_cuda = \"13\"", "expected a version such as \"13.0\""),
            ("size_gb = 160", "size_gb = 5", "5 is out of range, expected 10 to 4096"),
            ("name = \"talkie\"", "name = \"\"", "expected 1 to 100 characters"),
            ("R2_BUCKET_NAME =", "R2-BUCKET =", "`R2-BUCKET` is not a variable's name"),
            ("R2_BUCKET_NAME =", "RUNPOD_POD_ID =", "`RUNPOD_POD_ID` is set by RunPod itself"),
            (
                "{{ RUNPOD_SECRET_R2_BUCKET_NAME }}",
                "{{ R2 }}",
                "expected a secret as {{ RUNPOD_SECRET_name }}",
            ),
            ("{{ RUNPOD_SECRET_R2_BUCKET_NAME }}", "${R 2}", "expected a variable as ${NAME}"),
            ("[env]", "[env", ""),
        ] {
            let e = with(old, new).unwrap_err();
            assert_eq!(e.code, Code::InvalidInput);
            assert!(e.message.starts_with("runpod.toml line ") && e.message.contains(said), "{}", e.message);
        }
        let at = OURS.lines().position(|line| line.starts_with("idle_timeout_s")).unwrap() + 1;
        let e = with("idle_timeout_s = 30", "idle_timeout_s = 0").unwrap_err();
        assert!(e.message.starts_with(&format!("runpod.toml line {at}: ")), "{}", e.message);
    }

    #[test]
    fn a_secret_in_the_file_is_refused_and_not_shown() {
        let e = with("{{ RUNPOD_SECRET_R2_SECRET_ACCESS_KEY }}", "canary").unwrap_err();
        assert!(e.message.contains("`R2_SECRET_ACCESS_KEY` is a secret"), "{}", e.message);
        assert!(!e.message.contains("canary"), "{}", e.message);
    }

    #[test]
    fn values_come_from_the_file_from_runpod_or_from_who_deploys() {
        let spec = with("{{ RUNPOD_SECRET_R2_BUCKET_NAME }}", "${BUCKET}").unwrap();
        let e = spec.env(|_| None).unwrap_err();
        assert_eq!(e.message, "`BUCKET` is not set, expected the value of `env.R2_BUCKET_NAME`");
        let env = spec.env(|name| (name == "BUCKET").then(|| "canary".to_string())).unwrap();
        assert_eq!(env.values["R2_BUCKET_NAME"], "canary");
        assert_eq!(env.values["R2_ACCOUNT_ID"], "{{ RUNPOD_SECRET_R2_ACCOUNT_ID }}");
        assert_eq!(env.hidden.iter().collect::<Vec<_>>(), ["R2_BUCKET_NAME"]);
        assert!(!format!("{env:?}").contains("canary"));
    }
}
