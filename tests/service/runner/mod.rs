//! Jobs through the runner: what they come to, what they leave behind, and how they go wrong.

pub mod bench;
mod corpus;
mod corpus_files;
mod deliveries;
mod faults;
mod hostile;
mod jobs;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::media;

/// The quickest job that makes a real video: 8 frames of the untrained model.
pub fn input() -> Value {
    json!({
        "image": BASE64_STANDARD.encode(media::png(96, 96)),
        "audio": BASE64_STANDARD.encode(media::tone(16_000, 1, 0.3)),
        "model": "tiny", "steps": 1, "frames_per_window": 9, "motion_frames": 5,
    })
}

/// `input` with these fields in place of its own; null removes one.
pub fn with(input: &Value, changes: &Value) -> Value {
    let mut input = input.clone();
    let fields = input.as_object_mut().unwrap();
    for (name, value) in changes.as_object().unwrap() {
        fields.insert(name.clone(), value.clone());
    }
    fields.retain(|_, value| !value.is_null());
    input
}
