//! The header of a safetensors file. It comes from outside, so nothing in it is believed, and what it can make us
//! allocate is bounded.

use std::collections::HashSet;
use std::sync::Arc;

use safetensors::Dtype;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::file::{FileTensor, WeightFile};
use super::{MAX_NAME_BYTES, MAX_RANK, MAX_TENSORS};
use crate::Result;

/// The longest header that is read, as in the format's reference implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Checks the header of `file`: every tensor lies inside of the file, they neither overlap nor leave holes, no name is
/// there twice. Reads no tensor.
pub(super) fn index(file: &Arc<WeightFile>) -> Result<Vec<FileTensor>> {
    let header_bytes = header_bytes(file).map_err(|what| file.corrupt(what))?;
    let mut header = vec![0; header_bytes as usize];
    file.read_exact(8, &mut header)
        .map_err(|(_, e)| file.corrupt(format_args!("header: {e}")).with_source(e))?;
    let Header(entries) = serde_json::from_slice(&header)
        .map_err(|e| file.corrupt(format_args!("header: {e}")).with_source(e))?;
    drop(header);

    let data_start = 8 + header_bytes;
    check_layout(&entries, file.bytes() - data_start)
        .map_err(|(name, what)| file.corrupt_tensor(&name, what))?;
    let tensors = entries.into_iter().map(|(name, entry)| FileTensor {
        file: Arc::clone(file),
        name,
        dtype: entry.dtype,
        shape: entry.shape.0,
        offset: data_start + entry.data_offsets.0,
        strides: None,
        is_big_endian: false,
    });
    Ok(tensors.collect())
}

/// The length in front of the header.
fn header_bytes(file: &WeightFile) -> Result<u64, String> {
    let mut length = [0; 8];
    file.read_exact(0, &mut length)
        .map_err(|_| format!("{} bytes are too few for a header", file.bytes()))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES {
        return Err(match other_format(file) {
            Some(format) => format.to_owned(),
            None => format!("header of {length} bytes, expected at most {MAX_HEADER_BYTES}"),
        });
    }
    if length > file.bytes() - 8 {
        return Err(format!("header of {length} bytes in a file of {}: it is cut short", file.bytes()));
    }
    Ok(length)
}

/// What a file is whose first bytes are no length.
fn other_format(file: &WeightFile) -> Option<&'static str> {
    let mut head = vec![0; file.bytes().min(512) as usize];
    file.read_exact(0, &mut head).ok()?;
    let lower = head.to_ascii_lowercase();
    let old_torch = "is in a format of torch before 1.6, expected a zip archive: \
        write it anew with `torch.save(torch.load(path), path)`";
    match lower.as_slice() {
        // A pickle's protocol, which those files start with.
        [0x80, 1..=5, ..] => Some(old_torch),
        head if head.get(257..262) == Some(b"ustar") => Some(old_torch),
        head if head.starts_with(b"version https://git-lfs") => {
            Some("is a pointer of Git LFS, not the file itself: fetch it anew")
        }
        head if head.trim_ascii_start().starts_with(b"<") => {
            Some("is a web page, not weights: fetch the file anew")
        }
        _ => None,
    }
}

/// Fails with a tensor's name and what is wrong with it.
fn check_layout(entries: &[(String, Entry)], data_bytes: u64) -> Result<(), (String, String)> {
    let mut ranges = Vec::with_capacity(entries.len());
    for (name, Entry { dtype, shape: Dims(shape), data_offsets: (start, end) }) in entries {
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
    shape: Dims,
    /// Of the first byte and past the last, from the end of the header.
    data_offsets: (u64, u64),
}

/// A tensor's dimensions, of which there are few.
struct Dims(Vec<usize>);

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Items;
        impl<'de> Visitor<'de> for Items {
            type Value = Dims;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a list of dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Dims, A::Error> {
                let mut dims = Vec::new();
                while let Some(dim) = items.next_element()? {
                    if dims.len() == MAX_RANK {
                        return Err(A::Error::custom(format!("more than {MAX_RANK} dimensions")));
                    }
                    dims.push(dim);
                }
                Ok(Dims(dims))
            }
        }
        deserializer.deserialize_seq(Items)
    }
}

/// `__metadata__`: texts by name, of which none is used.
struct Metadata;

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> Visitor<'de> for Texts {
            type Value = Metadata;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object of texts")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                while map.next_entry::<IgnoredAny, String>()?.is_some() {}
                Ok(Metadata)
            }
        }
        deserializer.deserialize_map(Texts)
    }
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
                    if name.len() > MAX_NAME_BYTES {
                        return Err(A::Error::custom(format!("a name of {} bytes", name.len())));
                    }
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("tensor `{name}` is there twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<Metadata>()?;
                        continue;
                    }
                    if entries.len() == MAX_TENSORS {
                        return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
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
