//! LoRA: small changes to a network's weights, merged while they are read.
//!
//! Two merges. [`Lora`] with [`super::Weights::with_lora`] is the product's: every key must change a tensor of the
//! network, `alpha` is honoured, and the sum is computed in f32 and rounded once. [`merge_reference`] is what
//! InfiniteTalk (at 0107cd9) does: it passes over keys that it does not know, ignores `alpha`, and computes in the
//! network's dtype; it is here to be compared with.
//!
//! A file's keys are `<prefix><module>.<part>`. The prefix is one of `diffusion_model.`, `model.diffusion_model.`,
//! `transformer.`, `base_model.model.`, or none. The parts:
//!
//! | part | change |
//! |---|---|
//! | `lora_down.weight` (r, in…) and `lora_up.weight` (out, r) | `weight += scale · alpha/r · up @ down` |
//! | `lora_A.weight` and `lora_B.weight` | the same under other names: A is down, B is up |
//! | `alpha`, a scalar | of the pair above; r where it is absent |
//! | `diff` | `weight += scale · diff` |
//! | `diff_b` | `bias += scale · diff_b` |

mod changes;
mod reference;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{Shape, Tensor};

pub(super) use changes::Changes;
pub use reference::merge_reference;

use super::file::Tally;
use super::patterns;
use super::recipe::Stored;
use crate::Result;

/// What may come before a module's name, longest first.
const PREFIXES: [&str; 4] =
    ["model.diffusion_model.", "base_model.model.", "diffusion_model.", "transformer."];

/// The changes of one LoRA file, by the tensor that they change.
#[derive(Clone, Debug)]
pub struct Lora {
    name: String,
    changes: BTreeMap<String, Vec<Change>>,
    /// Keys that are no change, with what is wrong with them.
    strays: Vec<String>,
}

/// Something added to a tensor, in f32.
#[derive(Clone, Debug)]
struct Change {
    /// Where it comes from, for messages.
    keys: Vec<String>,
    delta: Delta,
}

#[derive(Clone, Debug)]
enum Delta {
    /// `factor · up @ down`: up (out, r), down (r, in…), the product in the target's shape.
    LowRank { up: Stored, down: Stored, factor: f64 },
    /// The tensor itself.
    Full(Stored),
}

/// The parts of a low-rank change while a file is sorted: key and tensor.
#[derive(Default)]
struct Pair {
    down: Option<(String, Stored)>,
    up: Option<(String, Stored)>,
    alpha: Option<(String, Stored)>,
}

impl Lora {
    /// Indexes a file: its tensors stay in it until a target needs them, apart from the scalars. Keys that fit a
    /// pattern of `ignored`, where `*` stands for any characters, are passed over.
    ///
    /// # Errors
    /// Those of [`super::Weights::open`]. Keys that are no change are reported by [`super::Weights::with_lora`], together
    /// with those that fit no tensor of the network.
    pub fn open(path: impl AsRef<Path>, ignored: &[impl AsRef<str>]) -> Result<Self> {
        let path = path.as_ref();
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        let tensors =
            super::index(path)?.into_iter().map(|tensor| (tensor.name.clone(), Stored::File(tensor)));
        Self::sort(&name, tensors.collect(), ignored)
    }

    /// Sorts `tensors` by what they change; `name` is used in messages. Otherwise as [`Lora::open`].
    ///
    /// # Errors
    /// If a scalar's dtype cannot be converted.
    pub fn parse(name: &str, tensors: HashMap<String, Tensor>, ignored: &[impl AsRef<str>]) -> Result<Self> {
        let tensors = tensors.into_iter().map(|(key, tensor)| (key, Stored::Memory(tensor)));
        Self::sort(name, tensors.collect(), ignored)
    }

    fn sort(name: &str, tensors: BTreeMap<String, Stored>, ignored: &[impl AsRef<str>]) -> Result<Self> {
        let mut lora = Self { name: name.to_owned(), changes: BTreeMap::new(), strays: Vec::new() };
        let mut pairs = BTreeMap::<String, Pair>::new();
        for (key, tensor) in tensors {
            if patterns::matches_any(ignored, &key) {
                continue;
            }
            let bare = PREFIXES.iter().find_map(|prefix| key.strip_prefix(prefix)).unwrap_or(&key).to_owned();
            let Some((module, part)) = split_part(&bare) else {
                lora.strays.push(key);
                continue;
            };
            if let Some(target) = part.target() {
                lora.add(
                    format!("{module}.{target}"),
                    Change { keys: vec![key], delta: Delta::Full(tensor) },
                );
                continue;
            }
            let pair = pairs.entry(module.to_owned()).or_default();
            let slot = match part {
                Part::Down => &mut pair.down,
                Part::Up => &mut pair.up,
                _ => &mut pair.alpha,
            };
            match slot {
                Some((first, _)) => lora.strays.push(format!("{key} (repeats {first})")),
                None => *slot = Some((key, tensor)),
            }
        }
        for (module, pair) in pairs {
            match pair.into_change()? {
                Ok(change) => lora.add(format!("{module}.weight"), change),
                Err(strays) => lora.strays.extend(strays),
            }
        }
        Ok(lora)
    }

    fn add(&mut self, target: String, change: Change) {
        self.changes.entry(target).or_default().push(change);
    }

    /// The name given to [`Lora::parse`], or the file's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The names of the tensors that change.
    pub fn targets(&self) -> Vec<String> {
        self.changes.keys().cloned().collect()
    }

    /// The keys that are no change, and those whose target has no such shape according to `shape_of`: `None` where
    /// that is not known, `Some(None)` where there is no such tensor.
    pub(super) fn strays(&self, shape_of: impl Fn(&str) -> Option<Option<Shape>>) -> Vec<String> {
        let mut strays = self.strays.clone();
        for (target, changes) in &self.changes {
            let Some(shape) = shape_of(target) else { continue };
            for change in changes {
                let fits = shape.as_ref().is_some_and(|shape| change.delta.fits(shape));
                if !fits {
                    strays.extend(change.keys.iter().cloned());
                }
            }
        }
        strays.sort();
        strays
    }
}

impl Pair {
    /// The change, or the keys that do not make one.
    fn into_change(self) -> Result<Result<Change, Vec<String>>> {
        let (Some((down_key, down)), Some((up_key, up))) = (&self.down, &self.up) else {
            let keys = [self.down, self.up, self.alpha].into_iter().flatten();
            return Ok(Err(keys.map(|(key, _)| format!("{key} (lacks its counterpart)")).collect()));
        };
        let (down_dims, up_dims) = (down.dims(), up.dims());
        // A convolution's `up` has kernel sides of 1.
        let is_pair = down_dims.len() >= 2
            && up_dims.len() >= 2
            && down_dims[0] == up_dims[1]
            && down_dims[0] > 0
            && up_dims[2..].iter().all(|side| *side == 1);
        if !is_pair {
            let describe =
                |key: &str, dims: &[usize]| format!("{key} (shape {dims:?} does not fit its counterpart)");
            return Ok(Err(vec![describe(down_key, down_dims), describe(up_key, up_dims)]));
        }
        let mut keys = vec![down_key.clone(), up_key.clone()];
        let mut factor = 1.0;
        if let Some((key, alpha)) = &self.alpha {
            let Some(value) = scalar(alpha)? else {
                return Ok(Err(vec![format!("{key} (is not a finite scalar)")]));
            };
            factor = value / down_dims[0] as f64;
            keys.push(key.clone());
        }
        Ok(Ok(Change { keys, delta: Delta::LowRank { up: up.clone(), down: down.clone(), factor } }))
    }
}

fn scalar(tensor: &Stored) -> Result<Option<f64>> {
    if tensor.dims().iter().product::<usize>() != 1 {
        return Ok(None);
    }
    let value = f64::from(tensor.read_all(&mut Tally::default())?[0]);
    Ok(value.is_finite().then_some(value))
}

impl Delta {
    /// Whether the change has as many rows and elements as a tensor of `shape`.
    fn fits(&self, shape: &Shape) -> bool {
        match self {
            Self::Full(tensor) => tensor.dims() == shape.dims(),
            Self::LowRank { up, down, .. } => {
                let rows = up.dims()[0];
                let width: usize = down.dims()[1..].iter().product();
                shape.rank() >= 2 && shape.dims()[0] == rows && shape.elem_count() == rows * width
            }
        }
    }

    fn stored(&self) -> Vec<&Stored> {
        match self {
            Self::LowRank { up, down, .. } => vec![up, down],
            Self::Full(tensor) => vec![tensor],
        }
    }
}

/// What follows a module's name.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Down,
    Up,
    Alpha,
    Weight,
    Bias,
}

impl Part {
    /// The tensor of the module that the part is added to as it is.
    fn target(self) -> Option<&'static str> {
        match self {
            Self::Weight => Some("weight"),
            Self::Bias => Some("bias"),
            Self::Down | Self::Up | Self::Alpha => None,
        }
    }
}

/// Module and part of a key without its prefix.
fn split_part(key: &str) -> Option<(&str, Part)> {
    const PARTS: [(&str, Part); 7] = [
        (".lora_down.weight", Part::Down),
        (".lora_A.weight", Part::Down),
        (".lora_up.weight", Part::Up),
        (".lora_B.weight", Part::Up),
        (".alpha", Part::Alpha),
        (".diff", Part::Weight),
        (".diff_b", Part::Bias),
    ];
    PARTS.iter().find_map(|(suffix, part)| Some((key.strip_suffix(suffix)?, *part)))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::super::Weights;
    use super::*;

    fn tensors(list: &[(&str, &[f32], &[usize])]) -> HashMap<String, Tensor> {
        list.iter()
            .map(|(key, values, shape)| {
                (key.to_string(), Tensor::from_slice(values, *shape, &Device::Cpu).unwrap())
            })
            .collect()
    }

    fn merged(
        base: &[(&str, &[f32], &[usize])],
        lora: &[(&str, &[f32], &[usize])],
        scale: f64,
        name: &str,
    ) -> Vec<f32> {
        let lora = Lora::parse("test", tensors(lora), &[""; 0]).unwrap();
        let weights = Weights::from_tensors(tensors(base)).with_lora(lora, scale).unwrap();
        let tensor = weights.var_builder(DType::F32, &Device::Cpu).get_unchecked(name).unwrap();
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    const BASE: [(&str, &[f32], &[usize]); 2] =
        [("m.weight", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3]), ("m.bias", &[10.0, 20.0], &[2])];

    #[test]
    fn a_pair_is_multiplied_and_scaled_by_alpha_over_rank() {
        // up @ down = [[1, 0, 2], [3, 0, 6]] for rank 1, and twice its half for rank 2.
        let down: (&[f32], &[usize]) = (&[1.0, 0.0, 2.0], &[1, 3]);
        let up: (&[f32], &[usize]) = (&[1.0, 3.0], &[2, 1]);
        for (d, u) in [("lora_down", "lora_up"), ("lora_A", "lora_B")] {
            for prefix in
                ["", "diffusion_model.", "transformer.", "base_model.model.", "model.diffusion_model."]
            {
                let (d, u) = (format!("{prefix}m.{d}.weight"), format!("{prefix}m.{u}.weight"));
                let lora = [(d.as_str(), down.0, down.1), (u.as_str(), up.0, up.1)];
                assert_eq!(merged(&BASE, &lora, 0.5, "m.weight"), [1.5, 2.0, 4.0, 5.5, 5.0, 9.0], "{d}");
            }
        }
        let rank_2: [(&str, &[f32], &[usize]); 3] = [
            ("m.lora_down.weight", &[1.0, 0.0, 2.0, 0.0, 1.0, 0.0], &[2, 3]),
            ("m.lora_up.weight", &[1.0, 0.0, 3.0, 4.0], &[2, 2]),
            ("m.alpha", &[0.5], &[]),
        ];
        // 0.5 / 2 · 2 · [[1, 0, 2], [3, 4, 6]]
        assert_eq!(merged(&BASE, &rank_2, 2.0, "m.weight"), [1.5, 2.0, 4.0, 5.5, 7.0, 9.0]);
    }

    #[test]
    fn diffs_are_added_to_weight_and_bias() {
        let lora: [(&str, &[f32], &[usize]); 2] = [
            ("diffusion_model.m.diff", &[1.0, 1.0, 1.0, 0.0, 0.0, 2.0], &[2, 3]),
            ("diffusion_model.m.diff_b", &[1.0, -1.0], &[2]),
        ];
        assert_eq!(merged(&BASE, &lora, 2.0, "m.weight"), [3.0, 4.0, 5.0, 4.0, 5.0, 10.0]);
        assert_eq!(merged(&BASE, &lora, 2.0, "m.bias"), [12.0, 18.0]);
    }

    #[test]
    fn a_convolution_takes_a_flattened_product() {
        let base: [(&str, &[f32], &[usize]); 1] = [("c.weight", &[0.0; 8], &[2, 2, 1, 2])];
        let lora: [(&str, &[f32], &[usize]); 2] = [
            ("c.lora_down.weight", &[1.0, 2.0, 3.0, 4.0], &[1, 2, 1, 2]),
            ("c.lora_up.weight", &[1.0, 10.0], &[2, 1, 1, 1]),
        ];
        assert_eq!(merged(&base, &lora, 1.0, "c.weight"), [1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0]);
    }

    #[test]
    fn loras_stack_and_round_once() {
        // In bf16 1 + 1/256 is halfway to 1 + 1/128 and falls back to 1; the sum of two such steps does not.
        let base: [(&str, &[f32], &[usize]); 1] = [("m.bias", &[1.0], &[1])];
        let lora = || Lora::parse("l", tensors(&[("m.diff_b", &[1.0], &[1])]), &[""; 0]).unwrap();
        let step = 1.0 / 256.0;
        let weights = Weights::from_tensors(tensors(&base)).with_lora(lora(), step).unwrap();
        let get = |weights: &Weights| {
            let bias = weights.var_builder(DType::BF16, &Device::Cpu).get(1, "m.bias").unwrap();
            bias.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(get(&weights), [1.0]);
        assert_eq!(get(&weights.with_lora(lora(), step).unwrap()), [1.0078125]);
    }

    #[test]
    fn every_key_that_fits_nothing_is_named() {
        let lora = tensors(&[
            ("m.diff", &[0.0; 4], &[2, 2]),
            ("m.diff_m", &[0.0], &[1]),
            ("n.diff_b", &[0.0], &[1]),
            ("m.lora_down.weight", &[0.0; 3], &[1, 3]),
            ("p.alpha", &[1.0], &[]),
            ("q.lora_A.weight", &[0.0; 6], &[2, 3]),
            ("q.lora_B.weight", &[0.0; 6], &[2, 3]),
            ("lora_unet_m.hada_w1_a", &[0.0], &[1]),
        ]);
        let expected: Vec<_> = lora.keys().cloned().collect();
        let lora = Lora::parse("bad.safetensors", lora, &[""; 0]).unwrap();
        let error =
            Weights::from_tensors(tensors(&BASE)).with_lora(lora, 1.0).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("bad.safetensors: 8 keys"), "{error}");
        for key in expected {
            assert!(error.contains(&key), "{error}, expected {key}");
        }
    }

    #[test]
    fn ignored_keys_are_passed_over() {
        let lora = tensors(&[("blocks.0.diff_m", &[0.0], &[1]), ("m.diff_b", &[1.0, 1.0], &[2])]);
        let lora = Lora::parse("l", lora, &["*.diff_m"]).unwrap();
        assert_eq!(lora.targets(), ["m.bias"]);
        assert!(Weights::from_tensors(tensors(&BASE)).with_lora(lora, 1.0).is_ok());
    }

    #[test]
    fn random_weights_are_checked_when_asked_for_and_at_the_end() {
        let lora = || Lora::parse("l", tensors(&[("m.diff_b", &[1.0, 1.0], &[2])]), &[""; 0]).unwrap();
        let weights = Weights::random(1).with_lora(lora(), 100.0).unwrap();
        let error = weights.finish(&[""; 0]).unwrap_err().to_string();
        assert!(error.contains("`m.bias`"), "{error}");
        let vb = weights.var_builder(DType::F32, &Device::Cpu);
        assert!(vb.get(3, "m.bias").is_err());
        assert!(vb.get(2, "m.bias").unwrap().to_vec1::<f32>().unwrap()[0] > 99.0);
        weights.finish(&[""; 0]).unwrap();
    }
}
