//! Networks that stay loaded from one video to the next.

use std::any::Any;
use std::sync::Arc;

use crate::prepared::NetworkKey;
use crate::weights::Weights;

/// A loaded network, whichever it is.
pub(super) type Network = Arc<dyn Any + Send + Sync>;

/// What is kept of one network.
#[derive(Clone)]
pub(super) struct Kept {
    pub key: NetworkKey,
    pub sizes: Sizes,
    pub form: Form,
}

/// Bytes of a network that are known without opening its files again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sizes {
    /// All of it, in the dtypes that it computes in.
    pub bytes: u64,
    /// One block of the DiT; 0 for the others.
    pub block: u64,
}

/// How a network is kept.
#[derive(Clone)]
pub(super) enum Form {
    /// Ready to run.
    Loaded {
        network: Network,
        /// Blocks of the DiT that are on the device; of the others, the number means nothing.
        resident_blocks: usize,
        device_bytes: u64,
        host_bytes: u64,
    },
    /// Its tensors in host memory, from which it is built on the device when it is needed.
    OnHost(Arc<Weights>),
}

impl Kept {
    /// Bytes on the device.
    pub fn device_bytes(&self) -> u64 {
        match self.form {
            Form::Loaded { device_bytes, .. } => device_bytes,
            Form::OnHost(_) => 0,
        }
    }

    fn host_bytes(&self) -> u64 {
        match self.form {
            Form::Loaded { host_bytes, .. } => host_bytes,
            Form::OnHost(_) => self.sizes.bytes,
        }
    }
}

/// What is kept, the least recently used first.
#[derive(Default)]
pub(super) struct Shelf(Vec<Kept>);

impl Shelf {
    /// What is kept of `key`.
    pub fn find(&self, key: &NetworkKey) -> Option<&Kept> {
        self.0.iter().find(|kept| kept.key == *key)
    }

    /// Takes what is kept of `key`.
    pub fn take(&mut self, key: &NetworkKey) -> Option<Kept> {
        let index = self.0.iter().position(|kept| kept.key == *key)?;
        Some(self.0.remove(index))
    }

    /// Keeps a network, as the one that was used last.
    pub fn put(&mut self, kept: Kept) {
        self.0.retain(|other| other.key != kept.key);
        self.0.push(kept);
    }

    /// Drops the least recently used networks until those that are left take no more than this of device and host.
    pub fn shrink(&mut self, device: u64, host: u64) {
        while self.device_bytes() > device || self.host_bytes() > host {
            let dropped = self.0.remove(0);
            drop(dropped);
        }
    }

    /// Bytes on the device.
    pub fn device_bytes(&self) -> u64 {
        self.0.iter().map(Kept::device_bytes).sum()
    }

    /// Bytes in host memory, where that is another one.
    pub fn host_bytes(&self) -> u64 {
        self.0.iter().map(Kept::host_bytes).sum()
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
