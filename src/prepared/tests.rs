use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use candle_core::{DType, Device, Shape};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use super::layout::{Content, Layout};
use super::*;
use crate::models::umt5;
use crate::registry::{FileSpec, Learned, ModelSpec, ModelStorage, Registry, RepoFiles, Source};
use crate::weights::{LoadMonitor, LoadPlan, PlannedTensor, Weights};
use crate::{Error, ErrorKind};

const KIND: NetworkKind = NetworkKind::TextEncoder;

/// The model `tiny` with its text encoder in a file.
struct Model {
    dir: tempfile::TempDir,
    storage: ModelStorage,
    spec: ModelSpec,
}

impl Model {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = Registry::built_in().unwrap().model("tiny").unwrap().clone();
        let config = spec.text_encoder.config.clone();
        let weights = Weights::random(7);
        let build = |vb| umt5::Model::new(&config, vb);
        let plan = weights.plan(DType::F32, &Device::Cpu, &[""; 0], build).unwrap();
        let vb = weights.var_builder(DType::F32, &Device::Cpu);
        let tensors = plan.tensors.into_iter().map(|PlannedTensor { name, shape, .. }| {
            let tensor = vb.get(shape, &name).unwrap();
            (name, tensor)
        });
        let file = dir.path().join("me/it/text.safetensors");
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        candle_core::safetensors::save(&tensors.collect(), &file).unwrap();
        spec.text_encoder.source = Source::Files(vec![RepoFiles {
            repo: "me/it".into(),
            revision: Learned::Learn,
            branch: "main".into(),
            speakers: None,
            files: vec![FileSpec {
                path: "text.safetensors".into(),
                size: Learned::Learn,
                sha256: Learned::Known(sha256(&file)),
            }],
        }]);
        Self { storage: ModelStorage::at(dir.path()), dir, spec }
    }

    fn selection(&self) -> Selection<'_> {
        Selection { spec: &self.spec, storage: &self.storage, speakers: 1, loras: &[] }
    }

    fn prepare(&self, precision: Precision, monitor: LoadMonitor) -> crate::Result<Record> {
        Preparation::new(&self.selection(), KIND, precision, Arc::new(monitor))?.run(&AtomicU64::new(0))
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("prepared")
    }

    /// The names in the folder of prepared files.
    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.folder())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn only(&self, end: &str) -> PathBuf {
        let names: Vec<_> = self.names().into_iter().filter(|name| name.ends_with(end)).collect();
        assert_eq!(names.len(), 1, "{names:?}");
        self.folder().join(&names[0])
    }
}

fn sha256(path: &Path) -> String {
    hex::encode(Sha256::digest(fs::read(path).unwrap()))
}

/// Ends the preparation at the `n`th check.
fn ends_at(n: usize) -> LoadMonitor {
    let checks = AtomicUsize::new(0);
    LoadMonitor::new(move || match checks.fetch_add(1, Ordering::Relaxed) + 1 < n {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Cancelled, "enough")),
    })
}

#[test]
fn a_preparation_that_was_ended_anywhere_and_damaged_anyhow_ends_in_the_same_file() {
    let whole = Model::new();
    let expected = whole.prepare(Precision::Fp8, LoadMonitor::default()).unwrap();
    assert_eq!(sha256(&whole.only(".safetensors")), expected.sha256);

    let model = Model::new();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut resumed = 0;
    for round in 0..20 {
        let _ = fs::remove_dir_all(model.folder());
        for _ in 0..rng.random_range(1..4) {
            let Err(error) = model.prepare(Precision::Fp8, ends_at(rng.random_range(1..60))) else {
                continue;
            };
            assert_eq!(error.kind(), ErrorKind::Cancelled);
            damage(&model, &mut rng);
        }
        let there = part::bytes_there(&model.folder(), &key(&model, Precision::Fp8).stem());
        resumed += usize::from(there > 8192);
        let record = model.prepare(Precision::Fp8, LoadMonitor::default()).unwrap();
        assert_eq!(record, expected, "round {round}");
        assert_eq!(sha256(&model.only(".safetensors")), expected.sha256, "round {round}");
        assert_eq!(model.names(), whole.names(), "round {round}: nothing else is left");
    }
    assert!(resumed > 5, "{resumed} rounds went on from something");
}

fn key(model: &Model, precision: Precision) -> NetworkKey {
    model.selection().key(KIND, precision).unwrap()
}

/// What a crash of the machine, or of the disk, can do to an unfinished file.
fn damage(model: &Model, rng: &mut ChaCha8Rng) {
    let find = |end: &str| model.names().into_iter().find(|name| name.ends_with(end));
    let Some(part) = find(".part").map(|name| model.folder().join(name)) else { return };
    let journal = find(".journal").map(|name| model.folder().join(name)).unwrap();
    let path = if rng.random_bool(0.5) { &part } else { &journal };
    let mut bytes = fs::read(path).unwrap();
    match rng.random_range(0..5) {
        0 if !bytes.is_empty() => bytes.truncate(rng.random_range(0..bytes.len())),
        1 if !bytes.is_empty() => {
            let at = rng.random_range(0..bytes.len());
            bytes[at] ^= 0x10;
        }
        2 => bytes.extend([0; 100]),
        3 => return fs::remove_file(path).unwrap(),
        _ => return,
    }
    fs::write(path, bytes).unwrap();
}

#[test]
fn an_ended_preparation_goes_on_where_it_was() {
    let model = Model::new();
    model.prepare(Precision::Bf16, ends_at(40)).unwrap_err();
    let len = fs::metadata(model.only(".part")).unwrap().len();
    assert!(len > 20_000, "{len}");
    let monitor = Arc::new(LoadMonitor::default());
    let work = Preparation::new(&model.selection(), KIND, Precision::Bf16, Arc::clone(&monitor)).unwrap();
    assert_eq!(work.bytes_there(), len);
    let (to_read, record) = (work.bytes_to_read(), work.run(&AtomicU64::new(0)).unwrap());
    // f32 sources, bf16 in the file.
    let read = monitor.bytes_read();
    assert!(read < to_read - len && read > 0, "{read} of {to_read} bytes were read");
    assert_eq!(fs::metadata(model.only(".safetensors")).unwrap().len(), record.size);
}

#[test]
fn a_file_whose_record_was_not_written_any_more_is_completed() {
    let model = Model::new();
    let record = model.prepare(Precision::Bf16, LoadMonitor::default()).unwrap();
    let file = model.only(".safetensors");
    fs::remove_file(model.only(".json")).unwrap();
    assert!(model.selection().find(KIND).unwrap().prepared.is_none());
    assert_eq!(model.prepare(Precision::Bf16, LoadMonitor::default()).unwrap(), record);
    assert!(model.selection().find(KIND).unwrap().prepared.is_some_and(|found| found.path == file));
}

#[test]
fn what_a_record_says_is_enforced_or_the_file_is_passed_over() {
    let mut model = Model::new();
    model.prepare(Precision::Bf16, LoadMonitor::default()).unwrap();
    let found = model.selection().find(KIND).unwrap();
    assert_eq!((found.note, found.unused.len()), (None, 0));
    found.prepared.unwrap().verify(&LoadMonitor::default()).unwrap();

    // Another length is an error, other bytes are found by reading them.
    let file = model.only(".safetensors");
    let sound = fs::read(&file).unwrap();
    fs::write(&file, &sound[1..]).unwrap();
    let error = model.selection().find(KIND).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelCorrupt);
    assert!(error.to_string().contains(file.to_str().unwrap()), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("handler prepare")));
    let mut flipped = sound.clone();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(&file, flipped).unwrap();
    let prepared = model.selection().find(KIND).unwrap().prepared.unwrap();
    let error = prepared.verify(&LoadMonitor::default()).unwrap_err();
    assert!(error.to_string().contains(&prepared.record.sha256), "{error}");
    fs::write(&file, &sound).unwrap();

    // A record that cannot be read, or that is of something else under this name, is none.
    let record = model.only(".json");
    let text = fs::read_to_string(&record).unwrap();
    for (changed, said) in
        [("{".to_owned(), "cannot be read"), (text.replace("\"key\": \"", "\"key\": \"f"), "else")]
    {
        fs::write(&record, changed).unwrap();
        let found = model.selection().find(KIND).unwrap();
        assert!(found.prepared.is_none());
        assert!(found.note.as_ref().is_some_and(|note| note.contains(said)), "{:?}", found.note);
    }
    fs::write(&record, text).unwrap();

    // The same network from another file is another network.
    let Source::Files(repos) = &mut model.spec.text_encoder.source else { unreachable!() };
    repos[0].files[0].sha256 = Learned::Known("0".repeat(64));
    let found = model.selection().find(KIND).unwrap();
    assert!(found.prepared.is_none() && found.note.is_some_and(|note| note.contains("handler prepare")));
    assert_eq!(model.names().len(), 2, "nothing is deleted");
}

#[test]
fn without_a_hash_a_network_has_an_identity_but_cannot_be_prepared() {
    let mut model = Model::new();
    model.prepare(Precision::Bf16, LoadMonitor::default()).unwrap();
    let Source::Files(repos) = &mut model.spec.text_encoder.source else { unreachable!() };
    repos[0].files[0].sha256 = Learned::Learn;
    let before = key(&model, Precision::Bf16);
    assert_eq!(before, key(&model, Precision::Bf16));
    let file = model.dir.path().join("me/it/text.safetensors");
    assert_eq!(before.unverified(), std::slice::from_ref(&file));
    let found = model.selection().find(KIND).unwrap();
    assert!(found.prepared.is_none());
    assert!(found.note.is_some_and(|note| note.contains("handler prefetch")));
    let error = model.prepare(Precision::Bf16, LoadMonitor::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelNotFound);
    assert!(error.to_string().contains(file.to_str().unwrap()), "{error}");
    // Another length is another file.
    fs::OpenOptions::new().append(true).open(&file).unwrap().set_len(10).unwrap();
    assert_ne!(before, key(&model, Precision::Bf16));
}

#[test]
fn a_row_that_is_not_finite_has_no_scale_and_is_named() {
    let model = Model::new();
    let file = model.dir.path().join("me/it/text.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let name = "blocks.1.attn.q.weight";
    let bad = (tensors[name].clone() * f64::INFINITY).unwrap();
    tensors.insert(name.to_owned(), bad);
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let error = model.prepare(Precision::Fp8, LoadMonitor::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelCorrupt);
    assert!(error.to_string().contains(name) && error.to_string().contains("row 0"), "{error}");
    model.prepare(Precision::Bf16, LoadMonitor::default()).unwrap();
}

/// The tensors of `files` in tests/manifest, in their order.
fn manifest(files: &[&str]) -> LoadPlan {
    let read = |file: &&str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manifest").join(file);
        serde_json::from_slice::<serde_json::Map<_, _>>(&fs::read(path).unwrap()).unwrap()
    };
    let planned = |(name, shape): (String, serde_json::Value)| {
        let shape: Vec<usize> = serde_json::from_value(shape).unwrap();
        PlannedTensor { name, shape: Shape::from(shape), dtype: DType::BF16 }
    };
    let tensors = files.iter().flat_map(read).map(planned).collect();
    LoadPlan { tensors, ..LoadPlan::default() }
}

#[test]
fn the_real_networks_take_what_the_documentation_says() {
    let dit =
        manifest(&["wan2.1_i2v_14b_480p.diffusion_pytorch_model.json", "infinitetalk.safetensors.json"]);
    let text = manifest(&["models_t5_umt5-xxl-enc-bf16.pth.json"]);
    for (kind, plan, precision, gigabytes) in [
        (NetworkKind::Dit, &dit, Precision::Bf16, "37.76"),
        (NetworkKind::Dit, &dit, Precision::Fp8, "18.90"),
        (NetworkKind::TextEncoder, &text, Precision::Bf16, "11.36"),
        (NetworkKind::TextEncoder, &text, Precision::Fp8, "6.73"),
    ] {
        let layout = Layout::new(kind, precision, plan, &"0".repeat(64));
        assert_eq!(format!("{:.2}", layout.size as f64 / 1e9), gigabytes, "{kind:?} {precision:?}");
        assert!(layout.head.len().is_multiple_of(4096));
        if kind == NetworkKind::TextEncoder {
            check_batches(&layout);
        }
    }
}

/// Every byte is in one batch, in order; batches are bounded, and rows are not divided.
fn check_batches(layout: &Layout) {
    let ends: HashSet<u64> =
        layout.entries.iter().filter(|e| e.content != Content::Scales).map(|e| e.offset).collect();
    let mut place = layout.head.len() as u64;
    for batch in layout.batches(place) {
        let mut loaded = 0;
        for slice in &batch.slices {
            let entry = &layout.entries[slice.entry];
            let size = if entry.content == Content::Codes { 1 } else { 2 };
            assert_eq!(place, entry.offset + (slice.elements.start * size) as u64);
            place += (slice.elements.len() * size) as u64;
            if entry.content == Content::Codes {
                assert_eq!(slice.elements.len() % entry.shape[1], 0);
            }
            if entry.content != Content::Scales {
                loaded += slice.elements.len() * 2;
            }
        }
        // At least a row, which at test size is more than a batch.
        assert!(loaded <= layout::BATCH.max(2 * 10_240), "{loaded}");
        assert_eq!(batch.ends_tensor, ends.contains(&place) || place == layout.size);
    }
    assert_eq!(place, layout.size);
}
