//! The merge of the reference, to be compared with.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Tensor};

use super::{Part, split_part};
use crate::Result;
use crate::weights::corrupt;

/// The prefix of the keys that the reference looks at.
const REFERENCE_PREFIX: &str = "diffusion_model.";

/// The tensors of `base` that `lora` changes, merged as the reference does: all in the dtype of the base, each step
/// rounded to it; `alpha`, `diff_m`, `lora_A`/`lora_B`, keys without `diffusion_model.` and a down without its up
/// are passed over.
///
/// # Errors
/// `ModelCorrupt` if a key's target is not in `base` or has another shape.
pub fn merge_reference(
    base: &HashMap<String, Tensor>,
    lora: &HashMap<String, Tensor>,
    scale: f64,
) -> Result<HashMap<String, Tensor>> {
    let mut merged = HashMap::new();
    let keys: BTreeMap<_, _> = lora.iter().collect();
    for (key, tensor) in keys {
        let Some(bare) = key.strip_prefix(REFERENCE_PREFIX) else { continue };
        let (target, pair) = if let Some(module) = bare.strip_suffix(".lora_down.weight") {
            let Some(up) = lora.get(&format!("{REFERENCE_PREFIX}{module}.lora_up.weight")) else { continue };
            (format!("{module}.weight"), Some(up))
        } else if let Some((module, part @ (Part::Weight | Part::Bias))) = split_part(bare) {
            (format!("{module}.{}", part.target().unwrap_or_default()), None)
        } else {
            continue;
        };
        let current = merged.get(&target).or_else(|| base.get(&target));
        let current =
            current.ok_or_else(|| corrupt(format!("LoRA key `{key}`: there is no tensor `{target}`")))?;
        let dtype = current.dtype();
        let round = |x: Tensor| x.to_dtype(dtype)?.to_dtype(DType::F32);
        let delta = match pair {
            Some(up) => round(round(up.clone())?.matmul(&round(tensor.clone())?)?)?,
            None => round(tensor.clone())?,
        };
        if delta.dims() != current.dims() {
            let (found, expected) = (delta.dims(), current.dims());
            return Err(corrupt(format!(
                "LoRA key `{key}` has the shape {found:?}, `{target}` has {expected:?}"
            )));
        }
        let sum = (current.to_dtype(DType::F32)? + round((delta * scale)?)?)?.to_dtype(dtype)?;
        merged.insert(target, sum);
    }
    Ok(merged)
}
