//! Rows 34–37 and 41–46 of the fault matrix.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::server::{Answer, COMMIT, File};
use super::{Bench, LARGE, SMALL, WEIGHTS, finish, listed, names_below};
use crate::support::Outcome;

/// The error of a download that failed for this reason.
#[track_caller]
fn failed(outcome: &Outcome, reason: &str) -> String {
    let error = outcome.error();
    assert_eq!(
        (outcome.code, error["code"].as_str(), error["details"]["reason"].as_str()),
        (Some(1), Some("MODEL_DOWNLOAD_FAILED"), Some(reason)),
        "{error}"
    );
    error["message"].as_str().unwrap().to_string()
}

#[test]
fn fault_34_a_busy_hub_is_asked_again_and_given_up_in_the_end() {
    let bench = Bench::new();
    bench.hub.behave(|asked| match asked.number {
        0..3 => Answer::Status("503 Service Unavailable", ""),
        3 => Answer::Status("429 Too Many Requests", "Retry-After: 1\r\n"),
        _ => Answer::Right,
    });
    let began = Instant::now();
    bench.run(&[]).output();
    assert!(began.elapsed() >= Duration::from_secs(1), "a server's wish for a pause is honoured");
    bench.check_complete(&bench.files());

    let bench = Bench::new();
    bench.hub.behave(|_| Answer::Status("503 Service Unavailable", ""));
    let error = bench.run(&[]).error();
    assert_eq!((error["code"].as_str(), &error["retryable"]), (Some("MODEL_DOWNLOAD_FAILED"), &true.into()));
    assert!(error["message"].as_str().unwrap().contains("503"), "{error}");
    let most = bench.hub.asked().iter().filter(|asked| asked.of_cdn).count();
    assert!((4..=4 * 6).contains(&most), "{most} attempts");

    let bench = Bench::new();
    bench.hub.refuse_names(Some("503 Service Unavailable"));
    assert_eq!(bench.run(&[]).error()["code"], "MODEL_DOWNLOAD_FAILED");
    let count = bench.hub.asked().len();
    assert_eq!(count, 6, "questions about names are repeated as well");
}

#[test]
fn fault_35_what_is_cut_is_resumed_by_range() {
    type Cut = fn(&super::server::Asked) -> Answer;
    let cuts: [Cut; 3] = [
        |asked| if asked.number == 0 { Answer::Cut(3 << 20) } else { Answer::Right },
        // As far as the quarter of a piece, each time anew.
        |_| Answer::Cut(2 << 20),
        |asked| if asked.number == 0 { Answer::ShortChunked(3 << 20) } else { Answer::Right },
    ];
    for cut in cuts {
        let bench = Bench::new();
        bench.hub.behave(cut);
        bench.run(&[]).output();
        bench.check_complete(&bench.files());
        let twice = bench.hub.served() - (LARGE as u64 + 8);
        assert_eq!(twice, 0, "what was written is not fetched again");
    }
}

#[test]
fn fault_35_a_small_file_that_is_cut_is_resumed_by_range_and_tag_or_from_its_beginning() {
    let text = "x".repeat(1 << 20);
    for whole in [false, true] {
        let bench = Bench::of(&[(SMALL, File::small(&text))]);
        bench.hub.behave(move |asked| match asked.number {
            0 => Answer::Cut(600_000),
            _ if whole => Answer::Whole,
            _ => Answer::Right,
        });
        bench.run(&[]).output();
        bench.check_complete(&[(SMALL, File::small(&text))]);
        let asked = bench.hub.asked();
        assert!(
            asked.iter().any(|asked| asked.has_if_range && asked.range == Some((600_000, 1 << 20))),
            "{asked:#?}"
        );
    }
}

#[test]
fn fault_36_wrong_bytes_are_fetched_once_more_and_then_refused() {
    let bench = Bench::new();
    // Each of the three pieces has a wrong byte, the first time.
    bench.hub.behave(|asked| match asked.range {
        Some((from, _)) if asked.number < 3 => Answer::Flip(from + 1000),
        _ => Answer::Right,
    });
    bench.run(&[]).output();
    assert_eq!(bench.hub.served(), 2 * LARGE as u64 + 8);
    bench.check_complete(&bench.files());

    let bench = Bench::new();
    bench.hub.behave(|_| Answer::Flip(5));
    let message = failed(&bench.run(&[]), "MODEL_CHECKSUM_MISMATCH");
    assert!(message.contains("o/m"), "{message}");
    assert!(!bench.place(WEIGHTS).exists());
    // Nothing of it is gone on with.
    bench.hub.behave(|_| Answer::Right);
    bench.run(&[]).output();
    bench.check_complete(&bench.files());
}

#[test]
fn fault_37_a_server_that_falls_silent_is_left() {
    let bench = Bench::new();
    bench.hub.behave(|asked| match asked.number {
        0 if asked.of_cdn => Answer::Pause(1 << 20),
        _ => Answer::Right,
    });
    let child = bench.start(&[("HF_HUB_DOWNLOAD_TIMEOUT", "2")]);
    finish(child).output();
    bench.check_complete(&bench.files());
    // A part of the answer was read and is not asked for again.
    assert_eq!(bench.hub.served(), LARGE as u64 + 8);
}

/// A file system of its own, in memory; `None` where this user may not make one.
struct Volume(PathBuf);

impl Volume {
    fn mount(folder: &Path, bytes: u64) -> Option<Self> {
        fs::create_dir_all(folder).unwrap();
        let target = CString::new(folder.as_os_str().as_bytes()).unwrap();
        let options = CString::new(format!("size={bytes}")).unwrap();
        // SAFETY: all pointers are to strings that live until the call returns.
        let mounted = unsafe {
            libc::mount(c"tmpfs".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, options.as_ptr().cast())
        };
        if mounted != 0 {
            eprintln!("no file system can be made here, so that this is not tested");
            return None;
        }
        Some(Self(folder.to_path_buf()))
    }

    fn make_read_only(&self) {
        let target = CString::new(self.0.as_os_str().as_bytes()).unwrap();
        // SAFETY: as above; a remount needs no source and no options.
        let remounted = unsafe {
            libc::mount(
                std::ptr::null(),
                target.as_ptr(),
                std::ptr::null(),
                libc::MS_REMOUNT | libc::MS_RDONLY,
                std::ptr::null(),
            )
        };
        assert_eq!(remounted, 0, "{}", std::io::Error::last_os_error());
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let target = CString::new(self.0.as_os_str().as_bytes()).unwrap();
        // SAFETY: the pointer is to a string that lives until the call returns.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

#[test]
fn fault_41_a_volume_that_is_too_small_is_refused_before_the_first_byte() {
    let bench = Bench::new();
    let Some(_volume) = Volume::mount(&bench.root(), 12 << 20) else { return };
    let error = bench.run(&[]).error();
    assert_eq!((error["code"].as_str(), &error["retryable"]), (Some("INSUFFICIENT_DISK"), &true.into()));
    assert_eq!(error["details"]["need_bytes"], LARGE + 8);
    assert!(error["details"]["free_bytes"].as_u64().unwrap() <= 12 << 20, "{error}");
    assert_eq!(bench.hub.served(), 0);
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn fault_41_a_volume_that_fills_meanwhile_leaves_nothing_half_named() {
    let bench = Bench::new();
    let Some(_volume) = Volume::mount(&bench.root(), 32 << 20) else { return };
    bench.hub.behave(|asked| {
        if asked.range.is_some_and(|(from, _)| from > 0) { Answer::Pause(0) } else { Answer::Right }
    });
    let child = bench.start(&[]);
    bench.hub.wait_for_pause();
    // Somebody else takes what is left.
    let other = fs::write(bench.root().join("other"), vec![1; 32 << 20]);
    assert!(other.is_err(), "the volume is full");
    bench.hub.go_on();
    let error = finish(child).error();
    assert_eq!(error["code"], "INSUFFICIENT_DISK", "{error}");
    assert!(!bench.place(WEIGHTS).exists());
    let left = bench.leftovers().into_iter().filter(|name| !name.starts_with(".downloads/"));
    assert_eq!(left.collect::<Vec<_>>(), ["other"]);
    fs::remove_file(bench.root().join("other")).unwrap();
    bench.run(&[]).output();
    bench.check_complete(&bench.files());
}

#[test]
fn fault_42_a_read_only_volume_will_do_when_it_is_complete() {
    let bench = Bench::new();
    let Some(volume) = Volume::mount(&bench.root(), 64 << 20) else { return };
    bench.run(&[]).output();
    volume.make_read_only();
    bench.hub.forget();
    assert_eq!(bench.run(&[]).output()["files"][0]["state"], "ready");
    assert!(bench.hub.asked().is_empty());
    assert_eq!(bench.run(&["--verify"]).output()["fetched_bytes"], 0);

    let bench = Bench::new();
    let Some(volume) = Volume::mount(&bench.root(), 64 << 20) else { return };
    volume.make_read_only();
    let message = failed(&bench.run(&[]), "VOLUME_UNWRITABLE");
    assert!(message.contains(bench.root().to_str().unwrap()), "{message}");
    assert_eq!(bench.hub.served(), 0);
}

#[test]
fn fault_42_a_volume_that_goes_away_is_an_error() {
    let bench = Bench::new();
    let Some(volume) = Volume::mount(&bench.root(), 64 << 20) else { return };
    bench.hub.behave(|asked| if asked.of_cdn { Answer::Pause(1 << 20) } else { Answer::Right });
    let child = bench.start(&[]);
    bench.hub.wait_for_pause();
    drop(volume);
    fs::remove_dir_all(bench.root()).unwrap();
    bench.hub.go_on();
    let outcome = finish(child);
    assert_eq!((outcome.code, outcome.error()["code"].as_str()), (Some(1), Some("MODEL_DOWNLOAD_FAILED")));
}

#[test]
fn fault_43_another_file_than_the_one_that_is_pinned_is_refused() {
    let other = "1".repeat(40);
    let pinned = |bench: &Bench, size: usize, sha256: &str| {
        bench.write_models(COMMIT, &[listed(WEIGHTS, &size.to_string(), sha256)]);
    };
    let sha256 = File::large(LARGE, 7).sha256();
    // The branch has moved: the pinned commit counts.
    let bench = Bench::new();
    pinned(&bench, LARGE, &sha256);
    bench.hub.move_branch(&other);
    bench.run(&[]).output();
    // The hub answers with another commit, another hash, another length.
    let lies: [(Option<&str>, Option<&str>, usize); 3] =
        [(Some(&other), None, LARGE), (None, Some(&"a".repeat(64)), LARGE), (None, None, LARGE - 1)];
    for (commit, hash, size) in lies {
        let bench = Bench::new();
        pinned(&bench, size, &sha256);
        bench.hub.lie(commit, hash);
        let outcome = bench.run(&[]);
        assert_eq!(outcome.error()["retryable"], false);
        failed(&outcome, "MODEL_CHANGED");
        assert_eq!(bench.hub.served(), 0, "before the first byte");
        assert_eq!(bench.leftovers().iter().filter(|name| !name.contains(".downloads/")).count(), 0);
    }
    // Other bytes of the same length under the same names.
    let bench = Bench::new();
    pinned(&bench, LARGE, &"a".repeat(64));
    failed(&bench.run(&[]), "MODEL_CHANGED");
}

#[test]
fn fault_44_a_wrong_token_is_not_tried_again_and_not_shown() {
    for refuse_names in [true, false] {
        let bench = Bench::new();
        match refuse_names {
            true => bench.hub.refuse_names(Some("401 Unauthorized")),
            false => bench.hub.behave(|asked| match asked.of_cdn {
                true => Answer::Right,
                false => Answer::Status("403 Forbidden", ""),
            }),
        }
        let mut command = bench.command(&[]);
        command.env("HF_TOKEN", "hf_canary").env("LOG_LEVEL", "trace");
        let outcome = Outcome::of(command.output().unwrap());
        failed(&outcome, "MODEL_AUTH");
        let error = outcome.error();
        assert_eq!(error["retryable"], false);
        assert!(error["hint"].as_str().unwrap().contains("HF_TOKEN"));
        let refused = bench.hub.asked().iter().filter(|asked| !asked.of_cdn && asked.range.is_some()).count();
        assert!(refused <= 4, "{refused} attempts");
        assert!(!outcome.stderr.contains("canary"), "{}", outcome.stderr);
    }
}

#[test]
fn fault_44_the_token_is_for_the_hub_alone_and_no_log_shows_it() {
    let bench = Bench::new();
    let mut command = bench.command(&[]);
    command.env("HF_TOKEN", "hf_canary").env("LOG_LEVEL", "trace");
    let outcome = Outcome::of(command.output().unwrap());
    outcome.output();
    for asked in bench.hub.asked() {
        let expected = (!asked.of_cdn).then_some("Bearer hf_canary");
        assert_eq!(asked.authorization.as_deref(), expected, "{asked:?}");
    }
    // Neither the token nor the signature in the address of a file.
    assert!(!outcome.stderr.contains("canary"), "{}", outcome.stderr);
    for name in names_below(&bench.root()) {
        let bytes = fs::read(bench.root().join(&name)).unwrap();
        assert!(!bytes.windows(6).any(|window| window == b"canary"), "{name}");
    }
}

#[test]
fn fault_45_a_page_or_a_pointer_is_no_weights() {
    for page in ["<html>log in</html>", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"]
    {
        let bench = Bench::new();
        bench.hub.behave(move |_| Answer::Page(page));
        let outcome = bench.run(&[]);
        let error = outcome.error();
        assert_eq!(error["code"], "MODEL_DOWNLOAD_FAILED", "{error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("expected") && message.contains("bytes"), "{message}");
        assert!(!bench.place(WEIGHTS).exists());
    }
}

#[test]
fn fault_46_a_file_that_rotted_is_found_by_verify_and_fetched_alone() {
    let bench = Bench::new();
    bench.run(&[]).output();
    let path = bench.place(WEIGHTS);
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[12_345_678] ^= 1;
    fs::write(&path, bytes).unwrap();
    // As if the disk had done it: nothing that is looked at each time has changed.
    fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    bench.hub.forget();
    assert_eq!(bench.run(&[]).output()["fetched_bytes"], 0);
    let output = bench.run(&["--verify"]).output();
    assert_eq!(output["fetched_bytes"], LARGE);
    assert!(!bench.hub.asked().iter().any(|asked| asked.path.contains(SMALL)), "only the file that rotted");
    bench.check_complete(&bench.files());
    // What cannot be fetched is not believed either.
    let mut bytes = fs::read(&path).unwrap();
    bytes[3] ^= 1;
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, bytes).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    failed(&bench.run(&["--verify", "--offline"]), "OFFLINE");
    failed(&bench.run(&["--offline"]), "OFFLINE");
}
