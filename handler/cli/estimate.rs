//! `handler estimate`: what a request will take, without making it. No weight is read.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use talkie::device::{self, Processor};
use talkie::pipeline::{Activations, Budget, Extent, MemoryPlan, Plan, Settings, Weights, num_frames};
use talkie::prepared::Selection;
use talkie::registry::ModelSpec;
use talkie::request::FPS;

use super::flags;
use super::generate::{Generation, Screen};
use super::install::runtime;
use crate::cards::{CARDS, PRICE_SOURCE, PRICES_READ, Work};
use crate::cold_start::{COLD_START, LastColdStart};
use crate::config::Config;
use crate::generate::{Model, open_device};
use crate::interrupt::Interrupt;
use crate::job::JobError;
use crate::models::Installation;
use crate::pace::{self, PACES, Paces};
use crate::storage::spool::default_spool;

/// How fast weights are taken to be loaded until a cold start has been measured, in bytes a second.
const PLANNED_READ_RATE: f64 = 1e9;
/// Rows and columns of the product that this machine's speed is measured by, and how often it is made.
const PROBE_DIM: usize = 768;
const PROBE_RUNS: u32 = 3;

/// Flags of the verb: those of `generate`, of which output, thumbnail and quiet have no effect.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    #[command(flatten)]
    request: flags::Args,
    /// Folder in which workers keep what they have measured [default: /runpod-volume/spool, else /workspace/spool,
    /// else the user's cache folder]
    #[arg(long, env = "SPOOL_PATH", value_name = "DIR")]
    spool_path: Option<PathBuf>,
}

/// What the request will take, as JSON, and a table of it on standard error where a person reads that.
pub(super) fn run(args: &Args, config: &Config) -> Result<Value, JobError> {
    let interrupt = Interrupt::listen(true)?;
    let generation = Generation { args: &args.request, config, interrupt: &interrupt };
    let mut screen = Screen::new(true, Instant::now());
    let (mut request, mut notes) = args.request.request(config.limits, &screen.display)?;
    let speakers = if request.audio_2.is_some() { 2 } else { 1 };
    let (hub, models_file) = (&config.hub, args.request.models_file.as_deref());
    let model = Model::choose(request.model.as_deref(), models_file, hub, speakers)?;
    notes.extend(model.stands_in.then(|| model.stand_in_warning(hub.storage())));
    let settings = Settings::resolve(&request, &model.spec)?;
    let (inputs, mut heard) = generation.inputs(&mut request, &mut screen)?;
    notes.append(&mut heard);
    let extent = Extent {
        size: settings.video_size(inputs.portrait.size()),
        frames: num_frames(&inputs, &settings),
        persons: speakers,
    };
    let spool = args.spool_path.clone().filter(|path| !path.as_os_str().is_empty());
    let spool = spool
        .unwrap_or_else(|| default_spool(|name| std::env::var_os(name).map(PathBuf::from), Path::new("/")));

    let spec = &model.spec;
    let sizes = Sizes::of(spec, &settings, extent)?;
    let kind = pace::kind(args.request.device, &spec.name, &request, &settings.sampling);
    let paced = Paces::at(spool.join(PACES)).of(&kind);
    let device = open_device(args.request.device, |_| ())?;
    let machine = machine(spec, &settings, extent, &sizes, &device, config.memory_limit, paced)?;
    let gpu = Needs::of(spec, &settings, extent, Processor::Gpu)?;
    let cards: Vec<Value> = CARDS
        .iter()
        .map(|card| {
            let seconds = card.seconds(&sizes.work);
            let usd = seconds * card.usd_per_second;
            json!({
                "name": card.name,
                "pool": card.pool,
                "memory_bytes": card.memory_bytes,
                "memory": gpu.fit(card.budget()),
                "seconds": round(seconds),
                "seconds_per_second_of_video": round(seconds / sizes.duration_s()),
                "usd": round(usd),
                "usd_per_second_of_video": round(usd / sizes.duration_s()),
                "basis": "planned",
            })
        })
        .collect();
    let selection = Selection { spec, storage: hub.storage(), speakers, loras: &settings.loras };
    let installation = runtime()?.block_on(Installation::of(&selection, hub))?;
    let estimate = json!({
        "model": spec.name,
        "size": request.size.as_str(),
        "preset": request.preset.map(|preset| preset.as_str()),
        "width": extent.size.width,
        "height": extent.size.height,
        "frames": extent.frames,
        "duration_s": sizes.duration_s(),
        "windows": sizes.windows,
        "frames_per_window": settings.sampling.frames_per_window,
        "steps": settings.sampling.num_steps,
        "passes": sizes.passes,
        "forwards": sizes.forwards(),
        "tokens": sizes.tokens,
        "flops": {"forward": sizes.forward, "dit": sizes.work.dit, "vae": sizes.work.vae},
        "weights": {
            "download_bytes": installation.bytes_to_fetch(),
            "files_of_unknown_size": installation.unknown_sizes(),
            "read_bytes": installation.bytes_to_read(),
            "device_bytes": gpu.weights.total(),
        },
        "cold_start": cold_start(installation.bytes_to_read(), &spool),
        "machine": machine,
        "cards": cards,
        "prices": {"source": PRICE_SOURCE, "read": PRICES_READ},
        "notes": notes,
    });
    if io::stderr().is_terminal() || io::stdout().is_terminal() {
        eprint!("{}", table(&estimate));
    }
    Ok(estimate)
}

/// The sizes that follow from a request.
struct Sizes {
    extent: Extent,
    windows: usize,
    steps: usize,
    passes: usize,
    tokens: usize,
    /// Operations of one pass.
    forward: f64,
    work: Work,
}

impl Sizes {
    fn of(spec: &ModelSpec, settings: &Settings, extent: Extent) -> Result<Self, JobError> {
        let sampling = &settings.sampling;
        let (frames, motion) = (sampling.frames_per_window, sampling.motion_frames);
        let windows = Plan::new(frames, motion, &[extent.frames], extent.frames)?.num_windows();
        let (vae, size) = (&spec.vae.config, extent.size);
        let (stride, chunk) = (vae.spatial_stride(), vae.temporal_stride());
        let latents = ((frames - 1) / chunk + 1, size.height / stride, size.width / stride);
        let tokens = spec.dit.config.tokens(latents);
        let forward = spec.dit.config.forward_flops(tokens, spec.image_encoder.config.rows());
        let passes = sampling.guidance.branches().len();
        let chunks = |frames: usize| ((frames - 1) / chunk + 1) as f64;
        let encode = vae.encode_cost(size.height, size.width).flops;
        let decode = vae.decode_cost(size.height, size.width).flops;
        // The portrait once, the motion frames of every window but the first, and every window's frames.
        let encoded = chunks(frames) + (windows - 1) as f64 * chunks(motion);
        let work = Work {
            dit: forward * (windows * sampling.num_steps * passes) as f64,
            vae: encode * encoded + decode * windows as f64 * chunks(frames),
        };
        Ok(Self { extent, windows, steps: sampling.num_steps, passes, tokens, forward, work })
    }

    fn forwards(&self) -> usize {
        self.windows * self.steps * self.passes
    }

    fn duration_s(&self) -> f64 {
        self.extent.frames as f64 / f64::from(FPS)
    }
}

/// Bytes that a video needs on one kind of processor.
pub(super) struct Needs {
    pub(super) weights: Weights,
    activations: Activations,
}

impl Needs {
    pub(super) fn of(
        spec: &ModelSpec,
        settings: &Settings,
        extent: Extent,
        on: Processor,
    ) -> Result<Self, JobError> {
        Ok(Self { weights: Weights::of(spec, on)?, activations: Activations::of(spec, settings, extent, on) })
    }

    /// How they fit, or why they do not.
    pub(super) fn fit(&self, budget: Budget) -> Value {
        let Self { weights, activations } = *self;
        match MemoryPlan::choose(weights, activations, budget) {
            Ok(plan) => json!({
                "rung": plan.rung().as_str(),
                "device_bytes": plan.device_bytes,
                "host_bytes": plan.host_bytes,
                "streamed_blocks": weights.blocks - plan.resident_blocks,
                "weight_bytes": weights.total(),
                "activation_bytes": activations.most(),
                "usable_bytes": budget.device,
            }),
            Err(e) => json!({"rung": "refused", "error": JobError::from(e), "usable_bytes": budget.device}),
        }
    }
}

/// The same on this machine, at the pace of past jobs where there is one.
fn machine(
    spec: &ModelSpec,
    settings: &Settings,
    extent: Extent,
    sizes: &Sizes,
    device: &Device,
    limit: Option<u64>,
    paced: Option<Duration>,
) -> Result<Value, JobError> {
    let needs = Needs::of(spec, settings, extent, Processor::of(device))?;
    let (seconds, basis) = match paced {
        Some(per_window) => (per_window.as_secs_f64() * sizes.windows as f64, "measured"),
        None => {
            let rate = product_rate(device)?;
            // The CPU computes both in f32, and its convolutions are products of matrices like the rest.
            let work = sizes.work;
            (if device.is_cpu() { (work.dit + work.vae) / rate } else { work.seconds(rate) }, "planned")
        }
    };
    Ok(json!({
        "device": if device.is_cpu() { "cpu" } else { "cuda" },
        "memory": needs.fit(Budget::of(device, limit)?),
        "seconds": round(seconds),
        "seconds_per_second_of_video": round(seconds / sizes.duration_s()),
        "basis": basis,
    }))
}

/// Operations a second of a product of matrices on `device`, measured now.
fn product_rate(device: &Device) -> Result<f64, JobError> {
    let measure = || -> candle_core::Result<f64> {
        let dtype = device::compute_dtype(device);
        let xs = Tensor::ones((PROBE_DIM, PROBE_DIM), dtype, device)?;
        let mut best = f64::INFINITY;
        for _ in 0..PROBE_RUNS {
            let began = Instant::now();
            xs.matmul(&xs)?;
            device.synchronize()?;
            best = best.min(began.elapsed().as_secs_f64());
        }
        Ok(2.0 * (PROBE_DIM as f64).powi(3) / best)
    };
    measure().map_err(|e| talkie::Error::from(e).into())
}

/// How long the weights take at the rate of the last cold start.
fn cold_start(read_bytes: Option<u64>, spool: &Path) -> Value {
    let last = LastColdStart::read(&spool.join(COLD_START));
    let rate = last.map(|last| last.phases.gb_per_s * 1e9).filter(|rate| *rate > 0.0);
    let (rate, basis) = rate.map_or((PLANNED_READ_RATE, "planned"), |rate| (rate, "measured"));
    json!({
        "read_bytes": read_bytes,
        "gb_per_s": round(rate / 1e9),
        "seconds": read_bytes.map(|bytes| round(bytes as f64 / rate)),
        "basis": basis,
    })
}

/// Four significant digits: an estimate has no more.
fn round(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return 0.0;
    }
    let scale = 10f64.powi(3 - value.abs().log10().floor() as i32);
    (value * scale).round() / scale
}

/// The estimate for people.
fn table(estimate: &Value) -> String {
    let mut text = String::new();
    let number = |value: &Value| value.as_f64().unwrap_or_default();
    let gb = |value: &Value| number(value) / 1e9;
    let e = estimate;
    // Writing into a string cannot fail.
    let _ = writeln!(
        text,
        "{}: {} frames ({} s) of {}×{} in {} windows, {} steps × {} passes: {} forwards of {:.3} PFLOP",
        e["model"].as_str().unwrap_or_default(),
        e["frames"],
        e["duration_s"],
        e["width"],
        e["height"],
        e["windows"],
        e["steps"],
        e["passes"],
        e["forwards"],
        number(&e["flops"]["forward"]) / 1e15
    );
    let _ = writeln!(
        text,
        "weights: {:.1} GB on a GPU, {:.1} GB to download",
        gb(&e["weights"]["device_bytes"]),
        gb(&e["weights"]["download_bytes"])
    );
    let _ = writeln!(
        text,
        "{:<14} {:>16} {:>10} {:>12} {:>10} {:>10}  basis",
        "", "memory", "needs GB", "seconds", "USD", "USD/s"
    );
    let cards = e["cards"].as_array().map(Vec::as_slice).unwrap_or_default();
    for card in cards.iter().chain([&e["machine"]]) {
        let name = card["name"].as_str().unwrap_or("this machine");
        let money = |name: &str| match card[name].as_f64() {
            Some(usd) => format!("{usd:.4}"),
            None => String::new(),
        };
        let _ = writeln!(
            text,
            "{name:<14} {:>16} {:>10.1} {:>12.1} {:>10} {:>10}  {}",
            card["memory"]["rung"].as_str().unwrap_or_default(),
            gb(&card["memory"]["device_bytes"]),
            number(&card["seconds"]),
            money("usd"),
            money("usd_per_second_of_video"),
            card["basis"].as_str().unwrap_or_default()
        );
    }
    let _ =
        writeln!(text, "prices: {PRICE_SOURCE}, read {PRICES_READ}; planned figures have not been measured");
    text
}

#[cfg(test)]
mod tests {
    use talkie::media::image::Size;
    use talkie::registry::Registry;

    use super::*;

    #[test]
    fn figures_have_four_digits() {
        assert_eq!(round(1234.56), 1235.0);
        assert_eq!(round(0.000123456), 0.0001235);
        assert_eq!((round(0.0), round(f64::INFINITY)), (0.0, 0.0));
    }

    #[test]
    fn a_window_of_the_published_model_takes_what_was_planned() {
        let registry = Registry::built_in().unwrap();
        let spec = registry.model("infinitetalk").unwrap();
        let draft = json!({"image": "https://a.example/i.png", "audio": "https://a.example/a.wav"});
        let limits = talkie::request::Limits::default();
        let (request, _) = talkie::request::Draft::parse(&draft, &limits).unwrap().finish().unwrap();
        let settings = Settings::resolve(&request, spec).unwrap();
        let extent = Extent { size: Size { height: 640, width: 640 }, frames: 81, persons: 1 };
        let sizes = Sizes::of(spec, &settings, extent).unwrap();
        assert_eq!((sizes.windows, sizes.passes, sizes.forwards(), sizes.tokens), (1, 3, 120, 33_600));
        let h200 = CARDS[4].seconds(&Work { dit: sizes.forward, vae: 0.0 });
        // 1.87 PFLOP at 45 % of 790 TFLOP/s.
        assert!((5.0..5.5).contains(&h200), "{h200}");
        // The DiT with its adapter is published as 37.8 GB, the text encoder as 11.4.
        let needs = Needs::of(spec, &settings, extent, Processor::Gpu).unwrap();
        let gb = |bytes: u64| bytes as f64 / 1e9;
        assert!((37.7..37.9).contains(&gb(needs.weights.dit)), "{}", gb(needs.weights.dit));
        assert!((11.3..11.5).contains(&gb(needs.weights.text_encoder)));
        let rungs: Vec<_> = CARDS.iter().map(|card| needs.fit(card.budget())["rung"].clone()).collect();
        assert_eq!(rungs[0], "blocks_streamed", "24 GB");
        assert_eq!(rungs[4], "resident", "141 GB");
    }
}
