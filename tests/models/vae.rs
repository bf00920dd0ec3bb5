//! Parity: vae. Latents, raw and clamped frames, and every stage that the goldens name.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use talkie::models::wan_vae::{Config, Vae};
use talkie::nn::trace;

use crate::support::{Component, GoldenFile, check, relative_error};

const TOLERANCE: f64 = 1e-4;

fn config(component: &Component) -> Config {
    serde_json::from_value(component.config()["model"].clone()).expect("`model` is a VAE config")
}

fn vae(component: &Component) -> Vae {
    let cfg = config(component);
    let weights = component.file("weights.safetensors");
    assert_eq!(serde_json::from_value::<Config>(weights.metadata("config")).unwrap(), cfg);
    Vae::new(&cfg, weights.var_builder(DType::F32)).unwrap()
}

/// Names of the cases in `io` that have a tensor `suffix`, and no other prefix than a case's.
fn cases(io: &GoldenFile, suffix: &str) -> Vec<String> {
    let names = io.names();
    names.iter().filter_map(|name| name.strip_suffix(suffix)).map(str::to_owned).collect()
}

/// The case whose tensor `suffix` is the largest: there every tap of a kernel meets a pixel.
fn largest_case(io: &GoldenFile, suffix: &str) -> String {
    let size = |case: &String| io.get(&format!("{case}{suffix}")).elem_count();
    cases(io, suffix).into_iter().max_by_key(size).expect("there is a case")
}

/// The reference's layout (1, C, T, H, W) of a stage recorded as (1, T, H, W, C).
fn channels_first(xs: &Tensor) -> Tensor {
    xs.permute((0, 4, 1, 2, 3)).unwrap()
}

/// Decodes `latents` and gives the clamped frames, the frames before clamping, and the stages.
fn decode(vae: &Vae, latents: &Tensor) -> (Tensor, Tensor, BTreeMap<String, Tensor>) {
    let (video, stages) = trace::capture(|| vae.decode(latents).unwrap());
    let heads: Vec<_> =
        (0..latents.dim(1).unwrap()).map(|i| &stages[&format!("dec.chunk{i}.head")]).collect();
    let raw = channels_first(&Tensor::cat(&heads, 1).unwrap()).squeeze(0).unwrap();
    (video, raw, stages)
}

#[test]
fn equals_the_reference() {
    let component = Component::open("vae");
    let vae = vae(&component);
    let io = component.file("io.safetensors");
    assert_eq!(io.metadata("config"), component.config()["model"]);
    let listed = component.config()["files"]["io.safetensors"].clone();
    let stages_of = listed["stages"].as_str().expect("`stages` says which cases they are of").to_owned();

    let mut checked_stages = 0;
    let mut check_stages = |prefix: &str, stages: &BTreeMap<String, Tensor>| {
        for name in io.names().iter().filter(|name| name.starts_with(&format!("stages.{prefix}."))) {
            let stage =
                stages.get(&name["stages.".len()..]).unwrap_or_else(|| panic!("{name} was not recorded"));
            check("Wan VAE", "f32", name, &channels_first(stage), &io.f32(name), TOLERANCE);
            checked_stages += 1;
        }
    };

    let encoded = cases(&io, ".mu_raw");
    for case in &encoded {
        let video = format!("{case}.video");
        let (latents, stages) = trace::capture(|| vae.encode(&io.f32(&video)).unwrap());
        check(
            "Wan VAE",
            "f32",
            &format!("{case}.mu_raw"),
            &stages["enc.mu"],
            &io.f32(&format!("{case}.mu_raw")),
            TOLERANCE,
        );
        check(
            "Wan VAE",
            "f32",
            &format!("{case}.latent"),
            &latents,
            &io.f32(&format!("{case}.latent")),
            TOLERANCE,
        );
        if stages_of.contains(&video) {
            check_stages("enc", &stages);
        }
    }
    let decoded = cases(&io, ".raw");
    for case in &decoded {
        let latent = format!("{case}.latent");
        let (video, raw, stages) = decode(&vae, &io.f32(&latent));
        check("Wan VAE", "f32", &format!("{case}.raw"), &raw, &io.f32(&format!("{case}.raw")), TOLERANCE);
        check(
            "Wan VAE",
            "f32",
            &format!("{case}.video"),
            &video,
            &io.f32(&format!("{case}.video")),
            TOLERANCE,
        );
        if stages_of.contains(&latent) {
            check_stages("dec", &stages);
        }
    }
    let of_stages = io.names().iter().filter(|name| name.starts_with("stages.")).count();
    assert_eq!(checked_stages, of_stages, "some stages belong to no case");
    let named = listed["cases"].as_object().expect("`cases` is an object");
    assert!(
        named.keys().all(|case| encoded.contains(case) || decoded.contains(case)),
        "a named case has no tensors"
    );

    // The statistics of the latents are constants of ours: latents = (mu − mean) / std.
    let per_channel = |name: &str| io.f32(name).reshape(((), 1, 1, 1)).unwrap();
    for case in &encoded {
        let mu = io.f32(&format!("{case}.mu_raw"));
        let latents =
            mu.broadcast_sub(&per_channel("mean")).unwrap().broadcast_div(&per_channel("std")).unwrap();
        check("Wan VAE", "f32", "mean and std", &latents, &io.f32(&format!("{case}.latent")), TOLERANCE);
    }
    component.finish();
}

/// A network of the golden weights, one value of `name` changed: of a kernel the middle of the last plane, because in
/// a causal one that is the tap of the current pixel, which even a clip of one frame and one latent meets; else the
/// first.
fn perturbed(name: &str, by: f64) -> Vae {
    let component = Component::open("vae");
    let weights = component.file("weights.safetensors");
    let mut tensors: std::collections::HashMap<_, _> =
        weights.names().into_iter().map(|name| (name.clone(), weights.f32(&name))).collect();
    let weight = tensors.get_mut(name).unwrap_or_else(|| panic!("no weight `{name}`"));
    let mut values: Vec<f32> = weight.flatten_all().unwrap().to_vec1().unwrap();
    let changed = match *weight.dims() {
        [.., height, width] if name.ends_with(".weight") => {
            values.len() - height * width + height / 2 * width + width / 2
        }
        _ => 0,
    };
    values[changed] += by as f32;
    *weight = Tensor::from_vec(values, weight.shape(), &Device::Cpu).unwrap();
    Vae::new(&config(&component), VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)).unwrap()
}

#[test]
fn a_changed_weight_is_noticed() {
    let component = Component::open("vae");
    let io = component.file("io.safetensors");
    for name in
        ["encoder.conv1.weight", "encoder.middle.1.to_qkv.weight", "conv1.bias", "encoder.head.0.gamma"]
    {
        let vae = perturbed(name, 0.5);
        let case = largest_case(&io, ".mu_raw");
        let latents = vae.encode(&io.f32(&format!("{case}.video"))).unwrap();
        let error = relative_error(&latents, &io.f32(&format!("{case}.latent")));
        assert!(error > TOLERANCE, "{name} has no effect: {error:e}");
    }
    for name in
        ["conv2.weight", "decoder.conv1.weight", "decoder.middle.1.proj.weight", "decoder.head.2.bias"]
    {
        let vae = perturbed(name, 0.5);
        let case = largest_case(&io, ".raw");
        let (_, raw, _) = decode(&vae, &io.f32(&format!("{case}.latent")));
        let error = relative_error(&raw, &io.f32(&format!("{case}.raw")));
        assert!(error > TOLERANCE, "{name} has no effect: {error:e}");
    }
}
