//! Progress out, cancellation in.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, ErrorKind, Result};

/// What a generation is busy with, in the order of the stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Reading weights.
    Load,
    /// Decoding and embedding the voices, encoding prompt and portrait.
    Audio,
    /// Denoising a window.
    Denoise,
    /// Decoding a window to frames.
    Decode,
    /// The video is complete.
    Done,
}

/// Where a generation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What it is busy with.
    pub stage: Stage,
    /// The window being made, from 0.
    pub window: usize,
    /// Windows in all; 0 until it is known.
    pub windows: usize,
    /// Denoising steps done in this window.
    pub step: usize,
    /// Denoising steps per window.
    pub steps: usize,
}

/// A switch that ends a generation at the next denoising step; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks the generation to end.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// An error of kind [`ErrorKind::Cancelled`] once [`Cancel::cancel`] was called.
    pub fn check(&self) -> Result<()> {
        match self.0.load(Ordering::Relaxed) {
            true => Err(Error::new(ErrorKind::Cancelled, "the generation was cancelled")),
            false => Ok(()),
        }
    }
}
