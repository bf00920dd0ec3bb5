//! Parity: CLIP's visual tower.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use talkie::models::clip_vision::{Config, Model};
use talkie::nn::trace;

use crate::support::{Component, GoldenFile, check, relative_error};

const TOLERANCE: f64 = 1e-4;

fn config(component: &Component) -> Config {
    let mut config = component.config();
    let mut model = config["model"].take();
    let eps = config["files"]["io.safetensors"]["eps"].take();
    if eps.is_number() {
        model["eps"] = eps;
    }
    serde_json::from_value(model).expect("`model` is a CLIP config")
}

/// The frames: everything before `.video`.
fn frames(io: &GoldenFile) -> Vec<String> {
    io.names().iter().filter_map(|name| name.strip_suffix(".video")).map(str::to_owned).collect()
}

/// The reference's (1, 3, 1, H, W) without the batch.
fn frame(io: &GoldenFile, case: &str) -> Tensor {
    io.f32(&format!("{case}.video")).squeeze(0).unwrap()
}

#[test]
fn every_intermediate_tensor_equals_the_reference() {
    let component = Component::open("clip");
    let cfg = config(&component);
    let io = component.file("io.safetensors");
    let weights = component.file("weights.safetensors");
    let model = Model::new(&cfg, weights.var_builder(DType::F32)).unwrap();
    // With the block that the product leaves out.
    let whole = Model::with_num_blocks(&cfg, cfg.vision_layers, weights.var_builder(DType::F32)).unwrap();
    assert!(!frames(&io).is_empty(), "no frames");
    for case in frames(&io) {
        let pixel_values = model.preprocess(&frame(&io, &case)).unwrap();
        let (all_blocks, mut traced) = trace::capture(|| whole.forward(&pixel_values).unwrap());
        traced.insert("all_blocks".to_owned(), all_blocks);
        traced.insert("out".to_owned(), model.forward(&pixel_values).unwrap());
        traced.insert("pixel_values".to_owned(), pixel_values);
        let prefix = format!("{case}.");
        for name in
            io.names().iter().filter_map(|name| name.strip_prefix(&prefix)).filter(|name| *name != "video")
        {
            let actual =
                traced.get(name).unwrap_or_else(|| panic!("{case}.{name}: the network has no such tensor"));
            let name = format!("{case}.{name}");
            check("clip", "f32", &name, actual, &io.f32(&name), TOLERANCE);
        }
    }
    component.finish();
}

#[test]
fn a_perturbed_weight_shows() {
    let component = Component::open("clip");
    let cfg = config(&component);
    let io = component.file("io.safetensors");
    let weights = component.file("weights.safetensors");
    let case = &frames(&io)[0];
    let expected = io.f32(&format!("{case}.out"));
    let perturbed_names = ["cls_embedding", "patch_embedding.weight", "transformer.0.attn.proj.weight"];
    for name in perturbed_names.map(|name| format!("visual.{name}")) {
        let mut tensors: HashMap<_, _> =
            weights.names().into_iter().map(|n| (n.clone(), weights.get(&n))).collect();
        let weight = tensors.get_mut(&name).unwrap();
        let index = Tensor::arange(0f32, weight.elem_count() as f32, &Device::Cpu).unwrap();
        *weight =
            (&*weight + (index.sin().unwrap() * 0.05).unwrap().reshape(weight.shape()).unwrap()).unwrap();
        let model = Model::new(&cfg, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)).unwrap();
        let pixel_values = model.preprocess(&frame(&io, case)).unwrap();
        let error = relative_error(&model.forward(&pixel_values).unwrap(), &expected);
        assert!(error > TOLERANCE, "{name}: error {error:.2e} after a change");
    }
}
