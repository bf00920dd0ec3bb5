//! Any bytes are a weight file, as they are, as the header of one or as the pickle of one: its tensors are read, or
//! something in it is refused as damaged.
#![no_main]

#[path = "../models/weights/archive.rs"]
#[expect(dead_code, reason = "the tests write more kinds of archives")]
mod archive;

use std::cell::RefCell;
use std::io::Cursor;

use candle_core::{DType, Device};
use libfuzzer_sys::fuzz_target;
use talkie::ErrorKind;
use talkie::weights::Weights;
use tempfile::NamedTempFile;

thread_local! {
    /// One file for all inputs, in memory.
    static FILE: RefCell<NamedTempFile> = RefCell::new(NamedTempFile::new_in("/dev/shm").expect("a file in memory"));
}

fn read(bytes: &[u8]) {
    FILE.with_borrow(|file| {
        std::fs::write(file.path(), bytes).expect("the file can be written");
        let weights = match Weights::open(&[file.path()]) {
            Ok(weights) => weights,
            Err(e) => return assert_eq!(e.kind(), ErrorKind::ModelCorrupt, "{e}"),
        };
        let vb = weights.var_builder(DType::F32, &Device::Cpu);
        for name in weights.names() {
            let _ = vb.get_unchecked(&name);
        }
    });
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 3 {
        0 => read(bytes),
        1 => {
            let mut file = (bytes.len() as u64).to_le_bytes().to_vec();
            file.extend(bytes);
            file.resize(file.len() + 64, 7);
            read(&file);
        }
        _ => {
            let storages = [
                archive::Storage::of("FloatStorage", 4, vec![1; 16]),
                archive::Storage::of("BFloat16Storage", 4, vec![2; 8]),
            ];
            let mut file = Cursor::new(Vec::new());
            archive::write(&mut file, bytes, &storages, None).expect("memory can be written");
            read(&file.into_inner());
        }
    }
});
