//! Prepared files: what is loaded from them is what is loaded from their sources.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use sha2::{Digest, Sha256};
use talkie::models::wan;
use talkie::prepared::{
    NetworkKind, Precision, Preparation, Prepared, PromptEmbeds, PromptPreparation, Selection, fixed_texts,
    prune,
};
use talkie::registry::{
    FileSpec, Learned, LoraSpec, ModelSpec, ModelStorage, Receipt, Registry, RepoFiles, Source,
};
use talkie::tokenizer::Tokenizer;
use talkie::weights::{LoadMonitor, Weights, quant};

use crate::support::{Component, GoldenFile, check, relative_error, root};
use crate::weights::checkpoint::{Kind, Network};

const NONE: [&str; 0] = [];
/// As for the merge itself: bf16's rounding of product, multiple and sum.
const TOLERANCE_BF16: f64 = 1.0 / 64.0;
const TOLERANCE: f64 = 1e-4;

/// Prepares a network of `selection`.
fn prepare(selection: &Selection, kind: NetworkKind, precision: Precision) -> Prepared {
    let monitor = Arc::new(LoadMonitor::default());
    let work = Preparation::new(selection, kind, precision, monitor).unwrap();
    let (path, size) = (work.path(), work.size());
    let record = work.run(&AtomicU64::new(0)).unwrap();
    assert_eq!((record.size, fs::metadata(&path).unwrap().len()), (size, size));
    Prepared { path, record }
}

/// The names in a safetensors file in the order of their bytes, and where the data starts.
fn names(path: &Path) -> (Vec<String>, usize) {
    let bytes = fs::read(path).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let place = |entry: &Value| entry["data_offsets"][0].as_u64();
    let mut names: Vec<_> = header.into_iter().filter_map(|(name, e)| Some((place(&e)?, name))).collect();
    names.sort();
    (names.into_iter().map(|(_, name)| name).collect(), 8 + len)
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let wide = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    wide.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn kind(kind: Kind) -> NetworkKind {
    match kind {
        Kind::Dit => NetworkKind::Dit,
        Kind::TextEncoder => NetworkKind::TextEncoder,
        Kind::ImageEncoder => NetworkKind::ImageEncoder,
        Kind::Vae => NetworkKind::Vae,
        Kind::AudioEncoder => NetworkKind::AudioEncoder,
    }
}

fn dtype(precision: Precision) -> DType {
    match precision {
        Precision::F32 => DType::F32,
        Precision::F16 => DType::F16,
        Precision::Bf16 | Precision::Fp8 => DType::BF16,
    }
}

/// Writes `network`'s files where `storage` expects them, with receipts for those whose hash is not pinned.
fn install(network: Network, model: &ModelSpec, storage: &ModelStorage) {
    let written = tempfile::tempdir_in(storage.root()).unwrap();
    let files = network.write(written.path()).unwrap();
    for repo in model.files(1, &[]) {
        for file in &repo.files {
            let name = Path::new(&file.path).file_name();
            let Some(source) = files.iter().find(|written| written.file_name() == name) else { continue };
            let place = storage.path(repo, file);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::rename(source, &place).unwrap();
            write_receipt(&place, &storage.receipt_path(repo, file));
        }
    }
}

fn write_receipt(file: &Path, receipt: &Path) {
    use std::os::unix::fs::MetadataExt;
    let found = fs::metadata(file).unwrap();
    let receipt_of = Receipt {
        revision: "r".into(),
        size: found.len(),
        sha256: sha256(file),
        mtime_ns: found.mtime() * 1_000_000_000 + found.mtime_nsec(),
    };
    fs::write(receipt, serde_json::to_vec(&receipt_of).unwrap()).unwrap();
}

fn sha256(path: &Path) -> String {
    hex::encode(Sha256::digest(fs::read(path).unwrap()))
}

#[test]
fn every_network_is_prepared_as_it_is_loaded() {
    for published in crate::weights::KINDS {
        let network = Network { layers: 3, ..Network::new(published, 64) };
        let (dir, model, kind) = (tempfile::tempdir().unwrap(), network.model(), kind(published));
        let storage = ModelStorage::at(dir.path());
        install(network, &model, &storage);
        let selection = Selection { spec: &model, storage: &storage, speakers: 1, loras: &[] };
        let exact = selection.precision(kind);
        assert_eq!(
            exact,
            match published {
                Kind::Dit | Kind::TextEncoder => Precision::Bf16,
                Kind::ImageEncoder => Precision::F16,
                Kind::Vae | Kind::AudioEncoder => Precision::F32,
            }
        );
        let sources = || selection.open(&selection.find(kind).unwrap()).unwrap();
        let plan = network.plan(&sources(), dtype(exact)).unwrap();
        let expected: BTreeMap<_, _> = {
            let vb = sources().var_builder(dtype(exact), &Device::Cpu);
            plan.tensors.iter().map(|t| (t.name.clone(), vb.get(t.shape.clone(), &t.name).unwrap())).collect()
        };
        for precision in selection.preparable(kind).into_iter().rev() {
            let file = prepare(&selection, kind, precision);
            let found = selection.find(kind).unwrap();
            assert_eq!((found.key.precision(), found.prepared.as_ref()), (precision, Some(&file)));
            let (names, data) = names(&file.path);
            assert!(data.is_multiple_of(4096), "the data of {kind:?} starts at byte {data}");
            if precision == exact {
                let asked: Vec<_> = plan.tensors.iter().map(|tensor| tensor.name.clone()).collect();
                assert_eq!(names, asked, "{kind:?}: these tensors, in the order of loading");
            }
            // Strictly: nothing is missing, misshapen or left over, without a list of what is not used.
            let weights = selection.open(&found).unwrap();
            weights.plan(dtype(exact), &Device::Cpu, &found.unused, |vb| build(&model, kind, vb)).unwrap();
            assert!(found.unused.is_empty());
            let vb = selection.open(&found).unwrap().var_builder(dtype(exact), &Device::Cpu);
            for (name, expected) in &expected {
                let tensor = vb.get(expected.dims(), name).unwrap();
                if names.contains(name) {
                    assert!(bits(&tensor) == bits(expected), "{kind:?} {precision:?} {name}");
                } else {
                    // Three bits of mantissa.
                    let error = relative_error(&tensor, expected);
                    assert!(error > 0.0 && error < 1.0 / 16.0, "{name}: {error}");
                }
            }
        }
        // Nothing but the prepared file is needed any more.
        for repo in selection.sources(kind).unwrap() {
            repo.files.iter().for_each(|file| fs::remove_file(storage.path(repo, file)).unwrap());
        }
        let found = selection.find(kind).unwrap();
        assert_eq!(found.key.precision(), exact, "the exact file is preferred");
        selection.open(&found).unwrap();
        assert!(!selection.missing_files().unwrap().is_empty(), "the other networks are missing");
        assert!(
            selection.needed().unwrap().iter().all(|repo| !selection.sources(kind).unwrap().contains(repo))
        );
    }
}

fn build(
    model: &ModelSpec,
    kind: NetworkKind,
    vb: candle_nn::VarBuilder,
) -> candle_core::Result<Box<dyn std::any::Any>> {
    use talkie::models::{clip_vision, umt5, wan_vae, wav2vec2};
    Ok(match kind {
        NetworkKind::Dit => Box::new(wan::Model::new(&model.dit.config, vb)?),
        NetworkKind::TextEncoder => Box::new(umt5::Model::new(&model.text_encoder.config, vb)?),
        NetworkKind::ImageEncoder => Box::new(clip_vision::Model::new(&model.image_encoder.config, vb)?),
        NetworkKind::Vae => Box::new(wan_vae::Vae::new(&model.vae.config, vb)?),
        NetworkKind::AudioEncoder => Box::new(wav2vec2::Model::new(&model.audio_encoder.config, vb)?),
    })
}

/// A model whose DiT is that of the goldens, and the files that it takes from there.
struct Golden {
    dir: tempfile::TempDir,
    storage: ModelStorage,
    spec: ModelSpec,
}

impl Golden {
    fn new(config: &Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = Registry::built_in().unwrap().model("tiny").unwrap().clone();
        spec.dit.config = serde_json::from_value::<wan::Config>(config["dit_model"].clone()).unwrap();
        let mut golden = Self { storage: ModelStorage::at(dir.path()), dir, spec };
        let base = root().join(config["base"].as_str().unwrap());
        golden.spec.dit.source = Source::Files(vec![golden.file(&base, "dit.safetensors")]);
        golden
    }

    /// The file at `path` as one of the repository `me/it`.
    fn file(&self, path: &Path, name: &str) -> RepoFiles {
        let place = self.dir.path().join("me/it").join(name);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::copy(path, &place).unwrap();
        RepoFiles {
            repo: "me/it".into(),
            revision: Learned::Learn,
            branch: "main".into(),
            speakers: None,
            files: vec![FileSpec {
                path: name.into(),
                size: Learned::Learn,
                sha256: Learned::Known(sha256(&place)),
            }],
        }
    }

    fn selection<'a>(&'a self, loras: &'a [String]) -> Selection<'a> {
        Selection { spec: &self.spec, storage: &self.storage, speakers: 1, loras }
    }
}

#[test]
fn fp8_is_what_the_reference_stores() {
    let goldens = Component::open("quant");
    let golden = Golden::new(&goldens.config());
    let file = prepare(&golden.selection(&[]), NetworkKind::Dit, Precision::Fp8);
    let map = quant::Map::parse(&goldens.json("fp8_map.json").to_string()).unwrap();
    Weights::open(&[&file.path]).unwrap().check_quantized(&map).unwrap();
    let read = |path: &Path| candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let ours = read(&file.path);
    let mut theirs = read(&root().join("quant/fp8_state_dict_bf16.safetensors"));
    theirs.retain(|name, _| !name.ends_with("_scale") || name.ends_with("._scale"));
    assert_eq!(ours.keys().collect::<BTreeSet<_>>(), theirs.keys().collect::<BTreeSet<_>>());
    for (name, expected) in &theirs {
        let tensor = &ours[name];
        assert_eq!((tensor.dtype(), tensor.dims()), (expected.dtype(), expected.dims()), "{name}");
        assert!(bits(tensor) == bits(expected), "{name}");
    }
}

#[test]
fn quantised_codes_are_prepared_as_what_they_stand_for() {
    let goldens = Component::open("quant");
    let mut golden = Golden::new(&goldens.config());
    let source = root().join("quant/int8_state_dict_bf16.safetensors");
    golden.spec.dit.source = Source::Files(vec![golden.file(&source, "int8.safetensors")]);
    let selection = golden.selection(&[]);
    let expected = Weights::open(&[&source]).unwrap();
    let file = prepare(&selection, NetworkKind::Dit, Precision::Bf16);
    let (ours, expected) = (
        Weights::open(&[&file.path]).unwrap().var_builder(DType::BF16, &Device::Cpu),
        expected.var_builder(DType::BF16, &Device::Cpu),
    );
    for name in names(&file.path).0 {
        let expected = expected.get_unchecked(&name).unwrap();
        assert!(bits(&ours.get(expected.dims(), &name).unwrap()) == bits(&expected), "{name}");
    }
}

#[test]
fn a_lora_is_merged_as_the_reference_merges_it() {
    let goldens = Component::open("lora");
    let config = goldens.config();
    let lora_path = root().join("lora/lora.safetensors");
    let keys = GoldenFile::open("lora/lora.safetensors").names();
    let ignored: Vec<_> = keys.iter().filter(|key| is_ignored(key, &keys)).cloned().collect();
    for (name, settings) in config["files"].as_object().unwrap() {
        let (precision, tolerance) = match settings["dtype"].as_str().unwrap() {
            "float32" => (Precision::F32, TOLERANCE),
            _ => (Precision::Bf16, TOLERANCE_BF16),
        };
        let mut golden = Golden::new(&config);
        let source = golden.file(&lora_path, "lora.safetensors");
        let scale = settings["scale"].as_f64().unwrap();
        golden.spec.loras.insert("x".into(), LoraSpec { source, scale, ignored: ignored.clone() });
        let loras = ["x".to_owned()];
        let plain = prepare(&golden.selection(&[]), NetworkKind::Dit, precision);
        let merged = prepare(&golden.selection(&loras), NetworkKind::Dit, precision);
        assert_ne!(plain.path, merged.path);
        let open = |file: &Prepared| {
            Weights::open(&[&file.path]).unwrap().var_builder(dtype(precision), &Device::Cpu)
        };
        let (plain, merged) = (open(&plain), open(&merged));
        let expected = goldens.file(name);
        let changed: BTreeSet<_> = expected.names().into_iter().collect();
        for tensor in GoldenFile::open(config["base"].as_str().unwrap()).names() {
            let ours = merged.get_unchecked(&tensor).unwrap();
            if changed.contains(&tensor) {
                let label = format!("{name} {tensor} (prepared)");
                check("lora", dtype(precision).as_str(), &label, &ours, &expected.get(&tensor), tolerance);
            } else {
                assert!(bits(&ours) == bits(&plain.get_unchecked(&tensor).unwrap()), "{tensor}");
            }
        }
    }
}

/// Whether the reference passes over `key`.
fn is_ignored(key: &str, keys: &[String]) -> bool {
    let lacks_other =
        |this: &str, other: &str| key.contains(this) && !keys.contains(&key.replace(this, other));
    !key.starts_with("diffusion_model.")
        || [".alpha", ".diff_m", ".lora_A.weight", ".lora_B.weight"].iter().any(|end| key.ends_with(end))
        || lacks_other(".lora_down.", ".lora_up.")
        || lacks_other(".lora_up.", ".lora_down.")
}

/// `tiny` with its text encoder in a file.
fn with_text_encoder() -> Golden {
    let goldens = Component::open("quant");
    let mut golden = Golden::new(&goldens.config());
    let config = golden.spec.text_encoder.config.clone();
    let weights = Weights::random(3);
    let plan = weights
        .plan(DType::BF16, &Device::Cpu, &NONE, |vb| talkie::models::umt5::Model::new(&config, vb))
        .unwrap();
    let vb = weights.var_builder(DType::BF16, &Device::Cpu);
    let tensors = plan.tensors.iter().map(|t| (t.name.clone(), vb.get(t.shape.clone(), &t.name).unwrap()));
    let path = golden.dir.path().join("text");
    candle_core::safetensors::save(&tensors.collect(), &path).unwrap();
    golden.spec.text_encoder.source = Source::Files(vec![golden.file(&path, "text.safetensors")]);
    golden
}

#[test]
fn prompts_are_what_the_text_encoder_gives() {
    let golden = with_text_encoder();
    let (selection, device) = (golden.selection(&[]), Device::Cpu);
    let texts = fixed_texts(&golden.spec).unwrap();
    assert_eq!(texts.len(), 2, "a prompt and a negative one");
    assert!(PromptEmbeds::open(&selection, &device).unwrap().get("blurred, static").is_none());
    let work = |texts: &BTreeSet<String>| PromptPreparation::new(selection, texts, &device).unwrap().unwrap();
    assert_eq!(work(&texts).finished().unwrap(), None);
    let file = work(&texts).run(&device, Arc::default()).unwrap();
    assert_eq!(work(&texts).finished().unwrap().as_ref(), Some(&file));

    let found = selection.find(NetworkKind::TextEncoder).unwrap();
    let config = &golden.spec.text_encoder.config;
    let build = |vb| talkie::models::umt5::Model::new(config, vb);
    let encoder = selection.open(&found).unwrap().load(DType::F32, &device, &found.unused, build).unwrap();
    let rows = PromptEmbeds::open(&selection, &device).unwrap();
    for text in &texts {
        let expected = encoder.encode(&Tokenizer::bytes().encode(text).unwrap()).unwrap();
        let stored = rows.get(text).unwrap();
        assert_eq!((stored.dims(), stored.dtype()), (expected.dims(), expected.dtype()));
        assert!(bits(stored) == bits(&expected), "{text}");
        assert!(rows.get(&format!("  {text} \n")).is_some(), "what is cleaned to the same is the same");
    }
    assert!(rows.get("another text").is_none());

    // A text more is added to those that are there.
    let more: BTreeSet<_> = texts.iter().cloned().chain(["another text".to_owned()]).collect();
    assert_eq!(work(&more).finished().unwrap(), None);
    work(&more).run(&device, Arc::default()).unwrap();
    let rows = PromptEmbeds::open(&selection, &device).unwrap();
    assert!(more.iter().all(|text| rows.get(text).is_some()));

    // An encoder in another precision has rows of its own.
    prepare(&selection, NetworkKind::TextEncoder, Precision::Fp8);
    assert!(PromptEmbeds::open(&selection, &device).unwrap().get("another text").is_none());
    // Rows of an encoder that is drawn are not stored.
    let tiny = Registry::built_in().unwrap().model("tiny").unwrap().clone();
    let drawn = Selection { spec: &tiny, ..selection };
    assert!(PromptPreparation::new(drawn, &texts, &device).unwrap().is_none());
}

/// A registry of one model, `m`, of which `dit` is the source of the DiT.
fn registry(dit: &str) -> Registry {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("models.toml")).unwrap();
    let tiny = &text[text.find("[models.tiny]").unwrap()..];
    let text = tiny.replace("models.tiny", "models.m").replacen("\"random:42\"", dit, 1);
    Registry::parse(&text, "models.toml", &|_| None).unwrap()
}

#[test]
fn what_no_model_uses_is_pruned() {
    let dir = tempfile::tempdir().unwrap();
    let storage = ModelStorage::at(dir.path());
    let place = dir.path().join("o/m/dit.safetensors");
    fs::create_dir_all(place.parent().unwrap()).unwrap();
    let tiny = Registry::built_in().unwrap().model("tiny").unwrap().clone();
    let weights = Weights::random(42);
    let build = |vb| wan::Model::new(&tiny.dit.config, vb);
    let plan = weights.plan(DType::BF16, &Device::Cpu, &NONE, build).unwrap();
    let vb = weights.var_builder(DType::BF16, &Device::Cpu);
    let tensors = plan.tensors.iter().map(|t| (t.name.clone(), vb.get(t.shape.clone(), &t.name).unwrap()));
    candle_core::safetensors::save(&tensors.collect(), &place).unwrap();
    let source = |sha256: &str| {
        format!(
            r#"[{{ repo = "o/m", revision = "learn",
                files = [{{ path = "dit.safetensors", size = "learn", sha256 = "{sha256}" }}] }}]"#
        )
    };
    let pinned = registry(&source(&sha256(&place)));
    let spec = pinned.model("m").unwrap();
    let selection = Selection { spec, storage: &storage, speakers: 1, loras: &[] };
    let file = prepare(&selection, NetworkKind::Dit, Precision::Bf16);
    let folder = file.path.parent().unwrap();
    // A part of something else, and what is not ours.
    let part = folder.join("vae-0123456789abcdef.part");
    let foreign: [PathBuf; 2] = ["notes.txt", "dit-mine.safetensors"].map(|name| folder.join(name));
    for path in foreign.iter().chain([&part]) {
        fs::write(path, "x").unwrap();
    }
    let removed = |registry: &Registry, dry_run| -> Vec<PathBuf> {
        prune(registry, &storage, dry_run).unwrap().into_iter().map(|file| file.path).collect()
    };
    let everything = [file.path.with_extension("json"), file.path.clone(), part.clone()];
    assert_eq!(removed(&pinned, true), std::slice::from_ref(&part));
    // While a hash is not known, the file may be made from it; with another hash it is not.
    assert_eq!(removed(&registry(&source("learn")), true), std::slice::from_ref(&part));
    assert_eq!(removed(&registry(&source(&"0".repeat(64))), true), everything);
    assert_eq!(removed(&registry("\"random:1\""), true), everything);
    assert!(everything.iter().all(|path| path.exists()), "nothing was removed yet");
    assert_eq!(removed(&pinned, false), [part]);
    assert_eq!(removed(&registry("\"random:1\""), false), everything[..2]);
    assert!(!file.path.exists() && foreign.iter().all(|path| path.exists()));
    assert_eq!(prune(&pinned, &ModelStorage::at("/nonexistent"), false).unwrap(), []);
}
