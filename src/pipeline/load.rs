//! Which networks a generation needs, how they fit, and the loading of those that are not there.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

use super::memory::{self, BLOCKS_IN_FLIGHT, MemoryPlan, Place};
use super::shelf::{Form, Kept, Network, Shelf, Sizes};
use super::supply::{Arrival, Ledger, Reading};
use crate::Result;
use crate::device::{Processor, Staged};
use crate::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use crate::nn::Linear;
use crate::prepared::{Found, NetworkKind, Selection};
use crate::registry::ModelSpec;
use crate::weights::{LoadMonitor, LoadPlan, PlannedTensor, Weights};

/// All networks that a generation needs, in the order in which it needs them.
pub(super) struct Order<'a> {
    selection: Selection<'a>,
    device: &'a Device,
    needed: Vec<Needed>,
}

/// One network that a generation needs.
struct Needed {
    found: Found,
    sizes: Sizes,
    /// What it is made from; `None` where it is kept.
    files: Option<Files>,
}

/// Weights that are not read yet.
struct Files {
    weights: Weights,
    plan: LoadPlan,
}

impl Files {
    /// Reads the headers, and checks them against the network.
    fn open(selection: &Selection, found: &Found, device: &Device) -> Result<Self> {
        let (spec, kind) = (selection.spec, found.key.kind());
        let weights = selection.open(found)?;
        let dtype = dtype(spec, kind, device);
        let plan = weights.plan(dtype, device, &found.unused, |vb| build(spec, kind, vb))?;
        Ok(Self { weights, plan })
    }
}

fn sizes(kind: NetworkKind, plan: &LoadPlan, on: Processor) -> Sizes {
    let block = match kind {
        NetworkKind::Dit => bytes_of(plan, on, |name| name.starts_with("blocks.0.")),
        _ => 0,
    };
    Sizes { bytes: bytes_of(plan, on, |_| true), block }
}

/// The networks' sizes as the memory plan takes them.
fn summed(spec: &ModelSpec, sizes: impl IntoIterator<Item = (NetworkKind, Sizes)>) -> memory::Weights {
    let mut weights = memory::Weights { blocks: spec.dit.config.num_layers, ..memory::Weights::default() };
    for (kind, sizes) in sizes {
        match kind {
            NetworkKind::AudioEncoder => weights.audio_encoder = sizes.bytes,
            NetworkKind::TextEncoder => weights.text_encoder = sizes.bytes,
            NetworkKind::ImageEncoder => weights.image_encoder = sizes.bytes,
            NetworkKind::Vae => weights.vae = sizes.bytes,
            NetworkKind::Dit => (weights.dit, weights.block) = (sizes.bytes, sizes.block),
        }
    }
    weights
}

/// The bytes of a model's networks from their dimensions: any weights will do, and none are made.
pub(super) fn weights_of(spec: &ModelSpec, on: Processor) -> Result<memory::Weights> {
    let of = |kind| -> Result<_> {
        let dtype = on.dtype(stored_dtype(spec, kind));
        let plan = Weights::random(0).plan(dtype, &Device::Cpu, NONE, |vb| build(spec, kind, vb))?;
        Ok((kind, sizes(kind, &plan, on)))
    };
    Ok(summed(spec, NetworkKind::ALL.into_iter().map(of).collect::<Result<Vec<_>>>()?))
}

/// The bytes of the tensors that are wanted, with the copies that layers on the CPU keep of small matrices.
fn bytes_of(plan: &LoadPlan, on: Processor, wanted: impl Fn(&str) -> bool) -> u64 {
    let bytes = |tensor: &PlannedTensor| {
        let copy = match on {
            Processor::Cpu => Linear::transposed_bytes(&tensor.shape),
            Processor::Gpu => 0,
        };
        (tensor.shape.elem_count() * tensor.dtype.size_in_bytes() + copy) as u64
    };
    plan.tensors.iter().filter(|tensor| wanted(&tensor.name)).map(bytes).sum()
}

impl<'a> Order<'a> {
    /// Finds what `kinds` of the model consist of. Of what is not on `shelf`, the headers of its files are read.
    ///
    /// # Errors
    /// `ModelNotFound` naming a file or LoRA that is not there, `ModelCorrupt` naming a file and tensor that do not fit.
    pub fn new(
        selection: Selection<'a>,
        device: &'a Device,
        kinds: impl IntoIterator<Item = NetworkKind>,
        shelf: &Shelf,
    ) -> Result<Self> {
        let needed = kinds.into_iter().map(|kind| {
            let found = selection.find(kind)?;
            if let Some(kept) = shelf.find(&found.key) {
                return Ok(Needed { sizes: kept.sizes, files: None, found });
            }
            let files = Files::open(&selection, &found, device)?;
            Ok(Needed { sizes: sizes(kind, &files.plan, Processor::of(device)), files: Some(files), found })
        });
        let needed = needed.collect::<Result<_>>()?;
        Ok(Self { selection, device, needed })
    }

    /// The bytes of the networks.
    pub fn weights(&self) -> memory::Weights {
        summed(self.selection.spec, self.needed.iter().map(|needed| (needed.found.key.kind(), needed.sizes)))
    }

    /// Bytes of weight files that are read for what is not kept.
    pub fn bytes_to_read(&self) -> u64 {
        let files = self.needed.iter().filter_map(|needed| needed.files.as_ref());
        files.map(|files| files.plan.bytes_to_read).sum()
    }

    /// Takes from `shelf` what is needed and fits `plan`, and drops from it, the least recently used first, what has
    /// no room beside the plan. What is kept in a form that does not fit is opened anew.
    ///
    /// # Errors
    /// Those of [`Order::new`].
    pub fn prepare(self, plan: MemoryPlan, shelf: &mut Shelf) -> Result<Prepared<'a>> {
        let Self { selection, device, needed } = self;
        let (mut ready, mut missing) = (BTreeMap::new(), Vec::new());
        for Needed { found, sizes, files } in needed {
            let source = match (files, shelf.take(&found.key)) {
                (Some(files), _) => Source::Files(files),
                (None, Some(kept)) if fits(&kept, &plan) => match kept.form {
                    Form::OnHost(weights) => Source::Host(weights),
                    Form::Loaded { .. } => {
                        ready.insert(found.key.kind(), kept);
                        continue;
                    }
                },
                (None, kept) => {
                    drop(kept); // before its successor needs the memory
                    Source::Files(Files::open(&selection, &found, device)?)
                }
            };
            missing.push(Missing { found, sizes, source });
        }
        let planned = plan.device_bytes.saturating_sub(plan.activations.most());
        let device_left = plan.for_weights().saturating_sub(planned);
        let host_left = plan.budget.host.map_or(0, |host| host.saturating_sub(plan.host_bytes));
        shelf.shrink(device_left, host_left);
        let held = shelf.device_bytes() + ready.values().map(Kept::device_bytes).sum::<u64>();
        let free = plan.for_weights().saturating_sub(held);
        Ok(Prepared { ready, free, loader: Loader { selection, device, plan, missing } })
    }
}

/// Whether a network can be used as it is kept: a DiT must leave the room that `plan` gives to others.
fn fits(kept: &Kept, plan: &MemoryPlan) -> bool {
    match &kept.form {
        Form::Loaded { resident_blocks, .. } if kept.key.kind() == NetworkKind::Dit => {
            *resident_blocks <= plan.resident_blocks
        }
        _ => true,
    }
}

/// A generation's networks: those that are there, and those that will be.
pub(super) struct Prepared<'a> {
    pub ready: BTreeMap<NetworkKind, Kept>,
    /// Bytes of the device that networks may still take.
    pub free: u64,
    pub loader: Loader<'a>,
}

/// Loads networks one after the other.
pub(super) struct Loader<'a> {
    selection: Selection<'a>,
    device: &'a Device,
    plan: MemoryPlan,
    missing: Vec<Missing>,
}

/// A network to load.
struct Missing {
    found: Found,
    sizes: Sizes,
    source: Source,
}

enum Source {
    Files(Files),
    /// Its tensors in host memory.
    Host(Arc<Weights>),
}

impl Loader<'_> {
    /// Whether there is nothing to load.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty()
    }

    /// Why prepared files were passed over, in sentences for people.
    pub fn notes(&self) -> Vec<String> {
        self.missing.iter().filter_map(|missing| missing.found.note.clone()).collect()
    }

    /// Loads all of them in order and hands each over as soon as it is there; a failure is the last that is heard of
    /// it. `deliver` says whether anybody still listens.
    pub fn run(self, reading: &Reading, ledger: &Ledger, mut deliver: impl FnMut(Result<Arrival>) -> bool) {
        let Self { selection, device, plan, missing } = self;
        for missing in missing {
            reading.begin(missing.found.key.kind());
            let one = One { spec: selection.spec, device, plan: &plan, monitor: &reading.monitor };
            let arrival = ledger.acquire(one.device_bytes(&missing)).and_then(|()| one.load(missing));
            let failed = arrival.is_err();
            if !deliver(arrival) || failed {
                return;
            }
        }
    }
}

/// What loading one network needs to know.
struct One<'a> {
    spec: &'a ModelSpec,
    device: &'a Device,
    plan: &'a MemoryPlan,
    monitor: &'a Arc<LoadMonitor>,
}

impl One<'_> {
    fn streams(&self, kind: NetworkKind) -> bool {
        kind == NetworkKind::Dit && self.plan.resident_blocks < self.plan.weights.blocks
    }

    /// What the network takes of the device once it is loaded.
    fn device_bytes(&self, Missing { found, sizes, .. }: &Missing) -> u64 {
        let blocks = self.plan.weights.blocks;
        match self.streams(found.key.kind()) {
            true => {
                let on_device = (self.plan.resident_blocks + BLOCKS_IN_FLIGHT) as u64;
                sizes.bytes - sizes.block * blocks as u64 + sizes.block * on_device
            }
            false => sizes.bytes,
        }
    }

    fn load(&self, missing: Missing) -> Result<Arrival> {
        let device_bytes = self.device_bytes(&missing);
        let Missing { found: Found { key, unused, .. }, sizes, source } = missing;
        let kind = key.kind();
        let dtype = dtype(self.spec, kind, self.device);
        let on_host = self.plan.encoders == Place::Host && is_encoder(kind);
        let (network, host_bytes, host) = match source {
            Source::Host(weights) => (self.build(&weights, dtype, kind)?, 0, Some(weights)),
            Source::Files(Files { weights, plan }) => {
                let weights = weights.watched_by(self.monitor.clone());
                match (on_host, self.streams(kind)) {
                    (true, _) => {
                        let weights = Arc::new(Weights::from_tensors(to_host(&weights, &plan, |_| true)?));
                        (self.build(&weights, dtype, kind)?, 0, Some(weights))
                    }
                    (false, true) => {
                        let (network, host_bytes) = self.streamed_dit(weights, &unused, &plan, dtype)?;
                        (network, host_bytes, None)
                    }
                    (false, false) => {
                        let build = |vb| build(self.spec, kind, vb);
                        (weights.load(dtype, self.device, &unused, build)?, 0, None)
                    }
                }
            }
        };
        let resident_blocks = self.plan.resident_blocks;
        let form = Form::Loaded { network, resident_blocks, device_bytes, host_bytes };
        Ok(Arrival { kept: Kept { key, sizes, form }, host })
    }

    /// The network on the device, from its tensors in host memory.
    fn build(&self, weights: &Weights, dtype: DType, kind: NetworkKind) -> Result<Network> {
        weights.load(dtype, self.device, NONE, |vb| build(self.spec, kind, vb))
    }

    /// The DiT with blocks that come from host memory, or from the files where that is the device's own memory. Beside
    /// it there are the bytes that it has on the host.
    fn streamed_dit(
        &self,
        weights: Weights,
        unused: &[String],
        plan: &LoadPlan,
        dtype: DType,
    ) -> Result<(Network, u64)> {
        let config = &self.spec.dit.config;
        let resident = self.plan.resident_blocks;
        let streamed: Vec<_> = (resident..config.num_layers).map(|i| format!("blocks.{i}.")).collect();
        let is_streamed = |name: &str| streamed.iter().any(|prefix| name.starts_with(prefix));
        let source = Arc::new(BlockWeights { blocks: OnceLock::new(), dtype, device: self.device.clone() });
        let mut others = unused.to_vec();
        others.extend(streamed.iter().map(|prefix| format!("{prefix}*")));
        let network = weights.load(dtype, self.device, &others, |vb| {
            wan::Model::with_streamed_blocks(config, vb, resident, source.clone())
        })?;
        let (blocks, host_bytes) = match self.plan.budget.host {
            Some(_) => {
                let tensors = to_host(&weights, plan, is_streamed)?;
                let bytes = bytes_of(plan, Processor::Gpu, is_streamed);
                (Blocks::OnHost(Staged::new(tensors, self.device)), bytes)
            }
            // What is read later has nothing to do with this load.
            None => (Blocks::InFiles(weights.watched_by(Arc::default())), 0),
        };
        // It is set here alone.
        let _ = source.blocks.set(blocks);
        Ok((Arc::new(network), host_bytes))
    }
}

/// Those tensors of a planned network that are `wanted`, in host memory.
fn to_host(
    weights: &Weights,
    plan: &LoadPlan,
    wanted: impl Fn(&str) -> bool,
) -> Result<HashMap<String, Tensor>> {
    let tensors = plan.tensors.iter().filter(|tensor| wanted(&tensor.name));
    let tensors: BTreeMap<_, _> = tensors.map(|tensor| (tensor.name.as_str(), tensor)).collect();
    let take = |vb: VarBuilder<'static>| -> candle_core::Result<HashMap<String, Tensor>> {
        let one = |(name, tensor): (&&str, &&PlannedTensor)| {
            let vb = vb.clone().set_dtype(tensor.dtype);
            Ok(((*name).to_owned(), vb.get(tensor.shape.clone(), name)?))
        };
        tensors.iter().map(one).collect()
    };
    // What the network does not ask for was found when it was planned.
    weights.load(DType::F32, &Device::Cpu, ALL, take)
}

/// No tensors that a network does not ask for.
const NONE: &[&str] = &[];
/// Any tensors.
const ALL: &[&str] = &["*"];

/// Blocks of the DiT from their weights, which are there once the rest of the network is.
struct BlockWeights {
    blocks: OnceLock<Blocks>,
    dtype: DType,
    device: Device,
}

/// Where the blocks' weights are.
enum Blocks {
    OnHost(Staged),
    InFiles(Weights),
}

impl wan::BlockSource for BlockWeights {
    fn load(
        &self,
        build: &dyn Fn(VarBuilder<'static>) -> candle_core::Result<()>,
    ) -> candle_core::Result<()> {
        match self.blocks.get() {
            Some(Blocks::OnHost(staged)) => staged.build(self.dtype, build),
            Some(Blocks::InFiles(weights)) => {
                weights.load(self.dtype, &self.device, ALL, build).map_err(candle_core::Error::wrap)
            }
            None => candle_core::bail!("a block was asked for before the network was there"),
        }
    }
}

fn is_encoder(kind: NetworkKind) -> bool {
    matches!(kind, NetworkKind::AudioEncoder | NetworkKind::TextEncoder | NetworkKind::ImageEncoder)
}

/// What `kind` computes in on `device`.
fn dtype(spec: &ModelSpec, kind: NetworkKind, device: &Device) -> DType {
    Processor::of(device).dtype(stored_dtype(spec, kind))
}

/// What the registry gives the weights of `kind`.
fn stored_dtype(spec: &ModelSpec, kind: NetworkKind) -> DType {
    match kind {
        NetworkKind::AudioEncoder => spec.audio_encoder.stored_dtype(),
        NetworkKind::TextEncoder => spec.text_encoder.stored_dtype(),
        NetworkKind::ImageEncoder => spec.image_encoder.stored_dtype(),
        NetworkKind::Vae => spec.vae.stored_dtype(),
        NetworkKind::Dit => spec.dit.stored_dtype(),
    }
}

/// Builds the network `kind` of a model from what `vb` gives out.
fn build(spec: &ModelSpec, kind: NetworkKind, vb: VarBuilder) -> candle_core::Result<Network> {
    Ok(match kind {
        NetworkKind::AudioEncoder => Arc::new(wav2vec2::Model::new(&spec.audio_encoder.config, vb)?),
        NetworkKind::TextEncoder => Arc::new(umt5::Model::new(&spec.text_encoder.config, vb)?),
        NetworkKind::ImageEncoder => Arc::new(clip_vision::Model::new(&spec.image_encoder.config, vb)?),
        NetworkKind::Vae => Arc::new(wan_vae::Vae::new(&spec.vae.config, vb)?),
        NetworkKind::Dit => Arc::new(wan::Model::new(&spec.dit.config, vb)?),
    })
}
