//! Who may do what.
//!
//! On this machine alone no key is needed until one is set; then, and on every other address, each request
//! carries one. Where none is needed, pages of other sites are kept out instead: they could reach a server on
//! this machine through its user's browser, by a name that leads here.

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use reqwest::Url;
use subtle::ConstantTimeEq;

use super::config::ServeConfig;
use super::error::ApiError;
use super::key;
use super::pool::Pool;
use super::quota::{Operation, Pass, Quotas};
use super::store::{KeyRole, Store};
use crate::job::{Code, JobError};

/// Names the key of the setting `API_KEY`, where the names of others are those of the store.
const KEY_OF_SETTING: &str = "API_KEY";
/// Longer ones are none of ours.
const LONGEST_KEY: usize = 512;

/// Checks keys.
pub struct Auth {
    store: Store,
    pool: Pool,
    /// SHA-256 of the key of the setting.
    api_key: Option<[u8; 32]>,
    addr: SocketAddr,
    /// The host of the public URL.
    public_host: Option<String>,
    allowed_origins: Vec<String>,
    quotas: Quotas,
}

/// One who was let in.
#[derive(Debug, Default)]
pub struct Visit {
    /// The id of its key; None where no key is needed.
    pub key: Option<String>,
    /// Counted for as long as the request is under way.
    pub pass: Option<Pass>,
}

impl Auth {
    /// What `config` and `store` say about keys.
    ///
    /// # Errors
    /// When the keys cannot be read.
    pub fn new(config: &ServeConfig, store: Store, pool: Pool) -> Result<Self, JobError> {
        store.has_client_keys()?;
        let public_url = Url::parse(&config.public_url).ok();
        Ok(Self {
            store,
            pool,
            api_key: config.api_key.as_ref().map(|key| key::hash(key.expose().trim())),
            addr: config.addr,
            public_host: public_url.and_then(|url| url.host_str().map(str::to_ascii_lowercase)),
            allowed_origins: config.allowed_origins.clone(),
            quotas: Quotas::default(),
        })
    }

    /// Refuses an address that other machines reach when nobody could use it: without any key.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] with what to do.
    pub fn check_reach(&self) -> Result<(), JobError> {
        if self.addr.ip().is_loopback() || self.has_key()? {
            return Ok(());
        }
        let message = format!("{} can be reached from other machines, and no key is set", self.addr);
        Err(JobError::new(Code::InvalidInput, message)
            .with_reason("CONFIG")
            .with_hint("set API_KEY, or make a key with `handler keys create --name …`"))
    }

    /// Lets in one who asks for `operation`.
    ///
    /// # Errors
    /// 401 without a valid key where one is needed, 403 for what a page of another site sends, 429 for too much.
    pub fn enter(
        &self,
        method: &Method,
        headers: &HeaderMap,
        operation: Operation,
    ) -> Result<Visit, ApiError> {
        if !self.needs_key()? {
            self.check_site(method, headers)?;
            return Ok(Visit::default());
        }
        let Some(id) = self.client(headers)? else { return Err(unauthorized()) };
        let pass = self.quotas.enter(&id, operation)?;
        Ok(Visit { key: Some(id), pass: Some(pass) })
    }

    /// Whether the key in `headers` is the one that was made for `worker`, or any worker key.
    pub fn is_worker(&self, headers: &HeaderMap, worker: &str) -> bool {
        let Some(key) = key_in(headers) else { return false };
        self.pool.knows(worker, key) || self.stored(key, KeyRole::Worker).is_ok_and(|id| id.is_some())
    }

    /// Whether clients need a key.
    fn needs_key(&self) -> Result<bool, JobError> {
        Ok(!self.addr.ip().is_loopback() || self.has_key()?)
    }

    fn has_key(&self) -> Result<bool, JobError> {
        Ok(self.api_key.is_some() || self.store.has_client_keys()?)
    }

    /// The id of the client key in `headers`, if it is valid. Whatever is wrong with it takes the same path.
    fn client(&self, headers: &HeaderMap) -> Result<Option<String>, JobError> {
        let key = key_in(headers).unwrap_or_default();
        let stored = self.stored(key, KeyRole::Client)?;
        let set = self.api_key.is_some_and(|hash| hash.ct_eq(&key::hash(key)).into());
        Ok(stored.or_else(|| set.then(|| KEY_OF_SETTING.to_string())))
    }

    /// The id of this key of the store. It is looked up by its hash, whose bytes nobody can choose.
    fn stored(&self, key: &str, role: KeyRole) -> Result<Option<String>, JobError> {
        let hash = key::hash(key);
        let found = self.store.key_by_hash(&hash)?;
        let valid = found.filter(|found| {
            let same: bool = found.hash.ct_eq(&hash).into();
            same && found.role == role && found.revoked_ms.is_none()
        });
        Ok(valid.map(|found| found.id))
    }

    /// Keeps out what a page of another site sends through a browser on this machine: by a name of its own that
    /// leads here, or as a request that changes something.
    fn check_site(&self, method: &Method, headers: &HeaderMap) -> Result<(), ApiError> {
        let host = headers.get(header::HOST).map(HeaderValue::to_str);
        let host = match host {
            // Only a program that is no browser leaves it out.
            None => None,
            Some(Ok(host)) if self.is_own_host(host) => Some(host),
            Some(_) => {
                let message = "the `Host` of the request is not a name of this machine";
                let hint = "set PUBLIC_URL to the name by which clients reach the gateway";
                return Err(forbidden(message, "HOST_NOT_ALLOWED", hint));
            }
        };
        let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
        if matches!(*method, Method::GET | Method::HEAD) {
            return Ok(());
        }
        let origin = origin.to_str().unwrap_or_default();
        let own =
            host.is_some_and(|host| ["http://", "https://"].iter().any(|s| origin == format!("{s}{host}")));
        if own || self.is_public_origin(origin) || self.allows(origin) {
            return Ok(());
        }
        let message = "the page that sends this is of another site";
        Err(forbidden(message, "ORIGIN_NOT_ALLOWED", "set ALLOWED_ORIGINS to the sites whose pages may call"))
    }

    /// Whether `host`, with or without its port, is a name of this machine.
    fn is_own_host(&self, host: &str) -> bool {
        let Ok(url) = Url::parse(&format!("http://{host}/")) else { return false };
        let Some(name) = url.host_str().map(str::to_ascii_lowercase) else { return false };
        let literal = name.trim_start_matches('[').trim_end_matches(']');
        literal.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
            || name == "localhost"
            || name.ends_with(".localhost")
            || self.public_host.as_deref() == Some(name.as_str())
    }

    fn is_public_origin(&self, origin: &str) -> bool {
        let host = Url::parse(origin).ok().and_then(|url| url.host_str().map(str::to_ascii_lowercase));
        host.is_some() && host == self.public_host && !is_loopback_name(host.as_deref())
    }

    fn allows(&self, origin: &str) -> bool {
        self.allowed_origins.iter().any(|allowed| allowed == "*" || allowed == origin)
    }
}

/// Pages of other programs on this machine share its name; their ports tell them apart.
fn is_loopback_name(host: Option<&str>) -> bool {
    let literal =
        |host: &str| host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    host.is_some_and(|host| host == "localhost" || host.ends_with(".localhost") || literal(host))
}

/// The one key in `headers`, with or without `Bearer`.
fn key_in(headers: &HeaderMap) -> Option<&str> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let text = value.to_str().ok()?.trim();
    let key = match text.split_once(char::is_whitespace) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => key.trim(),
        Some(_) => return None,
        None => text,
    };
    let is_scheme = key.eq_ignore_ascii_case("bearer");
    let plain = !key.is_empty() && key.len() <= LONGEST_KEY && !key.contains(char::is_whitespace);
    (plain && !is_scheme).then_some(key)
}

fn unauthorized() -> ApiError {
    JobError::new(Code::Unauthorized, "a valid key is needed")
        .with_hint("send it as `Authorization: Bearer …`; `handler keys create` makes one")
        .into()
}

/// What no key would change.
fn forbidden(message: &str, reason: &str, hint: &str) -> ApiError {
    let error = JobError::new(Code::Unauthorized, message).with_reason(reason).with_hint(hint);
    ApiError::from(error).with_status(StatusCode::FORBIDDEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        let value = |text: &&str| HeaderValue::from_bytes(text.as_bytes()).unwrap();
        values.iter().map(|text| (header::AUTHORIZATION, value(text))).collect()
    }

    #[test]
    fn a_key_comes_raw_or_as_bearer() {
        for text in ["k", "Bearer k", "bearer  k", " k "] {
            assert_eq!(key_in(&headers(&[text])), Some("k"), "{text}");
        }
        let long = "k".repeat(100_000);
        for texts in [&[][..], &[""], &["Bearer "], &["Basic a2V5"], &["k", "k"], &["k k"], &[&long], &["ü"]]
        {
            assert_eq!(key_in(&headers(texts)), None, "{} headers", texts.len());
        }
    }
}
