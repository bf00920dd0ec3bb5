//! Parity: wav2vec 2.0.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use talkie::models::wav2vec2::{Config, Model, interpolate};
use talkie::nn::trace;

use crate::support::{Component, GoldenFile, check, relative_error};

const TOLERANCE: f64 = 1e-4;

fn config(component: &Component) -> Config {
    serde_json::from_value(component.config()).expect("config.json is a wav2vec2 config")
}

/// The names of the clips: everything before `.wav`.
fn clips(io: &GoldenFile) -> Vec<String> {
    io.names().iter().filter_map(|name| name.strip_suffix(".wav")).map(str::to_owned).collect()
}

fn weight_files(component: &Component) -> Vec<String> {
    component.listed().into_iter().filter(|file| file.starts_with("weights")).collect()
}

#[test]
fn every_intermediate_tensor_equals_the_reference_in_both_spellings_of_the_weights() {
    let component = Component::open("wav2vec2");
    let cfg = config(&component);
    let io = component.file("io.safetensors");
    assert!(!clips(&io).is_empty(), "no clips");
    for weights in weight_files(&component) {
        let model = Model::new(&cfg, component.file(&weights).var_builder(DType::F32)).unwrap();
        for clip in clips(&io) {
            check_clip(&model, &io, &clip);
        }
    }
    check_interpolation(&io);
    component.finish();
}

fn check_clip(model: &Model, io: &GoldenFile, clip: &str) {
    let golden = |name: &str| io.f32(&format!("{clip}.{name}"));
    let compare = |name: &str, actual: &Tensor| {
        check("wav2vec2", "f32", &format!("{clip}.{name}"), actual, &golden(name), TOLERANCE);
    };
    let wav = io.vec_f32(&format!("{clip}.wav"));
    let frames = io.get(&format!("{clip}.num_frames")).to_dtype(DType::I64).unwrap();
    assert_eq!(frames.to_scalar::<i64>().unwrap() as usize, Model::frames(wav.len()), "{clip}: frames");
    let (embedding, traced) = trace::capture(|| model.embed(&wav, Model::frames(wav.len())).unwrap());
    for name in ["input_values", "interpolated", "projected", "pos_conv", "last_hidden_state"] {
        compare(name, &traced[name]);
    }
    compare("conv_features", &traced["conv_features"].transpose(1, 2).unwrap());
    let states = golden("hidden_states").dim(0).unwrap();
    let states: Vec<_> = (0..states).map(|i| traced[&format!("hidden_states.{i}")].clone()).collect();
    compare("hidden_states", &Tensor::stack(&states, 0).unwrap());
    compare("embedding", &embedding);
}

fn check_interpolation(io: &GoldenFile) {
    for name in io.names() {
        let Some((case, len)) = name.rsplit_once(".out_") else { continue };
        let xs = io.f32(&format!("{case}.in"));
        let len = len.parse().unwrap_or_else(|e| panic!("{name}: {e}"));
        check("wav2vec2", "f32", &name, &interpolate(&xs, len).unwrap(), &io.f32(&name), TOLERANCE);
    }
}

#[test]
fn a_perturbed_weight_shows() {
    let component = Component::open("wav2vec2");
    let cfg = config(&component);
    let io = component.file("io.safetensors");
    let weights = component.file(&weight_files(&component)[0]);
    let clip = &clips(&io)[0];
    let (wav, expected) = (io.vec_f32(&format!("{clip}.wav")), io.f32(&format!("{clip}.embedding")));
    let perturbed_names = [
        "conv_layers.0.layer_norm.bias",
        "conv_layers.1.conv.weight",
        "pos_conv_embed.conv.bias",
        "layers.0.attention.v_proj.weight",
    ];
    for perturbed in perturbed_names {
        let mut tensors: HashMap<_, _> =
            weights.names().into_iter().map(|n| (n.clone(), weights.get(&n))).collect();
        let name = tensors.keys().find(|name| name.ends_with(perturbed)).unwrap().clone();
        let weight = tensors.get_mut(&name).unwrap();
        *weight = (&*weight + 0.05).unwrap();
        let model = Model::new(&cfg, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)).unwrap();
        let error = relative_error(&model.embed(&wav, Model::frames(wav.len())).unwrap(), &expected);
        assert!(error > TOLERANCE, "{name}: error {error:.2e} after a change");
    }
}
