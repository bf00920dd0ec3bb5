//! The import rules of docs/ARCHITECTURE.md, read off the `use` lines.

use std::path::{Path, PathBuf};

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).expect("a source folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files
}

/// Every line of the sources below `room` that is not a comment and holds one of `forbidden`.
fn visitors(room: &str, forbidden: &[&str]) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut room_files = vec![root.join(format!("{room}.rs"))];
    room_files.retain(|f| f.exists());
    if root.join(room).is_dir() {
        room_files.extend(sources(&root.join(room)));
    }
    assert!(!room_files.is_empty(), "there is no room `{room}`");
    let mut found = Vec::new();
    for file in room_files {
        let text = std::fs::read_to_string(&file).expect("source text");
        for (number, line) in text.lines().enumerate() {
            let code = line.trim_start();
            if !code.starts_with("//") && forbidden.iter().any(|f| code.contains(f)) {
                found.push(format!("{}:{}: {code}", file.display(), number + 1));
            }
        }
    }
    found
}

#[test]
fn the_library_opens_no_socket_and_reads_no_environment() {
    let found = visitors("", &["std::net", "std::env", "tokio", "reqwest"]);
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn networks_know_tensors_only() {
    let outside = [
        "crate::pipeline",
        "crate::weights",
        "crate::media",
        "crate::tokenizer",
        "crate::registry",
        "std::fs",
    ];
    let found = visitors("models", &outside);
    assert!(found.is_empty(), "{found:#?}");
    for network in ["clip_vision", "umt5", "wan", "wan_vae", "wav2vec2"] {
        let others = ["clip_vision", "umt5", "wan", "wan_vae", "wav2vec2"]
            .into_iter()
            .filter(|other| *other != network)
            .flat_map(|other| [format!("models::{other}::"), format!("super::{other}::")])
            .collect::<Vec<_>>();
        let others: Vec<&str> = others.iter().map(String::as_str).collect();
        let found = visitors(&format!("models/{network}"), &others);
        assert!(found.is_empty(), "{found:#?}");
    }
}

#[test]
fn the_loops_arithmetic_knows_no_network() {
    for room in
        ["scheduler", "pipeline/guidance", "pipeline/plan", "pipeline/windows", "pipeline/color", "nn"]
    {
        let found = visitors(room, &["crate::models", "super::models"]);
        assert!(found.is_empty(), "{found:#?}");
    }
}

#[test]
fn cuda_is_asked_for_in_few_places() {
    let found = visitors("", &["feature = \"cuda\""]);
    let allowed = |line: &String| ["src/device/", "src/nn/"].iter().any(|place| line.contains(place));
    assert!(found.iter().all(allowed), "{found:#?}");
}
