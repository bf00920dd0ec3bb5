//! The real configs against the key lists of the published checkpoints (`tests/manifest`, name → shape): each network
//! asks for exactly those tensors. Nothing of their size is allocated: a tensor is one zero, seen at its shape.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use talkie::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use talkie::registry::{ModelSpec, Registry};
use talkie::weights::Weights;

type Manifest = BTreeMap<String, Vec<usize>>;

const DIT: [&str; 2] = ["wan2.1_i2v_14b_480p.diffusion_pytorch_model.json", "infinitetalk.safetensors.json"];
const TEXT_ENCODER: [&str; 1] = ["models_t5_umt5-xxl-enc-bf16.pth.json"];
const IMAGE_ENCODER: [&str; 1] = ["models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth.json"];
const IMAGE_ENCODER_USED: [&str; 1] = ["clip_visual_used.json"];
const VAE: [&str; 1] = ["Wan2.1_VAE.pth.json"];
const AUDIO_ENCODER: [&str; 1] = ["chinese-wav2vec2-base.model.safetensors.json"];
const AUDIO_ENCODER_USED: [&str; 1] = ["wav2vec2_used.json"];

fn read<T: serde::de::DeserializeOwned>(file: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manifest").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The tensors of several files together, of which none repeats another's.
fn manifest(files: &[&str]) -> Manifest {
    let mut all = Manifest::new();
    for file in files {
        for (name, shape) in read::<Manifest>(file) {
            assert!(all.insert(name.clone(), shape).is_none(), "{file}: `{name}` is in another file as well");
        }
    }
    all
}

/// One zero, seen as a tensor of `shape`.
fn phantom(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros((), dtype, &Device::Cpu).unwrap().broadcast_as(shape).unwrap()
}

/// Notes what is asked for and gives out phantoms.
#[derive(Clone, Default)]
struct Recorder {
    requested: Arc<Mutex<Manifest>>,
    /// What there is, for networks that know several names of a tensor.
    existing: Arc<Manifest>,
}

impl SimpleBackend for Recorder {
    fn get(&self, shape: Shape, name: &str, _: candle_nn::Init, dtype: DType, _: &Device) -> Result<Tensor> {
        let before = self.requested.lock().unwrap().insert(name.to_owned(), shape.dims().to_vec());
        assert!(before.is_none(), "`{name}` is asked for twice");
        Ok(phantom(shape.dims(), dtype))
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        panic!("`{name}` is asked for without a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.existing.contains_key(name)
    }
}

/// Fails unless `build` asks for exactly the tensors of `files`.
fn requests_exactly<T>(files: &[&str], build: impl FnOnce(VarBuilder<'static>) -> Result<T>) {
    let expected = manifest(files);
    let recorder = Recorder { existing: Arc::new(expected.clone()), ..Default::default() };
    build(VarBuilder::from_backend(Box::new(recorder.clone()), DType::F32, Device::Cpu)).unwrap();
    let requested = recorder.requested.lock().unwrap().clone();
    let missing: Vec<_> = expected.iter().filter(|(name, _)| !requested.contains_key(*name)).collect();
    assert!(missing.is_empty(), "never asked for: {missing:?}");
    for (name, shape) in &requested {
        assert_eq!(Some(shape), expected.get(name), "`{name}`");
    }
}

fn infinitetalk() -> ModelSpec {
    Registry::built_in().unwrap().model("infinitetalk").unwrap().clone()
}

#[test]
fn dit_with_its_adapter() {
    requests_exactly(&DIT, |vb| wan::Model::new(&wan::Config::infinitetalk_14b(), vb));
}

#[test]
fn text_encoder() {
    requests_exactly(&TEXT_ENCODER, |vb| umt5::Model::new(&umt5::Config::umt5_xxl(), vb));
}

#[test]
fn image_encoder() {
    requests_exactly(&IMAGE_ENCODER_USED, |vb| clip_vision::Model::new(&clip_vision::Config::vit_h_14(), vb));
}

#[test]
fn vae() {
    requests_exactly(&VAE, |vb| wan_vae::Vae::new(&wan_vae::Config::wan2_1(), vb));
}

#[test]
fn audio_encoder() {
    requests_exactly(&AUDIO_ENCODER_USED, |vb| wav2vec2::Model::new(&wav2vec2::Config::chinese_base(), vb));
}

/// The tensors of whole files, used or not.
fn weights(files: &[&str]) -> Weights {
    let tensors = manifest(files).into_iter().map(|(name, shape)| (name, phantom(&shape, DType::F32)));
    Weights::from_tensors(tensors.collect::<HashMap<_, _>>())
}

#[test]
fn the_registry_accounts_for_every_tensor_of_the_files() {
    let model = infinitetalk();
    let device = Device::Cpu;
    let spec = &model.dit;
    weights(&DIT).load(DType::F32, &device, &spec.unused, |vb| wan::Model::new(&spec.config, vb)).unwrap();
    let spec = &model.text_encoder;
    weights(&TEXT_ENCODER)
        .load(DType::F32, &device, &spec.unused, |vb| umt5::Model::new(&spec.config, vb))
        .unwrap();
    let spec = &model.vae;
    weights(&VAE).load(DType::F32, &device, &spec.unused, |vb| wan_vae::Vae::new(&spec.config, vb)).unwrap();
    let spec = &model.audio_encoder;
    let build = |vb| wav2vec2::Model::new(&spec.config, vb);
    weights(&AUDIO_ENCODER).load(DType::F32, &device, &spec.unused, build).unwrap();
    let spec = &model.image_encoder;
    let build = |vb| clip_vision::Model::new(&spec.config, vb);
    weights(&IMAGE_ENCODER).load(DType::F32, &device, &spec.unused, build).unwrap();
    // The list is needed, and no pattern of it is idle.
    for (i, pattern) in spec.unused.iter().enumerate() {
        let mut rest = spec.unused.clone();
        rest.remove(i);
        let error = weights(&IMAGE_ENCODER).load(DType::F32, &device, &rest, build).map(|_| ()).unwrap_err();
        let part = pattern.trim_end_matches('*');
        assert!(error.to_string().contains(part), "without {pattern}: {error}");
    }
}

#[test]
fn the_lists_are_as_long_as_the_published_files() {
    #[derive(serde::Deserialize)]
    struct Summary {
        keys: usize,
        params: usize,
    }
    let summary: BTreeMap<String, Summary> = read("summary.json");
    let named = [
        DIT.as_slice(),
        &TEXT_ENCODER,
        &IMAGE_ENCODER,
        &IMAGE_ENCODER_USED,
        &VAE,
        &AUDIO_ENCODER,
        &AUDIO_ENCODER_USED,
    ];
    assert_eq!(named.concat().len(), summary.len());
    for (file, expected) in summary {
        let manifest = manifest(&[&file]);
        let params: usize = manifest.values().map(|shape| shape.iter().product::<usize>()).sum();
        assert_eq!((manifest.len(), params), (expected.keys, expected.params), "{file}");
    }
}

/// The registry's files are those of the key lists: where their length is known, it is that of the tensors and of a
/// header.
#[test]
fn the_files_of_the_registry_are_as_long_as_their_tensors() {
    #[derive(serde::Deserialize)]
    struct Summary {
        keys: u64,
        tensor_bytes: u64,
    }
    let summary: BTreeMap<String, Summary> = read("summary.json");
    let model = infinitetalk();
    let (dit, text, image) = (&model.dit.source, &model.text_encoder.source, &model.image_encoder.source);
    let networks = [
        (dit, 8, [DIT[0], DIT[1]].as_slice()),
        (text, 1, &TEXT_ENCODER),
        (image, 1, &IMAGE_ENCODER),
        (&model.vae.source, 1, &VAE),
        (&model.audio_encoder.source, 1, &AUDIO_ENCODER),
    ];
    let mut unknown = Vec::new();
    for (source, count, lists) in networks {
        let files: Vec<_> = source.files(1).flat_map(|repo| &repo.files).collect();
        assert_eq!(files.len(), count);
        let sizes: Option<Vec<u64>> = files.iter().map(|file| file.size.known().copied()).collect();
        let Some(sizes) = sizes else {
            unknown.extend(files.iter().map(|file| file.path.as_str()));
            continue;
        };
        let lists = lists.iter().map(|list| &summary[*list]);
        let (keys, tensors) = lists.fold((0, 0), |(k, b), list| (k + list.keys, b + list.tensor_bytes));
        let header = sizes.iter().sum::<u64>() - tensors;
        // A name, a shape, a dtype and offsets; in a zip archive twice, with padding.
        assert!((60 * keys..600 * keys).contains(&header), "{} has {header} bytes besides", files[0].path);
    }
    assert_eq!(unknown, ["model.safetensors"], "not published anywhere");
}

#[test]
fn a_wrong_dimension_is_noticed() {
    let model = infinitetalk();
    let config = wan::Config { ffn_dim: 13_823, ..model.dit.config };
    let error = weights(&DIT).load(DType::F32, &Device::Cpu, &[""; 0], |vb| wan::Model::new(&config, vb));
    let error = error.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("ffn") && error.contains("13824") && error.contains("13823"), "{error}");
}
