//! Parity: the whole window loop, from reference frames and audio embeddings to video.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use talkie::media::image;
use talkie::models::{clip_vision, wan, wan_vae};
use talkie::nn::{kernels, trace};
use talkie::pipeline::{
    Apg, Cancel, Conditioning, Control, Generated, Guidance, Plan, Reference, Sampling, Window, WindowMaker,
    generate_windows, teacache::TeaCache,
};
use talkie::scheduler::timesteps;

use crate::support::{Component, GoldenFile, check, relative_error};

/// Of windows that follow on our own. Errors grow four- or fivefold a window, through motion frames and colour
/// matching, so windows 0 and 1 are compared as they come …
const TOLERANCES: [f64; 2] = [2e-4, 2e-3];
/// … and later ones are fed the reference's motion frames.
const TOLERANCE_FED: f64 = 2e-4;

/// What a window is called in the report, and how far it may be off.
fn row(window: usize) -> (&'static str, f64) {
    match window {
        0 => ("pipeline, window 0", TOLERANCES[0]),
        1 => ("pipeline, window 1", TOLERANCES[1]),
        _ => ("pipeline, later windows, fed", TOLERANCE_FED),
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("expected a number, found {value}"))
}

fn count(value: &Value) -> usize {
    value.as_u64().unwrap_or_else(|| panic!("expected a count, found {value}")) as usize
}

fn config<C: serde::de::DeserializeOwned>(value: &Value) -> C {
    serde_json::from_value(value.clone()).expect("a network's config")
}

struct Networks {
    dit: wan::Model,
    vae: wan_vae::Vae,
    clip: clip_vision::Model,
}

impl Networks {
    /// Those that run once per window.
    fn generator(&self) -> talkie::pipeline::Networks<'_> {
        talkie::pipeline::Networks { dit: &self.dit, vae: &self.vae }
    }
}

fn networks(component: &Value) -> Networks {
    let vb = |network: &str| {
        let path = component["weights"][network].as_str().expect("a weights file");
        GoldenFile::open(path).var_builder(DType::F32)
    };
    let models = &component["models"];
    Networks {
        dit: wan::Model::new(&config(&models["dit"]), vb("dit")).unwrap(),
        vae: wan_vae::Vae::new(&config(&models["vae"]), vb("vae")).unwrap(),
        clip: clip_vision::Model::new(&config(&models["clip"]), vb("clip")).unwrap(),
    }
}

/// What one golden run asks for, read from its JSON.
struct Run {
    name: String,
    io: GoldenFile,
    settings: Value,
    sampling: Sampling,
    /// The reference frames (3, 1, H, W): one for a portrait; of several, a window takes the one at its start, and the
    /// last repeats.
    frames: Vec<Tensor>,
    audio_embeds: Vec<Tensor>,
    masks: Tensor,
}

impl Run {
    fn open(component: &Component, name: &str) -> Self {
        let io = component.file(&format!("{name}.safetensors"));
        let settings = component.json(&format!("{name}.json"));
        assert_eq!(io.metadata("config"), settings, "{name}: JSON and metadata differ");
        let apg = settings["use_apg"].as_bool().expect("use_apg").then(|| Apg {
            momentum: number(&settings["apg_momentum"]),
            norm_threshold: number(&settings["apg_norm_threshold"]),
        });
        let teacache = settings["use_teacache"].as_bool().expect("use_teacache");
        let sampling = Sampling {
            frames_per_window: count(&settings["frame_num"]),
            motion_frames: count(&settings["motion_frame"]),
            max_frames: count(&settings["max_frames_num"]),
            num_steps: count(&settings["steps"]),
            shift: number(&settings["shift"]),
            guidance: Guidance {
                text: number(&settings["text_guide_scale"]),
                audio: number(&settings["audio_guide_scale"]),
                apg,
            },
            color_correction: number(&settings["color_correction_strength"]),
            teacache: teacache.then(|| TeaCache {
                threshold: number(&settings["teacache_thresh"]),
                coefficients: TeaCache::COEFFICIENTS_480,
                warmup_steps: TeaCache::WARMUP_STEPS,
            }),
        };
        let (frames, masks) = pictures(&io, &settings);
        let audio_embeds = audio_embeds(&io, &settings);
        Self { name: name.to_owned(), io, settings, sampling, frames, audio_embeds, masks }
    }

    fn conditioning(&self, networks: &Networks) -> Conditioning {
        let lens: Vec<_> = self.audio_embeds.iter().map(|embeds| embeds.dim(0).unwrap()).collect();
        let Sampling { frames_per_window, motion_frames, max_frames, .. } = self.sampling;
        let plan = Plan::new(frames_per_window, motion_frames, &lens, max_frames).unwrap();
        let reference = |window: Window| {
            let frame = self.frames[window.start.min(self.frames.len() - 1)].clone();
            let embeds = Reference::image_embeds(&networks.clip, &frame).unwrap();
            (window.start, Reference::encode(&networks.vae, frame, embeds, frames_per_window).unwrap())
        };
        let scenes = if self.frames.len() > 1 { plan.num_windows() } else { 1 };
        Conditioning {
            references: plan.windows().take(scenes).map(reference).collect(),
            audio_embeds: self.audio_embeds.clone(),
            context: self.io.f32("in.context"),
            negative_context: Some(self.io.f32("in.context_null")),
            masks: Some(self.masks.clone()),
        }
    }

    fn noise(&self, window: usize, shape: (usize, usize, usize, usize)) -> talkie::Result<Tensor> {
        let noise = self.io.f32(&format!("w{window}.noise"));
        assert_eq!(noise.dims4().unwrap(), shape, "{}: shape of the noise", self.name);
        Ok(noise)
    }

    /// Runs the loop on the golden noise: the video (3, F, H, W) and everything recorded on the way.
    fn generate(&self, networks: &Networks) -> Made {
        let mut parts = Vec::new();
        let (generated, recorded) = trace::capture(|| {
            let mut control = Control { cancel: &Cancel::default(), progress: &mut |_| () };
            let mut sink = |part| {
                parts.push(part);
                Ok(())
            };
            let mut noise = |window, shape| self.noise(window, shape);
            let conditioning = self.conditioning(networks);
            let (networks, sampling) = (networks.generator(), &self.sampling);
            generate_windows(networks, &conditioning, sampling, &mut noise, &mut control, &mut sink).unwrap()
        });
        let video = Tensor::cat(&parts, 1).unwrap();
        assert_eq!(generated, Generated { frames: video.dim(1).unwrap(), remade: 0 });
        Made { video, recorded }
    }

    /// The same, with every window starting on the reference's motion frames instead of our own.
    fn generate_fed(&self, networks: &Networks) -> Made {
        let (parts, recorded) = trace::capture(|| {
            let mut control = Control { cancel: &Cancel::default(), progress: &mut |_| () };
            let mut noise = |window, shape| self.noise(window, shape);
            let conditioning = self.conditioning(networks);
            let mut maker = WindowMaker::new(networks.generator(), &conditioning, &self.sampling).unwrap();
            let windows: Vec<_> = maker.plan().windows().collect();
            let make = |window: Window| {
                let motion = (window.index > 0)
                    .then(|| self.io.f32(&format!("w{}.cond_frame", window.index)).squeeze(0).unwrap());
                let video = maker.make(window, motion.as_ref(), &mut noise, &mut control).unwrap();
                video.narrow(1, window.skip, window.take).unwrap()
            };
            windows.into_iter().map(make).collect::<Vec<_>>()
        });
        Made { video: Tensor::cat(&parts, 1).unwrap(), recorded }
    }
}

/// A video (3, F, H, W), and what was recorded on the way to it.
struct Made {
    video: Tensor,
    recorded: BTreeMap<String, Tensor>,
}

/// Reference frames and masks.
fn pictures(io: &GoldenFile, settings: &Value) -> (Vec<Tensor>, Tensor) {
    let frames = io.get("in.frames");
    let (num_frames, height, width, _) = frames.dims4().unwrap();
    let source = image::Size { height, width };
    let buckets: image::Buckets = config(&settings["buckets"]);
    let target = buckets.choose(source).size;
    let reference = (0..num_frames)
        .map(|i| {
            let pixels = frames.get(i).unwrap().flatten_all().unwrap().to_vec1::<u8>().unwrap();
            image::Portrait::from_rgb(source, pixels).unwrap().fit(target).to_tensor(&Device::Cpu).unwrap()
        })
        .collect();
    let persons = count(&settings["persons"]);
    let rectangle = |values: &Value| -> image::Rectangle {
        let values = values.as_array().expect("a box").iter().map(count).collect::<Vec<_>>();
        values.try_into().expect("four numbers")
    };
    let masks = match (persons, settings["bbox"].as_object()) {
        (1, _) => image::PersonMasks::one(source),
        (_, None) => image::PersonMasks::halves(source, image::DEFAULT_FACE_SCALE),
        (_, Some(boxes)) => {
            let boxes = ["person1", "person2"].map(|person| rectangle(&boxes[person]));
            image::PersonMasks::from_boxes(source, boxes).unwrap()
        }
    };
    (reference, masks.latents(target, &Device::Cpu).unwrap())
}

fn audio_embeds(io: &GoldenFile, settings: &Value) -> Vec<Tensor> {
    let persons = count(&settings["persons"]);
    let audio_embeds: Vec<_> = (1..=persons).map(|p| io.f32(&format!("in.audio_embedding_{p}"))).collect();
    for (embeds, frames) in
        audio_embeds.iter().zip(settings["audio_frames"].as_array().expect("audio_frames"))
    {
        assert_eq!(embeds.dim(0).unwrap(), count(frames));
    }
    audio_embeds
}

/// Splits `w3.step0.pass1` into 3 and `step0.pass1`.
fn window_of(name: &str) -> Option<(usize, &str)> {
    let (window, rest) = name.strip_prefix('w')?.split_once('.')?;
    Some((window.parse().ok()?, rest))
}

/// A pass that our guidance does not run, from the network itself.
fn unneeded_pass(run: &Run, networks: &Networks, window: usize, step: usize, pass: usize) -> Tensor {
    let w = |rest: &str| run.io.f32(&format!("w{window}.{rest}"));
    let dit = &networks.dit;
    let with_audio_guidance = Guidance { audio: 2.0, ..run.sampling.guidance };
    let branch = with_audio_guidance.branches()[pass];
    let prompt = if branch.has_prompt() { "in.context" } else { "in.context_null" };
    let context = dit.encode_context(&run.io.f32(prompt), &w("clip_context")).unwrap();
    let mut audio = w("audio");
    if !branch.has_audio() {
        audio = audio.narrow(0, 0, 1).unwrap().zeros_like().unwrap();
    }
    let t = timesteps(run.sampling.num_steps, run.sampling.shift)[step];
    let y = w("y").squeeze(0).unwrap();
    let latents = w(&format!("step{step}.latent_in"));
    let (audio, masks) = (dit.encode_audio(&audio).unwrap(), Some(&run.masks));
    dit.forward(&latents, &y, f64::from(t), &context, &audio, masks).unwrap()
}

/// Each window of a free run starts on the last frames of the one before, to the bit.
fn check_motion_is_carried(run: &Run, made: &Made) {
    let motion_frames = run.sampling.motion_frames;
    for window in 1..run.settings["windows"].as_array().expect("windows").len() {
        let recorded = |name: String| &made.recorded[&name];
        let before = recorded(format!("w{}.corrected", window - 1));
        let last = before.narrow(1, before.dim(1).unwrap() - motion_frames, motion_frames).unwrap();
        let error = relative_error(recorded(format!("w{window}.cond_frame")), &last);
        assert_eq!(error, 0.0, "{}: motion frames of window {window}", run.name);
    }
}

/// Compares everything the golden run holds with what we made and recorded.
fn compare(run: &Run, networks: &Networks) {
    let made = [run.generate(networks), run.generate_fed(networks)];
    check_motion_is_carried(run, &made[0]);
    let Run { io, name: run_name, settings, sampling, .. } = run;
    let num_windows = settings["windows"].as_array().expect("windows").len();
    let apg_calls = made[0].recorded.keys().filter(|k| k.starts_with("apg.")).count() / num_windows;
    let ts = timesteps(sampling.num_steps, sampling.shift);
    for name in io.names() {
        if name.starts_with("in.") {
            continue;
        }
        let expected = io.f32(&name);
        if name == "color_reference" {
            let ours = run.frames[0].unsqueeze(0).unwrap();
            check("pipeline", "f32", &format!("{run_name} {name}"), &ours, &expected, TOLERANCES[0]);
            continue;
        }
        if name == "out.video" {
            compare_video(run_name, &made, &expected, sampling);
            continue;
        }
        let (window, rest) = window_of(&name).unwrap_or_else(|| panic!("{run_name}: what is `{name}`?"));
        let recorded = &made[usize::from(window > 1)].recorded;
        let step_of = |rest: &str| rest.strip_prefix("step")?.split_once('.')?.0.parse::<usize>().ok();
        // What belongs to the reference frame is encoded once, so an earlier window may have recorded it.
        let recorded_for =
            |rest: &str| (0..=window).rev().find_map(|w| recorded.get(&format!("w{w}.{rest}"))).cloned();
        let ours = if rest == "noise" || rest.starts_with("motion_noise.") {
            continue; // random numbers of the reference: the first is our input, nothing reads the second
        } else if rest == "ref_target_masks" {
            Some(run.masks.clone())
        } else if let Some(call) = rest.strip_prefix("apg.") {
            let call = window * apg_calls + call.parse::<usize>().expect("apg.N");
            recorded.get(&format!("apg.{call}")).cloned()
        } else if let (Some(step), true) = (step_of(rest), rest.ends_with(".t")) {
            Some(Tensor::new(&[ts[step]], &Device::Cpu).unwrap())
        } else if let Some(step) = step_of(rest) {
            // The reference runs every pass, even one that is multiplied by zero.
            let pass = rest.split_once(".pass").and_then(|(_, pass)| pass.parse::<usize>().ok());
            match (recorded.get(&name), pass) {
                (None, Some(pass)) if pass >= sampling.guidance.branches().len() => {
                    Some(unneeded_pass(run, networks, window, step, pass))
                }
                (ours, _) => ours.cloned(),
            }
        } else {
            recorded_for(rest)
        };
        let ours = ours.unwrap_or_else(|| panic!("{run_name}: `{name}` was not recorded"));
        // The reference keeps a batch of one where we have none.
        let ours = match ours.rank() < expected.rank() {
            true => ours.unsqueeze(0).unwrap(),
            false => ours,
        };
        let (network, tolerance) = row(window);
        check(network, "f32", &format!("{run_name} {name}"), &ours, &expected, tolerance);
    }
}

fn compare_video(run: &str, made: &[Made; 2], expected: &Tensor, sampling: &Sampling) {
    for made in made {
        assert_eq!(made.video.dims(), expected.dims(), "{run}: shape of the video");
    }
    let frames = expected.dim(1).unwrap();
    let stride = sampling.frames_per_window - sampling.motion_frames;
    let (mut from, mut to, mut window) = (0, sampling.frames_per_window, 0);
    while from < frames {
        let len = to.min(frames) - from;
        let part = |video: &Tensor| video.narrow(1, from, len).unwrap();
        let (network, tolerance) = row(window);
        let ours = &made[usize::from(window > 1)].video;
        let name = format!("{run} out.video[{from}..{}]", from + len);
        check(network, "f32", &name, &part(ours), &part(expected), tolerance);
        (from, to, window) = (to, to + stride, window + 1);
    }
}

#[test]
fn every_golden_run() {
    let component = Component::open("pipeline");
    let config = component.config();
    let networks = networks(&config);
    for name in config["runs"].as_object().expect("runs").keys() {
        compare(&Run::open(&component, name), &networks);
    }
    component.finish();
}

/// The golden run of the most steps: the first and the last step hardly depend on the shift.
fn longest_run(component: &Component, config: &Value) -> Run {
    let runs = config["runs"].as_object().expect("runs").keys().map(|name| Run::open(component, name));
    runs.max_by_key(|run| run.sampling.num_steps).expect("a run")
}

/// A golden run, changed by `change`, must leave the tolerance.
fn noticed(change: impl FnOnce(&mut Run)) {
    let component = Component::open("pipeline");
    let config = component.config();
    let mut run = longest_run(&component, &config);
    change(&mut run);
    let video = run.generate(&networks(&config)).video;
    let expected = run.io.f32("out.video");
    let frames = video.dim(1).unwrap().min(expected.dim(1).unwrap());
    let part = |video: &Tensor| video.narrow(1, 0, frames).unwrap();
    assert!(relative_error(&part(&video), &part(&expected)) > TOLERANCES[0]);
}

#[test]
fn a_wrong_shift_is_noticed() {
    noticed(|run| run.sampling.shift *= 2.0);
}

#[test]
fn a_missing_colour_match_is_noticed() {
    noticed(|run| run.sampling.color_correction = f64::from(run.sampling.color_correction == 0.0));
}

#[test]
fn an_audio_one_frame_late_is_noticed() {
    noticed(|run| {
        for embeds in &mut run.audio_embeds {
            let rest = embeds.narrow(0, 0, embeds.dim(0).unwrap() - 1).unwrap();
            *embeds = Tensor::cat(&[&embeds.narrow(0, 0, 1).unwrap(), &rest], 0).unwrap();
        }
    });
}

#[test]
fn a_cancelled_generation_ends_with_that_error() {
    let component = Component::open("pipeline");
    let config = component.config();
    let run = longest_run(&component, &config);
    let cancel = Cancel::default();
    let mut steps = 0;
    let mut progress = |p: talkie::pipeline::Progress| {
        steps += usize::from(p.stage == talkie::pipeline::Stage::Denoise);
        cancel.cancel();
    };
    let mut control = Control { cancel: &cancel, progress: &mut progress };
    let mut noise = |w: usize, _| Ok(run.io.f32(&format!("w{w}.noise")));
    let networks = networks(&config);
    let result = generate_windows(
        networks.generator(),
        &run.conditioning(&networks),
        &run.sampling,
        &mut noise,
        &mut control,
        &mut |_| panic!("no window was finished"),
    );
    assert_eq!(result.unwrap_err().kind(), talkie::ErrorKind::Cancelled);
    assert_eq!(steps, 1, "the step after the cancellation does not start");
}

/// Noise that is not a number unless plain kernels are asked for, as from a kernel that is broken.
fn broken_noise(run: &Run, window: usize, shape: (usize, usize, usize, usize)) -> talkie::Result<Tensor> {
    let noise = run.noise(window, shape)?;
    Ok(if kernels::are_plain() { noise } else { (noise * f64::NAN)? })
}

#[test]
fn a_window_that_is_not_finite_is_made_again_on_plain_kernels() {
    let component = Component::open("pipeline");
    let config = component.config();
    let (networks, run) = (networks(&config), longest_run(&component, &config));
    let expected = run.generate(&networks).video;
    let mut parts = Vec::new();
    let mut steps = Vec::new();
    let mut control = Control {
        cancel: &Cancel::default(),
        progress: &mut |p| steps.extend((p.stage == talkie::pipeline::Stage::Denoise).then_some(p.window)),
    };
    let generated = generate_windows(
        networks.generator(),
        &run.conditioning(&networks),
        &run.sampling,
        &mut |window, shape| broken_noise(&run, window, shape),
        &mut control,
        &mut |part| {
            parts.push(part);
            Ok(())
        },
    )
    .unwrap();
    let windows = run.settings["windows"].as_array().expect("windows").len();
    assert_eq!(generated, Generated { frames: expected.dim(1).unwrap(), remade: windows });
    assert_eq!(steps.len(), 2 * windows * run.sampling.num_steps, "every window is made twice, no more");
    let error = relative_error(&Tensor::cat(&parts, 1).unwrap(), &expected);
    assert!(error > 0.0 && error < TOLERANCES[1], "plain kernels make the same video: {error:e}");
    assert!(!kernels::are_plain(), "the next video has its kernels back");
}

#[test]
fn a_window_that_stays_broken_is_an_error_after_two_attempts() {
    let component = Component::open("pipeline");
    let config = component.config();
    let run = longest_run(&component, &config);
    let attempt = |networks: &Networks, factor: f64| {
        let mut attempts = 0;
        let mut control = Control { cancel: &Cancel::default(), progress: &mut |_| () };
        let mut noise = |window, shape| {
            attempts += 1;
            Ok((run.noise(window, shape)? * factor)?)
        };
        let (conditioning, sampling) = (run.conditioning(networks), &run.sampling);
        let sink = &mut |_| panic!("a broken window was given out");
        let networks = networks.generator();
        let error = generate_windows(networks, &conditioning, sampling, &mut noise, &mut control, sink);
        (error.unwrap_err(), attempts)
    };
    let (error, attempts) = attempt(&networks(&config), f64::NAN);
    assert_eq!((error.kind(), attempts), (talkie::ErrorKind::Numeric, 2));
    assert!(error.to_string().contains("window 1 of"), "{error}");

    // A decoder that sees nothing but black.
    let mut networks = networks(&config);
    let weights = GoldenFile::open(config["weights"]["vae"].as_str().expect("a weights file"));
    let mut tensors: std::collections::HashMap<String, Tensor> =
        weights.names().into_iter().map(|name| (name.clone(), weights.get(&name))).collect();
    let bias = tensors.get_mut("decoder.head.2.bias").expect("the last bias");
    *bias = (&*bias - 1e3).unwrap();
    let vb = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    networks.vae = wan_vae::Vae::new(&self::config(&config["models"]["vae"]), vb).unwrap();
    let (error, attempts) = attempt(&networks, 1.0);
    assert_eq!((error.kind(), attempts), (talkie::ErrorKind::Numeric, 2));
    assert!(error.to_string().contains("is black"), "{error}");
}
