//! Thousands of requests and files that are a little wrong. The fuzz targets in `tests/fuzz` look further; these
//! are the same ones every time.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use handler::config::{Config, ConfigArgs};
use handler::gateway::admission::{Request, check_media};
use handler::job::Code;
use serde_json::json;
use talkie::request::Medium;

use crate::media;

/// Numbers that look random.
struct Dice(u64);

impl Dice {
    /// One below `n`.
    fn roll(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n.max(1)
    }
}

/// `bytes` with one to four small changes.
fn mutate(bytes: &[u8], dice: &mut Dice, words: &[&[u8]]) -> Vec<u8> {
    let mut changed = bytes.to_vec();
    for _ in 0..=dice.roll(4) {
        let at = dice.roll(changed.len());
        match dice.roll(6) {
            0 if !changed.is_empty() => changed[at] ^= 1 << dice.roll(8),
            1 if !changed.is_empty() => changed[at] = [0, 0xff, 0x7f, 0x80, b'"', b'{'][dice.roll(6)],
            2 => changed.truncate(at),
            3 => {
                let word = words[dice.roll(words.len())];
                changed.splice(at..at, word.iter().copied());
            }
            4 => {
                let end = (at + dice.roll(64)).min(changed.len());
                let piece = changed[at..end].to_vec();
                changed.splice(at..at, piece);
            }
            _ => {
                let end = (at + dice.roll(64)).min(changed.len());
                changed.drain(at..end);
            }
        }
    }
    changed
}

fn config() -> Config {
    Config::new(&ConfigArgs::default(), |_| None, Path::new("/nonexistent")).unwrap()
}

#[test]
fn fault_76_requests_that_are_a_little_wrong_are_read_or_refused() {
    let config = config();
    let request = json!({
        "input": {
            "image": STANDARD.encode([7; 60]), "audio": "https://example.com/a.wav?x=1", "prompt": "ä \u{1f642}",
            "size": "720p", "steps": 8, "seed": -1, "bbox": [[0, 0, 9, 9], [0, 9, 9, 18]], "max_seconds": 1.5,
            "output": {"inline": true, "key_prefix": "a/b"},
        },
        "webhook": "https://example.com/hook", "policy": {"ttl": 20000, "lowPriority": false},
    });
    let words: [&[u8]; 8] =
        [b"null", b"1e999", b"\\ud800", b"\"a\":1,", b"[[[[", b"\xff", b"-0", b"data:;base64,"];
    let (text, mut dice) = (request.to_string(), Dice(1));
    let mut read = 0;
    for n in 0..20_000 {
        let changed = mutate(text.as_bytes(), &mut dice, &words);
        match Request::read(&changed, n % 4 != 0, &config) {
            Ok(_) => read += 1,
            Err(e) => assert!(e.code.is_bad_input(), "{e}: {}", String::from_utf8_lossy(&changed)),
        }
    }
    assert!((100..19_900).contains(&read), "both happen: {read} were read");
}

#[test]
fn media_that_are_a_little_wrong_are_opened_or_refused() {
    let config = config();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/media");
    let mut seeds = vec![(Medium::Image, media::png(64, 64)), (Medium::Audio, media::tone(8_000, 1, 0.2))];
    let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    for path in names {
        let medium =
            if path.extension().is_some_and(|end| end == "jpg") { Medium::Image } else { Medium::Audio };
        seeds.push((medium, std::fs::read(path).unwrap()));
    }
    let words: [&[u8]; 6] =
        [b"RIFF", b"\xff\xd8\xff", b"moov", b"OggS", b"\xff\xff\xff\xff", b"\0\0\0\0\0\0\0\0"];
    let (mut opened, mut dice) = (0, Dice(2));
    for n in 0..1_500 {
        let (medium, bytes) = &seeds[n % seeds.len()];
        let changed = mutate(bytes, &mut dice, &words);
        match check_media(vec![("field", *medium, changed)], &config) {
            Ok(()) => opened += 1,
            // A panic would be INTERNAL.
            Err(e) => assert!(e.code != Code::Internal && e.code.is_bad_input(), "{n}: {e}"),
        }
    }
    assert!((20..1_480).contains(&opened), "both happen: {opened} were opened");
}
