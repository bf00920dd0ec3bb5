//! What of a model lies on this machine.

use serde::Serialize;
use talkie::prepared::{NetworkKind, Selection};

use crate::hub::{FileReport, Hub, Standing};
use crate::job::JobError;

/// The files of one model, for so many persons and with these LoRAs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Installation {
    /// How the files stand that are needed. Of what is prepared, the sources are not.
    pub files: Vec<FileReport>,
    /// The networks that are read from prepared files.
    pub prepared: Vec<&'static str>,
    /// Bytes of the prepared files.
    pub prepared_bytes: u64,
    /// Why other prepared files are not used.
    pub notes: Vec<String>,
}

impl Installation {
    /// Looks at the files, reads none but receipts and records, and asks nobody.
    ///
    /// # Errors
    /// As [`Selection::find`] and [`Hub::plan`].
    pub async fn of(selection: &Selection<'_>, hub: &Hub) -> Result<Self, JobError> {
        let mut found = Self::default();
        for kind in NetworkKind::ALL {
            let network = selection.find(kind)?;
            found.notes.extend(network.note);
            if let Some(prepared) = network.prepared {
                found.prepared.push(kind.as_str());
                found.prepared_bytes += prepared.record.size;
            }
        }
        let repos: Vec<_> = selection.needed()?.into_iter().cloned().collect();
        (found.files, _) = hub.clone().offline().plan(&repos).await?;
        Ok(found)
    }

    /// The files that are not there, or not whole.
    pub fn missing(&self) -> impl Iterator<Item = &FileReport> {
        self.files.iter().filter(|file| matches!(file.state, Standing::Missing | Standing::Partial))
    }

    /// Those that are there and were not verified.
    pub fn unverified(&self) -> impl Iterator<Item = &FileReport> {
        self.files.iter().filter(|file| file.state == Standing::Unverified)
    }

    /// Bytes that have to come, as far as they are known.
    pub fn bytes_to_fetch(&self) -> u64 {
        self.missing().filter_map(|file| Some(file.size?.saturating_sub(file.have_bytes))).sum()
    }

    /// Missing files whose size is learnt when they are fetched.
    pub fn unknown_sizes(&self) -> usize {
        self.missing().filter(|file| file.size.is_none()).count()
    }

    /// Bytes of the files that are there.
    pub fn present_bytes(&self) -> u64 {
        self.prepared_bytes + self.files.iter().map(|file| file.have_bytes).sum::<u64>()
    }

    /// Bytes that a cold start reads once everything is there; `None` while a size is not known.
    pub fn bytes_to_read(&self) -> Option<u64> {
        (self.unknown_sizes() == 0).then(|| self.present_bytes() + self.bytes_to_fetch())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use talkie::registry::{ModelStorage, Registry};

    use super::*;
    use crate::hub::HubSettings;

    fn hub(folder: &Path) -> Hub {
        Hub::new(HubSettings::from_env(|_| None, folder).unwrap(), ModelStorage::at(folder))
    }

    #[tokio::test]
    async fn files_are_missing_or_there_and_not_verified() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, hub) = (Registry::built_in().unwrap(), hub(dir.path()));
        let spec = registry.model("infinitetalk").unwrap();
        let selection = Selection { spec, storage: hub.storage(), speakers: 1, loras: &[] };
        let nothing = Installation::of(&selection, &hub).await.unwrap();
        let files: usize = spec.files(1, &[]).map(|repo| repo.files.len()).sum();
        assert_eq!((nothing.missing().count(), nothing.present_bytes()), (files, 0));

        let repo = spec.audio_encoder.source.files(1).next().unwrap();
        let path = hub.storage().path(repo, &repo.files[0]);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let bytes = repo.files[0].size.known().copied().unwrap_or(7);
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        let one = Installation::of(&selection, &hub).await.unwrap();
        assert_eq!((one.missing().count(), one.unverified().count()), (files - 1, 1));
        assert_eq!(one.present_bytes(), bytes);
    }

    #[tokio::test]
    async fn a_model_of_random_weights_needs_nothing() {
        let (registry, hub) = (Registry::built_in().unwrap(), hub(Path::new("/nonexistent")));
        let spec = registry.model("tiny").unwrap();
        let selection = Selection { spec, storage: hub.storage(), speakers: 1, loras: &[] };
        let tiny = Installation::of(&selection, &hub).await.unwrap();
        assert_eq!((tiny.missing().count(), tiny.bytes_to_read()), (0, Some(0)));
    }
}
