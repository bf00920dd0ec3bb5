//! Whole videos of small models, made by the library's pipeline.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use talkie::media::audio::{self, Voice};
use talkie::media::image::{Portrait, Size};
use talkie::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use talkie::pipeline::{Cancel, Control, Inputs, Job, Pipeline, Progress, Settings, Video};
use talkie::registry::{FileSpec, Learned, ModelSpec, ModelStorage, Registry, RepoFiles, Source};
use talkie::request::{Draft, Limits};
use talkie::weights::{LoadPlan, Weights};

/// The profile `tiny`.
pub fn tiny() -> ModelSpec {
    Registry::built_in().unwrap().model("tiny").unwrap().clone()
}

/// `tiny` with more weights than activations: six wide blocks and a text encoder that is larger than they are.
pub fn heavy() -> ModelSpec {
    let mut spec = tiny();
    spec.dit.config = wan::Config { dim: 256, ffn_dim: 1024, num_layers: 6, ..spec.dit.config };
    spec.text_encoder.config = umt5::Config { dim_ffn: 16_384, ..spec.text_encoder.config };
    spec
}

/// The shortest settings: one step of one pass.
pub fn settings(spec: &ModelSpec) -> Settings {
    let draft = serde_json::json!({
        "image": "https://a.example/i.png", "audio": "https://a.example/a.wav", "seed": 7, "steps": 1,
        "text_guidance": 1.0, "audio_guidance": 1.0, "frames_per_window": 17, "motion_frames": 5,
    });
    let (request, _) = Draft::parse(&draft, &Limits::default()).unwrap().finish().unwrap();
    Settings::resolve(&request, spec).unwrap()
}

/// A grey portrait and half a second of a tone.
pub fn inputs() -> Inputs {
    let size = Size { height: 96, width: 96 };
    let portrait = Portrait::from_rgb(size, vec![120; 96 * 96 * 3]).unwrap();
    let pcm: Vec<u8> =
        (0..8000).flat_map(|i| (((f64::from(i) * 0.2).sin() * 9000.0) as i16).to_le_bytes()).collect();
    let voice = Voice::open(wav(&pcm).into(), &audio::Limits::default()).unwrap();
    Inputs { portrait, voice, second_voice: None }
}

/// Mono 16-bit samples at 16 kHz as a WAV file.
fn wav(pcm: &[u8]) -> Vec<u8> {
    let mut file = b"RIFF".to_vec();
    file.extend((36 + pcm.len() as u32).to_le_bytes());
    file.extend(b"WAVEfmt \x10\0\0\0\x01\0\x01\0");
    file.extend(16_000u32.to_le_bytes());
    file.extend(32_000u32.to_le_bytes());
    file.extend(b"\x02\0\x10\0data");
    file.extend((pcm.len() as u32).to_le_bytes());
    file.extend(pcm);
    file
}

/// What a generation reported and made.
pub struct Made {
    pub video: talkie::Result<Video>,
    /// The file, where there is one.
    pub bytes: Vec<u8>,
    pub progress: Vec<Progress>,
}

/// Makes a video of `spec`, whose files lie in `storage`.
pub fn make(pipeline: &mut Pipeline, spec: &ModelSpec, storage: &ModelStorage) -> Made {
    make_with(pipeline, spec, storage, &Cancel::default(), |_| ())
}

/// The same; `watch` sees each report and may cancel.
pub fn make_with(
    pipeline: &mut Pipeline,
    spec: &ModelSpec,
    storage: &ModelStorage,
    cancel: &Cancel,
    mut watch: impl FnMut(&Progress),
) -> Made {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out.mp4");
    let mut reports = Vec::new();
    let settings = settings(spec);
    let inputs = inputs();
    let job = Job { spec, storage, settings: &settings, inputs: &inputs, output: &output };
    let mut progress = |report: Progress| {
        watch(&report);
        reports.push(report);
    };
    let video = pipeline.generate(job, Control { cancel, progress: &mut progress });
    Made { video, bytes: std::fs::read(&output).unwrap_or_default(), progress: reports }
}

/// Writes the weights of `spec`, which are drawn, to files below `root`, from which the result reads them: one
/// repository and file for each network, with hashes that nobody checks here.
pub fn on_disk(spec: &ModelSpec, root: &Path) -> (ModelSpec, ModelStorage) {
    let storage = ModelStorage::at(root);
    let mut files = spec.clone();
    let save = |source: &mut Source, name: &str, plan: &dyn Fn(&Weights) -> LoadPlan| {
        let Source::Random(seed) = *source else { panic!("weights that are drawn") };
        *source = Source::Files(vec![repo(&format!("test/{name}"), seed)]);
        let repos: Vec<_> = source.files(1).collect();
        save(&storage.paths(repos).next().unwrap(), seed, plan);
    };
    let load = |w: &Weights, build: &dyn Fn(candle_nn::VarBuilder) -> candle_core::Result<()>| {
        w.plan(DType::F32, &Device::Cpu, &[""; 0], build).unwrap()
    };
    let ModelSpec { dit, vae, text_encoder, image_encoder, audio_encoder, .. } = spec;
    save(&mut files.dit.source, "dit", &|w| load(w, &|vb| wan::Model::new(&dit.config, vb).map(drop)));
    save(&mut files.vae.source, "vae", &|w| load(w, &|vb| wan_vae::Vae::new(&vae.config, vb).map(drop)));
    save(&mut files.text_encoder.source, "text", &|w| {
        load(w, &|vb| umt5::Model::new(&text_encoder.config, vb).map(drop))
    });
    save(&mut files.image_encoder.source, "image", &|w| {
        load(w, &|vb| clip_vision::Model::new(&image_encoder.config, vb).map(drop))
    });
    save(&mut files.audio_encoder.source, "audio", &|w| {
        load(w, &|vb| wav2vec2::Model::new(&audio_encoder.config, vb).map(drop))
    });
    (files, storage)
}

/// One file of a repository; `hash` tells its contents from others.
fn repo(name: &str, hash: u64) -> RepoFiles {
    let sha256 = Learned::Known(format!("{hash:064x}"));
    let file = FileSpec { path: "model.safetensors".into(), size: Learned::Learn, sha256 };
    RepoFiles {
        repo: name.into(),
        revision: Learned::Learn,
        branch: "main".into(),
        speakers: None,
        files: vec![file],
    }
}

/// Writes what `plan` asks for, drawn from `seed`.
fn save(path: &PathBuf, seed: u64, plan: &dyn Fn(&Weights) -> LoadPlan) {
    let weights = Weights::random(seed);
    let vb = weights.var_builder(DType::F32, &Device::Cpu);
    let tensors = plan(&weights).tensors.into_iter();
    let tensors: std::collections::HashMap<_, _> =
        tensors.map(|t| (t.name.clone(), vb.get(t.shape, &t.name).unwrap())).collect();
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// Where the weights of a network of [`on_disk`] lie.
pub fn weights_file(source: &Source, storage: &ModelStorage) -> PathBuf {
    storage.paths(source.files(1).collect::<Vec<_>>()).next().unwrap()
}
