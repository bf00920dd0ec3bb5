//! Downloads of models: the binary against a hub that answers rightly and in every wrong way.

mod faults;
mod kills;
mod scenarios;
mod server;
mod shared;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::pool::gateway::within;
use crate::support::{Outcome, handler};
use server::{File, HubServer};

/// Three pieces, the last one short.
const LARGE: usize = (20 << 20) + 12_345;
const WEIGHTS: &str = "dit/weights.safetensors";
const SMALL: &str = "map.json";

/// A hub with two files, a model that consists of them, and an empty volume.
struct Bench {
    dir: TempDir,
    hub: HubServer,
}

impl Bench {
    fn new() -> Self {
        Self::of(&[(WEIGHTS, File::large(LARGE, 7)), (SMALL, File::small("{\"a\": 1}"))])
    }

    fn of(files: &[(&str, File)]) -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap(), hub: HubServer::start(files) };
        let listed: Vec<_> = files.iter().map(|(path, _)| listed(path, "\"learn\"", "learn")).collect();
        bench.write_models("learn", &listed);
        bench
    }

    /// The model `m`: the built-in `tiny`, but the transformer's weights are these files of `o/m`.
    fn write_models(&self, revision: &str, files: &[String]) {
        let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("models.toml");
        let text = fs::read_to_string(built_in).unwrap();
        let tiny = &text[text.find("[models.tiny]").unwrap()..];
        let source = format!(
            "source = [{{ repo = \"o/m\", revision = {revision:?}, files = [{}] }}]",
            files.join(", ")
        );
        let text = tiny.replace("models.tiny", "models.m").replacen("source = \"random:42\"", &source, 1);
        fs::write(self.dir.path().join("models.toml"), text).unwrap();
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("volume")
    }

    fn place(&self, path: &str) -> PathBuf {
        self.root().join("o/m").join(path)
    }

    /// `handler prefetch` of the model, with short pauses.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = handler();
        command
            .args(["prefetch", "--model", "m"])
            .args(args)
            .env("TALKIE_MODELS_FILE", self.dir.path().join("models.toml"))
            .env("MODEL_STORAGE_PATH", self.root())
            .env("HF_ENDPOINT", self.hub.endpoint())
            .env("HUB_BACKOFF_SECONDS", "0.01");
        command
    }

    fn run(&self, args: &[&str]) -> Outcome {
        Outcome::of(self.command(args).output().unwrap())
    }

    fn start(&self, variables: &[(&str, &str)]) -> Child {
        let mut command = self.command(&[]);
        command.envs(variables.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    /// Waits until this much of the large file has been written, but for what each connection keeps back.
    fn wait_for_bytes(&self, bytes: u64) {
        let maps = || {
            let names = names_below(&self.root()).into_iter().filter(|name| name.ends_with(".map"));
            names.filter_map(|name| fs::read(self.root().join(name)).ok()).flatten().collect::<Vec<_>>()
        };
        let written =
            || maps().chunks_exact(8).map(|n| u64::from_le_bytes(n.try_into().unwrap())).sum::<u64>();
        let come = within(Duration::from_secs(60), || (written() + (1 << 20) >= bytes).then_some(()));
        come.expect("the bytes are written");
    }

    /// Checks that the volume holds exactly the hub's files, each whole and with a receipt, and nothing half-made.
    fn check_complete(&self, files: &[(&str, File)]) {
        self.check_files(files);
        assert_eq!(self.leftovers(), [""; 0]);
    }

    /// Checks that the volume holds the hub's files, each whole and with a receipt.
    fn check_files(&self, files: &[(&str, File)]) {
        for (path, file) in files {
            let bytes = fs::read(self.place(path)).unwrap();
            assert_eq!(hex::encode(Sha256::digest(&bytes)), file.sha256(), "{path}");
            let receipt = fs::read(self.place(&format!("{path}.receipt.json"))).unwrap();
            let receipt: Value = serde_json::from_slice(&receipt).unwrap();
            assert_eq!(
                (receipt["sha256"].as_str(), &receipt["size"]),
                (Some(&*file.sha256()), &bytes.len().into())
            );
        }
    }

    /// Everything on the volume that is neither a file of the hub nor its receipt, but for the lock.
    fn leftovers(&self) -> Vec<String> {
        let mut names = names_below(&self.root());
        names.retain(|name| {
            let file = name.trim_end_matches(".receipt.json");
            !file.ends_with(WEIGHTS) && !file.ends_with(SMALL) && !file.contains(".downloads/lock.")
        });
        names
    }

    fn files(&self) -> Vec<(&'static str, File)> {
        vec![(WEIGHTS, File::large(LARGE, 7)), (SMALL, File::small("{\"a\": 1}"))]
    }
}

fn listed(path: &str, size: &str, sha256: &str) -> String {
    format!("{{ path = {path:?}, size = {size}, sha256 = {sha256:?} }}")
}

/// The files below `folder`, by their paths in it.
fn names_below(folder: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).into_iter().flatten().flatten() {
            match entry.path() {
                path if path.is_dir() => folders.push(path),
                path => names.push(path.strip_prefix(folder).unwrap().display().to_string()),
            }
        }
    }
    names.sort();
    names
}

fn finish(child: Child) -> Outcome {
    Outcome::of(child.wait_with_output().unwrap())
}

fn signal(child: &Child, number: i32) {
    let pid = i32::try_from(child.id()).unwrap();
    // SAFETY: the call takes numbers only; the child has not been waited for, so that the number is still its own.
    assert_eq!(unsafe { libc::kill(pid, number) }, 0);
}
