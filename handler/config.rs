//! Settings of the service: flags and environment variables, read once, at start.

use std::path::{Path, PathBuf};

use clap::Args;
use talkie::registry::ModelStorage;
use talkie::request::Limits;

use crate::hub::{Hub, HubSettings};
use crate::inputs::FetchPolicy;
use crate::job::{Code, JobError};

/// The folders that hold models where nothing else is said: a RunPod network volume as a serverless worker
/// sees it, and as a pod sees it.
const VOLUMES: [(&str, &str); 2] =
    [("/runpod-volume", "/runpod-volume/models"), ("/workspace", "/workspace/models")];

/// Flags that every verb takes. They are text here, so that a wrong value is named together with its flag,
/// its variable and what was expected.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Settings")]
pub struct ConfigArgs {
    /// Folder of the model weights [default: /runpod-volume/models, else /workspace/models, else the user's
    /// cache folder]
    #[arg(long, global = true, env = "MODEL_STORAGE_PATH", value_name = "DIR")]
    pub model_storage_path: Option<PathBuf>,
    /// Longest audio in seconds, 0 = any length [default: 600]
    #[arg(long, global = true, env = "MAX_AUDIO_SECONDS", value_name = "SECONDS")]
    pub max_audio_seconds: Option<String>,
    /// Largest image file in bytes [default: 10000000]
    #[arg(long, global = true, env = "MAX_IMAGE_BYTES", value_name = "BYTES")]
    pub max_image_bytes: Option<String>,
    /// Largest audio file in bytes [default: 50000000]
    #[arg(long, global = true, env = "MAX_AUDIO_BYTES", value_name = "BYTES")]
    pub max_audio_bytes: Option<String>,
    /// Let URLs lead to private addresses, true or false; for development [default: false]
    #[arg(
        long,
        global = true,
        env = "ALLOW_PRIVATE_URLS",
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    pub allow_private_urls: Option<String>,
    /// Bytes of the GPU's memory to use at most, or of the host's where the CPU computes [default: what is free]
    #[arg(long, global = true, env = "TALKIE_MEMORY_LIMIT", value_name = "BYTES")]
    pub memory_limit: Option<String>,
    /// Least level of log lines: error, warn, info, debug or trace [default: warn]
    #[arg(long, global = true, env = "LOG_LEVEL", value_name = "LEVEL")]
    pub log_level: Option<String>,
}

/// The settings, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the model weights lie, and come from.
    pub hub: Hub,
    /// Longest audio in seconds; `None` for any length.
    pub max_audio_seconds: Option<u32>,
    /// Bytes that image and audio files may have.
    pub limits: Limits,
    /// Whether URLs may lead to private addresses.
    pub allow_private_urls: bool,
    /// Bytes of the device's memory to use at most; `None` for what is free.
    pub memory_limit: Option<u64>,
    /// Least level of log lines.
    pub log_level: tracing::Level,
}

impl Config {
    /// Checks `args`; what they leave open is looked up with `env` and in the file system below `root`, which
    /// is `/` but in tests.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] naming flag, variable, value and expectation.
    pub fn new(
        args: &ConfigArgs,
        env: impl Fn(&str) -> Option<PathBuf>,
        root: &Path,
    ) -> Result<Self, JobError> {
        let defaults = Limits::default();
        let max_audio_seconds: u32 = Setting::new("MAX_AUDIO_SECONDS", &args.max_audio_seconds).parse(
            "whole seconds from 0 to 36000",
            600,
            |n| *n <= 36_000,
        )?;
        let bytes = |name, value, default| {
            Setting::new(name, value)
                .parse("bytes from 1 to 1000000000", default, |n| (1..=1_000_000_000).contains(n))
        };
        let memory_limit = Setting::new("TALKIE_MEMORY_LIMIT", &args.memory_limit).parse(
            "bytes from 1 to 10^15",
            0,
            |n| (1..=1_000_000_000_000_000).contains(n),
        )?;
        Ok(Self {
            hub: Hub::new(
                HubSettings::from_env(|name| env(name).map(PathBuf::into_os_string), root)?,
                ModelStorage::at(model_storage(args, &env, root)),
            ),
            max_audio_seconds: (max_audio_seconds > 0).then_some(max_audio_seconds),
            limits: Limits {
                image_bytes: bytes("MAX_IMAGE_BYTES", &args.max_image_bytes, defaults.image_bytes)?,
                audio_bytes: bytes("MAX_AUDIO_BYTES", &args.max_audio_bytes, defaults.audio_bytes)?,
            },
            allow_private_urls: Setting::new("ALLOW_PRIVATE_URLS", &args.allow_private_urls).parse(
                "true or false",
                false,
                |_| true,
            )?,
            memory_limit: Some(memory_limit).filter(|bytes| *bytes > 0),
            log_level: Setting::new("LOG_LEVEL", &args.log_level).parse(
                "error, warn, info, debug or trace",
                tracing::Level::WARN,
                |_| true,
            )?,
        })
    }

    /// What may be fetched under these settings.
    pub fn fetch_policy(&self) -> FetchPolicy {
        FetchPolicy { allow_private: self.allow_private_urls, ..FetchPolicy::new(self.limits) }
    }
}

/// A value that a flag or a variable may have set.
pub(crate) struct Setting<'a> {
    variable: &'static str,
    value: Option<&'a str>,
}

impl<'a> Setting<'a> {
    /// An empty variable is one that is not set: compose files pass those on.
    pub(crate) fn new(variable: &'static str, value: &'a Option<String>) -> Self {
        Self { variable, value: value.as_deref().map(str::trim).filter(|v| !v.is_empty()) }
    }

    /// The value, or `default`.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] naming flag, variable, value and expectation.
    pub(crate) fn parse<T: std::str::FromStr>(
        &self,
        expected: &str,
        default: T,
        fits: impl Fn(&T) -> bool,
    ) -> Result<T, JobError> {
        let Some(text) = self.value else { return Ok(default) };
        text.parse().ok().filter(fits).ok_or_else(|| {
            let flag = self.variable.trim_start_matches("TALKIE_").to_ascii_lowercase().replace('_', "-");
            let message = format!("`{}` (--{flag}) is {text:?}, expected {expected}", self.variable);
            JobError::new(Code::InvalidInput, message).with_reason("CONFIG")
        })
    }
}

fn model_storage(args: &ConfigArgs, env: impl Fn(&str) -> Option<PathBuf>, root: &Path) -> PathBuf {
    let set = |path: &PathBuf| !path.as_os_str().is_empty();
    if let Some(path) = args.model_storage_path.as_ref().filter(|p| set(p)) {
        return path.clone();
    }
    let below_root = |path: &str| root.join(path.trim_start_matches('/'));
    let volume = VOLUMES.iter().find(|(volume, _)| below_root(volume).is_dir());
    if let Some((_, models)) = volume {
        return below_root(models);
    }
    let cache = env("XDG_CACHE_HOME").filter(set);
    let cache = cache.or_else(|| env("HOME").filter(set).map(|home| home.join(".cache")));
    cache.unwrap_or_else(std::env::temp_dir).join("talkie/models")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(change: impl Fn(&mut ConfigArgs)) -> Result<Config, JobError> {
        let mut args = ConfigArgs::default();
        change(&mut args);
        Config::new(&args, |_| None, Path::new("/nonexistent"))
    }

    #[test]
    fn nothing_set_means_the_documented_defaults() {
        let empty = |args: &mut ConfigArgs| args.max_image_bytes = Some(String::new());
        for config in [config(|_| {}).unwrap(), config(empty).unwrap()] {
            assert_eq!(config.max_audio_seconds, Some(600));
            assert_eq!(config.limits, Limits { image_bytes: 10_000_000, audio_bytes: 50_000_000 });
            assert!(!config.allow_private_urls);
            assert_eq!(config.memory_limit, None);
            assert_eq!(config.log_level, tracing::Level::WARN);
        }
        assert_eq!(config(|a| a.max_audio_seconds = Some("0".into())).unwrap().max_audio_seconds, None);
    }

    #[test]
    fn a_wrong_value_is_named_with_its_variable() {
        let e = config(|a| a.max_audio_seconds = Some("ten".into())).unwrap_err();
        let said =
            "`MAX_AUDIO_SECONDS` (--max-audio-seconds) is \"ten\", expected whole seconds from 0 to 36000";
        assert_eq!((e.code, e.message.as_str()), (Code::InvalidInput, said));
        assert!(config(|a| a.max_image_bytes = Some("0".into())).is_err());
        assert!(config(|a| a.allow_private_urls = Some("yes".into())).is_err());
        assert!(config(|a| a.log_level = Some("loud".into())).is_err());
        let e = config(|a| a.memory_limit = Some("8GB".into())).unwrap_err();
        assert!(e.message.starts_with("`TALKIE_MEMORY_LIMIT` (--memory-limit) is \"8GB\""), "{e}");
    }

    #[test]
    fn models_lie_on_the_volume_or_in_the_cache() {
        let root = tempfile::tempdir().unwrap();
        let storage = |args: &ConfigArgs, env: &[(&str, &str)]| {
            let find = |name: &str| env.iter().find(|(n, _)| *n == name).map(|(_, v)| PathBuf::from(v));
            Config::new(args, find, root.path()).unwrap().hub.storage().root().to_owned()
        };
        let none = ConfigArgs::default();
        assert_eq!(storage(&none, &[("HOME", "/home/me")]), Path::new("/home/me/.cache/talkie/models"));
        let both = [("HOME", "/home/me"), ("XDG_CACHE_HOME", "/cache")];
        assert_eq!(storage(&none, &both), Path::new("/cache/talkie/models"));
        std::fs::create_dir(root.path().join("workspace")).unwrap();
        assert_eq!(storage(&none, &both), root.path().join("workspace/models"));
        std::fs::create_dir(root.path().join("runpod-volume")).unwrap();
        assert_eq!(storage(&none, &both), root.path().join("runpod-volume/models"));
        let given = ConfigArgs { model_storage_path: Some("/x".into()), ..none };
        assert_eq!(storage(&given, &both), Path::new("/x"));
    }
}
