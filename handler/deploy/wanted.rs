//! The endpoint as RunPod is asked for it, and what of that differs from the one that is there.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::spec::{Env, Spec};
use crate::job::{Code, JobError};

/// Shown in place of a value that is not.
const REDACTED: &str = "[REDACTED]";

/// The body of a request that makes the endpoint.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Wanted {
    name: String,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<String>,
    disk: u64,
    #[serde(serialize_with = "env_values")]
    env: Env,
    #[serde(skip_serializing_if = "Option::is_none")]
    registry: Option<String>,
    gpu: Gpu,
    workers: Workers,
    scaling: Scaling,
    timeout: u64,
    flashboot: &'static str,
    network_volumes: Vec<String>,
    data_center_ids: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Gpu {
    pools: Vec<String>,
    count: u64,
    min_cuda_version: String,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Workers {
    min: u64,
    max: u64,
    idle_timeout: u64,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Scaling {
    #[serde(rename = "type")]
    kind: &'static str,
    queue_delay: f64,
}

fn env_values<S: serde::Serializer>(env: &Env, serializer: S) -> Result<S::Ok, S::Error> {
    env.values.serialize(serializer)
}

/// What an update sends, and what that changes, in words that hold no value of a variable.
#[derive(Debug, Default, PartialEq)]
pub struct Update {
    /// The body.
    pub body: Map<String, Value>,
    /// Names such as `image`, `workers.max` and `env.LOG_LEVEL`.
    pub changed: Vec<String>,
}

impl Wanted {
    /// The endpoint of `spec` with this image and the volume of this id; without an image it keeps the one it has.
    pub fn new(spec: &Spec, image: Option<String>, env: Env, volume_id: Option<String>) -> Self {
        Self {
            name: spec.name.clone(),
            kind: "QUEUE",
            image,
            disk: spec.container_disk_gb,
            env,
            registry: spec.registry.clone(),
            gpu: Gpu {
                pools: spec.gpu.pools.clone(),
                count: spec.gpu.count,
                min_cuda_version: spec.gpu.min_cuda.clone(),
            },
            workers: Workers {
                min: spec.workers.min,
                max: spec.workers.max,
                idle_timeout: spec.workers.idle_timeout_s,
            },
            scaling: Scaling { kind: "QUEUE_DELAY", queue_delay: spec.workers.queue_delay_s },
            timeout: spec.execution_timeout_s * 1000,
            flashboot: if spec.flashboot { "FLASHBOOT" } else { "OFF" },
            network_volumes: volume_id.into_iter().collect(),
            data_center_ids: spec.volume.iter().map(|volume| volume.data_center.clone()).collect(),
        }
    }

    /// The body that makes it.
    pub fn body(&self) -> Value {
        json!(self)
    }

    /// `body` as it may be shown.
    pub fn shown(&self, body: &Value) -> Value {
        let mut body = body.clone();
        if let Some(env) = body.get_mut("env").and_then(Value::as_object_mut) {
            for (_, value) in env.iter_mut().filter(|(name, _)| self.env.hidden.contains(*name)) {
                *value = REDACTED.into();
            }
        }
        body
    }

    /// What makes the endpoint `current` this one.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] when no update can.
    pub fn update(&self, current: &Value) -> Result<Update, JobError> {
        let id = current["id"].as_str().unwrap_or_default();
        if current["type"].as_str().is_some_and(|kind| kind != self.kind) || current["gpu"].is_null() {
            let message = format!("the endpoint {id} is not a queue on GPUs, which no update changes");
            return Err(JobError::new(Code::InvalidInput, message)
                .with_reason("OTHER_KIND")
                .with_hint("delete it, or choose another `name` in runpod.toml"));
        }
        let mut update = Update::default();
        let Value::Object(wanted) = self.body() else { return Ok(update) };
        for (field, value) in wanted {
            // The platform appends to the name where the endpoint boots quickly.
            if matches!(field.as_str(), "name" | "type") {
                continue;
            }
            let before = &current[&field];
            let changed = differences(&field, before, &value);
            if !changed.is_empty() {
                update.changed.extend(changed);
                update.body.insert(field, value);
            }
        }
        Ok(update)
    }
}

/// Where `after` differs from `before`. Objects are compared field by field: the platform's have more, except
/// for variables, of which the update replaces all.
fn differences(field: &str, before: &Value, after: &Value) -> Vec<String> {
    let Value::Object(after) = after else {
        return if is_same(before, after) { Vec::new() } else { vec![field.to_string()] };
    };
    let mut names: Vec<&String> = after.keys().collect();
    if field == "env" {
        names.extend(before.as_object().into_iter().flatten().map(|(name, _)| name));
        names.sort();
        names.dedup();
    }
    let differs = |name: &&String| !is_same(&before[name.as_str()], after.get(*name).unwrap_or(&Value::Null));
    names.into_iter().filter(differs).map(|name| format!("{field}.{name}")).collect()
}

/// 4 and 4.0 are one number, which the platform writes as it likes.
fn is_same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: &str = "ghcr.io/o/talkie@sha256:aa";

    fn wanted(image: Option<&str>) -> Wanted {
        let spec = Spec::parse(include_str!("../../runpod.toml"), "runpod.toml").unwrap();
        let mut env = Env::default();
        env.values.extend([("A", "plain"), ("B", "canary")].map(|(n, v)| (n.to_string(), v.to_string())));
        env.hidden.insert("B".to_string());
        Wanted::new(&spec, image.map(str::to_string), env, Some("vol1".to_string()))
    }

    /// The endpoint as the platform shows it after it was made.
    fn current() -> Value {
        let mut current = wanted(Some(IMAGE)).body();
        current["id"] = "ep1".into();
        current["name"] = "talkie -fb".into();
        current["gpu"]["allowedCudaVersions"] = json!([]);
        current["scaling"]["queueDelay"] = json!(4);
        current["createdAt"] = "2026-06-01T12:00:00Z".into();
        current
    }

    #[test]
    fn the_body_is_as_the_api_wants_it() {
        assert_eq!(
            wanted(Some(IMAGE)).body(),
            json!({
                "name": "talkie", "type": "QUEUE", "image": IMAGE, "disk": 10,
                "env": {"A": "plain", "B": "canary"},
                "gpu": {
                    "pools": ["ADA_48_PRO", "AMPERE_80", "ADA_80_PRO", "HOPPER_141"],
                    "count": 1, "minCudaVersion": "13.0",
                },
                "workers": {"min": 0, "max": 5, "idleTimeout": 30},
                "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4.0},
                "timeout": 7_200_000, "flashboot": "FLASHBOOT",
                "networkVolumes": ["vol1"], "dataCenterIds": ["EU-RO-1"],
            })
        );
    }

    #[test]
    fn what_is_as_it_should_be_is_not_sent() {
        assert_eq!(wanted(Some(IMAGE)).update(&current()).unwrap(), Update::default());
        assert_eq!(wanted(None).update(&current()).unwrap(), Update::default(), "the image stays");
    }

    #[test]
    fn differences_are_sent_whole_and_told_by_name() {
        let mut old = current();
        old["image"] = "ghcr.io/o/talkie@sha256:bb".into();
        old["workers"]["max"] = 3.into();
        old["env"] = json!({"A": "other", "B": "canary", "OLD": "canary"});
        let update = wanted(Some(IMAGE)).update(&old).unwrap();
        assert_eq!(update.changed, ["image", "env.A", "env.OLD", "workers.max"]);
        assert_eq!(
            Value::Object(update.body),
            json!({
                "image": IMAGE, "env": {"A": "plain", "B": "canary"},
                "workers": {"min": 0, "max": 5, "idleTimeout": 30},
            })
        );
    }

    #[test]
    fn an_endpoint_of_another_kind_is_left_alone() {
        let mut other = current();
        other["type"] = "LOAD_BALANCER".into();
        assert_eq!(wanted(None).update(&other).unwrap_err().details["reason"], "OTHER_KIND");
        let mut other = current();
        other["gpu"] = Value::Null;
        assert!(wanted(None).update(&other).is_err());
    }

    #[test]
    fn values_of_whoever_deploys_are_not_shown() {
        let wanted = wanted(Some(IMAGE));
        let shown = wanted.shown(&wanted.body());
        assert_eq!(shown["env"], json!({"A": "plain", "B": REDACTED}));
    }
}
