//! `handler bench`: how long each stage takes on this machine, how much of what the machine can do that is, and
//! whether its device computes what the processor computes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::Device;
use clap::ValueEnum;
use serde_json::{Value, json};
use talkie::registry::{ModelSpec, Registry};

use super::print_line;
use crate::bench::{self, Cut, Measured, Roofline, Stage, parity};
use crate::generate::{DeviceChoice, open_device};
use crate::job::{Code, JobError};

/// Arguments of the verb.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The model whose stages are timed
    #[arg(long, env = "BENCH_MODEL", default_value = "tiny")]
    model: String,
    /// Where the weights come from
    #[arg(long, env = "BENCH_WEIGHTS", value_enum, default_value_t)]
    weights: WeightsChoice,
    /// Where the networks run
    #[arg(long, env = "TALKIE_DEVICE", value_enum, default_value_t)]
    device: DeviceChoice,
    /// Only this stage; may be repeated
    #[arg(long = "stage", env = "BENCH_STAGES", value_delimiter = ',', value_name = "NAME")]
    stages: Vec<String>,
    /// At most this many layers of each transformer; the estimate scales them up again
    #[arg(long, env = "BENCH_LAYERS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    layers: Option<u32>,
    /// Frames of a window, 4n+1, in place of the model's
    #[arg(long, env = "BENCH_FRAMES", value_name = "N", value_parser = frames)]
    frames: Option<u32>,
    /// Timed runs of each stage, after one that is not counted
    #[arg(long, env = "BENCH_RUNS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// One line of JSON per stage in place of a table
    #[arg(long, env = "BENCH_JSON")]
    json: bool,
    /// Print what each stage does, as JSON for tests/benches/peer.py, and time nothing
    #[arg(long, env = "BENCH_DESCRIBE", conflicts_with = "parity")]
    describe: bool,
    /// Compare the device with the processor, kernel by kernel and network by network, and time nothing
    #[arg(long, env = "BENCH_PARITY")]
    parity: bool,
    /// Compare with the reference's outputs in this folder as well (tests/golden)
    #[arg(long, env = "TALKIE_GOLDENS", value_name = "DIR", requires = "parity")]
    goldens: Option<PathBuf>,
}

/// Where the weights of the timed networks come from.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum WeightsChoice {
    /// Drawn from a seed: nothing is downloaded, and speed does not depend on the values.
    #[default]
    Random,
}

fn frames(text: &str) -> Result<u32, String> {
    let frames: u32 = text.parse().map_err(|_| "expected a number of frames".to_string())?;
    if frames % 4 == 1 { Ok(frames) } else { Err("expected 4n+1 frames, for example 81".to_string()) }
}

/// Times the stages and prints each as soon as it is done; or compares.
pub(super) fn run(args: &Args) -> Result<(), JobError> {
    let WeightsChoice::Random = args.weights;
    let device = open_device(args.device, |said| tracing::warn!("{said}"))?;
    if args.parity {
        return compare(args, &device);
    }
    let registry = Registry::built_in()?;
    let model = registry.model(&args.model)?;
    let cut = Cut { layers: args.layers.map(|n| n as usize), frames: args.frames.map(|n| n as usize) };
    let stages = chosen(bench::stages(model, &device, cut)?, &args.stages)?;
    if args.describe {
        let stages: Vec<Value> = stages.iter().map(describe).collect();
        let (threads, device) = (candle_core::utils::get_num_threads(), name_of(&device));
        return print_line(&json!({"threads": threads, "device": device, "stages": stages}).to_string());
    }
    time(args, (model, cut), stages, &device)
}

fn time(
    args: &Args,
    (model, cut): (&ModelSpec, Cut),
    stages: Vec<Stage>,
    device: &Device,
) -> Result<(), JobError> {
    let roofline = Roofline::measure(device)?;
    let (peak, memory) = (roofline.flops / 1e12, roofline.bytes / 1e9);
    print_line(&match args.json {
        true => json!({"device": name_of(device), "peak_tflops": peak, "peak_gbps": memory}).to_string(),
        false => {
            let dtype = talkie::device::compute_dtype(device).as_str();
            let measured = format!("{peak:.2} TFLOP/s ({dtype} product), {memory:.1} GB/s (copy)");
            let heads = ("stage", "shape", "median ms", "best ms", "TFLOP/s", "GB/s", "roofline");
            let (a, b, c, d, e, f, g) = heads;
            format!(
                "{}: {measured}\n{a:<18} {b:<32} {c:>11} {d:>11} {e:>8} {f:>8} {g:>8}  per second",
                name_of(device)
            )
        }
    })?;
    let mut medians = BTreeMap::new();
    for stage in stages {
        let measured = bench::measure(&mut stage.prepare(device)?, args.runs as usize, device)?;
        medians.insert(stage.name, measured.median());
        print_line(&match args.json {
            true => as_json(&stage, &measured, &roofline).to_string(),
            false => as_row(&stage, &measured, &roofline),
        })?;
    }
    let Some((work, video)) = bench::estimate(model, cut, &medians)? else { return Ok(()) };
    let ratio = work / video;
    print_line(&match args.json {
        true => json!({"stage": "estimate", "window_s": work, "video_s": video, "ratio": ratio}).to_string(),
        false => format!(
            "estimate: {work:.2} s for a window of {video:.2} s of new video (4 steps of one pass, encode, \
             decode): {ratio:.2} s per second of video"
        ),
    })
}

/// What was achieved: TFLOP/s, GB/s, and the share of the least time that this machine allows; 0 for what is not
/// made of matrix products.
fn achieved(measured: &Measured, roofline: &Roofline) -> (f64, f64, f64) {
    let seconds = measured.median() / 1e3;
    let sum = |of: fn(&talkie::nn::work::Operation) -> f64| measured.operations.iter().map(of).sum::<f64>();
    let (flops, bytes) = (sum(|done| done.flops), sum(|done| done.bytes));
    (flops / seconds / 1e12, bytes / seconds / 1e9, roofline.seconds(&measured.operations) / seconds)
}

fn as_json(stage: &Stage, measured: &Measured, roofline: &Roofline) -> Value {
    let (tflops, gbps, share) = achieved(measured, roofline);
    json!({
        "stage": stage.name,
        "dtype": stage.dtype.as_str(),
        "median_ms": measured.median(),
        "best_ms": measured.times[0],
        "runs": measured.times.len(),
        "tflops": tflops,
        "gbps": gbps,
        "roofline_share": share,
    })
}

fn as_row(stage: &Stage, measured: &Measured, roofline: &Roofline) -> String {
    let (tflops, gbps, share) = achieved(measured, roofline);
    let (name, shape, median, best) = (stage.name, stage.shape(), measured.median(), measured.times[0]);
    let (amount, unit) = stage.amount();
    let rate = amount / median * 1e3;
    let share = format!("{:.0} %", 100.0 * share);
    format!(
        "{name:<18} {shape:<32} {median:>11.2} {best:>11.2} {tflops:>8.3} {gbps:>8.1} {share:>8}  {rate:.1} {unit}"
    )
}

/// Prints each comparison; fails where one is beyond its tolerance.
fn compare(args: &Args, device: &Device) -> Result<(), JobError> {
    if !args.json {
        print_line(&format!("{:<44} {:<6} {:>10} {:>10}", "on this device", "dtype", "error", "tolerance"))?;
    }
    let mut failed = Vec::new();
    parity::run(device, args.goldens.as_deref(), &mut |found| {
        let parity::Comparison { name, dtype, error, tolerance } = found;
        if !found.holds() {
            failed.push(name.clone());
        }
        let dtype = dtype.as_str();
        let line = match args.json {
            true => json!({"name": name, "dtype": dtype, "error": error, "tolerance": tolerance, "ok": found.holds()})
                .to_string(),
            false => {
                let verdict = if found.holds() { "" } else { "  TOO LARGE" };
                format!("{name:<44} {dtype:<6} {error:>10.1e} {tolerance:>10.0e}{verdict}")
            }
        };
        print_line(&line)
    })?;
    if failed.is_empty() {
        return Ok(());
    }
    let message = format!(
        "{} results of this device differ from what is expected: {}",
        failed.len(),
        failed.join(", ")
    );
    Err(JobError::new(Code::NumericFailure, message))
}

/// The stages called `names`, in the order of the bench; all of them without names.
fn chosen(stages: Vec<Stage>, names: &[String]) -> Result<Vec<Stage>, JobError> {
    let known: Vec<&str> = stages.iter().map(|stage| stage.name).collect();
    if let Some(stray) = names.iter().find(|name| !known.contains(&name.as_str())) {
        let message = format!("there is no stage `{stray}`, expected one of {}", known.join(", "));
        return Err(JobError::new(Code::InvalidInput, message));
    }
    let wanted = |stage: &Stage| names.is_empty() || names.iter().any(|name| name == stage.name);
    Ok(stages.into_iter().filter(wanted).collect())
}

fn describe(stage: &Stage) -> Value {
    let mut value = json!(stage);
    value["shape_text"] = stage.shape().into();
    value["dtype"] = stage.dtype.as_str().into();
    value
}

fn name_of(device: &Device) -> &'static str {
    if device.is_cpu() { "cpu" } else { "cuda" }
}

#[cfg(test)]
mod tests {
    use talkie::nn::work::Operation;

    use super::*;

    #[test]
    fn a_stage_that_does_not_exist_is_named_with_those_that_do() {
        let registry = Registry::built_in().unwrap();
        let stages = || bench::stages(registry.model("tiny").unwrap(), &Device::Cpu, Cut::default()).unwrap();
        let error = chosen(stages(), &["vae_decod".to_string()]).unwrap_err();
        assert!(error.message.contains("`vae_decod`") && error.message.contains("vae_decode, "), "{error:?}");
        assert_eq!(chosen(stages(), &["clip".to_string()]).unwrap().len(), 1);
        assert_eq!(chosen(stages(), &[]).unwrap().len(), stages().len());
    }

    #[test]
    fn what_was_achieved_is_set_against_the_roofline() {
        let operations = vec![Operation { flops: 4e12, bytes: 1e9 }, Operation { flops: 0.0, bytes: 3e9 }];
        let measured = Measured { times: vec![2000.0], operations };
        let roofline = Roofline { flops: 8e12, bytes: 6e9 };
        assert_eq!(achieved(&measured, &roofline), (2.0, 2.0, 0.5));
    }

    #[test]
    fn frames_are_one_more_than_a_multiple_of_four() {
        assert_eq!(frames("81"), Ok(81));
        assert!(frames("80").is_err() && frames("many").is_err());
    }
}
