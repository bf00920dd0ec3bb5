//! Parity: UMT5.

use std::collections::HashMap;

use candle_core::{DType, Device, IndexOp, Tensor};
use candle_nn::VarBuilder;
use talkie::models::umt5::{Config, Model, relative_bucket};
use talkie::nn::trace;
use talkie::text_cleaning::clean;

use crate::support::{Component, GoldenFile, check, relative_error};

const TOLERANCE: f64 = 1e-4;

/// How far a prompt encoded alone may be from the same prompt encoded with padding: rounding only.
const EQUIVALENCE_TOLERANCE: f64 = 1e-5;

fn config(component: &Component) -> Config {
    let mut config = component.config();
    let mut model = config["model"].take();
    for (key, value) in config["files"]["io.safetensors"].as_object().expect("parameters of io.safetensors") {
        if model.get(key).is_none() {
            model[key] = value.clone();
        }
    }
    serde_json::from_value(model).expect("`model` is a UMT5 config")
}

/// The batches of prompts: everything before `.ids`.
fn batches(io: &GoldenFile) -> Vec<String> {
    io.names().iter().filter_map(|name| name.strip_suffix(".ids")).map(str::to_owned).collect()
}

fn ids_and_mask(io: &GoldenFile, batch: &str) -> (Tensor, Tensor) {
    let get = |name: &str| io.get(&format!("{batch}.{name}")).to_dtype(DType::U32).unwrap();
    (get("ids"), get("mask"))
}

#[test]
fn every_intermediate_tensor_equals_the_reference() {
    let component = Component::open("umt5");
    let io = component.file("io.safetensors");
    let model =
        Model::new(&config(&component), component.file("weights.safetensors").var_builder(DType::F32))
            .unwrap();
    assert!(!batches(&io).is_empty(), "no batches");
    for batch in batches(&io) {
        check_batch(&model, &io, &batch);
    }
    check_buckets(&io);
    check_cleaning(&component);
    component.finish();
}

fn check_batch(model: &Model, io: &GoldenFile, batch: &str) {
    let (ids, mask) = ids_and_mask(io, batch);
    let lens: Vec<i64> = io.get(&format!("{batch}.lens")).to_vec1().unwrap();
    let (hidden, mut traced) = trace::capture(|| model.forward(&ids, &mask).unwrap());
    for (i, &len) in lens.iter().enumerate() {
        let len = len as usize;
        let context = hidden.i((i, ..len)).unwrap();
        let alone = model.encode(&ids.i((i, ..len)).unwrap().to_vec1::<u32>().unwrap()).unwrap();
        let error = relative_error(&alone, &context);
        assert!(error < EQUIVALENCE_TOLERANCE, "{batch} {i}: unpadded and padded differ by {error:.2e}");
        traced.insert(format!("context_{i}"), context);
    }
    traced.insert("hidden".to_owned(), hidden);
    let prefix = format!("{batch}.");
    for name in io.names().iter().filter_map(|name| name.strip_prefix(&prefix)) {
        if !matches!(name, "ids" | "mask" | "lens") {
            let actual =
                traced.get(name).unwrap_or_else(|| panic!("{batch}.{name}: the network has no such tensor"));
            let name = format!("{batch}.{name}");
            check("umt5", "f32", &name, actual, &io.f32(&name), TOLERANCE);
        }
    }
}

/// Tensors like `relative.bucket_bidirectional_32_128` hold the buckets of `relative.position`.
fn check_buckets(io: &GoldenFile) {
    for name in io.names() {
        let Some((group, parameters)) = name.split_once(".bucket_bidirectional_") else { continue };
        let (num_buckets, max_dist) = parameters.split_once('_').unwrap_or_else(|| panic!("{name}"));
        let (num_buckets, max_dist) = (num_buckets.parse().unwrap(), max_dist.parse().unwrap());
        let positions: Vec<i64> = io.get(&format!("{group}.position")).to_vec1().unwrap();
        let expected: Vec<i64> = io.get(&name).to_vec1().unwrap();
        for (position, bucket) in positions.into_iter().zip(expected) {
            assert_eq!(relative_bucket(position, num_buckets, max_dist) as i64, bucket, "{name}: {position}");
        }
    }
}

fn check_cleaning(component: &Component) {
    for case in component.json("text_cleaning.json").as_array().expect("a list of cases") {
        let (text, expected) = (case["in"].as_str().expect("in"), case["out"].as_str().expect("out"));
        assert_eq!(clean(text), expected, "{text:?}");
    }
}

#[test]
fn a_perturbed_weight_or_mask_entry_shows() {
    let component = Component::open("umt5");
    let cfg = config(&component);
    let io = component.file("io.safetensors");
    let weights = component.file("weights.safetensors");
    let batch = &batches(&io)[0];
    let (ids, mask) = ids_and_mask(&io, batch);
    let len = io.get(&format!("{batch}.lens")).to_vec1::<i64>().unwrap()[0] as usize;
    let expected = io.f32(&format!("{batch}.context_0"));
    let context = |model: &Model, mask: &Tensor| model.forward(&ids, mask).unwrap().i((0, ..len)).unwrap();

    for name in ["blocks.0.ffn.gate.0.weight", "blocks.0.pos_embedding.embedding.weight", "norm.weight"] {
        let mut tensors: HashMap<_, _> =
            weights.names().into_iter().map(|n| (n.clone(), weights.get(&n))).collect();
        let weight = tensors.get_mut(name).unwrap();
        let index = Tensor::arange(0f32, weight.elem_count() as f32, &Device::Cpu).unwrap();
        *weight =
            (&*weight + (index.sin().unwrap() * 0.05).unwrap().reshape(weight.shape()).unwrap()).unwrap();
        let model = Model::new(&cfg, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)).unwrap();
        let error = relative_error(&context(&model, &mask), &expected);
        assert!(error > TOLERANCE, "{name}: error {error:.2e} after a change");
    }

    let model = Model::new(&cfg, weights.var_builder(DType::F32)).unwrap();
    let mut entries = mask.to_vec2::<u32>().unwrap();
    entries[0][len / 2] = 0;
    let error = relative_error(&context(&model, &Tensor::new(entries, &Device::Cpu).unwrap()), &expected);
    assert!(error > TOLERANCE, "one masked token: error {error:.2e}");
}
