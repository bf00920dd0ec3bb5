//! Prompt → cleaned text → UMT5 ids.
//!
//! Reference: `wan/modules/tokenizers.py` of MeiGen-AI/InfiniteTalk at 0107cd9. Where we differ: the reference pads
//! to 512 ids and masks them again; here a prompt has the ids it has.

use std::path::Path;

use crate::text_cleaning::clean;
use crate::{Error, ErrorKind, Result};

/// The longest prompt that the DiT takes, in ids, `</s>` included.
pub const MAX_LEN: usize = 512;

/// The end of a text.
const EOS: &str = "</s>";

/// Maps prompts to ids.
#[derive(Clone, Debug)]
pub struct Tokenizer(Kind);

#[derive(Clone, Debug)]
enum Kind {
    File { tokenizer: Box<tokenizers::Tokenizer>, eos: u32 },
    Bytes,
}

impl Tokenizer {
    /// Size of the vocabulary of [`Tokenizer::bytes`].
    pub const BYTES_VOCAB: usize = Self::FIRST_BYTE as usize + 256;

    const BYTES_EOS: u32 = 1;
    const FIRST_BYTE: u32 = 3;

    /// Reads a `tokenizer.json` of Hugging Face's tokenizers, such as that of `google/umt5-xxl`.
    ///
    /// Fails with [`ErrorKind::ModelNotFound`] when the file cannot be read, and with [`ErrorKind::ModelCorrupt`]
    /// when it is no tokenizer or has no `</s>`.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let bytes = std::fs::read(&path);
        let path = path.as_ref().display();
        let bytes = bytes.map_err(|e| {
            Error::new(ErrorKind::ModelNotFound, format!("tokenizer {path}: cannot be read: {e}"))
                .with_source(e)
        })?;
        let corrupt = |what: String| Error::new(ErrorKind::ModelCorrupt, format!("tokenizer {path}: {what}"));
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| corrupt(format!("is no tokenizer.json: {e}")).with_source(e))?;
        // Length and `</s>` are ours to decide, whatever the file was saved with.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| corrupt(format!("truncation: {e}")).with_source(e))?;
        let eos = tokenizer.token_to_id(EOS).ok_or_else(|| corrupt(format!("has no token {EOS}")))?;
        Ok(Self(Kind::File { tokenizer: Box::new(tokenizer), eos }))
    }

    /// A tokenizer without a file, whose ids are the text's UTF-8 bytes + 3, as in ByT5: 0 is padding, 1 is `</s>`,
    /// 2 is unused, and a token table of [`Tokenizer::BYTES_VOCAB`] entries holds them all. For models that were
    /// never trained.
    pub fn bytes() -> Self {
        Self(Kind::Bytes)
    }

    /// The ids of the cleaned `text`, at most [`MAX_LEN`] with the `</s>` that ends them.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let text = clean(text);
        let (mut ids, eos) = match &self.0 {
            Kind::File { tokenizer, eos } => {
                let encoding = tokenizer.encode_fast(text, false).map_err(|e| {
                    Error::new(ErrorKind::InvalidInput, format!("the prompt cannot be tokenized: {e}"))
                        .with_source(e)
                })?;
                (encoding.get_ids().to_vec(), *eos)
            }
            Kind::Bytes => {
                (text.bytes().map(|byte| Self::FIRST_BYTE + u32::from(byte)).collect(), Self::BYTES_EOS)
            }
        };
        ids.truncate(MAX_LEN - 1);
        ids.push(eos);
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tokenizer of the kind that UMT5 has: Unigram over pieces that start with `▁`, and `</s>` at the end; saved
    /// with padding and truncation, which must not count.
    fn unigram_json(eos: &str) -> String {
        serde_json::json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": {
                "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"
            },
            "added_tokens": [{
                "id": 1, "content": eos, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true
            }],
            "normalizer": null,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": eos, "type_id": 0}}],
                "pair": [],
                "special_tokens": {eos: {"id": eos, "ids": [1], "tokens": [eos]}}
            },
            "decoder": null,
            "model": {
                "type": "Unigram", "unk_id": 2, "byte_fallback": false,
                "vocab": [
                    ["<pad>", 0.0], [eos, 0.0], ["<unk>", 0.0],
                    ["▁a", -2.0], ["▁woman", -3.0], ["▁sing", -4.0], ["s", -5.0], ["é", -6.0]
                ]
            }
        })
        .to_string()
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn a_file_of_unigram_pieces_gives_cleaned_text_with_an_end() {
        let tokenizer = Tokenizer::from_file(file(&unigram_json(EOS)).path()).unwrap();
        assert_eq!(tokenizer.encode("  a  woman\n sings ").unwrap(), [3, 4, 5, 6, 1]);
        assert_eq!(tokenizer.encode("a\u{a0}sing&eacute;").unwrap(), [3, 5, 7, 1]);
        assert_eq!(tokenizer.encode("").unwrap(), [1]);
    }

    #[test]
    fn long_prompts_are_cut_and_keep_their_end() {
        let tokenizer = Tokenizer::from_file(file(&unigram_json(EOS)).path()).unwrap();
        for (words, expected) in [(510, 511), (511, 512), (512, 512), (2000, 512)] {
            let ids = tokenizer.encode(&"a ".repeat(words)).unwrap();
            assert_eq!((ids.len(), ids.last()), (expected, Some(&1)), "{words} words");
        }
        assert_eq!(Tokenizer::bytes().encode(&"x".repeat(5000)).unwrap().len(), MAX_LEN);
    }

    #[test]
    fn files_that_are_no_tokenizer_are_errors() {
        let error = |path: &Path| Tokenizer::from_file(path).unwrap_err();
        assert_eq!(error(Path::new("no/such/tokenizer.json")).kind(), ErrorKind::ModelNotFound);
        assert_eq!(error(file("{}").path()).kind(), ErrorKind::ModelCorrupt);
        let without_end = error(file(&unigram_json("<end>")).path());
        assert_eq!(without_end.kind(), ErrorKind::ModelCorrupt);
        assert!(without_end.to_string().contains("has no token </s>"), "{without_end}");
    }

    #[test]
    fn bytes_fit_their_vocabulary() {
        let tokenizer = Tokenizer::bytes();
        assert_eq!(tokenizer.encode("A é").unwrap(), [0x41 + 3, 0x20 + 3, 0xc3 + 3, 0xa9 + 3, 1]);
        assert!(
            tokenizer
                .encode("\u{10ffff}😀é")
                .unwrap()
                .iter()
                .all(|&id| (id as usize) < Tokenizer::BYTES_VOCAB)
        );
    }
}
