//! The golden folder is complete, and nothing in it is outside of the tests.

use crate::support::{index, root};

/// The components that a test module of this binary reads file by file.
const COMPONENTS: [&str; 11] =
    ["audio", "clip", "dit", "image", "lora", "pipeline", "quant", "samplers", "umt5", "vae", "wav2vec2"];

#[test]
fn every_listed_file_is_there_and_belongs_to_a_tested_component() {
    for (path, entry) in index() {
        let component = path.split('/').next().unwrap_or_default();
        if matches!(component, "manifest" | "runpod") {
            continue; // not part of the layout
        }
        assert!(COMPONENTS.contains(&component), "{path} belongs to no tested component");
        let size = std::fs::metadata(root().join(&path)).unwrap_or_else(|e| panic!("{path}: {e}")).len();
        assert_eq!(Some(size), entry["bytes"].as_u64(), "{path} has another size than the index says");
    }
}
