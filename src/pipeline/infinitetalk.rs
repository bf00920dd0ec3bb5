//! The window loop: conditioning, denoising, decoding, colour, and the motion frames that carry one window into
//! the next.
//!
//! Source: MeiGen-AI/InfiniteTalk at 0107cd9, `wan/multitalk.py`, `InfiniteTalkPipeline.generate_infinitetalk`.
//! Different from the reference, without effect on the result: what does not change from window to window
//! (prompt, reference frame) is encoded once; passes that a scale of 1 cancels are not run; the noised motion
//! latents, which nothing reads, are not made. With an effect: the cache of residuals (TeaCache) is kept per branch and starts
//! afresh in every window, and each window draws its own noise.

use candle_core::{DType, Device, Tensor};

use super::color::match_colors;
use super::guidance::Guidance;
use super::plan::{Plan, Window};
use super::progress::{Cancel, Progress, Stage};
use super::teacache::{Residual, TeaCache};
use super::windows::{gather, mirror_tail};
use crate::models::{clip_vision, wan, wan_vae};
use crate::nn::{kernels, trace};
use crate::scheduler::{euler_step, timesteps};
use crate::{Error, ErrorKind, Result};

/// The networks that run once per window.
#[derive(Clone, Copy)]
pub struct Networks<'a> {
    /// The diffusion transformer with its audio adapter.
    pub dit: &'a wan::Model,
    /// The video autoencoder.
    pub vae: &'a wan_vae::Vae,
}

/// A reference frame, encoded. That needs no DiT, so it can be done while the DiT is being read.
#[derive(Clone)]
pub struct Reference {
    frame: Tensor,        // (3, 1, H, W) in [−1, 1]
    image_embeds: Tensor, // (1, 257, width)
    latents: Tensor,      // of the frame and grey frames after it, (16, T, h, w)
}

impl Reference {
    /// The rows (1, 257, width) that the image encoder makes of `frame` (3, 1, H, W) in [−1, 1].
    ///
    /// # Errors
    /// [`ErrorKind::Inference`].
    pub fn image_embeds(clip: &clip_vision::Model, frame: &Tensor) -> Result<Tensor> {
        Ok(clip.forward(&clip.preprocess(frame)?)?)
    }

    /// Encodes `frame` (3, 1, H, W) in [−1, 1], for windows of `frames_per_window` frames, whose
    /// [`Reference::image_embeds`] are there.
    ///
    /// # Errors
    /// [`ErrorKind::Inference`].
    pub fn encode(
        vae: &wan_vae::Vae,
        frame: Tensor,
        image_embeds: Tensor,
        frames_per_window: usize,
    ) -> Result<Self> {
        let (channels, _, height, width) = frame.dims4()?;
        let grey_shape = (channels, frames_per_window - 1, height, width);
        let grey = Tensor::zeros(grey_shape, frame.dtype(), frame.device())?;
        let latents = vae.encode(&Tensor::cat(&[&frame, &grey], 1)?)?; // (16, T, h, w)
        Ok(Self { frame, image_embeds, latents })
    }
}

/// What the video shows and says.
pub struct Conditioning {
    /// The reference frames, all of one size, each with the first frame of the video that it is meant for: a window
    /// takes the last one at or before its start. Colours are matched to the first one.
    pub references: Vec<(usize, Reference)>,
    /// One or two persons' audio embeddings (frames, layers, channels) at 25 frames a second.
    pub audio_embeds: Vec<Tensor>,
    /// The prompt (rows, width).
    pub context: Tensor,
    /// The negative prompt (rows, width); needed when the text guidance is not 1.
    pub negative_context: Option<Tensor>,
    /// Where person 1, person 2 and the background are, (3, H/8, W/8) of 0 and 1; needed for two persons.
    pub masks: Option<Tensor>,
}

/// How a video is sampled.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// Frames of a window, 4n+1.
    pub frames_per_window: usize,
    /// Frames that a window takes over from the one before, 4n+1.
    pub motion_frames: usize,
    /// The video is cut at this many frames.
    pub max_frames: usize,
    /// Denoising steps of a window.
    pub num_steps: usize,
    /// Shift of the time steps.
    pub shift: f64,
    /// Guidance by text and audio.
    pub guidance: Guidance,
    /// How far each window's colours are drawn to those of the reference frame, 0…1.
    pub color_correction: f64,
    /// Skips blocks whose input hardly changed, where wanted.
    pub teacache: Option<TeaCache>,
}

/// What a caller sees and steers while windows are made.
pub struct Control<'a> {
    /// Ends the generation at the next denoising step.
    pub cancel: &'a Cancel,
    /// Told where the generation stands.
    pub progress: &'a mut dyn FnMut(Progress),
}

/// Draws the noise of a window, given its index and the shape (16, T, h, w) of the latents.
pub type Noise<'a> = dyn FnMut(usize, (usize, usize, usize, usize)) -> Result<Tensor> + 'a;

/// What depends on the reference frame alone.
struct Scene {
    reference_index: usize,
    prompt: wan::Context,
    negative_prompt: Option<wan::Context>,
    /// Mask and latents of the reference frame followed by grey frames, (20, T, h, w).
    y: Tensor,
}

/// What was made by [`generate_windows`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generated {
    /// Frames of the video.
    pub frames: usize,
    /// Windows that came out broken and were made again on plain kernels.
    pub remade: usize,
}

/// Makes the video window by window and hands each window's new frames (3, F, H, W) in [−1, 1] to `sink`, in
/// order; nothing of a window is kept but its motion frames.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for settings that do not fit together, [`ErrorKind::Cancelled`],
/// [`ErrorKind::Numeric`] when a window is not finite or black, twice, [`ErrorKind::Inference`], and what `noise`
/// and `sink` return.
pub fn generate_windows(
    networks: Networks,
    conditioning: &Conditioning,
    sampling: &Sampling,
    noise: &mut Noise,
    control: &mut Control,
    sink: &mut dyn FnMut(Tensor) -> Result<()>,
) -> Result<Generated> {
    let mut maker = WindowMaker::new(networks, conditioning, sampling)?;
    let mut motion: Option<Tensor> = None;
    for window in maker.plan.windows() {
        let video = maker.make(window, motion.as_ref(), noise, control)?; // (3, F, H, W)
        let keep = sampling.motion_frames;
        motion = Some(video.narrow(1, sampling.frames_per_window - keep, keep)?.contiguous()?);
        sink(video.narrow(1, window.skip, window.take)?)?;
    }
    Ok(Generated { frames: maker.plan.total_frames(), remade: maker.remade })
}

/// A picture whose brightest value is below this, in [−1, 1], is black: two steps of 8 bits.
const BLACK: f32 = -1.0 + 2.0 * 2.0 / 255.0;

/// Makes single windows; what the reference frame determines is kept from one to the next.
pub struct WindowMaker<'a> {
    networks: Networks<'a>,
    conditioning: &'a Conditioning,
    sampling: &'a Sampling,
    plan: Plan,
    scene: Option<Scene>,
    no_audio: wan::Audio,
    remade: usize,
}

impl<'a> WindowMaker<'a> {
    /// Plans the windows.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for settings that do not fit together, [`ErrorKind::MissingField`] without audio.
    pub fn new(
        networks: Networks<'a>,
        conditioning: &'a Conditioning,
        sampling: &'a Sampling,
    ) -> Result<Self> {
        let no_audio = no_audio(networks, conditioning, sampling)?;
        let lens =
            conditioning.audio_embeds.iter().map(|e| e.dim(0)).collect::<candle_core::Result<Vec<_>>>()?;
        let plan = Plan::new(sampling.frames_per_window, sampling.motion_frames, &lens, sampling.max_frames)?;
        Ok(Self { networks, conditioning, sampling, plan, scene: None, no_audio, remade: 0 })
    }

    /// The windows that make the video.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// All F frames of a window, (3, F, H, W) in [−1, 1], after colour matching. `motion` (3, M, H, W) are the last
    /// frames of the window before, none for the first. A window that comes out broken is made once more, with the
    /// same noise, on plain kernels: ours may be at fault.
    ///
    /// # Errors
    /// Those of [`generate_windows`].
    pub fn make(
        &mut self,
        window: Window,
        motion: Option<&Tensor>,
        noise: &mut Noise,
        control: &mut Control,
    ) -> Result<Tensor> {
        match self.attempt(window, motion, noise, control) {
            Err(e) if e.kind() == ErrorKind::Numeric && !kernels::are_plain() => {
                self.remade += 1;
                kernels::plainly(|| {
                    // What is kept from window to window may be broken as well.
                    self.scene = None;
                    self.no_audio = no_audio(self.networks, self.conditioning, self.sampling)?;
                    self.attempt(window, motion, noise, control)
                })
            }
            made => made,
        }
    }

    fn attempt(
        &mut self,
        window: Window,
        motion: Option<&Tensor>,
        noise: &mut Noise,
        control: &mut Control,
    ) -> Result<Tensor> {
        let w = window.index;
        let audio = self.audio(window)?;
        self.enter_scene(window)?;
        let Some(scene) = &self.scene else { return Err(no_reference()) };
        let motion_latents = match motion {
            // The VAE is causal: the first latent frame of the padded clip is that of the frame alone.
            None => scene.y.narrow(0, 4, scene.y.dim(0)? - 4)?.narrow(1, 0, 1)?.contiguous()?,
            Some(motion) => {
                trace::record(|| format!("w{w}.cond_frame"), motion);
                self.networks.vae.encode(motion)?
            }
        };
        trace::record(|| format!("w{w}.latent_motion_frames"), &motion_latents);
        let (_, t, h, wd) = scene.y.dims4()?;
        let noise = noise(w, (motion_latents.dim(0)?, t, h, wd))?;
        let latents = self.denoise(window, scene, &audio, &motion_latents, noise, control)?;
        trace::record(|| format!("w{w}.x0"), &latents);

        (control.progress)(self.progress(window, Stage::Decode, self.sampling.num_steps));
        let video = self.networks.vae.decode(&latents)?; // (3, F, H, W)
        trace::record(|| format!("w{w}.decoded"), &video);
        self.check(window, &video)?;
        let strength = self.sampling.color_correction;
        let video = match strength > 0.0 {
            true => match_colors(&video, &first_reference(self.conditioning)?.frame, strength)?,
            false => video,
        };
        trace::record(|| format!("w{w}.corrected"), &video);
        Ok(video)
    }

    /// Fails where the frames of a window are not finite, or black without a black portrait.
    fn check(&self, window: Window, video: &Tensor) -> Result<()> {
        let reference = &first_reference(self.conditioning)?.frame;
        // One look at the device for all three.
        let values = Tensor::stack(&[video.sum_all()?, video.max_all()?, reference.max_all()?], 0)?;
        let [sum, brightest, of_reference] = values.to_vec1::<f32>()?[..] else {
            return Err(Error::new(ErrorKind::Inference, "three values were asked for"));
        };
        let broken = match (sum.is_finite(), brightest < BLACK && of_reference >= BLACK) {
            (false, _) => "holds values that are not finite",
            (true, true) => "is black",
            (true, false) => return Ok(()),
        };
        let message = format!("window {} of {} {broken}", window.index + 1, self.plan.num_windows());
        Err(Error::new(ErrorKind::Numeric, message))
    }

    /// The audio embeddings around the window's frames, as the DiT's keys and values.
    fn audio(&self, window: Window) -> Result<wan::Audio> {
        let end = window.start + self.sampling.frames_per_window;
        let extend = |embeds: &Tensor| match window.is_last && window.index > 0 {
            true => mirror_tail(embeds, end),
            false => Ok(embeds.clone()),
        };
        let embeds =
            self.conditioning.audio_embeds.iter().map(extend).collect::<candle_core::Result<Vec<_>>>()?;
        let audio = gather(&embeds, window.start, self.sampling.frames_per_window)?;
        trace::record(|| format!("w{}.audio", window.index), &audio);
        Ok(self.networks.dit.encode_audio(&audio)?)
    }

    /// Takes the window's reference frame, unless the window before had the same.
    fn enter_scene(&mut self, window: Window) -> Result<()> {
        let Conditioning { references, context, negative_context, .. } = self.conditioning;
        let reference_index = references.iter().rposition(|(from, _)| *from <= window.start).unwrap_or(0);
        if self.scene.as_ref().is_some_and(|scene| scene.reference_index == reference_index) {
            return Ok(());
        }
        let Some((_, Reference { frame, image_embeds, latents })) = references.get(reference_index) else {
            return Err(no_reference());
        };
        let (w, dit) = (window.index, self.networks.dit);
        trace::record(|| format!("w{w}.cond_image"), frame);
        trace::record(|| format!("w{w}.clip_context"), image_embeds);
        trace::record(|| format!("w{w}.padded_video_latent"), latents);
        let negative_prompt = if self.sampling.guidance.branches().iter().all(|b| b.has_prompt()) {
            None
        } else {
            let Some(negative) = negative_context else {
                let message = "the text guidance is not 1, so a negative prompt is needed";
                return Err(Error::new(ErrorKind::MissingField, message));
            };
            Some(dit.encode_context(negative, image_embeds)?)
        };
        // The latents were made by the kernels that are now in doubt.
        let latents = match kernels::are_plain() {
            true => {
                let window = self.sampling.frames_per_window;
                &Reference::encode(self.networks.vae, frame.clone(), image_embeds.clone(), window)?.latents
            }
            false => latents,
        };
        let y = Tensor::cat(&[&first_frame_mask(latents)?, latents], 0)?;
        trace::record(|| format!("w{w}.y"), &y);
        let prompt = dit.encode_context(context, image_embeds)?;
        self.scene = Some(Scene { reference_index, prompt, negative_prompt, y });
        Ok(())
    }

    /// Denoises `noise` (16, T, h, w) to clean latents; the motion latents (16, k, h, w) stand in its first
    /// frames before every pass and at the end.
    fn denoise(
        &self,
        window: Window,
        scene: &Scene,
        audio: &wan::Audio,
        motion_latents: &Tensor,
        noise: Tensor,
        control: &mut Control,
    ) -> Result<Tensor> {
        let (w, Sampling { num_steps, shift, guidance, teacache, .. }) = (window.index, self.sampling);
        let dit = self.networks.dit;
        let known = motion_latents.dim(1)?;
        let with_motion = |latents: &Tensor| {
            let rest = latents.narrow(1, known, latents.dim(1)? - known)?;
            Tensor::cat(&[motion_latents, &rest], 1)
        };
        let masks = self.conditioning.masks.as_ref();
        let branches = guidance.branches();
        let mut residuals = vec![Residual::default(); branches.len()];
        let mut combine = guidance.start_window();
        let mut latents = with_motion(&noise)?;
        let ts = timesteps(*num_steps, *shift);
        let decisions = match teacache {
            Some(cache) => {
                let modulation = |t: &f32| Ok(dit.modulation(f64::from(*t))?.1);
                let modulations = ts[..*num_steps].iter().map(modulation).collect::<Result<Vec<_>>>()?;
                Some(cache.decide(&modulations)?)
            }
            None => None,
        };
        for (step, t) in ts.windows(2).enumerate() {
            control.cancel.check()?;
            (control.progress)(self.progress(window, Stage::Denoise, step));
            trace::record(|| format!("w{w}.step{step}.latent_in"), &latents);
            let embedded = dit.embed(&latents, &scene.y, f64::from(t[0]))?;
            let mut outputs = Vec::with_capacity(3);
            for (pass, (branch, residual)) in branches.iter().zip(&mut residuals).enumerate() {
                let context = match (&scene.negative_prompt, branch.has_prompt()) {
                    (Some(negative_prompt), false) => negative_prompt,
                    _ => &scene.prompt,
                };
                let audio = if branch.has_audio() { audio } else { &self.no_audio };
                let blocks = || dit.blocks(&embedded, context, audio, masks);
                let xs = match &decisions {
                    None => blocks()?,
                    Some(decisions) => residual.apply(decisions[step].skips, &embedded.xs, blocks)?,
                };
                let velocity = dit.head(&xs, &embedded)?;
                trace::record(|| format!("w{w}.step{step}.pass{pass}"), &velocity);
                outputs.push(velocity);
            }
            let velocity = combine.combine(&outputs)?;
            latents = with_motion(&euler_step(&latents, &velocity, t[0], t[1])?)?;
        }
        Ok(latents)
    }

    fn progress(&self, window: Window, stage: Stage, step: usize) -> Progress {
        Progress {
            stage,
            loading: None,
            window: window.index,
            windows: self.plan.num_windows(),
            step,
            steps: self.sampling.num_steps,
        }
    }
}

/// The keys and values of a window without audio.
fn no_audio(networks: Networks, conditioning: &Conditioning, sampling: &Sampling) -> Result<wan::Audio> {
    let Some(first) = conditioning.audio_embeds.first() else {
        return Err(Error::new(ErrorKind::MissingField, "there is no audio embedding"));
    };
    let silent = gather(&[first.zeros_like()?], 0, sampling.frames_per_window)?;
    Ok(networks.dit.encode_audio(&silent)?)
}

fn first_reference(conditioning: &Conditioning) -> Result<&Reference> {
    conditioning.references.first().map(|(_, reference)| reference).ok_or_else(no_reference)
}

fn no_reference() -> Error {
    Error::new(ErrorKind::InvalidInput, "there is no reference frame")
}

/// Four mask channels beside `latents` (16, T, h, w): 1 in the first latent frame, which is given, else 0.
fn first_frame_mask(latents: &Tensor) -> candle_core::Result<Tensor> {
    let (_, t, h, w) = latents.dims4()?;
    let (dtype, device): (DType, &Device) = (latents.dtype(), latents.device());
    let known = Tensor::ones((4, 1, h, w), dtype, device)?;
    Tensor::cat(&[known, Tensor::zeros((4, t - 1, h, w), dtype, device)?], 1)
}
