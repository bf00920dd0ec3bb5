//! The loader on checkpoints with the real names and shards: `tests/benches/load.rs` at a small size.

use std::process::Command;
use std::sync::Arc;

use candle_core::DType;
use talkie::ErrorKind;
use talkie::weights::{LoadMonitor, Weights};

use super::checkpoint::{Kind, Network};

/// A network that is larger than what the loader holds beside it.
const LARGE: Network = Network { kind: Kind::Dit, divisor: 16, layers: 20 };

/// Tells a copy of this process what to load, and from where.
const CHILD: &str = "TALKIE_TEST_LOAD";

#[test]
fn every_network_loads_from_files_like_the_published_ones() {
    for kind in super::KINDS {
        let network = Network { layers: 3, ..Network::new(kind, 32) };
        let dir = tempfile::tempdir().unwrap();
        let files = network.write(dir.path()).unwrap();
        let monitor = Arc::new(LoadMonitor::default());
        let weights = Weights::open(&files).unwrap().watched_by(Arc::clone(&monitor));
        let plan = network.plan(&weights, DType::F32).unwrap();
        assert_eq!(monitor.bytes_read(), 0, "{kind:?}: a plan reads nothing");
        network.load(&weights, DType::F32).unwrap();
        // What lies between two tensors is read when that saves a read.
        let all = if kind == Kind::Dit { 1.0 } else { 2.0 };
        let read = monitor.bytes_read() as f64 / plan.bytes_to_read as f64;
        assert!((1.0..=all).contains(&read), "{kind:?}: {read}");
        let stats = monitor.stats();
        assert!(stats.wall >= stats.read + stats.convert + stats.to_device, "{stats:?}");

        let error = network.load(&Weights::open(&files[..files.len() - 1]).unwrap(), DType::F32);
        assert_eq!(error.map(|_| ()).unwrap_err().kind(), ErrorKind::ModelCorrupt, "{kind:?}");
    }
}

#[test]
fn a_load_takes_little_more_memory_than_the_network() {
    let network = LARGE;
    let dir = tempfile::tempdir().unwrap();
    network.write(dir.path()).unwrap();
    let resident: u64 = child("load", dir.path());
    // Not the product's bound of 512 MB, under which this network would fit twice: eight readers, and the process.
    assert!(resident < 144 << 20, "{} MiB beside the network", resident >> 20);
}

#[test]
fn a_header_of_a_million_tensors_takes_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let mut header = String::from("{");
    for i in 0..1_000_000 {
        header +=
            &format!(r#""{i:x}":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}},"#, 4 * i, 4 * i + 4);
    }
    header.pop();
    header.push('}');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    let file = dir.path().join("bomb.safetensors");
    std::fs::write(&file, bytes).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(header.len() as u64 + 8 + 4_000_000)
        .unwrap();
    let peak = child("bomb", dir.path());
    assert!(peak < 256 << 20, "{} MiB", peak >> 20);
}

/// What [`in_a_child`] prints.
fn child(what: &str, dir: &std::path::Path) -> u64 {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "weights::drill::in_a_child", "--nocapture", "--test-threads=1"])
        .env(CHILD, format!("{what}:{}", dir.display()))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let value = text.lines().find_map(|line| line.split_once("result=")).expect("a result").1;
    value.trim().parse().unwrap()
}

/// Not a test: what [`child`] runs in a process of its own, whose peak of memory it prints.
#[test]
fn in_a_child() {
    let Ok(what) = std::env::var(CHILD) else { return };
    let (what, dir) = what.split_once(':').unwrap();
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    if what == "bomb" {
        let error = Weights::open(&files).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("more than 65536 tensors"), "{error}");
        println!("result={}", peak_bytes());
        return;
    }
    let network = LARGE;
    let weights = Weights::open(&files).unwrap();
    let resident = network.plan(&weights, DType::F32).unwrap().bytes_resident;
    let built = network.load(&weights, DType::F32).unwrap();
    println!("result={}", peak_bytes().saturating_sub(resident));
    drop(built);
}

fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix("kB").unwrap().trim().parse::<u64>().unwrap() << 10
}
