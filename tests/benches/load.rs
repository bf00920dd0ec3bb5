//! `scripts/bench-load.sh`: how fast weight files become tensors, from a disk whose cache was dropped, beside `dd` and
//! PyTorch on the same files in the same run; and how much memory that takes.
//!
//! The files have the names, shapes and shards of the published ones: all networks at an eighth of their width, read as
//! f32 as the CPU computes in, and the DiT at its real width with 5 of its 40 blocks, read as bf16.

#[path = "../models/weights/archive.rs"]
#[expect(dead_code, reason = "the tests write more kinds of archives")]
mod archive;
#[path = "../models/weights/checkpoint.rs"]
mod checkpoint;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use candle_core::DType;
use checkpoint::{Kind, Network};
use talkie::weights::{LoadMonitor, Weights};

/// What a load may take beside the network.
const MEMORY_BESIDE: u64 = 512 << 20;

/// A row of the table.
struct Case {
    name: &'static str,
    network: Network,
    dtype: DType,
}

fn cases() -> Vec<Case> {
    let small = |name, kind| Case { name, network: Network::new(kind, 8), dtype: DType::F32 };
    let real = Network { layers: 5, ..Network::new(Kind::Dit, 1) };
    vec![
        small("wav2vec2, 1/8", Kind::AudioEncoder),
        small("VAE, 1/8 (.pth)", Kind::Vae),
        small("CLIP, 1/8 (.pth, half of it used)", Kind::ImageEncoder),
        small("UMT5, 1/8 (.pth, bf16)", Kind::TextEncoder),
        small("DiT and adapter, 1/8, 8 files", Kind::Dit),
        Case { name: "DiT and adapter, real width, 5 blocks, as bf16", network: real, dtype: DType::BF16 },
    ]
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["--load", case, ref files @ ..] => load(&cases()[case.parse::<usize>().expect("a number")], files),
        ["--dir", dir, "--rounds", rounds, "--python", python] => {
            compare(Path::new(dir), rounds.parse().expect("a number"), python)
        }
        _ => println!("scripts/bench-load.sh runs this: it needs 15 GB of disk"),
    }
}

/// Loads one network in this process, and prints seconds, bytes, bytes resident, peak of memory and the phases.
fn load(case: &Case, files: &[&str]) {
    let monitor = Arc::new(LoadMonitor::default());
    let started = Instant::now();
    let weights = Weights::open(files).expect("sound files").watched_by(Arc::clone(&monitor));
    let resident = case.network.plan(&weights, case.dtype).expect("a plan").bytes_resident;
    let network = case.network.load(&weights, case.dtype).expect("the network loads");
    let seconds = started.elapsed().as_secs_f64();
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    let peak = 1024 * peak.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number");
    assert!(peak <= resident + MEMORY_BESIDE, "{}: {peak} bytes at most, {resident} resident", case.name);
    let stats = monitor.stats();
    let (read, convert) = (stats.read.as_secs_f64(), stats.convert.as_secs_f64());
    println!("{seconds} {} {resident} {peak} {read} {convert}", stats.bytes_read);
    drop(network);
}

/// Writes the files of each case to `dir`, times the three readers in turn, and deletes them.
fn compare(dir: &Path, rounds: usize, python: &str) {
    println!(
        "| files | read GB | dd GB/s | Talkie GB/s | of dd | PyTorch s | Talkie s | ratio | read / convert s | peak − resident MB |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    for (i, case) in cases().iter().enumerate() {
        let dir = tempfile::tempdir_in(dir).expect("a folder to write to");
        let files = case.network.write(dir.path()).expect("room for the files");
        let file_bytes: u64 = files.iter().map(|file| file.metadata().expect("a file").len()).sum();
        let (mut dd, mut ours, mut peer) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            drop_cache(&files);
            let started = Instant::now();
            files.iter().for_each(|file| {
                run(Command::new("dd").arg(format!("if={}", file.display())).args([
                    "of=/dev/null",
                    "bs=8M",
                    "status=none",
                ]))
                .clear()
            });
            dd.push(started.elapsed().as_secs_f64());

            drop_cache(&files);
            let this = std::env::current_exe().expect("this program");
            let line = run(Command::new(this).args(["--load", &i.to_string()]).args(&files));
            ours.push(
                line.split_whitespace().map(|n| n.parse::<f64>().expect("a number")).collect::<Vec<_>>(),
            );

            drop_cache(&files);
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/benches/peer_load.py");
            let line = run(Command::new(python).arg(script).arg(case.dtype.as_str()).args(&files));
            peer.push(line.trim().parse::<f64>().expect("a number"));
        }
        let our = |i: usize| median(ours.iter().map(|run| run[i]).collect());
        let (seconds, bytes, resident, peak) = (our(0), our(1), our(2), our(3));
        let (dd, ours) = (file_bytes as f64 / median(dd) / 1e9, bytes / seconds / 1e9);
        let peer = median(peer);
        println!(
            "| {} | {:.2} | {dd:.2} | {ours:.2} | {:.2} | {peer:.2} | {seconds:.2} | {:.1} × | {:.2} / {:.2} | {:.0} |",
            case.name,
            bytes / 1e9,
            ours / dd,
            peer / seconds,
            our(4),
            our(5),
            (peak - resident) / 1e6,
        );
    }
}

/// Has the system forget what it holds of `files`.
fn drop_cache(files: &[PathBuf]) {
    for file in files {
        run(Command::new("dd").arg(format!("if={}", file.display())).args([
            "iflag=nocache",
            "count=0",
            "status=none",
        ]));
    }
}

/// What a command prints.
fn run(command: &mut Command) -> String {
    let output = command.stderr(std::process::Stdio::inherit()).output().expect("the command starts");
    assert!(output.status.success(), "{command:?}");
    String::from_utf8(output.stdout).expect("text")
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
