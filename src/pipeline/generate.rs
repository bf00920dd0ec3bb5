//! One generation of the product: decoded inputs to an MP4.

use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::infinitetalk::{Conditioning, Control, generate_windows};
use super::load::Pipeline;
use super::progress::{Progress, Stage};
use super::settings::{FPS, Settings};
use crate::Result;
use crate::media::audio::{Soundtrack, Speakers, TARGET_LUFS, VOICE_RATE_HZ, Voice, normalize_to};
use crate::media::image::{DEFAULT_FACE_SCALE, PersonMasks, Portrait, Size, frames_to_rgb};
use crate::media::video::{AudioTrack, Quality, VideoOptions, VideoWriter, thumbnail_jpeg};

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
    /// Where the time went.
    pub timings: Timings,
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

impl Pipeline {
    /// Makes the video and writes it to `output`, which appears when it is complete.
    ///
    /// # Errors
    /// Those of [`generate_windows`], and [`ErrorKind::Encode`](crate::ErrorKind::Encode) when the file cannot be written.
    pub fn generate(
        &self,
        settings: &Settings,
        inputs: Inputs,
        output: &Path,
        control: Control,
    ) -> Result<Video> {
        let frames = num_frames(&inputs, settings);
        let size = settings.video_size(inputs.portrait.size());
        let mut watch = Stopwatch::new(control.progress);
        watch.tell(Progress { stage: Stage::Audio, window: 0, windows: 0, step: 0, steps: 0 });
        let started = Instant::now();
        let audio_embeds = self.audio_embeds(&inputs, settings, frames)?;
        let audio = started.elapsed();
        control.cancel.check()?;
        let conditioning = self.conditioning(&inputs.portrait, settings, size, audio_embeds)?;
        let track = audio_track(&inputs, settings, frames);
        drop(inputs); // The track decodes the original bytes; the 16 kHz signals have been heard.
        control.cancel.check()?;

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
        let (mut thumbnail, mut muxing) = (None, Duration::ZERO);
        let mut sampling = settings.sampling.clone();
        sampling.max_frames = frames;
        let mut tell = |progress| watch.tell(progress);
        let made = generate_windows(
            &self.networks,
            &conditioning,
            &sampling,
            &mut |window, shape| Ok(noise(settings.seed, window, shape)?.to_device(&self.device)?),
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
        debug_assert_eq!(made, frames);
        let closing = Instant::now();
        let summary = writer.finish()?;
        let mux = muxing + closing.elapsed();
        watch.tell(Progress { stage: Stage::Done, ..watch.last });
        let timings = watch.timings(audio, muxing, mux);
        let size_bytes = summary.size_bytes;
        Ok(Video { frames, size, size_bytes, seed: settings.seed, thumbnail, timings })
    }

    /// Each person's embeddings (frames, layers, channels). Audio of a window or less is followed by silence, so
    /// that the window has the audio around its last frame, too.
    fn audio_embeds(&self, inputs: &Inputs, settings: &Settings, frames: usize) -> Result<Vec<Tensor>> {
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
            Ok(self.audio_encoder.embed(&signal, len)?)
        };
        signals.into_iter().map(embed).collect()
    }

    /// Prompt, portrait and masks as tensors.
    fn conditioning(
        &self,
        portrait: &Portrait,
        settings: &Settings,
        size: Size,
        audio_embeds: Vec<Tensor>,
    ) -> Result<Conditioning> {
        let needs_negative = settings.sampling.guidance.branches().iter().any(|b| !b.has_prompt());
        let negative_context = match needs_negative {
            true => Some(self.context(&settings.negative_prompt)?),
            false => None,
        };
        let source = portrait.size();
        let masks = match (audio_embeds.len(), settings.boxes) {
            (1, _) => None,
            (_, None) => Some(PersonMasks::halves(source, DEFAULT_FACE_SCALE)),
            (_, Some(boxes)) => Some(PersonMasks::from_boxes(source, boxes)?),
        };
        let masks = masks.map(|masks| masks.latents(size, &self.device)).transpose()?;
        Ok(Conditioning {
            reference: vec![portrait.fit(size).to_tensor(&self.device)?],
            audio_embeds,
            context: self.context(&settings.prompt)?,
            negative_context,
            masks,
        })
    }

    /// A prompt's rows, as many as the DiT takes.
    fn context(&self, prompt: &str) -> Result<Tensor> {
        let rows = self.text_encoder.encode(&self.tokenizer.encode(prompt)?)?;
        let most = self.networks.dit.config().text_len;
        Ok(rows.narrow(0, 0, rows.dim(0)?.min(most))?)
    }
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
    spent: [Duration; 3], // between Audio, Denoise, Decode and what follows
    steps: u32,
}

impl<'a> Stopwatch<'a> {
    fn new(progress: &'a mut dyn FnMut(Progress)) -> Self {
        let last = Progress { stage: Stage::Audio, window: 0, windows: 0, step: 0, steps: 0 };
        Self { progress, last, since: Instant::now(), spent: Default::default(), steps: 0 }
    }

    fn tell(&mut self, progress: Progress) {
        let spent = match self.last.stage {
            Stage::Denoise => {
                self.steps += 1;
                Some(&mut self.spent[1])
            }
            Stage::Decode => Some(&mut self.spent[2]),
            Stage::Audio => Some(&mut self.spent[0]),
            Stage::Load | Stage::Done => None,
        };
        if let Some(spent) = spent {
            *spent += self.since.elapsed();
        }
        (self.last, self.since) = (progress, Instant::now());
        (self.progress)(progress);
    }

    fn timings(&self, audio: Duration, muxing_in_decode: Duration, mux: Duration) -> Timings {
        let [before_steps, denoise, decode] = self.spent;
        Timings {
            audio,
            encode: before_steps.saturating_sub(audio),
            denoise,
            per_step: denoise / self.steps.max(1),
            decode: decode.saturating_sub(muxing_in_decode),
            mux,
        }
    }
}
