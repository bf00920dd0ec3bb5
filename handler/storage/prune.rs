//! An end for what stays in a spool: videos and results that could not be delivered, and that nobody came for.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::spool::{REJECTED, UNDELIVERED, VIDEOS};

/// Removes from the spool below `root` what has not changed for `keep`, and says how much that was. Results that are
/// still being sent are not touched: they have an age limit of their own.
pub fn prune(root: &Path, keep: Duration) -> usize {
    let folders = [VIDEOS, UNDELIVERED, REJECTED].map(|name| fs::read_dir(root.join(name)));
    let entries = folders.into_iter().flatten().flatten().flatten().map(|entry| entry.path());
    let is_old = |path: &Path| {
        let age = changed(path).and_then(|at| SystemTime::now().duration_since(at).ok());
        age.is_some_and(|age| age > keep)
    };
    let removed = |path: &Path| match path.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    };
    // Another process may be faster, and what cannot be removed is tried again with the next.
    entries.filter(|path| is_old(path) && removed(path).is_ok()).count()
}

/// When `path`, or anything in it, was changed last.
fn changed(path: &Path) -> Option<SystemTime> {
    let inside = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let all = inside.chain([path.to_path_buf()]);
    all.filter_map(|path| path.metadata().ok()?.modified().ok()).max()
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    const KEEP: Duration = Duration::from_secs(3600);

    /// Makes the file `path` below `root`, with its folder, as if nothing had happened since `age` ago.
    fn make(root: &Path, path: &str, age: Duration) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "").unwrap();
        for changed in [path.as_path(), path.parent().unwrap()] {
            File::open(changed).unwrap().set_modified(SystemTime::now() - age).unwrap();
        }
    }

    #[test]
    fn what_nobody_came_for_goes_and_all_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (old, young) = (2 * KEEP, KEEP / 2);
        for (age, word) in [(old, "old"), (young, "young")] {
            make(dir.path(), &format!("videos/{word}/video.mp4"), age);
            make(dir.path(), &format!("undelivered/{word}.mp4"), age);
            make(dir.path(), &format!("rejected/{word}.json"), age);
            make(dir.path(), &format!("results/{word}-1/a.json"), age);
        }
        // A video that is still being made in a folder that was made long ago.
        make(dir.path(), "videos/slow/publication.json", old);
        make(dir.path(), "videos/slow/video.mp4", Duration::ZERO);
        File::open(dir.path().join("videos/slow")).unwrap().set_modified(SystemTime::now() - old).unwrap();

        assert_eq!(prune(dir.path(), KEEP), 3);
        for gone in ["videos/old", "undelivered/old.mp4", "rejected/old.json"] {
            assert!(!dir.path().join(gone).exists(), "{gone}");
        }
        let left = ["videos/young/video.mp4", "undelivered/young.mp4", "rejected/young.json", "videos/slow"];
        for left in left.iter().chain(&["results/old-1/a.json", "results/young-1/a.json"]) {
            assert!(dir.path().join(left).exists(), "{left}");
        }
        assert_eq!(prune(dir.path(), KEEP), 0);
        assert_eq!(prune(&dir.path().join("nothing"), KEEP), 0);
    }
}
