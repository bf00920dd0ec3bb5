//! The DiT with bf16 weights.
//!
//! With two speakers, a token's class is an argmax over values of eight bits. Where the two largest are a few steps
//! apart, the order in which a processor adds decides, for the reference on another machine as much as for us, and a
//! token of the other class is far off. So a token may be off where its class was undecided; every other may not.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Tensor};
use serde_json::Value;
use talkie::models::wan::{Config, Model};

use super::{Inputs, recorded};
use crate::support::{Component, check, relative_error};

const TOLERANCE: f64 = 3e-2;

/// A class is undecided when the second largest value is within this part of the largest: two steps of bf16.
const UNDECIDED: f32 = 1.0 / 64.0;

/// The flow of precisions with bf16 weights, on the inputs of the other files.
pub fn flow(goldens: &Component, cfg: &Config, name: &str, settings: &Value) {
    let file = goldens.file(name);
    let model = Model::new(cfg, goldens.file("weights.safetensors").var_builder(DType::BF16)).unwrap();
    let timestep = settings["t"].as_f64().expect("a timestep");
    let mut compared = 0;
    for input in settings["inputs"].as_array().expect("`inputs` is a list") {
        let input = input.as_str().expect("a file name");
        let inputs = Inputs::of(&goldens.file(input));
        let run = inputs.run(&model, timestep, &inputs.audio);
        let prefix = input.replace("safetensors", "");
        for name in file.names() {
            let Some(what) = name.strip_prefix(&prefix) else { continue };
            let actual = recorded(what, &run, &inputs, cfg).to_dtype(DType::F32).unwrap();
            let expected = file.f32(&name);
            let off = relative_error(&actual, &expected) > TOLERANCE;
            match decided_tokens(what, &run.1, cfg).filter(|_| off) {
                Some(decided) => {
                    assert!(
                        4 * decided.len() > num_tokens(&inputs, cfg),
                        "{name}: hardly a class was decided"
                    );
                    let others = rows_off(&by_token(&actual, cfg), &by_token(&expected, cfg));
                    let len = num_tokens(&inputs, cfg);
                    assert!(
                        others <= len / 20 + 2,
                        "{name}: {others} of {len} tokens are off, expected a few"
                    );
                    let decided = Tensor::new(decided, &Device::Cpu).unwrap();
                    let rows = |xs: &Tensor| by_token(xs, cfg).index_select(&decided, 0).unwrap();
                    check("dit", "bf16", &name, &rows(&actual), &rows(&expected), TOLERANCE);
                }
                None => check("dit", "bf16", &name, &actual, &expected, TOLERANCE),
            }
            compared += 1;
        }
    }
    assert_eq!(compared, file.names().len());
}

/// The tokens whose class was decided in every block that `what` depends on; `None` where no class was chosen.
fn decided_tokens(what: &str, records: &BTreeMap<String, Tensor>, cfg: &Config) -> Option<Vec<u32>> {
    let block = |name: &str| name.strip_prefix("block_")?.split('.').next()?.parse::<usize>().ok();
    let blocks = match block(what) {
        // The attention and the map of a block come before its choice.
        Some(i) if what.ends_with(".self_attn") || what.ends_with(".ref_attn_map") => i,
        Some(i) => i + 1,
        None if what == "out" || what == "head_out" => cfg.num_layers,
        None => 0,
    };
    let maps: Vec<_> = (0..blocks)
        .filter_map(|i| records.get(&format!("block_{i}.ref_attn_map")))
        .map(|map| map.to_dtype(DType::F32).unwrap().t().unwrap().to_vec2::<f32>().unwrap())
        .collect();
    let len = maps.first()?.len();
    let decided = |values: &Vec<f32>| {
        let mut values = values.clone();
        values.sort_by(f32::total_cmp);
        matches!(values[..], [.., second, first] if first - second > first * UNDECIDED)
    };
    Some((0..len as u32).filter(|&token| maps.iter().all(|map| decided(&map[token as usize]))).collect())
}

/// How many rows of `actual` (L, values) are off by more than the tolerance, relative to the largest value of all.
fn rows_off(actual: &Tensor, expected: &Tensor) -> usize {
    let largest = expected.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let worst = (actual - expected).unwrap().abs().unwrap().max(D::Minus1).unwrap().to_vec1::<f32>().unwrap();
    worst.into_iter().filter(|error| f64::from(error / largest) > TOLERANCE).count()
}

fn num_tokens(inputs: &Inputs, cfg: &Config) -> usize {
    let (_, frames, height, width) = inputs.latents.dims4().unwrap();
    frames * (height / cfg.patch_size[1]) * (width / cfg.patch_size[2])
}

/// (L, values per token) of tokens (1, L, D), an attention map (classes, L), or latents (C, T, h, w).
fn by_token(xs: &Tensor, cfg: &Config) -> Tensor {
    match *xs.dims() {
        [_, _] => xs.t().unwrap().contiguous().unwrap(),
        [_, _, _] => xs.squeeze(0).unwrap(),
        [channels, frames, height, width] => {
            let [_, rows, cols] = cfg.patch_size;
            let patches = (channels * frames, height / rows, rows, width / cols, cols);
            let xs = xs.reshape(patches).unwrap().permute((0, 1, 3, 2, 4)).unwrap();
            let tokens = height / rows * (width / cols);
            let xs = xs.reshape((channels, frames * tokens, rows * cols)).unwrap();
            xs.transpose(0, 1).unwrap().flatten_from(D::Minus2).unwrap()
        }
        ref other => panic!("no tokens in {other:?}"),
    }
}
