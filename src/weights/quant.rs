//! Quantised checkpoints in the layout of optimum-quanto, as InfiniteTalk publishes them: `X.weight._data` (int8 or
//! `F8_E4M3`, (out, in)) times `X.weight._scale` (out, 1). Scalars `X.input_scale` and `X.output_scale` belong to
//! quantised activations, which no checkpoint uses, and are ignored.
//!
//! A quantised weight is given out under the name of the original. The product is rounded to the dtype of the scale,
//! bf16 in the published files, because the reference multiplies in that dtype; then to the dtype that was asked for.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use candle_core::DType;
use half::f16;
use safetensors::Dtype;
use serde::Deserialize;

use super::file::Tally;
use super::recipe::{Needed, Stored};
use super::{convert, corrupt};
use crate::Result;

/// What follows a weight's name for its integers or 8-bit floats.
pub(super) const DATA: &str = "._data";
/// What follows a weight's name for the scale of each row.
pub(super) const SCALE: &str = "._scale";

/// The JSON file beside a quantised checkpoint: module → how its weight is stored.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Map(BTreeMap<String, Entry>);

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    #[serde(rename = "weights")]
    _weights: WeightFormat,
    #[serde(rename = "activations")]
    _activations: ActivationFormat,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum WeightFormat {
    Qint8,
    #[serde(rename = "qfloat8_e4m3fn", alias = "qfloat8")]
    Qfloat8,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ActivationFormat {
    None,
}

impl Map {
    /// Parses the JSON text of a map.
    ///
    /// # Errors
    /// `ModelCorrupt` if it is malformed, or names a format other than `qint8` or `qfloat8` weights with plain
    /// activations.
    pub fn parse(json: &str) -> Result<Self> {
        serde_json::from_str(json).map_err(|e| corrupt(format!("quantisation map: {e}")).with_source(e))
    }

    /// The modules whose weight is quantised.
    pub fn modules(&self) -> BTreeSet<String> {
        self.0.keys().cloned().collect()
    }
}

/// The module whose weight `name` is the quantised data of.
pub(super) fn module(name: &str) -> Option<String> {
    name.strip_suffix(DATA)?.strip_suffix(".weight").map(str::to_owned)
}

/// Whether `name` is the activation scale of a module that is quantised according to `contains`.
pub(super) fn is_activation_scale(name: &str, contains: impl Fn(&str) -> bool) -> bool {
    let module = name.strip_suffix(".input_scale").or_else(|| name.strip_suffix(".output_scale"));
    module.is_some_and(|module| contains(&format!("{module}.weight{DATA}")))
}

/// One quantised weight.
pub(super) struct Quantized<'a> {
    pub(super) data: &'a Stored,
    /// One per row.
    scale: &'a Stored,
    scale_values: Needed<Vec<f32>>,
    /// Elements in a row.
    width: usize,
}

impl<'a> Quantized<'a> {
    /// The quantised tensor `name` of `tensors`.
    pub(super) fn new(name: &str, tensors: &'a HashMap<String, Stored>) -> Result<Self> {
        let part = |suffix: &str| {
            let part = format!("{name}{suffix}");
            tensors.get(&part).ok_or_else(|| corrupt(format!("tensor `{part}` is missing from the weights")))
        };
        let (data, scale) = (part(DATA)?, part(SCALE)?);
        let (dims, scale_dims) = (data.dims(), scale.dims());
        let [rows, width] = *dims else {
            return Err(corrupt(format!(
                "tensor `{name}{DATA}` has the shape {dims:?}, expected two dimensions"
            )));
        };
        if scale_dims != [rows, 1] {
            let message =
                format!("tensor `{name}{SCALE}` has the shape {scale_dims:?}, expected [{rows}, 1]");
            return Err(corrupt(message));
        }
        Ok(Self { data, scale, scale_values: Needed::default(), width })
    }

    /// The bytes that it takes in a file.
    pub(super) fn file_bytes(&self) -> Result<u64> {
        Ok(self.data.file_bytes()? + self.scale.file_bytes()?)
    }

    /// Scales elements `start..start + values.len()` of the data.
    pub(super) fn scale(&self, start: usize, values: &mut [f32], tally: &mut Tally) -> Result<()> {
        let scale = self.scale_values.get(|| self.scale.read_all(tally))?;
        let round = match self.scale {
            Stored::File(tensor) => round_to(tensor.dtype == Dtype::BF16, tensor.dtype == Dtype::F16),
            Stored::Memory(tensor) => round_to(tensor.dtype() == DType::BF16, tensor.dtype() == DType::F16),
        };
        let (mut rest, mut at) = (values, start);
        while !rest.is_empty() {
            let len = (self.width - at % self.width).min(rest.len());
            let (row, after) = rest.split_at_mut(len);
            round(row, scale[at / self.width]);
            (rest, at) = (after, at + len);
        }
        Ok(())
    }

    /// Gives up the scale's values until they are needed again.
    pub(super) fn give_up(&self) {
        self.scale_values.give_up();
    }
}

/// Multiplies a row by its scale and rounds to the scale's dtype.
fn round_to(is_bf16: bool, is_f16: bool) -> fn(&mut [f32], f32) {
    match (is_bf16, is_f16) {
        (true, _) => convert::scale_to_bf16,
        (_, true) => |row, scale| row.iter_mut().for_each(|v| *v = f16::from_f32(*v * scale).to_f32()),
        _ => |row, scale| row.iter_mut().for_each(|v| *v *= scale),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_knows_its_modules_and_refuses_what_is_not_supported() {
        let map = Map::parse(
            r#"{"head.head": {"weights": "qint8", "activations": "none"},
                "blocks.0.ffn.0": {"weights": "qfloat8_e4m3fn", "activations": "none"}}"#,
        )
        .unwrap();
        assert_eq!(map.modules().into_iter().collect::<Vec<_>>(), ["blocks.0.ffn.0", "head.head"]);
        for (json, expected) in [
            (r#"{"a": {"weights": "qint4", "activations": "none"}}"#, "qint4"),
            (r#"{"a": {"weights": "qint8", "activations": "qint8"}}"#, "qint8"),
            (r#"{"a": {"weights": "qint8"}}"#, "activations"),
        ] {
            let error = Map::parse(json).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
