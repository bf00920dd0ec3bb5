//! Archives of `torch.save`: dtypes, layouts, names, byte order; and the goldens' networks from them.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use half::{bf16, f16};
use talkie::ErrorKind;
use talkie::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use talkie::weights::{Lora, Weights};
use tempfile::NamedTempFile;

use super::archive::{self, Item, Storage, View};
use crate::support::root;

const NONE: [&str; 0] = [];

/// Small numbers that every dtype has exactly.
fn number(i: usize) -> f32 {
    (i % 13) as f32 - if i.is_multiple_of(2) { 0.0 } else { 4.0 }
}

/// A storage of the first `len` of them.
fn storage(class: &'static str, len: usize, is_big_endian: bool) -> Storage<'static> {
    let encode = |v: f32| match class {
        "DoubleStorage" => f64::from(v).to_le_bytes().to_vec(),
        "FloatStorage" => v.to_le_bytes().to_vec(),
        "HalfStorage" => f16::from_f32(v).to_le_bytes().to_vec(),
        "BFloat16Storage" => bf16::from_f32(v).to_le_bytes().to_vec(),
        "CharStorage" => vec![v as i8 as u8],
        "ByteStorage" => vec![v.abs() as u8],
        "float8_e4m3fn" => vec![float8::F8E4M3::from_f32(v).to_bits()],
        "float8_e5m2" => vec![(f16::from_f32(v).to_bits() >> 8) as u8],
        "LongStorage" => (v as i64).to_le_bytes().to_vec(),
        "BoolStorage" => vec![u8::from(v > 0.0)],
        other => panic!("{other}"),
    };
    let bytes = (0..len).flat_map(|i| {
        let mut bytes = encode(number(i));
        if is_big_endian {
            bytes.reverse();
        }
        bytes
    });
    let bytes: Vec<u8> = bytes.collect();
    let len = if class.ends_with("Storage") { len } else { bytes.len() };
    Storage::of(class, len, bytes)
}

fn save(root: Item, storages: &[Storage], byteorder: Option<&str>) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let pickle = archive::pickle(&root, storages);
    archive::write(file.as_file(), &pickle, storages, byteorder).unwrap();
    file
}

fn dict(items: Vec<(&str, Item)>) -> Item {
    Item::Dict(items.into_iter().map(|(key, item)| (key.to_owned(), item)).collect())
}

fn whole(storage: usize, shape: &[usize]) -> Item {
    Item::Tensor(View::whole(storage, shape))
}

fn read(weights: &Weights, name: &str, dtype: DType) -> Vec<f32> {
    let tensor = weights.var_builder(dtype, &Device::Cpu).get_unchecked(name).unwrap();
    assert_eq!(tensor.dtype(), dtype);
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_dtype_is_read_in_either_byte_order() {
    let len = 1000;
    for class in [
        "DoubleStorage",
        "FloatStorage",
        "HalfStorage",
        "BFloat16Storage",
        "CharStorage",
        "ByteStorage",
        "float8_e4m3fn",
        "float8_e5m2",
    ] {
        for byteorder in [None, Some("little"), Some("big")] {
            let storages = [storage(class, len, byteorder == Some("big"))];
            let file = save(dict(vec![("x", whole(0, &[10, 100]))]), &storages, byteorder);
            let weights = Weights::open(&[file.path()]).unwrap();
            let sign = |v: f32| if class == "ByteStorage" { v.abs() } else { v };
            // The codes of fp8 are those of exact numbers up to three bits long.
            let round = |v: f32| {
                if class == "float8_e5m2" {
                    f16::from_bits(f16::from_f32(v).to_bits() & 0xff00).to_f32()
                } else {
                    v
                }
            };
            let expected: Vec<_> = (0..len).map(|i| round(sign(number(i)))).collect();
            for asked in [DType::F32, DType::BF16, DType::F16] {
                assert!(read(&weights, "x", asked) == expected, "{class} as {asked:?}, {byteorder:?}");
            }
        }
    }
}

#[test]
fn views_of_one_storage_are_read_whatever_their_strides() {
    let view = |offset, shape: &[usize], strides: &[usize]| {
        let (shape, strides) = (shape.to_vec(), strides.to_vec());
        Item::Tensor(View { storage: 0, offset, shape, strides })
    };
    for class in ["FloatStorage", "BFloat16Storage"] {
        let views = vec![
            ("whole", whole(0, &[6, 10])),
            ("again", whole(0, &[60])),
            ("part", view(7, &[2, 10], &[10, 1])),
            ("transposed", view(0, &[10, 6], &[1, 10])),
            ("every_third", view(2, &[19], &[3])),
            ("permuted", view(0, &[5, 2, 6], &[2, 1, 10])),
            ("one_column", view(3, &[6, 1], &[10, 77])),
            ("empty", view(60, &[0, 3], &[3, 1])),
            ("scalar", view(59, &[], &[])),
        ];
        let file = save(dict(views), &[storage(class, 60, false)], Some("little"));
        let weights = Weights::open(&[file.path()]).unwrap();
        let base = Tensor::from_vec((0..60).map(number).collect(), (6, 10), &Device::Cpu).unwrap();
        let flat = |tensor: Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let permuted = base.reshape((6, 5, 2)).unwrap().permute((1, 2, 0)).unwrap();
        let expected = [
            ("whole", flat(base.clone())),
            ("again", flat(base.clone())),
            ("part", (7..27).map(number).collect()),
            ("transposed", flat(base.t().unwrap())),
            ("every_third", (0..19).map(|i| number(2 + 3 * i)).collect()),
            ("permuted", flat(permuted)),
            ("one_column", (0..6).map(|i| number(3 + 10 * i)).collect()),
            ("empty", vec![]),
            ("scalar", vec![number(59)]),
        ];
        for (name, expected) in &expected {
            for dtype in [DType::F32, DType::BF16] {
                assert_eq!(&read(&weights, name, dtype), expected, "{class} {name}");
            }
        }
        // Read ahead, all at once.
        let build = |vb: VarBuilder<'static>| {
            expected.iter().map(|(name, _)| vb.get_unchecked(name)).collect::<candle_core::Result<Vec<_>>>()
        };
        let tensors = weights.load(DType::F32, &Device::Cpu, &NONE, build).unwrap();
        for ((name, expected), tensor) in expected.iter().zip(tensors) {
            assert_eq!(&flat(tensor), expected, "{class} {name}");
        }
    }
}

#[test]
fn names_are_those_that_users_of_torch_expect() {
    let names = |root: Item| {
        let file = save(root, &[storage("FloatStorage", 4, false)], None);
        Weights::open(&[file.path()]).unwrap().names()
    };
    let x = || whole(0, &[4]);
    let notes = || vec![("step", Item::Int(3)), ("note", Item::Text("x".into())), ("nothing", Item::Nothing)];
    let with = |mut items: Vec<(&'static str, Item)>| {
        items.extend(notes());
        dict(items)
    };
    assert_eq!(names(with(vec![("b", x()), ("a.w", x())])), ["a.w", "b"]);
    assert_eq!(
        names(with(vec![("a", dict(vec![("w", x()), ("c", dict(vec![("b", x())]))]))])),
        ["a.c.b", "a.w"]
    );
    assert_eq!(names(dict(vec![("a", Item::List(vec![x(), Item::Int(1), x()]))])), ["a.0", "a.2"]);
    for wrapper in ["state_dict", "model", "module"] {
        assert_eq!(names(with(vec![(wrapper, dict(vec![("a.w", x())]))])), ["a.w"], "{wrapper}");
    }
    let twice = dict(vec![("model", dict(vec![("module", dict(vec![("w", x())]))]))]);
    assert_eq!(names(twice), ["w"]);
    // What lies beside it keeps its names, so that nothing is passed over in silence.
    let optimizer = dict(vec![("state", dict(vec![("exp_avg", x())]))]);
    let training = with(vec![("state_dict", dict(vec![("w", x())])), ("optimizer", optimizer)]);
    assert_eq!(names(training), ["optimizer.state.exp_avg", "w"]);
    // With tensors beside it, or another one, it is a name like others.
    assert_eq!(names(dict(vec![("model", dict(vec![("w", x())])), ("b", x())])), ["b", "model.w"]);
    let two = dict(vec![("model", dict(vec![("w", x())])), ("module", dict(vec![("w", x())]))]);
    assert_eq!(names(two), ["model.w", "module.w"]);
}

#[test]
fn tensors_of_other_dtypes_are_listed_and_may_stay_unused() {
    let storages = [
        storage("FloatStorage", 4, false),
        storage("LongStorage", 2, false),
        storage("BoolStorage", 3, false),
    ];
    let items = vec![("w", whole(0, &[4])), ("ids", whole(1, &[2])), ("mask", whole(2, &[3]))];
    let file = save(dict(items), &storages, Some("little"));
    let weights = Weights::open(&[file.path()]).unwrap();
    assert_eq!(weights.names(), ["ids", "mask", "w"]);
    weights.load(DType::F32, &Device::Cpu, &["ids", "mask"], |vb| vb.get(4, "w")).unwrap();
    let error = weights.load(DType::F32, &Device::Cpu, &["w", "mask"], |vb| vb.get(2, "ids")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelCorrupt);
    assert!(error.to_string().contains("tensor `ids` is I64, which no network here uses"), "{error}");
}

/// `file` of the goldens as an archive of torch.
fn as_archive(file: &Path) -> NamedTempFile {
    let bytes = std::fs::read(file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (mut items, mut storages) = (Vec::new(), Vec::new());
    for (name, view) in tensors.iter() {
        let class = match view.dtype() {
            safetensors::Dtype::F32 => "FloatStorage",
            safetensors::Dtype::BF16 => "BFloat16Storage",
            safetensors::Dtype::I8 => "CharStorage",
            safetensors::Dtype::F8_E4M3 => "float8_e4m3fn",
            other => panic!("{name}: {other:?}"),
        };
        items.push((name.to_owned(), whole(storages.len(), view.shape())));
        let len = view.shape().iter().product();
        storages.push(Storage::of(class, len, view.data().to_vec()));
    }
    save(Item::Dict(items), &storages, Some("little"))
}

/// All tensors of `weights`, read ahead in one go, by name.
fn all(weights: &Weights, dtype: DType) -> HashMap<String, Vec<u32>> {
    let names = weights.names();
    let build = |vb: VarBuilder<'static>| {
        names.iter().map(|name| vb.get_unchecked(name)).collect::<candle_core::Result<Vec<_>>>()
    };
    let tensors = weights.load(dtype, &Device::Cpu, &NONE, build).unwrap();
    let bits = |tensor: Tensor| {
        let values = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    names.iter().cloned().zip(tensors.into_iter().map(bits)).collect()
}

#[test]
fn the_goldens_weights_are_the_same_in_both_formats() {
    let mut checked = 0;
    for file in crate::support::index().keys().filter(|file| file.contains("/weights")) {
        let path = root().join(file);
        let archive = as_archive(&path);
        for dtype in [DType::F32, DType::BF16] {
            let read = |path: &Path| all(&Weights::open(&[path]).unwrap(), dtype);
            assert!(read(&path) == read(archive.path()), "{file} as {dtype:?}");
        }
        checked += 1;
    }
    assert!(checked >= 5);
}

#[test]
fn a_network_computes_the_same_from_either_format() {
    let config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(root().join("umt5/config.json")).unwrap()).unwrap();
    let mut model = config["model"].clone();
    for (key, value) in config["files"]["io.safetensors"].as_object().unwrap() {
        if model.get(key).is_none() {
            model[key] = value.clone();
        }
    }
    let config: umt5::Config = serde_json::from_value(model).unwrap();
    let file = root().join("umt5/weights.safetensors");
    let archive = as_archive(&file);
    let run = |path: &Path| {
        let weights = Weights::open(&[path]).unwrap();
        let model =
            weights.load(DType::F32, &Device::Cpu, &NONE, |vb| umt5::Model::new(&config, vb)).unwrap();
        let ids = Tensor::new(&[[1u32, 7, 30, 5]], &Device::Cpu).unwrap();
        let out = model.forward(&ids, &ids.ones_like().unwrap()).unwrap();
        out.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let (expected, actual) = (run(&file), run(archive.path()));
    assert!(expected == actual && expected.iter().any(|v| *v != 0.0));
}

#[test]
fn quantised_weights_and_loras_are_the_same_in_both_formats() {
    for file in ["quant/int8_state_dict_bf16.safetensors", "quant/fp8_state_dict_bf16.safetensors"] {
        let file = root().join(file);
        let archive = as_archive(&file);
        for dtype in [DType::F32, DType::BF16] {
            let read = |path: &Path| all(&Weights::open(&[path]).unwrap(), dtype);
            assert!(read(&file) == read(archive.path()), "{} as {dtype:?}", file.display());
        }
    }
    let (base, lora) = (root().join("dit/weights.safetensors"), root().join("lora/lora.safetensors"));
    let archive = as_archive(&lora);
    let ignored = crate::lora::ignored_keys();
    let merged = |lora: &Path| {
        let lora = Lora::open(lora, &ignored).unwrap();
        all(&Weights::open(&[&base]).unwrap().with_lora(lora, 0.7).unwrap(), DType::F32)
    };
    let expected = merged(&lora);
    assert!(expected == merged(archive.path()));
    assert!(expected != all(&Weights::open(&[&base]).unwrap(), DType::F32));
}

/// Every network can be built from what a plan gives it, which is no memory.
#[test]
fn every_network_is_planned_without_memory() {
    let weights = Weights::random(1);
    let device = Device::Cpu;
    let mut bytes = 0;
    let mut count = |plan: talkie::Result<talkie::weights::LoadPlan>| {
        let plan = plan.unwrap();
        assert_eq!(plan.bytes_to_read, 0);
        bytes += plan.bytes_resident;
    };
    let dtype = DType::BF16;
    count(weights.plan(dtype, &device, &NONE, |vb| wan::Model::new(&wan::Config::infinitetalk_14b(), vb)));
    count(weights.plan(dtype, &device, &NONE, |vb| umt5::Model::new(&umt5::Config::umt5_xxl(), vb)));
    count(weights.plan(dtype, &device, &NONE, |vb| wan_vae::Vae::new(&wan_vae::Config::wan2_1(), vb)));
    let clip = clip_vision::Config::vit_h_14();
    count(weights.plan(DType::F16, &device, &NONE, |vb| clip_vision::Model::new(&clip, vb)));
    let audio = wav2vec2::Config::chinese_base();
    count(weights.plan(dtype, &device, &NONE, |vb| wav2vec2::Model::new(&audio, vb)));
    // Parameters of the manifests' summary, wav2vec2 in f32 whatever is asked for.
    let halves: u64 = 16_394_878_784 + 2_487_168_000 + 5_680_910_336 + 126_892_531 + 611_086_080;
    assert_eq!(bytes, 2 * halves + 4 * 94_370_944);
}
