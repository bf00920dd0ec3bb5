//! Parity: LoRA merges.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use talkie::ErrorKind;
use talkie::weights::{Lora, Weights, merge_reference};

use crate::support::{Component, GoldenFile, check, relative_error, root};

const TOLERANCE: f64 = 1e-4;

/// Two steps of bf16 at the largest value: the reference rounds the product, its multiple and the sum, each of which
/// can end half a step from ours.
const TOLERANCE_BF16: f64 = 1.0 / 64.0;

const NONE: [&str; 0] = [];

type Tensors = HashMap<String, Tensor>;

/// All tensors of `file` as `dtype`.
fn tensors(file: &GoldenFile, dtype: DType) -> Tensors {
    file.names().into_iter().map(|name| (name.clone(), file.get(&name).to_dtype(dtype).unwrap())).collect()
}

/// The LoRA's file: the one that is not the result of a merge.
fn lora_file(goldens: &Component, config: &Value) -> String {
    let is_lora = |file: &String| file.ends_with(".safetensors") && config["files"].get(file).is_none();
    let files: Vec<_> = goldens.listed().into_iter().filter(is_lora).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

fn base(config: &Value) -> GoldenFile {
    GoldenFile::open(config["base"].as_str().expect("`base` is a path"))
}

#[test]
fn every_golden() {
    let goldens = Component::open("lora");
    let config = goldens.config();
    let base = base(&config);
    let lora = tensors(&goldens.file(&lora_file(&goldens, &config)), DType::F32);
    for (module, rank) in config["ranks"].as_object().expect("`ranks` is an object") {
        let down = &lora[&format!("{module}.lora_down.weight")];
        assert_eq!(rank.as_u64(), Some(down.dims()[0] as u64), "{module}");
    }
    for (name, settings) in config["files"].as_object().expect("`files` is an object") {
        let file = goldens.file(name);
        let scale = settings["scale"].as_f64().expect("`scale` is a number");
        assert_eq!(file.metadata("scale").as_f64(), Some(scale));
        let (dtype, tolerance) = match settings["dtype"].as_str().expect("`dtype` is a string") {
            "float32" => (DType::F32, TOLERANCE),
            "bfloat16" => (DType::BF16, TOLERANCE_BF16),
            other => panic!("{name}: dtype {other}"),
        };
        let merged = merge_reference(&tensors(&base, dtype), &lora, scale).unwrap();
        let changed: BTreeSet<_> = merged.keys().cloned().collect();
        assert_eq!(changed, file.names().into_iter().collect(), "{name}: the changed tensors");
        for (target, tensor) in &merged {
            assert_eq!(tensor.dtype(), dtype);
            let label = format!("{name} {target}");
            check("lora", dtype.as_str(), &label, tensor, &file.get(target), tolerance);
        }
        // Negative control: the same with another scale is not the same.
        let other = merge_reference(&tensors(&base, dtype), &lora, scale * 1.5).unwrap();
        assert!(
            other.iter().any(|(target, tensor)| relative_error(tensor, &file.get(target)) > tolerance),
            "{name}"
        );
    }
    facts(&goldens.json("facts.json"), &tensors(&base, DType::F32), &lora);
    goldens.finish();
}

/// What the reference says of itself in words.
fn facts(facts: &Value, base: &Tensors, lora: &Tensors) {
    assert_eq!(facts["delta"], "scale * (up @ down); no alpha/rank factor");
    let expected = [
        "*.alpha",
        "*.diff_m",
        "lora_A/lora_B",
        "keys without diffusion_model. prefix",
        "lora_down without lora_up",
    ];
    assert_eq!(facts["ignored"], serde_json::json!(expected));
    // A merge of the ignored keys alone changes nothing.
    let ignored: Tensors =
        lora.iter().filter(|(key, _)| is_ignored(key, lora)).map(|(k, t)| (k.clone(), t.clone())).collect();
    assert!(!ignored.is_empty() && merge_reference(base, &ignored, 1.0).unwrap().is_empty());
    assert!(facts["unknown_target_module"].is_string());
    let unknown = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
    let unknown = HashMap::from([("diffusion_model.blocks.999.self_attn.q.diff_b".to_owned(), unknown)]);
    let error = merge_reference(base, &unknown, 1.0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelCorrupt);
    assert!(error.to_string().contains("blocks.999.self_attn.q.bias"), "{error}");
}

/// The keys of the LoRA's file that the reference passes over.
pub fn ignored_keys() -> Vec<String> {
    let goldens = Component::open("lora");
    let lora = tensors(&goldens.file(&lora_file(&goldens, &goldens.config())), DType::F32);
    lora.keys().filter(|key| is_ignored(key, &lora)).cloned().collect()
}

/// Whether the reference passes over `key`.
fn is_ignored(key: &str, lora: &Tensors) -> bool {
    let lacks_other =
        |this: &str, other: &str| key.contains(this) && !lora.contains_key(&key.replace(this, other));
    !key.starts_with("diffusion_model.")
        || [".alpha", ".diff_m", ".lora_A.weight", ".lora_B.weight"].iter().any(|end| key.ends_with(end))
        || lacks_other(".lora_down.", ".lora_up.")
        || lacks_other(".lora_up.", ".lora_down.")
}

/// Whether `key` is none of what the product can merge.
fn is_stray(key: &str, lora: &Tensors) -> bool {
    key.ends_with(".diff_m")
        || [("down.", "up."), ("up.", "down.")].iter().any(|(this, other)| {
            let this = format!(".lora_{this}");
            key.contains(&this) && !lora.contains_key(&key.replace(&this, &format!(".lora_{other}")))
        })
}

#[test]
fn the_product_rejects_the_file_and_names_its_strays() {
    let goldens = Component::open("lora");
    let config = goldens.config();
    let file = lora_file(&goldens, &config);
    let lora = tensors(&goldens.file(&file), DType::F32);
    let strays: Vec<_> = lora.keys().filter(|key| is_stray(key, &lora)).collect();
    assert!(!strays.is_empty());
    let weights = Weights::open(&[root().join(config["base"].as_str().unwrap())]).unwrap();
    let parsed = Lora::open(root().join("lora").join(&file), &NONE).unwrap();
    let error = weights.with_lora(parsed, 1.0).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelCorrupt);
    let message = error.to_string();
    assert!(message.contains(&file) && message.contains(&format!("{} keys", strays.len())), "{message}");
    for stray in strays {
        assert!(message.contains(stray.as_str()), "{message}: {stray} is not named");
    }
}

#[test]
fn the_product_merges_what_both_know_as_the_reference_does() {
    let goldens = Component::open("lora");
    let config = goldens.config();
    let file = lora_file(&goldens, &config);
    let lora = tensors(&goldens.file(&file), DType::F32);
    let ignored: Vec<_> = lora.keys().filter(|key| is_ignored(key, &lora)).collect();
    let base_path = root().join(config["base"].as_str().unwrap());
    for (name, settings) in config["files"].as_object().unwrap() {
        let (dtype, tolerance) = match settings["dtype"].as_str().unwrap() {
            "float32" => (DType::F32, TOLERANCE),
            _ => (DType::BF16, TOLERANCE_BF16),
        };
        let parsed = Lora::open(root().join("lora").join(&file), &ignored).unwrap();
        let targets: BTreeSet<_> = parsed.targets().into_iter().collect();
        let weights = Weights::open(&[&base_path]).unwrap();
        let weights = weights.with_lora(parsed, settings["scale"].as_f64().unwrap()).unwrap();
        let merged = goldens.file(name);
        assert_eq!(targets, merged.names().into_iter().collect());
        let base: BTreeMap<_, _> = tensors(&base(&config), dtype).into_iter().collect();
        let vb = weights.var_builder(dtype, &Device::Cpu);
        for (target, before) in &base {
            let tensor = vb.get(before.dims(), target).unwrap();
            if targets.contains(target) {
                let label = format!("{name} {target} (product)");
                check("lora", dtype.as_str(), &label, &tensor, &merged.get(target), tolerance);
            } else {
                assert_eq!(relative_error(&tensor, before), 0.0, "{target} changed");
            }
        }
        weights.finish(&NONE).unwrap();
    }
}
