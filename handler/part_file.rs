//! Files that appear under their name complete or not at all.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use tempfile::TempPath;

/// A file in the making: a hidden neighbour of the final file, deleted when dropped.
#[derive(Debug)]
pub struct PartFile {
    part: TempPath,
    target: PathBuf,
}

impl PartFile {
    /// An empty part for `target`, in the same folder, so that the last step is a rename.
    ///
    /// # Errors
    /// When the folder is missing or cannot be written to.
    pub fn create(target: &Path) -> io::Result<Self> {
        let folder = folder_of(target);
        let mut builder = tempfile::Builder::new();
        builder.prefix(".talkie-").suffix(".part");
        #[cfg(unix)]
        // The final file is as readable as the user's mask says, which a temporary file is not by default.
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        Ok(Self { part: builder.tempfile_in(folder)?.into_temp_path(), target: target.to_path_buf() })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.part
    }

    /// Gives the file its name, in place of a former file of that name, once it is safe on disk.
    ///
    /// # Errors
    /// When the disk is full or the name belongs to a folder; there is no file then.
    pub fn publish(self) -> io::Result<()> {
        File::open(&self.part)?.sync_all()?;
        self.part.persist(&self.target).map_err(|e| e.error)?;
        File::open(folder_of(&self.target))?.sync_all()
    }
}

/// Puts `value` as JSON into the file at `path`.
///
/// # Errors
/// As [`PartFile::create`] and [`PartFile::publish`].
pub fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let part = PartFile::create(path)?;
    let text = serde_json::to_vec_pretty(value)?;
    File::options().write(true).open(part.path())?.write_all(&text)?;
    part.publish()
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out.mp4");
        std::fs::write(&target, "old").unwrap();
        let abandoned = PartFile::create(&target).unwrap();
        std::fs::write(abandoned.path(), "ha").unwrap();
        drop(abandoned);
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "old");
        let part = PartFile::create(&target).unwrap();
        std::fs::write(part.path(), "new").unwrap();
        part.publish().unwrap();
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "new");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no part is left");
        assert!(PartFile::create(&dir.path().join("none/out.mp4")).is_err());
    }
}
