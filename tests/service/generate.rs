//! `handler generate` and `handler schema`: exit codes and JSON.

use serde_json::{Value, json};

use crate::media::{self, Samples};
use crate::support::{Bench, Outcome, handler, read};

#[test]
fn a_video_is_made_and_described() {
    let bench = Bench::new();
    let run = bench.run(&[
        "--image",
        "portrait.png",
        "--audio",
        "voice.wav",
        "--seed",
        "7",
        "--thumbnail",
        "t.jpg",
    ]);
    let output = run.output();
    let file = read(&bench.path("out.mp4"));
    let mp4 = re_mp4::Mp4::read_bytes(&file).unwrap();
    let track = |kind| mp4.tracks().values().find(|t| t.kind == Some(kind)).expect("both tracks are there");
    let (picture, sound) = (track(re_mp4::TrackKind::Video), track(re_mp4::TrackKind::Audio));
    assert_eq!(picture.samples.len(), 13);
    assert_eq!((&output["width"], &output["height"]), (&json!(picture.width), &json!(picture.height)));
    assert!(!sound.samples.is_empty());
    assert_eq!(output["size_bytes"], file.len());
    assert_eq!(output["video_path"].as_str().map(Into::into), Some(bench.path("out.mp4")));
    assert!(output["video_url"].as_str().is_some_and(|url| url.starts_with("file:///")), "{output}");
    // Half a second of audio is 12.5 frames, and a part of a frame is shown for a whole one.
    assert_eq!((&output["frames"], &output["fps"]), (&json!(13), &json!(25)));
    let duration = output["duration_s"].as_f64().unwrap();
    assert!((0.48..=0.54).contains(&duration), "{duration}");
    assert_eq!((&output["seed"], &output["model"]), (&json!(7), &json!("tiny")));
    assert_eq!(output["sha256"].as_str().map(str::len), Some(64));
    assert!(
        output["warnings"].as_array().is_some_and(|w| !w.is_empty()),
        "audio below 1 s is worth a warning"
    );
    assert_eq!(&read(&bench.path("t.jpg"))[..3], b"\xff\xd8\xff");
    assert_eq!(bench.names(), ["out.mp4", "portrait.png", "t.jpg", "voice.wav"], "no part is left");
    let progress: Vec<u32> = run.stderr.lines().filter_map(percent).collect();
    assert!(progress.is_sorted() && progress.last() == Some(&100), "{}", run.stderr);
}

/// The percentage that a line of progress starts with.
fn percent(line: &str) -> Option<u32> {
    line.split_once('%')?.0.trim().parse().ok()
}

#[test]
fn the_same_seed_makes_the_same_video() {
    let bench = Bench::new();
    let args = ["--image", "portrait.png", "--audio", "voice.wav", "--seed", "7", "--quiet"];
    let first = bench.run(&args).output();
    let second = bench.run(&args);
    assert_eq!(second.stderr, "", "--quiet is quiet");
    assert_eq!(second.output()["sha256"], first["sha256"]);
}

#[test]
fn a_request_file_is_understood_and_flags_override_it() {
    let bench = Bench::new();
    let request = json!({"input": {
        "image_base64": base64(&media::png(96, 96)),
        "wav_base64": format!("data:audio/wav;base64,{}", base64(&media::tone(16_000, 1, 0.5))),
        "base_seed": 1, "enable_safety_checker": true, "output": {"thumbnail": true, "inline": true},
    }});
    let output = bench.run_request(&request.to_string(), &["--seed", "9"]).output();
    assert_eq!(output["seed"], 9);
    let warnings = output["warnings"].to_string();
    assert!(warnings.contains("`enable_safety_checker` is ignored"), "{warnings}");
    assert!(warnings.contains("only `thumbnail` has an effect"), "{warnings}");
    assert!(output["thumbnail_url"].as_str().is_some_and(|url| url.ends_with("/out.jpg")), "{output}");
}

#[test]
fn without_inputs_the_examples_speak() {
    let bench = Bench::new();
    let run = bench.run(&["--max-seconds", "0.2"]);
    assert_eq!(run.output()["frames"], 5);
    assert!(run.stderr.contains("using the example portrait and voice"), "{}", run.stderr);
}

#[test]
fn without_weights_the_untrained_model_stands_in_and_says_so() {
    let bench = Bench::new();
    let mut command = handler();
    command.current_dir(bench.dir.path()).env("MODEL_STORAGE_PATH", bench.dir.path());
    command.args(["generate", "--steps", "1", "--max-seconds", "0.2"]);
    command.args(["--image", "portrait.png", "--audio", "voice.wav"]);
    let run = Outcome::of(command.output().unwrap());
    assert_eq!(run.output()["model"], "tiny");
    assert!(run.stderr.contains("untrained"), "{}", run.stderr);
    assert!(bench.path("out.mp4").is_file(), "out.mp4 is the default");
}

#[test]
fn two_people_speak() {
    let bench = Bench::new();
    for speakers in ["together", "in_turn"] {
        let output = bench
            .run(&[
                "--image",
                "portrait.png",
                "--audio",
                "voice.wav",
                "--audio-2",
                "voice.wav",
                "--speakers",
                speakers,
            ])
            .output();
        assert_eq!(output["frames"], if speakers == "together" { 13 } else { 25 }, "{speakers}");
    }
}

#[test]
fn sound_media_of_odd_forms_are_taken() {
    let bench = Bench::new();
    for (name, audio) in [
        ("192 kHz", media::tone(192_000, 1, 0.2)),
        ("8 kHz", media::tone(8000, 1, 0.2)),
        ("8 channels", media::tone(16_000, 8, 0.2)),
        ("a tenth of a second", media::tone(16_000, 1, 0.1)),
        ("silence", media::wav(16_000, 1, Samples::Int16, &[0; 6400])),
    ] {
        bench.write("odd.wav", &audio);
        let run = bench.run_with("portrait.png", "odd.wav");
        assert_eq!(run.code, Some(0), "{name}: {}", run.stderr);
    }
}

#[test]
fn broken_images_are_refused() {
    let bench = Bench::new();
    let sound = media::png(96, 96);
    let mut garbled = sound.clone();
    let middle = 60..garbled.len() - 20;
    garbled[middle.clone()].copy_from_slice(&media::noise(middle.len()));
    for (name, file, code) in [
        ("nothing", vec![], "INVALID_IMAGE_FORMAT"),
        ("truncated", sound[..sound.len() / 2].to_vec(), "INVALID_IMAGE_FORMAT"),
        ("garbled", garbled, "INVALID_IMAGE_FORMAT"),
        ("noise", media::noise(5000), "INVALID_IMAGE_FORMAT"),
        ("text", b"<html>portrait</html>".to_vec(), "INVALID_IMAGE_FORMAT"),
        ("a GIF", b"GIF89a\x01\0\x01\0\0\0\0;".to_vec(), "INVALID_IMAGE_FORMAT"),
        ("a voice", media::tone(16_000, 1, 0.2), "INVALID_IMAGE_FORMAT"),
        ("huge", media::png_of(100_000, 20_000, &[0; 64]), "IMAGE_TOO_LARGE"),
        ("huge both ways", media::png_of(i32::MAX as u32, i32::MAX as u32, &[0; 64]), "IMAGE_TOO_LARGE"),
        ("0 pixels", media::png_of(0, 0, &[]), "INVALID_IMAGE_FORMAT"),
        ("1 pixel", media::png(1, 1), "INVALID_IMAGE_FORMAT"),
        ("a strip", media::png(2048, 64), "INVALID_IMAGE_FORMAT"),
    ] {
        bench.write("bad.png", &file);
        let run = bench.run_with("bad.png", "voice.wav");
        let error = run.error();
        assert_eq!((run.code, error["code"].as_str()), (Some(2), Some(code)), "{name}: {error}");
        assert!(!bench.path("out.mp4").exists(), "{name}");
    }
}

#[test]
fn broken_audio_is_refused() {
    let bench = Bench::new();
    let floats = |value: f32| media::wav(16_000, 1, Samples::Float32, &value.to_le_bytes().repeat(8000));
    let with = |rate, channels| media::wav(rate, channels, Samples::Int16, &[1; 8000]);
    for (name, file, codes) in [
        ("nothing", vec![], &["EMPTY_AUDIO"][..]),
        ("a head alone", with(16_000, 1)[..44].to_vec(), &["EMPTY_AUDIO", "INVALID_AUDIO_FORMAT"]),
        ("no samples", media::wav(16_000, 1, Samples::Int16, &[]), &["EMPTY_AUDIO"]),
        ("half a head", with(16_000, 1)[..20].to_vec(), &["INVALID_AUDIO_FORMAT"]),
        ("noise", media::noise(20_000), &["INVALID_AUDIO_FORMAT"]),
        ("text", b"<html>voice</html>".to_vec(), &["INVALID_AUDIO_FORMAT"]),
        ("an image", media::png(96, 96), &["INVALID_AUDIO_FORMAT"]),
        ("NaN", floats(f32::NAN), &["INVALID_AUDIO_FORMAT"]),
        ("infinity", floats(f32::INFINITY), &["INVALID_AUDIO_FORMAT"]),
        ("9 channels", with(16_000, 9), &["INVALID_AUDIO_FORMAT"]),
        ("0 channels", with(16_000, 0), &["INVALID_AUDIO_FORMAT"]),
        ("65535 channels", with(16_000, u16::MAX), &["INVALID_AUDIO_FORMAT"]),
        ("7999 Hz", with(7999, 1), &["INVALID_AUDIO_FORMAT"]),
        ("192001 Hz", with(192_001, 1), &["INVALID_AUDIO_FORMAT"]),
        ("0 Hz", with(0, 1), &["INVALID_AUDIO_FORMAT"]),
    ] {
        bench.write("bad.wav", &file);
        let run = bench.run_with("portrait.png", "bad.wav");
        let error = run.error();
        assert_eq!(run.code, Some(2), "{name}: {error}");
        assert!(codes.contains(&error["code"].as_str().unwrap_or_default()), "{name}: {error}");
    }
}

#[test]
fn limits_are_settings() {
    let bench = Bench::new();
    let args = ["--image", "portrait.png", "--audio", "voice.wav"];
    for (variable, value, code) in [
        ("MAX_IMAGE_BYTES", "100", "IMAGE_TOO_LARGE"),
        ("MAX_AUDIO_BYTES", "100", "AUDIO_TOO_LARGE"),
        ("MAX_IMAGE_BYTES", "many", "INVALID_INPUT"),
        ("ALLOW_PRIVATE_URLS", "perhaps", "INVALID_INPUT"),
        ("LOG_LEVEL", "loud", "INVALID_INPUT"),
    ] {
        let run = Outcome::of(bench.generate(&args).env(variable, value).output().unwrap());
        let error = run.refused(code);
        if code == "INVALID_INPUT" {
            assert!(error["message"].as_str().is_some_and(|m| m.contains(variable)), "{error}");
        }
    }
    bench.write("long.wav", &media::tone(8000, 1, 1.2));
    let mut command = bench.generate(&["--image", "portrait.png", "--audio", "long.wav"]);
    Outcome::of(command.env("MAX_AUDIO_SECONDS", "1").output().unwrap()).refused("AUDIO_TOO_LONG");
}

#[test]
fn requests_that_mean_nothing_are_refused() {
    let bench = Bench::new();
    for (request, code, said) in [
        (r#"{"input": {}}"#, "MISSING_FIELD", "`image`"),
        (r#"{"input": {"image": "https://a.example/x"}}"#, "MISSING_FIELD", "`audio`"),
        (r#"{"input": {"imgae": "https://a.example/x"}}"#, "UNKNOWN_FIELD", "`image`"),
        (r#"{"input": {"image_path": "/etc/passwd"}}"#, "INVALID_INPUT", "`image_path` is refused"),
        (r#"{"input": null}"#, "INVALID_INPUT", "expected an object"),
        (r#"{"input": {"steps": 1, "steps": 2}}"#, "INVALID_INPUT", "`steps` occurs twice"),
        (r#"{"input": {"frames_per_window": 80}}"#, "INVALID_INPUT", "expected 4n+1 (for example 81)"),
        ("{", "INVALID_INPUT", "not valid JSON"),
        ("", "INVALID_INPUT", "not valid JSON"),
        (&"[".repeat(100_000), "INVALID_INPUT", "not valid JSON"),
    ] {
        let error = bench.run_request(request, &[]).refused(code);
        assert!(error["message"].as_str().is_some_and(|m| m.contains(said)), "{error}");
    }
}

#[test]
fn flags_that_mean_nothing_are_refused() {
    let bench = Bench::new();
    bench.write("keep.mp4", b"kept");
    let media = ["--image", "portrait.png", "--audio", "voice.wav"];
    for (args, code) in [
        (&["--image", "none.png", "--audio", "voice.wav"][..], "INVALID_INPUT"),
        (&["--image", ".", "--audio", "voice.wav"], "INVALID_INPUT"),
        (&["--image", "portrait.png"], "MISSING_FIELD"),
        (&["--input", "none.json"], "INVALID_INPUT"),
        (&["--size", "4k"], "INVALID_INPUT"),
        (&["--seed", "-2"], "INVALID_INPUT"),
        (&["--device", "tpu"], "INVALID_INPUT"),
        (&["--nonsense"], "INVALID_INPUT"),
        (&["--speakers", "both"], "INVALID_INPUT"),
        (&["--thumbnail", "none/t.jpg"], "INVALID_INPUT"),
    ] {
        let args = if args.contains(&"--image") { args.to_vec() } else { [&media[..], args].concat() };
        let args = if args.contains(&"--input") { vec!["--input", "none.json"] } else { args };
        bench.run(&args).refused(code);
        assert!(!bench.path("out.mp4").exists(), "{args:?}");
    }
    let mut unknown = handler();
    unknown.args(["generate", "--model", "nobody", "--output"]).arg(bench.path("keep.mp4"));
    Outcome::of(unknown.output().unwrap()).refused("MODEL_NOT_FOUND");
    let mut nowhere = handler();
    nowhere.args(["generate", "--output"]).arg(bench.path("none/out.mp4"));
    Outcome::of(nowhere.output().unwrap()).refused("INVALID_INPUT");
    assert_eq!(read(&bench.path("keep.mp4")), b"kept", "a former video is replaced only by a complete one");
}

#[test]
fn variables_stand_for_flags() {
    let bench = Bench::new();
    let mut command = bench.generate(&["--audio", "voice.wav"]);
    command.env("TALKIE_IMAGE", "portrait.png").env("TALKIE_SIZE", "4k");
    let error = Outcome::of(command.output().unwrap()).refused("INVALID_INPUT");
    assert!(error["message"].as_str().is_some_and(|m| m.contains("4k")), "{error}");
}

#[test]
fn a_request_may_come_on_standard_input() {
    let bench = Bench::new();
    bench.write("request.json", br#"{"input": {"stepz": 1}}"#);
    let mut command = bench.generate(&["--input", "-"]);
    command.stdin(std::fs::File::open(bench.path("request.json")).unwrap());
    Outcome::of(command.output().unwrap()).refused("UNKNOWN_FIELD");
}

#[test]
fn help_names_every_flag_with_its_variable() {
    let shown = |args: &[&str]| {
        let outcome = Outcome::of(handler().args(args).output().unwrap());
        assert_eq!(outcome.code, Some(0));
        outcome.stdout
    };
    let help = shown(&["generate", "--help"]);
    for text in ["--image", "TALKIE_IMAGE", "--frames-per-window", "MODEL_STORAGE_PATH", "MAX_AUDIO_SECONDS"]
    {
        assert!(help.contains(text), "{text}");
    }
    assert!(shown(&["--help"]).contains("schema"));
    assert!(shown(&["--version"]).starts_with("handler "));
}

#[test]
fn the_schema_is_json() {
    let outcome = Outcome::of(handler().arg("schema").output().unwrap());
    let schema: Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert!(schema["input"]["properties"]["image"].is_object());
    assert!(schema["output"]["properties"]["duration_s"].is_object());
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let encode = |three: &[u8]| {
        let bits = three.iter().fold(0u32, |bits, b| bits << 8 | u32::from(*b)) << (8 * (3 - three.len()));
        let digit = |i: usize| char::from(ALPHABET[(bits >> (18 - 6 * i) & 63) as usize]);
        (0..=three.len()).map(digit).collect::<String>()
    };
    bytes.chunks(3).map(encode).collect()
}
