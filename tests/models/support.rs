//! The golden folder: what it lists, what a test has read of it, and how far a result may be off.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{LazyLock, Mutex};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde_json::Value;

/// Where the goldens are.
pub fn root() -> PathBuf {
    match std::env::var_os("TALKIE_GOLDENS") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
    }
}

/// `INDEX.json`: file → what it holds.
pub fn index() -> serde_json::Map<String, Value> {
    read_json(&root().join("INDEX.json")).as_object().expect("INDEX.json is an object").clone()
}

fn read_json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// One component's folder. [`Component::finish`] fails when a listed file, or a tensor of one that was opened,
/// was never read.
pub struct Component {
    name: &'static str,
    files: RefCell<BTreeMap<String, GoldenFile>>,
    json: RefCell<BTreeSet<String>>,
}

impl Component {
    pub fn open(name: &'static str) -> Self {
        Self { name, files: Default::default(), json: Default::default() }
    }

    /// The files that the index lists for this component, without the folder.
    pub fn listed(&self) -> Vec<String> {
        let prefix = format!("{}/", self.name);
        index().keys().filter_map(|k| k.strip_prefix(&prefix).map(str::to_owned)).collect()
    }

    /// `config.json` of the component.
    pub fn config(&self) -> Value {
        self.json("config.json")
    }

    pub fn json(&self, file: &str) -> Value {
        self.json.borrow_mut().insert(file.to_owned());
        read_json(&root().join(self.name).join(file))
    }

    pub fn file(&self, file: &str) -> GoldenFile {
        let opened = GoldenFile::open(&format!("{}/{file}", self.name));
        self.files.borrow_mut().entry(file.to_owned()).or_insert(opened).clone()
    }

    /// Fails when something listed was not read.
    pub fn finish(self) {
        let (files, json) = (self.files.into_inner(), self.json.into_inner());
        let prefix = format!("{}/", self.name);
        for file in index().keys().filter_map(|k| k.strip_prefix(&prefix)) {
            assert!(
                files.contains_key(file) || json.contains(file),
                "{prefix}{file} is listed but was not checked"
            );
        }
        for (name, file) in files {
            let used = file.used.borrow();
            let unread: Vec<_> = file.tensors.keys().filter(|k| !used.contains(*k)).collect();
            assert!(unread.is_empty(), "{prefix}{name}: never checked: {unread:?}");
        }
    }
}

/// Dtype, shape and little-endian bytes of a tensor.
type Raw = (safetensors::Dtype, Vec<usize>, Vec<u8>);

/// A safetensors file that remembers which tensors were read.
#[derive(Clone)]
pub struct GoldenFile {
    path: String,
    tensors: Rc<BTreeMap<String, Raw>>,
    metadata: HashMap<String, String>,
    used: Rc<RefCell<BTreeSet<String>>>,
}

impl GoldenFile {
    /// Opens `path` below the golden folder.
    pub fn open(path: &str) -> Self {
        let bytes = std::fs::read(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        let (_, header) =
            safetensors::SafeTensors::read_metadata(&bytes).unwrap_or_else(|e| panic!("{path}: {e}"));
        let views = safetensors::SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{path}: {e}"));
        let tensors = views
            .iter()
            .map(|(name, view)| {
                (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
            })
            .collect();
        Self {
            path: path.to_owned(),
            tensors: Rc::new(tensors),
            metadata: header.metadata().clone().unwrap_or_default(),
            used: Default::default(),
        }
    }

    pub fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The metadata entry `key` parsed as JSON.
    pub fn metadata(&self, key: &str) -> Value {
        let text = self.metadata.get(key).unwrap_or_else(|| panic!("{}: no metadata `{key}`", self.path));
        serde_json::from_str(text).unwrap_or_else(|e| panic!("{}: metadata `{key}`: {e}", self.path))
    }

    /// Dtype, shape and little-endian bytes of `name`.
    pub fn raw(&self, name: &str) -> Raw {
        self.used.borrow_mut().insert(name.to_owned());
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no tensor `{name}`", self.path)).clone()
    }

    /// `name` in its own dtype (i8 becomes i64).
    pub fn get(&self, name: &str) -> Tensor {
        use safetensors::Dtype as S;
        let (dtype, shape, bytes) = self.raw(name);
        let dtype = match dtype {
            S::F32 => DType::F32,
            S::F64 => DType::F64,
            S::BF16 => DType::BF16,
            S::F16 => DType::F16,
            S::U8 => DType::U8,
            S::I64 => DType::I64,
            S::F8_E4M3 => DType::F8E4M3,
            S::I8 => {
                let values: Vec<i64> = bytes.iter().map(|&b| i64::from(b as i8)).collect();
                return Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
            }
            other => panic!("{}: `{name}` is {other:?}", self.path),
        };
        Tensor::from_raw_buffer(&bytes, dtype, &shape, &Device::Cpu).unwrap()
    }

    /// `name` as f32.
    pub fn f32(&self, name: &str) -> Tensor {
        self.get(name).to_dtype(DType::F32).unwrap()
    }

    pub fn vec_f32(&self, name: &str) -> Vec<f32> {
        self.f32(name).flatten_all().unwrap().to_vec1().unwrap()
    }

    /// All tensors as a `VarBuilder` of `dtype`, marked as read: what a network asks for is checked elsewhere.
    pub fn var_builder(&self, dtype: DType) -> VarBuilder<'static> {
        let tensors = self.names().into_iter().map(|name| (name.clone(), self.get(&name))).collect();
        VarBuilder::from_tensors(tensors, dtype, &Device::Cpu)
    }
}

/// Largest |actual − expected| relative to the largest |expected|.
pub fn relative_error(actual: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(actual.dims(), expected.dims(), "shapes differ");
    let values =
        |x: &Tensor| x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (actual, expected) = (values(actual), values(expected));
    let largest = expected.iter().fold(0f64, |m, v| m.max(v.abs()));
    let diff = actual.iter().zip(&expected).fold(0f64, |m, (a, b)| {
        let d = (a - b).abs();
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    });
    diff / (largest + 1e-12)
}

/// Fails unless `actual` is within `tolerance` of `expected` (relative to its largest value); the largest error
/// of each `network` and `dtype` goes into the parity report.
pub fn check(network: &str, dtype: &str, name: &str, actual: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(actual.dims(), expected.dims(), "{network} {name}: shapes differ");
    let error = relative_error(actual, expected);
    report(network, dtype, name, error, tolerance);
    assert!(
        error <= tolerance,
        "{network} {name}: error {error:.2e} relative to max, tolerance {tolerance:.0e}"
    );
}

struct Row {
    error: f64,
    name: String,
    comparisons: usize,
}

/// Network, dtype and tolerance of a row.
type RowKey = (String, String, String);

/// The report's rows so far.
static REPORT: LazyLock<Mutex<BTreeMap<RowKey, Row>>> = LazyLock::new(Default::default);

/// Notes one comparison; with `TALKIE_PARITY_REPORT` set, rewrites the Markdown table in that file.
fn report(network: &str, dtype: &str, name: &str, error: f64, tolerance: f64) {
    let mut rows = REPORT.lock().unwrap_or_else(|e| e.into_inner());
    let key = (network.to_owned(), dtype.to_owned(), format!("{tolerance:.0e}"));
    let row = rows.entry(key).or_insert(Row { error: 0.0, name: name.to_owned(), comparisons: 0 });
    row.comparisons += 1;
    if error > row.error {
        (row.error, row.name) = (error, name.to_owned());
    }
    let Some(path) = std::env::var_os("TALKIE_PARITY_REPORT") else { return };
    let mut text = String::from(
        "# Parity with the reference implementation\n\n\
         Largest error of each network against the reference's own tensors, relative to the largest value of the\n\
         tensor compared. Made by `scripts/parity-report.sh`.\n\n\
         | network | dtype | comparisons | largest error | at | tolerance |\n|---|---|---|---|---|---|\n",
    );
    for ((network, dtype, tolerance), row) in rows.iter() {
        let Row { error, name, comparisons } = row;
        text += &format!("| {network} | {dtype} | {comparisons} | {error:.1e} | `{name}` | {tolerance} |\n");
    }
    std::fs::write(&path, text).unwrap_or_else(|e| panic!("{}: {e}", Path::new(&path).display()));
}
