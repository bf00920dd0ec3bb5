//! Which bucket, with which keys, and for how long: flags, environment variables, or a job's own `s3Config`.

use std::time::Duration;

use reqwest::Url;
use serde::Deserialize;
use serde_json::Value;

use crate::config::Setting;
use crate::gateway::config::Secret;
use crate::inputs::check_url;
use crate::job::{Code, JobError};

/// S3 signs links for a week at most.
const MAX_PRESIGN_SECONDS: u64 = 7 * 86_400;
const LEAST_PRESIGN_SECONDS: u64 = 60;

/// Flags of every verb that reads from or writes to a bucket.
#[derive(clap::Args, Clone, Debug, Default)]
#[command(next_help_heading = "Storage")]
pub struct StorageArgs {
    /// Account of Cloudflare R2; with it the other R2 settings are needed
    #[arg(long, env = "R2_ACCOUNT_ID", value_name = "ID")]
    pub r2_account_id: Option<String>,
    /// Access key of R2
    #[arg(long, env = "R2_ACCESS_KEY_ID", value_name = "KEY", hide_env_values = true)]
    pub r2_access_key_id: Option<String>,
    /// Secret of R2
    #[arg(long, env = "R2_SECRET_ACCESS_KEY", value_name = "SECRET", hide_env_values = true, value_parser = secret)]
    pub r2_secret_access_key: Option<Secret>,
    /// Bucket of R2
    #[arg(long, env = "R2_BUCKET_NAME", value_name = "NAME")]
    pub r2_bucket_name: Option<String>,
    /// R2's address where it is not that of the account, as for buckets with a jurisdiction
    #[arg(long, env = "R2_ENDPOINT_URL", value_name = "URL")]
    pub r2_endpoint_url: Option<String>,
    /// Address of any other S3 store; it may hold the bucket, as a first label or as the path
    #[arg(long, env = "BUCKET_ENDPOINT_URL", value_name = "URL")]
    pub bucket_endpoint_url: Option<String>,
    /// Access key of that store
    #[arg(long, env = "BUCKET_ACCESS_KEY_ID", value_name = "KEY", hide_env_values = true)]
    pub bucket_access_key_id: Option<String>,
    /// Secret of that store
    #[arg(long, env = "BUCKET_SECRET_ACCESS_KEY", value_name = "SECRET", hide_env_values = true, value_parser = secret)]
    pub bucket_secret_access_key: Option<Secret>,
    /// Session token of that store
    #[arg(long, env = "BUCKET_SESSION_TOKEN", value_name = "TOKEN", hide_env_values = true, value_parser = secret)]
    pub bucket_session_token: Option<Secret>,
    /// Region of that store [default: as its address says, else us-east-1]
    #[arg(long, env = "BUCKET_REGION", value_name = "NAME")]
    pub bucket_region: Option<String>,
    /// Bucket of that store, or of AWS
    #[arg(long, env = "BUCKET_NAME", value_name = "NAME")]
    pub bucket_name: Option<String>,
    /// Scheme and host that links are signed for, where clients reach the store by another name
    #[arg(long, env = "BUCKET_PUBLIC_URL", value_name = "URL")]
    pub bucket_public_url: Option<String>,
    /// Access key of AWS
    #[arg(long, env = "AWS_ACCESS_KEY_ID", value_name = "KEY", hide_env_values = true)]
    pub aws_access_key_id: Option<String>,
    /// Secret of AWS
    #[arg(long, env = "AWS_SECRET_ACCESS_KEY", value_name = "SECRET", hide_env_values = true, value_parser = secret)]
    pub aws_secret_access_key: Option<Secret>,
    /// Session token of AWS
    #[arg(long, env = "AWS_SESSION_TOKEN", value_name = "TOKEN", hide_env_values = true, value_parser = secret)]
    pub aws_session_token: Option<Secret>,
    /// Region of AWS [default: us-east-1]
    #[arg(long, env = "AWS_REGION", value_name = "NAME")]
    pub aws_region: Option<String>,
    /// Address of AWS S3, or of a store that takes its place
    #[arg(long, env = "AWS_ENDPOINT_URL_S3", value_name = "URL")]
    pub aws_endpoint_url_s3: Option<String>,
    /// Address of AWS where the one above is not set
    #[arg(long, env = "AWS_ENDPOINT_URL", value_name = "URL")]
    pub aws_endpoint_url: Option<String>,
    /// Bucket of AWS where BUCKET_NAME is not set
    #[arg(long, env = "AWS_BUCKET_NAME", value_name = "NAME")]
    pub aws_bucket_name: Option<String>,
    /// Hours after which a video is deleted [default: 6]
    #[arg(long, env = "VIDEO_RETENTION_HOURS", value_name = "HOURS")]
    pub video_retention_hours: Option<String>,
    /// Seconds that links last at most [default: 21600]
    #[arg(long, env = "PRESIGN_EXPIRES_SECONDS", value_name = "SECONDS")]
    pub presign_expires_seconds: Option<String>,
    /// Hours after which videos and results that could not be delivered are deleted from the spool [default: 168]
    #[arg(long, env = "SPOOL_RETENTION_HOURS", value_name = "HOURS")]
    pub spool_retention_hours: Option<String>,
}

/// For a flag that holds a secret.
pub(crate) fn secret(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(Secret::new(text.to_string()))
}

/// How long videos and links last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetimes {
    /// After this a video is deleted.
    pub retention: Duration,
    /// The longest that a link lasts; a link never outlives its object.
    pub presign: Duration,
    /// After this what could not be delivered is deleted from the spool. A result is sent again for a day, so that a
    /// week leaves time to see to the rest by hand.
    pub spool: Duration,
}

impl Default for Lifetimes {
    fn default() -> Self {
        let hours = |n: u64| Duration::from_secs(n * 3600);
        Self { retention: hours(6), presign: hours(6), spool: hours(7 * 24) }
    }
}

/// A bucket, how to reach it, and how long things last in it.
#[derive(Clone, Debug)]
pub struct StorageSettings {
    /// Scheme, host and port of the store.
    pub endpoint: Url,
    /// What requests are signed for.
    pub region: String,
    /// The bucket, always as the first part of the path.
    pub bucket: String,
    /// Who we are there.
    pub credentials: Credentials,
    /// Scheme, host and port that links are signed for.
    pub public_url: Url,
    /// How long videos and links last.
    pub lifetimes: Lifetimes,
}

/// A key and its secret. Only the secrets are hidden in `Debug`.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// The access key's id.
    pub access_key_id: String,
    /// The access key's secret.
    pub secret_access_key: Secret,
    /// Of credentials that end.
    pub session_token: Option<Secret>,
}

impl StorageArgs {
    /// The bucket that is configured, if any: R2's settings come first, then `BUCKET_…`, then `AWS_…`, which
    /// count only with a bucket, since many machines have them for other purposes.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] naming the variable that is missing or wrong.
    pub fn settings(&self) -> Result<Option<StorageSettings>, JobError> {
        let (family, place) = if any([&self.r2_account_id, &self.r2_access_key_id, &self.r2_bucket_name])
            || self.r2_secret_access_key.is_some()
        {
            ("R2_ACCOUNT_ID", self.r2()?)
        } else if any([&self.bucket_endpoint_url, &self.bucket_access_key_id])
            || self.bucket_secret_access_key.is_some()
        {
            ("BUCKET_ENDPOINT_URL", self.any_store()?)
        } else if any([&self.bucket_name, &self.aws_bucket_name]) {
            ("AWS_ENDPOINT_URL_S3", self.aws()?)
        } else {
            return Ok(None);
        };
        let (address, bucket, region, credentials) = place;
        let (endpoint, bucket) = split_endpoint(family, address, bucket)?;
        let region = set(&region).map_or_else(|| region_of(&endpoint), str::to_string);
        let public_url = self.public_url()?.unwrap_or_else(|| endpoint.clone());
        let lifetimes = self.lifetimes()?;
        Ok(Some(StorageSettings { endpoint, region, bucket, credentials, public_url, lifetimes }))
    }

    /// Scheme and host that links are signed for, where they are set.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] naming variable and expectation.
    pub fn public_url(&self) -> Result<Option<Url>, JobError> {
        let Some(text) = set(&self.bucket_public_url) else { return Ok(None) };
        let url = bare(parse_url("BUCKET_PUBLIC_URL", text)?);
        url.map(Some).ok_or_else(|| wrong("BUCKET_PUBLIC_URL", text, "an http(s) URL without a path"))
    }

    /// How long videos and links last; set whether or not a bucket is.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] naming variable, value and expectation.
    pub fn lifetimes(&self) -> Result<Lifetimes, JobError> {
        let default = Lifetimes::default();
        // Links are in whole seconds, and must not be cut to none.
        let hours = |name, value, default: Duration| {
            let hours = Setting::new(name, value).parse(
                "hours, more than 0 and at most 8760",
                default.as_secs_f64() / 3600.0,
                |hours: &f64| *hours > 0.0 && *hours <= 8760.0,
            )?;
            Ok::<_, JobError>(Duration::from_secs(((hours * 3600.0) as u64).max(1)))
        };
        let seconds = Setting::new("PRESIGN_EXPIRES_SECONDS", &self.presign_expires_seconds).parse(
            "whole seconds from 60 to 604800",
            default.presign.as_secs(),
            |seconds| (LEAST_PRESIGN_SECONDS..=MAX_PRESIGN_SECONDS).contains(seconds),
        )?;
        Ok(Lifetimes {
            retention: hours("VIDEO_RETENTION_HOURS", &self.video_retention_hours, default.retention)?,
            presign: Duration::from_secs(seconds),
            spool: hours("SPOOL_RETENTION_HOURS", &self.spool_retention_hours, default.spool)?,
        })
    }

    fn r2(&self) -> Result<Place<'_>, JobError> {
        let account = need("R2_ACCOUNT_ID", &self.r2_account_id)?;
        let credentials = Credentials {
            access_key_id: need("R2_ACCESS_KEY_ID", &self.r2_access_key_id)?.to_string(),
            secret_access_key: need_secret("R2_SECRET_ACCESS_KEY", &self.r2_secret_access_key)?,
            session_token: None,
        };
        let bucket = need("R2_BUCKET_NAME", &self.r2_bucket_name)?;
        let address = match set(&self.r2_endpoint_url) {
            Some(text) => parse_url("R2_ENDPOINT_URL", text)?,
            None if account.bytes().all(|b| b.is_ascii_alphanumeric()) => {
                parse_url("R2_ACCOUNT_ID", &format!("https://{account}.r2.cloudflarestorage.com"))?
            }
            None => return Err(wrong("R2_ACCOUNT_ID", account, "letters and digits")),
        };
        Ok((address, Some(bucket), Some("auto".to_string()), credentials))
    }

    fn any_store(&self) -> Result<Place<'_>, JobError> {
        let address =
            parse_url("BUCKET_ENDPOINT_URL", need("BUCKET_ENDPOINT_URL", &self.bucket_endpoint_url)?)?;
        let credentials = Credentials {
            access_key_id: need("BUCKET_ACCESS_KEY_ID", &self.bucket_access_key_id)?.to_string(),
            secret_access_key: need_secret("BUCKET_SECRET_ACCESS_KEY", &self.bucket_secret_access_key)?,
            session_token: set_secret(&self.bucket_session_token),
        };
        Ok((address, set(&self.bucket_name), self.bucket_region.clone(), credentials))
    }

    fn aws(&self) -> Result<Place<'_>, JobError> {
        let credentials = Credentials {
            access_key_id: need("AWS_ACCESS_KEY_ID", &self.aws_access_key_id)?.to_string(),
            secret_access_key: need_secret("AWS_SECRET_ACCESS_KEY", &self.aws_secret_access_key)?,
            session_token: set_secret(&self.aws_session_token),
        };
        let region = set(&self.aws_region).unwrap_or("us-east-1");
        let address = match (set(&self.aws_endpoint_url_s3), set(&self.aws_endpoint_url)) {
            (Some(text), _) => parse_url("AWS_ENDPOINT_URL_S3", text)?,
            (None, Some(text)) => parse_url("AWS_ENDPOINT_URL", text)?,
            (None, None) => parse_url("AWS_REGION", &format!("https://s3.{region}.amazonaws.com"))?,
        };
        let bucket = set(&self.bucket_name).or(set(&self.aws_bucket_name));
        Ok((address, bucket, Some(region.to_string()), credentials))
    }
}

/// Address, bucket, region, credentials, as they are configured.
type Place<'a> = (Url, Option<&'a str>, Option<String>, Credentials);

impl StorageSettings {
    /// From a job's `s3Config`: `{accessId, accessSecret, bucketName, endpointUrl}`. Where the job names a
    /// store, its address is held to the rules of input URLs.
    ///
    /// # Errors
    /// [`Code::InvalidInput`], [`Code::MissingField`], [`Code::UrlNotAllowed`].
    pub fn from_s3_config(
        config: &Value,
        lifetimes: Lifetimes,
        allow_private: bool,
    ) -> Result<Self, JobError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct S3Config {
            access_id: Option<String>,
            access_secret: Option<String>,
            bucket_name: Option<String>,
            endpoint_url: Option<String>,
        }
        // The parser's own message would quote what it found, which may be the secret.
        let config = S3Config::deserialize(config).map_err(|_| {
            let expected = "`accessId`, `accessSecret`, `bucketName` and `endpointUrl`";
            JobError::new(
                Code::InvalidInput,
                format!("`s3Config` is malformed, expected an object of texts {expected}"),
            )
        })?;
        let missing = |name: &str| JobError::new(Code::MissingField, format!("`s3Config.{name}` is missing"));
        let address = set(&config.endpoint_url).ok_or_else(|| missing("endpointUrl"))?;
        let address = parse_url("s3Config.endpointUrl", address)?;
        check_url(&address, allow_private).map_err(|refused| {
            let host = address.host_str().unwrap_or_default();
            JobError::new(Code::UrlNotAllowed, format!("`s3Config.endpointUrl` at {host} {}", refused.0))
                .with_hint("give the public address of the store")
        })?;
        let credentials = Credentials {
            access_key_id: set(&config.access_id).ok_or_else(|| missing("accessId"))?.to_string(),
            secret_access_key: Secret::new(
                set(&config.access_secret).ok_or_else(|| missing("accessSecret"))?.to_string(),
            ),
            session_token: None,
        };
        let (endpoint, bucket) = split_endpoint("s3Config.endpointUrl", address, set(&config.bucket_name))?;
        let region = region_of(&endpoint);
        Ok(Self { public_url: endpoint.clone(), endpoint, region, bucket, credentials, lifetimes })
    }

    /// The variables by which a worker process comes to the same settings.
    pub fn to_env(&self) -> Vec<(&'static str, Secret)> {
        let public = |text: &str| Secret::new(text.to_string());
        let hours = |time: Duration| public(&(time.as_secs_f64() / 3600.0).to_string());
        let mut variables = vec![
            ("BUCKET_ENDPOINT_URL", public(self.endpoint.as_str())),
            ("BUCKET_NAME", public(&self.bucket)),
            ("BUCKET_REGION", public(&self.region)),
            ("BUCKET_ACCESS_KEY_ID", public(&self.credentials.access_key_id)),
            ("BUCKET_SECRET_ACCESS_KEY", self.credentials.secret_access_key.clone()),
            ("BUCKET_PUBLIC_URL", public(self.public_url.as_str())),
            ("VIDEO_RETENTION_HOURS", hours(self.lifetimes.retention)),
            ("SPOOL_RETENTION_HOURS", hours(self.lifetimes.spool)),
            ("PRESIGN_EXPIRES_SECONDS", public(&self.lifetimes.presign.as_secs().to_string())),
        ];
        variables.extend(self.credentials.session_token.clone().map(|token| ("BUCKET_SESSION_TOKEN", token)));
        variables
    }
}

/// An address that holds the bucket, by RunPod's convention for `BUCKET_ENDPOINT_URL`, without it.
fn split_endpoint(name: &str, address: Url, bucket: Option<&str>) -> Result<(Url, String), JobError> {
    let path = address.path().trim_matches('/').to_string();
    let host = address.host_str().unwrap_or_default().to_string();
    let in_host = match bucket {
        Some(bucket) => {
            host.strip_prefix(bucket).and_then(|rest| rest.strip_prefix('.')).map(|rest| (bucket, rest))
        }
        None => bucket_in_host(&host),
    };
    let found = match (bucket, path.as_str(), in_host) {
        (Some(bucket), "", None) => Some((bucket.to_string(), host.clone())),
        (Some(bucket), path, None) if path == bucket => Some((bucket.to_string(), host.clone())),
        (None, path, None) if !path.is_empty() && !path.contains('/') => {
            Some((path.to_string(), host.clone()))
        }
        (_, "", Some((bucket, rest))) => Some((bucket.to_string(), rest.to_string())),
        _ => None,
    };
    let Some((bucket, host)) = found else {
        return Err(match path.is_empty() {
            true => missing_variable(if name.starts_with("s3Config") {
                "s3Config.bucketName"
            } else {
                "BUCKET_NAME"
            }),
            false => wrong(name, address.as_str(), "a URL whose path is empty or the bucket"),
        });
    };
    if !s3s::path::check_bucket_name(&bucket) {
        return Err(wrong("BUCKET_NAME", &bucket, "3 to 63 lower-case letters, digits, `-` and `.`"));
    }
    let mut endpoint = address.clone();
    let changed = endpoint.set_host(Some(&host)).is_ok();
    match bare_path(endpoint).filter(|_| changed) {
        Some(endpoint) => Ok((endpoint, bucket)),
        None => Err(wrong(name, address.as_str(), "an http(s) URL")),
    }
}

/// The bucket and the rest of `host`, at providers whose own names are known.
fn bucket_in_host(host: &str) -> Option<(&str, &str)> {
    let (bucket, rest) = host.split_once('.')?;
    let own = rest
        .strip_suffix(".amazonaws.com")
        .is_some_and(|s| s == "s3" || s.starts_with("s3.") || s.starts_with("s3-"))
        || rest.ends_with(".digitaloceanspaces.com")
        || rest.strip_suffix(".r2.cloudflarestorage.com").is_some_and(is_r2_account);
    own.then_some((bucket, rest))
}

/// Whether the rest of an R2 host starts with an account, and not with a jurisdiction such as `eu`.
fn is_r2_account(rest: &str) -> bool {
    let account = rest.split('.').next().unwrap_or_default();
    account.len() == 32 && account.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The region that the names of known providers hold.
fn region_of(endpoint: &Url) -> String {
    let host = endpoint.host_str().unwrap_or_default();
    let labels: Vec<&str> = host.split('.').collect();
    match labels.as_slice() {
        [.., "r2", "cloudflarestorage", "com"] => "auto",
        ["s3", region, "amazonaws", "com"] | [region, "digitaloceanspaces", "com"] => region,
        _ => "us-east-1",
    }
    .to_string()
}

fn parse_url(name: &str, text: &str) -> Result<Url, JobError> {
    let url = Url::parse(text).ok().filter(|url| {
        matches!(url.scheme(), "http" | "https")
            && url.host_str().is_some()
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
    });
    // A wrong URL is not quoted: somebody may have put a password into it.
    url.ok_or_else(|| {
        JobError::new(
            Code::InvalidInput,
            format!("`{name}` is not a plain URL, expected such as https://s3.example.com"),
        )
        .with_reason("CONFIG")
    })
}

/// `url` if it is no more than scheme, host and port.
fn bare(url: Url) -> Option<Url> {
    (url.path() == "/").then_some(url).and_then(bare_path)
}

fn bare_path(mut url: Url) -> Option<Url> {
    url.set_path("");
    url.set_query(None);
    url.set_fragment(None);
    Some(url)
}

/// An empty variable is one that is not set: compose files pass those on.
fn set(value: &Option<String>) -> Option<&str> {
    value.as_deref().map(str::trim).filter(|v| !v.is_empty())
}

fn set_secret(value: &Option<Secret>) -> Option<Secret> {
    value.clone().filter(|v| !v.expose().trim().is_empty())
}

fn any<const N: usize>(values: [&Option<String>; N]) -> bool {
    values.into_iter().any(|value| set(value).is_some())
}

fn need<'a>(name: &str, value: &'a Option<String>) -> Result<&'a str, JobError> {
    set(value).ok_or_else(|| missing_variable(name))
}

fn need_secret(name: &str, value: &Option<Secret>) -> Result<Secret, JobError> {
    set_secret(value).ok_or_else(|| missing_variable(name))
}

fn missing_variable(name: &str) -> JobError {
    let message = format!("`{name}` is not set, but other settings of the store are");
    JobError::new(Code::InvalidInput, message)
        .with_reason("CONFIG")
        .with_hint("a store needs an address, a bucket, an access key and its secret")
}

fn wrong(name: &str, value: &str, expected: &str) -> JobError {
    JobError::new(Code::InvalidInput, format!("`{name}` is {value:?}, expected {expected}"))
        .with_reason("CONFIG")
}

#[cfg(test)]
mod tests;
