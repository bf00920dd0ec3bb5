//! docs/RELIABILITY.md names the tests that hold each row; this holds the document to the tests.

use std::collections::BTreeSet;
use std::path::Path;

const ROWS: usize = 84;

/// The names that start with `fault_` in `text`, as far as `accept` likes what stands before them.
fn names(text: &str, accept: impl Fn(&str) -> bool) -> BTreeSet<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let found = text.match_indices("fault_").filter(|(at, _)| accept(&text[..*at]));
    found.map(|(at, _)| text[at..].chars().take_while(|c| is_name(*c)).collect()).collect()
}

/// The tests of the fault matrix in every source file below `folder`.
fn tests_below(folder: &Path, tests: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            tests_below(&path, tests);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            tests.append(&mut names(&text, |before| before.ends_with("fn ")));
        }
    }
}

#[test]
fn the_fault_matrix_lists_every_row_and_every_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let document = std::fs::read_to_string(root.join("docs/RELIABILITY.md")).unwrap();
    let mut tests = BTreeSet::new();
    for folder in ["handler", "tests"] {
        tests_below(&root.join(folder), &mut tests);
    }
    assert!(tests.len() > 60, "the tests are found: {}", tests.len());
    assert_eq!(names(&document, |before| before.ends_with('`')), tests, "document (left) and tests (right)");
    for row in 1..=ROWS {
        let line = document.lines().find(|line| line.starts_with(&format!("| {row} |")));
        let cells: Vec<_> = line.unwrap_or_else(|| panic!("row {row} is missing")).split('|').collect();
        assert!(cells.len() == 6 && !cells[4].trim().is_empty(), "row {row} names a test or a reason");
    }
}
