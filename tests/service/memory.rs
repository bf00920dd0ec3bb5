//! Host memory: flat in the length of the video, but for the embedding of the voice, and small for what is refused.

use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::media::{self, Samples};
use crate::support::Bench;

/// Frames of a window and of its overlap.
const FRAMES: usize = 17;
const MOTION: usize = 5;
/// Bytes of one frame of voice in the model `tiny`: 4 layers of 64 floats, and as many again while they are made.
const EMBEDDING: u64 = 2 * 4 * 64 * 4;
/// Bytes of samples behind one frame: 640 at 16 kHz, in the file and as floats, before and after normalising.
const SAMPLES: u64 = 640 * (2 + 2 * 4);
/// What a request may cost before it is accepted or refused.
const MAX_REFUSAL: u64 = 512 << 20;

/// Between two looks at a process.
const LOOK: Duration = Duration::from_millis(2);

/// Frames of a video of this many windows.
fn frames(windows: usize) -> usize {
    FRAMES + (windows - 1) * (FRAMES - MOTION)
}

/// The most resident memory of a generation of this many windows, in bytes, as the kernel told the binary at its end.
/// What it tells us (`ru_maxrss`) has the memory of this test process in it, which the child starts as a copy of.
fn peak(bench: &Bench, windows: usize) -> u64 {
    bench.write("voice.wav", &media::tone(16_000, 1, frames(windows) as f64 / 25.0));
    let output = bench.run(&["--image", "portrait.png", "--audio", "voice.wav", "--seed", "1"]).output();
    assert_eq!(output["frames"], frames(windows));
    output["peak_memory"]["host_bytes"].as_u64().expect("it is measured here")
}

#[test]
fn host_memory_is_flat_in_length() {
    let bench = Bench::new();
    let (short, long) = (peak(&bench, 6), peak(&bench, 60));
    let voice = (frames(60) - frames(6)) as u64 * (EMBEDDING + SAMPLES);
    let allowed = short * 11 / 10 + voice;
    assert!(long <= allowed, "60 windows took {long} bytes, 6 took {short}, allowed were {allowed}");
}

#[test]
fn refusals_are_cheap() {
    let bench = Bench::new();
    bench.write("noise.png", &[&media::png(96, 96)[..40], &media::noise(9_900_000)].concat());
    bench.write("wide.png", &media::png_of(8192, 4096, &[0; 64]));
    bench.write("long.wav", &media::wav(8000, 1, Samples::Int16, &[1; 49_999_000]));
    let nan = f32::NAN.to_le_bytes().repeat(12_000_000);
    bench.write("loud.wav", &media::wav(192_000, 8, Samples::Float32, &nan));
    let request = |field: &str, len| format!(r#"{{"input": {{"{field}": "{}"}}}}"#, "A".repeat(len));
    bench.write("image.json", request("image", 13_000_000).as_bytes());
    bench.write("audio.json", request("audio", 66_000_000).as_bytes());
    bench.write("prompt.json", request("prompt", 66_000_000).as_bytes());
    for args in [
        &["--image", "noise.png", "--audio", "voice.wav"][..],
        &["--image", "wide.png", "--audio", "voice.wav"],
        &["--image", "portrait.png", "--audio", "long.wav"],
        &["--image", "portrait.png", "--audio", "loud.wav"],
        &["--input", "image.json", "--audio", "voice.wav"],
        &["--input", "audio.json", "--image", "portrait.png"],
        &["--input", "prompt.json"],
    ] {
        let (code, peak) = run(&mut bench.generate(args));
        assert_eq!(code, Some(2), "{args:?}");
        assert!(peak <= MAX_REFUSAL, "{args:?} took {peak} bytes");
    }
}

/// The exit code of `command`, and its peak resident memory in bytes, as it was a moment before its end at the
/// latest. The peak that the system tells of an ended process is of no use here: it begins with that of this one.
fn run(command: &mut Command) -> (Option<i32>, u64) {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut peak = 0;
    loop {
        peak = peak.max(peak_of(child.id()).unwrap_or(0));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(peak > 0, "it was seen while it ran");
            return (status.code(), peak);
        }
        thread::sleep(LOOK);
    }
}

/// The peak so far of a process that runs.
fn peak_of(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.trim().strip_suffix("kB")?;
    kib.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
