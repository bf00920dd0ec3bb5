//! The kernels for GPUs that a processor can run.

use std::path::Path;
use std::process::Command;

#[test]
fn the_fused_kernels_compute_their_formulas() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/check-kernels.sh");
    let run = Command::new(script).output().expect("a shell");
    let said = [run.stdout, run.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(run.status.success(), "{said}");
    assert!(said.lines().filter(|line| line.starts_with("ok ")).count() > 50, "{said}");
}
