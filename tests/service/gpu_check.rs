//! `scripts/gpu-check.sh`, which measures on a GPU, shows itself on the processor.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::clients;
use crate::support::Outcome;

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/gpu-check.sh")
}

#[test]
fn the_check_runs_from_parity_to_the_table_and_says_what_is_missing() {
    if clients::python3().is_none() {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let out = work.path().join("check.md");
    // A Python that surely has no torch: the one of the system without its packages.
    let python = work.path().join("python");
    std::fs::write(&python, "#!/bin/sh\nexec python3 -I -S \"$@\"\n").unwrap();
    std::fs::set_permissions(&python, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let run = Command::new(script())
        .args([env!("CARGO_BIN_EXE_handler"), out.to_str().unwrap(), "--device", "cpu", "--tiny"])
        .env("PYTHON", &python)
        .env("RUNS", "1")
        .output()
        .unwrap();
    let run = Outcome::of(run);
    assert_eq!(run.code, Some(0), "{}{}", run.stdout, run.stderr);
    let table = std::fs::read_to_string(&out).unwrap();
    assert_eq!(table, run.stdout);
    for row in ["| attention |", "| dit_forward |", "| vae_decode |", "DiT, two persons", "reference: VAE"] {
        assert!(table.contains(row), "{row}: {table}");
    }
    assert!(table.contains("missing: torch"), "{table}");
    assert!(!table.contains("TOO LARGE"), "{table}");
}

#[test]
fn a_device_that_cannot_be_opened_is_a_failure_with_a_reason() {
    if clients::python3().is_none() {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let out = work.path().join("check.md");
    let run = Command::new(script())
        .args([env!("CARGO_BIN_EXE_handler"), out.to_str().unwrap(), "--tiny"])
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap();
    let run = Outcome::of(run);
    assert_eq!(run.code, Some(1), "{}{}", run.stdout, run.stderr);
    assert!(run.stderr.contains("GPU_UNAVAILABLE"), "{}", run.stderr);
    assert!(run.stdout.contains("missing: speed: the device could not be opened"), "{}", run.stdout);
}
