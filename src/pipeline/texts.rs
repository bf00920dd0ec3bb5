//! What turns prompts into rows, beside the text encoder.

use std::cell::OnceCell;
use std::path::PathBuf;

use candle_core::{Device, Tensor};

use super::settings::Settings;
use crate::models::umt5;
use crate::prepared::{NetworkKey, NetworkKind, PromptEmbeds, Selection};
use crate::registry::TokenizerSource;
use crate::tokenizer::Tokenizer;
use crate::{Error, ErrorKind, Result};

/// What is kept of a model for its prompts.
pub(super) struct Texts {
    encoder: NetworkKey,
    tokenizer_files: Vec<PathBuf>,
    tokenizer: OnceCell<Tokenizer>,
    stored: PromptEmbeds,
}

impl Texts {
    /// Those of a model, `before` where they are the same.
    pub fn of(selection: &Selection, device: &Device, before: Option<Self>) -> Result<Self> {
        let encoder = selection.find(NetworkKind::TextEncoder)?.key;
        let tokenizer_files = match &selection.spec.tokenizer {
            TokenizerSource::Bytes => Vec::new(),
            TokenizerSource::Files(repos) => selection.storage.paths(repos).collect(),
        };
        match before {
            Some(texts) if texts.encoder == encoder && texts.tokenizer_files == tokenizer_files => Ok(texts),
            _ => Ok(Self {
                encoder,
                tokenizer_files,
                tokenizer: OnceCell::new(),
                stored: PromptEmbeds::open(selection, device)?,
            }),
        }
    }

    /// Whether the rows of all prompts are stored.
    pub fn cover(&self, settings: &Settings) -> bool {
        let stored = |text: &str| self.stored.get(text).is_some();
        stored(&settings.prompt) && (!settings.needs_negative_prompt() || stored(&settings.negative_prompt))
    }

    /// A prompt's rows, as many as the DiT takes: those that are stored, else those that `encoder` makes.
    ///
    /// # Errors
    /// `ModelCorrupt` for files of the tokenizer that are none, and `Inference` where an encoder is needed.
    pub fn rows(&self, selection: &Selection, encoder: Option<&umt5::Model>, prompt: &str) -> Result<Tensor> {
        let rows = match (self.stored.get(prompt), encoder) {
            (Some(stored), _) => stored.clone(),
            (None, Some(encoder)) => encoder.encode(&self.tokenizer(selection)?.encode(prompt)?)?,
            (None, None) => return Err(Error::new(ErrorKind::Inference, "a prompt needs the text encoder")),
        };
        let most = selection.spec.dit.config.text_len;
        Ok(rows.narrow(0, 0, rows.dim(0)?.min(most))?)
    }

    fn tokenizer(&self, selection: &Selection) -> Result<&Tokenizer> {
        if let Some(tokenizer) = self.tokenizer.get() {
            return Ok(tokenizer);
        }
        let tokenizer = selection.tokenizer()?;
        Ok(self.tokenizer.get_or_init(|| tokenizer))
    }
}
