//! Prepared weights: each network's tensors in one safetensors file, in the order in which they are loaded and the
//! precision in which they are used, LoRAs merged, the rest left out. A cold start reads a half to a third of the
//! bytes for it.
//!
//! ```text
//! <models>/prepared/dit-3f0c9a5be1d27784.safetensors    the tensors
//!                   dit-3f0c9a5be1d27784.json           its record: what it was made from, size, SHA-256
//!                   prompts-91b2….safetensors           UMT5's rows for the texts that models.toml names
//! ```
//!
//! A file is named after its [`NetworkKey`], not after a model: models that share a network share the file, and a
//! network whose sources, LoRAs or precision change has another key and is prepared anew.

mod encode;
mod key;
mod layout;
mod part;
mod prompts;
mod prune;
mod record;
mod selection;
mod write;

pub use key::{NetworkKey, NetworkKind, Precision};
pub use prompts::{PromptEmbeds, PromptPreparation, fixed_texts};
pub use prune::{Pruned, prune};
pub use record::{Prepared, Record};
pub use selection::{Found, Selection};
pub use write::Preparation;

/// Changes when files of before cannot be read, or mean something else.
const FORMAT: u32 = 1;

#[cfg(test)]
mod tests;
