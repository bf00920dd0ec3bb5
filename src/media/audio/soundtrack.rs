//! The audio track of the finished video: the voices as they came, not the 16 kHz that the networks hear.

use std::collections::VecDeque;

use symphonia::core::audio::{Channels, Position};

use super::decode::{Decoder, Format};
use super::resample::Resampler;
use super::voice::Original;
use super::{Speakers, Voice};
use crate::{Error, ErrorKind, Result};

/// Sample rates that AAC in our encoder takes.
const AAC_RATES_HZ: [u32; 12] =
    [8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000];

/// Where every other rate goes.
const FALLBACK_RATE_HZ: u32 = 48_000;

/// Channels at most; what has more is mixed down to stereo.
const MAX_CHANNELS: usize = 2;

/// An audio track of one or two voices, described; the samples come from [`Soundtrack::into_blocks`].
pub struct Soundtrack {
    voices: Vec<Original>,
    speakers: Speakers,
    sample_rate_hz: u32,
    channels: usize,
    samples: u64,
}

impl Soundtrack {
    /// The track of one voice, or of two by `speakers`. With two voices of different rates the track has the
    /// higher one.
    pub fn new(first: &Voice, second: Option<&Voice>, speakers: Speakers) -> Self {
        let voices: Vec<Original> =
            [Some(first), second].into_iter().flatten().map(|voice| voice.original().clone()).collect();
        let rate = |voice: &Original| {
            let rate = voice.format.sample_rate_hz;
            if AAC_RATES_HZ.contains(&rate) { rate } else { FALLBACK_RATE_HZ }
        };
        let sample_rate_hz = voices.iter().map(rate).max().unwrap_or(FALLBACK_RATE_HZ);
        let channels = voices.iter().map(|voice| voice.format.channels.min(MAX_CHANNELS)).max().unwrap_or(1);
        let lengths = voices
            .iter()
            .map(|voice| Resampler::output_len(voice.format.sample_rate_hz, sample_rate_hz, voice.samples));
        let samples = match speakers {
            Speakers::Together => lengths.max().unwrap_or(0),
            Speakers::InTurn => lengths.sum(),
        };
        Self { voices, speakers, sample_rate_hz, channels, samples }
    }

    /// Samples per second and channel: one of the rates AAC has.
    pub fn sample_rate_hz(&self) -> u32 {
        self.sample_rate_hz
    }

    /// 1 or 2.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Samples per channel.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Decodes the voices once more, in constant memory: blocks of interleaved samples within ±1,
    /// [`Soundtrack::samples`] × [`Soundtrack::channels`] in all.
    pub fn into_blocks(self) -> impl Iterator<Item = Result<Vec<f32>>> + Send + 'static {
        let Self { voices, speakers, sample_rate_hz, channels, samples } = self;
        let sources = voices.into_iter().map(|voice| Source::new(voice, sample_rate_hz, channels)).collect();
        Blocks { sources, speakers, channels, left: samples }
    }
}

struct Blocks {
    sources: VecDeque<Source>,
    speakers: Speakers,
    channels: usize,
    /// Samples per channel still to come.
    left: u64,
}

impl Iterator for Blocks {
    type Item = Result<Vec<f32>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let block = match self.speakers {
            Speakers::InTurn => self.next_in_turn(),
            Speakers::Together => self.next_together(),
        };
        let mut block = match block {
            Ok(block) => block,
            Err(e) => {
                self.left = 0;
                return Some(Err(e));
            }
        };
        if block.is_empty() {
            // The first pass counted what this one decodes, so this says that the two differ.
            let message =
                format!("the soundtrack ended {} samples early when it was decoded again", self.left);
            self.left = 0;
            return Some(Err(Error::new(ErrorKind::InvalidAudio, message).with_reason("AUDIO_CORRUPT")));
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).saturating_mul(self.channels);
        block.truncate(most);
        self.left -= (block.len() / self.channels) as u64;
        block.iter_mut().for_each(|x| *x = x.clamp(-1.0, 1.0));
        Some(Ok(block))
    }
}

impl Blocks {
    fn next_in_turn(&mut self) -> Result<Vec<f32>> {
        while let Some(source) = self.sources.front_mut() {
            source.fill()?;
            if !source.ready.is_empty() {
                return Ok(std::mem::take(&mut source.ready));
            }
            self.sources.pop_front();
        }
        Ok(Vec::new())
    }

    fn next_together(&mut self) -> Result<Vec<f32>> {
        for source in &mut self.sources {
            source.fill()?;
        }
        // A voice that has ended is silent; the others give as much as the shortest of them has ready.
        self.sources.retain(|source| !source.ready.is_empty());
        let count = self.sources.iter().map(|source| source.ready.len()).min().unwrap_or(0);
        let mut mixed = vec![0.0; count];
        for source in &mut self.sources {
            mixed.iter_mut().zip(source.ready.drain(..count)).for_each(|(sum, x)| *sum += x);
        }
        Ok(mixed)
    }
}

/// One voice at the rate and with the channels of the track.
struct Source {
    voice: Option<Original>,
    decoder: Option<Decoder>,
    mix: Mix,
    /// One per channel that is decoded and kept: a mono voice in a stereo track has one.
    resamplers: Vec<Resampler>,
    channels: usize,
    /// Interleaved samples that wait to be taken.
    ready: Vec<f32>,
}

impl Source {
    fn new(voice: Original, sample_rate_hz: u32, channels: usize) -> Self {
        let mix = Mix::new(&voice.format);
        let rate = voice.format.sample_rate_hz;
        let resamplers = (0..mix.outputs()).map(|_| Resampler::new(rate, sample_rate_hz)).collect();
        Self { voice: Some(voice), decoder: None, mix, resamplers, channels, ready: Vec::new() }
    }

    /// Decodes until samples are ready; at the end none are.
    fn fill(&mut self) -> Result<()> {
        let mut block = Vec::new();
        while self.ready.is_empty() {
            if let Some(voice) = self.voice.take() {
                self.decoder = Some(voice.decode()?);
            }
            let Some(decoder) = &mut self.decoder else { return Ok(()) };
            let mut planes = vec![Vec::new(); self.mix.outputs()];
            if decoder.next_block(&mut block)? {
                for ((i, plane), resampler) in planes.iter_mut().enumerate().zip(&mut self.resamplers) {
                    resampler.push(&self.mix.output(i, &block), plane);
                }
            } else {
                self.decoder = None;
                self.resamplers
                    .drain(..)
                    .zip(&mut planes)
                    .for_each(|(resampler, plane)| resampler.finish(plane));
            }
            let samples = planes.iter().map(Vec::len).min().unwrap_or(0);
            let last = planes.len().saturating_sub(1);
            // A mono voice is heard on both channels of a stereo track.
            self.ready.extend(
                (0..samples)
                    .flat_map(|i| (0..self.channels).map(move |c| (i, c)))
                    .map(|(i, c)| planes[c.min(last)][i]),
            );
        }
        Ok(())
    }
}

/// How the channels of a voice become one or two: the weights of each, per output.
struct Mix {
    channels: usize,
    weights: Vec<Vec<f32>>,
}

impl Mix {
    fn new(format: &Format) -> Self {
        let channels = format.channels;
        let weights = match channels {
            1 => vec![vec![1.0]],
            2 => vec![vec![1.0, 0.0], vec![0.0, 1.0]],
            _ => Self::downmix(format),
        };
        Self { channels, weights }
    }

    /// Stereo after ITU-R BS.775: the centre and the surrounds 3 dB lower, no low-frequency channel; scaled
    /// so that nothing can pass full scale. Channels without a position go to both sides.
    fn downmix(format: &Format) -> Vec<Vec<f32>> {
        let positions: Vec<Option<Position>> = match &format.layout {
            Channels::Positioned(positions) => positions.iter().map(Some).collect(),
            _ => vec![None; format.channels],
        };
        let side = |near: Position, far: Position| {
            let weight = |position: &Option<Position>| match *position {
                Some(Position::FRONT_LEFT | Position::FRONT_RIGHT) if position == &Some(front(near)) => 1.0,
                Some(position) if near.contains(position) => std::f32::consts::FRAC_1_SQRT_2,
                Some(position) if far.contains(position) => 0.0,
                Some(Position::LFE1 | Position::LFE2) => 0.0,
                _ => std::f32::consts::FRAC_1_SQRT_2,
            };
            let weights: Vec<f32> = positions.iter().map(weight).collect();
            let total: f32 = weights.iter().sum::<f32>().max(1.0);
            weights.into_iter().map(|w| w / total).collect()
        };
        vec![side(LEFT, RIGHT), side(RIGHT, LEFT)]
    }

    fn outputs(&self) -> usize {
        self.weights.len()
    }

    /// One output of an interleaved block.
    fn output(&self, index: usize, block: &[f32]) -> Vec<f32> {
        let weights = &self.weights[index];
        let frame = |frame: &[f32]| frame.iter().zip(weights).map(|(x, w)| x * w).sum();
        block.chunks_exact(self.channels).map(frame).collect()
    }
}

const LEFT: Position = Position::FRONT_LEFT
    .union(Position::REAR_LEFT)
    .union(Position::SIDE_LEFT)
    .union(Position::FRONT_LEFT_CENTER)
    .union(Position::TOP_FRONT_LEFT)
    .union(Position::TOP_REAR_LEFT);

const RIGHT: Position = Position::FRONT_RIGHT
    .union(Position::REAR_RIGHT)
    .union(Position::SIDE_RIGHT)
    .union(Position::FRONT_RIGHT_CENTER)
    .union(Position::TOP_FRONT_RIGHT)
    .union(Position::TOP_REAR_RIGHT);

fn front(side: Position) -> Position {
    side & (Position::FRONT_LEFT | Position::FRONT_RIGHT)
}

#[cfg(test)]
#[path = "soundtrack_tests.rs"]
mod tests;
