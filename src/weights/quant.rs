//! Quantised checkpoints in the layout of optimum-quanto, as InfiniteTalk publishes them: `X.weight._data` (int8 or
//! `F8_E4M3`, (out, in)) times `X.weight._scale` (out, 1). Scalars `X.input_scale` and `X.output_scale` belong to
//! quantised activations, which no checkpoint uses, and are ignored.
//!
//! A quantised weight is given out under the name of the original. The product is rounded to the dtype of the scale,
//! bf16 in the published files, because the reference multiplies in that dtype; then to the dtype that was asked for.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use candle_core::DType;
use half::{bf16, f16};
use safetensors::Dtype;
use serde::Deserialize;

use super::convert::Scratch;
use super::{Stored, corrupt};
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
    data: &'a Stored,
    /// One per row.
    scale: Vec<f32>,
    /// Rounds to the dtype of the scale.
    round: fn(f32) -> f32,
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
        let (dims, scale_dims) = (data.shape().into_dims(), scale.shape().into_dims());
        let [rows, width] = dims[..] else {
            return Err(corrupt(format!(
                "tensor `{name}{DATA}` has the shape {dims:?}, expected two dimensions"
            )));
        };
        if scale_dims != [rows, 1] {
            let message =
                format!("tensor `{name}{SCALE}` has the shape {scale_dims:?}, expected [{rows}, 1]");
            return Err(corrupt(message));
        }
        let round = match scale {
            Stored::File(tensor) => match tensor.dtype {
                Dtype::BF16 => to_bf16,
                Dtype::F16 => to_f16,
                _ => to_f32,
            },
            Stored::Memory(tensor) => match tensor.dtype() {
                DType::BF16 => to_bf16,
                DType::F16 => to_f16,
                _ => to_f32,
            },
        };
        Ok(Self { data, scale: scale.read_all()?, round, width })
    }

    /// Reads elements `start..start + out.len()`, dequantised.
    pub(super) fn read(&self, start: usize, out: &mut [f32], scratch: &mut Scratch) -> Result<()> {
        self.data.read(start, out, scratch)?;
        for (i, value) in out.iter_mut().enumerate() {
            *value = (self.round)(*value * self.scale[(start + i) / self.width]);
        }
        Ok(())
    }
}

fn to_bf16(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

fn to_f16(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}

fn to_f32(value: f32) -> f32 {
    value
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
