//! Voices against the reference: resampling, loudness, two speakers, audio windows.

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use talkie::media::audio::{Speakers, VOICE_RATE_HZ, integrated_lufs, k_weighting, normalize_to, resample};
use talkie::pipeline::windows;

use crate::support::{Component, GoldenFile, check, relative_error};

const TOLERANCE: f64 = 1e-4;
/// Our resampler is another filter than soxr's, designed to the same bands.
const RESAMPLE_TOLERANCE: f64 = 1e-3;
/// The first and last two samples of a resampled signal are the edge of the filter.
const EDGE_TOLERANCE: f64 = 1e-2;
const EDGE: usize = 2;

#[test]
fn everything() {
    let golden = Component::open("audio");
    let config = golden.config()["files"].clone();
    let facts = golden.json("facts.json");
    let (file, config_of_windows) = (golden.file("audio.safetensors"), &config["windows.safetensors"]);
    let config = &config["audio.safetensors"];
    assert_eq!(config["sample_rate"].as_u64(), Some(u64::from(VOICE_RATE_HZ)));
    k_weights(&file);
    loudness(&file, config, &facts);
    resampling(&file, config);
    speakers(&file, config);
    frames(&facts);
    audio_windows(&golden.file("windows.safetensors"), config_of_windows);
    golden.finish();
}

fn tensor(values: &[f32]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

fn k_weights(file: &GoldenFile) {
    for (stage, name) in k_weighting(VOICE_RATE_HZ).iter().zip(["high_shelf", "high_pass"]) {
        for (ours, part) in [(stage.b, "b"), (stage.a, "a")] {
            let name = format!("kweight16k.{name}.{part}");
            check(
                "loudness",
                "f64",
                &name,
                &Tensor::new(&ours, &Device::Cpu).unwrap(),
                &file.get(&name),
                1e-12,
            );
        }
    }
}

fn loudness(file: &GoldenFile, config: &Value, facts: &Value) {
    let target = config["target_lufs"].as_f64().unwrap();
    for (name, samples) in config["samples"].as_object().unwrap() {
        let mut signal = file.vec_f32(&format!("{name}.in"));
        assert_eq!(Some(signal.len() as u64), samples.as_u64());
        let expected = file.get(&format!("{name}.loudness")).to_scalar::<f64>().unwrap();
        let ours = integrated_lufs(&signal, VOICE_RATE_HZ);
        match expected.is_finite() {
            true => check(
                "loudness",
                "f64",
                &format!("{name}.loudness"),
                &Tensor::new(ours, &Device::Cpu).unwrap(),
                &Tensor::new(expected, &Device::Cpu).unwrap(),
                TOLERANCE,
            ),
            false => assert_eq!(ours, expected, "{name}"),
        }
        let before = signal.clone();
        normalize_to(&mut signal, VOICE_RATE_HZ, target);
        let out = file.f32(&format!("{name}.out"));
        check("loudness", "f32", &format!("{name}.out"), &tensor(&signal), &out, TOLERANCE);

        let fact = &facts[name];
        assert_eq!(Some(signal == before), fact["unchanged"].as_bool(), "{name}");
        let peak = signal.iter().fold(0f64, |m, &v| m.max(f64::from(v).abs()));
        assert!((peak - fact["max_abs"].as_f64().unwrap()).abs() <= TOLERANCE * peak, "{name}");
        if let Some(loudness) = fact["out_loudness"].as_f64() {
            assert!((integrated_lufs(&signal, VOICE_RATE_HZ) - loudness).abs() < TOLERANCE, "{name}");
        }
    }
}

/// Mean of the channels of (samples, channels).
fn mono(xs: &Tensor) -> Vec<f32> {
    let (_, channels) = xs.dims2().unwrap();
    let flat: Vec<f32> = xs.flatten_all().unwrap().to_vec1().unwrap();
    flat.chunks(channels).map(|frame| frame.iter().sum::<f32>() / channels as f32).collect()
}

fn resampling(file: &GoldenFile, config: &Value) {
    let mut rates = Vec::new();
    for name in file.names() {
        let (rate, expected) =
            if let Some(rate) = name.strip_prefix("resample.").and_then(|n| n.strip_suffix(".stereo")) {
                rates.push(rate.parse::<u64>().unwrap());
                (rate.parse().unwrap(), format!("resample.{rate}.mono16k"))
            } else if let Some(stem) = name.strip_prefix("decode.").and_then(|n| n.strip_suffix(".raw")) {
                (config["native_rate_of_decode"].as_u64().unwrap() as u32, format!("decode.{stem}.16k"))
            } else {
                continue;
            };
        let signal = mono(&file.f32(&name));
        let ours = resample(&signal, rate, VOICE_RATE_HZ);
        // soxr rounds the number of samples, librosa then fills up with zeros to what we and it round up to.
        let [samples, from, to] = [signal.len() as u64, u64::from(rate), u64::from(VOICE_RATE_HZ)];
        let len = ((2 * samples * to + from) / (2 * from)) as usize;
        let expected_values = file.f32(&expected);
        assert!([len, ours.len()].contains(&expected_values.elem_count()), "{expected}: length");
        let (ours, expected_values) = (tensor(&ours[..len]), expected_values.narrow(0, 0, len).unwrap());
        check("resampler, ends", "f32", &expected, &ours, &expected_values, EDGE_TOLERANCE);
        let inner = |xs: &Tensor| xs.narrow(0, EDGE, xs.dims1().unwrap() - 2 * EDGE).unwrap();
        check("resampler", "f32", &expected, &inner(&ours), &inner(&expected_values), RESAMPLE_TOLERANCE);
        // The comparison would notice a shift by a quarter of an input sample.
        let shifted: Vec<f32> = signal.windows(2).map(|w| 0.75 * w[0] + 0.25 * w[1]).chain([0.0]).collect();
        let shifted = tensor(&resample(&shifted, rate, VOICE_RATE_HZ)[..len]);
        assert!(relative_error(&inner(&shifted), &inner(&expected_values)) > RESAMPLE_TOLERANCE, "{name}");
    }
    for rate in config["resample_native_rates"].as_array().unwrap() {
        assert!(rates.contains(&rate.as_u64().unwrap()), "{rate} Hz is configured but not there");
    }
}

/// The two names in `ab` or `none_b`: each is one of `sources` or `none`.
fn voices(names: &str, sources: &[String]) -> [Option<String>; 2] {
    let known = |name: &str| name == "none" || sources.iter().any(|s| s == name);
    let pair = match names.split_once('_') {
        Some(pair) => pair,
        None => (1..names.len()).map(|at| names.split_at(at)).find(|(a, b)| known(a) && known(b)).unwrap(),
    };
    assert!(known(pair.0) && known(pair.1), "{names}");
    [pair.0, pair.1].map(|name| (name != "none").then(|| name.to_owned()))
}

fn speakers(file: &GoldenFile, config: &Value) {
    let target = config["target_lufs"].as_f64().unwrap();
    let sources: Vec<String> =
        file.names().iter().filter_map(|n| n.strip_prefix("multi.src.").map(str::to_owned)).collect();
    let source = |name: &String| {
        let mut signal = file.vec_f32(&format!("multi.src.{name}"));
        normalize_to(&mut signal, VOICE_RATE_HZ, target);
        signal
    };
    for name in file.names() {
        let Some(case) = name.strip_prefix("multi.").and_then(|n| n.strip_suffix(".sum")) else { continue };
        let (mode, names) = case.split_once('_').unwrap();
        let mode: Speakers = serde_json::from_value(Value::from(mode)).unwrap();
        let [first, second] = voices(names, &sources).map(|name| name.as_ref().map(source));
        let [first, second] = mode.assemble(first.as_deref(), second.as_deref());
        let sum: Vec<f32> = first.iter().zip(&second).map(|(a, b)| a + b).collect();
        for (part, ours) in [("1", first), ("2", second), ("sum", sum)] {
            let name = format!("multi.{case}.{part}");
            check("two speakers", "f32", &name, &tensor(&ours), &file.f32(&name), TOLERANCE);
        }
    }
}

fn frames(facts: &Value) {
    for (samples, frames) in facts["frames_for_samples"].as_object().unwrap() {
        assert_eq!(
            Some(windows::whole_frames(samples.parse().unwrap()) as u64),
            frames.as_u64(),
            "{samples}"
        );
    }
}

fn audio_windows(file: &GoldenFile, config: &Value) {
    let frames = config["frame_num"].as_u64().unwrap() as usize;
    let embedding = file.f32("embedding");
    let expected = ["audio_frames", "blocks", "channels"].map(|key| config[key].as_u64().unwrap() as usize);
    assert_eq!(embedding.dims(), expected);
    for start in config["starts"].as_array().unwrap() {
        let start = start.as_u64().unwrap() as usize;
        let extended = windows::mirror_tail(&embedding, start + frames).unwrap();
        let name = format!("start_{start}.extended");
        match file.has(&name) {
            true => check("audio windows", "f32", &name, &extended, &file.f32(&name), 0.0),
            false => assert_eq!(extended.dims(), embedding.dims()),
        }
        let indices = windows::indices(start, frames, extended.dim(0).unwrap());
        let indices: Vec<i64> = indices.as_flattened().iter().map(|&i| i as i64).collect();
        let expected = file.get(&format!("start_{start}.indices"));
        assert_eq!(expected.dtype(), DType::I64);
        let expected: Vec<i64> = expected.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(indices, expected, "start {start}");
        let name = format!("start_{start}.windows");
        let window = windows::gather(&[extended], start, frames).unwrap();
        check("audio windows", "f32", &name, &window, &file.f32(&name), 0.0);
    }
}
