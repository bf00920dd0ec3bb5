//! `handler prepare`: from fetched files to prepared ones, killed, cancelled, out of room, twice at once; and the same
//! video as before.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use candle_core::{DType, Device};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use talkie::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use talkie::registry::{ModelSpec, Registry};
use talkie::weights::{LoadPlan, Weights};

use crate::support::{Bench, Outcome, handler, is_long, with_small_files};

const NETWORKS: [&str; 5] = ["dit", "vae", "text_encoder", "image_encoder", "audio_encoder"];
/// Kills of a short run, and of a long one.
const KILLS: (usize, usize) = (6, 100);

/// The model `m`, with files, on a volume.
struct Volume {
    bench: Bench,
}

impl Volume {
    /// `m` is `tiny` with every network in a file, in the dtype that models.toml gives it.
    fn of_tiny() -> Self {
        let volume = Self { bench: Bench::new() };
        let mut text = tiny();
        for network in NETWORKS {
            text = text.replacen("source = \"random:42\"", &source(network), 1);
        }
        volume.write_models(&text);
        let spec = Registry::built_in().unwrap().model("tiny").unwrap().clone();
        for network in NETWORKS {
            let dtype = match network {
                "vae" | "audio_encoder" => DType::F32,
                "image_encoder" => DType::F16,
                _ => DType::BF16,
            };
            let weights = Weights::random(42);
            let vb = weights.var_builder(dtype, &Device::Cpu);
            let tensors = plan(&spec, network, &weights, dtype).tensors.into_iter();
            let tensors = tensors.map(|t| (t.name.clone(), vb.get(t.shape, &t.name).unwrap())).collect();
            fs::create_dir_all(volume.source(network).parent().unwrap()).unwrap();
            candle_core::safetensors::save(&tensors, volume.source(network)).unwrap();
            volume.write_receipt(network);
        }
        volume
    }

    /// `m` is `tiny` with a text encoder in a file of 460 MB, all of it zeros, which take no room.
    fn large() -> Self {
        let volume = Self { bench: Bench::new() };
        let (before, rest) = tiny().split_once("[models.tiny.text_encoder]").map(own).unwrap();
        let rest = rest.replacen("source = \"random:42\"", &source("text_encoder"), 1);
        let rest = rest.replacen("dim_ffn = 128", "dim_ffn = 20000", 1);
        let rest = rest.replacen("num_layers = 2", "num_layers = 30", 1);
        volume.write_models(&format!("{before}[models.tiny.text_encoder]{rest}"));
        let spec = volume.spec();
        volume.write_zeros(&plan(&spec, "text_encoder", &Weights::random(1), DType::F32));
        volume
    }

    fn write_models(&self, text: &str) {
        self.bench.write("models.toml", text.replace("models.tiny", "models.m").as_bytes());
    }

    fn spec(&self) -> ModelSpec {
        let registry = Registry::open(self.bench.path("models.toml"), &|_| None).unwrap();
        registry.model("m").unwrap().clone()
    }

    /// The file of the text encoder, as f32.
    fn write_zeros(&self, plan: &LoadPlan) {
        let mut header = serde_json::Map::new();
        let mut end = 0;
        for tensor in &plan.tensors {
            let start = end;
            end += 4 * tensor.shape.elem_count();
            let entry = json!({"dtype": "F32", "shape": tensor.shape.dims(), "data_offsets": [start, end]});
            header.insert(tensor.name.clone(), entry);
        }
        let header = serde_json::to_vec(&header).unwrap();
        let path = self.source("text_encoder");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], &header].concat()).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len((8 + header.len() + end) as u64).unwrap();
        self.write_receipt("text_encoder");
    }

    fn root(&self) -> PathBuf {
        self.bench.path("volume")
    }

    fn source(&self, network: &str) -> PathBuf {
        self.root().join(format!("o/m/{network}.safetensors"))
    }

    /// Says that the file of `network` was verified. Its hash is made up: nobody reads the file to see it.
    fn write_receipt(&self, network: &str) {
        let path = self.source(network);
        let found = fs::metadata(&path).unwrap();
        let receipt = json!({
            "revision": "0123456789abcdef0123456789abcdef01234567", "size": found.len(),
            "sha256": hex::encode(Sha256::digest(network)),
            "mtime_ns": found.mtime() * 1_000_000_000 + found.mtime_nsec(),
        });
        fs::write(format!("{}.receipt.json", path.display()), receipt.to_string()).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = handler();
        command.arg("prepare").args(args);
        command.env("TALKIE_MODELS_FILE", self.bench.path("models.toml"));
        command.env("MODEL_STORAGE_PATH", self.root()).env("HF_HUB_OFFLINE", "1");
        command
    }

    fn prepare(&self, args: &[&str]) -> Outcome {
        Outcome::of(self.command(&[&["--model", "m"], args].concat()).output().unwrap())
    }

    fn start(&self) -> Child {
        let mut command = self.command(&["--model", "m", "--skip-prompts"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// The SHA-256 of a video of `m`.
    fn video(&self) -> Value {
        let mut command = self.bench.generate(&["--image", "portrait.png", "--audio", "voice.wav"]);
        command.args(["--seed", "7", "--model", "m"]);
        command.env("TALKIE_MODELS_FILE", self.bench.path("models.toml"));
        command.env("MODEL_STORAGE_PATH", self.root()).env("HF_HUB_OFFLINE", "1");
        Outcome::of(command.output().unwrap()).output()["sha256"].clone()
    }

    /// The names in the folder of prepared files.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root().join("prepared")).into_iter().flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn clear(&self) {
        let _ = fs::remove_dir_all(self.root().join("prepared"));
    }

    /// Waits until `child` has written this much, or has ended.
    fn wait_for_part(&self, child: &mut Child, bytes: u64) {
        while self.part_bytes() < bytes && child.try_wait().unwrap().is_none() {
            thread::yield_now();
        }
    }

    /// Bytes of the file in the making.
    fn part_bytes(&self) -> u64 {
        let part = self.names().into_iter().find(|name| name.ends_with(".part"));
        part.map_or(0, |name| fs::metadata(self.root().join("prepared").join(name)).map_or(0, |f| f.len()))
    }
}

fn own((a, b): (&str, &str)) -> (String, String) {
    (a.to_owned(), b.to_owned())
}

/// The built-in model `tiny` as it stands in models.toml.
fn tiny() -> String {
    let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("models.toml");
    let text = fs::read_to_string(built_in).unwrap();
    text[text.find("[models.tiny]").unwrap()..].to_owned()
}

fn source(network: &str) -> String {
    format!(
        "source = [{{ repo = \"o/m\", revision = \"learn\", files = [{{ path = \"{network}.safetensors\", size = \
         \"learn\", sha256 = \"learn\" }}] }}]"
    )
}

fn plan(spec: &ModelSpec, network: &str, weights: &Weights, dtype: DType) -> LoadPlan {
    let (device, none) = (&Device::Cpu, [""; 0]);
    match network {
        "dit" => weights.plan(dtype, device, &none, |vb| wan::Model::new(&spec.dit.config, vb)),
        "vae" => weights.plan(dtype, device, &none, |vb| wan_vae::Vae::new(&spec.vae.config, vb)),
        "text_encoder" => {
            weights.plan(dtype, device, &none, |vb| umt5::Model::new(&spec.text_encoder.config, vb))
        }
        "image_encoder" => {
            weights.plan(dtype, device, &none, |vb| clip_vision::Model::new(&spec.image_encoder.config, vb))
        }
        _ => weights.plan(dtype, device, &none, |vb| wav2vec2::Model::new(&spec.audio_encoder.config, vb)),
    }
    .unwrap()
}

/// The files of a report as `of` and `state`.
fn states(report: &Value) -> Vec<(String, String)> {
    let files = report["files"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    files.map(|file| (text(&file["of"]), text(&file["state"]))).collect()
}

#[test]
fn a_prepared_model_makes_the_same_video_without_its_sources() {
    let volume = Volume::of_tiny();
    let before = volume.video();

    let planned = volume.prepare(&["--dry-run"]);
    let report = planned.output();
    assert!(states(&report).iter().all(|(_, state)| state == "missing"), "{report}");
    assert!(planned.stderr.contains("to read") && planned.stderr.contains("free in"), "{}", planned.stderr);
    assert_eq!(volume.names(), [""; 0], "nothing was written");

    let report = volume.prepare(&[]).output();
    let of: Vec<_> = states(&report).into_iter().map(|(of, state)| format!("{of} {state}")).collect();
    let expected = ["audio_encoder", "text_encoder", "image_encoder", "vae", "dit", "prompts"];
    assert_eq!(of, expected.map(|of| format!("{of} written")));
    for file in report["files"].as_array().unwrap() {
        let bytes = fs::read(file["path"].as_str().unwrap()).unwrap();
        assert_eq!(file["size"], bytes.len());
        assert_eq!(file["sha256"], hex::encode(Sha256::digest(&bytes)), "{file}");
    }
    let sum: u64 = report["files"].as_array().unwrap()[..5].iter().map(|f| f["size"].as_u64().unwrap()).sum();
    assert_eq!(report["need_write_bytes"], sum);
    let read = report["read_bytes"].as_u64().unwrap();
    assert!(read >= report["need_read_bytes"].as_u64().unwrap(), "{report}");

    assert_eq!(volume.video(), before);
    for network in NETWORKS {
        fs::remove_file(volume.source(network)).unwrap();
    }
    assert_eq!(volume.video(), before, "the sources are not needed any more");

    // Nothing is left to do, whoever asks.
    let again = volume.prepare(&["--verify"]).output();
    assert!(states(&again).iter().all(|(_, state)| state == "ready"), "{again}");
    assert_eq!((&again["need_write_bytes"], &again["need_read_bytes"]), (&json!(0), &json!(0)));
}

#[test]
fn fp8_is_used_where_it_is_all_there_is_and_the_exact_file_is_preferred() {
    let volume = Volume::of_tiny();
    let exact = volume.video();
    let report = volume.prepare(&["--precision", "fp8", "--skip-prompts"]).output();
    assert_eq!(states(&report).len(), 5);
    let coarse = volume.video();
    assert_ne!(coarse, exact);
    let both = volume.prepare(&["--skip-prompts"]).output();
    let written: Vec<_> = states(&both).into_iter().filter(|(_, state)| state == "written").collect();
    assert_eq!(written.len(), 2, "DiT and text encoder: {written:?}");
    assert_eq!(volume.video(), exact);
    let noted = volume.prepare(&["--precision", "fp8", "--skip-prompts", "--verify"]);
    assert!(states(&noted.output()).iter().all(|(_, state)| state == "ready"));
}

#[test]
fn a_damaged_file_is_found_and_made_again() {
    let volume = Volume::of_tiny();
    let report = volume.prepare(&["--skip-prompts"]).output();
    let of_dit = |report: &Value| report["files"].as_array().unwrap().last().unwrap().clone();
    let path = of_dit(&report)["path"].as_str().unwrap().to_owned();
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let unread = volume.prepare(&["--skip-prompts"]).output();
    assert_eq!(of_dit(&unread)["state"], "ready", "without --verify nothing is read");
    let mended = volume.prepare(&["--skip-prompts", "--verify"]);
    assert!(mended.stderr.contains("it is made again"), "{}", mended.stderr);
    assert_eq!(of_dit(&mended.output())["sha256"], of_dit(&report)["sha256"]);
    // Another length is seen without reading.
    fs::write(&path, "short").unwrap();
    assert_eq!(of_dit(&volume.prepare(&["--skip-prompts"]).output())["sha256"], of_dit(&report)["sha256"]);
}

#[test]
fn fault_38_a_preparation_that_is_killed_at_any_moment_goes_on_and_ends_in_the_same_file() {
    let seed = std::env::var("TALKIE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_127);
    let mut random = StdRng::seed_from_u64(seed);
    let volume = Volume::large();
    let whole = volume.prepare(&["--skip-prompts"]).output();
    let size = whole["files"][0]["size"].as_u64().unwrap();
    let (mut kills, mut gone_on) = (0, 0);
    while kills < if is_long() { KILLS.1 } else { KILLS.0 } {
        volume.clear();
        for _ in 0..random.random_range(1..=3) {
            let mut child = volume.start();
            volume.wait_for_part(&mut child, random.random_range(0..size));
            let _ = child.kill();
            let end = child.wait().unwrap();
            kills += usize::from(end.signal() == Some(libc::SIGKILL));
            let names = volume.names();
            let complete = names.iter().any(|name| name.ends_with(".json"));
            assert!(!complete || names.iter().any(|name| name.ends_with(".safetensors")), "{names:?}");
        }
        let there = volume.part_bytes();
        let report = volume.prepare(&["--skip-prompts"]).output();
        let (file, expected) = (&report["files"][0], &whole["files"][0]);
        assert_eq!((&file["sha256"], &file["size"]), (&expected["sha256"], &expected["size"]), "seed {seed}");
        let bytes = fs::read(file["path"].as_str().unwrap()).unwrap();
        assert_eq!(file["sha256"], hex::encode(Sha256::digest(bytes)), "seed {seed}");
        assert_eq!(volume.names().len(), 2, "seed {seed}: nothing half-made is left");
        gone_on += usize::from(there > 0);
    }
    eprintln!("{kills} kills, {gone_on} preparations went on from something");
    assert!(gone_on > 0);
}

#[test]
fn ctrl_c_ends_a_preparation_that_can_be_gone_on_with() {
    let volume = Volume::large();
    let mut child = volume.start();
    volume.wait_for_part(&mut child, (64 << 20) + 1);
    // SAFETY: two integers; the child was not waited for, so that the number is its own.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) }, 0);
    let ended = Outcome::of(child.wait_with_output().unwrap());
    let error = ended.error();
    assert_eq!((ended.code, &error["code"]), (Some(1), &json!("CANCELLED")), "{error}");
    assert!(error["hint"].as_str().is_some_and(|hint| hint.contains("goes on")), "{error}");
    let there = volume.part_bytes();
    assert!(there > 64 << 20);
    let dry = volume.prepare(&["--dry-run"]).output();
    assert_eq!(states(&dry)[0].1, "partial");
    let report = volume.prepare(&["--skip-prompts"]).output();
    assert_eq!(states(&report), [("text_encoder".to_owned(), "resumed".to_owned())]);
    let (read, of) = (report["read_bytes"].as_u64().unwrap(), report["need_read_bytes"].as_u64().unwrap());
    assert!(read < of - (100 << 20), "{read} of {of} bytes were read again");
}

#[test]
fn fault_41_a_volume_that_fills_during_a_preparation_is_an_error_and_what_was_written_is_used() {
    let volume = Volume::large();
    let mut command = volume.command(&["--model", "m", "--skip-prompts"]);
    with_small_files(&mut command, 100 << 20);
    let full = Outcome::of(command.output().unwrap());
    let error = full.error();
    assert_eq!((full.code, &error["code"]), (Some(1), &json!("INSUFFICIENT_DISK")), "{error}");
    assert!(!volume.names().iter().any(|name| name.ends_with(".safetensors") || name.ends_with(".json")));
    let report = volume.prepare(&["--skip-prompts"]).output();
    assert_eq!(states(&report), [("text_encoder".to_owned(), "resumed".to_owned())]);
}

#[test]
fn fault_41_a_volume_that_is_too_small_for_prepared_files_is_refused_before_the_first_byte() {
    let volume = Volume::large();
    // A table of tokens of some 13 TB, of which the file has nothing but the length.
    let text = fs::read_to_string(volume.bench.path("models.toml")).unwrap();
    volume.write_models(&text.replacen("vocab = 384", "vocab = 50000000000", 1));
    volume.write_zeros(&plan(&volume.spec(), "text_encoder", &Weights::random(1), DType::F32));
    let outcome = volume.prepare(&[]);
    let error = outcome.error();
    assert_eq!((outcome.code, &error["code"]), (Some(1), &json!("INSUFFICIENT_DISK")), "{error}");
    let detail = |name: &str| error["details"][name].as_u64().unwrap();
    assert!(detail("need_bytes") > 6_000_000_000_000 && detail("free_bytes") < detail("need_bytes"));
    assert_eq!(volume.names(), [""; 0]);
}

#[test]
fn of_two_at_once_one_writes_and_the_other_waits() {
    let volume = Volume::large();
    let children = [volume.start(), volume.start()];
    let reports = children.map(|child| Outcome::of(child.wait_with_output().unwrap()).output());
    let mut all: Vec<_> = reports.iter().flat_map(states).map(|(_, state)| state).collect();
    all.sort();
    assert_eq!(all, ["ready", "written"]);
    assert_eq!(volume.names().len(), 2);
}

#[test]
fn what_cannot_be_prepared_is_refused() {
    let volume = Volume::of_tiny();
    fs::remove_file(volume.source("vae")).unwrap();
    let missing = volume.prepare(&[]);
    assert_ne!(missing.code, Some(0));
    assert!(missing.error()["message"].as_str().is_some_and(|m| m.contains("vae.safetensors")));
    let dry = volume.prepare(&["--dry-run"]).refused("MODEL_NOT_FOUND");
    assert!(dry["hint"].as_str().is_some_and(|hint| hint.contains("handler prefetch --model m")), "{dry}");
    for args in [&["--model", "m", "--speakers", "3"][..], &["--model", "m", "--preset", "best"], &[]] {
        Outcome::of(volume.command(args).output().unwrap()).refused("INVALID_INPUT");
    }
    Outcome::of(volume.command(&["--model", "n"]).output().unwrap()).refused("MODEL_NOT_FOUND");
    assert_eq!(volume.names(), [""; 0]);
}

#[test]
fn prepared_files_without_a_model_are_pruned() {
    let volume = Volume::of_tiny();
    volume.prepare(&[]).output();
    let names = volume.names();
    let prune = |args: &[&str]| Outcome::of(volume.command(args).output().unwrap()).output();
    assert_eq!(prune(&["--prune"])["removed"], json!([]));
    volume.write_models(&tiny());
    let listed = prune(&["--prune", "--dry-run"]);
    assert_eq!(listed["removed"].as_array().map(Vec::len), Some(names.len()), "{listed}");
    assert_eq!(volume.names(), names);
    prune(&["--prune"]);
    assert_eq!(volume.names(), [""; 0]);
}
