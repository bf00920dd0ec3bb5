//! Requests as clients send them: what is taken, and how each defect is named.

use serde_json::json;

use super::fields::PROMPT_CHARS;
use super::*;
use crate::{Error, ErrorKind};

const IMAGE: &str = "https://a.example/p.png";
const AUDIO: &str = "https://a.example/v.wav";

fn url(text: &str) -> MediaSource {
    MediaSource::Url(text.to_string())
}

/// A request with `fields` beside image and audio.
fn parse(fields: Value) -> Result<(GenerateRequest, Vec<String>)> {
    let mut input = json!({"image": IMAGE, "audio": AUDIO});
    for (name, value) in fields.as_object().unwrap() {
        input[name] = value.clone();
    }
    GenerateRequest::parse(&json!({ "input": input }))
}

fn accepted(fields: Value) -> GenerateRequest {
    let shown = fields.to_string();
    parse(fields).unwrap_or_else(|e| panic!("{shown}: {e}")).0
}

fn refused(fields: Value) -> Error {
    let shown = fields.to_string();
    parse(fields).map(|_| ()).expect_err(&shown)
}

#[test]
fn the_least_request_has_the_documented_defaults() {
    let least = json!({"image": IMAGE, "audio": AUDIO});
    let (request, warnings) = GenerateRequest::parse(&least).unwrap();
    assert_eq!(request, GenerateRequest::new(url(IMAGE), url(AUDIO)));
    assert_eq!((request.size, request.speakers, request.strict), (Size::P480, Speakers::Together, false));
    assert!(warnings.is_empty());
    let job = json!({"id": "a", "input": least, "webhook": "https://x", "s3Config": {"accessId": "k"}});
    assert_eq!(GenerateRequest::parse(&job).unwrap().0, request);
}

#[test]
fn every_field_of_the_contract_is_read() {
    let (request, warnings) = parse(json!({
        "prompt": " p ", "negative_prompt": "n", "model": "infinitetalk-14b", "size": "720p", "preset": "fast",
        "steps": 4, "shift": 2, "text_guidance": 1.5, "audio_guidance": 2.0, "seed": 4294967295u32,
        "max_seconds": 3.5, "color_correction": 0.5, "motion_frames": 5, "frames_per_window": 17,
        "audio_2": "https://a.example/2.wav", "speakers": "in_turn",
        "bbox": {"person1": [0, 1, 2, 3], "person2": [4, 5, 6, 7]},
        "output": {"key_prefix": "/a/b-c/", "expires_seconds": 60, "inline": true,
                   "put_url": "https://a.example/?s=1", "thumbnail": true},
        "strict": true,
    }))
    .unwrap();
    let want = GenerateRequest {
        prompt: Some("p".to_string()),
        negative_prompt: Some("n".to_string()),
        model: Some("infinitetalk-14b".to_string()),
        size: Size::P720,
        preset: Some(Preset::Fast),
        steps: Some(4),
        shift: Some(2.0),
        text_guidance: Some(1.5),
        audio_guidance: Some(2.0),
        seed: Some(u32::MAX),
        max_frames: Some(88),
        color_correction: Some(0.5),
        motion_frames: Some(5),
        frames_per_window: Some(17),
        audio_2: Some(url("https://a.example/2.wav")),
        speakers: Speakers::InTurn,
        bbox: Some([
            BBox { row_min: 0, col_min: 1, row_max: 2, col_max: 3 },
            BBox { row_min: 4, col_min: 5, row_max: 6, col_max: 7 },
        ]),
        output: OutputOptions {
            key_prefix: Some("a/b-c".to_string()),
            expires_seconds: Some(60),
            inline: true,
            put_url: Some("https://a.example/?s=1".to_string()),
            thumbnail: true,
        },
        strict: true,
        ..GenerateRequest::new(url(IMAGE), url(AUDIO))
    };
    assert_eq!(request, want);
    assert!(warnings.is_empty(), "{warnings:?}");
    let contract = FIELDS.iter().filter(|f| matches!(f.role, Role::Required | Role::Optional));
    assert_eq!(contract.count(), 21, "a new field belongs into this test");
}

#[test]
fn every_alias_means_its_field() {
    for field in FIELDS.iter().filter(|f| matches!(f.role, Role::Required | Role::Optional)) {
        let value = match field.kind {
            Kind::Media(_) => json!("https://a.example/other"),
            Kind::Choice { values, .. } => json!(values[1]),
            Kind::Integer { .. } => json!(7),
            Kind::Number { .. } => json!(1.0),
            Kind::Frames { .. } => json!(5),
            _ => json!("words"),
        };
        for alias in field.aliases {
            let mut by_alias = json!({"image": IMAGE, "audio": AUDIO});
            by_alias.as_object_mut().unwrap().remove(field.name);
            let mut by_name = by_alias.clone();
            by_alias[*alias] = value.clone();
            by_name[field.name] = value.clone();
            let parse = |v: &Value| GenerateRequest::parse(v).unwrap_or_else(|e| panic!("{alias}: {e}"));
            assert_eq!(parse(&by_alias), parse(&by_name), "{alias}");
        }
    }
}

#[test]
fn other_ways_of_saying_it_are_understood() {
    let sizes = [("480p", Size::P480), ("480", Size::P480), ("infinitetalk-480", Size::P480)];
    let sizes = sizes.into_iter().chain([("720P", Size::P720), ("infinitetalk-720", Size::P720)]);
    for (text, size) in sizes.chain([("832x480", Size::P480), ("1280*720", Size::P720)]) {
        assert_eq!(accepted(json!({"size": text})).size, size, "{text}");
        assert_eq!(accepted(json!({"resolution": text})).size, size, "{text}");
    }
    assert_eq!(accepted(json!({"resolution": 720})).size, Size::P720);
    assert_eq!(accepted(json!({"width": 1280, "height": 720})).size, Size::P720);
    assert_eq!(accepted(json!({"width": 448, "height": 832})).size, Size::P480);
    assert_eq!(accepted(json!({"width": 448, "height": 832, "size": "480p"})).size, Size::P480);
    assert_eq!(accepted(json!({"speed_mode": "draft"})).preset, Some(Preset::Draft));
    assert_eq!(accepted(json!({"acceleration": "regular"})).preset, Some(Preset::Balanced));
    assert_eq!(accepted(json!({"audio_type": "add", "audio_2": AUDIO})).speakers, Speakers::InTurn);
    assert_eq!(accepted(json!({"audio_type": "para"})).speakers, Speakers::Together);
    assert_eq!(accepted(json!({"seed": -1})).seed, None);
    assert_eq!(accepted(json!({"seed": 0})).seed, Some(0));
    assert_eq!(accepted(json!({"prompt": " "})).prompt, None);
    let signed = accepted(json!({"presigned_url": "https://a.example/?s"}));
    assert_eq!(signed.output.put_url.as_deref(), Some("https://a.example/?s"));
    let boxes = accepted(json!({"bbox": [[0, 0, 1, 1], [0, 1, 1, 2]]})).bbox.unwrap();
    assert_eq!(boxes[1], BBox { row_min: 0, col_min: 1, row_max: 1, col_max: 2 });
    let nulls =
        accepted(json!({"audio_2": null, "seed": null, "size": null, "cond_audio": null, "output": null}));
    assert_eq!(nulls, accepted(json!({})));
}

#[test]
fn the_reference_request_file_is_understood() {
    let (request, warnings) = GenerateRequest::parse(&json!({
        "prompt": "two people talk", "cond_video": IMAGE, "audio_type": "para",
        "cond_audio": {"person1": AUDIO, "person2": "https://a.example/2.wav"},
        "bbox": {"person1": [160, 120, 1280, 1080], "person2": [160, 1320, 1280, 2280]},
    }))
    .unwrap();
    assert_eq!(request.audio, url(AUDIO));
    assert_eq!(request.audio_2, Some(url("https://a.example/2.wav")));
    assert_eq!(request.bbox.unwrap()[0], BBox { row_min: 160, col_min: 120, row_max: 1280, col_max: 1080 });
    assert!(warnings.is_empty(), "{warnings:?}");
}

#[test]
fn the_video_is_cut_to_whole_frames() {
    for (fields, frames) in [
        (json!({"max_seconds": 0.04}), 1),
        (json!({"max_seconds": 0.28}), 7),
        (json!({"max_seconds": 1.01}), 26),
        (json!({"seconds": 2}), 50),
        (json!({"max_frame": 1000}), 1000),
        (json!({"max_frame_num": 7}), 7),
        (json!({"num_frames": 81}), 81),
        (json!({"num_frames": 50, "max_seconds": 2}), 50),
    ] {
        assert_eq!(accepted(fields.clone()).max_frames, Some(frames), "{fields}");
    }
}

#[test]
fn media_may_come_with_the_request() {
    let input = json!({"image_base64": "iVBORw==", "audio_url": "data:audio/wav;base64,UklGRg"});
    let request = GenerateRequest::parse(&input).unwrap().0;
    assert_eq!(request.image, MediaSource::Bytes(vec![0x89, b'P', b'N', b'G']));
    assert_eq!(request.audio, MediaSource::Bytes(b"RIFF".to_vec()));
}

#[test]
fn what_has_no_effect_is_said() {
    for (fields, said) in [
        (json!({"enable_safety_checker": true}), "`enable_safety_checker` is ignored"),
        (json!({"use_teacache": false}), "`use_teacache` is ignored"),
        (json!({"mode": "streaming"}), "`mode` is ignored"),
        (json!({"aspect_ratio": "16:9"}), "the aspect follows the image"),
        (json!({"width": 1000, "height": 1000}), "snapped to `720p`"),
        (json!({"size": "640x640"}), "snapped to `480p`"),
        (json!({"speakers": "in_turn"}), "`speakers` has no effect"),
        (json!({"bbox": [[0, 0, 1, 1], [0, 1, 1, 2]]}), "`bbox` has no effect"),
    ] {
        let warnings = parse(fields.clone()).unwrap().1;
        assert!(warnings.len() == 1 && warnings[0].contains(said), "{fields}: {warnings:?}");
    }
}

#[test]
fn missing_and_unknown_fields_are_named() {
    use ErrorKind::*;
    for (input, kind, said) in [
        (json!({}), MissingField, "`image`"),
        (json!({"input": {}}), MissingField, "`image`"),
        (json!({"input": {"input": {}}}), UnknownField, "`input`"),
        (json!({"image": null, "audio": AUDIO}), MissingField, "`image`"),
        (json!({"image": IMAGE}), MissingField, "`audio`"),
        (json!({"image": IMAGE, "audio": AUDIO, "promt": ""}), UnknownField, "nearest is `prompt`"),
        (json!({"image": IMAGE, "audio": AUDIO, "output": {"inlin": true}}), UnknownField, "`output.inline`"),
        (json!({"image": IMAGE, "cond_audio": {"person3": AUDIO}}), UnknownField, "`cond_audio.person1`"),
        (json!({"input": null}), InvalidInput, "`input` is null, expected an object"),
        (json!({"input": [1]}), InvalidInput, "`input` is an array"),
        (json!([]), InvalidInput, "`input` is an array"),
        (json!("x"), InvalidInput, "`input` is \"x\""),
        (json!(null), InvalidInput, "`input` is null"),
    ] {
        let e = GenerateRequest::parse(&input).unwrap_err();
        assert!(e.kind() == kind && e.to_string().contains(said), "{input}: {:?} {e}", e.kind());
    }
}

#[test]
fn values_out_of_range_say_what_was_expected() {
    for (fields, message) in [
        (json!({"steps": 0}), "`steps` is 0, expected an integer from 1 to 100"),
        (json!({"steps": 1000000}), "`steps` is 1000000, expected an integer from 1 to 100"),
        (json!({"sample_steps": 4.0}), "`sample_steps` is 4.0, expected an integer from 1 to 100"),
        (json!({"steps": "4"}), "`steps` is \"4\", expected an integer from 1 to 100"),
        (json!({"seed": -2}), "`seed` is -2, expected an integer from -1 to 4294967295"),
        (json!({"seed": 4294967296u64}), "`seed` is 4294967296, expected an integer from -1 to 4294967295"),
        (
            json!({"seed": u64::MAX}),
            "`seed` is 18446744073709551615, expected an integer from -1 to 4294967295",
        ),
        (json!({"shift": 0}), "`shift` is 0, expected a number from 0.1 to 50"),
        (json!({"audio_cfg": 0.5}), "`audio_cfg` is 0.5, expected a number from 1 to 20"),
        (json!({"text_guidance": true}), "`text_guidance` is true, expected a number from 1 to 20"),
        (json!({"max_seconds": 0}), "`max_seconds` is 0, expected a number from 0.04 to 36000"),
        (json!({"max_frame": 0}), "`max_frame` is 0, expected an integer from 1 to 900000"),
        (json!({"color_correction": 1.5}), "`color_correction` is 1.5, expected a number from 0 to 1"),
        (json!({"frames_per_window": 80}), "`frames_per_window` is 80, expected 4n+1 (for example 81)"),
        (json!({"frame_num": 1}), "`frame_num` is 1, expected 4n+1 from 5 to 161"),
        (json!({"motion_frame": 25.5}), "`motion_frame` is 25.5, expected 4n+1 from 1 to 77"),
        (
            json!({"motion_frames": 17, "frames_per_window": 17}),
            "`motion_frames` is 17, expected less than `frames_per_window`, which is 17",
        ),
        (json!({"size": "4k"}), "`size` is \"4k\", expected one of `480p`, `720p`"),
        (json!({"size": []}), "`size` is an array, expected one of `480p`, `720p`"),
        (
            json!({"size": "10x10"}),
            "`size` is \"10x10\", expected `480p`, `720p` or WIDTHxHEIGHT with sides from 64 to 8192",
        ),
        (json!({"width": 640}), "`width` is given alone, expected `height` beside it"),
        (json!({"width": 63, "height": 64}), "`width` is 63, expected an integer from 64 to 8192"),
        (
            json!({"preset": "best"}),
            "`preset` is \"best\", expected one of `draft`, `fast`, `balanced`, `quality`",
        ),
        (json!({"speakers": {}}), "`speakers` is an object, expected one of `together`, `in_turn`"),
        (json!({"strict": 1}), "`strict` is 1, expected true or false"),
        (json!({"prompt": 3}), "`prompt` is 3, expected text"),
        (json!({"model": "../x"}), "`model` is \"../x\", expected 1 to 64 letters, digits, `.`, `_` or `-`"),
        (json!({"audio_2": 3}), "`audio_2` is 3, expected a URL, a data URI or base64 text"),
        (
            json!({"cond_audio": "x"}),
            "`cond_audio` is \"x\", expected {\"person1\": audio, \"person2\": audio}",
        ),
        (json!({"output": true}), "`output` is true, expected an object"),
        (
            json!({"output": {"key_prefix": "a/../b"}}),
            "`output.key_prefix` is \"a/../b\", expected segments of letters, digits, `.`, `_`, `-` with `/` \
             between, none starting with `.`",
        ),
        (
            json!({"output": {"expires_seconds": 59}}),
            "`output.expires_seconds` is 59, expected an integer from 60 to 604800",
        ),
        (
            json!({"bbox": {"person1": [0, 0, 1, 1]}}),
            "`bbox` is an object, expected {\"person1\": box, \"person2\": box}",
        ),
        (
            json!({"bbox": {"person1": [0, 0, 1, 1], "person2": [0, 5, 1, 5]}}),
            "`bbox.person2` is [0, 5, 1, 5], expected row_min < row_max and column_min < column_max",
        ),
        (
            json!({"bbox": [[0, 0, 1], [0, 0, 1, 1]]}),
            "`bbox.person1` is an array, expected [row_min, column_min, row_max, column_max], integers from 0 to \
             65535",
        ),
    ] {
        let e = refused(fields);
        assert_eq!((e.kind(), e.to_string().as_str()), (ErrorKind::InvalidInput, message));
    }
}

#[test]
fn refusals_have_a_reason() {
    let long = "x".repeat(PROMPT_CHARS + 1);
    for (fields, reason) in [
        (json!({"image_path": "/etc/passwd"}), "FIELD_REFUSED"),
        (json!({"wav_path": null}), "FIELD_REFUSED"),
        (json!({"video_url": "https://a.example/v.mp4"}), "FIELD_REFUSED"),
        (json!({"prompt": long}), "PROMPT_TOO_LONG"),
        (json!({"output": {"key_prefix": "x".repeat(201)}}), "TEXT_TOO_LONG"),
        (json!({"steps": 0}), "INVALID_FIELD"),
        (json!({"image_url": "https://a.example/other"}), "CONFLICTING_FIELDS"),
        (json!({"cond_audio": {"person1": "https://a.example/other"}}), "CONFLICTING_FIELDS"),
        (json!({"steps": 4, "sample_steps": 5}), "CONFLICTING_FIELDS"),
        (json!({"size": "720p", "width": 640, "height": 640}), "CONFLICTING_FIELDS"),
        (json!({"max_seconds": 2, "num_frames": 51}), "CONFLICTING_FIELDS"),
        (json!({"presigned_url": "https://a", "output": {"put_url": "https://b"}}), "CONFLICTING_FIELDS"),
        (json!({"audio_2": "not base64!"}), "INVALID_BASE64"),
    ] {
        let e = refused(fields.clone());
        assert_eq!((e.kind(), e.reason()), (ErrorKind::InvalidInput, Some(reason)), "{fields}: {e}");
    }
    assert!(parse(json!({"image_url": IMAGE, "steps": 4, "sample_steps": 4})).is_ok(), "equal values agree");
}

#[test]
fn a_draft_is_overridden_field_by_field() {
    let file = json!({"image": IMAGE, "audio": AUDIO, "sample_steps": 8, "width": 1280, "height": 720});
    let mut draft = Draft::parse(&file, &Limits::default()).unwrap();
    draft.set("steps", &json!(2)).unwrap();
    draft.set("size", &json!("480p")).unwrap();
    draft.set_image(MediaSource::Bytes(vec![1]));
    assert_eq!(draft.set("sample_steps", &json!(2)).map_err(|e| e.kind()), Ok(()), "an alias is the field");
    assert_eq!(draft.set("step", &json!(2)).unwrap_err().kind(), ErrorKind::UnknownField);
    let request = draft.finish().unwrap().0;
    assert_eq!((request.steps, request.size), (Some(2), Size::P480));
    assert_eq!(request.image, MediaSource::Bytes(vec![1]));
    assert!(Draft::new(Limits::default()).has_no_media());
}

#[test]
fn nothing_private_is_shown() {
    let (request, _) = GenerateRequest::parse(&json!({
        "image": "https://a.example/p.png?sig=canary", "audio": "Y2FuYXJ5", "prompt": "canary",
        "negative_prompt": "canary", "presigned_url": "https://a.example/?sig=canary",
    }))
    .unwrap();
    let shown = format!("{request:?}");
    assert!(!shown.contains("canary") && !shown.contains("Y2Fu"), "{shown}");
    assert!(shown.contains("https://a.example/p.png?…"), "{shown}");
}
