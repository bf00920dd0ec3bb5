//! `handler deploy`: the RunPod endpoint as `runpod.toml` describes it, through RunPod's REST API v2.
//!
//! ```text
//! runpod.toml ─► Spec ─► Plan (reads what is there) ─► calls: volume, endpoint ─► rollout ─► smoke test
//! ```
//!
//! A template is not needed: the API takes the image with the endpoint, and resolves a template once, at the call.
//! Nothing is recorded here either: RunPod keeps each release of an endpoint with what it changed, and a rollback
//! reads there which image came before.

pub mod api;
mod plan;
mod rollout;
mod spec;
mod wanted;

pub use plan::{Call, Order, Outcome, Plan, rollback};
pub use rollout::{Smoke, smoke, wait};
pub use spec::{Env, Spec};

use crate::job::{Code, JobError};

/// Hexadecimal digits of SHA-256.
const DIGEST_LEN: usize = 64;

/// Checks that `image` names one build for ever: by digest, or where `allow_tag` is set by a tag.
///
/// # Errors
/// [`Code::InvalidInput`] saying what is missing.
pub fn check_image(image: &str, allow_tag: bool) -> Result<(), JobError> {
    let refused = |said: &str| {
        let message = format!("the image is {image:?}, {said}");
        JobError::new(Code::InvalidInput, message).with_reason("IMAGE")
    };
    let hex = |digest: &str| {
        digest.len() == DIGEST_LEN && digest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let is_name = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() && b != b'@');
    if let Some((name, digest)) = image.split_once('@') {
        return match is_name(name) && digest.strip_prefix("sha256:").is_some_and(hex) {
            true => Ok(()),
            false => Err(refused("expected `repository@sha256:` and 64 hexadecimal digits")),
        };
    }
    // A colon before the last slash is that of a port.
    let tag = image.rsplit('/').next().and_then(|last| last.split_once(':')).map(|(_, tag)| tag);
    match (is_name(image), tag) {
        (true, Some(tag)) if allow_tag && !tag.is_empty() => Ok(()),
        (true, Some(_)) => Err(refused("whose tag may move, expected `repository@sha256:…`").with_hint(
            "`docker buildx imagetools inspect` shows the digest; --allow-tag takes the tag as it is",
        )),
        _ => Err(refused("expected `repository@sha256:…`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_named_by_digest() {
        let digest = "a1".repeat(32);
        for (image, by_digest, by_tag) in [
            (format!("ghcr.io/o/talkie@sha256:{digest}"), true, true),
            (format!("localhost:5000/talkie:v1@sha256:{digest}"), true, true),
            (format!("ghcr.io/o/talkie@sha256:{}", &digest[1..]), false, false),
            (format!("ghcr.io/o/talkie@sha256:{}", digest.to_uppercase()), false, false),
            (format!("ghcr.io/o/talkie@sha512:{digest}"), false, false),
            (format!("@sha256:{digest}"), false, false),
            ("ghcr.io/o/talkie:v1.2.3".into(), false, true),
            ("ghcr.io/o/talkie:".into(), false, false),
            ("localhost:5000/talkie".into(), false, false),
            ("ghcr.io/o/talkie".into(), false, false),
            ("talkie v1".into(), false, false),
            (String::new(), false, false),
        ] {
            assert_eq!(check_image(&image, false).is_ok(), by_digest, "{image}");
            assert_eq!(check_image(&image, true).is_ok(), by_tag, "{image}");
        }
    }
}
