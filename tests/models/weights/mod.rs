//! Weight files: torch's archives, broken files, and whole checkpoints.

mod archive;
mod broken;
pub mod checkpoint;
mod drill;
mod torch;

use checkpoint::Kind;

/// Every network.
pub const KINDS: [Kind; 5] =
    [Kind::Dit, Kind::TextEncoder, Kind::ImageEncoder, Kind::Vae, Kind::AudioEncoder];
