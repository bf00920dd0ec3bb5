//! One generation of the product: decoded inputs to an MP4.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::infinitetalk::{Conditioning, Control, Networks, Reference, generate_windows};
use super::load::{Order, Prepared};
use super::memory::{Activations, Budget, Extent, MemoryPlan, Place};
use super::progress::{Progress, Stage};
use super::settings::{FPS, Settings};
use super::shelf::Shelf;
use super::supply::{Ledger, Reading, Supply};
use super::texts::Texts;
use crate::device::Processor;
use crate::media::audio::{Soundtrack, Speakers, TARGET_LUFS, VOICE_RATE_HZ, Voice, normalize_to};
use crate::media::image::{DEFAULT_FACE_SCALE, PersonMasks, Portrait, Size, frames_to_rgb};
use crate::media::video::{AudioTrack, Quality, VideoOptions, VideoWriter, thumbnail_jpeg};
use crate::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use crate::prepared::{NetworkKind, Selection};
use crate::registry::{ModelSpec, ModelStorage};
use crate::weights::{LoadMonitor, LoadStats};
use crate::{Error, ErrorKind, Result};

/// Samples of the 16 kHz signal in one frame of video.
const SAMPLES_PER_FRAME: usize = VOICE_RATE_HZ as usize / FPS;

/// What a video is made of, decoded and found sound.
pub struct Inputs {
    /// The portrait.
    pub portrait: Portrait,
    /// The voice, or that of the first of two persons.
    pub voice: Voice,
    /// The voice of the second person.
    pub second_voice: Option<Voice>,
}

/// A finished video.
#[derive(Clone, Debug)]
pub struct Video {
    /// Frames in it.
    pub frames: usize,
    /// Height and width in pixels.
    pub size: Size,
    /// Size of the file.
    pub size_bytes: u64,
    /// The seed that was used.
    pub seed: u64,
    /// The first frame as a JPEG, where it was asked for.
    pub thumbnail: Option<Vec<u8>>,
    /// Windows that came out broken and were made again on plain kernels.
    pub remade_windows: usize,
    /// Where the time went.
    pub timings: Timings,
    /// What was loaded for it; `None` where all networks were there.
    pub loading: Option<Loading>,
    /// How it fitted into memory.
    pub plan: Option<MemoryPlan>,
}

/// The loading of networks.
#[derive(Clone, Debug)]
pub struct Loading {
    /// From the first one's begin to the last one's end. Voices, prompts and portrait were encoded meanwhile.
    pub wall: Duration,
    /// What it consisted of.
    pub stats: LoadStats,
    /// Why prepared files were passed over, in sentences for people.
    pub notes: Vec<String>,
}

/// Where the time of a generation went.
#[derive(Clone, Debug, Default)]
pub struct Timings {
    /// Embedding the voices.
    pub audio: Duration,
    /// Encoding prompt and portrait.
    pub encode: Duration,
    /// All denoising steps.
    pub denoise: Duration,
    /// One denoising step, on average.
    pub per_step: Duration,
    /// The first denoising step.
    pub first_step: Duration,
    /// Latents to frames, colours included.
    pub decode: Duration,
    /// Waiting for the encoder and closing the file.
    pub mux: Duration,
}

/// How many frames a video of `inputs` has: 25 a second, the last one begun counting as whole, at most
/// `max_frames`. Two voices last as long as the longer one, or as both, by how they speak.
pub fn num_frames(inputs: &Inputs, settings: &Settings) -> usize {
    let first = inputs.voice.signal().len();
    let second = inputs.second_voice.as_ref().map_or(0, |voice| voice.signal().len());
    let samples = match settings.speakers {
        Speakers::InTurn => first + second,
        Speakers::Together => first.max(second),
    };
    samples.div_ceil(SAMPLES_PER_FRAME).min(settings.sampling.max_frames)
}

/// All that a video is made of.
pub struct Job<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// Where its files lie.
    pub storage: &'a ModelStorage,
    /// What is asked for.
    pub settings: &'a Settings,
    /// The opened image and voices.
    pub inputs: &'a Inputs,
    /// The file to write, which appears when it is complete.
    pub output: &'a Path,
}

/// Makes videos on one device, and keeps the networks of the last ones.
pub struct Pipeline {
    device: Device,
    /// The most bytes of the device to use.
    limit: Option<u64>,
    /// What there was before anything was loaded.
    budget: Option<Budget>,
    /// The most bytes of the device that the last plan took.
    planned: Option<u64>,
    shelf: Shelf,
    texts: Option<Texts>,
}

impl Pipeline {
    /// A pipeline without networks, which uses no more than `limit` bytes of `device`.
    pub fn new(device: Device, limit: Option<u64>) -> Self {
        Self { device, limit, budget: None, planned: None, shelf: Shelf::default(), texts: None }
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Drops all networks, as after an error of the device.
    pub fn clear(&mut self) {
        self.shelf = Shelf::default();
    }

    /// Drops all networks, and from now on plans with an eighth less than the last plan took: the device ran out of
    /// memory in spite of it.
    pub fn step_down(&mut self) {
        self.clear();
        self.limit = self.planned.map(|bytes| bytes - bytes / 8).or(self.limit);
    }

    /// Makes the video. Networks that an earlier one has left are used again; the others are read while those that
    /// are there already work. What was read stays, as far as memory allows, also where the video comes to nothing.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] before anything is read where the video does not fit, [`ErrorKind::ModelNotFound`]
    /// naming a file or LoRA that is not there, [`ErrorKind::ModelCorrupt`] naming a file and tensor that do not fit,
    /// those of [`generate_windows`], and [`ErrorKind::Encode`] when the file cannot be written.
    pub fn generate(&mut self, job: Job, mut control: Control) -> Result<Video> {
        control.cancel.check()?;
        let Job { spec, storage, settings, inputs, output } = job;
        let extent = Extent {
            size: settings.video_size(inputs.portrait.size()),
            frames: num_frames(inputs, settings),
            persons: if inputs.second_voice.is_some() { 2 } else { 1 },
        };
        let selection = Selection { spec, storage, speakers: extent.persons, loras: &settings.loras };
        check_installed(&selection)?;
        let texts = Texts::of(&selection, &self.device, self.texts.take())?;
        let texts = self.texts.insert(texts);

        let budget = match self.budget.filter(|_| !self.shelf.is_empty()) {
            Some(budget) => budget,
            None => *self.budget.insert(Budget::of(&self.device, self.limit)?),
        };
        let order = Order::new(selection, &self.device, kinds(settings, texts), &self.shelf)?;
        let activations = Activations::of(spec, settings, extent, Processor::of(&self.device));
        let plan = MemoryPlan::choose(order.weights(), activations, budget)?;
        self.planned = Some(plan.device_bytes);
        let bytes_to_read = order.bytes_to_read();
        // A panic in what follows leaves nothing behind that could be broken.
        let mut shelf = std::mem::take(&mut self.shelf);
        let Prepared { ready, free, loader } = order.prepare(plan, &mut shelf)?;
        let is_warm = loader.is_empty();
        let notes = loader.notes();

        let ledger = Ledger::new(free);
        let (cancel, stopped) = (control.cancel.clone(), ledger.stopped());
        let monitor = LoadMonitor::new(move || match stopped.load(Ordering::Relaxed) {
            true => Err(Error::new(ErrorKind::Cancelled, "the networks are not needed any more")),
            false => cancel.check(),
        });
        let reading = Reading::new(Arc::new(monitor), bytes_to_read);
        let (delivered, arriving) = mpsc::channel();
        let mut supply = Supply {
            ready,
            arriving,
            left: Vec::new(),
            reading: &reading,
            ledger: &ledger,
            encoders_leave: plan.encoders != Place::Device,
            began: Instant::now(),
            complete: None,
        };
        let made = thread::scope(|scope| {
            let load = || loader.run(&reading, &ledger, move |arrival| delivered.send(arrival).is_ok());
            let loading = thread::Builder::new().name("loader".to_owned()).spawn_scoped(scope, load);
            loading
                .map_err(|e| Error::new(ErrorKind::Inference, format!("no thread can be started: {e}")))?;
            let run = Run { device: &self.device, selection, settings, extent, texts };
            let made = run.make(inputs, output, &mut supply, &mut control);
            ledger.stop(); // whoever gives up stops what is still being read
            made
        });
        let complete = supply.complete;
        supply.keep().for_each(|kept| shelf.put(kept));
        self.shelf = shelf;
        let mut video = made.map_err(|e| control.cancel.check().err().unwrap_or(e))?;
        let stats = reading.monitor.stats();
        video.loading = (!is_warm).then(|| Loading { wall: complete.unwrap_or_default(), stats, notes });
        video.plan = Some(plan);
        Ok(video)
    }
}

/// The networks that are needed, in the order in which they are.
fn kinds(settings: &Settings, texts: &Texts) -> impl Iterator<Item = NetworkKind> + use<> {
    let texts_known = texts.cover(settings);
    NetworkKind::ALL.into_iter().filter(move |kind| !(texts_known && *kind == NetworkKind::TextEncoder))
}

/// Fails before anything is read when a file is not there.
fn check_installed(selection: &Selection) -> Result<()> {
    let missing = selection.missing_files()?;
    let Some(first) = missing.first() else { return Ok(()) };
    let message = format!(
        "the model `{}` is not installed: {} of its files are missing, the first is {}",
        selection.spec.name,
        missing.len(),
        first.display()
    );
    let hint = "run `handler prefetch`, or take `tiny`, which needs no files";
    Err(Error::new(ErrorKind::ModelNotFound, message).with_hint(hint))
}

/// One generation, while its networks arrive.
struct Run<'a> {
    device: &'a Device,
    selection: Selection<'a>,
    settings: &'a Settings,
    extent: Extent,
    texts: &'a Texts,
}

impl Run<'_> {
    fn make(
        &self,
        inputs: &Inputs,
        output: &Path,
        supply: &mut Supply,
        control: &mut Control,
    ) -> Result<Video> {
        let Self { settings, extent: Extent { size, frames, .. }, .. } = *self;
        if supply.is_complete() {
            (control.progress)(Progress::at(Stage::Audio)); // else it is told what is read
        }
        let (conditioning, audio, encode) = self.conditioning(inputs, supply, control)?;
        let track = audio_track(inputs, settings, frames);
        let vae = supply.take::<wan_vae::Vae>(NetworkKind::Vae, control)?;
        let dit = supply.take::<wan::Model>(NetworkKind::Dit, control)?;

        let mut writer = VideoWriter::create(
            output,
            VideoOptions {
                width: size.width,
                height: size.height,
                frames: frames as u64,
                quality: Quality::default(),
                audio: Some(track),
            },
        )?;
        let mut watch = Stopwatch::new(control.progress);
        watch.tell(Progress::at(Stage::Audio));
        let (mut thumbnail, mut muxing) = (None, Duration::ZERO);
        let mut sampling = settings.sampling.clone();
        sampling.max_frames = frames;
        let mut tell = |progress| watch.tell(progress);
        let made = generate_windows(
            Networks { dit: &dit, vae: &vae },
            &conditioning,
            &sampling,
            &mut |window, shape| Ok(noise(settings.seed, window, shape)?.to_device(self.device)?),
            &mut Control { cancel: control.cancel, progress: &mut tell },
            &mut |part| {
                for frame in frames_to_rgb(&part)? {
                    if settings.thumbnail && thumbnail.is_none() {
                        thumbnail = Some(thumbnail_jpeg(&frame, size.width, size.height)?);
                    }
                    let waited = Instant::now();
                    writer.push(frame)?;
                    muxing += waited.elapsed();
                }
                Ok(())
            },
        )?;
        debug_assert_eq!(made.frames, frames);
        let closing = Instant::now();
        let summary = writer.finish()?;
        let mux = muxing + closing.elapsed();
        watch.tell(Progress { stage: Stage::Done, ..watch.last });
        let timings = watch.timings(muxing);
        let timings = Timings { audio, encode: encode + timings.encode, mux, ..timings };
        let (size_bytes, seed, remade_windows) = (summary.size_bytes, settings.seed, made.remade);
        let (loading, plan) = (None, None);
        Ok(Video { frames, size, size_bytes, seed, thumbnail, remade_windows, timings, loading, plan })
    }

    /// What the DiT is told: voices, prompts and portrait, each as soon as its encoder is there. Beside it there is
    /// how long the voices took, and the rest.
    fn conditioning(
        &self,
        inputs: &Inputs,
        supply: &mut Supply,
        control: &mut Control,
    ) -> Result<(Conditioning, Duration, Duration)> {
        let Self { device, settings, extent, .. } = *self;
        let (mut audio, mut encode) = (Duration::ZERO, Duration::ZERO);
        let audio_embeds = {
            let encoder = supply.take::<wav2vec2::Model>(NetworkKind::AudioEncoder, control)?;
            timed(&mut audio, || self.audio_embeds(&encoder, inputs))?
        };
        supply.done(NetworkKind::AudioEncoder);
        let (context, negative_context) = {
            let encoder = match self.texts.cover(settings) {
                true => None,
                false => Some(supply.take::<umt5::Model>(NetworkKind::TextEncoder, control)?),
            };
            let rows = |text: &str| self.texts.rows(&self.selection, encoder.as_deref(), text);
            timed(&mut encode, || {
                let negative = settings.needs_negative_prompt().then(|| rows(&settings.negative_prompt));
                Ok((rows(&settings.prompt)?, negative.transpose()?))
            })?
        };
        supply.done(NetworkKind::TextEncoder);
        let frame = inputs.portrait.fit(extent.size).to_tensor(device)?;
        let image_embeds = {
            let clip = supply.take::<clip_vision::Model>(NetworkKind::ImageEncoder, control)?;
            timed(&mut encode, || Reference::image_embeds(&clip, &frame))?
        };
        supply.done(NetworkKind::ImageEncoder);
        let vae = supply.take::<wan_vae::Vae>(NetworkKind::Vae, control)?;
        let window = settings.sampling.frames_per_window;
        let reference = timed(&mut encode, || Reference::encode(&vae, frame, image_embeds, window))?;

        let source = inputs.portrait.size();
        let masks = match (audio_embeds.len(), settings.boxes) {
            (1, _) => None,
            (_, None) => Some(PersonMasks::halves(source, DEFAULT_FACE_SCALE)),
            (_, Some(boxes)) => Some(PersonMasks::from_boxes(source, boxes)?),
        };
        let masks = masks.map(|masks| masks.latents(extent.size, device)).transpose()?;
        let references = vec![(0, reference)];
        Ok((Conditioning { references, audio_embeds, context, negative_context, masks }, audio, encode))
    }

    /// Each person's embeddings (frames, layers, channels). Audio of a window or less is followed by silence, so
    /// that the window has the audio around its last frame, too.
    fn audio_embeds(&self, encoder: &wav2vec2::Model, inputs: &Inputs) -> Result<Vec<Tensor>> {
        let Self { settings, extent: Extent { frames, .. }, .. } = *self;
        let normalized = |voice: &Voice| {
            let mut signal = voice.signal().to_vec();
            normalize_to(&mut signal, VOICE_RATE_HZ, TARGET_LUFS);
            signal
        };
        let first = normalized(&inputs.voice);
        let signals = match &inputs.second_voice {
            None => vec![first],
            Some(second) => settings.speakers.assemble(Some(&first), Some(&normalized(second))).into(),
        };
        let window = settings.sampling.frames_per_window;
        let len = if frames <= window { window + 2 } else { frames };
        let embed = |mut signal: Vec<f32>| {
            signal.truncate(frames * SAMPLES_PER_FRAME);
            signal.resize(len * SAMPLES_PER_FRAME, 0.0);
            Ok(encoder.embed(&signal, len)?)
        };
        signals.into_iter().map(embed).collect()
    }
}

/// Adds how long `work` takes to `spent`.
fn timed<T>(spent: &mut Duration, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let began = Instant::now();
    let done = work();
    *spent += began.elapsed();
    done
}

/// The voices as the video's sound, cut where the picture ends.
fn audio_track(inputs: &Inputs, settings: &Settings, frames: usize) -> AudioTrack {
    let track = Soundtrack::new(&inputs.voice, inputs.second_voice.as_ref(), settings.speakers);
    let sample_rate_hz = track.sample_rate_hz();
    let most = frames as u64 * u64::from(sample_rate_hz) / FPS as u64;
    AudioTrack {
        sample_rate_hz,
        channels: track.channels() as u16,
        samples: track.samples().min(most),
        blocks: Box::new(track.into_blocks()),
    }
}

/// Standard normal noise of `shape` for one window: the same for the same seed and window on every machine.
fn noise(seed: u64, window: usize, shape: (usize, usize, usize, usize)) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(window as u64);
    let count = shape.0 * shape.1 * shape.2 * shape.3;
    let values: Vec<f32> = StandardNormal.sample_iter(&mut rng).take(count).collect();
    Ok(Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?)
}

/// Passes progress on and adds up how long each stage took.
struct Stopwatch<'a> {
    progress: &'a mut dyn FnMut(Progress),
    last: Progress,
    since: Instant,
    timings: Timings,
    steps: u32,
}

impl<'a> Stopwatch<'a> {
    fn new(progress: &'a mut dyn FnMut(Progress)) -> Self {
        let last = Progress::at(Stage::Audio);
        Self { progress, last, since: Instant::now(), timings: Timings::default(), steps: 0 }
    }

    fn tell(&mut self, progress: Progress) {
        let spent = self.since.elapsed();
        match self.last.stage {
            Stage::Denoise => {
                self.timings.denoise += spent;
                self.steps += 1;
                if self.steps == 1 {
                    self.timings.first_step = spent;
                }
            }
            Stage::Decode => self.timings.decode += spent,
            // Keys and values of text and image are made before the first step.
            Stage::Audio => self.timings.encode += spent,
            Stage::Load | Stage::Done => {}
        }
        (self.last, self.since) = (progress, Instant::now());
        (self.progress)(progress);
    }

    /// Without what was measured elsewhere; `muxing` is what of the decoding was waiting for the encoder.
    fn timings(self, muxing: Duration) -> Timings {
        Timings {
            per_step: self.timings.denoise / self.steps.max(1),
            decode: self.timings.decode.saturating_sub(muxing),
            ..self.timings
        }
    }
}
