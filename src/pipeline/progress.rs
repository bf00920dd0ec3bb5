//! Progress out, cancellation in.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::prepared::NetworkKind;
use crate::{Error, ErrorKind, Result};

/// What a generation is busy with, in the order of the stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Reading weights; voices, prompt and portrait are encoded meanwhile.
    Load,
    /// Embedding the voices, encoding prompt and portrait, once all weights are there.
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
    /// What of the weights has been read, while they are.
    pub loading: Option<LoadProgress>,
    /// The window being made, from 0.
    pub window: usize,
    /// Windows in all; 0 until it is known.
    pub windows: usize,
    /// Denoising steps done in this window.
    pub step: usize,
    /// Denoising steps per window.
    pub steps: usize,
}

/// How far the weights have been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// The network that is being read.
    pub network: NetworkKind,
    /// Bytes of weight files that have been read.
    pub bytes_read: u64,
    /// Bytes that are read in all; 0 where weights are drawn.
    pub bytes_to_read: u64,
}

impl Progress {
    /// The beginning of `stage`, before there are windows.
    pub fn at(stage: Stage) -> Self {
        Self { stage, loading: None, window: 0, windows: 0, step: 0, steps: 0 }
    }
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
