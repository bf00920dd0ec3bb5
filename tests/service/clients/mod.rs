//! What others have made, against the real gateway: RunPod's clients, RunPod's worker and a browser.
//!
//! The programs are not ours and may be missing. Then their tests say so and pass, unless they are required:
//! `.ci/run` installs them and sets `TALKIE_REQUIRE_CLIENTS=1`.

mod page;
mod sdks;
mod webdriver;
mod worker;

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What installs all of them.
const HINT: &str = "scripts/install-clients.sh installs it";

/// The key of the clients here.
const KEY: &str = "key-of-clients";

/// A Python that has RunPod's SDK.
fn python() -> Option<PathBuf> {
    found("RunPod's Python SDK", installed("python/bin/python"))
}

/// The module of RunPod's JavaScript SDK. With it Node is there too.
fn node_sdk() -> Option<PathBuf> {
    found("RunPod's JavaScript SDK", installed("node/node_modules/runpod-sdk/dist/src/index.js"))
}

/// ChromeDriver. With it Chromium is there too.
fn chromedriver() -> Option<PathBuf> {
    found("ChromeDriver", on_path("chromedriver"))
}

/// Any Python: scripts of ours need no package.
pub fn python3() -> Option<PathBuf> {
    found("Python 3", on_path("python3"))
}

fn on_path(name: &str) -> Option<PathBuf> {
    let folders = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&folders).map(|folder| folder.join(name)).find(|program| program.is_file())
}

/// A file below the folder that the clients are installed in.
fn installed(path: &str) -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/clients");
    let folder = env::var_os("TALKIE_CLIENTS").map_or(target, PathBuf::from);
    Some(folder.join(path)).filter(|file| file.exists())
}

/// None after a note where `what` may be missing.
fn found(what: &str, program: Option<PathBuf>) -> Option<PathBuf> {
    let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty() && value != "0");
    if program.is_none() {
        let required = is_set("TALKIE_REQUIRE_CLIENTS") || is_set("CI");
        assert!(!required, "{what} is not installed: {HINT}");
        eprintln!("skipped, since {what} is not installed: {HINT}");
    }
    program
}

/// A script of this folder.
fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/service/clients").join(name)
}

/// A command that sees nothing of our environment but where programs are, with `home` as its own folder.
fn command(program: impl AsRef<std::ffi::OsStr>, home: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("HOME", home).envs(env::vars_os().filter(|(name, _)| name == "PATH"));
    command
}
