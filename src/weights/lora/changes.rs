//! The changes that are made to one tensor, a few rows at a time.

use candle_core::{Device, Shape, Tensor};

use super::{Delta, Lora};
use crate::Result;
use crate::weights::file::Tally;
use crate::weights::recipe::{Needed, Stored};
use crate::weights::{LISTED_KEYS, corrupt, list};

/// Elements of `up @ down` that are made at once: enough rows for a fast product, few enough for little memory.
const PRODUCT: usize = 1 << 20;

/// What several LoRAs add to one tensor.
pub(in crate::weights) struct Changes<'a>(Vec<Scaled<'a>>);

struct Scaled<'a> {
    delta: &'a Delta,
    scale: f64,
    /// up (out, r) and down (r, in) in f32.
    factors: Needed<(Tensor, Tensor)>,
}

impl<'a> Changes<'a> {
    /// What `loras`, each with its scale, add to tensor `target` of `shape`; `None` if nothing.
    pub(in crate::weights) fn of(
        loras: &'a [(Lora, f64)],
        target: &str,
        shape: &Shape,
    ) -> Result<Option<Self>> {
        let mut changes = Vec::new();
        for (lora, scale) in loras {
            for change in lora.changes.get(target).into_iter().flatten() {
                if !change.delta.fits(shape) {
                    let (keys, shape) = (list(&change.keys, LISTED_KEYS), shape.dims());
                    let name = &lora.name;
                    return Err(corrupt(format!("LoRA {name}: {keys} does not fit `{target}` {shape:?}")));
                }
                changes.push(Scaled { delta: &change.delta, scale: *scale, factors: Needed::default() });
            }
        }
        Ok((!changes.is_empty()).then_some(Self(changes)))
    }

    /// Bytes of LoRA files that are read for them.
    pub(in crate::weights) fn file_bytes(&self) -> Result<u64> {
        self.0.iter().flat_map(|change| change.delta.stored()).map(Stored::file_bytes).sum()
    }

    /// Elements that are best changed at once in a tensor with rows of `row_len`.
    pub(in crate::weights) fn block_len(&self, row_len: usize) -> usize {
        (PRODUCT / row_len).max(1) * row_len
    }

    /// Adds the changes to elements `start..start + values.len()`.
    pub(in crate::weights) fn add(&self, start: usize, values: &mut [f32], tally: &mut Tally) -> Result<()> {
        let mut sum = vec![0.0; values.len()];
        for change in &self.0 {
            change.add(start, &mut sum, tally)?;
        }
        values.iter_mut().zip(sum).for_each(|(value, sum)| *value += sum);
        Ok(())
    }

    /// Gives up what was read until it is needed again.
    pub(in crate::weights) fn give_up(&self) {
        self.0.iter().for_each(|change| change.factors.give_up());
    }
}

impl Scaled<'_> {
    fn add(&self, start: usize, sum: &mut [f32], tally: &mut Tally) -> Result<()> {
        let scale = self.scale as f32;
        match self.delta {
            Delta::Full(tensor) => {
                let mut values = vec![0.0; sum.len()];
                tensor.read(start, &mut values, tally)?;
                sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value * scale);
            }
            Delta::LowRank { up, down, factor } => {
                let factors = self.factors.get(|| Ok((matrix(up, tally)?, matrix(down, tally)?)))?;
                let (up, down) = &*factors;
                let width = down.dim(1)?;
                let (first, end) = (start / width, (start + sum.len()).div_ceil(width));
                let product =
                    up.narrow(0, first, end - first)?.matmul(down)?.flatten_all()?.to_vec1::<f32>()?;
                let (product, factor) = (&product[start - first * width..], *factor as f32);
                sum.iter_mut().zip(product).for_each(|(sum, value)| *sum += value * factor * scale);
            }
        }
        Ok(())
    }
}

/// A tensor with all dimensions after the first in one.
fn matrix(tensor: &Stored, tally: &mut Tally) -> Result<Tensor> {
    let rows = tensor.dims()[0];
    Ok(Tensor::from_vec(tensor.read_all(tally)?, (rows, ()), &Device::Cpu)?)
}
