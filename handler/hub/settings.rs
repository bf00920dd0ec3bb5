//! Where models are fetched from, and how patiently: the variables that the hub's own tools read, and a few more.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;

use crate::config::Setting;
use crate::job::{Code, JobError};

const ENDPOINT: &str = "https://huggingface.co";
/// Models that RunPod has put on the machine before the worker started.
const RUNPOD_CACHE: &str = "runpod-volume/huggingface-cache/hub";

/// Settings of downloads.
#[derive(Clone, Debug)]
pub struct HubSettings {
    /// `HF_ENDPOINT`.
    pub endpoint: Url,
    /// `HF_TOKEN`, `HF_TOKEN_PATH` or the file `token` in `HF_HOME`.
    pub token: Option<Token>,
    /// `HF_HUB_OFFLINE`: nothing is asked for.
    pub offline: bool,
    /// Caches of the hub's own tools, in which files are looked for.
    pub caches: Vec<PathBuf>,
    /// `HUB_CONNECTIONS`: requests for bytes at one time.
    pub connections: usize,
    /// `HF_HUB_DOWNLOAD_TIMEOUT`: how long a server may say nothing.
    pub read_timeout: Duration,
    /// `HUB_BACKOFF_SECONDS`: the first pause after a failure.
    pub pause: Duration,
    /// `HUB_STALE_SECONDS`: how long another process may give no sign of life.
    pub stale: Duration,
    /// `RUNPOD_INIT_TIMEOUT`: how long after its start a worker has to be ready.
    pub init_timeout: Option<Duration>,
}

/// A secret of the user's, which no log shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The secret itself, for a header.
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

impl HubSettings {
    /// Reads the variables with `env`, and the file system below `root`, which is `/` but in tests.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] naming variable, value and expectation.
    pub fn from_env(env: impl Fn(&str) -> Option<OsString>, root: &Path) -> Result<Self, JobError> {
        let text = |name: &str| env(name).and_then(|value| value.into_string().ok());
        let path = |name: &str| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let is_on = |name: &str| {
            let value = text(name).unwrap_or_default().to_ascii_uppercase();
            matches!(value.as_str(), "1" | "ON" | "YES" | "TRUE")
        };
        let seconds = |name: &'static str, default: f64| {
            let seconds = Setting::new(name, &text(name)).parse(
                "seconds from 0.001 to 86400",
                default,
                |s: &f64| (0.001..=86_400.0).contains(s),
            )?;
            Ok::<_, JobError>(Duration::from_secs_f64(seconds))
        };
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| path("HOME").map(|home| home.join(".cache/huggingface")));
        let token_file = path("HF_TOKEN_PATH").or_else(|| home.as_ref().map(|home| home.join("token")));
        let token = text("HF_TOKEN").or_else(|| std::fs::read_to_string(token_file?).ok());
        let token = token.map(|token| token.trim().to_string()).filter(|token| !token.is_empty());
        let implicit = text("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_none_or(|value| value.is_empty());
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| home.map(|home| home.join("hub")));
        let init_timeout = text("RUNPOD_INIT_TIMEOUT").filter(|value| !value.trim().is_empty());
        Ok(Self {
            endpoint: endpoint(text("HF_ENDPOINT"))?,
            token: token.filter(|_| implicit).map(Token),
            offline: is_on("HF_HUB_OFFLINE"),
            caches: [root.join(RUNPOD_CACHE)].into_iter().chain(cache).collect(),
            connections: Setting::new("HUB_CONNECTIONS", &text("HUB_CONNECTIONS")).parse(
                "a number from 1 to 64",
                8,
                |n| (1..=64).contains(n),
            )?,
            read_timeout: seconds("HF_HUB_DOWNLOAD_TIMEOUT", 30.0)?,
            pause: seconds("HUB_BACKOFF_SECONDS", 1.0)?,
            stale: seconds("HUB_STALE_SECONDS", 30.0)?,
            init_timeout: init_timeout.map(|_| seconds("RUNPOD_INIT_TIMEOUT", 1.0)).transpose()?,
        })
    }
}

fn endpoint(text: Option<String>) -> Result<Url, JobError> {
    let text = text.map(|text| text.trim().trim_end_matches('/').to_string()).filter(|text| !text.is_empty());
    let text = text.as_deref().unwrap_or(ENDPOINT);
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    // A password in it would have to be kept out of every message.
    url.filter(|url| url.username().is_empty() && url.password().is_none() && url.query().is_none())
        .ok_or_else(|| {
            let message = "`HF_ENDPOINT` is no address such as https://huggingface.co";
            JobError::new(Code::InvalidInput, message).with_reason("CONFIG")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<HubSettings, JobError> {
        let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into());
        HubSettings::from_env(find, Path::new("/root"))
    }

    #[test]
    fn nothing_set_means_the_documented_defaults() {
        let settings = settings(&[("HF_ENDPOINT", ""), ("HF_TOKEN", "")]).unwrap();
        assert_eq!(settings.endpoint.as_str(), "https://huggingface.co/");
        assert_eq!((settings.token, settings.offline, settings.connections), (None, false, 8));
        assert_eq!(settings.read_timeout, Duration::from_secs(30));
        assert_eq!((settings.stale, settings.init_timeout), (Duration::from_secs(30), None));
        assert_eq!(settings.caches, [PathBuf::from("/root/runpod-volume/huggingface-cache/hub")]);
    }

    #[test]
    fn the_hubs_own_variables_are_read_in_its_order() {
        let caches = |variables: &[(&str, &str)]| settings(variables).unwrap().caches[1].clone();
        let home = ("HOME", "/h");
        assert_eq!(caches(&[home]), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(caches(&[home, ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(caches(&[home, ("HF_HOME", "/f")]), Path::new("/f/hub"));
        assert_eq!(caches(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));

        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "hf_file\n").unwrap();
        let home = ("HF_HOME", dir.path().to_str().unwrap());
        let token = |variables: &[(&str, &str)]| settings(variables).unwrap().token;
        assert_eq!(token(&[home]), Some(Token("hf_file".into())));
        assert_eq!(token(&[home, ("HF_TOKEN", "hf_set")]), Some(Token("hf_set".into())));
        assert_eq!(token(&[home, ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        let shown = format!("{:?}", settings(&[home]).unwrap());
        assert!(shown.contains("redacted") && !shown.contains("hf_file"), "{shown}");
    }

    #[test]
    fn a_wrong_value_is_named_with_its_variable() {
        for (name, value) in [
            ("HF_ENDPOINT", "huggingface.co"),
            ("HF_ENDPOINT", "https://user:secret@hub.example"),
            ("HUB_CONNECTIONS", "0"),
            ("RUNPOD_INIT_TIMEOUT", "soon"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "-1"),
        ] {
            let e = settings(&[(name, value)]).unwrap_err();
            assert!(e.message.contains(name) && !e.message.contains("secret"), "{e}");
        }
    }
}
