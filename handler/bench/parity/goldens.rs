//! What the reference computed, from a folder as `tests/golden`: inputs, weights and outputs of the networks.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, safetensors};
use candle_nn::VarBuilder;
use serde::de::DeserializeOwned;
use serde_json::Value;
use talkie::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use talkie::weights::Weights;
use talkie::{Error, ErrorKind, Result};

use super::{Bench, Comparison, EXACT, ROUNDED, Report, relative_error};
use crate::job::JobError;

pub(super) fn run(bench: &Bench, folder: &Path, report: &mut Report) -> Result<(), JobError> {
    let goldens = Goldens { folder, device: bench.device };
    for dtype in [DType::BF16, DType::F32] {
        let exact = if dtype == DType::F32 { EXACT } else { ROUNDED };
        let mut compare =
            |name: String, dtype: DType, (found, expected): (Tensor, Tensor), tolerance: f64| {
                let error = relative_error(&found, &expected)?;
                report(&Comparison { name: format!("reference: {name}"), dtype, error, tolerance })
            };
        for (name, pair) in dit(&goldens, dtype)? {
            compare(name, dtype, pair, exact)?;
        }
        for (name, pair) in umt5(&goldens, dtype)? {
            compare(name, dtype, pair, exact)?;
        }
    }
    // The others are f32 in the reference.
    for part in [clip, vae, wav2vec2] {
        for (name, (found, expected)) in part(&goldens)? {
            let error = relative_error(&found, &expected)?;
            let (name, tolerance) = (format!("reference: {name}"), bench.with_convolutions());
            report(&Comparison { name, dtype: DType::F32, error, tolerance })?;
        }
    }
    Ok(())
}

/// What was compared, and ours beside the reference's.
type Pairs = Vec<(String, (Tensor, Tensor))>;

struct Goldens<'a> {
    folder: &'a Path,
    device: &'a Device,
}

impl Goldens<'_> {
    /// The configuration of a network.
    fn config<C: DeserializeOwned>(&self, network: &str) -> Result<C> {
        let path = self.folder.join(network).join("config.json");
        let unreadable = |e: String| {
            let message = format!("the reference's outputs: {}: {e}", path.display());
            Error::new(ErrorKind::InvalidInput, message)
                .with_hint("`--goldens` is a folder like tests/golden")
        };
        let text = std::fs::read_to_string(&path).map_err(|e| unreadable(e.to_string()))?;
        let value: Value = serde_json::from_str(&text).map_err(|e| unreadable(e.to_string()))?;
        let config = value.get("model").unwrap_or(&value).clone();
        serde_json::from_value(config).map_err(|e| unreadable(e.to_string()))
    }

    /// The tensors of a file, on the processor.
    fn io(&self, file: &str) -> Result<HashMap<String, Tensor>> {
        Ok(safetensors::load(self.folder.join(file), &Device::Cpu)?)
    }

    /// The weights in a file.
    fn weights(&self, file: &str, dtype: DType) -> Result<VarBuilder<'static>> {
        Ok(Weights::open(&[self.folder.join(file)])?.var_builder(dtype, self.device))
    }

    /// The tensor called `name` on the device, in f32.
    fn get(&self, io: &HashMap<String, Tensor>, name: &str) -> Result<Tensor> {
        Ok(tensor(io, name)?.to_device(self.device)?.to_dtype(DType::F32)?)
    }
}

fn tensor<'a>(io: &'a HashMap<String, Tensor>, name: &str) -> Result<&'a Tensor> {
    io.get(name).ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, format!("the reference's outputs hold no tensor `{name}`"))
    })
}

/// The cases of a file: what is before `suffix` in the names that end with it.
fn cases(io: &HashMap<String, Tensor>, suffix: &str) -> Vec<String> {
    let mut cases: Vec<_> =
        io.keys().filter_map(|name| name.strip_suffix(suffix)).map(str::to_owned).collect();
    cases.sort();
    cases
}

fn dit(goldens: &Goldens, dtype: DType) -> Result<Pairs> {
    let cfg = goldens.config("dit")?;
    let model = wan::Model::new(&cfg, goldens.weights("dit/weights.safetensors", dtype)?)?;
    let io = goldens.io("dit/single.safetensors")?;
    let get = |name: &str| goldens.get(&io, name);
    let context = model.encode_context(&get("context")?, &get("clip")?)?;
    let (latents, y) = (get("latent")?, get("y")?.squeeze(0)?);
    let run = |case: String| {
        let own = format!("{case}.audio");
        let audio = get(if io.contains_key(&own) { &own } else { "audio" })?;
        let audio = model.encode_audio(&audio.to_dtype(dtype)?)?;
        let timestep = tensor(&io, &format!("{case}.t"))?.flatten_all()?.to_dtype(DType::F64)?;
        let timestep = timestep.to_vec1::<f64>()?.first().copied().unwrap_or_default();
        let found = model.forward(&latents, &y, timestep, &context, &audio, None)?;
        Ok((format!("DiT {case}"), (found, tensor(&io, &format!("{case}.out"))?.clone())))
    };
    cases(&io, ".t").into_iter().map(run).collect()
}

fn umt5(goldens: &Goldens, dtype: DType) -> Result<Pairs> {
    let cfg = goldens.config("umt5")?;
    let model = umt5::Model::new(&cfg, goldens.weights("umt5/weights.safetensors", dtype)?)?;
    let io = goldens.io("umt5/io.safetensors")?;
    let mut pairs = Pairs::new();
    for case in cases(&io, ".ids") {
        let ids = tensor(&io, &format!("{case}.ids"))?.to_dtype(DType::U32)?.to_vec2::<u32>()?;
        let lens = tensor(&io, &format!("{case}.lens"))?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
        for (i, (ids, len)) in ids.iter().zip(lens).enumerate() {
            let found = model.encode(&ids[..len as usize])?;
            let expected = tensor(&io, &format!("{case}.context_{i}"))?.clone();
            pairs.push((format!("UMT5 {case} {i}"), (found, expected)));
        }
    }
    Ok(pairs)
}

fn clip(goldens: &Goldens) -> Result<Pairs> {
    let cfg = goldens.config("clip")?;
    let weights = goldens.weights("clip/weights.safetensors", DType::F32)?;
    let model = clip_vision::Model::new(&cfg, weights)?;
    let io = goldens.io("clip/io.safetensors")?;
    let run = |case: String| {
        let frame = goldens.get(&io, &format!("{case}.video"))?.squeeze(0)?;
        let found = model.forward(&model.preprocess(&frame)?)?;
        Ok((format!("CLIP {case}"), (found, tensor(&io, &format!("{case}.out"))?.clone())))
    };
    cases(&io, ".out").into_iter().map(run).collect()
}

fn vae(goldens: &Goldens) -> Result<Pairs> {
    let cfg = goldens.config("vae")?;
    let weights = goldens.weights("vae/weights.safetensors", DType::F32)?;
    let model = wan_vae::Vae::new(&cfg, weights)?;
    let io = goldens.io("vae/io.safetensors")?;
    let run = |case: String| {
        let (video, latents) = (format!("{case}.video"), format!("{case}.latent"));
        let (found, expected) = match case.starts_with("enc") {
            true => (model.encode(&goldens.get(&io, &video)?)?, latents),
            false => (model.decode(&goldens.get(&io, &latents)?)?, video),
        };
        Ok((format!("VAE {case}"), (found, tensor(&io, &expected)?.clone())))
    };
    cases(&io, ".latent").into_iter().map(run).collect()
}

fn wav2vec2(goldens: &Goldens) -> Result<Pairs> {
    let cfg = goldens.config("wav2vec2")?;
    let weights = goldens.weights("wav2vec2/weights_checkpoint_names.safetensors", DType::F32)?;
    let model = wav2vec2::Model::new(&cfg, weights)?;
    let io = goldens.io("wav2vec2/io.safetensors")?;
    let run = |case: String| {
        let samples = tensor(&io, &format!("{case}.wav"))?.flatten_all()?.to_vec1::<f32>()?;
        let expected = tensor(&io, &format!("{case}.embedding"))?.clone();
        let found = model.embed(&samples, expected.dim(0)?)?;
        Ok((format!("wav2vec2 {case}"), (found, expected)))
    };
    cases(&io, ".wav").into_iter().map(run).collect()
}
