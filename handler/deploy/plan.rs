//! What has to be done to the account, from what is there; and doing it.

use std::collections::BTreeSet;

use reqwest::Method;
use serde::Serialize;
use serde_json::{Value, json};

use super::api::{Api, Failure};
use super::spec::{Env, Spec, Volume};
use super::wanted::{Update, Wanted};
use crate::job::{Code, JobError};

/// Tries to make something that a broken connection leaves in doubt.
const TRIES: u32 = 3;
/// In a release, the field that holds the image.
const IMAGE_FIELD: &str = "template.imageName";

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Order {
    /// The endpoint.
    pub spec: Spec,
    /// Its image; without one it keeps the one that it has.
    pub image: Option<String>,
    /// Its variables.
    pub env: Env,
    /// Its id, where its name is not enough.
    pub endpoint_id: Option<String>,
}

/// One request that changes something. It has no `Debug`: the body holds variables.
pub struct Call {
    method: Method,
    path: String,
    body: Value,
    /// The body without what is not shown.
    shown: Value,
}

impl Call {
    /// For `--dry-run`: `method`, `url` and the body without secrets.
    pub fn shown(&self, url: impl Fn(&str) -> String) -> Value {
        json!({"method": self.method.as_str(), "url": url(&self.path), "body": self.shown})
    }

    /// Sends a request of [`rollback`].
    ///
    /// # Errors
    /// Why it was not carried out.
    pub async fn send(&self, api: &Api, before: &Value) -> Result<Outcome, JobError> {
        let after = api.patch(&self.path, &self.body).await?;
        Ok(Outcome::new(after, Some(before), vec!["image".to_string()]))
    }
}

/// What came of it. It has no `Debug`: the endpoint holds variables.
#[derive(Serialize)]
pub struct Outcome {
    /// The endpoint.
    pub endpoint_id: String,
    /// Its name.
    pub name: String,
    /// Whether it is new.
    pub created: bool,
    /// What has changed, by name.
    pub changed: Vec<String>,
    /// The image that it has now.
    pub image: Option<String>,
    /// The image that it had before.
    pub previous_image: Option<String>,
    /// Its network volume.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume_id: Option<String>,
    /// Where jobs are sent to.
    pub run_url: Option<String>,
    /// The endpoint as the API shows it.
    #[serde(skip)]
    pub endpoint: Value,
}

impl Outcome {
    /// Of an endpoint that is left as it is.
    pub fn unchanged(endpoint: Value) -> Self {
        let before = endpoint.clone();
        Self::new(endpoint, Some(&before), Vec::new())
    }

    fn new(endpoint: Value, before: Option<&Value>, changed: Vec<String>) -> Self {
        let text = |value: &Value| value.as_str().map(str::to_string);
        Self {
            endpoint_id: text(&endpoint["id"]).unwrap_or_default(),
            name: text(&endpoint["name"]).unwrap_or_default(),
            created: before.is_none(),
            changed,
            image: text(&endpoint["image"]),
            previous_image: before.and_then(|before| text(&before["image"])),
            volume_id: text(&endpoint["networkVolumes"][0]),
            run_url: text(&endpoint["requestUrls"]["run"]),
            endpoint,
        }
    }
}

/// What has to be done.
pub struct Plan {
    order: Order,
    /// The endpoint as it is.
    current: Option<Value>,
    volume: VolumeStep,
}

enum VolumeStep {
    None,
    Keep(String),
    Grow(String),
    Create,
}

impl Plan {
    /// Reads what is there and compares. Without a client the account is taken to be empty.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] for what RunPod does not have or cannot change; else why it cannot be read.
    pub async fn make(order: Order, api: Option<&Api>) -> Result<Self, JobError> {
        let (mut current, mut volume) = (None, None);
        if let Some(api) = api {
            check_pools(api, &order.spec.gpu.pools).await?;
            current = find_endpoint(api, &order.spec.name, order.endpoint_id.as_deref()).await?;
            if let Some(wanted) = &order.spec.volume {
                volume = find_volume(api, wanted).await?;
            }
        }
        if current.is_none() && order.image.is_none() {
            let message = format!("there is no endpoint {:?} yet, and no image for it", order.spec.name);
            return Err(JobError::new(Code::InvalidInput, message)
                .with_reason("IMAGE")
                .with_hint("name one with --image repository@sha256:…"));
        }
        let volume = match (&order.spec.volume, volume) {
            (None, _) => VolumeStep::None,
            (Some(_), None) => VolumeStep::Create,
            (Some(wanted), Some(found)) => found.step(wanted)?,
        };
        let plan = Self { order, current, volume };
        // What cannot be done is said before anything is done.
        plan.calls()?;
        Ok(plan)
    }

    /// The requests, in their order. The id of a volume that is not there yet is described.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] when the endpoint cannot be changed to what is asked for.
    pub fn calls(&self) -> Result<Vec<Call>, JobError> {
        let described = || self.order.spec.volume.as_ref().map(|volume| format!("<id of {}>", volume.name));
        let volume_id = match &self.volume {
            VolumeStep::None => None,
            VolumeStep::Keep(id) | VolumeStep::Grow(id) => Some(id.clone()),
            VolumeStep::Create => described(),
        };
        let endpoint = self.endpoint_call(volume_id)?;
        Ok(self.volume_call().into_iter().chain(endpoint.map(|(call, _)| call)).collect())
    }

    /// Sends the requests.
    ///
    /// # Errors
    /// Why one of them was not carried out; those before it were.
    pub async fn carry_out(&self, api: &Api) -> Result<Outcome, JobError> {
        let spec = &self.order.spec;
        let mut changed = Vec::new();
        let volume_id = match (&self.volume, self.volume_call()) {
            (VolumeStep::Keep(id), _) => Some(id.clone()),
            (VolumeStep::Grow(id), Some(call)) => {
                api.patch(&call.path, &call.body).await?;
                changed.push("volume.size".to_string());
                Some(id.clone())
            }
            (VolumeStep::Create, Some(call)) => {
                let find = async || match &spec.volume {
                    Some(wanted) => Ok(find_volume(api, wanted).await?.map(|found| found.value)),
                    None => Ok(None),
                };
                let made = create(api, &call, find).await?;
                changed.push("volume".to_string());
                Some(id_of(&made)?)
            }
            _ => None,
        };
        let before = self.current.as_ref();
        let endpoint = match self.endpoint_call(volume_id)? {
            // Nothing differs from what is there.
            None => self.current.clone().unwrap_or_default(),
            Some((call, fields)) => {
                changed.extend(fields);
                match call.method {
                    Method::POST => {
                        create(api, &call, async || find_endpoint(api, &spec.name, None).await).await?
                    }
                    _ => api.patch(&call.path, &call.body).await?,
                }
            }
        };
        id_of(&endpoint)?;
        Ok(Outcome::new(endpoint, before, changed))
    }

    fn volume_call(&self) -> Option<Call> {
        let wanted = self.order.spec.volume.as_ref()?;
        let call = |method, path: String, body: Value| Call { method, path, shown: body.clone(), body };
        match &self.volume {
            VolumeStep::None | VolumeStep::Keep(_) => None,
            VolumeStep::Grow(id) => {
                let path = format!("/network-volumes/{id}");
                Some(call(Method::PATCH, path, json!({"size": wanted.size_gb})))
            }
            VolumeStep::Create => {
                let body =
                    json!({"name": wanted.name, "size": wanted.size_gb, "dataCenter": wanted.data_center});
                Some(call(Method::POST, "/network-volumes".to_string(), body))
            }
        }
    }

    /// The request that makes or changes the endpoint, with what it changes; none where nothing differs.
    fn endpoint_call(&self, volume_id: Option<String>) -> Result<Option<(Call, Vec<String>)>, JobError> {
        let Order { spec, image, env, .. } = &self.order;
        let wanted = Wanted::new(spec, image.clone(), env.clone(), volume_id);
        let (method, path, body, changed) = match &self.current {
            None => (Method::POST, "/serverless".to_string(), wanted.body(), vec!["endpoint".to_string()]),
            Some(current) => {
                let Update { body, changed } = wanted.update(current)?;
                if body.is_empty() {
                    return Ok(None);
                }
                (Method::PATCH, format!("/serverless/{}", id_of(current)?), Value::Object(body), changed)
            }
        };
        let shown = wanted.shown(&body);
        Ok(Some((Call { method, path, body, shown }, changed)))
    }
}

/// The request that gives the endpoint back the image that it had before its present one, with the endpoint as it
/// is. None where the present image is not `from`: then the deployment that is to be undone has changed nothing.
///
/// # Errors
/// [`Code::NotFound`] when there is no endpoint, or no image before.
pub async fn rollback(
    api: &Api,
    name: &str,
    endpoint_id: Option<&str>,
    from: Option<&str>,
) -> Result<(Value, Option<Call>), JobError> {
    let Some(endpoint) = find_endpoint(api, name, endpoint_id).await? else {
        return Err(JobError::new(Code::NotFound, format!("there is no endpoint {name:?}")));
    };
    let id = id_of(&endpoint)?;
    let image = endpoint["image"].as_str().unwrap_or_default();
    if from.is_some_and(|from| from != image) {
        return Ok((endpoint, None));
    }
    let releases = api.get(&format!("/serverless/{id}/releases")).await?;
    let Some(before) = image_before(&releases, image) else {
        let message = format!("the releases of the endpoint {id} name no image before {image:?}");
        return Err(JobError::new(Code::NotFound, message)
            .with_reason("NO_RELEASE")
            .with_hint("deploy the image that is wanted with --image"));
    };
    let body = json!({"image": before});
    let call = Call { method: Method::PATCH, path: format!("/serverless/{id}"), shown: body.clone(), body };
    Ok((endpoint, Some(call)))
}

/// What the newest release that brought `image` had in its place.
fn image_before(releases: &Value, image: &str) -> Option<String> {
    let diffs = releases["releases"].as_array()?.iter().flat_map(|release| release["diff"].as_array());
    let mut images = diffs.flatten().filter(|entry| entry["field"] == IMAGE_FIELD);
    images.find(|entry| entry["new"] == image)?["old"].as_str().map(str::to_string)
}

/// Sends a request that makes something. Where it is not known whether that was made, `find` looks for it before
/// it is asked for once more.
async fn create(
    api: &Api,
    call: &Call,
    find: impl AsyncFn() -> Result<Option<Value>, JobError>,
) -> Result<Value, JobError> {
    let mut tries = 0;
    loop {
        let error = match api.post(&call.path, &call.body).await {
            Ok(made) => return Ok(made),
            Err(Failure::Refused(error)) => return Err(error),
            Err(Failure::Unknown(error)) => error,
        };
        tries += 1;
        api.pause(tries).await;
        if let Some(made) = find().await? {
            return Ok(made);
        }
        if tries == TRIES {
            return Err(error);
        }
    }
}

async fn check_pools(api: &Api, pools: &[String]) -> Result<(), JobError> {
    let catalog = api.get("/catalog/gpus").await?;
    let gpus = catalog["gpus"].as_array().into_iter().flatten();
    let known: BTreeSet<_> = gpus.filter_map(|gpu| gpu["pool"].as_str()).collect();
    match pools.iter().find(|pool| !known.contains(pool.as_str())) {
        None => Ok(()),
        Some(unknown) => {
            let known: Vec<_> = known.into_iter().collect();
            let message = format!("RunPod has no GPU pool {unknown:?}, expected one of {}", known.join(", "));
            Err(JobError::new(Code::InvalidInput, message).with_reason("UNKNOWN_POOL"))
        }
    }
}

/// The endpoint of this id, or else of this name, if it is there.
async fn find_endpoint(api: &Api, name: &str, id: Option<&str>) -> Result<Option<Value>, JobError> {
    if let Some(id) = id {
        return api.get(&format!("/serverless/{id}")).await.map(Some);
    }
    let list = api.get("/serverless").await?;
    // The platform appends this to the names of endpoints that boot quickly.
    let is_ours = |endpoint: &&Value| {
        endpoint["name"].as_str().is_some_and(|shown| shown.strip_suffix(" -fb").unwrap_or(shown) == name)
    };
    one(list["endpoints"].as_array().into_iter().flatten().filter(is_ours), "endpoints", name)
}

/// A volume that is there.
struct Found {
    value: Value,
    id: String,
}

impl Found {
    fn step(self, wanted: &Volume) -> Result<VolumeStep, JobError> {
        let place = self.value["dataCenter"].as_str().unwrap_or_default();
        if place != wanted.data_center {
            let message = format!(
                "the volume {:?} is in {place}, expected {} as runpod.toml has it; a volume cannot be moved",
                wanted.name, wanted.data_center
            );
            return Err(JobError::new(Code::InvalidInput, message).with_reason("VOLUME_ELSEWHERE"));
        }
        // A larger one stays as it is: volumes do not shrink.
        match self.value["size"].as_u64().is_some_and(|size| size < wanted.size_gb) {
            true => Ok(VolumeStep::Grow(self.id)),
            false => Ok(VolumeStep::Keep(self.id)),
        }
    }
}

async fn find_volume(api: &Api, wanted: &Volume) -> Result<Option<Found>, JobError> {
    let list = api.get("/network-volumes").await?;
    let volumes = list["networkVolumes"].as_array().into_iter().flatten();
    let found = one(volumes.filter(|volume| volume["name"] == *wanted.name), "volumes", &wanted.name)?;
    found.map(|value| Ok(Found { id: id_of(&value)?, value })).transpose()
}

/// The only one, or none. Names are not unique at RunPod.
fn one<'a>(
    mut found: impl Iterator<Item = &'a Value>,
    what: &str,
    name: &str,
) -> Result<Option<Value>, JobError> {
    let first = found.next().cloned();
    match found.next() {
        None => Ok(first),
        Some(_) => {
            let message = format!("several {what} are called {name:?}, expected one");
            Err(JobError::new(Code::InvalidInput, message)
                .with_reason("AMBIGUOUS")
                .with_hint("rename or delete the others; an endpoint can be named by --endpoint"))
        }
    }
}

/// The id, which becomes part of addresses.
fn id_of(value: &Value) -> Result<String, JobError> {
    let id = value["id"].as_str().unwrap_or_default();
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    match !id.is_empty() && id.bytes().all(plain) {
        true => Ok(id.to_string()),
        false => {
            let message = format!("RunPod has answered with the id {id:?}, expected letters and digits");
            Err(JobError::new(Code::Internal, message).with_reason("PLATFORM"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_before_is_that_of_the_newest_release_that_brought_the_present_one() {
        let entry = |field: &str, old: Value, new: &str| json!({"field": field, "old": old, "new": new});
        let releases = json!({"releases": [
            {"id": "r4", "diff": [entry("workersMax", json!(3), "c")]},
            {"id": "r3", "diff": [entry("template.env", json!({}), "c"), entry(IMAGE_FIELD, json!("b"), "c")]},
            {"id": "r2", "diff": [entry(IMAGE_FIELD, json!("a"), "b")]},
            {"id": "r1", "diff": [entry(IMAGE_FIELD, Value::Null, "a")]},
        ]});
        for (image, before) in [("c", Some("b")), ("b", Some("a")), ("a", None), ("x", None)] {
            assert_eq!(image_before(&releases, image).as_deref(), before, "{image}");
        }
        assert_eq!(image_before(&json!({}), "c"), None);
    }

    #[test]
    fn ids_are_no_paths() {
        for id in [json!("../x"), json!(""), json!(7), Value::Null] {
            assert!(id_of(&json!({"id": id})).is_err(), "{id}");
        }
    }
}
