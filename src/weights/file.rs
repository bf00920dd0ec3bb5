//! Safetensors by positional reads. A memory map would fail on network volumes and would let the page cache decide
//! how much memory a load takes; the header comes from outside, so nothing in it is believed.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::ErrorKind as Io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use super::convert::{self, Scratch};
use crate::{Error, ErrorKind, Result};

/// The longest header that is read, as in the format's reference implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// One tensor of an open file.
#[derive(Clone)]
pub(super) struct FileTensor {
    file: Arc<(File, PathBuf)>,
    name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Of the first byte, from the start of the file.
    offset: u64,
}

impl FileTensor {
    /// The file that holds the tensor.
    pub(super) fn path(&self) -> &Path {
        &self.file.1
    }

    /// Reads elements `start..start + out.len()` as f32.
    pub(super) fn read(&self, start: usize, out: &mut [f32], scratch: &mut Scratch) -> Result<()> {
        let Some(size) = convert::element_bytes(self.dtype) else {
            return Err(corrupt(
                self.path(),
                &self.name,
                format!("is {:?}, which no network here uses", self.dtype),
            ));
        };
        scratch.bytes.resize(out.len() * size, 0);
        let offset = self.offset + (start * size) as u64;
        self.file.0.read_exact_at(&mut scratch.bytes, offset).map_err(|e| {
            corrupt(self.path(), &self.name, format!("cannot be read at byte {offset}: {e}")).with_source(e)
        })?;
        convert::decode(self.dtype, &scratch.bytes, out);
        Ok(())
    }
}

/// Opens `path` and checks its header: every tensor lies inside of the file, they neither overlap nor leave holes,
/// no name is there twice. Reads no tensor.
pub(super) fn open(path: &Path) -> Result<Vec<(String, FileTensor)>> {
    let file = File::open(path).map_err(|e| {
        let kind = if e.kind() == Io::NotFound { ErrorKind::ModelNotFound } else { ErrorKind::ModelCorrupt };
        Error::new(kind, format!("weight file {} cannot be opened: {e}", path.display())).with_source(e)
    })?;
    let bad =
        |what: String| Error::new(ErrorKind::ModelCorrupt, format!("weight file {}: {what}", path.display()));
    let file_bytes = file.metadata().map_err(|e| bad(e.to_string()).with_source(e))?.len();
    let header_bytes = header_bytes(&file, file_bytes).map_err(bad)?;
    let mut header = vec![0; header_bytes as usize];
    file.read_exact_at(&mut header, 8).map_err(|e| bad(format!("header: {e}")).with_source(e))?;
    let Header(entries) =
        serde_json::from_slice(&header).map_err(|e| bad(format!("header: {e}")).with_source(e))?;

    let data_start = 8 + header_bytes;
    check_layout(&entries, file_bytes - data_start).map_err(|(name, what)| corrupt(path, &name, what))?;
    let file = Arc::new((file, path.to_owned()));
    Ok(entries
        .into_iter()
        .map(|(name, entry)| {
            let Entry { dtype, shape, data_offsets } = entry;
            let file = Arc::clone(&file);
            (name.clone(), FileTensor { file, name, dtype, shape, offset: data_start + data_offsets.0 })
        })
        .collect())
}

/// An error about one tensor of a file.
fn corrupt(path: &Path, tensor: &str, what: String) -> Error {
    Error::new(ErrorKind::ModelCorrupt, format!("weight file {}: tensor `{tensor}` {what}", path.display()))
}

/// The length in front of the header.
fn header_bytes(file: &File, file_bytes: u64) -> Result<u64, String> {
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).map_err(|_| format!("{file_bytes} bytes are too few for a header"))?;
    if length.starts_with(b"PK") {
        return Err("is a zip archive (a torch pickle?), expected safetensors".to_owned());
    }
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES {
        return Err(format!("header of {length} bytes, expected at most {MAX_HEADER_BYTES}"));
    }
    if length > file_bytes - 8 {
        return Err(format!("header of {length} bytes in a file of {file_bytes}: it is cut short"));
    }
    Ok(length)
}

/// Fails with a tensor's name and what is wrong with it.
fn check_layout(entries: &[(String, Entry)], data_bytes: u64) -> Result<(), (String, String)> {
    let mut ranges = Vec::with_capacity(entries.len());
    for (name, Entry { dtype, shape, data_offsets: (start, end) }) in entries {
        let fail = |what: String| Err((name.clone(), what));
        let bits = shape.iter().try_fold(dtype.bitsize(), |n, d| n.checked_mul(*d));
        let Some(bits) = bits else { return fail(format!("has the shape {shape:?}, which overflows")) };
        if start > end || end - start != bits.div_ceil(8) as u64 {
            let needed = bits.div_ceil(8);
            return fail(format!("takes {needed} bytes as {dtype:?} {shape:?}, but lies at {start}..{end}"));
        }
        if *end > data_bytes {
            return fail(format!("ends at byte {end} of {data_bytes}: the file is cut short"));
        }
        ranges.push((*start, *end, name));
    }
    ranges.sort();
    let mut expected = 0;
    for (start, end, name) in ranges {
        if start != expected {
            let what = if start < expected { "overlaps the one before" } else { "follows a hole" };
            return Err((name.clone(), format!("starts at byte {start}, expected {expected}: it {what}")));
        }
        expected = end;
    }
    if expected != data_bytes {
        let last = entries.iter().max_by_key(|(_, e)| e.data_offsets.1).map_or("none", |(name, _)| name);
        return Err((last.to_owned(), format!("is the last and ends at byte {expected} of {data_bytes}")));
    }
    Ok(())
}

/// The header's tensors in the order of the file.
struct Header(Vec<(String, Entry)>);

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    /// Of the first byte and past the last, from the end of the header.
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut entries, mut seen) = (Vec::new(), HashSet::new());
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("tensor `{name}` is there twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<HashMap<String, String>>()?;
                        continue;
                    }
                    let entry =
                        map.next_value().map_err(|e| A::Error::custom(format!("tensor `{name}`: {e}")))?;
                    entries.push((name, entry));
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of `header` and `data_bytes` zeros.
    fn write(header: &str, data_bytes: usize) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data_bytes, 0);
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    fn tensor(name: &str, offsets: [u64; 2]) -> String {
        format!(r#""{name}":{{"dtype":"F32","shape":[2],"data_offsets":{offsets:?}}}"#)
    }

    #[test]
    fn a_sound_file_opens_in_any_order_of_its_tensors() {
        let header = format!(
            r#"{{"__metadata__":{{"format":"pt"}},{},{}}}"#,
            tensor("b", [8, 16]),
            tensor("a", [0, 8])
        );
        let tensors = open(write(&header, 16).path()).unwrap();
        let names: Vec<_> = tensors.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["b", "a"]);
    }

    #[test]
    fn broken_headers_are_refused_with_the_file_and_the_tensor() {
        let one = |entry: &str| format!(r#"{{"x":{entry}}}"#);
        let cases = [
            (format!("{{{},{}}}", tensor("x", [0, 8]), tensor("y", [4, 12])), 12, "`y` starts at byte 4"),
            (format!("{{{},{}}}", tensor("x", [0, 8]), tensor("y", [12, 20])), 20, "follows a hole"),
            (format!("{{{},{}}}", tensor("x", [0, 8]), tensor("x", [8, 16])), 16, "`x` is there twice"),
            (format!("{{{}}}", tensor("x", [0, 8])), 7, "`x` ends at byte 8 of 7"),
            (format!("{{{}}}", tensor("x", [0, 8])), 9, "`x` is the last and ends at byte 8 of 9"),
            (format!("{{{}}}", tensor("x", [0, 4])), 4, "`x` takes 8 bytes"),
            (format!("{{{}}}", tensor("x", [8, 0])), 8, "`x` takes 8 bytes"),
            (one(r#"{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}"#), 0, "overflows"),
            (one(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#), 4, "`x`: invalid value"),
            (one(r#"{"dtype":"Q8","shape":[1],"data_offsets":[0,4]}"#), 4, "`x`: unknown variant"),
            (one(r#"{"dtype":"F32","data_offsets":[0,4]}"#), 4, "`x`: missing field `shape`"),
            (one("7"), 0, "`x`: invalid type"),
            ("[]".to_owned(), 0, "an object of tensors"),
            ("{".to_owned(), 0, "header: EOF"),
            ("[".repeat(100_000), 0, "header: "),
        ];
        for (header, data_bytes, expected) in cases {
            let file = write(&header, data_bytes);
            let error = open(file.path()).map(|_| ()).unwrap_err();
            let message = error.to_string();
            assert_eq!(error.kind(), ErrorKind::ModelCorrupt, "{message}");
            assert!(message.contains(expected), "{message}, expected {expected}");
            assert!(message.contains(file.path().to_str().unwrap()), "{message}");
        }
    }

    #[test]
    fn files_that_are_no_safetensors_are_refused() {
        let cases: [(&[u8], &str); 5] = [
            (b"", "0 bytes are too few"),
            (b"\x01\x02", "2 bytes are too few"),
            (b"PK\x03\x04 torch archive", "torch pickle"),
            (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "expected at most"),
            (b"\x00\x10\x00\x00\x00\x00\x00\x00{}", "cut short"),
        ];
        for (bytes, expected) in cases {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), bytes).unwrap();
            let message = open(file.path()).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}, expected {expected}");
        }
    }

    #[test]
    fn a_missing_file_is_not_found() {
        let error = open(Path::new("no/such.safetensors")).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ModelNotFound);
        assert!(error.to_string().contains("no/such.safetensors"));
    }
}
