//! The key of the embedded store: random, made once, and kept where only this user can read it.

use std::io::{self, Write};
use std::path::Path;

use rand::distr::{Alphanumeric, SampleString};
use serde::{Deserialize, Serialize};

use crate::gateway::config::Secret;
use crate::job::{Code, JobError};
use crate::storage::settings::Credentials;

#[derive(Serialize, Deserialize)]
struct Stored {
    access_key_id: String,
    secret_access_key: String,
}

/// The key in the file `path`, which is made where it is missing.
pub(super) fn load_or_create(path: &Path) -> Result<Credentials, JobError> {
    let failed = |e: io::Error| {
        let message =
            format!("the key of the embedded store, {}, cannot be read or made: {e}", path.display());
        JobError::new(Code::InvalidInput, message).with_reason("CONFIG")
    };
    let text = match std::fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            create(path).map_err(failed)?;
            // Another process may have been first; what lies there counts.
            std::fs::read(path).map_err(failed)?
        }
        read => read.map_err(failed)?,
    };
    // The parser's own message could quote the secret.
    let stored: Stored = serde_json::from_slice(&text)
        .map_err(|_| failed(io::Error::other("it is not of this program's making")))?;
    Ok(Credentials {
        access_key_id: stored.access_key_id,
        secret_access_key: Secret::new(stored.secret_access_key),
        session_token: None,
    })
}

fn create(path: &Path) -> io::Result<()> {
    let random = |len| Alphanumeric.sample_string(&mut rand::rng(), len);
    let stored = Stored { access_key_id: format!("talkie{}", random(14)), secret_access_key: random(40) };
    let folder = path.parent().unwrap_or(Path::new("."));
    // Temporary files are readable by their owner only.
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer(&mut file, &stored)?;
    file.flush()?;
    file.as_file().sync_all()?;
    match file.persist_noclobber(path) {
        Ok(_) => std::fs::File::open(folder)?.sync_all(),
        Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e.error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_for_this_user_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s3-credentials");
        let first = load_or_create(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let second = load_or_create(&path).unwrap();
        assert_eq!(first.access_key_id, second.access_key_id);
        assert_eq!(first.secret_access_key.expose(), second.secret_access_key.expose());
        assert_eq!((first.access_key_id.len(), first.secret_access_key.expose().len()), (20, 40));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_of_another_kind_is_named_and_not_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s3-credentials");
        std::fs::write(&path, "{\"access_key_id\": \"canary\"}").unwrap();
        let e = load_or_create(&path).unwrap_err();
        assert!(e.message.contains("s3-credentials") && !e.message.contains("canary"), "{e}");
        assert!(load_or_create(&dir.path().join("none/s3-credentials")).is_err());
    }
}
