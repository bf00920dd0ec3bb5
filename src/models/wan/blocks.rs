//! The blocks of the DiT: all on the device, or some of them brought there one after the other.

use std::cell::RefCell;
use std::fmt;
use std::sync::{Arc, mpsc};
use std::thread;

use candle_core::{Result, bail};
use candle_nn::VarBuilder;

use super::Config;
use super::block::Block;

/// Gives out the weights of single blocks, as often as they are asked for.
pub trait BlockSource: Send + Sync {
    /// Calls `build`, once or more often, with a `VarBuilder` whose root holds the block's names, such as
    /// `blocks.7.modulation`, on the device that the network runs on. The last call counts.
    ///
    /// # Errors
    /// Weights that cannot be had, and what `build` returns.
    fn load(&self, build: &dyn Fn(VarBuilder<'static>) -> Result<()>) -> Result<()>;
}

/// Blocks that stay on the device, and after them those that come from a source each time they are needed: the next
/// one is fetched on a thread of its own while one is at work, so that two of them are on the device at any time.
pub(super) struct Blocks {
    resident: Vec<Block>,
    source: Option<Arc<dyn BlockSource>>,
    config: Config,
}

impl Blocks {
    /// Loads the first `resident` blocks below `vb`; the others come from `source`.
    pub fn new(
        cfg: &Config,
        vb: VarBuilder,
        resident: usize,
        source: Option<Arc<dyn BlockSource>>,
    ) -> Result<Self> {
        let blocks = vb.pp("blocks");
        let resident = (0..resident.min(cfg.num_layers)).map(|i| Block::new(cfg, i, blocks.pp(i)));
        let blocks = Self { resident: resident.collect::<Result<_>>()?, source, config: cfg.clone() };
        if blocks.source.is_none() && blocks.resident.len() < cfg.num_layers {
            bail!(
                "{} of {} blocks are resident, and the others have no source",
                blocks.resident.len(),
                cfg.num_layers
            )
        }
        Ok(blocks)
    }

    /// Calls `visit` with every block, in order.
    pub fn each(&self, mut visit: impl FnMut(&Block) -> Result<()>) -> Result<()> {
        let rest = self.resident.len()..self.config.num_layers;
        let Some(source) = self.source.as_ref().filter(|_| !rest.is_empty()) else {
            return self.resident.iter().try_for_each(visit);
        };
        thread::scope(|scope| {
            // Without room in the channel: a block that waits to be taken is the only one that is fetched ahead.
            let (fetched, next) = mpsc::sync_channel(0);
            let count = rest.len();
            scope.spawn(move || {
                for index in rest {
                    let block = fetch(source.as_ref(), &self.config, index);
                    let failed = block.is_err();
                    if fetched.send(block).is_err() || failed {
                        return; // whoever wanted the blocks has given up, or will
                    }
                }
            });
            self.resident.iter().try_for_each(&mut visit)?;
            for _ in 0..count {
                match next.recv() {
                    Ok(block) => visit(&block?)?,
                    Err(_) => bail!("the thread that fetches blocks has ended early"),
                }
            }
            Ok(())
        })
    }
}

fn fetch(source: &dyn BlockSource, cfg: &Config, index: usize) -> Result<Block> {
    let block = RefCell::new(None);
    source.load(&|vb| {
        block.replace(Some(Block::new(cfg, index, vb.pp("blocks").pp(index))?));
        Ok(())
    })?;
    match block.into_inner() {
        Some(block) => Ok(block),
        None => bail!("the source of block {index} has built none"),
    }
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blocks").field("resident", &self.resident.len()).finish_non_exhaustive()
    }
}
