//! Parity: the DiT, its parts, its bf16 flow, and TeaCache around it.

mod bf16;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde_json::Value;
use talkie::models::wan::{Audio, Config, Context, Model, normalize_and_scale, ref_attn_map};
use talkie::nn::rope::Rope;
use talkie::nn::{LayerNorm, RmsNorm, layer_norm_modulated, timestep, trace};
use talkie::pipeline::teacache::{Residual, TeaCache};

use crate::support::{Component, GoldenFile, check, relative_error};

const TOLERANCE: f64 = 1e-4;

#[test]
fn every_golden() {
    let goldens = Component::open("dit");
    let config = goldens.config();
    let weights = goldens.file("weights.safetensors");
    let cfg = model_config(&config["model"]);
    assert_eq!(cfg, model_config(&weights.metadata("config")), "config.json and the weights disagree");
    let model = Model::new(&cfg, weights.var_builder(DType::F32)).unwrap();
    let files = config["files"].as_object().expect("`files` is an object");
    for (name, settings) in files {
        match name.as_str() {
            "parts.safetensors" => parts(&goldens.file(name), settings),
            "bf16.safetensors" => bf16::flow(&goldens, &cfg, name, settings),
            "teacache.safetensors" => teacache(&goldens, &cfg, name, settings),
            _ => calls(&goldens.file(name), &model, settings),
        }
    }
    goldens.finish();
}

fn model_config(json: &Value) -> Config {
    let cfg: Config = serde_json::from_value(json.clone()).expect("a DiT config");
    if let Some(head_dim) = json.get("head_dim") {
        assert_eq!(head_dim.as_u64(), Some(cfg.head_dim() as u64));
    }
    cfg
}

/// The inputs of one golden file.
struct Inputs {
    latents: Tensor,
    y: Tensor,
    context: Tensor,
    image_embeds: Tensor,
    audio: Tensor,
    masks: Tensor,
}

impl Inputs {
    fn of(file: &GoldenFile) -> Self {
        Self {
            latents: file.f32("latent"),
            y: file.f32("y").squeeze(0).unwrap(),
            context: file.f32("context"),
            image_embeds: file.f32("clip"),
            audio: file.f32("audio"),
            masks: file.f32("masks"),
        }
    }

    fn context(&self, model: &Model) -> Context {
        model.encode_context(&self.context, &self.image_embeds).unwrap()
    }

    /// The whole forward with `audio`, and what it records on the way.
    fn run(&self, model: &Model, timestep: f64, audio: &Tensor) -> (Tensor, BTreeMap<String, Tensor>) {
        trace::capture(|| {
            let context = self.context(model);
            let audio = model.encode_audio(audio).unwrap();
            self.forward(model, timestep, &context, &audio)
        })
    }

    fn forward(&self, model: &Model, timestep: f64, context: &Context, audio: &Audio) -> Tensor {
        model.forward(&self.latents, &self.y, timestep, context, audio, Some(&self.masks)).unwrap()
    }
}

/// What the reference stores of one call, by name, against what ours recorded; the attention map of one speaker,
/// which the product does not make, is made here from the queries and keys of the block.
fn recorded(
    name: &str,
    (out, records): &(Tensor, BTreeMap<String, Tensor>),
    inputs: &Inputs,
    cfg: &Config,
) -> Tensor {
    if name == "out" {
        return out.clone();
    }
    if let Some(tensor) = records.get(name) {
        return tensor.clone();
    }
    let block =
        name.strip_suffix(".ref_attn_map").unwrap_or_else(|| panic!("nothing was recorded as `{name}`"));
    let get = |what: &str| &records[&format!("{block}.self_attn.{what}")];
    ref_attn_map(get("q"), get("k"), &token_masks(&inputs.masks, cfg)).unwrap()
}

/// Masks (3, h, w) in latents as masks (3, S) over tokens: the first latent of each patch.
fn token_masks(masks: &Tensor, cfg: &Config) -> Tensor {
    let (classes, height, width) = masks.dims3().unwrap();
    let values = masks.to_vec3::<f32>().unwrap();
    let tokens: Vec<f32> = (0..classes)
        .flat_map(|class| (0..height).step_by(cfg.patch_size[1]).map(move |row| (class, row)))
        .flat_map(|(class, row)| (0..width).step_by(cfg.patch_size[2]).map(move |col| (class, row, col)))
        .map(|(class, row, col)| if values[class][row][col] > 0.0 { 1.0 } else { 0.0 })
        .collect();
    let len = tokens.len() / classes;
    Tensor::from_vec(tokens, (classes, len), &Device::Cpu).unwrap()
}

/// One speaker or two: every call of the file, with every intermediate that is stored.
fn calls(file: &GoldenFile, model: &Model, settings: &Value) {
    assert_eq!(*model.config(), model_config(&file.metadata("config")));
    let inputs = Inputs::of(file);
    assert_eq!(settings["persons"].as_u64(), Some(inputs.audio.dim(0).unwrap() as u64));
    for (call, timestep) in settings["calls"].as_object().expect("`calls` is an object") {
        let timestep = timestep.as_f64().expect("a timestep");
        assert!((timestep - f64::from(file.vec_f32(&format!("{call}.t"))[0])).abs() < 1e-3);
        let own_audio = format!("{call}.audio");
        let audio = if file.has(&own_audio) { file.f32(&own_audio) } else { inputs.audio.clone() };
        let run = inputs.run(model, f64::from(timestep as f32), &audio);
        for name in file.names() {
            let Some(what) = name.strip_prefix(&format!("{call}.")) else { continue };
            if !matches!(what, "t" | "audio") {
                let actual = recorded(what, &run, &inputs, model.config());
                check("dit", "f32", &name, &actual, &file.f32(&name), TOLERANCE);
            }
        }
    }
}

/// The functions that the network is made of.
fn parts(file: &GoldenFile, settings: &Value) {
    let device = Device::Cpu;
    let heads_second = |x: &Tensor| x.transpose(1, 2).unwrap();
    for name in file.names() {
        let check = |actual: &Tensor| check("dit parts", "f32", &name, actual, &file.f32(&name), TOLERANCE);
        let input = |of: &str| file.f32(&format!("{}.{of}", name.rsplit_once('.').expect("a dotted name").0));
        if let Some(dim) = name.strip_prefix("sinusoid.dim") {
            let ts: Vec<f64> = file.vec_f32("sinusoid.t").into_iter().map(f64::from).collect();
            check(&timestep::sinusoid(&ts, dim.parse().expect("a dimension"), &device).unwrap());
        } else if name.starts_with("rope3d.") && name.ends_with(".out") {
            let grid =
                file.get(&name.replace(".out", ".grid")).flatten_all().unwrap().to_vec1::<i64>().unwrap();
            let grid: Vec<usize> = grid.into_iter().map(|v| v as usize).collect();
            let configured: Vec<usize> = serde_json::from_value(settings["rope3d_grid"].clone()).unwrap();
            assert_eq!(grid, configured);
            let xs = input("in");
            check(&rope3d((grid[0], grid[1], grid[2]), &xs));
        } else if name.starts_with("rope3d.") && name.contains(".table_angle_first") {
            check(&rope3d_table(file.raw(&name).1));
        } else if name.starts_with("rope1d") && name.ends_with(".out") {
            let xs = input("in"); // (B, N, L, D)
            let rope = Rope::positions(&file.f32("rope1d.pos"), xs.dim(3).unwrap()).unwrap();
            check(&heads_second(&rope.rotate(&heads_second(&xs)).unwrap()));
        } else if name == "attn_map.out" {
            let q = input("q");
            assert_eq!(settings["attn_map_head_dim"].as_u64(), Some(q.dim(3).unwrap() as u64));
            check(&ref_attn_map(&q, &input("k"), &input("masks")).unwrap());
        } else if name == "normalize_and_scale.out" {
            let range = |of: &str| {
                let [low, high]: [f64; 2] =
                    serde_json::from_value(settings["normalize_and_scale"][of].clone()).unwrap();
                (low, high)
            };
            check(&normalize_and_scale(&input("in"), range("source"), range("target")).unwrap());
        } else if name.starts_with("norms.") && name.ends_with(".out") {
            check(&norm(file, &name, settings["norms_eps"].as_f64().expect("an eps")));
        }
    }
    // The rest is read as inputs of these.
    for read_above in ["sinusoid.t", "rope1d.pos", "attn_map.masks", "normalize_and_scale.in"] {
        assert!(file.has(read_above));
    }
}

fn rope3d(grid: (usize, usize, usize), xs: &Tensor) -> Tensor {
    Rope::grid(grid, xs.dim(3).unwrap(), &Device::Cpu).unwrap().rotate(xs).unwrap()
}

/// Cosine and sine of the first positions, (len, head_dim / 2, 2), all axes at the same position.
fn rope3d_table(shape: Vec<usize>) -> Tensor {
    let (len, half) = (shape[0], shape[1]);
    // The pair (1, 0) turns into (cosine, sine).
    let xs: Vec<f32> = (0..len * len * len * half).flat_map(|_| [1.0, 0.0]).collect();
    let xs = Tensor::from_vec(xs, (1, len * len * len, 1, 2 * half), &Device::Cpu).unwrap();
    let turned = rope3d((len, len, len), &xs).reshape((len * len * len, half, 2)).unwrap();
    let diagonal: Vec<u32> = (0..len).map(|i| (i * (len * len + len + 1)) as u32).collect();
    turned.index_select(&Tensor::new(diagonal, &Device::Cpu).unwrap(), 0).unwrap()
}

fn norm(file: &GoldenFile, name: &str, eps: f64) -> Tensor {
    let xs = file.f32("norms.in");
    let kind = name.split('.').nth(1).expect("norms.<kind>.out");
    let dim = xs.dim(2).unwrap();
    let tensors = ["weight", "bias"].map(|part| (part.to_owned(), format!("norms.{kind}.{part}")));
    let tensors =
        tensors.into_iter().filter(|(_, name)| file.has(name)).map(|(part, name)| (part, file.get(&name)));
    let vb = VarBuilder::from_tensors(tensors.collect(), DType::F32, &Device::Cpu);
    match kind {
        "ln" => LayerNorm::new(dim, eps, vb).unwrap().forward(&xs).unwrap(),
        "rms" => RmsNorm::new(dim, eps, vb).unwrap().forward(&xs).unwrap(),
        "ln_noaffine" => {
            let zero = Tensor::zeros((1, 1, dim), DType::F32, &Device::Cpu).unwrap();
            layer_norm_modulated(&xs, &zero, &zero, eps).unwrap()
        }
        other => panic!("no norm is called {other}"),
    }
}

/// Euler steps with three guidance passes, each with a cache of its own: which steps skip the blocks, what is
/// accumulated, the passes' outputs and the latents after each step.
fn teacache(goldens: &Component, cfg: &Config, name: &str, settings: &Value) {
    let (file, facts) = (goldens.file(name), goldens.json("teacache.json"));
    let number = |of: &str| settings[of].as_f64().unwrap_or_else(|| panic!("`{of}` is a number"));
    let inputs = Inputs::of(&goldens.file(settings["inputs"].as_str().expect("a file name")));

    let weights = goldens.file("weights.safetensors");
    let mut tensors: std::collections::HashMap<String, Tensor> =
        weights.names().into_iter().map(|name| (name.clone(), weights.get(&name))).collect();
    for key in settings["override"].as_array().expect("`override` is a list") {
        let key = key.as_str().expect("a tensor name");
        tensors
            .insert(key.to_owned(), file.get(&format!("override.{key}")))
            .expect("an override of a weight");
    }
    let model = Model::new(cfg, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)).unwrap();

    let coefficients = match settings["coefficients"].as_str() {
        Some("480") => TeaCache::COEFFICIENTS_480,
        Some("720") => TeaCache::COEFFICIENTS_720,
        other => panic!("no coefficients for {other:?}"),
    };
    let fitted = &facts["coefficients"]["use_ret_steps=True"];
    assert_eq!(fitted["480"], serde_json::json!(TeaCache::COEFFICIENTS_480));
    assert_eq!(fitted["720"], serde_json::json!(TeaCache::COEFFICIENTS_720));
    let warmup_steps = number("warmup_steps") as usize;
    let cache = TeaCache { threshold: number("thresh"), coefficients, warmup_steps };
    assert_eq!(settings["passes"], serde_json::json!(["cond", "drop_text", "uncond"]));

    let context = inputs.context(&model);
    let null_context = model.encode_context(&file.f32("null_context"), &inputs.image_embeds).unwrap();
    let audio = model.encode_audio(&inputs.audio).unwrap();
    let null_audio =
        model.encode_audio(&inputs.audio.narrow(0, 0, 1).unwrap().zeros_like().unwrap()).unwrap();
    let mut passes = [
        (&context, &audio, Residual::default()),
        (&null_context, &audio, Residual::default()),
        (&null_context, &null_audio, Residual::default()),
    ];

    let timesteps = file.vec_f32("timesteps");
    let steps = number("steps") as usize;
    assert_eq!(timesteps.len(), steps + 1);
    let modulation = |t: &f32| model.modulation(f64::from(*t)).unwrap().1;
    let decisions = cache.decide(&timesteps[..steps].iter().map(modulation).collect::<Vec<_>>()).unwrap();
    let (text, voice) = (number("text_guide_scale"), number("audio_guide_scale"));
    let mut latents = file.f32("latent0");
    for step in 0..steps {
        let mut outputs = Vec::new();
        for (i, (context, audio, residual)) in passes.iter_mut().enumerate() {
            let embedded = model.embed(&latents, &inputs.y, f64::from(timesteps[step])).unwrap();
            let decision = decisions[step];
            let row = &facts["rows"][step][i];
            assert_eq!(row["computed"].as_bool(), Some(!decision.skips), "step {step}, pass {i}");
            let accumulated = row["accumulated_after"].as_f64().expect("a number");
            assert!((decision.accumulated - accumulated).abs() < 1e-4, "step {step}, pass {i}");
            let blocks = || model.blocks(&embedded, context, audio, Some(&inputs.masks));
            let xs = residual.apply(decision.skips, &embedded.xs, blocks).unwrap();
            let out = model.head(&xs, &embedded).unwrap();
            let name = format!("step{step}.pass{i}");
            if file.has(&name) {
                check("teacache", "f32", &name, &out, &file.f32(&name), TOLERANCE);
            }
            outputs.push(out);
        }
        let [cond, drop_text, uncond] = <[Tensor; 3]>::try_from(outputs).expect("three passes");
        let text = ((cond - &drop_text).unwrap() * text).unwrap();
        let voice = ((drop_text - &uncond).unwrap() * voice).unwrap();
        let velocity = ((uncond + text).unwrap() + voice).unwrap();
        let dt = f64::from((timesteps[step] - timesteps[step + 1]) / 1000.0);
        latents = (latents - (velocity * dt).unwrap()).unwrap();
        let name = format!("latent_{}", step + 1);
        check("teacache", "f32", &name, &latents, &file.f32(&name), TOLERANCE);
    }
}

/// The two-speaker file: the one whose audio is of two persons.
fn two_speakers(goldens: &Component) -> (Inputs, f64, GoldenFile) {
    let files = goldens.config()["files"].clone();
    let (name, settings) = files
        .as_object()
        .and_then(|files| files.iter().find(|(_, settings)| settings["persons"] == 2))
        .expect("a file with two persons");
    let calls = settings["calls"].as_object().expect("`calls` is an object");
    let file = goldens.file(name);
    let hears = |call: &str| !file.has(&format!("{call}.audio"));
    let (call, timestep) = calls.iter().find(|(call, _)| hears(call)).expect("a call with the file's audio");
    file.f32(&format!("{call}.out"));
    (Inputs::of(&file), timestep.as_f64().expect("a timestep"), file)
}

fn model_of(
    goldens: &Component,
    change: impl FnOnce(&mut std::collections::HashMap<String, Tensor>),
) -> Model {
    let weights = goldens.file("weights.safetensors");
    let mut tensors = weights.names().into_iter().map(|name| (name.clone(), weights.get(&name))).collect();
    change(&mut tensors);
    let cfg = model_config(&goldens.config()["model"]);
    Model::new(&cfg, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)).unwrap()
}

/// A change that parity must notice: the comparison of every golden would not catch a mistake otherwise.
#[test]
fn a_wrong_weight_mask_or_axis_is_noticed() {
    let goldens = Component::open("dit");
    let (mut inputs, timestep, _) = two_speakers(&goldens);
    let right = model_of(&goldens, |_| ());
    let expected = inputs.run(&right, timestep, &inputs.audio).0;

    let wrong = model_of(&goldens, |tensors| {
        let bias = tensors.get_mut("blocks.0.self_attn.v.bias").expect("a bias");
        *bias = (&*bias + 0.1).unwrap();
    });
    let actual = inputs.run(&wrong, timestep, &inputs.audio).0;
    assert!(relative_error(&actual, &expected) > TOLERANCE, "a weight");

    // The first person where the background is, and the other way round.
    let masks = inputs.masks.clone();
    let order = Tensor::new(&[2u32, 1, 0], &Device::Cpu).unwrap();
    inputs.masks = masks.index_select(&order, 0).unwrap();
    let actual = inputs.run(&right, timestep, &inputs.audio).0;
    assert!(relative_error(&actual, &expected) > TOLERANCE, "a mask");

    // Another rotary grid of as many tokens: rows and columns exchanged, or all in one column.
    let parts = goldens.file("parts.safetensors");
    for name in parts.names().iter().filter(|name| name.starts_with("rope3d.") && name.ends_with(".out")) {
        let grid = parts.get(&name.replace(".out", ".grid")).flatten_all().unwrap().to_vec1::<i64>().unwrap();
        let (frames, rows, cols) = (grid[0] as usize, grid[1] as usize, grid[2] as usize);
        let other = if rows == cols { (frames, rows * cols, 1) } else { (frames, cols, rows) };
        let actual = rope3d(other, &parts.f32(&name.replace(".out", ".in")));
        assert!(relative_error(&actual, &parts.f32(name)) > TOLERANCE, "a rotary axis");
    }
}

#[test]
fn keys_and_values_that_are_kept_equal_those_made_anew() {
    let goldens = Component::open("dit");
    let (inputs, timestep, _) = two_speakers(&goldens);
    let model = model_of(&goldens, |_| ());
    let context = inputs.context(&model);
    let audio = model.encode_audio(&inputs.audio).unwrap();
    for timestep in [timestep, timestep / 2.0, timestep] {
        let kept = inputs.forward(&model, timestep, &context, &audio);
        let anew = inputs.run(&model, timestep, &inputs.audio).0;
        assert_eq!(relative_error(&kept, &anew), 0.0);
    }
    // Another grid in between must not leave its rotation behind.
    let before = inputs.forward(&model, timestep, &context, &audio);
    let rows = inputs.latents.dim(2).unwrap() - model.config().patch_size[1];
    let other = model.embed(
        &inputs.latents.narrow(2, 0, rows).unwrap(),
        &inputs.y.narrow(2, 0, rows).unwrap(),
        timestep,
    );
    assert!(other.is_ok());
    assert_eq!(relative_error(&inputs.forward(&model, timestep, &context, &audio), &before), 0.0);
}

/// With full masks both speakers are everywhere: their attention maps are equal, so that the first of equals is
/// shown by every token, and the background's empty mask is not divided by its size.
#[test]
fn two_speakers_with_one_voice_and_full_masks_are_equal() {
    let goldens = Component::open("dit");
    let (mut inputs, timestep, _) = two_speakers(&goldens);
    let model = model_of(&goldens, |_| ());
    let voice = inputs.audio.narrow(0, 1, 1).unwrap();
    let voices = Tensor::cat(&[&voice, &voice], 0).unwrap();
    let full = inputs.masks.ones_like().unwrap().narrow(0, 0, 2).unwrap();
    let nowhere = full.narrow(0, 0, 1).unwrap().zeros_like().unwrap();
    inputs.masks = Tensor::cat(&[&full, &nowhere], 0).unwrap();
    let (out, records) = inputs.run(&model, timestep, &voices);
    let values = out.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(values.iter().all(|v| v.is_finite()));
    let map = records["block_0.ref_attn_map"].to_vec2::<f32>().unwrap();
    assert_eq!(map[0], map[1]);
    assert!(map[2].iter().all(|v| *v == 0.0));
    // Every token still hears both voices, at different distances.
    let differently = inputs.run(&model, timestep, &inputs.audio).0;
    assert!(relative_error(&differently, &out) > TOLERANCE);
}

#[test]
fn two_speakers_need_masks_that_fit() {
    let goldens = Component::open("dit");
    let (inputs, timestep, _) = two_speakers(&goldens);
    let model = model_of(&goldens, |_| ());
    let context = inputs.context(&model);
    let run = |audio: &Audio, masks: Option<&Tensor>| {
        model.forward(&inputs.latents, &inputs.y, timestep, &context, audio, masks).map_err(|e| e.to_string())
    };
    let both = model.encode_audio(&inputs.audio).unwrap();
    assert!(run(&both, None).unwrap_err().contains("masks"));
    let narrow = inputs.masks.narrow(2, 0, 2).unwrap();
    assert!(run(&both, Some(&narrow)).unwrap_err().contains("expected"));
    // One speaker is never routed: masks make no difference.
    let one = model.encode_audio(&inputs.audio.narrow(0, 0, 1).unwrap()).unwrap();
    let (with, without) = (run(&one, Some(&inputs.masks)).unwrap(), run(&one, None).unwrap());
    assert_eq!(relative_error(&with, &without), 0.0);
}

#[test]
fn inputs_that_do_not_fit_are_refused_with_what_was_expected() {
    let goldens = Component::open("dit");
    let (inputs, timestep, _) = two_speakers(&goldens);
    let model = model_of(&goldens, |_| ());
    let cfg = model.config().clone();
    let long = Tensor::zeros((cfg.text_len + 1, cfg.text_dim), DType::F32, &Device::Cpu).unwrap();
    let message = model.encode_context(&long, &inputs.image_embeds).unwrap_err().to_string();
    assert!(message.contains(&format!("at most {}", cfg.text_len)), "{message}");

    let three = Tensor::cat(&[&inputs.audio, &inputs.audio.narrow(0, 0, 1).unwrap()], 0).unwrap();
    assert!(model.encode_audio(&three).unwrap_err().to_string().contains("3 persons"));
    let frames = inputs.audio.dim(1).unwrap();
    let short = inputs.audio.narrow(1, 0, frames - 1).unwrap();
    assert!(model.encode_audio(&short).unwrap_err().to_string().contains("n + 1"));

    let fewer = inputs.audio.narrow(1, 0, frames - cfg.vae_scale).unwrap();
    let fewer = model.encode_audio(&fewer).unwrap();
    let context = inputs.context(&model);
    let result = model.forward(&inputs.latents, &inputs.y, timestep, &context, &fewer, Some(&inputs.masks));
    assert!(result.unwrap_err().to_string().contains("latent frames"));
}
