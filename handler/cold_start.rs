//! What the last cold start took, kept in the spool for `handler doctor`.

use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::job::ColdStart;
use crate::part_file;

/// The file in the spool.
pub const COLD_START: &str = "cold-start.json";

/// The last cold start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastColdStart {
    /// When it was, in seconds since 1970.
    pub at: u64,
    /// The model that was loaded.
    pub model: String,
    /// Its phases.
    pub phases: ColdStart,
}

impl LastColdStart {
    /// One that has just happened.
    pub fn new(model: &str, phases: &ColdStart) -> Self {
        let at = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
        Self { at, model: model.to_string(), phases: phases.clone() }
    }

    /// Writes it to `path`. A volume that cannot be written to costs nothing but the memory of it.
    pub fn record(&self, path: &Path) {
        if let Err(e) = part_file::write_json(path, self) {
            tracing::debug!("{} cannot be written: {e}", path.display());
        }
    }

    /// The one that is written at `path`. A file that is not there or not ours tells nothing.
    pub fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_back_and_what_is_not_ours_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(COLD_START);
        assert_eq!(LastColdStart::read(&path), None);
        let phases = ColdStart { load_ms: 7, gb_per_s: 1.25, ..ColdStart::default() };
        let cold = LastColdStart::new("tiny", &phases);
        cold.record(&path);
        assert_eq!(LastColdStart::read(&path), Some(cold.clone()));
        std::fs::write(&path, "[]").unwrap();
        assert_eq!(LastColdStart::read(&path), None);
        cold.record(&dir.path().join("none/x.json"));
    }
}
