//! Classifier-free guidance over text and audio, plain or projected (APG).
//!
//! Source: MeiGen-AI/InfiniteTalk at 0107cd9, `wan/multitalk.py` (`generate_infinitetalk`,
//! `adaptive_projected_guidance`); APG: Sadat et al., "Eliminating Oversaturation and Artifacts of High Guidance
//! Scales in Diffusion Models", arXiv 2410.02416.
//!
//! With c = (prompt, audio), dt = (negative prompt, audio), u = (negative prompt, no audio) and
//! da = (prompt, no audio), the reference's sums `u + s_t (c − dt) + s_a (dt − u)` and `da + s_a (c − da)` are
//! written as `c + (s_t − 1) P(c − dt) + (s_a − 1) P(dt − u)` and `c + (s_a − 1) P(c − da)`, where P is the
//! identity, or the projection of APG. A scale of 1 then removes its term, and the passes that only that term
//! needs are not run; the reference always runs two or three.

use candle_core::{DType, Result, Tensor};

use crate::nn::trace;

/// One conditioning of the diffusion transformer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Branch {
    /// Prompt and audio.
    Cond,
    /// Negative prompt and audio.
    DropText,
    /// Negative prompt, no audio.
    Uncond,
    /// Prompt, no audio.
    DropAudio,
}

impl Branch {
    /// Whether the branch is conditioned on the prompt (else on the negative prompt).
    pub fn has_prompt(self) -> bool {
        matches!(self, Self::Cond | Self::DropAudio)
    }

    /// Whether the branch hears the audio.
    pub fn has_audio(self) -> bool {
        matches!(self, Self::Cond | Self::DropText)
    }
}

/// Settings of adaptive projected guidance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Apg {
    /// Weight of the running mean of earlier differences; the reference uses −0.75.
    pub momentum: f64,
    /// Largest L2 norm of a difference, over the whole tensor; 0 or less = no limit. The reference uses 55.
    pub norm_threshold: f64,
}

/// How strongly text and audio steer; a scale of 1 does not steer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guidance {
    /// Text guidance scale.
    pub text: f64,
    /// Audio guidance scale.
    pub audio: f64,
    /// Adaptive projected guidance, where it is wanted.
    pub apg: Option<Apg>,
}

impl Guidance {
    /// The branches a step has to evaluate, in the order in which [`Combine::combine`] takes their outputs.
    pub fn branches(&self) -> &'static [Branch] {
        match (is_one(self.text), is_one(self.audio)) {
            (true, true) => &[Branch::Cond],
            (true, false) => &[Branch::Cond, Branch::DropAudio],
            (false, true) => &[Branch::Cond, Branch::DropText],
            (false, false) => &[Branch::Cond, Branch::DropText, Branch::Uncond],
        }
    }

    /// The state of one window.
    pub fn start_window(&self) -> Combine {
        Combine { guidance: *self, text: Running::default(), audio: Running::default() }
    }
}

fn is_one(scale: f64) -> bool {
    (scale - 1.0).abs() <= 1e-9 * scale.abs().max(1.0)
}

/// Combines the branches' velocities, step by step through one window.
#[derive(Clone, Debug)]
pub struct Combine {
    guidance: Guidance,
    text: Running,
    audio: Running,
}

impl Combine {
    /// The guided velocity from `outputs`, one tensor per branch of [`Guidance::branches`], all of one shape,
    /// f32.
    pub fn combine(&mut self, outputs: &[Tensor]) -> Result<Tensor> {
        let Guidance { text, audio, apg } = self.guidance;
        match outputs {
            [cond] => Ok(cond.clone()),
            [cond, drop_audio] if is_one(text) => {
                let diff = self.audio.project(&(cond - drop_audio)?, cond, apg)?;
                cond + (diff * (audio - 1.0))?
            }
            [cond, drop_text] => {
                let diff = self.text.project(&(cond - drop_text)?, cond, apg)?;
                cond + (diff * (text - 1.0))?
            }
            [cond, drop_text, uncond] => {
                let text_diff = self.text.project(&(cond - drop_text)?, cond, apg)?;
                let audio_diff = self.audio.project(&(drop_text - uncond)?, cond, apg)?;
                (cond + (text_diff * (text - 1.0))?)? + (audio_diff * (audio - 1.0))?
            }
            _ => candle_core::bail!("guidance over {} branches, expected 1 to 3", outputs.len()),
        }
    }
}

/// The running mean of one difference.
#[derive(Clone, Debug, Default)]
struct Running(Option<Tensor>);

impl Running {
    /// `diff` itself, or with APG: averaged with momentum, limited in norm, and freed of its part along `cond`.
    fn project(&mut self, diff: &Tensor, cond: &Tensor, apg: Option<Apg>) -> Result<Tensor> {
        let Some(Apg { momentum, norm_threshold }) = apg else { return Ok(diff.clone()) };
        let average = match &self.0 {
            Some(average) => (diff + (average * momentum)?)?,
            None => diff.clone(),
        };
        self.0 = Some(average.clone());
        let limited = if norm_threshold > 0.0 {
            let norm = average.sqr()?.sum_all()?.sqrt()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            (&average * (norm_threshold / norm).min(1.0))?
        } else {
            average
        };
        let projected = orthogonal(&limited, cond)?;
        trace::record_next("apg", &projected);
        Ok(projected)
    }
}

/// The part of `v` that is orthogonal to `direction`, both taken as one long vector; computed in f64.
pub fn orthogonal(v: &Tensor, direction: &Tensor) -> Result<Tensor> {
    let (v64, d64) = (v.to_dtype(DType::F64)?, direction.to_dtype(DType::F64)?);
    let norm = d64.sqr()?.sum_all()?.sqrt()?.to_scalar::<f64>()?.max(1e-12);
    let along = (&v64 * &d64)?.sum_all()?.to_scalar::<f64>()? / (norm * norm);
    (v64 - (d64 * along)?)?.to_dtype(v.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn vector(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).expect("a vector")
    }

    fn values(xs: &Tensor) -> Vec<f32> {
        xs.to_vec1().expect("f32 values")
    }

    #[test]
    fn passes_follow_the_scales() {
        let branches = |text, audio| Guidance { text, audio, apg: None }.branches();
        assert_eq!(branches(1.0, 1.0), [Branch::Cond]);
        assert_eq!(branches(1.0, 2.0), [Branch::Cond, Branch::DropAudio]);
        assert_eq!(branches(5.0, 1.0), [Branch::Cond, Branch::DropText]);
        assert_eq!(branches(5.0, 4.0), [Branch::Cond, Branch::DropText, Branch::Uncond]);
    }

    #[test]
    fn two_passes_without_audio_guidance_equal_three() -> Result<()> {
        let (c, dt, u) = (vector(&[1.0, 2.0]), vector(&[0.5, -1.0]), vector(&[3.0, 0.0]));
        for apg in [None, Some(Apg { momentum: -0.75, norm_threshold: 2.0 })] {
            let guidance = Guidance { text: 5.0, audio: 1.0, apg };
            let (mut two, mut three) = (guidance.start_window(), guidance.start_window());
            for _ in 0..3 {
                let two = two.combine(&[c.clone(), dt.clone()])?;
                let three = three.combine(&[c.clone(), dt.clone(), u.clone()])?;
                assert_eq!(values(&two), values(&three));
            }
        }
        Ok(())
    }

    #[test]
    fn plain_guidance_is_the_reference_sum() -> Result<()> {
        let (c, dt, u) = (vector(&[1.0, 2.0]), vector(&[0.5, -1.0]), vector(&[3.0, 0.0]));
        let out = Guidance { text: 5.0, audio: 4.0, apg: None }.start_window().combine(&[c, dt, u])?;
        // u + 5 (c − dt) + 4 (dt − u)
        assert_eq!(values(&out), [3.0 + 2.5 - 10.0, 0.0 + 15.0 - 4.0]);
        Ok(())
    }

    #[test]
    fn orthogonal_removes_the_direction() -> Result<()> {
        let out = orthogonal(&vector(&[3.0, 4.0]), &vector(&[2.0, 0.0]))?;
        assert_eq!(values(&out), [0.0, 4.0]);
        let out = orthogonal(&vector(&[3.0, 4.0]), &vector(&[0.0, 0.0]))?;
        assert_eq!(values(&out), [3.0, 4.0], "a zero direction takes nothing away");
        Ok(())
    }
}
