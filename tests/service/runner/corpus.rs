//! Every wrong file gets its code and its reason, at a bounded cost: no panic, no hang, no more memory than one
//! request may take.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::json;

use super::corpus_files::{Case, Fate, audios, images};
use super::{input, with};
use crate::lambda::Function;

/// What one request may cost before it is accepted or refused.
const MAX_MEMORY: u64 = 512 << 20;

/// Sends each file as the field `name`. What is taken is not computed with.
fn judge(name: &str, cases: Vec<Case>) {
    let mut function = Function::start(&[]);
    let mut wrong = Vec::new();
    for (case, file, fate) in cases {
        let changes = json!({name: BASE64_STANDARD.encode(file), "prompt": "fault: instant", "output": {"inline": true}});
        let outcome = function.invoke(&with(&input(), &changes));
        let found = outcome.as_ref().err().map(|(code, error)| {
            (code.clone(), error["details"]["reason"].as_str().unwrap_or_default().to_string())
        });
        let fits = |code: handler::job::Code, reasons: &[&str]| {
            found.as_ref().is_some_and(|(found, reason)| {
                found == code.as_str() && (reasons.is_empty() || reasons.contains(&reason.as_str()))
            })
        };
        let right = match fate {
            Fate::Taken => found.is_none(),
            Fate::Refused(code, reasons) => fits(code, reasons),
            Fate::Either(code, reasons) => found.is_none() || fits(code, reasons),
        };
        if !right {
            wrong.push(format!("{case}: {found:?}, expected {fate:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let peak = function.peak_memory();
    assert!(peak <= MAX_MEMORY, "{peak} bytes");
    let said = function.stderr();
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn wrong_images_get_their_codes() {
    judge("image", images());
}

#[test]
fn wrong_voices_get_their_codes() {
    judge("audio", audios());
}
